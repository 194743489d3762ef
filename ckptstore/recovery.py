"""Recovery: choose the checkpoint to resume from, and make it the one that the trainer will resume from.

plan(backend, selection)    what setup would do, and why; writes nothing
setup(backend, selection)   does it: stage → copy and digest in one read → manifest → exchange (commit.py has the steps)
undo(backend)               swaps the slot that was set aside last back in
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ckptstore
from ckptstore import commit, native, probe, running
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    BusyError,
    CkptStoreError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    NothingToResumeError,
    RefusedError,
    SourceChangedError,
    StorageError,
    UsageError,
    from_os_error,
)
from ckptstore.frameworks.areal import layout
from ckptstore.listing import RESUMABLE, Listing, find_manifest, folder_of, read_part, scan
from ckptstore.lock import RunLock
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import MANIFEST_NAME, Checkpoint, Level, Part, Status
from ckptstore.verify import Report, verify

#: Called with what is being done, bytes done and bytes in all.
Notify = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checkpoint is wanted. Steps are global steps, 0-based. Empty: the newest good one."""

    before_step: int | None = None  #: < N
    max_step: int | None = None  #: ≤ N
    step: int | None = None
    checkpoint_path: str = ""

    def __post_init__(self) -> None:
        if self.step is not None and self.checkpoint_path:
            raise UsageError("give a step or a checkpoint path, not both")
        if (self.step is not None or self.checkpoint_path) and (self.before_step, self.max_step) != (
            None,
            None,
        ):
            raise UsageError("give one checkpoint, or a bound on its step, not both")

    @property
    def named(self) -> bool:
        """Whether exactly one checkpoint is meant."""
        return self.step is not None or bool(self.checkpoint_path)

    @property
    def bound(self) -> int | None:
        """The highest global step that qualifies, None for any."""
        bounds = [self.before_step - 1] if self.before_step is not None else []
        bounds += [self.max_step] if self.max_step is not None else []
        return min(bounds, default=None)

    def __str__(self) -> str:
        if self.step is not None:
            return f"step {self.step}"
        if self.checkpoint_path:
            return self.checkpoint_path
        if self.before_step is not None and self.max_step is None:
            return f"the newest good checkpoint before step {self.before_step}"
        if self.bound is not None:
            return f"the newest good checkpoint up to step {self.bound}, {self.bound} included"
        return "the newest good checkpoint"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A newer checkpoint that was passed over, and why."""

    checkpoint: Checkpoint
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The checkpoint chosen, and what was passed over on the way to it."""

    checkpoint: Checkpoint
    skipped: tuple[Skipped, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Options:
    """How `setup` goes about it. The defaults refuse whatever could lose something."""

    recover_dir: str = ""  #: another slot than the one that AReaL reads
    force: bool = False  #: although the trainer seems to be running
    as_is: bool = False  #: although the slot's format differs, so that resumable state leaves the slot
    replace: bool = False  #: remove the old slot first, where there is no room for both
    verify_after_write: bool = False  #: read everything back from the disk before the commit


@dataclass(frozen=True, slots=True)
class Plan:
    """What setup would do."""

    listing: Listing
    point: ResumePoint
    slots: Mapping[str, str]  #: part → folder that the trainer reads
    side: str
    file_system: str
    needed_bytes: int
    free_bytes: int | None  #: None where only the server knows (network mounts, quotas)
    reusable_bytes: int  #: staged by an interrupted setup of the same checkpoint
    old_slot: Checkpoint | None
    refusals: tuple[str, ...]  #: why setup would not do it; empty when it would
    nothing_to_do: str  #: why there is nothing to do; empty when there is


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


def resume_point(
    backend: Backend,
    listing: Listing,
    selection: Selection = Selection(),
    *,
    failed: Mapping[str, str] | None = None,
) -> ResumePoint:
    """The newest checkpoint within `selection` that passes level structure, and why newer ones don't.

    `failed` names checkpoints (by the first part's folder) already found bad, with the reason. NothingToResumeError when none
    qualifies; IntegrityError when the one that was named is damaged.
    """
    failed = failed or {}
    skipped: list[Skipped] = []
    for checkpoint in _candidates(backend, listing, selection):
        reasons = tuple(map(str, checkpoint.findings))
        if checkpoint.parts[0].path in failed:
            reasons = (failed[checkpoint.parts[0].path],)
        elif checkpoint.status.usable:
            report = verify(backend_for(backend, checkpoint), checkpoint, Level.STRUCTURE)
            reasons = tuple(map(str, report.findings))
            checkpoint = report.checkpoint
        if not reasons:
            return ResumePoint(checkpoint, tuple(skipped), _why(checkpoint, skipped, selection))
        skipped.append(Skipped(checkpoint, reasons))
    if selection.named and skipped:
        bad = skipped[0]
        raise IntegrityError(
            f"step {bad.checkpoint.step} is {bad.checkpoint.status}: {'; '.join(bad.reasons[:3])}",
            hint="Without --step, the newest good one is chosen.",
        )
    raise _nothing(listing, selection, skipped)


def backend_for(backend: Backend, checkpoint: Checkpoint) -> Backend:
    """The backend that `checkpoint`'s parts lie under: `backend`, or one of its own for a folder outside of the run."""
    path = checkpoint.parts[0].path
    return backend if path.startswith(f"{backend.location}/") else LocalBackend(path)


def _candidates(backend: Backend, listing: Listing, selection: Selection) -> list[Checkpoint]:
    if selection.checkpoint_path:
        return [_at_path(backend, listing, os.path.abspath(selection.checkpoint_path))]
    everything = list(listing.checkpoints)
    # Equal steps: the slot first, since it holds optimizer state and needs no copy.
    if listing.slot is not None and listing.slot.step >= 0:
        everything.append(listing.slot)
    everything.sort(key=lambda c: (c.step, c.kind == "slot", c.epoch, c.epoch_step), reverse=True)
    if selection.step is not None:
        found = [checkpoint for checkpoint in everything if checkpoint.step == selection.step]
        if not found:
            raise _nothing(listing, selection, [])
        return found
    bound = selection.bound
    return [checkpoint for checkpoint in everything if bound is None or checkpoint.step <= bound]


def _at_path(backend: Backend, listing: Listing, path: str) -> Checkpoint:
    for checkpoint in listing.checkpoints:
        if any(part.path == path for part in checkpoint.parts):
            return checkpoint
    outside = LocalBackend(path)
    name = os.path.basename(os.path.dirname(path))
    known = {part.name for checkpoint in listing.checkpoints for part in checkpoint.parts}
    try:
        part = read_part(outside, name if name in known else layout.MAIN_PART, "", outside.tree(max_depth=5))
    except NotFoundError as error:
        raise NotFoundError(f"--checkpoint-path {path}: there is no such folder", hint=str(error)) from error
    manifest = find_manifest(outside, "")
    numbers = layout.parse_export_name(os.path.basename(path))
    if numbers is not None:
        return Checkpoint(numbers.step, numbers.epoch, numbers.epoch_step, "export", (part,))
    if manifest is not None:
        return Checkpoint(manifest.step, manifest.epoch, manifest.epoch_step, "export", (part,))
    return Checkpoint(-1, -1, -1, "export", (part,), ("neither its name nor a manifest tells its step",))


def _why(checkpoint: Checkpoint, skipped: list[Skipped], selection: Selection) -> str:
    if selection.named:
        return "you named it"
    vouched = "its manifest is checked while it is copied" if checkpoint.status is Status.COMMITTED else "its files are whole"
    newer = f", {len(skipped)} newer one{'s' * (len(skipped) > 1)} skipped" if skipped else ""
    return f"{selection}: {vouched}{newer}"


def _nothing(listing: Listing, selection: Selection, skipped: list[Skipped]) -> NothingToResumeError:
    steps = sorted({checkpoint.step for checkpoint in listing.checkpoints})
    message = f"no checkpoint qualifies as {selection} in {listing.run.path}"
    if skipped:
        message += f": {len(skipped)} looked at, all damaged or unfinished (newest: {'; '.join(skipped[0].reasons[:2])})"
    hint = "Nothing has been saved there yet: see `saver:` and `recover:` in the run's configuration."
    if steps:
        usable = [checkpoint.step for checkpoint in listing.checkpoints if checkpoint.status.usable]
        hint = f"The first saved step is {steps[0]}, the last {steps[-1]}; whole are {_some(usable) or 'none'}."
    return NothingToResumeError(message, hint=hint)


def _some(steps: list[int]) -> str:
    steps = sorted(set(steps))
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "…", *steps[-4:]]))


