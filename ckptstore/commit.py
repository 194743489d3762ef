"""Commit: make staged folders the recover slots, so that a crash at any instant leaves the old ones or the new ones, whole.

Everything of ours lies in the run's side folder, `{experiment}/.ckptstore/{trial}/`: on the slot's file system, and never
inside the trial, where AReaL takes every folder for a model. The steps (docs/design.md has the crash table):

    1  stage       side/stage-<random>/{part}/, 0700                            crash: a leftover that `clean` removes
    2  copy        every file, digested on the way, fsynced                     crash: the next setup continues from it
    3  manifest    written and fsynced in each staged part, then its folders
    4  journal     side/journal.json, fsynced: from here on it will be finished crash: the next command finishes it
    5  publish     first a recover_info that AReaL refuses loudly, then every slot, last the real recover_info, so that
                   no mixture of steps is ever resumed from. Each by RENAME_EXCHANGE of the staged folder and the slot;
                   where the file system cannot, the old slot is renamed aside and the new one in: between the two the
                   slot is missing, and the journal says where both are
    6  sync        the slot's parent and the stage
    7  set aside   the old slot to side/old-<time>-<random>/{part}/ (`setup --undo` swaps it back)
    8  journal away, side fsynced

Which side of an exchange is which is decided by content (the manifest's commit id, else names, sizes and times), never by
inode: FUSE file systems make those up.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from ckptstore import native
from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, CommitUncertain, ManifestError, NotCommitted, NotFoundError
from ckptstore.frameworks.areal.layout import files_of
from ckptstore.lock import RunLock, busy
from ckptstore.manifest import check_name
from ckptstore.manifest import parse as parse_manifest
from ckptstore.model import MANIFEST_NAME
from ckptstore.side import JOURNAL


@dataclass(frozen=True, slots=True)
class Move:
    """One slot to be replaced. Paths are relative to the side folder, so that a remounted volume still matches."""

    part: str
    slot: str
    staged: str
    aside: str
    new: str  #: identity of what shall be in the slot; empty when nothing shall
    old: str  #: identity of what was in it; empty when there was nothing


@dataclass(frozen=True, slots=True)
class Journal:
    """A commit that will be finished, whoever has to."""

    action: str  #: setup or undo
    step: int
    method: str  #: exchange or rename
    moves: tuple[Move, ...]
    created_at: str = ""


def identity(folder: str) -> str:
    """What lies in `folder`, told by content: our commit id, else names, sizes and times. Empty without a folder or files."""
    backend = LocalBackend(folder)
    try:
        tree = backend.tree(max_depth=8)
    except NotFoundError:
        return ""
    with contextlib.suppress(NotFoundError, ManifestError):
        manifest = parse_manifest(backend.get(MANIFEST_NAME))
        files = [file for file in files_of(tree, "")[0] if file.name != MANIFEST_NAME]
        if not manifest.inspect(files).void:  # else the trainer has written into a slot of ours, and left our manifest there
            return "commit:" + manifest.commit
    lines = sorted(
        f"{path}/{entry.name} {entry.size_bytes} {entry.mtime_ns // 1_000_000_000}"
        for path, inside in tree.items()
        for entry in inside.entries
        if entry.mode & 0o170000 != 0o040000
    )
    return "files:" + hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest() if lines else ""


def plan_moves(side: str, stage: str, slots: dict[str, str]) -> tuple[tuple[Move, ...], str]:
    """The moves that put `stage`'s parts into `slots` (part → absolute path), and the folder for the old ones."""
    aside = f"old-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    moves = tuple(
        Move(
            part=part,
            slot=os.path.relpath(slot, side),
            staged=f"{os.path.basename(stage)}/{part}",
            aside=f"{aside}/{part}",
            new=identity(os.path.join(stage, part)),
            old=identity(slot),
        )
        for part, slot in slots.items()
    )
    return moves, aside


def guarded(side: str, moves: tuple[Move, ...], aside: str, *, info: str, blocking: str, staged_info: str) -> tuple[Move, ...]:
    """`moves` between two more: `blocking` becomes `info` (recover_info) first, `staged_info` last ("" leaves none).

    No rename covers several folders: in between, the trainer finds a recover_info that it refuses loudly.
    """
    slot = os.path.relpath(info, side)
    name = os.path.basename(info)
    staged_blocking = os.path.relpath(blocking, side)
    spent = f"{os.path.dirname(staged_blocking)}/spent"
    first = Move(name, slot, staged_blocking, f"{aside}/{name}", identity(blocking), identity(info))
    real = identity(staged_info) if staged_info else ""
    last = Move(name, slot, os.path.relpath(staged_info, side) if staged_info else spent, spent, real, first.new)
    return (first, *moves, last)


def publish(side: str, journal: Journal) -> None:
    """Steps 4 to 8. NotCommitted: no slot was touched. CommitUncertain: the new ones are in, the disk did not confirm it."""
    document = asdict(journal) | {"format": "ckptstore.journal", "version": 1}
    draft = os.path.join(side, f"{JOURNAL}.{secrets.token_hex(4)}")
    try:
        side_folders.write_durably(draft, json.dumps(document).encode())
        os.rename(draft, os.path.join(side, JOURNAL))
        side_folders.sync_folder(side)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise NotCommitted(
            f"the journal {side}/{JOURNAL} could not be written: {error.strerror}; the slot is as it was"
        ) from error
    _finish(side, journal)


def pending(side: str) -> Journal | None:
    """The commit that a crash interrupted, None when there is none. ManifestError for a journal that can't be trusted."""
    try:
        document = json.loads(LocalBackend(side).get(JOURNAL, length_bytes=1 << 20))
        moves = tuple(Move(**move) for move in document["moves"])
        journal = Journal(document["action"], document["step"], document["method"], moves, document["created_at"])
    except NotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(
            f"{side}/{JOURNAL} is not a journal of ours: {error}",
            hint="Move it away; the slots are where they are.",
        ) from error
    for move in moves:
        check_name(move.part), check_name(move.staged), check_name(move.aside)
    return journal


