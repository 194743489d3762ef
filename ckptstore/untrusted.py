"""Files and numbers that somebody else may have put there: torn, of another kind, or made to do harm."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, BinaryIO

OUT_OF_RANGE = 1 << 63  #: no step, size or time reaches it; what does may be too long to be printed


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading. OSError for anything else: a link (ELOOP), a folder, a pipe or a device (EINVAL).

    Never waits for a pipe's other end. The folders above are taken as they are: `backends.local.open_beneath` looks at these.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return open(descriptor, "rb")


def whole(value: Any, *, low: int = -1) -> int:
    """`value` if it is a whole number from `low` that something can be counted with; ValueError otherwise."""
    if type(value) is not int or not low <= value < OUT_OF_RANGE:
        raise ValueError(f"{value!r:.40} is no whole number from {low}")
    return value


def number(value: Any) -> float:
    """`value` as a finite float; ValueError for what is none."""
    if type(value) not in (int, float) or not abs(value) < OUT_OF_RANGE:  # which NaN is not either
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)