# --- planning -----------------------------------------------------------------------------------------------------


def plan(
    backend: Backend,
    selection: Selection = Selection(),
    options: Options = Options(),
    *,
    failed: Mapping[str, str] | None = None,
    ignore_pending: bool = False,
) -> Plan:
    """What `setup` would do now, and why. Writes nothing."""
    listing = scan(backend)
    point = resume_point(backend, listing, selection, failed=failed)
    slots = slots_for(listing, point.checkpoint, options)
    first = next(iter(slots.values()))
    side = commit.side_folder(listing.run.path, first)
    if not ignore_pending and (journal := commit.pending(side)):
        raise BusyError(
            f"an interrupted {journal.action} of step {journal.step} is pending in {side}",
            hint="Any ckptstore command run by a user who may write there finishes it.",
        )
    place = side if os.path.isdir(side) else commit.existing(os.path.dirname(first))
    file_system = probe.file_system(place)
    old = _slot_now(listing, slots, options)
    return Plan(
        listing=listing,
        point=point,
        slots=slots,
        side=side,
        file_system=file_system,
        needed_bytes=point.checkpoint.size_bytes,
        free_bytes=None if probe.is_network(file_system) else shutil.disk_usage(place).free,
        reusable_bytes=_staged_bytes(side, stage_key(point.checkpoint)),
        old_slot=old,
        refusals=tuple(_refusals(listing, point, slots, old, options)),
        nothing_to_do=_nothing_to_do(backend, point, old),
    )