def roll_forward(side: str) -> str:
    """Finish a commit that a crash interrupted. Says in one line what was done; empty when there was nothing to do.

    A slot that the trainer has written since is never replaced: then the commit is given up, and the stage is kept.
    """
    if not os.path.lexists(os.path.join(side, JOURNAL)):
        return ""
    holder = busy(side)
    if holder is not None:
        return f"a setup is in progress: {holder}"
    try:
        with RunLock(side, "finishing an interrupted setup"):
            return finish_pending(side)
    except CkptStoreError as error:
        return f"an interrupted setup is pending in {side}, and cannot be finished by this user: {error}"


def finish_pending(side: str) -> str:
    """roll_forward for a caller that holds the run's lock."""
    journal = pending(side)
    if journal is None:
        return ""
    ours: dict[str, set[str]] = {}
    for move in journal.moves:
        ours.setdefault(move.slot, {""}).update((move.old, move.new))
    foreign = [move for move in journal.moves if identity(_at(side, move.slot)) not in ours[move.slot]]
    if foreign:
        kept = os.path.join(side, f"given-up-{journal.moves[0].aside.partition('/')[0]}.json")
        os.rename(os.path.join(side, JOURNAL), kept)
        return (
            f"an interrupted {journal.action} of step {journal.step} was given up: {foreign[0].part}/ has been written since; "
            f"its stage is kept in {side}"
        )
    _finish(side, journal)
    return f"an interrupted {journal.action} of step {journal.step} was finished: the slot holds it now"


def _finish(side: str, journal: Journal) -> None:
    touched = False
    try:
        for number, move in enumerate(journal.moves):
            if _is_superseded(side, move, journal.moves[number + 1 :]):
                continue
            try:
                _publish_one(side, move, journal.method)
            except OSError as error:
                if touched or identity(_at(side, move.slot)) == move.new:
                    raise
                os.unlink(os.path.join(side, JOURNAL))
                raise NotCommitted(
                    f"replacing {_at(side, move.slot)}: {error.strerror}; it is as it was, and so is every other part"
                ) from error
            touched = True
        for move in journal.moves:
            _set_aside(side, move)
        os.unlink(os.path.join(side, JOURNAL))
        side_folders.sync_folder(side)
    except OSError as error:
        where = error.filename or side
        raise CommitUncertain(
            f"replacing the slot: {where}: {error.strerror}; the new one is in, the old one is kept, both are whole, "
            "and the disk has not confirmed it",
            hint=f"Any ckptstore command on this run finishes it (journal in {side}).",
        ) from error
    for name in {move.staged.partition("/")[0] for move in journal.moves}:
        if name.startswith("stage-"):
            with contextlib.suppress(CkptStoreError):
                side_folders.discard(side, name)
        else:
            with contextlib.suppress(OSError):  # an old slot, swapped in by undo: its folder is empty now
                os.rmdir(os.path.join(side, name))


def _is_superseded(side: str, move: Move, later: tuple[Move, ...]) -> bool:
    """Whether a crash came after a later move of the same slot: then this one is done, and must not be done again."""
    return any(other.slot == move.slot and identity(_at(side, move.slot)) == other.new for other in later)


def _at(side: str, relative: str) -> str:
    return os.path.normpath(os.path.join(side, relative))


def _publish_one(side: str, move: Move, method: str) -> None:
    """Steps 5 and 6 for one slot, from wherever a crash left them."""
    slot, staged, aside = _at(side, move.slot), _at(side, move.staged), _at(side, move.aside)
    if identity(slot) != move.new and not move.new:
        os.makedirs(os.path.dirname(aside), mode=0o700, exist_ok=True)
        os.rename(slot, aside)
    elif identity(slot) != move.new:
        if identity(staged) != move.new:
            raise CkptStoreError(
                f"the new content for {slot} is neither there nor in {staged}",
                hint=f"Nothing was deleted; look into {side}.",
            )
        if not os.path.lexists(slot):
            os.makedirs(os.path.dirname(slot), exist_ok=True)
            _rename_in(staged, slot)
        elif method == "exchange":
            native.rename_exchange(staged, slot)
        elif not identity(slot):
            shutil.rmtree(slot)  # empty folders: AReaL's helpers leave them
            _rename_in(staged, slot)
        else:
            os.makedirs(os.path.dirname(aside), mode=0o700, exist_ok=True)
            os.rename(slot, aside)
            side_folders.sync_folder(os.path.dirname(slot))
            try:
                _rename_in(staged, slot)
            except OSError:
                os.rename(aside, slot)
                raise
    side_folders.sync_folder(os.path.dirname(slot))
    if os.path.isdir(os.path.dirname(staged)):
        side_folders.sync_folder(os.path.dirname(staged))


def _rename_in(staged: str, slot: str) -> None:
    try:
        native.rename_noreplace(staged, slot)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        os.rename(staged, slot)  # refused flags: the run's lock has to do


def _set_aside(side: str, move: Move) -> None:
    """Step 7: after an exchange the stage's name holds the old slot. An empty one is nobody's: removed."""
    staged, aside = _at(side, move.staged), _at(side, move.aside)
    if not os.path.isdir(staged):
        return
    if not identity(staged):
        shutil.rmtree(staged)
        return
    os.makedirs(os.path.dirname(aside), mode=0o700, exist_ok=True)
    os.rename(staged, aside)
    side_folders.sync_folder(os.path.dirname(aside))
    side_folders.sync_folder(os.path.dirname(staged))


def now() -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
