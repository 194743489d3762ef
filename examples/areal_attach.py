"""A training loop as AReaL's, with ckptstore attached by one line: saves are kept, and training stops when the
reward dies.

python examples/areal_attach.py DIR

AReaL need not be installed: `StatsLogger` and `RecoverHandler` below stand for its classes, and call what those
call. In a real script they come from areal.utils, and the line marked below is all that is added.
"""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from ckptstore.breaker import CircuitBreaker
from ckptstore.errors import TrainingHalted
from ckptstore.frameworks.areal.attach import attach
from ckptstore.frameworks.areal.layout import run_ref

STEPS_PER_EPOCH = 20
SAVE_EVERY = 10
DEAD_FROM = 34  #: global step from which the inference server answers nothing


class StatsLogger:
    """Stands for areal.utils.stats_logger.StatsLogger: every rank calls commit, rank 0 logs."""

    def __init__(self, run: Path) -> None:
        self.log = Path(run_ref(str(run)).logs) / "main.log"
        self.log.parent.mkdir(parents=True)

    def commit(self, epoch: int, step: int, global_step: int, data: dict[str, float] | list[dict[str, float]]) -> None:
        """Log one step."""
        with self.log.open("a") as file:
            file.write(f"Epoch {epoch + 1} Step {step + 1} Train step {global_step + 1} done. {data}\n")


class RecoverHandler:
    """Stands for areal.utils.recover.RecoverHandler: dump saves slot and recover_info where it is time to."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def dump(self, engine: Any, step_info: dict[str, int], *args: Any) -> None:
        """Overwrite the slot in place, then recover_info."""
        if (step_info["global_step"] + 1) % SAVE_EVERY:
            return
        self._save_checkpoint(engine)
        control = dict.fromkeys(("start_time", "last_time"), 0.0) | dict.fromkeys(("steps", "last_steps"), 1)
        control |= dict.fromkeys(("frequence_seconds", "interval_steps", "interval_seconds"))
        control |= {"frequency_steps": SAVE_EVERY, "initial_value": False}
        controls = {"epoch": control, "step": control, "time": control}
        folder = self.run / "recover_info"
        folder.mkdir(exist_ok=True)
        (folder / "step_info.json").write_text(json.dumps(step_info))
        for name in ("saver_info", "evaluator_info", "checkpoint_info"):
            (folder / f"{name}.json").write_text(json.dumps(controls))
        (folder / "stats_logger_info.json").write_text(json.dumps({"last_commit_step": step_info["global_step"]}))
        (folder / "dataloader_info.pkl").write_bytes(pickle.dumps([{}]))

    def _save_checkpoint(self, engine: Any, name: str = "default") -> None:
        model, optimizer = get_state_dict(*engine)
        with warnings.catch_warnings(action="ignore"):  # that one process saves, and over the last save, is the point
            folder = self.run / name / "recover_checkpoint"
            dcp.save({"dcp": {"model": model, "optim": optimizer}}, checkpoint_id=folder, no_dist=True)


def train(run: Path) -> None:
    """Train until something stops it."""
    model = torch.nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stats_logger, recover_handler = StatsLogger(run), RecoverHandler(run)

    attach(stats_logger, recover_handler, run=run, breaker=CircuitBreaker(run, threshold=5))  # <- this is the line

    for global_step in range(100):
        epoch, step = divmod(global_step, STEPS_PER_EPOCH)
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reward = 0.0 if global_step >= DEAD_FROM else 0.7
        numbers = {"epoch": epoch, "epoch_step": step, "global_step": global_step, "steps_per_epoch": STEPS_PER_EPOCH}
        recover_handler.dump((model, optimizer), numbers)
        stats_logger.commit(epoch, step, global_step, {"ppo_actor/task_reward/avg": reward})


def main() -> int:
    """The exit code of the training."""
    parser = argparse.ArgumentParser(description="A training loop with ckptstore attached.")
    parser.add_argument("fileroot", type=Path, metavar="DIR", help="the fileroot of the run")
    run = parser.parse_args().fileroot.absolute() / "checkpoints" / getpass.getuser() / "attached" / "trial0"
    logging.basicConfig(level=logging.ERROR)
    run.mkdir(parents=True)
    try:
        train(run)
    except TrainingHalted as halted:
        print(halted)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
