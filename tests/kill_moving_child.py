"""`push` or `pull` in a process that is to die: says which phase it is in, and is killed from outside.

    python kill_moving_child.py DESCRIPTOR WORDS...     a line for each phase that begins

Product code has no hooks for this: the functions are wrapped from outside.
"""

from __future__ import annotations

import os
import sys
from typing import Any

report = int(sys.argv[1])


def tell(name: str) -> None:
    """The parent sees the last word of the dead."""
    os.write(report, f"{name}\n".encode())


def during(owner: Any, name: str, phase: str) -> None:
    """From the call of a function on, that is the phase."""
    call = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tell(phase)
        return call(*args, **kwargs)

    setattr(owner, name, wrapper)


tell("start-up")
from ckptstore import cli  # noqa: E402
from ckptstore.transfer import claims, pull, push  # noqa: E402

for owner, name, phase in (
    (claims.Place, "find", "look"),
    (claims, "make", "claim"),
    (push._Push, "send", "data"),
    (push._Push, "_look_again", "look again"),
    (claims.Place, "publish", "manifest"),
    (claims, "release", "claim away"),
    (pull, "_described", "look"),
    (pull, "fill", "fetch"),
    (pull, "_finish", "manifest"),
    (pull, "_publish", "publish"),
    (pull.side_folders, "discard", "discard"),
):
    during(owner, name, phase)
sys.exit(cli.run(sys.argv[2:]))
