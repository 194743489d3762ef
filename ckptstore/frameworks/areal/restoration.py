"""What AReaL will restore after a setup, and what it will not: said before anything is replaced.

Facts: AReaL's FSDP engine saves neither the LR scheduler nor RNG states, in any version; a Hugging Face export holds
weights only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckptstore.frameworks.areal.era import Era
from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.frameworks.areal.target import InfoPlan, Transfer, optimizer_in
from ckptstore.model import Checkpoint

_FIRST_WITH_DCP = (0, 4)
_OPTIMIZER_SHARD = re.compile(r"optim_world_size_([0-9]{1,6})_rank_[0-9]+\.pt")
_BECOMES = {"dcp": "dcp", "era-a": "hf+optim"}


@dataclass(frozen=True, slots=True)
class Restoration:
    """All for people. `blockers` is what keeps AReaL from resuming at the checkpoint's step, `needs` what it takes."""

    restored: tuple[str, ...]
    lost: tuple[str, ...]
    blockers: tuple[str, ...]
    needs: tuple[str, ...]
    overrides: tuple[str, ...]  #: KEY=VALUE words that the command which resumes must have


def restoration(
    checkpoint: Checkpoint, transfers: Mapping[str, Transfer], planned: InfoPlan, era: Era, *, present: RecoverInfo | None
) -> Restoration:
    """What AReaL restores once the plan is done. `present` is the recover_info that lies there now.

    No transfers: `checkpoint` is the slot, which holds it already.
    """
    restored = [f"weights of step {checkpoint.step} ({', '.join(part.name for part in checkpoint.parts)})"]
    lost: list[str] = []
    blockers: list[str] = []
    optimizer = next((way.optimizer for way in transfers.values()), optimizer_in(checkpoint.holds))
    if optimizer == "kept":
        restored.append("optimizer state (Adam moments and step count)")
    elif optimizer == "zero":
        lost.append("optimizer state: Adam's moments and step count begin anew, as at step 0")
    else:
        lost.append("optimizer state (Adam's moments and step count): there is none")
    lost.append("position of the learning-rate schedule, RNG states (AReaL's FSDP engine does not save them)")
    if planned.action in ("keep", "write"):
        own = "the recover_info of this step is there" if planned.action == "keep" else "a recover_info made for this step"
        restored.append(f"step counter (goes on at global step {checkpoint.step + 1}), save timers: {own}")
        order = lost if any("starts again" in note for note in planned.notes) else restored
        order += [note for note in planned.notes if note.startswith("data order")]
        if present is not None and present.step > checkpoint.step:
            lost.append(
                f"W&B points up to step {present.step}: W&B drops steps that the run's id has seen (a new trial has none)"
            )
    else:
        _judge_present(checkpoint, present, lost, blockers)
    blockers += [f"{name}: {way.refusal}" for name, way in transfers.items() if way.refusal]
    if planned.refusal:
        blockers.append(f"no recover_info can be made: {planned.refusal}")
    slot_format = next((_BECOMES.get(way.how, checkpoint.format) for way in transfers.values()), checkpoint.format)
    if slot_format != era.slot_format:
        fate = "would crash" if era.slot_format == "dcp" else "would restart from step 0 without saying so"
        blockers.append(f"AReaL reads {era.slot_format} from the slot ({era.how}), and this is {slot_format}: it {fate}")
    # `++`: the run's YAML hardly has that key, and Hydra refuses a bare KEY=VALUE for one that is not there.
    overrides = ("++recover.no_load_optim=true",) if slot_format == "dcp" and optimizer == "none" else ()
    if overrides and not era.can_skip_optimizer:
        blockers.append("the DCP holds no optimizer state: only AReaL from v1.0.3 loads it (recover.no_load_optim=true)")
    needs = [*_needs(checkpoint, slot_format), *(note for note in planned.notes if not note.startswith("data order"))]
    needs += [f"{word} in the command that resumes: no optimizer state is there to be loaded" for word in overrides]
    if not era.known:
        needs.append(f"{era.how}; say which with --areal-dir or --areal-version")
    return Restoration(tuple(restored), tuple(lost), tuple(blockers), tuple(needs), overrides)


def _judge_present(checkpoint: Checkpoint, present: RecoverInfo | None, lost: list[str], blockers: list[str]) -> None:
    """What the recover_info that is left alone will do."""
    if present is None:
        lost.append("step counter, data order, save timers (no recover_info)")
        blockers.append("there is no recover_info/: with recover.mode=auto AReaL starts from step 0, without saying so")
    elif present.problems:
        lost.append("step counter, data order, save timers (recover_info is damaged)")
        blockers.append(f"recover_info/ is damaged ({present.problems[0]}): AReaL would start from step 0 or crash")
    elif present.step != checkpoint.step:
        lost.append(f"step counter and data order of step {checkpoint.step}")
        blockers.append(
            f"recover_info/ says step {present.step}: AReaL would go on at step {present.resumes_at} "
            f"with the weights of step {checkpoint.step}"
        )


def _needs(checkpoint: Checkpoint, slot_format: str) -> list[str]:
    """What must hold of the AReaL that resumes from a slot of this format."""
    if slot_format == "dcp":
        return ["AReaL v0.4.0 or later (it reads DCP)"]
    if slot_format == "hf+optim":
        names = [file.name for part in checkpoint.parts for file in part.files]
        sizes = {match[1] for name in names if (match := _OPTIMIZER_SHARD.fullmatch(name))}
        processes = f", with {' or '.join(sorted(sizes))} trainer processes (its optimizer shards)" if sizes else ""
        return [f"AReaL up to v0.3.4, which keeps Hugging Face files in the slot{processes}; v0.4.0 and later would crash"]
    return []