def slots_for(listing: Listing, checkpoint: Checkpoint, options: Options) -> dict[str, str]:
    """The folder that the trainer reads, for each part of `checkpoint`."""
    if options.recover_dir:
        if len(checkpoint.parts) > 1:
            raise UsageError(
                "--recover-dir is one folder, and this checkpoint has the parts "
                + ", ".join(part.name for part in checkpoint.parts),
                hint="Leave it out: each part has a slot of its own.",
            )
        return {checkpoint.parts[0].name: os.path.abspath(options.recover_dir)}
    return {part.name: os.path.join(listing.run.path, part.name, layout.SLOT) for part in checkpoint.parts}


def _slot_now(listing: Listing, slots: Mapping[str, str], options: Options) -> Checkpoint | None:
    if not options.recover_dir:
        return listing.slot
    part, path = next(iter(slots.items()))
    try:
        backend = LocalBackend(path)
        found = read_part(backend, part, "", backend.tree(max_depth=5))
    except NotFoundError:
        return None
    manifest = find_manifest(backend, "") if found.status is Status.COMMITTED else None
    step = manifest.step if manifest else -1
    return Checkpoint(step, -1, -1, "slot", (found,)) if found.files else None


def _refusals(
    listing: Listing, point: ResumePoint, slots: Mapping[str, str], old: Checkpoint | None, options: Options
) -> list[str]:
    refusals = []
    if not options.force and (signs := running.signs_of_life(listing)):
        refusals.append(f"the trainer seems to be running ({signs[0]}): stop it, or say --force")
    if old is not None and not options.as_is:
        refusals += [
            f"the slot has a part {part.name}, and the checkpoint has none: two steps would be mixed (--as-is does it)"
            for part in old.parts
            if part.name not in slots
        ]
        chosen = {part.name: part.format for part in point.checkpoint.parts}
        for part in old.parts:
            if part.format in RESUMABLE and part.name in chosen and chosen[part.name] != part.format:
                holds = ", ".join(part.holds) or "unknown state"
                refusals.append(
                    f"{part.name}/{layout.SLOT} holds resumable state ({part.format}: {holds}) and this checkpoint is "
                    f"{chosen[part.name]}: the trainer could not resume its optimizer from it (--as-is puts it there anyway)"
                )
    return refusals


def _nothing_to_do(backend: Backend, point: ResumePoint, old: Checkpoint | None) -> str:
    chosen = point.checkpoint
    if chosen.kind == "slot":
        return f"the slot already holds step {chosen.step}, as the trainer saved it"
    if old is None or old.step != chosen.step or old.step < 0 or old.status is not Status.COMMITTED:
        return ""
    names = {part.name: sorted(file.name for file in part.files) for part in chosen.parts}
    if {part.name: sorted(file.name for file in part.files) for part in old.parts} != names:
        return ""
    report = verify(backend_for(backend, old), old, Level.FULL)
    return f"the slot already holds step {chosen.step}, every digest verified" if report.ok else ""


