"""Checkpoints of a history that training has left: it went back to an older one, and theirs are the higher numbers since.

`left.json` in the run's side folder (of a store of steps at a URL, below the URL): the checkpoint's place → which save it was,
and why it counts no more. It counts again once its step is saved anew, or where somebody names it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from ckptstore import side as side_folders
from ckptstore.errors import StorageError, from_os_error
from ckptstore.untrusted import open_regular

log = logging.getLogger(__name__)

NAME = "left.json"
MAX_BYTES = 4 << 20


class Left(NamedTuple):
    """One save that was left. It is the same one by its manifest, or where it has none, by its files."""

    commit: str  #: its manifest's; "" without one
    mark: str  #: Checkpoint.mark
    why: str = ""
    aside: str = ""  #: the slot that was set aside by the setup that went back: undoing it forgets this

    def same_save(self, other: Left) -> bool:
        """Whether both are of one save."""
        return self.mark == other.mark or (self.commit != "" and self.commit == other.commit)


def gone_back_to(step: int, by: str) -> str:
    """Why what is newer was left: `by` setup or save."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"left: {'a save' if by == 'save' else by} went back to step {step} on {now}"


def warn(step: int, leaves: Mapping[str, Left]) -> None:
    """Say that a save leaves something: it may be a run that should have resumed, and began anew."""
    log.warning(
        "step %d goes back: %d saved step%s of higher numbers %s left, and count no more where none is named (remove %s, and "
        "they do)",
        step,
        len(leaves),
        "s" * (len(leaves) > 1),
        "are" if len(leaves) > 1 else "is",
        NAME,
    )


def known(side: str) -> dict[str, Left]:
    """What was left, by its place in the run; nothing where there is no record. StorageError for one that is damaged."""
    path = os.path.join(side, NAME)
    try:
        with open_regular(path) as file:
            return parse(file.read(MAX_BYTES + 1), path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error


def parse(data: bytes, path: str) -> dict[str, Left]:
    """The record in `data`, which was read from `path`. StorageError for what is none."""
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return {
            str(place): Left(*(str(entry[field]) for field in Left._fields))
            for place, entry in json.loads(data)["left"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{path} is damaged ({error!r:.80}): which checkpoints training has left is not known",
            operation="read",
            path=path,
            hint="Remove it, and name the step to resume from.",
        ) from error


def to_bytes(left: Mapping[str, Left]) -> bytes:
    """The record."""
    entries = {place: entry._asdict() for place, entry in sorted(left.items())}
    return json.dumps({"version": 1, "left": entries}, indent=1).encode() + b"\n"


def write(side: str, left: Mapping[str, Left]) -> None:
    """Replace the record, durably. The caller holds the lock of the run."""
    path = os.path.join(side, NAME)
    draft = f"{path}.{secrets.token_hex(4)}"
    try:
        if not left:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        side_folders.write_durably(draft, to_bytes(left))
        side_folders.like(draft, os.stat(side), mode=0o644)
        os.replace(draft, path)
        side_folders.sync_folder(side)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise from_os_error(error, doing="writing", path=path) from error
