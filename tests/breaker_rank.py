"""One rank of a training with circuit breakers, for test_breaker_distributed.py: runs scenarios, writes what became of each.

python -m tests.breaker_rank RANK WORLD_SIZE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptstore import halt, ledger
from ckptstore.breaker import CircuitBreaker
from ckptstore.errors import TrainingHalted
from ckptstore.rules import REWARD, Zero
from ckptstore.schedule import SaveSchedule

Metrics = Callable[[int, int], dict[str, float]]
"""(rank, step) → what that rank sees."""


def train(breaker: CircuitBreaker, rank: int, metrics: Metrics, *, first: int = 0, last: int = 60) -> dict[str, Any]:
    """A training loop with a gradient all-reduce each step: it hangs where a rank leaves before the others."""
    trained = first - 1
    gradient = torch.ones(4)
    try:
        for step in range(first, last):
            dist.all_reduce(gradient)
            breaker.observe(metrics(rank, step), step)
            trained = step
    except TrainingHalted as error:
        return {"halted": error.step, "since": error.since_step, "trained": trained, "at_s": time.time(), "text": str(error)}
    return {"halted": -1, "trained": trained}


def main(rank: int, world_size: int, folder: Path) -> None:
    """All scenarios, in one process group: to start one takes seconds."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
    )
    results: dict[str, Any] = {}
    run = folder / "checkpoints/me/e"

    # All ranks see the same: no collective but the training's own.
    breaker = CircuitBreaker(run / "plain")
    results["plain"] = train(breaker, rank, lambda _, step: {REWARD: 0.7 if step < 20 else 0.0})
    dist.barrier()

    # The same, with a post-mortem save that takes a while on rank 0 alone: nobody may leave before it is done.
    def slow_save(place: str) -> None:
        if rank == 0:
            time.sleep(0.5)
            Path(place, "weights").write_text("x")

    breaker = CircuitBreaker(run / "same", reduce="same", save=slow_save)
    found = train(breaker, rank, lambda _, step: {REWARD: 0.7 if step < 20 else 0.0})
    saved = (folder / "checkpoints/me/e/.ckptstore/same/quarantine/globalstep29/weights").exists()
    results["same"] = found | {"saved_when_it_left": saved}
    dist.barrier()

    # Only the last rank sees the trouble.
    breaker = CircuitBreaker(run / "any", reduce="any", threshold=5, save=lambda place: None)
    results["any"] = train(breaker, rank, lambda r, step: {REWARD: 0.0 if step >= 20 and r == world_size - 1 else 0.7})
    dist.barrier()

    # Only rank 0 has metrics at all.
    breaker = CircuitBreaker(run / "zero", reduce="any", threshold=5)
    results["rank 0"] = train(breaker, rank, lambda r, step: {REWARD: 0.7 if step < 20 else 0.0} if r == 0 else {})
    dist.barrier()

    # The mean decides: half of the ranks at zero is no collapse, all of them is; NaN of one rank spreads.
    breaker = CircuitBreaker(run / "mean", reduce="mean", threshold=5)
    results["mean"] = train(breaker, rank, lambda r, step: {REWARD: 0.7 if step < 20 or (r % 2 and step < 40) else 0.0})
    dist.barrier()
    breaker = CircuitBreaker(run / "nan", reduce="mean", threshold=5)
    results["nan"] = train(breaker, rank, lambda r, step: {REWARD: float("nan") if step >= 20 and r == 1 else 0.7})
    dist.barrier()

    # Started again while halted: all refuse, also those whose disk does not show the record.
    mine = run / "any" if rank == 0 else folder / f"disk-of-{rank}/checkpoints/me/e/any"
    try:
        CircuitBreaker(mine, reduce="any")
        results["restart"] = "started"
    except TrainingHalted as error:
        results["restart"] = str(error)
    dist.barrier()

    # After a crash in a streak, rank 0's memory counts on all ranks, wherever the ledger is.
    if rank == 0:
        crashed = CircuitBreaker(run / "crashed", threshold=8)
        for step in range(6):
            crashed.observe({REWARD: 0.7 if step < 2 else 0.0}, step)
    dist.barrier()
    mine = run / "crashed" if rank == 0 else folder / f"disk-of-{rank}/checkpoints/me/e/crashed"
    breaker = CircuitBreaker(mine, reduce="same", threshold=8)
    results["memory"] = train(breaker, rank, lambda _, step: {REWARD: 0.0}, first=6)
    dist.barrier()

    # A save that fails on one rank halts all, and hangs none.
    def failing_save(place: str) -> None:
        if rank == world_size - 1:
            raise OSError(28, "No space left on device")

    breaker = CircuitBreaker(run / "full", reduce="same", threshold=2, save=failing_save)
    results["full"] = train(breaker, rank, lambda _, step: {REWARD: 0.7 if step < 20 else 0.0})
    dist.barrier()

    # Clocks differ; with `agree` all ranks save after the same steps.
    now_s = 0.0
    schedule = SaveSchedule(freq_secs=10, agree=True, now_s=lambda: now_s)
    saved_after = []
    for step in range(30):
        now_s += 1.0 + 0.1 * rank
        if schedule.check():
            saved_after.append(step)
    results["saved after"] = saved_after

    # What a collective costs, counted apart from observe's own time.
    timed = CircuitBreaker(rules=[Zero()], reduce="any")
    began = time.perf_counter()
    for step in range(50):
        timed.observe({REWARD: 0.7}, step)
    results["any_us"] = (time.perf_counter() - began) / 50 * 1e6
    side = ledger.side_of(str(run / "any"))
    results["record"] = str(halt.read(side)) if rank == 0 else ""
    (folder / f"result-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.pop("CIRCUIT_BREAKER_THRESHOLD", None)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
