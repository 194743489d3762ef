"""Recovery: choose the checkpoint to resume from, and make it the one that the trainer will resume from.

plan(backend, selection)    what setup would do, and why; writes nothing
setup(backend, selection)   does it: stage → copy and digest in one read → manifest → exchange (commit.py has the steps)
undo(backend)               swaps the slot that was set aside last back in
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ckptstore import commit, halt, left, places, probe, room, running
from ckptstore import side as side_folders
from ckptstore.backends import is_url
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.choose import Selection
from ckptstore.errors import (
    AccessError,
    BusyError,
    CkptStoreError,
    IntegrityError,
    NoSpaceError,
    NotCommitted,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    StorageError,
    from_os_error,
)
from ckptstore.frameworks.areal import layout, resume_state
from ckptstore.journal import Journal
from ckptstore.listing import Listing, backend_for, scan
from ckptstore.lock import RunLock
from ckptstore.model import Checkpoint, FileInfo, Status
from ckptstore.parts import find_manifest, folder_of, read_part, reader
from ckptstore.plan import ANY, CAREFUL, Options, Plan, configured, plan, stage_key, trial_folder
from ckptstore.staging import BLOCKING, place_trial, stage_info, stage_part, write_info
from ckptstore.verify import Notify

log = logging.getLogger(__name__)

_PLACED = ("setup", "convert")  #: origins of what a setup put into a slot: copied, or made of an export


@dataclass(frozen=True, slots=True)
class Outcome:
    """What setup did."""

    plan: Plan
    medium: probe.Medium | None = None  #: None when there was nothing to do
    copied_bytes: int = 0
    reused_bytes: int = 0
    seconds: float = 0.0
    strategies: Mapping[str, int] = dataclasses.field(default_factory=dict)
    old_slot: str = ""  #: where the old one is kept
    manifest_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rolled: str = ""  #: what became of an interrupted setup before this one
    cleared: halt.Trip | None = None  #: the TRIPPED record that kept training from starting


def setup(
    backend: Backend,
    selection: Selection = ANY,
    options: Options = CAREFUL,
    *,
    planned: Plan | None = None,
    notify: Notify | None = None,
) -> Outcome:
    """Make the chosen checkpoint the one that the trainer will resume from. Holds the run's lock; one at a time.

    A candidate whose bytes turn out wrong while they are copied is skipped for the next one. Errors: NothingToResumeError,
    RefusedError, BusyError, NoSpaceError; NotCommitted and CommitUncertain as in errors.py. After any error and any kill
    the slot holds the old checkpoint or the new one, whole; KeyboardInterrupt keeps the stage for the next try.
    `planned`: what `plan` said of the same selection and options. It is carried out where the run is as it was then, so that a
    slot is not read once more.
    """
    failed: dict[str, str] = {}
    first = planned or plan(backend, selection, options, ignore_pending=True, notify=notify)
    if first.refusals:
        raise RefusedError("; ".join(first.refusals))
    options = configured(options, first.listing.run)
    try:
        side_folders.make_side(first.side)
    except NoSpaceError as error:
        error.hint = "; ".join(room.what_could_go(first, options)) or error.hint
        raise
    with RunLock(first.side, f"setup of step {first.point.checkpoint.step}") as lock:
        rolled = commit.finish_pending(first.side)

        def tell(doing: str, done_bytes: int, total_bytes: int) -> None:
            lock.update(doing, done_bytes, total_bytes)
            if notify is not None:
                notify(doing, done_bytes, total_bytes)

        while True:
            holds = not failed and scan(backend) == first.listing and not running.signs_of_life(first.listing)
            current = first if holds else plan(backend, selection, options, failed=failed, notify=tell)
            if current.refusals:
                raise RefusedError("; ".join(current.refusals))
            if current.nothing_to_do:
                if current.leaves != current.listing.left:
                    left.write(current.side, current.leaves)
                _remember(current.listing.run.path)
                return Outcome(current, rolled=rolled, cleared=halt.reset(current.side))
            try:
                outcome = _setup(backend, current, options, tell)
            except NoSpaceError as error:
                # Where only the server knows what is free, this is how we learn of it.
                asked = options.replace and current.transfers and current.old_slot is not None
                if not asked or room.lacking(current, options):
                    error.hint = "; ".join(room.what_could_go(current, options)) or error.hint
                    raise
                room.replace_old_slot(current)
                continue
            except (IntegrityError, StorageError) as error:
                source = _source_at_fault(error, current.point.checkpoint)
                if not source:
                    raise
                failed[current.point.checkpoint.parts[0].path] = f"{error} (found while copying)"
                continue
            _remember(current.listing.run.path)
            return dataclasses.replace(outcome, rolled=rolled, cleared=halt.reset(current.side))


def _remember(run: str) -> None:
    """Keep the metrics of the history that is left: once a breaker records the new one, nobody looks into the log again."""
    if not places.has_metrics(run):
        return
    from ckptstore import health  # 20 ms, where many runs have none

    try:
        health.keep_log(run)
    except (OSError, CkptStoreError) as error:  # the slot is in, which is what was asked for
        log.warning("the metrics of the trainer's log could not be recorded: %s", error)


def _source_at_fault(error: CkptStoreError, checkpoint: Checkpoint) -> bool:
    if isinstance(error, StorageError):
        if is_url(checkpoint.store):  # an outage says nothing of this checkpoint, and would meet the next one as well
            return False
        return any(error.path.startswith(part.path) for part in checkpoint.parts)
    return True


def _setup(backend: Backend, current: Plan, options: Options, tell: Notify) -> Outcome:
    started = time.monotonic()
    checkpoint = current.point.checkpoint
    room.make_room(current, options)
    medium = probe.probe(current.side)
    before = {slot: commit.identity(slot) for slot in current.slots.values()}
    stage = side_folders.open_stage(current.side, stage_key(checkpoint))
    copied = reused = 0
    strategies: dict[str, int] = {}
    pins: dict[str, str] = {}
    try:
        for part in checkpoint.parts if current.transfers else ():
            staged = stage_part(backend, current, part, stage, options=options, tell=tell)
            copied += staged.bytes_written
            reused += staged.bytes_reused
            for name, count in staged.strategies.items():
                strategies[name] = strategies.get(name, 0) + count
            pins[part.name] = staged.manifest.sha256
        infos = stage_info(current, stage) if current.info.action != "leave" else None
    except NoSpaceError:
        side_folders.discard(current.side, os.path.basename(stage.path))  # give the space back
        raise
    except (IntegrityError, StorageError) as error:
        if _source_at_fault(error, checkpoint):
            side_folders.discard(current.side, os.path.basename(stage.path))
        raise
    except (NotFoundError, AccessError, RefusedError) as error:
        if not (changed := _cannot_be_read(backend, checkpoint)):
            raise
        side_folders.discard(current.side, os.path.basename(stage.path))
        raise SourceChangedError(f"{error} ({changed})", path=changed) from error
    try:
        side_folders.sync_folder(stage.path)
        side_folders.sync_folder(current.side)
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=stage.path) from error

    def outcome(old_slot: str = "") -> Outcome:
        return Outcome(
            plan=current,
            medium=medium,
            copied_bytes=copied,
            reused_bytes=reused,
            seconds=time.monotonic() - started,
            strategies=strategies,
            old_slot=old_slot,
            manifest_sha256=pins,
        )

    if options.new_trial:
        place_trial(current, stage, trial_folder(current.listing, options))
        return outcome()
    tell("replacing the slot", current.point.checkpoint.size_bytes, current.point.checkpoint.size_bytes)
    moves, aside = commit.plan_moves(current.side, stage.path, dict(current.slots) if current.transfers else {})
    for move in moves:
        if move.old != before[current.slots[move.part]]:
            raise BusyError(
                f"{current.slots[move.part]} was written while step {checkpoint.step} was copied: it was not replaced",
                hint="Is the trainer running? When it is stopped, say setup again: what is copied is kept.",
            )
    if infos is not None:
        info = os.path.join(current.listing.run.path, layout.RECOVER_INFO)
        moves = commit.guarded(current.side, moves, aside, info=info, blocking=infos[0], staged_info=infos[1])
    before_this = current.listing.left
    if current.leaves != before_this:  # first: training must not go on from the new slot, and later from what it left
        new = {place: entry._replace(aside=aside) for place, entry in current.leaves.items() if entry != before_this.get(place)}
        left.write(current.side, {**current.leaves, **new})
    try:
        commit.publish(current.side, Journal("setup", checkpoint.step, medium.method, moves, created_at=commit.now()))
    except NotCommitted:
        if current.leaves != before_this:
            try:
                left.write(current.side, before_this)
            except StorageError as error:  # nobody has gone back, and yet it says so: a later setup that names one does it
                log.warning("%s still holds what this setup would have left: %s", left.NAME, error)
        raise
    _discard_redundant(backend, current, keep=aside)
    kept = os.path.join(current.side, aside)
    return outcome(kept if os.path.isdir(kept) else "")


def _cannot_be_read(backend: Backend, checkpoint: Checkpoint) -> str:
    """What of the source cannot be read, or is not what it was when it was listed; empty when all of it is there."""
    source = backend_for(backend, checkpoint)
    if not source.is_folder:
        return ""
    try:
        tree = source.tree(max_depth=5)
        for part in checkpoint.parts:
            if read_part(source, part.name, folder_of(source, part), tree).files != part.files:
                return part.path
            for file in part.files:
                reader(source, part)(file.name, 0, 1)
    except CkptStoreError as error:
        return str(error)
    return ""


def _discard_redundant(backend: Backend, current: Plan, *, keep: str) -> None:
    """Of older set-aside slots, remove those that are our own copies of checkpoints that are still there, whole.

    By then the new slot is in: nothing that goes wrong here matters.
    """
    whole = {part.path: part.files for c in current.listing.checkpoints if c.status.usable for part in c.parts}
    for old in side_folders.old_slots(current.side):
        if old.name == keep:
            continue
        with contextlib.suppress(CkptStoreError):
            if _is_redundant(current, old, whole):
                side_folders.discard(current.side, old.name)


def _is_redundant(current: Plan, old: side_folders.OldSlot, whole: Mapping[str, tuple[FileInfo, ...]]) -> bool:
    for name in old.parts:
        if name == layout.RECOVER_INFO:
            continue
        inside = LocalBackend(os.path.join(old.path, name))
        manifest = find_manifest(inside, "")
        part = read_part(inside, name, "", inside.tree(max_depth=5))
        if manifest is None or manifest.origin not in _PLACED or part.status is not Status.COMMITTED:
            return False
        source = whole.get(os.path.join(current.listing.run.path, manifest.source))
        if not source:
            return False
        placed_ns = int(datetime.fromisoformat(manifest.created_at).timestamp()) * 1_000_000_000
        converted = part.format != layout.read_signs(source).format
        if max(file.mtime_ns for file in source) > placed_ns if converted else not _holds_all(part.files, source):
            return False  # the trainer has written it again since
    return True


def _holds_all(files: Iterable[FileInfo], source: Iterable[FileInfo]) -> bool:
    return {_look(file) for file in source} <= {_look(file) for file in files}


def _look(file: FileInfo) -> tuple[str, int, int]:
    return file.name, file.size_bytes, file.mtime_ns


def undoable(backend: Backend, options: Options = CAREFUL) -> side_folders.OldSlot:
    """The old slot that `undo` would swap back in. NotFoundError when none was set aside."""
    kept = side_folders.old_slots(side_folders.side_folder(backend.location, _main_slot(backend, options)))
    if not kept:
        raise NotFoundError("there is nothing to undo: no slot was set aside for this run")
    return kept[0]


def undo(backend: Backend, options: Options = CAREFUL) -> tuple[int, str]:
    """Swap the slot that was set aside last back in. Returns its step (-1: unknown) and where the other one is now."""
    listing = scan(backend)
    if not options.force and (signs := running.signs_of_life(listing)):
        raise RefusedError(f"the trainer seems to be running ({signs[0]}): stop it, or say --force")
    main = _main_slot(backend, options)
    side = side_folders.side_folder(listing.run.path, main)
    undoable(backend, options)
    with RunLock(side, "undo"):
        commit.finish_pending(side)
        old = undoable(backend, options)
        run = listing.run.path
        parts = [part for part in old.parts if part != layout.RECOVER_INFO]
        slots = {part: main if options.recover_dir else os.path.join(run, part, layout.SLOT) for part in parts}
        medium = probe.probe(side)
        moves, aside = commit.plan_moves(side, old.path, slots)
        if not options.recover_dir:
            moves += tuple(
                commit.leave_empty(side, part, os.path.join(run, part, layout.SLOT), old.name, aside)
                for part in _placed_beside(backend, listing, parts)
            )
        found = find_manifest(LocalBackend(os.path.join(old.path, parts[0])), "") if parts else None
        step = found.step if found else -1
        if layout.RECOVER_INFO in old.parts or (not options.recover_dir and _is_ours(backend, layout.RECOVER_INFO)):
            stage = side_folders.open_stage(side, f"undo {old.name}")
            blocking = write_info(run, stage.part(BLOCKING), resume_state.blocking())
            staged_info = os.path.join(old.path, layout.RECOVER_INFO) if layout.RECOVER_INFO in old.parts else ""
            moves = commit.guarded(
                side,
                moves,
                aside,
                info=os.path.join(run, layout.RECOVER_INFO),
                blocking=blocking,
                staged_info=staged_info,
            )
        stays = {place: entry for place, entry in listing.left.items() if entry.aside != old.name}
        if stays != listing.left:
            left.write(side, stays)
        commit.publish(side, Journal("undo", step, medium.method, moves, created_at=commit.now()))
        return step, os.path.join(side, aside)


def _is_ours(backend: Backend, folder: str) -> bool:
    """Whether a setup wrote what lies there: a recover_info of the trainer's is not undone."""
    manifest = find_manifest(backend, folder)
    return manifest is not None and manifest.origin in _PLACED


def _placed_beside(backend: Backend, listing: Listing, parts: Sequence[str]) -> list[str]:
    """Slots that the setup to be undone filled where there was none before: they belong to its step, not to the old one."""
    slot = listing.slot.parts if listing.slot is not None else ()
    found = {part.name: find_manifest(backend, folder_of(backend, part)) for part in slot}
    ours = {name: manifest for name, manifest in found.items() if manifest is not None and manifest.origin in _PLACED}
    steps = {manifest.step for name, manifest in ours.items() if name in parts or not parts}
    return [name for name, manifest in ours.items() if name not in parts and manifest.step in steps]


def _main_slot(backend: Backend, options: Options) -> str:
    if options.recover_dir:
        return os.path.abspath(options.recover_dir)
    return os.path.join(backend.location, layout.MAIN_PART, layout.SLOT)
