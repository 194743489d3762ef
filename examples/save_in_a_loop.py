"""A plain training loop that saves in the background, resumes, and saves when it is told to end.

python examples/save_in_a_loop.py DIR [STEPS]

Start it again and it goes on where it stopped. `kill PID` (SIGTERM) makes it save and end, `kill -USR1 PID` save and go on.
Needs torch; takes seconds.
"""

from __future__ import annotations

import os
import sys
import time

import torch

import ckptstore.torch as ckpt
from ckptstore import CheckpointStore
from ckptstore.retention import Keep

SAVE_EVERY = 20
KEEP = Keep(last=3, best=1, metric="loss", mode="min")


def main() -> int:
    """Train; the exit code."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    store = CheckpointStore(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if os.path.isdir(sys.argv[1]) and store.latest() is not None:
        state = ckpt.load(store)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first = state["step"] + 1
        print(f"resumed after step {state['step']}", flush=True)
    emergency = ckpt.install_signal_handlers(deadline_s=20)
    for step in range(first, steps):
        loss = model(torch.randn(32, 64)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(float(os.environ.get("STEP_S", "0")))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": step}
        if emergency.requested:
            outcome = emergency.save(store, step, state, metrics={"loss": loss})
            print(f"{' '.join(emergency) or 'asked'}: step {step} committed: {outcome.committed} {outcome.problem}", flush=True)
            if emergency.stopping:
                return 0 if outcome.committed else 1
        elif (step + 1) % SAVE_EVERY == 0:
            ckpt.save_async(store, step, state, metrics={"loss": loss}, keep=KEEP)
            print(f"step {step} loss {loss:.4f}", flush=True)
    ckpt.wait_all()
    print(f"done; there are steps {[one.step for one in store]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
