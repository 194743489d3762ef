"""Pins: checkpoints that retention never prunes. `pins.json` in the run's side folder, replaced atomically under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ckptstore import side as side_folders
from ckptstore.errors import CkptStoreError, StorageError, from_os_error
from ckptstore.untrusted import number, open_regular, whole

NAME = "pins.json"
MAX_BYTES = 1 << 20


class Pin(NamedTuple):
    """One checkpoint kept, by its global step; `path` is relative to the run, empty for all parts of the step."""

    step: int
    path: str = ""
    why: str = ""
    at_s: float = 0.0


def read(side: str) -> tuple[Pin, ...]:
    """The pins of a run, by step; none where there is no file.

    StorageError where the file is there and cannot be understood: whoever prunes must stop then.
    """
    path = os.path.join(side, NAME)
    try:
        with open_regular(path) as file:
            document = json.loads(file.read(MAX_BYTES))
        pins = [Pin(whole(p["step"]), str(p["path"]), str(p["why"]), number(p["at"])) for p in document["pins"]]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StorageError(
            f"{path} is damaged ({error!r:.80})",
            operation="read",
            path=path,
            hint="Remove it, and pin again what must be kept (ckptstore status --pin STEP).",
        ) from error
    return tuple(sorted(pins))


def add(side: str, step: int, *, path: str = "", why: str = "") -> None:
    """Pin a step; an earlier pin of it gets the new reason. The side folder must exist."""
    _change(side, lambda pins: [*(pin for pin in pins if pin.step != step), Pin(step, path, why, round(time.time(), 3))])


def remove(side: str, step: int) -> bool:
    """Unpin a step; whether it was pinned."""
    before = read(side)
    if any(pin.step == step for pin in before):
        _change(side, lambda pins: [pin for pin in pins if pin.step != step])
        return True
    return False


def _change(side: str, change: Callable[[tuple[Pin, ...]], list[Pin]]) -> None:
    path = os.path.join(side, NAME)
    try:
        with _locked(side):
            pins = sorted(change(read(side)))
            shown = [{"step": pin.step, "path": pin.path, "why": pin.why, "at": pin.at_s} for pin in pins]
            side_folders.replace_durably(path, json.dumps({"version": 1, "pins": shown}, indent=2).encode() + b"\n")
    except CkptStoreError:
        raise
    except OSError as error:
        raise from_os_error(error, doing="writing", path=path) from error


@contextlib.contextmanager
def _locked(side: str) -> Iterator[None]:
    """One change at a time: ranks that trip together pin the same checkpoint, and a person may pin meanwhile."""
    descriptor = os.open(side, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # no flock on some network file systems: the last change wins there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
