"""The command line: reads argv, prints, chooses the exit status. Top layer; nobody imports it."""
