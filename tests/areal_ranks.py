"""One of several gloo ranks that load, or save, AReaL's DCP state under FSDP2.

python -m tests.areal_ranks RANK {load|save|grid} WORLD SLOT ANSWER {tied|-} {optimizer|-}
"""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests import areal_model


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def load(rank: int, slot: str, answer: str, tied: bool, optimizer: bool) -> None:
    """Load the slot into another model, sharded; save what it then holds, and whether training goes on."""
    model = sharded(areal_model.make(99, tied=tied))
    adamw = areal_model.adamw(model) if optimizer else None
    dcp.load({"dcp": areal_model.State(model, adamw)}, checkpoint_id=slot)
    weights = {key: full(value).clone() for key, value in model.state_dict().items()}
    found = {"weights": weights, "state": len(adamw.state) if adamw else 0, "lr": adamw.param_groups[0]["lr"] if adamw else 0}
    if adamw is not None:
        found["moments"] = sum(float(full(state["exp_avg"]).abs().sum()) for state in adamw.state.values())
        found["steps"] = {float(state["step"]) for state in adamw.state.values()}
        if areal_model.TRAINS_SHARDED:
            for _ in range(2):
                areal_model.train_step(model, adamw)
        found["moved"] = any(not torch.equal(weights[key], full(value)) for key, value in model.state_dict().items())
        found["steps_after"] = {float(state["step"]) for state in adamw.state.values()}
    if rank == 0:
        torch.save(found, answer)


def save(rank: int, slot: str, answer: str, tied: bool, optimizer: bool) -> None:
    """Save a model that has trained, as AReaL does."""
    model = sharded(areal_model.make(5, tied=tied))
    adamw = areal_model.adamw(model)
    if areal_model.TRAINS_SHARDED:
        areal_model.train_step(model, adamw)
    dcp.save({"dcp": areal_model.State(model, adamw if optimizer else None)}, checkpoint_id=slot)
    weights = {key: full(value).clone() for key, value in model.state_dict().items()}
    if rank == 0:
        torch.save({"weights": weights}, answer)


def grid(rank: int, slot: str, answer: str, tied: bool, optimizer: bool) -> None:
    """Save tensors that are sharded along the second, and along two dimensions."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    whole = {"a.weight": torch.randn(5, 10), "b.weight": torch.randn(6, 7, 3), "c.weight": torch.randn(9)}
    spread = {
        "a.weight": distribute_tensor(whole["a.weight"], line, [Shard(1)]),
        "b.weight": distribute_tensor(whole["b.weight"], square, [Shard(0), Shard(1)]),
        "c.weight": distribute_tensor(whole["c.weight"], square, [Shard(0), Shard(0)]),
    }
    dcp.save({"dcp": {"model": spread}}, checkpoint_id=slot)
    if rank == 0:
        torch.save({"weights": whole}, answer)


if __name__ == "__main__":
    rank, what, world_size, slot, answer, tied, optimizer = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{answer}.rendezvous", rank=int(rank), world_size=int(world_size))
    globals()[what](int(rank), slot, answer, tied == "tied", optimizer == "optimizer")
    dist.barrier()
    dist.destroy_process_group()
