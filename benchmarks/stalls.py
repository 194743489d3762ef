"""What training waits for, of a save in the background: the contenders, each of which child.py runs in a process of its own.

Of its own, because each keeps a copy of the state for the next save: together they would need several times its memory.
"""

import os
import time
from pathlib import Path

import torch


def state_of(size, device):
    """Sixteen random tensors of BF16, of `size` bytes in all."""
    generator = torch.Generator().manual_seed(1)
    rows = size // 16 // 2 // 1024
    make = lambda: torch.randint(-(2**15), 2**15, (rows, 1024), dtype=torch.int16, generator=generator)  # noqa: E731
    return {f"layer{i}.weight": make().view(torch.bfloat16).to(device) for i in range(16)}


def synchronized(function):
    """With all that it asked a GPU for."""

    def run():
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    return run


_kept = {}


def kept(name, make):
    """From one save to the next."""
    if name not in _kept:
        _kept[name] = make()
    return _kept[name]


def nothing():
    pass


# These return what waits until the state may change, and what waits for the end.


def memcpy(tensors, path, step):
    """On the CPU; pinned where it comes from a GPU."""
    room = lambda one: torch.zeros(one.shape, dtype=one.dtype, pin_memory=one.is_cuda)  # noqa: E731
    copies = kept("copies", lambda: {name: room(tensor) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    return nothing, nothing


def store_async(tensors, path, step):
    import ckptstore.torch
    from ckptstore import CheckpointStore

    handle = ckptstore.torch.save_async(CheckpointStore(path), step, {"model": tensors})
    return handle.wait_staged, handle.wait


def group_of_one():
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )


def dcp_async(cached):
    def begin(tensors, path, step):
        import torch.distributed.checkpoint as checkpoint

        group_of_one()
        writer = kept("writer", lambda: checkpoint.FileSystemWriter(path, cache_staged_state_dict=cached))
        return nothing, checkpoint.async_save(tensors, checkpoint_id=path / str(step), storage_writer=writer).result

    return begin


def dcp_stager(tensors, path, step):
    """torch's newer stager, pinned: since torch 2.9."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    group_of_one()
    stager = kept("stager", lambda: DefaultStager(StagingOptions(use_shared_memory=False)))
    answer = checkpoint.async_save(tensors, checkpoint_id=path / str(step), async_stager=stager)
    return answer.staging_completion.result, answer.upload_completion.result


def torch_checkpointing(tensors, path, step):
    from torch_checkpointing import CheckpointManager

    manager = kept("manager", CheckpointManager)
    ended = manager.save(str(path / str(step)), {"model": tensors})
    return manager._staging_future.result, ended.result


STALLS = {
    "one memcpy": memcpy,
    "ckptstore.torch.save_async": store_async,
    "dcp.async_save": dcp_async(False),
    "dcp.async_save, cached staging": dcp_async(True),
    "dcp.async_save, DefaultStager": dcp_stager,
    "torch_checkpointing": torch_checkpointing,
}


def measure(job, here):
    """Until the state may change, of the second save: the first makes the buffers. Both are at their end afterwards."""
    begin, path = STALLS[job["contender"]], Path(job["path"])
    tensors, waiting = state_of(job["size"], job["device"]), []
    synchronized(lambda: begin(tensors, path, 1)[1]())()
    os.sync()
    time.sleep(0.3)

    def stall():
        staged, ended = begin(tensors, path, 2)
        staged()
        waiting.append(ended)

    usage = here(synchronized(stall))
    waiting[0]()
    for one in _kept.values():
        if hasattr(one, "close"):
            one.close()
    return usage
