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
                   slot is missing, and the journal says where both are. recover_info is then replaced file by file
                   (inplace.py), for it must never be missing
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
import time
from dataclasses import asdict
from datetime import UTC, datetime

from ckptstore import inplace, native
from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, CommitUncertain, NotCommitted, NotFoundError, RefusedError
from ckptstore.frameworks.areal.layout import RECOVER_INFO, files_of
from ckptstore.journal import Journal, Move, pending
from ckptstore.lock import RunLock, busy
from ckptstore.manifest import MAX_BYTES
from ckptstore.manifest import parse as parse_manifest
from ckptstore.model import MANIFEST_NAME
from ckptstore.side import JOURNAL


def identity(folder: str) -> str:
    """What lies in `folder`, told by content: our commit id, else names, sizes and times. Empty without a folder or files.

    A recover_info that we block with is BLOCKED, whatever lies beside its deciding file.
    """
    if inplace.is_blocked(folder):
        return inplace.BLOCKED
    backend = LocalBackend(folder)
    try:
        tree = backend.tree(max_depth=8)
    except NotFoundError:
        return ""
    with contextlib.suppress(CkptStoreError):
        manifest = parse_manifest(backend.get(MANIFEST_NAME, length_bytes=MAX_BYTES + 1))
        files = [file for file in files_of(tree, "")[0] if file.name != MANIFEST_NAME]
        if not manifest.inspect(files).void:  # else the trainer has written into a slot of ours, and left our manifest there
            return "commit:" + manifest.commit
    lines = sorted(
        f"{path}/{entry.name} {entry.size_bytes} {entry.mtime_ns // 1_000_000_000}"
        for path, inside in tree.items()
        for entry in inside.entries
        # What cannot be looked into is not empty.
        if entry.mode & 0o170000 != 0o040000 or (unread := tree.get(f"{path}/{entry.name}" if path else entry.name)) is None
        or unread.error
    )  # fmt: skip
    return "files:" + hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest() if lines else ""


def plan_moves(side: str, stage: str, slots: dict[str, str]) -> tuple[tuple[Move, ...], str]:
    """The moves that put `stage`'s parts into `slots` (part → absolute path), and the folder for the old ones."""
    for slot in slots.values():
        refuse_no_folder(slot)
    aside = f"old-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"
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


def leave_empty(side: str, part: str, slot: str, stage: str, aside: str) -> Move:
    """The move that takes a slot away and puts nothing in its place."""
    return Move(part, os.path.relpath(slot, side), f"{stage}/{part}", f"{aside}/{part}", "", identity(slot))


def guarded(side: str, moves: tuple[Move, ...], aside: str, *, info: str, blocking: str, staged_info: str) -> tuple[Move, ...]:
    """`moves` between two more: `blocking` becomes `info` (recover_info) first, `staged_info` last ("" leaves none).

    No rename covers several folders: in between, the trainer finds a recover_info that it refuses loudly.
    """
    refuse_no_folder(info)
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
        for path in (draft, os.path.join(side, JOURNAL)):  # else the next command would finish what we say is not done
            with contextlib.suppress(OSError):
                os.unlink(path)
        if os.path.lexists(os.path.join(side, JOURNAL)):
            raise CommitUncertain(
                f"the journal {side}/{JOURNAL} could neither be synced nor removed: {_reason(error)}; the slot is as it was",
                hint="The next ckptstore command on this run replaces it.",
            ) from error
        raise NotCommitted(
            f"the journal {side}/{JOURNAL} could not be written: {_reason(error)}; the slot is as it was"
        ) from error
    _finish(side, journal)


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
        return f"an interrupted setup is pending in {side}, and cannot be finished: {error}"


def finish_pending(side: str) -> str:
    """roll_forward for a caller that holds the run's lock. CommitUncertain where it can be neither finished nor taken back."""
    journal = pending(side)
    if journal is None:
        return ""
    what = f"an interrupted {journal.action} of step {journal.step}"
    ours: dict[str, set[str]] = {}
    for move in journal.moves:
        ours.setdefault(move.slot, {""}).update((move.old, move.new))
    foreign = [move for move in journal.moves if identity(_at(side, move.slot)) not in ours[move.slot]]
    if foreign:
        _take_back(side, journal)
        return f"{what} was given up: {foreign[0].part}/ has been written since; its stage is kept in {side}"
    try:
        _finish(side, journal)
    except NotCommitted as error:
        return f"{what} was taken back: {error}"
    return f"{what} was finished: the slot holds it now"


def _finish(side: str, journal: Journal) -> None:
    unconfirmed: OSError | None = None
    try:
        for number, move in enumerate(journal.moves):
            if _is_superseded(side, move, journal.moves[number + 1 :]):
                continue
            _publish_one(side, move, journal.method)
            try:
                _sync_around(side, move)
            except OSError as error:  # visible all the same: go on, and keep the journal for what a power cut would do
                unconfirmed = unconfirmed or error
    except (OSError, CkptStoreError) as error:
        _take_back(side, journal)
        raise NotCommitted(
            f"the slot could not be replaced: {_reason(error)}; it is as it was, and so is every other part"
        ) from error
    try:
        if unconfirmed is not None:
            raise unconfirmed
        for move in journal.moves:
            _set_aside(side, move)
        os.unlink(os.path.join(side, JOURNAL))
        side_folders.sync_folder(side)
    except (OSError, CkptStoreError) as error:
        raise CommitUncertain(
            f"replacing the slot: {_reason(error)}; the new one is in, the old one is kept, both are whole, "
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


def _take_back(side: str, journal: Journal) -> None:
    """Put back what the moves replaced, last one first; the journal goes, the stage stays. What is foreign is not touched.

    CommitUncertain where that fails, too: the journal stays, and the next command tries to finish.
    """
    try:
        for move in reversed(journal.moves):
            _take_back_one(side, move, journal.method)
            _sync_around(side, move)
        for move in journal.moves:
            # A slot that the trainer has made anew: what was in it before lies in the stage, which the next setup reuses.
            if move.old and identity(_at(side, move.staged)) == move.old != move.new:
                _set_aside(side, move)
        os.unlink(os.path.join(side, JOURNAL))
        side_folders.sync_folder(side)
        for name in {move.aside.partition("/")[0] for move in journal.moves}:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(side, name))
    except (OSError, CkptStoreError) as error:
        raise CommitUncertain(
            f"a {journal.action} of step {journal.step} can be neither finished nor taken back: {_reason(error)}; "
            "nothing was deleted",
            hint=f"The next ckptstore command on this run tries again (journal in {side}).",
        ) from error


