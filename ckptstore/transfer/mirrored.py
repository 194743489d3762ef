"""What of a run is safe in an object store: written by whoever mirrors it, read by whoever is about to delete, and by `status`.

`mirror.json` in the run's side folder: the URL, and by its folder's name a mark of each checkpoint of this machine that is
COMMITTED there. The mark is of names, sizes and times: a step that is saved anew is not safe because the old one was. Where
there is no such file the run is not mirrored. One that cannot be understood stops whoever wants to delete.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ckptstore import side as side_folders
from ckptstore.errors import StorageError, from_os_error
from ckptstore.listing import Listing
from ckptstore.model import Checkpoint, Status
from ckptstore.untrusted import number, open_regular, whole

NAME = "mirror.json"
MAX_BYTES = 64 << 20
#: An export without a manifest is finished when nothing of it has changed for so long.
SETTLED_S = 60.0


@dataclass(frozen=True, slots=True)
class Record:
    """The state of a run's mirror. Times are Unix seconds."""

    url: str
    safe: Mapping[str, str] = field(default_factory=dict)  #: name → mark, of what is on this machine and safe there
    newest_step: int = -1  #: the newest step that was ever seen safe there, of whatever history
    looked_at_s: float = 0.0
    problem: str = ""  #: why the last try ended early; empty where it did not
    left: str = ""  #: left.digest of what was put there of what training has left
    present_step: int = -1  #: as newest_step, of the history that the run is in (see `present`)

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether just this checkpoint is safe there."""
        return self.safe.get(name_of(checkpoint)) == checkpoint.mark


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a mirror is behind, by the steps of the history that the run is in (see `present`)."""

    url: str
    newest_local_step: int | None
    newest_safe_step: int | None
    waiting: int  #: checkpoints that are not safe there yet
    behind_steps: int | None  #: global steps from the newest that is safe to the newest here; None where none is safe
    behind_s: float  #: the age of the oldest that waits; 0 where none does
    looked_at_s: float
    problem: str


def finished(listing: Listing, *, now_s: float | None = None) -> list[Checkpoint]:
    """The checkpoints of a run that will not change any more, by step."""
    now_s = time.time() if now_s is None else now_s
    found = [*listing.checkpoints, *listing.adopted]
    settled_ns = (now_s - SETTLED_S) * 1e9
    return sorted(
        (
            checkpoint
            for checkpoint in found
            if checkpoint.status is Status.COMMITTED
            or (
                listing.framework == "areal"
                and checkpoint.status is Status.COMPLETE
                and all(part.mtime_ns < settled_ns for part in checkpoint.parts)
            )
        ),
        key=lambda checkpoint: (checkpoint.step, checkpoint.kind),
    )


def present(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Those of the history that the run is in, the newest first: not what was saved before one of a lower number.

    After a rollback the steps that were left have the higher numbers. Those below the first that was saved since cannot be
    told from the history that goes on.
    """
    found: list[Checkpoint] = []
    for checkpoint in sorted(checkpoints, key=lambda one: (one.saved_at_s, one.step), reverse=True):
        if not found or checkpoint.step <= found[-1].step:
            found.append(checkpoint)
    return found


def name_of(checkpoint: Checkpoint) -> str:
    """Names a checkpoint among those of its run."""
    return os.path.basename(checkpoint.store or checkpoint.parts[0].path)


def read(side: str) -> Record | None:
    """The record of the run with this side folder; None where it is not mirrored. StorageError for one that is damaged."""
    path = os.path.join(side, NAME)
    try:
        with open_regular(path) as file:
            document = json.loads(file.read(MAX_BYTES))
        return Record(
            str(document["url"]),
            {str(name): str(mark) for name, mark in document["safe"].items()},
            whole(document["newest_step"]),
            number(document["looked_at"]),
            str(document["problem"]),
            str(document.get("left", "")),
            whole(document.get("present_step", document["newest_step"])),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{path} is damaged ({error!r:.80})",
            operation="read",
            path=path,
            hint="Remove it; the next mirroring makes it anew.",
        ) from error


def write(side: str, record: Record) -> None:
    """Replace the record, durably: what is deleted afterwards must be known to be safe after a crash too."""
    path = os.path.join(side, NAME)
    document = {
        "version": 1,
        "url": record.url,
        "safe": dict(record.safe),
        "newest_step": record.newest_step,
        "left": record.left,
        "present_step": record.present_step,
        "looked_at": round(record.looked_at_s, 3),
        "problem": record.problem,
    }
    side_folders.make_side(side)
    try:
        side_folders.replace_durably(path, json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        raise from_os_error(error, doing="writing", path=path) from error


def unsafe(side: str, checkpoints: Iterable[Checkpoint]) -> dict[int, str]:
    """The steps that are not safe yet, each with the URL that it is missing from; none where the run is not mirrored."""
    record = read(side)
    if record is None:
        return {}
    return {checkpoint.step: record.url for checkpoint in checkpoints if not record.holds(checkpoint)}


def newest_safe(record: Record, here: Collection[Checkpoint], there: Iterable[int] | None = None) -> int:
    """The newest step that is safe of the history that the run is in; -1 where none is known to be.

    `here`: what is finished on this machine. `there`: the steps in the store, of whatever history; None: what `record` says.
    """
    line = present(here)
    known = {checkpoint.step for checkpoint in here}
    others = [record.present_step] if there is None else there
    gone_here = [step for step in others if step not in known and (not line or step < line[0].step)]
    return max([-1, *gone_here, *(checkpoint.step for checkpoint in line if record.holds(checkpoint))])


def lag(record: Record, checkpoints: Iterable[Checkpoint]) -> Lag:
    """How far the mirror is behind the finished `checkpoints` of this machine."""
    here = list(checkpoints)
    waiting = [checkpoint for checkpoint in here if not record.holds(checkpoint)]
    line = present(here)
    newest = line[0].step if line else None
    safe = newest_safe(record, here)
    saved_s = [checkpoint.saved_at_s for checkpoint in waiting]
    return Lag(
        record.url,
        newest,
        safe if safe >= 0 else None,
        len(waiting),
        None if safe < 0 or newest is None else max(newest - safe, 0),
        max(time.time() - min(saved_s), 0.0) if saved_s else 0.0,
        record.looked_at_s,
        record.problem,
    )