def stage_key(checkpoint: Checkpoint) -> str:
    """Names what a stage is being filled with: another source, or the same one rewritten, is another key."""
    newest = max(file.mtime_ns for part in checkpoint.parts for file in part.files)
    return f"{checkpoint.step} {newest} {checkpoint.size_bytes} {checkpoint.parts[0].path}"


def _staged_bytes(side: str, key: str) -> int:
    return sum(commit.size_of(os.path.join(side, name)) for name, found in commit.stages(side) if found == key)


# --- doing --------------------------------------------------------------------------------------------------------


def setup(
    backend: Backend,
    selection: Selection = Selection(),
    options: Options = Options(),
    *,
    notify: Notify | None = None,
) -> Outcome:
    """Make the chosen checkpoint the one that the trainer will resume from. Holds the run's lock; one at a time.

    A candidate whose bytes turn out wrong while they are copied is skipped for the next one. Errors: NothingToResumeError,
    RefusedError, BusyError, NoSpaceError; NotCommitted and CommitUncertain as in errors.py. After any error and any kill
    the slot holds the old checkpoint or the new one, whole; KeyboardInterrupt keeps the stage for the next try.
    """
    failed: dict[str, str] = {}
    first = plan(backend, selection, options, ignore_pending=True)
    if first.refusals:
        raise RefusedError("; ".join(first.refusals))
    commit.make_side(first.side)
    with RunLock(first.side, f"setup of step {first.point.checkpoint.step}") as lock:
        rolled = commit.finish_pending(first.side)

        def tell(doing: str, done_bytes: int, total_bytes: int) -> None:
            lock.update(doing, done_bytes, total_bytes)
            if notify is not None:
                notify(doing, done_bytes, total_bytes)

        while True:
            current = plan(backend, selection, options, failed=failed)
            if current.refusals:
                raise RefusedError("; ".join(current.refusals))
            if current.nothing_to_do:
                return Outcome(current, rolled=rolled)
            try:
                outcome = _setup(backend, current, options, tell)
            except (IntegrityError, StorageError) as error:
                source = _source_at_fault(error, current.point.checkpoint)
                if not source:
                    raise
                failed[current.point.checkpoint.parts[0].path] = f"{error} (found while copying)"
                continue
            return dataclasses.replace(outcome, rolled=rolled)


def _source_at_fault(error: CkptStoreError, checkpoint: Checkpoint) -> bool:
    if isinstance(error, StorageError):
        return any(error.path.startswith(part.path) for part in checkpoint.parts)
    return True


def _setup(backend: Backend, current: Plan, options: Options, tell: Notify) -> Outcome:
    started = time.monotonic()
    checkpoint = current.point.checkpoint
    medium = probe.probe(current.side)
    _make_room(current, options)
    stage = commit.open_stage(current.side, stage_key(checkpoint))
    copied = reused = 0
    strategies: dict[str, int] = {}
    pins: dict[str, str] = {}
    try:
        for part in checkpoint.parts:
            result, manifest = _stage_part(backend, current, part, stage, options, tell)
            copied += result.bytes_copied
            reused += result.bytes_reused
            for name, count in result.strategies.items():
                strategies[name] = strategies.get(name, 0) + count
            pins[part.name] = manifest.sha256
    except (IntegrityError, StorageError) as error:
        if _source_at_fault(error, checkpoint):
            commit.discard(current.side, os.path.basename(stage.path))
        raise
    try:
        commit.sync_folder(stage.path)
        commit.sync_folder(current.side)
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=stage.path) from error
    tell("replacing the slot", current.needed_bytes, current.needed_bytes)
    moves, aside = commit.plan_moves(current.side, stage.path, dict(current.slots))
    commit.publish(current.side, commit.Journal("setup", checkpoint.step, medium.method, moves, created_at=commit.now()))
    _discard_redundant(backend, current, keep=aside)
    kept = os.path.join(current.side, aside)
    return Outcome(
        plan=current,
        medium=medium,
        copied_bytes=copied,
        reused_bytes=reused,
        seconds=time.monotonic() - started,
        strategies=strategies,
        old_slot=kept if os.path.isdir(kept) else "",
        manifest_sha256=pins,
    )


