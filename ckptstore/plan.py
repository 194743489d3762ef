"""What setup would do, and why; or why it would not. Nothing here writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from ckptstore import commit, places, probe, running
from ckptstore import journal as journals
from ckptstore import side as side_folders
from ckptstore.backends import is_url, open_backend
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.choose import ResumePoint, Selection, own_sums
from ckptstore.config import RunConfig
from ckptstore.errors import AlreadyExistsError, BusyError, CkptStoreError, NotFoundError, RefusedError, UsageError
from ckptstore.frameworks.areal import layout, recover_info
from ckptstore.frameworks.areal.era import Era
from ckptstore.frameworks.areal.era import of as era_of
from ckptstore.frameworks.areal.launch import Installation, logged_config
from ckptstore.frameworks.areal.restoration import Restoration, restoration
from ckptstore.frameworks.areal.resume_state import data_parallel_world
from ckptstore.frameworks.areal.target import InfoPlan, Transfer, optimizer_in, plan_info, transfer
from ckptstore.leaving import leaving, what_is_left
from ckptstore.left import Left
from ckptstore.listing import RESUMABLE, Listing, backend_for, scan, with_copy
from ckptstore.model import Checkpoint, Level, Part, Status
from ckptstore.names import check_name
from ckptstore.parts import find_manifest, read_part
from ckptstore.transfer import mirrored
from ckptstore.two_places import choice
from ckptstore.verify import OWN_SUMS, Notify, verify

ANY = Selection()


@dataclass(frozen=True, slots=True)
class Options:
    """How `setup` goes about it. The defaults refuse whatever could lose something."""

    recover_dir: str = ""  #: another slot than the one that AReaL reads
    new_trial: str = ""  #: a fresh trial of this name instead of the slot: one rename, and the old trial is untouched
    force: bool = False  #: although the trainer seems to be running
    as_is: bool = False  #: the files as they are, whether AReaL can resume from them or not; recover_info is left alone
    replace: bool = False  #: remove the old slot first, where there is no room for both
    verify_after_write: bool = False  #: read everything back from the disk before the commit
    write_frequencies: bool = False  #: how often to save: the YAML's, even where the trainer's recover_info is kept
    steps_per_epoch: int = 0  #: 0: derived from the run
    world_size: int = 0  #: ranks of the trainer; 0: from the YAML where it tells
    config: RunConfig | None = None  #: the run's YAML; None: the one that the trainer kept with its logs
    installation: Installation | None = None  #: the AReaL that will train; None: judged by the present slot


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
    era: Era
    transfers: Mapping[str, Transfer]  #: part → how it gets into its slot; empty when the slot holds it already
    info: InfoPlan
    refusals: tuple[str, ...]  #: why setup would not do it; empty when it would
    nothing_to_do: str  #: why there is nothing to do; empty when there is
    notes: tuple[str, ...]  #: what is in the way in the run, or left aside
    leaves: Mapping[str, Left] = field(default_factory=dict)  #: the record of what training has left, once this is done
    new_trial: str = ""  #: the folder of the trial to be made; empty when it is the run's own slot

    @property
    def restoration(self) -> Restoration:
        """What the trainer restores once this is done, and what not."""
        placed = self.old_slot if not self.transfers and self.old_slot is not None else self.point.checkpoint
        return restoration(placed, self.transfers, self.info, self.era, present=self.listing.recover_info)


def refuse_steps(listing: Listing) -> None:
    """UsageError for a store of steps: no trainer reads a slot there."""
    if listing.framework == "steps":
        raise UsageError(
            f"{listing.run.path} is a store of steps: there is no slot that a trainer resumes from",
            hint="Training loads from it by itself (ckptstore.torch.load); CheckpointStore.restore copies a step's files out.",
        )


def configured(options: Options, run: layout.RunRef) -> Options:
    """`options` with the run's YAML, where the trainer has kept one."""
    return options if options.config is not None else replace(options, config=logged_config(run))


