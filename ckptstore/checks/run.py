"""What the run holds: is the slot one whole step, does everything beside it agree, and will AReaL read it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ckptstore import halt, probe, running
from ckptstore import journal as journals
from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.checks import Diagnosis, Patient, bad, gigabytes, ok, warn
from ckptstore.errors import CkptStoreError
from ckptstore.frameworks.areal import layout, recover_info
from ckptstore.frameworks.areal.era import of as era_of
from ckptstore.listing import RESUMABLE
from ckptstore.lock import busy, has_flock
from ckptstore.model import FRESH_OPTIMIZER, Checkpoint, Status
from ckptstore.saves import owner, prepared, steps

_SETUP = "`ckptstore setup` puts the newest good checkpoint there; --dry-run shows which."
_OPTIMIZER_SHARD = re.compile(r"optim_world_size_([0-9]{1,6})_rank_[0-9]+\.pt")


def halted(patient: Patient) -> Iterator[Diagnosis]:
    """A circuit breaker's TRIPPED record keeps training from starting."""
    trip = halt.read(patient.side)
    if trip is not None:
        remedy = f"Recover: {trip.error().hint}"
        yield bad("halted", f"the circuit breaker halted this run: {trip.saw}", remedy)


def pending(patient: Patient) -> Iterator[Diagnosis]:
    """A setup that a crash interrupted between its renames."""
    holder = busy(patient.side)
    if holder is not None:
        yield warn("pending", f"another ckptstore is at work on this run: {holder}", "Wait for it.")
        return
    journal = journals.pending(patient.side)
    if journal is None:
        yield ok("pending", "no interrupted setup")
        return
    yield bad(
        "pending",
        f"a {journal.action} of step {journal.step} was interrupted while it replaced the slot: AReaL refuses to resume now",
        "`ckptstore list` finishes it, or any other verb but this one.",
    )


def alive(patient: Patient) -> Iterator[Diagnosis]:
    """A trainer at work must not be set up under."""
    if patient.listing is None:
        return
    if signs := running.signs_of_life(patient.listing, now_s=patient.now_s):
        yield warn("running", f"the trainer seems to be running: {signs[0]}", "Stop it before `ckptstore setup`.")
    else:
        yield ok("running", "no sign of a running trainer")


def checkpoints(patient: Patient) -> Iterator[Diagnosis]:
    """What could be resumed from."""
    if patient.listing is None:
        yield ok("checkpoints", f"{patient.run.path} is not there yet: nothing is saved before the first save")
        return
    found = patient.listing.checkpoints
    whole = [checkpoint for checkpoint in found if checkpoint.status.usable]
    broken = [checkpoint for checkpoint in found if not checkpoint.status.usable]
    corrupt = [checkpoint for checkpoint in broken if checkpoint.status is Status.CORRUPT]
    if corrupt:
        yield _of_checkpoints(patient, corrupt, "damaged", damage=True)
    if partial := [checkpoint for checkpoint in broken if checkpoint not in corrupt]:
        yield _of_checkpoints(patient, partial, "not whole", damage=False)
    if whole:
        unsealed = sum(checkpoint.status is Status.COMPLETE for checkpoint in whole)
        steps = f"step {whole[0].step}" if len(whole) == 1 else f"from step {whole[0].step} to {whole[-1].step}"
        text = f"{len(whole)} whole, {steps}"
        yield ok("checkpoints", text + (f"; {unsealed} without digests (`ckptstore seal`)" if unsealed else ""))
    elif found:
        saver = "" if patient.of_steps else "`saver:` in the YAML, and "
        yield bad("checkpoints", f"none of {len(found)} is whole", f"See {saver}the disk's space.", damage=True)
    else:
        what = "step" if patient.of_steps else "export"
        yield warn("checkpoints", f"no {what} is saved yet", "Nothing to do before the first save.")