def _in_place(move: Move, method: str) -> bool:
    return method == "rename" and os.path.basename(move.slot) == RECOVER_INFO


def _take_back_one(side: str, move: Move, method: str) -> None:
    slot, staged, aside = _at(side, move.slot), _at(side, move.staged), _at(side, move.aside)
    if _in_place(move, method) and move.old and move.new and identity(slot) == move.new:
        if move.old == inplace.BLOCKED:
            inplace.block(side, slot)
        elif identity(aside) != move.old:
            raise CkptStoreError(f"the recover_info that {slot} held before is not in {aside}")
        else:
            inplace.fill(side, slot, aside)
            side_folders.remove_tree(aside)
        return
    if move.new and identity(slot) == move.new:
        if os.path.lexists(staged):
            native.rename_exchange(staged, slot)
            return
        _make_parents(side, staged)
        side_folders.rename_in(slot, staged)
    if not os.path.lexists(slot) and os.path.lexists(aside):
        side_folders.rename_in(aside, slot)


def _is_superseded(side: str, move: Move, later: tuple[Move, ...]) -> bool:
    """Whether a crash came after a later move of the same slot: then this one is done, and must not be done again."""
    return any(other.slot == move.slot and identity(_at(side, move.slot)) == other.new for other in later)


def _at(side: str, relative: str) -> str:
    return os.path.normpath(os.path.join(side, relative))


def _reason(error: Exception) -> str:
    if isinstance(error, CkptStoreError) or not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def _publish_one(side: str, move: Move, method: str) -> None:
    """Step 5 for one slot, from wherever a crash left it."""
    slot, staged, aside = _at(side, move.slot), _at(side, move.staged), _at(side, move.aside)
    there = identity(slot)
    if there == move.new:
        return
    refuse_no_folder(slot)
    if not move.new:
        _make_parents(side, aside)
        os.rename(slot, aside)
        return
    if identity(staged) != move.new:
        raise CkptStoreError(
            f"the new content for {slot} is neither there nor in {staged}",
            hint=f"Nothing was deleted; look into {side}.",
        )
    if not os.path.lexists(slot):
        _make_parents(side, slot)
        side_folders.rename_in(staged, slot)
    elif method == "exchange":
        native.rename_exchange(staged, slot)
        if identity(slot) != move.new:
            raise OSError(errno.EIO, "the file system says that it has exchanged two folders, and has not", slot)
    elif not there:
        side_folders.remove_empty(slot)  # AReaL's helpers leave such
        side_folders.rename_in(staged, slot)
    elif _in_place(move, method):
        if move.new == inplace.BLOCKED:
            _make_parents(side, aside)
            if not os.path.lexists(aside):
                inplace.keep(side, slot, aside)
            inplace.block(side, slot)
        else:
            inplace.fill(side, slot, staged)
    else:
        _make_parents(side, aside)
        os.rename(slot, aside)
        side_folders.sync_folder(os.path.dirname(slot))
        side_folders.rename_in(staged, slot)


def refuse_no_folder(slot: str) -> None:
    """RefusedError for a slot that is a link or a file: renaming it away would lose what somebody made it for."""
    if os.path.islink(slot) or (os.path.lexists(slot) and not os.path.isdir(slot)):
        kind = "a link" if os.path.islink(slot) else "not a folder"
        raise RefusedError(f"{slot} is {kind}, and is not replaced", hint="Move it away, or say --recover-dir.")


def _make_parents(side: str, path: str) -> None:
    """Make the folders above `path`, durable: ours are for their owner alone, the run's like the folder they are in."""
    parent = os.path.dirname(path)
    missing = []
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for folder in reversed(missing):
        os.mkdir(folder, 0o700)
        side_folders.like(folder, os.stat(parent), mode=0o700 if parent == side else None)
        side_folders.sync_folder(parent)
        parent = folder


def _sync_around(side: str, move: Move) -> None:
    """Step 6: both names of a move, and what was renamed inside of the slot."""
    for folder in (_at(side, move.slot), os.path.dirname(_at(side, move.slot)), os.path.dirname(_at(side, move.staged))):
        if os.path.isdir(folder):
            side_folders.sync_folder(folder)


def _set_aside(side: str, move: Move) -> None:
    """Step 7: after an exchange the stage's name holds the old slot. An empty one is nobody's: removed."""
    staged, aside = _at(side, move.staged), _at(side, move.aside)
    if staged == aside or not os.path.isdir(staged):
        return
    if not (there := identity(staged)):
        side_folders.remove_empty(staged)
        return
    if there == move.new and os.path.basename(move.slot) == RECOVER_INFO:  # the slot has a copy of it
        side_folders.remove_tree(staged)
        return
    _make_parents(side, aside)
    side_folders.rename_in(staged, aside)
    side_folders.sync_folder(os.path.dirname(aside))
    side_folders.sync_folder(os.path.dirname(staged))


def now() -> str:
    """UTC, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
