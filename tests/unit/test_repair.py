"""What starts a new agent in a container, as far as no container is needed."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest

from berth.engine.crun import repair


def test_the_agents_copy_is_sealed() -> None:
    fd = repair._sealed("/bin/true")
    try:
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
    finally:
        os.close(fd)


@pytest.mark.parametrize(("failures", "error"), [(2, None), (9, errno.EBUSY)])
def test_pages_that_the_kernel_holds_on_to(monkeypatch: pytest.MonkeyPatch, failures: int, error: int | None) -> None:
    left = [failures]

    def busy(*_arguments: object) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return 0

    monkeypatch.setattr(fcntl, "fcntl", busy)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    if error is None:
        repair._seal(0)
    else:
        with pytest.raises(OSError, match="busy"):
            repair._seal(0)
