"""Keeps every checkpoint of a Hugging Face Trainer (or TRL) in a store of steps: digested, durable, pruned by our rules.

trainer = Trainer(..., callbacks=[StoreCallback(CheckpointStore("runs/mine"), keep=Keep(last=5))])
trainer.train(resume_from_checkpoint=newest(store, "outputs/from-store"))

The Trainer writes `checkpoint-N` as always and may keep one (`save_total_limit=1`); the callback copies it when it is complete.
Needs transformers and accelerate.

python examples/hf_trainer.py DIR      trains a tiny model, twice
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

from ckptstore import CheckpointStore
from ckptstore.retention import Keep


class StoreCallback(TrainerCallback):
    """Saves each checkpoint of the Trainer as a step of the store, on the main process."""

    def __init__(self, store: CheckpointStore, *, keep: Keep | None = None) -> None:
        self.store = store
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has written its checkpoint. Called on every rank: wait for what the others add (RNG state, shards)."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        logged: dict[str, Any] = {}
        for entry in state.log_history:
            logged |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        self.store.save(state.global_step, folder, metrics=logged, keep=self.keep)


def newest(store: CheckpointStore, place: str) -> str | None:
    """The newest good step as a folder below `place` that the Trainer resumes from; None for a new run. Digests are checked.

    All ranks call it, after the TrainingArguments were made; the main process copies.
    """
    ranks = PartialState()
    ranks.wait_for_everyone()
    if not os.path.isdir(store.folder) or not store.list():
        return None
    step = store.resume_point().checkpoint.step
    folder = os.path.join(place, f"checkpoint-{step}")
    if ranks.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # a copy of an earlier start: the step may have been saved anew since
        store.restore(step, folder)
    ranks.wait_for_everyone()
    return folder


class Tiny(torch.nn.Module):
    """A model small enough for an example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        return {"loss": (self.layer(x) - labels).square().mean()}


def main() -> None:
    """Trains to step 10, and on to step 20 from what the store holds."""
    place = sys.argv[1]
    store = CheckpointStore(os.path.join(place, "store"))
    data = [{"x": torch.randn(8), "labels": torch.zeros(8)} for _ in range(64)]
    for steps in (10, 20):
        arguments = TrainingArguments(
            os.path.join(place, f"outputs-{steps}"), max_steps=steps, save_steps=5, logging_steps=5, save_total_limit=1,
            per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        callback = StoreCallback(store, keep=Keep(last=3))
        trainer = Trainer(Tiny(), arguments, train_dataset=data, callbacks=[callback])
        before = newest(store, os.path.join(place, "from-store"))
        trainer.train(resume_from_checkpoint=before)
        print(f"from {before and os.path.basename(before)} to {trainer.state.global_step}; kept {[one.step for one in store]}")


if __name__ == "__main__":
    main()
