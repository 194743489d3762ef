"""What setup would do, and why; or why it would not. Nothing here writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from ckptstore import commit, probe, running
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.choose import ResumePoint, Selection, resume_point
from ckptstore.errors import BusyError, NotFoundError, UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.listing import RESUMABLE, Listing, backend_for, find_manifest, read_part, scan
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.verify import verify

ANY = Selection()


@dataclass(frozen=True, slots=True)
class Options:
    """How `setup` goes about it. The defaults refuse whatever could lose something."""

    recover_dir: str = ""  #: another slot than the one that AReaL reads
    force: bool = False  #: although the trainer seems to be running
    as_is: bool = False  #: although the slot's format differs, so that resumable state leaves the slot
    replace: bool = False  #: remove the old slot first, where there is no room for both
    verify_after_write: bool = False  #: read everything back from the disk before the commit


CAREFUL = Options()


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


def plan(
    backend: Backend,
    selection: Selection = ANY,
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
    side = side_folders.side_folder(listing.run.path, first)
    if not ignore_pending and (journal := commit.pending(side)):
        raise BusyError(
            f"an interrupted {journal.action} of step {journal.step} is pending in {side}",
            hint="Any ckptstore command run by a user who may write there finishes it.",
        )
    place = side if os.path.isdir(side) else side_folders.existing(os.path.dirname(first))
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
        how = "every digest verified" if chosen.status is Status.COMMITTED else "as the trainer saved it"
        return f"the slot already holds step {chosen.step}, {how}"
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
    return sum(side_folders.size_of(os.path.join(side, name)) for name, found in side_folders.stages(side) if found == key)
