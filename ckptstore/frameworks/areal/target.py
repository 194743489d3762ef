"""How a checkpoint becomes a slot and a recover_info that the AReaL at hand resumes from, or why it cannot."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptstore.backends.base import Backend
from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError
from ckptstore.frameworks.areal import adamw, pickled, recover_info, resume_state
from ckptstore.frameworks.areal.era import Era
from ckptstore.frameworks.areal.layout import optimizer_ranks
from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.frameworks.areal.resume_state import StepNumbers
from ckptstore.model import FRESH_OPTIMIZER, Checkpoint, Part

EXPORTS = frozenset({"hf", "hf-sharded"})


@dataclass(frozen=True, slots=True)
class Transfer:
    """How one part gets into its slot."""

    how: str  #: copy; dcp (a Hugging Face export becomes DCP); era-a (copied, with fresh optimizer shards)
    optimizer: str  #: kept (as the checkpoint has it), zero (fresh moments written), none (weights alone)
    refusal: str = ""  #: why AReaL could not resume from it; empty when it can


@dataclass(frozen=True, slots=True)
class InfoPlan:
    """What happens to recover_info/: right (nothing), keep (the trainer's own for this step), write, or leave."""

    action: str
    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    refusal: str = ""


def optimizer_in(holds: Sequence[str]) -> str:
    """What copying such a checkpoint brings of an optimizer, in Transfer's words."""
    return "kept" if "optimizer" in holds else "zero" if FRESH_OPTIMIZER in holds else "none"


def transfer(part: Part, era: Era, world_size: int, config: RunConfig | None) -> Transfer:
    """How `part` becomes what `era` reads. `config`, the run's YAML, is needed where an optimizer is made."""
    if part.format == era.slot_format:
        saved = optimizer_ranks(part)
        if world_size and saved and saved != world_size:
            refusal = f"its optimizer was saved by {saved} ranks, the trainer has {world_size}: AReaL would start from step 0"
            return Transfer("copy", optimizer_in(part.holds), refusal)
        return Transfer("copy", optimizer_in(part.holds))
    if part.format == "lora":
        return Transfer("copy", "none", "a LoRA adapter cannot become the training engine's own state")
    if part.format not in EXPORTS:
        return Transfer("copy", "kept", f"AReaL reads {era.slot_format} from the slot ({era.how}), and this is {part.format}")
    if era.can_skip_optimizer:
        return Transfer("dcp", "none")
    how = "dcp" if era.slot_format == "dcp" else "era-a"
    if how == "era-a" and world_size < 1:
        return Transfer(how, "zero", "AReaL up to v0.3 wants one optimizer shard a rank: say how many with --world-size")
    try:
        adamw.from_config(config, part.name, era.name)
    except RefusedError as error:
        return Transfer(how, "zero", f"{error}. {error.hint}")
    return Transfer(how, "zero")


def plan_info(
    backend: Backend,
    checkpoint: Checkpoint,
    info: RecoverInfo | None,
    *,
    others: list[Checkpoint],
    config: RunConfig | None,
    steps_per_epoch: int = 0,
    world_size: int = 0,
    write_frequencies: bool = False,
    era: str = "",
) -> InfoPlan:
    """A recover_info for `checkpoint`: the trainer's own where it is that step's, else one made for it and AReaL's `era`."""
    stored = recover_info.stored_controls(backend) if info is not None else {}
    own = info is not None and info.step == checkpoint.step and not info.problems
    contents = recover_info.contents(backend) if own else {}
    data_notes: tuple[str, ...] = ()
    ranks = recover_info.saved_ranks(contents[recover_info.DATALOADER]) if own else 0
    if ranks and world_size and ranks != world_size:
        contents[recover_info.DATALOADER] = pickled.dumps({})  # any number of ranks takes it
        data_notes = (f"data order: starts again: it was saved for {ranks} ranks, and the trainer has {world_size}",)
    if own and not write_frequencies:
        notes = (*data_notes, *resume_state.stored_difference(config, stored))
        return InfoPlan("write" if data_notes else "keep", contents, notes)
    triples = [(c.step, c.epoch, c.epoch_step) for c in others]
    known = steps_per_epoch or (info.steps_per_epoch if info is not None and info.steps_per_epoch > 0 else 0)
    per_epoch = resume_state.steps_per_epoch((checkpoint.step, checkpoint.epoch, checkpoint.epoch_step), triples, known)
    if not per_epoch and _saves_at_epoch_ends_only(config) and checkpoint.epoch == 0:
        per_epoch = checkpoint.epoch_step + 1
    if checkpoint.step < 0 or checkpoint.epoch < 0:
        return InfoPlan("leave", {}, refusal="its step cannot be known, and AReaL needs one")
    if not per_epoch:
        return InfoPlan("leave", {}, refusal="nothing tells how many steps an epoch has: say --steps-per-epoch N")
    numbers = StepNumbers(checkpoint.step, checkpoint.epoch, checkpoint.epoch_step, per_epoch)
    try:
        made = resume_state.synthesize(numbers, config=config, stored=stored, now_s=time.time(), world_size=world_size, era=era)
    except RefusedError as error:
        return InfoPlan("leave", {}, refusal=f"{error}. {error.hint}")
    files = dict(made.files)
    if own:  # only the frequencies are new; the trainer's data cursor is better than any of ours
        files |= {name: data for name, data in contents.items() if name not in recover_info.CONTROLS}
        return InfoPlan("write", files, (*data_notes, *(note for note in made.notes if not note.startswith("data order"))))
    return InfoPlan("write", files, made.notes)


def _saves_at_epoch_ends_only(config: RunConfig | None) -> bool:
    if config is None:
        return False
    return config.get("saver.freq_epochs") == 1 and not (config.get("saver.freq_steps") or config.get("saver.freq_secs"))
