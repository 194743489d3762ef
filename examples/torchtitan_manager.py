"""torchtitan's CheckpointManager on a store of steps: its own files and schedule, committed once and digested by us.

Give it to the trainer's config in place of CheckpointManager.Config:   checkpoint=StoreManager.Config(enable=True, ...)

Steps that torchtitan saved before are in the same folders, `step-N`; they are loaded as it does. HF exports stay its own.
`keep_latest_k` counts good steps. Without torchtitan, the same two calls are all that any DCP trainer needs.

python examples/torchtitan_manager.py DIR      saves and loads a tiny model by torchtitan's own code, on one CPU
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager

from ckptstore import CheckpointStore, Status
from ckptstore.errors import NotFoundError
from ckptstore.retention import Keep
from ckptstore.torch import StoreReader, StoreWriter


class StoreManager(CheckpointManager):
    """Saves to, and loads from, the store that the manager's folder is."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """As torchtitan's own."""

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """In place of a folder, a step of the store."""
        if to_hf:
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        writer = StoreWriter(CheckpointStore(self.folder), step_of(checkpoint_id))
        if async_mode == AsyncMode.DISABLED:
            return dcp.save(state_dict, storage_writer=writer)
        if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:  # staged to pinned memory; written by a thread of this process
            return dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg, async_stager=self.stager)
        return dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """What has a manifest is checked while it is read."""
        store = CheckpointStore(self.folder)
        if from_hf or not checkpoint_id.startswith(self.folder) or not is_ours(store, step_of(checkpoint_id)):
            return super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        dcp.load(state_dict, storage_reader=StoreReader(store, step_of(checkpoint_id)))
        if "model" in self.states:
            self.states["model"].load_state_dict(state_dict)
        return None

    def _find_load_step(self, folder: str = "") -> int:
        """The newest whole step."""
        if folder:
            return int(super()._find_load_step(folder))
        try:
            newest = CheckpointStore(self.folder).latest()
        except NotFoundError:
            return -1
        return newest.step if newest is not None else -1

    def _purge_stale_checkpoints(self) -> None:
        """Of the steps of the store, by its rules."""
        if self._should_purge():
            CheckpointStore(self.folder).prune(Keep(last=self.keep_latest_k))


def step_of(checkpoint_id: str) -> int:
    """torchtitan's paths end in step-N."""
    match = re.search(r"step-([0-9]+)$", checkpoint_id.rstrip("/"))
    if match is None:
        raise ValueError(f"{checkpoint_id} names no step")
    return int(match[1])


def is_ours(store: CheckpointStore, step: int) -> bool:
    """Whether we have saved it."""
    return store.get(step).status is Status.COMMITTED


class Held:
    """An object with a state dict, as torchtitan holds optimizers and schedulers."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Its own."""
        return dict(self.value.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into it."""
        self.value.load_state_dict(state)


def manager(place: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> StoreManager:
    """torchtitan's manager, as its trainer makes one."""
    config = StoreManager.Config(enable=True, folder="store", interval=1, keep_latest_k=2, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return StoreManager(
        config, dataloader=Held(torch.nn.Module()), model_parts=[model], optimizers=Held(optimizer),
        lr_schedulers=Held(schedule), states={}, sd_adapter=None, base_folder=place,
    )  # fmt: skip


def main() -> None:
    """Trains three steps, saves each, and goes on in a new manager."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    for mode in ("disabled", "async"):
        ours = manager(sys.argv[1], model, optimizer, async_mode=mode)
        first = ours._find_load_step() + 1
        for step in range(first, first + 3):
            model(torch.randn(4, 16)).square().mean().backward()
            ours.maybe_wait_for_staging()
            optimizer.step()
            ours.save(step)
        if ours.save_future is not None:
            ours.save_future.result()
        ours.close()
    store = CheckpointStore(f"{sys.argv[1]}/store")
    other = torch.nn.Linear(16, 16)
    again = manager(sys.argv[1], other, torch.optim.AdamW(other.parameters()))
    assert again.load()
    again.close()
    print(f"steps {[one.step for one in store]}; loaded is saved: {torch.equal(other.weight, model.weight)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
