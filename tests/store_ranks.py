"""Run by the tests of StoreWriter: one gloo rank that saves, or loads, an FSDP2 model; it may be told to die on the way.

python -m tests.store_ranks {save|async|load|die} STORE STEP RANK WORLD PORT [WHERE]
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ckptstore import CheckpointStore
from ckptstore.saves import saving
from ckptstore.torch import StoreReader, StoreWriter
from tests import areal_model
from tests.areal_ranks import full, sharded


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "note": "text"}


def main(doing: str, folder: str, step: int, rank: int, world: int, port: str, where: str = "") -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    timeout = timedelta(seconds=6 if doing == "die" else 30)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
    store = CheckpointStore(folder)
    seed = step if doing != "load" else 1000
    model = sharded(areal_model.make(seed, dtype=torch.float32))
    optimizer = areal_model.adamw(model)
    areal_model.train_step(model, optimizer)
    state = state_of(model, optimizer)
    try:
        if doing == "load":
            dcp.load(state, storage_reader=StoreReader(store, step))
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        elif doing == "async":
            dcp.async_save(state, storage_writer=StoreWriter(store, step, nice=5)).result()
        else:
            if doing == "die" and rank == int(where.partition(":")[0]):
                die_at(where.partition(":")[2])
            dcp.save(state, storage_writer=StoreWriter(store, step, metrics={"loss": float(step)}))
    except BaseException as error:  # noqa: BLE001
        print(f"FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
        os._exit(7)  # the others may be gone: no orderly end
    weights = {key: full(value).clone() for key, value in model.state_dict().items()}
    moments = [full(value["exp_avg"]).clone() for value in optimizer.state.values()]
    if rank == 0 and where.startswith("/"):
        torch.save({"weights": weights, "moments": moments}, where)
    dist.barrier()
    dist.destroy_process_group()
    print("DONE", flush=True)


def die_at(place: str) -> None:
    """SIGKILL before the data is written, or after it, before the others are told; or the write fails; or it hangs."""
    real = saving.write_buffers

    def write_buffers(*args: object, **kwargs: object) -> object:
        if place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if place == "error":
            raise OSError(5, "Input/output error")
        if place == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        result = real(*args, **kwargs)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    saving.write_buffers = write_buffers  # type: ignore[assignment]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    doing, folder, step, rank, world, port, *more = sys.argv[1:]
    main(doing, folder, int(step), int(rank), int(world), port, *more)
