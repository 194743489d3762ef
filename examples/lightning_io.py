"""Lightning's checkpoints in a store of steps: no pickle, digests checked on load, pruned by our rules.

trainer = Trainer(plugins=[StoreCheckpointIO(store, keep=Keep(last=3))], callbacks=[ModelCheckpoint(save_top_k=-1, ...)])
trainer.fit(module, ckpt_path=newest(store))

A checkpoint is the step that its `global_step` says; of the paths that Lightning gives it, only the `step=N` counts. What is
kept is said by `keep`: let ModelCheckpoint keep all. Callbacks and loops may keep numbers, text, tensors, lists and dicts of
these; what only a pickle could save is refused by name. For strategies with one full state dict (one device, DDP).

python examples/lightning_io.py DIR      trains a tiny model, twice; DIR may be a URL
"""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import ckptstore.torch as ckpt
from ckptstore import CheckpointStore
from ckptstore.errors import NotFoundError
from ckptstore.retention import Keep


class StoreCheckpointIO(CheckpointIO):
    """Saves to, and loads from, a store of steps."""

    def __init__(self, store: CheckpointStore, *, keep: Keep | None = None) -> None:
        self.store = store
        self.keep = keep

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Called on rank 0."""
        ckpt.save(self.store, checkpoint["global_step"], checkpoint, keep=self.keep)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """`path` names a step: step=100, or any path with that in it."""
        return ckpt.load(self.store, step_of(path), map_location=None if callable(map_location) else map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Nothing: `keep` says what goes."""


def step_of(path: Any) -> int:
    """The step that a path of Lightning's names."""
    found = re.findall(r"step=([0-9]+)", str(path))
    if not found:
        raise ValueError(f"{path} names no step: say step=100")
    return int(found[-1])


def newest(store: CheckpointStore) -> str | None:
    """What to give as `ckpt_path`: the newest good step; None for a new run."""
    try:
        return f"step={store.resume_point().checkpoint.step}" if store.list() else None
    except NotFoundError:
        return None


class Tiny(LightningModule):
    """A model small enough for an example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        """The loss."""
        return (self.layer(batch) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        """Adam and a schedule, so that both are saved."""
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def main() -> None:
    """Trains to step 20, and on to step 40 from what the store holds."""
    warnings.simplefilter("ignore")
    store = CheckpointStore(sys.argv[1])
    data = torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=8)
    for steps in (20, 40):
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            plugins=[StoreCheckpointIO(store, keep=Keep(last=3) if store.backend.is_folder else None)],
            callbacks=[ModelCheckpoint(every_n_train_steps=5, save_top_k=-1)],
        )  # fmt: skip
        model, before = Tiny(), newest(store)
        trainer.fit(model, data, ckpt_path=before)
        saved = ckpt.load(store)
        same = all(torch.equal(saved["state_dict"][name], value) for name, value in model.state_dict().items())
        kept = [one.step for one in store]
        print(f"from {before} to {trainer.global_step}; kept {kept}; the newest is the model: {same}", flush=True)


if __name__ == "__main__":
    main()
