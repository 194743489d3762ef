"""Gloo ranks that save over and over, of which one is killed at a random moment; then what is in the store is judged.

python -m tests.killed_ranks STORE WORLD TIMES SEED       prints the kills by phase, as JSON

The ranks are forked from a process that has imported torch already: so the moments fall into the saves, not into imports. All
values of a save are its number: a mix of two saves shows in the values themselves, not only in digests.
"""

from __future__ import annotations

import collections
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckptstore import CheckpointStore, native
from ckptstore.model import Status
from ckptstore.retention import Keep
from ckptstore.saves import owner, steps
from ckptstore.torch import StoreWriter

RESAVED = 10**9  # the step that every other save replaces
START_S = 60.0
GROUP_TIMEOUT_S = 10.0
END_S = GROUP_TIMEOUT_S + 15.0  # an error must have ended every other rank by then
PHASES = ("starting", "between saves", "planning", "writing", "written", "committing")
ROOM = struct.Struct("<Bq")  # of each rank: its phase, and the last save that returned


class Board:
    """What the ranks say of themselves, in memory that outlives them."""

    def __init__(self, world: int) -> None:
        self.memory = mmap.mmap(-1, world * ROOM.size)
        self.reading, self.writing = os.pipe()
        self.world = world

    def met(self) -> None:
        """A rank is in the group."""
        os.write(self.writing, b".")

    def await_met(self) -> None:
        for _ in range(self.world):
            assert select.select([self.reading], [], [], START_S)[0], "the ranks do not meet"
            os.read(self.reading, 1)

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)

    def say(self, rank: int, phase: str, returned: int | None = None) -> None:
        if returned is None:
            returned = self.read(rank)[1]
        ROOM.pack_into(self.memory, rank * ROOM.size, PHASES.index(phase), returned)

    def read(self, rank: int) -> tuple[str, int]:
        phase, returned = ROOM.unpack_from(self.memory, rank * ROOM.size)
        return PHASES[phase], returned


def step_of(number: int) -> int:
    return RESAVED if number % 2 else number


def rank_main(store: CheckpointStore, rank: int, world: int, port: int, first: int, board: Board, use_async: bool) -> None:
    """Save numbers `first`, `first` + 1, … until something fails."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    write_files, commit = native.write_files, steps.commit

    def writing(*args: Any, **kwargs: Any) -> Any:
        board.say(rank, "writing")
        try:
            return write_files(*args, **kwargs)
        finally:
            board.say(rank, "written")

    def committing(*args: Any, **kwargs: Any) -> Any:
        board.say(rank, "committing")
        return commit(*args, **kwargs)

    native.write_files, steps.commit = writing, committing
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    mesh = init_device_mesh("cpu", (world,))
    state_of(first, mesh)  # torch imports the half of itself at the first
    board.met()
    for number in range(first, first + 1000):
        state = state_of(number, mesh)
        board.say(rank, "planning")
        writer = StoreWriter(store, step_of(number))
        if use_async:
            dcp.async_save(state, storage_writer=writer).result()
        else:
            dcp.save(state, storage_writer=writer)
        board.say(rank, "between saves", number)


def state_of(number: int, mesh: Any = None) -> dict[str, Any]:
    """A state of which every value is `number`; 12 MB, over the ranks of `mesh`."""
    tensors = {f"w{i}": torch.full((1_000_003 + i,), float(number)) for i in range(3)}
    if mesh is not None:
        tensors = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in tensors.items()}
    return {"model": tensors, "same": torch.full((1000,), float(number)), "number": number}


def fork_rank(*args: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 7
    try:
        rank_main(*args)
        code = 0
    except BaseException:  # noqa: BLE001 (the process ends; its code says so)
        traceback.print_exc()
    finally:
        os._exit(code)


def await_end(pid: int, timeout_s: float) -> int | None:
    """The exit code, negative for a signal; None where it is still there."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], max(0.0, timeout_s))[0]:
            return None
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trial(
    store: CheckpointStore, world: int, first: int, chance: random.Random, *, stop: bool, use_async: bool
) -> dict[str, Any]:
    """Kill (or stop, as a hung one) one rank; the others must end with an error; then judge the store."""
    board = Board(world)
    for rank in range(world):
        board.say(rank, "starting", first - 1)
    port = free_port()
    pids = [fork_rank(store, rank, world, port, first, board, use_async) for rank in range(world)]
    victim = chance.randrange(world)
    try:
        if chance.random() > 0.06:  # some in the start, before the ranks have met
            board.await_met()
        time.sleep(chance.uniform(0.0, 1.5))
        struck_at = time.monotonic()
        os.kill(pids[victim], signal.SIGSTOP if stop else signal.SIGKILL)
        phase, _ = board.read(victim)
        codes = {}
        for rank, pid in enumerate(pids):
            if rank != victim:
                codes[rank] = await_end(pid, END_S - (time.monotonic() - struck_at))
        took_s = time.monotonic() - struck_at
    finally:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
        board.close()
    assert set(codes.values()) == {7}, f"the others, {took_s:.1f} s after one was struck in {phase}: {codes}"
    returned = max(board.read(rank)[1] for rank in range(world))
    found = judge(store, first, returned)
    return {"phase": phase, "seconds": took_s, "returned": returned - first + 1, "newer": found > returned}