def _of_checkpoints(patient: Patient, found: list[Checkpoint], what: str, *, damage: bool) -> Diagnosis:
    newest = found[-1]
    text = f"{len(found)} {what}; the newest is step {newest.step}: {newest.findings[0]}"
    remedy = f"`ckptstore show {newest.step}` has the details; {'a load' if patient.of_steps else 'setup'} passes over it."
    return bad("checkpoints", text, remedy, damage=True) if damage else warn("checkpoints", text, remedy)


def slot(patient: Patient) -> Iterator[Diagnosis]:
    """The slot and recover_info must be of one step, and of a format that the AReaL at hand reads."""
    if patient.listing is None:
        return
    now, info = patient.listing.slot, patient.listing.recover_info
    if now is None and info is None:
        yield ok("slot", "empty, and no recover_info: AReaL starts at step 0")
        return
    problems = list(_slot_problems(now, info))
    if now is not None:
        problems += [note for note in now.notes if now.step < 0]
        era = era_of(patient.installation, now.format if now.format in RESUMABLE else "")
        if era.known and now.format != era.slot_format:
            fate = "crashes on it" if era.slot_format == "dcp" else "starts at step 0 with its weights, without saying so"
            problems.append(f"it is {now.format}, and AReaL reads {era.slot_format} ({era.how}): it {fate}")
        elif now.format == "dcp" and not {"optimizer", FRESH_OPTIMIZER} & set(now.holds):
            skips = patient.config is not None and patient.config.get("recover.no_load_optim") is True
            if not era.can_skip_optimizer or not skips:
                problems.append("it holds no optimizer state: AReaL loads it from v1.0.3 on, with recover.no_load_optim=true")
    if problems:
        damaged = now is not None and now.status is Status.CORRUPT
        yield bad("slot", "; ".join(dict.fromkeys(problems)), _SETUP, damage=damaged)
    elif now is not None and info is not None:
        yield ok("slot", f"step {now.step}, {now.format}; recover_info agrees: training goes on at step {info.resumes_at}")


def _slot_problems(now: Checkpoint | None, info: recover_info.RecoverInfo | None) -> Iterator[str]:
    if now is None and info is not None:
        yield f"recover_info says step {info.step}, and the slot is empty: AReaL takes it for a recovery, and crashes"
    if now is not None:
        if not now.status.usable:
            yield f"the slot is {now.status}: {now.findings[0]}"
        if info is None:
            yield "there is no recover_info: with recover.mode=auto AReaL starts at step 0, without saying so"
        elif now.step >= 0 and info.step >= 0 and now.step != info.step:
            yield f"recover_info says step {info.step}, the slot holds step {now.step}: AReaL would count from the wrong one"
    if info is not None and info.problems:
        yield f"recover_info: {info.problems[0]}"


def ranks(patient: Patient) -> Iterator[Diagnosis]:
    """As many trainer processes as saved, where that matters: optimizer shards (v0.3), and the dataloader's states (all)."""
    world = patient.world_size
    if patient.listing is None or (patient.listing.recover_info is None and patient.listing.slot is None):
        return
    if not world:
        remedy = "Say --world-size N, or --config with an allocation_mode that is data-parallel only."
        yield warn("ranks", "unknown how many processes will train: not compared with what was saved", remedy)
        return
    now = patient.listing.slot
    names = [file.name for part in (now.parts if now else ()) for file in part.files]
    shards = {int(match[1]) for name in names if (match := _OPTIMIZER_SHARD.fullmatch(name))}
    states = _saved_ranks(patient.run.path)
    if shards and shards != {world}:
        saved = ", ".join(map(str, sorted(shards)))
        found = f"the slot has optimizer shards of {saved} processes, and {world} will train: AReaL starts at step 0"
        yield bad(
            "ranks", found, f"Train with {saved}, or set up an export: `ckptstore setup --prefer newest --world-size {world}`."
        )
    elif states and states != world:
        found = f"recover_info has dataloader states of {states} processes, and {world} will train: AReaL starts at step 0"
        yield bad(
            "ranks",
            found,
            f"Train with {states} processes, or `ckptstore setup --world-size {world}` writes a recover_info that fits.",
        )
    else:
        yield ok("ranks", f"{world} trainer process{'es' * (world > 1)}, as saved")


