"""Run something as another user: root may read and write everything, and most permission bugs hide from it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534


def open_way_to(path: Path) -> None:
    """Lets other users pass through the folders above `path` (pytest makes them 0700)."""
    for folder in path.parents:
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)


def as_nobody(call: Callable[[], Any]) -> Any:
    """What `call` returns in a child process of user nobody; the exception that it raises is returned, too.

    A forked child: the interpreter's own files may be closed to nobody, so all that is needed must be imported before.
    """
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                answer = call()
            except Exception as error:  # noqa: BLE001 - it is the answer
                answer = error
            with open(writing, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data)  # noqa: S301 - our own child's