def plan(
    backend: Backend,
    selection: Selection = ANY,
    options: Options = Options(),
    *,
    failed: Mapping[str, str] | None = None,
    ignore_pending: bool = False,
    notify: Notify | None = None,
) -> Plan:
    """What `setup` would do now, and why. Writes nothing; `notify` is told where it reads all of the slot."""
    listing = scan(backend)
    refuse_steps(listing)
    options = configured(options, listing.run)
    chosen = choice(backend, listing, selection, failed, notify=notify)
    point, found = chosen.point, chosen.found
    slots = slots_for(listing, point.checkpoint, options)
    first = next(iter(slots.values()))
    side = side_folders.side_folder(listing.run.path, first if options.recover_dir else _main_slot(listing))
    if not ignore_pending and (journal := journals.pending(side)):
        raise BusyError(
            f"an interrupted {journal.action} of step {journal.step} is pending in {side}",
            hint="Any ckptstore command run by a user who may write there finishes it.",
        )
    place = side if os.path.isdir(side) else side_folders.existing(os.path.dirname(first))
    file_system = probe.file_system(place)
    old = _slot_now(listing, slots, options)
    era = _era(listing, options, old, point.checkpoint)
    transfers = {part.name: _transfer(part, era, options) for part in point.checkpoint.parts}
    info = _info(backend, listing, point.checkpoint, options, found=found, era=era)
    leaves = listing.left
    if not options.new_trial and not options.recover_dir:
        known = {**found.left, **listing.left}  # what another machine has left counts from now on here too
        leaves = leaving(backend, listing, found, point.checkpoint, known=known) if selection.explicit else known
    in_slot = "" if options.new_trial else _in_slot(backend, point, old, slots, transfers)
    nothing_to_do = in_slot if in_slot and info.action in ("keep", "leave") and not info.refusal else ""
    return Plan(
        listing=listing,
        point=point,
        slots=slots,
        side=side,
        file_system=file_system,
        needed_bytes=0 if in_slot else _needed_bytes(point.checkpoint, transfers),
        free_bytes=None if probe.is_network(file_system) else shutil.disk_usage(place).free,
        reusable_bytes=_staged_bytes(side, stage_key(point.checkpoint)),
        old_slot=old,
        era=era,
        transfers={} if in_slot else transfers,
        info=info,
        refusals=() if nothing_to_do else tuple(_refusals(listing, slots, old, {} if in_slot else transfers, info, options)),
        nothing_to_do=nothing_to_do,
        notes=(
            *listing.notes,
            *chosen.notes,
            *what_is_left(listing, leaves, point.checkpoint),
            *(() if options.new_trial else _newer_there(listing, found, selection, point)),
        ),
        leaves=leaves,
        new_trial=trial_folder(listing, options) if options.new_trial else "",
    )


def _newer_there(listing: Listing, found: Listing, selection: Selection, point: ResumePoint) -> list[str]:
    """That what is trained anew meets its own past in the store, which keeps what it has."""
    try:
        record = mirrored.read(places.side_of(listing.run.path))
    except CkptStoreError as error:
        return [str(error)]
    if selection.url:
        url, newest = selection.url, max((c.step for c in found.checkpoints if c.status is Status.COMMITTED), default=-1)
    elif record is not None:
        url, newest = record.url, record.newest_step
    else:
        return []
    if newest <= point.checkpoint.step:
        return []
    return [
        f"{url} holds steps up to {newest}: what training saves anew by their numbers is refused there, and is lost with this "
        "machine. Mirror to another URL from now on (or train as --new-trial, with its own)"
    ]


def _era(listing: Listing, options: Options, old: Checkpoint | None, chosen: Checkpoint) -> Era:
    installation = options.installation or Installation("", "", "", "not looked for")
    present = old if not options.new_trial else listing.slot
    seen = next((c.format for c in (present, chosen) if c is not None and c.format in RESUMABLE), "")
    return era_of(installation, seen)


def _transfer(part: Part, era: Era, options: Options) -> Transfer:
    if options.as_is or options.recover_dir:
        return Transfer("copy", optimizer_in(part.holds))
    return transfer(part, era, world_size(options), options.config)


def world_size(options: Options) -> int:
    """Ranks of the trainer, as said or as the YAML tells; 0 when unknown."""
    if options.world_size or options.config is None:
        return options.world_size
    return data_parallel_world(options.config.text("allocation_mode"))


def _info(
    backend: Backend, listing: Listing, checkpoint: Checkpoint, options: Options, *, found: Listing, era: Era
) -> InfoPlan:
    if options.as_is or options.recover_dir:
        return InfoPlan("leave", {})
    source, info = backend, listing.recover_info
    if checkpoint.kind == "adopted":  # the trainer's own recover_info was kept with it
        source = open_backend(checkpoint.store)
        info = recover_info.read(source, source.tree(max_depth=2).get(layout.RECOVER_INFO))
    elif checkpoint.store and found.recover_info is not None:  # from a URL where somebody put it too
        source, info = open_backend(checkpoint.store), found.recover_info
    return plan_info(
        source,
        checkpoint,
        info,
        others=[*listing.checkpoints, *(found.checkpoints if found is not listing else ())],
        config=options.config,
        steps_per_epoch=options.steps_per_epoch,
        world_size=world_size(options),
        write_frequencies=options.write_frequencies,
        era=era.name,
    )


def _main_slot(listing: Listing) -> str:
    return os.path.join(listing.run.path, layout.MAIN_PART, layout.SLOT)


def slots_for(listing: Listing, checkpoint: Checkpoint, options: Options) -> dict[str, str]:
    """The folder that the trainer reads, for each part of `checkpoint`."""
    if options.recover_dir:
        if len(checkpoint.parts) > 1:
            raise UsageError(
                "--recover-dir is one folder, and this checkpoint has the parts "
                + ", ".join(part.name for part in checkpoint.parts),
                hint="Leave it out: each part has a slot of its own.",
            )
        slot = os.path.abspath(options.recover_dir)
        kept = [listing.run.path, *(part.path for other in listing.checkpoints for part in other.parts)]
        if inside := next((path for path in kept if os.path.commonpath([slot, path]) == slot), ""):
            raise UsageError(f"--recover-dir {slot} would replace {inside}", hint="Name a folder of its own.")
        return {checkpoint.parts[0].name: slot}
    return {part.name: os.path.join(trial_folder(listing, options), part.name, layout.SLOT) for part in checkpoint.parts}