def _stage_part(
    backend: Backend, current: Plan, part: Part, stage: commit.Stage, options: Options, tell: Notify
) -> tuple[native.CopyResult, Manifest]:
    """Steps 1 to 3 of commit.py for one part."""
    source = backend_for(backend, current.point.checkpoint)
    recorded = find_manifest(source, folder_of(source, part))
    if recorded is not None and recorded.inspect(part.files).void:
        recorded = None
    expected = {entry.path: entry.chunks for entry in recorded.files} if recorded else {}
    chunk_bytes = recorded.chunk_bytes if recorded else native.CHUNK_BYTES
    specs = [
        native.FileSpec(file.name, file.size_bytes, file.mtime_ns, file.inode, expected.get(file.name)) for file in part.files
    ]
    target = stage.part(part.name)
    os.makedirs(target, mode=0o700, exist_ok=True)
    before = sum(other.size_bytes for other in _parts_before(current.point.checkpoint, part))
    result = native.copy_files(
        part.path,
        target,
        specs,
        options=native.CopyOptions(
            chunk_bytes=chunk_bytes, verify_after_write=options.verify_after_write, resume=stage.resumed
        ),
        progress=lambda done, _: tell(f"copying {part.name}", before + done, current.needed_bytes),
    )
    again = read_part(source, part.name, folder_of(source, part), source.tree(max_depth=5))
    if again.files != part.files:
        raise SourceChangedError(f"{part.path} was written while it was copied", path=part.path)
    return result, _describe(current, part, target, result, chunk_bytes)


def _parts_before(checkpoint: Checkpoint, part: Part) -> list[Part]:
    return list(checkpoint.parts[: checkpoint.parts.index(part)])


def _describe(current: Plan, part: Part, target: str, result: native.CopyResult, chunk_bytes: int) -> Manifest:
    """Give the staged files the owner and mode that belong there, and write their manifest."""
    slot = current.slots[part.name]
    model = os.stat(slot if os.path.isdir(slot) else commit.existing(os.path.dirname(slot)))
    old_file = _any_file(slot)
    file_mode = (os.stat(old_file).st_mode if old_file else model.st_mode) & 0o666
    entries = []
    try:
        for file in part.files:
            path = os.path.join(target, file.name)
            commit.like(path, model, mode=file_mode)
            info = os.stat(path, follow_symlinks=False)
            digest = result.digests[file.name]
            entries.append(FileEntry(file.name, info.st_size, info.st_mtime_ns, info.st_ino, digest.crc, digest.chunks))
        for folder, _, _ in os.walk(target, topdown=False):
            commit.like(folder, model)
            commit.sync_folder(folder)
    except OSError as error:
        raise from_os_error(error, doing="preparing", path=error.filename or target) from error
    run = current.listing.run.path
    manifest = Manifest(
        step=current.point.checkpoint.step,
        epoch=current.point.checkpoint.epoch,
        epoch_step=current.point.checkpoint.epoch_step,
        part=part.name,
        origin="setup",
        files=tuple(entries),
        chunk_bytes=chunk_bytes,
        source=os.path.relpath(part.path, run) if part.path.startswith(f"{run}/") else part.path,
        tool=f"ckptstore {ckptstore.__version__}",
    )
    commit.write_manifest(target, manifest, model=os.stat(os.path.join(target, part.files[0].name)))
    return manifest


def _any_file(folder: str) -> str:
    try:
        with os.scandir(folder) as entries:
            return next((e.path for e in entries if e.is_file(follow_symlinks=False) and e.name != MANIFEST_NAME), "")
    except OSError:
        return ""


def _make_room(current: Plan, options: Options) -> None:
    """NoSpaceError when the copy would not fit, naming what could go; with `replace` the old slot goes first."""
    missing = current.needed_bytes - current.reusable_bytes
    keep = {os.path.basename(path) for path, key in commit.stages(current.side) if key == stage_key(current.point.checkpoint)}

    def room() -> bool:
        return current.free_bytes is None or shutil.disk_usage(current.side).free > missing + (16 << 20)

    if room():
        return
    for name in commit.leftovers(current.side):  # stages of dead writers: whatever they hold lies in the run as well
        if name not in keep:
            commit.discard(current.side, name)
    if room():
        return
    if options.replace and current.old_slot is not None:
        tested = verify(
            backend_for(LocalBackend(current.listing.run.path), current.point.checkpoint),
            current.point.checkpoint,
            Level.FULL,
        )
        if not tested.ok:
            raise IntegrityError(f"step {tested.checkpoint.step}: {tested.findings[0]}; the old slot was not removed")
        for slot in current.slots.values():
            if os.path.isdir(slot):
                doomed = os.path.join(current.side, f"trash-{os.path.basename(os.path.dirname(slot))}-{time.time_ns():x}")
                os.rename(slot, doomed)
                shutil.rmtree(doomed)
        if room():
            return
    free = shutil.disk_usage(current.side).free
    raise NoSpaceError(
        f"copying needs {missing / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {current.side}",
        operation="copying",
        path=current.side,
        hint="; ".join(_what_could_go(current)) or "Free some space.",
    )