def judge(store: CheckpointStore, first: int, returned: int) -> int:
    """Every step is one whole save; what had returned is there; nothing else. The newest number found."""
    there = {}
    for checkpoint in store.list():
        assert checkpoint.status is Status.COMMITTED, f"{checkpoint.step}: {checkpoint.status} {checkpoint.findings}"
        report = store.verify(checkpoint.step)
        assert report.ok, report.findings
        there[checkpoint.step] = values(Path(checkpoint.parts[0].path))
    for step, number in there.items():
        assert step == step_of(number), f"step {step} holds save {number}"
        assert number <= returned + 1, f"save {number}, and {returned} was the last to return"
    for number in range(max(first, returned - 1), returned + 1):
        assert there.get(step_of(number), -1) >= number, f"save {number} had returned, and is not there: {there}"
    return max(there.values(), default=-1)


def values(folder: Path) -> int:
    """The number of the save that all values in a checkpoint are of, read by torch alone."""
    found: dict[str, Any] = {}
    reader = dcp.FileSystemReader(folder)
    _load_state_dict(found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    numbers = {found["number"], *found["same"].unique().tolist()}
    for tensor in found["model"].values():
        numbers.update(tensor.unique().tolist())
    assert len(numbers) == 1, f"{folder}: a mix of saves {sorted(numbers)}"
    return int(numbers.pop())


def main(location: str, world: int, times: int, seed: int) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(location)
    chance = random.Random(seed)
    kills: collections.Counter[str] = collections.Counter()
    longest: dict[str, float] = {}
    saves = published = 0
    first = 1000
    dcp.save(state_of(first), storage_writer=StoreWriter(store, step_of(first)), no_dist=True)
    for number in range(times):
        first += 1000
        stop = number % 10 == 9
        seen = trial(store, world, first, chance, stop=stop, use_async=number % 3 == 2)
        kills[seen["phase"]] += 1
        how = "before they met" if seen["phase"] == "starting" else "stopped" if stop else "killed"
        longest[how] = max(longest.get(how, 0.0), round(seen["seconds"], 1))
        saves += seen["returned"]
        published += seen["newer"]
        store.prune(Keep(last=3))
        print(f"{number}: {seen}", file=sys.stderr, flush=True)
    # A save by all, and nothing of the dead is left, but what may be a living one's that has not locked it yet.
    side = steps.side_of(store.folder)
    fresh = {name for name in os.listdir(side) if name.startswith("new-") and not owner.is_settled(os.path.join(side, name))}
    first += 1000
    dcp.save(state_of(first), storage_writer=StoreWriter(store, step_of(first)), no_dist=True)
    left = [name for name in os.listdir(side) if name.startswith(("save-", "trash-", "new-")) and name not in fresh]
    assert not left, left
    print(json.dumps({"kills": kills, "longest_s": longest, "saves_returned": saves, "published_before_its_return": published}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        main(sys.argv[1], *map(int, sys.argv[2:]))