def _saved_ranks(run: str) -> int:
    """For how many ranks recover_info holds the data's cursor; 0 where it fits any number, or cannot be told."""
    try:
        data = LocalBackend(run).get(
            f"{layout.RECOVER_INFO}/{recover_info.DATALOADER}", length_bytes=recover_info.MAX_PICKLE_BYTES
        )
    except CkptStoreError:
        return 0
    return recover_info.saved_ranks(data)


def strays(patient: Patient) -> Iterator[Diagnosis]:
    """Folders that AReaL takes for models, or that somebody may take for checkpoints."""
    if patient.listing is None:
        return
    run = patient.run.path
    tree = layout.sort_out(LocalBackend(run).tree(max_depth=2))
    roles = {name for parts in tree.exports.values() for name in parts} | set(tree.slots) | {layout.RECOVER_INFO}
    with os.scandir(run) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    strange = [name for name in folders if name not in roles and name != layout.SIDE]
    if strange:
        found = f"{', '.join(strange[:5])} in the trial: AReaL takes every folder there for a model, and makes a slot in it"
        yield warn("strays", found, "Move them away: nothing of AReaL's lies there.")
    if notes := patient.listing.notes:
        yield warn("strays", "; ".join(notes[:4]), "See `ckptstore list`.")
    if not strange and not notes:
        yield ok("strays", "no folder that AReaL did not make")


def leftovers(patient: Patient) -> Iterator[Diagnosis]:
    """What our own side folder takes up."""
    if not os.path.isdir(patient.side):
        return
    old = sum(slot.size_bytes for slot in side_folders.old_slots(patient.side))
    dead = sum(side_folders.size_of(os.path.join(patient.side, name)) for name in side_folders.leftovers(patient.side))
    if dead:
        yield warn("leftovers", f"interrupted setups left {gigabytes(dead)} in {patient.side}", "`ckptstore clean` removes it.")
    if old:
        found = f"old slots, kept for `setup --undo`, take {gigabytes(old)} in {patient.side}"
        yield ok("leftovers", f"{found} (`ckptstore clean --old-slots` removes them)")


def locks(patient: Patient) -> Iterator[Diagnosis]:
    """A store of steps: without flock nothing tells at once that a writer is dead."""
    works = has_flock(patient.side)
    if works is False:
        found = (
            f"{patient.side} is on a file system without flock ({probe.file_system(patient.side)}): what a crash leaves of a "
            "save goes by itself where its process is known to be dead, on the same machine and in the same container"
        )
        remedy = (
            "Mount it with flock, where it can (Lustre: -o flock); else look at `ckptstore list` after a crash: "
            "`ckptstore clean --older-than 1h` removes the rest."
        )
        yield warn("locks", found, remedy)
    elif works:
        yield ok("locks", "flock works: a dead writer's drafts go by themselves")


def drafts(patient: Patient) -> Iterator[Diagnosis]:
    """A store of steps: what saves that were cut left there."""
    gone = [os.path.join(patient.side, name) for name in steps.leftovers(patient.run.path)]
    if gone:
        found = f"dead writers left {gigabytes(sum(map(side_folders.size_of, gone)))} in {patient.side}"
        yield warn("leftovers", found, "The next save removes it; `ckptstore clean` does now.")
    ready = {one.name: one.note for one in prepared.waiting(patient.side)}
    for note in ready.values():
        yield warn("leftovers", note, "`ckptstore clean --old-slots` removes it, too.")
    for one in owner.unsure(patient.side):
        if one.name not in ready:
            yield warn("leftovers", one.found, one.remedy)


ALL = (halted, pending, alive, checkpoints, slot, ranks, strays, leftovers)
OF_STEPS = (halted, checkpoints, locks, drafts)