def _what_could_go(current: Plan) -> list[str]:
    ideas = [
        f"`ckptstore clean --old-slots` frees {old.size_bytes / 1e9:.2f} GB ({old.name})"
        for old in commit.old_slots(current.side)
    ]
    if current.old_slot is not None:
        ideas.append(
            f"`--replace` removes the old slot first, {current.old_slot.size_bytes / 1e9:.2f} GB (no way back to it then)"
        )
    older = [c for c in current.listing.checkpoints if c.step < current.point.checkpoint.step]
    if older:
        ideas.append(
            f"{len(older)} older checkpoints hold {sum(c.size_bytes for c in older) / 1e9:.2f} GB in {current.listing.run.path}"
        )
    return ideas


def _discard_redundant(backend: Backend, current: Plan, *, keep: str) -> None:
    """Of older set-aside slots, remove those that are our own copies of checkpoints that are still there, whole."""
    whole = {part.path for c in current.listing.checkpoints if c.status.usable for part in c.parts}
    for old in commit.old_slots(current.side):
        if old.name == keep:
            continue
        for name in old.parts:
            inside = LocalBackend(os.path.join(old.path, name))
            manifest = find_manifest(inside, "")
            part = read_part(inside, name, "", inside.tree(max_depth=5))
            source = os.path.join(current.listing.run.path, manifest.source) if manifest else ""
            if manifest is None or manifest.origin != "setup" or part.status is not Status.COMMITTED or source not in whole:
                break
        else:
            commit.discard(current.side, old.name)


def undoable(backend: Backend, options: Options = Options()) -> commit.OldSlot:
    """The old slot that `undo` would swap back in. NotFoundError when none was set aside."""
    kept = commit.old_slots(commit.side_folder(backend.location, _main_slot(backend, options)))
    if not kept:
        raise NotFoundError("there is nothing to undo: no slot was set aside for this run")
    return kept[0]


def undo(backend: Backend, options: Options = Options()) -> tuple[int, str]:
    """Swap the slot that was set aside last back in. Returns its step (-1: unknown) and where the other one is now."""
    listing = scan(backend)
    if not options.force and (signs := running.signs_of_life(listing)):
        raise RefusedError(f"the trainer seems to be running ({signs[0]}): stop it, or say --force")
    main = _main_slot(backend, options)
    side = commit.side_folder(listing.run.path, main)
    undoable(backend, options)
    with RunLock(side, "undo"):
        commit.finish_pending(side)
        old = undoable(backend, options)
        run = listing.run.path
        slots = {part: main if options.recover_dir else os.path.join(run, part, layout.SLOT) for part in old.parts}
        medium = probe.probe(side)
        moves, aside = commit.plan_moves(side, old.path, slots)
        found = find_manifest(LocalBackend(os.path.join(old.path, old.parts[0])), "")
        step = found.step if found else -1
        commit.publish(side, commit.Journal("undo", step, medium.method, moves, created_at=commit.now()))
        return step, os.path.join(side, aside)


def _main_slot(backend: Backend, options: Options) -> str:
    if options.recover_dir:
        return os.path.abspath(options.recover_dir)
    return os.path.join(backend.location, layout.MAIN_PART, layout.SLOT)


def reports(backend: Backend, checkpoints: list[Checkpoint], level: Level, notify: Notify | None = None) -> list[Report]:
    """verify() for several, with one progress over all of them."""
    total = sum(checkpoint.size_bytes for checkpoint in checkpoints)
    done = 0
    results = []
    for checkpoint in checkpoints:
        base = done

        def progress(done_bytes: int, _: int, base: int = base, step: int = checkpoint.step) -> None:
            if notify is not None:
                notify(f"verifying step {step}", base + done_bytes, total)

        results.append(verify(backend_for(backend, checkpoint), checkpoint, level, progress=progress))
        done += checkpoint.size_bytes
    return results
