"""A training loop with a circuit breaker: the inference server dies at step 60, and the training stops instead of going on.

python examples/breaker_in_a_loop.py DIR

Three starts, as a launcher that retries would make them: the first trains, saves a checkpoint every 10 steps, and is halted;
the second is refused before its first step; after `ckptstore setup` has cleared the way the third resumes from the last good
checkpoint. Needs torch and safetensors; takes seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ckptstore import CheckpointStore, CircuitBreaker, Options, TrainingHalted

SERVER_DIES_AT = 60
SAVE_EVERY = 10
STEPS = 120


def save(model: torch.nn.Module, folder: Path) -> None:
    """A checkpoint, as small as one can be: weights and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "example"}))


def train(run: Path, *, first: int, weights: Path | None, server_works: bool) -> int:
    """The loop; the number of steps trained. TrainingHalted leaves it."""
    torch.manual_seed(first)
    model = torch.nn.Linear(64, 64)
    # The breaker comes first: where the run was halted, nothing below happens.
    breaker = CircuitBreaker(run, threshold=10, save=lambda folder: save(model, Path(folder)))
    if weights is not None:
        model.load_state_dict(load_file(weights / "model.safetensors"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(first, STEPS):
        alive = server_works or step < SERVER_DIES_AT
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:  # before the step's reward is known, as AReaL does it
            save(model, run / "default" / f"epoch0epochstep{step}globalstep{step}")
        reward = torch.tensor(0.7 + 0.1 * torch.rand(()).item()) if alive else torch.zeros(())
        breaker.observe({"ppo_actor/task_reward/avg": reward, "ppo_actor/seq_len/avg": 512.0 if alive else 96.0}, step)
    return STEPS - first


def main() -> None:
    """Three starts of one run."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1], "checkpoints/me/example/trial0").absolute()
    for start in (1, 2):
        try:
            train(run, first=0, weights=None, server_works=False)
        except TrainingHalted as halted:
            print(f"start {start}: {halted}\n")
    store = CheckpointStore(run)
    point = store.resume_point()
    print(f"resume point: step {point.checkpoint.step}, since it is {point.why}")
    for skipped in point.skipped:
        print(f"  passed over: step {skipped.checkpoint.step}: {skipped.reasons[0]}")
    # Into the recover slot, and the way is clear again. Forced, since the training ended only a moment ago; as it is, since
    # this loop is no AReaL and needs none of its files.
    store.setup(options=Options(force=True, as_is=True))
    weights = run / "default/recover_checkpoint"
    trained = train(run, first=point.checkpoint.step + 1, weights=weights, server_works=True)
    print(f"start 3: resumed after step {point.checkpoint.step}, trained {trained} steps, reward is fine")


if __name__ == "__main__":
    main()