def trial_folder(listing: Listing, options: Options) -> str:
    """The trial that will be resumed: the run itself, or the new one beside it."""
    if not options.new_trial:
        return listing.run.path
    if options.recover_dir:
        raise UsageError("--new-trial makes its own slot: without --recover-dir")
    if "/" in options.new_trial or options.new_trial.startswith("."):
        raise UsageError(f"--new-trial {options.new_trial!r} cannot be a trial's name")
    path = os.path.join(os.path.dirname(listing.run.path), check_name(options.new_trial))
    if os.path.lexists(path):
        raise AlreadyExistsError(f"there is a trial {options.new_trial} already: {path}", hint="Choose another name.")
    return path


def _slot_now(listing: Listing, slots: Mapping[str, str], options: Options) -> Checkpoint | None:
    if options.new_trial:
        return None
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
    listing: Listing,
    slots: Mapping[str, str],
    old: Checkpoint | None,
    transfers: Mapping[str, Transfer],
    info: InfoPlan,
    options: Options,
) -> list[str]:
    refusals = []
    for slot in slots.values() if transfers else ():
        try:
            commit.refuse_no_folder(slot)
        except RefusedError as error:
            refusals.append(f"{error} ({error.hint})")
    if not options.force and not options.new_trial and (signs := running.signs_of_life(listing)):
        refusals.append(f"the trainer seems to be running ({signs[0]}): stop it, or say --force")
    if old is not None and transfers and not options.as_is:
        refusals += [
            f"the slot has a part {part.name}, and the checkpoint has none: two steps would be mixed (--as-is does it)"
            for part in old.parts
            if part.name not in slots
        ]
    refusals += [f"{name}: {way.refusal} (--as-is copies it all the same)" for name, way in transfers.items() if way.refusal]
    if info.refusal:
        refusals.append(f"no recover_info can be made: {info.refusal} (--as-is leaves it alone)")
    return refusals


def _in_slot(
    backend: Backend,
    point: ResumePoint,
    old: Checkpoint | None,
    slots: Mapping[str, str],
    transfers: Mapping[str, Transfer],
) -> str:
    """Why the slot need not be filled: it holds the chosen checkpoint already. Empty when it must be."""
    chosen = point.checkpoint
    if all(part.path == slots[part.name] for part in chosen.parts):
        how = "every digest verified" if chosen.vouched else "as the trainer saved it"
        if not chosen.vouched and own_sums(chosen):
            how += f": {OWN_SUMS}"
        return f"the slot already holds step {chosen.step}, {how}"
    if old is None or old.step != chosen.step or old.step < 0:
        return ""
    if old.status is Status.COMPLETE and chosen.kind == "adopted":  # a copy of what the trainer saved there?
        same = with_copy(old, [chosen])
        held = same.vouched and verify(backend, same, Level.FULL).ok
        return f"the slot already holds step {chosen.step}, every digest verified" if held else ""
    if old.status is not Status.COMMITTED:
        return ""
    placed = {part.name: find_manifest(LocalBackend(part.path), "") for part in old.parts}
    formats = {"copy": None, "dcp": "dcp", "era-a": "hf+optim"}
    for part in chosen.parts:
        manifest = placed.get(part.name)
        in_slot = next((other for other in old.parts if other.name == part.name), None)
        if manifest is None or in_slot is None or not part.path.endswith(manifest.source):
            return ""
        if in_slot.format != (formats[transfers[part.name].how] or part.format):
            return ""
        if part.mtime_ns / 1e9 > datetime.fromisoformat(manifest.created_at).timestamp():
            return ""  # the trainer has written the source since
    report = verify(backend_for(backend, old), old, Level.FULL)
    return f"the slot already holds step {chosen.step}, every digest verified" if report.ok else ""


def stage_key(checkpoint: Checkpoint) -> str:
    """Names what a stage is being filled with: another source, or the same one rewritten, is another key."""
    newest = max(file.mtime_ns for part in checkpoint.parts for file in part.files)
    return f"{checkpoint.step} {newest} {checkpoint.size_bytes} {checkpoint.parts[0].path}"


def _needed_bytes(checkpoint: Checkpoint, transfers: Mapping[str, Transfer]) -> int:
    fetched = [part for part in checkpoint.parts if is_url(checkpoint.store) and transfers[part.name].how == "dcp"]
    return checkpoint.size_bytes + sum(part.size_bytes for part in fetched)  # converted beside what was fetched


def _staged_bytes(side: str, key: str) -> int:
    return sum(side_folders.size_of(os.path.join(side, name)) for name, found in side_folders.stages(side) if found == key)
