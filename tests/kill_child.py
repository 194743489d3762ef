"""The command line in a process that is to die: says in which phase of the commit it is, and kills itself where told.

    python kill_child.py SPEC WORDS...     SPEC is JSON: phase, nth, when (before or after), fallback

Each phase is a line of its output, written when it begins.

Product code has no hooks for this: the operations are wrapped from outside, and the kill is a real SIGKILL.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from kill_phases import PHASES

spec: dict[str, Any] = json.loads(sys.argv[1])
phase = ""
counts: collections.Counter[str] = collections.Counter()


def enter(name: str) -> None:
    """The commit's phases only go on."""
    global phase
    if not phase or PHASES.index(name) > PHASES.index(phase):
        phase = name
        report(name)


def report(name: str) -> None:
    """Tell the parent, which sees the last word of the dead."""
    os.write(1, f"{name}\n".encode())


def strike(name: str, when: str) -> None:
    """Die, if this is the place."""
    if name == spec.get("phase") and counts[name] == spec.get("nth") and when == spec.get("when"):
        os.kill(os.getpid(), signal.SIGKILL)


def counted(call: Any) -> Any:
    """`call`, counted."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Without exchange the old slot is set aside in the midst of the publishing.
        aside = spec.get("fallback") and phase == "exchange" and any("/old-" in str(arg) for arg in args)
        name = "set-aside" if aside else phase
        counts[name] += 1
        if aside:
            report(name)
        strike(name, "before")
        try:
            return call(*args, **kwargs)
        finally:
            strike(name, "after")
            if aside:
                report(phase)

    return wrapper


def during(module: Any, name: str, phase: str) -> None:
    """From the call of a function on, that is the phase."""
    call = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        enter(phase)
        return call(*args, **kwargs)

    setattr(module, name, wrapper)


def look(event: str, _: tuple[Any, ...]) -> None:
    """What happens before the first operation of ours: imports, and files opened to be read."""
    if event in ("open", "import") and phase == "start-up":
        counts["start-up"] += 1
        strike("start-up", "before")


enter("start-up")
if spec.get("phase") == "start-up":
    sys.addaudithook(look)

from ckptstore import cli, commit, native, staging  # noqa: E402

unlink = os.unlink


def unlink_and_see(path: Any, **kwargs: Any) -> None:
    if str(path).endswith("/journal.json"):
        enter("journal removal")
    unlink(path, **kwargs)


os.unlink = unlink_and_see  # type: ignore[assignment]
if spec.get("fallback"):

    def refuse(a: Any, b: Any) -> None:
        raise OSError(22, "Invalid argument", str(a), None, str(b))

    native.rename_exchange = refuse
for name in ("rename", "mkdir", "rmdir", "unlink", "fsync", "chmod"):
    setattr(os, name, counted(getattr(os, name)))
for name in ("rename_exchange", "rename_noreplace", "fsync_path"):
    setattr(native, name, counted(getattr(native, name)))
during(native, "copy_files", "copy")
during(staging, "_describe", "manifest")
during(commit, "publish", "journal")
during(commit, "_publish_one", "exchange")
if not spec.get("fallback"):
    during(commit, "_set_aside", "set-aside")
sys.exit(cli.run(sys.argv[2:]))
