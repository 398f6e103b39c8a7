"""Run the command line as ``python -m berth``."""

import sys

from berth.cli.main import main

sys.exit(main())
