"""Checkpoints of a history that training has left: it went back to an older one, and theirs are the higher numbers since.

`left.json` in the run's side folder (of a store of steps at a URL, below the URL): the checkpoint's place → which save it was,
and why it counts no more. It counts again once its step is saved anew, or where somebody names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from ckptstore import side as side_folders
from ckptstore.backends import open_backend
from ckptstore.backends.base import Backend
from ckptstore.errors import AccessError, NotFoundError, StorageError, from_os_error
from ckptstore.model import Checkpoint
from ckptstore.native import Folder
from ckptstore.parts import as_recorded, folder_of, manifest_told
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


def gone_back_to(step: int, *, by: str) -> str:
    """Why what is newer was left, and who left it."""
    return f"left: {by} went back to step {step} on {datetime.now(UTC):%Y-%m-%d %H:%M UTC}"


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
            f"{path} is damaged ({error!r:.80})",
            operation="read",
            path=path,
            hint="Remove it, and name the step to resume from.",
        ) from error


def to_bytes(left: Mapping[str, Left]) -> bytes:
    """The record."""
    entries = {place: entry._asdict() for place, entry in sorted(left.items())}
    return json.dumps({"version": 1, "left": entries}, indent=1).encode() + b"\n"


def digest(left: Mapping[str, Left]) -> str:
    """Names what a record holds; "" for nothing."""
    return hashlib.sha256(to_bytes(left)).hexdigest() if left else ""


def add(side: str, left: Mapping[str, Left]) -> None:
    """Add to the record, durably; one that is damaged is replaced: a save must not fail of it. As `write`."""
    try:
        before = known(side)
    except StorageError as error:
        log.warning("%s: it is replaced", error)
        before = {}
    write(side, {**before, **left})


def write(side: str, left: Mapping[str, Left]) -> None:
    """Replace the record, durably. The caller holds the lock of the run."""
    path = os.path.join(side, NAME)
    try:
        if left:
            side_folders.replace_durably(path, to_bytes(left))
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            side_folders.sync_folder(side)
    except OSError as error:
        raise from_os_error(error, doing="writing", path=path) from error


def noted(backend: Backend, side: str, tree: Mapping[str, Folder], *, at: str) -> tuple[Mapping[str, Left], str]:
    """What a run has noted as left; or why that cannot be told: a listing shows the rest. `at`: the folder of the record in a
    run at a URL, which has no side folder.
    """
    try:
        if side:
            return known(side), ""
        if any(entry.name == NAME for entry in tree.get(at, Folder(0, [])).entries):
            key = f"{at}/{NAME}"
            data = backend.get(key, length_bytes=MAX_BYTES + 1)
            return parse(data, f"{backend.location}/{key}"), ""
    except NotFoundError:
        pass  # removed since
    except (StorageError, AccessError) as error:
        return {}, f"what training has left is not known: {error}"
    return {}, ""


def marked(run: Backend, checkpoints: Iterable[Checkpoint], left: Mapping[str, Left]) -> Iterator[Checkpoint]:
    """The checkpoints of `run`, each that is still the save of it that training has left with the reason."""
    for checkpoint in checkpoints:
        entry = left.get(place_of(run, checkpoint)) if left else None
        if entry is not None and (entry.mark == checkpoint.mark or entry.same_save(identity(run, checkpoint))):
            checkpoint = dataclasses.replace(checkpoint, left=entry.why)
        yield checkpoint


def place_of(run: Backend, checkpoint: Checkpoint) -> str:
    """Where a checkpoint lies in its run, or in what is kept of it beside."""
    if checkpoint.kind == "adopted":
        return f"adopted/{checkpoint.store.rpartition('/')[2]}"
    return folder_of(run, checkpoint.parts[0])


def identity(run: Backend, checkpoint: Checkpoint) -> Left:
    """Which save it is: by the commit and the files that its manifests tell. Times in a store are those of arrival."""
    backend = open_backend(checkpoint.store) if checkpoint.store else run
    manifests = [manifest_told(backend, folder_of(backend, part)) for part in checkpoint.parts]
    parts = checkpoint.parts
    if not backend.is_folder:
        parts = tuple(
            part if manifest is None else dataclasses.replace(part, files=tuple(as_recorded(part.files, manifest)))
            for part, manifest in zip(parts, manifests, strict=True)
        )
    first = manifests[0]
    return Left(first.commit if first is not None else "", dataclasses.replace(checkpoint, parts=parts).mark)
