"""What AReaL will restore from a slot and its recover_info, and what it will not: said before anything is replaced.

Facts: AReaL's FSDP path saves neither the LR scheduler nor RNG states, in any version;
a Hugging Face export holds weights only.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Restoration:
    """Both lists are for people; `blockers` is what keeps AReaL from resuming at the checkpoint's step at all."""

    restored: tuple[str, ...]
    lost: tuple[str, ...]
    blockers: tuple[str, ...]


def restoration(checkpoint: Checkpoint, info: RecoverInfo | None) -> Restoration:
    """What would be restored if `checkpoint` lay in the slot beside the present recover_info."""
    restored = [f"weights of step {checkpoint.step} ({', '.join(part.name for part in checkpoint.parts)})"]
    lost: list[str] = []
    blockers: list[str] = []
    if "optimizer" in checkpoint.holds:
        restored.append("optimizer state (Adam moments)")
    else:
        lost.append("optimizer state (Adam moments and step count): this checkpoint holds none")
    lost.append("position of the learning-rate schedule, RNG states (AReaL's FSDP engine does not save them)")
    if info is None:
        lost.append("step counter, data order, save timers (no recover_info)")
        blockers.append("there is no recover_info/: with recover.mode=auto AReaL starts from step 0, without saying so")
    elif info.problems:
        lost.append("step counter, data order, save timers (recover_info is damaged)")
        blockers.append(f"recover_info/ is damaged ({info.problems[0]}): AReaL would start from step 0 or crash")
    elif info.step != checkpoint.step:
        lost.append(f"step counter and data order of step {checkpoint.step}")
        blockers.append(
            f"recover_info/ says step {info.step}: AReaL would go on at step {info.resumes_at} "
            f"with the weights of step {checkpoint.step}"
        )
    else:
        restored.append(f"step counter (goes on at global step {info.resumes_at}), data order, save timers")
    if checkpoint.format in ("hf", "hf-sharded", "hf-bin"):
        blockers.append(
            f"the checkpoint is a Hugging Face export ({checkpoint.format}): AReaL from v0.4.0 reads DCP from the slot "
            "and would crash; "
            "up to v0.3.4 it also wants optimizer shards and would restart from step 0"
        )
    elif checkpoint.format == "lora":
        blockers.append("the checkpoint is a LoRA adapter: AReaL's slot wants the training engine's own format")
    return Restoration(tuple(restored), tuple(lost), tuple(blockers))
