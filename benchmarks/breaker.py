"""What CircuitBreaker.observe costs a training step: median of one call, with the ledger on this disk.

python benchmarks/breaker.py [--calls 20000] [--dir DIR]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from ckptstore.breaker import CircuitBreaker
from ckptstore.rules import Collapse, NonFinite, Spike, Zero

NOISE = {f"grpo_actor/loss_{number}/{kind}": 0.1 * number for number in range(40) for kind in ("avg", "min", "max")}


def stats(step: int) -> dict[str, float]:
    """A step's metrics as AReaL exports them: about 130 keys."""
    reward = 0.7 + random.random() / 10
    return NOISE | {"grpo_actor/task_reward/avg": reward, "grad_norm": 1.0 + reward, "grpo_actor/seq_len/avg": 500.0}


def cost_us(breaker: CircuitBreaker, calls: int) -> tuple[float, float]:
    """Median and 99th percentile of one call, in microseconds."""
    times = []
    for step in range(calls):
        metrics = stats(step)
        began = time.perf_counter_ns()
        breaker.observe(metrics, step)
        times.append((time.perf_counter_ns() - began) / 1000)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def main() -> None:
    """Prints one line a configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    rules = [Zero(), NonFinite(), Collapse(), Spike()]
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        run = Path(folder, "checkpoints/me/experiment/trial")
        for name, breaker in (
            ("default rule, no run folder", CircuitBreaker()),
            ("default rule and ledger", CircuitBreaker(run)),
            ("four rules and ledger", CircuitBreaker(run.with_name("trial2"), rules=rules)),
            ("metric missing at every step", CircuitBreaker(run.with_name("trial3"), metric="absent/metric/avg")),
        ):
            median, slow = cost_us(breaker, given.calls)
            print(f"{name:30} median {median:6.1f} us   99 % below {slow:7.1f} us")


if __name__ == "__main__":
    main()
