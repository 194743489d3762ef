"""`./run demo`: a GRPO run whose reward went to zero, from the crash to the command that resumes it. Real files, real commands.

Leaves everything in ./demo, to be looked at and played with. Fails if any step does not do what it should.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import sample_run
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

HERE = Path("demo")
FILEROOT = HERE / "outputs"
RUN = FILEROOT / "checkpoints"
BOLD, DIM, GREEN, CYAN, PLAIN = ("\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[36m", "\x1b[0m") if sys.stdout.isatty() else ("",) * 5


def say(text: str) -> None:
    print(f"\n{CYAN}{text}{PLAIN}")


def ckptstore(words: str, *, code: int = 0) -> None:
    """Run a command as a user would, and check how it ends."""
    print(f"\n{BOLD}$ ckptstore {words}{PLAIN}", flush=True)
    environment = {**os.environ, "CKPTSTORE_FILEROOT": str(FILEROOT)}
    done = subprocess.run([sys.executable, "-m", "ckptstore.recover", *shlex.split(words)], env=environment, check=False)
    if done.returncode != code:
        sys.exit(f"`ckptstore {words}` exited with {done.returncode}, and {code} was expected")
    if code:
        print(f"{DIM}(exit code {code}){PLAIN}")


def same_weights(slot: Path, export: Path) -> int:
    """How many tensors of the slot, loaded by torch's own reader, equal those of the export, to the bit."""
    expected = {}
    for shard in sorted(export.glob("*.safetensors")):
        expected.update(load_file(shard))
    state = {"dcp": {"model": {name: torch.empty_like(tensor) for name, tensor in expected.items()}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it loads in one process: it does
        dcp.load(state, checkpoint_id=slot, no_dist=True)
    loaded = state["dcp"]["model"]
    different = [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)]
    if different:
        sys.exit(f"the slot does not hold the weights of {export.name}: {different[0]} differs")
    return len(expected)


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(HERE, ignore_errors=True)
    print(f"{BOLD}ckptstore: from a crash to resumed training, and never onto a bad checkpoint{PLAIN}")
    say("A sample run, with real files: a small transformer, saved by AReaL's layout at the end of each epoch; a recover slot\n"
        "written by torch.distributed.checkpoint. Its inference server died: the reward is 0 from \"Train step 188\" on.\n"
        "Fifty steps later the machine went away, in the middle of a save.")  # fmt: skip
    trial = sample_run.make_run(FILEROOT, slot="dcp")
    print(f"{DIM}made {trial}{PLAIN}")

    say("What is there?")
    ckptstore("list")

    say("A manifest beside each whole checkpoint records what its bytes are.")
    ckptstore("seal --all")

    flipped = trial / "default" / "epoch2epochstep46globalstep140" / "model-00002-of-00003.safetensors"
    sample_run.flip_bit(flipped)
    say("Then a disk flips one bit in a shard of step 140. No loader would notice.")

    say("What would training resume from, and what would be lost? 187 is whole, and the trainer's log says that it is bad.")
    ckptstore("setup --dry-run")

    say("Do it. The digests are checked in the one read of the copy: step 140 is found damaged, so 93 it is.\n"
        "Its weights become what AReaL reads from the slot.")  # fmt: skip
    ckptstore("setup")

    count = same_weights(trial / "default" / "recover_checkpoint", trial / "default" / "epoch1epochstep46globalstep93")
    print(f"\n{GREEN}✓{PLAIN} torch loads the slot: {count} tensors, each equal to that of step 93, bit for bit")

    say("What is wrong with 140 is remembered, and shown by every look from now on:")
    ckptstore("verify 140", code=3)

    say("The command that goes on training:")
    ckptstore("resume --plan --script train_grpo.py")

    say("Changed your mind? The old slot was kept.")
    ckptstore("setup --undo")

    print(f"\n{BOLD}Done in {time.monotonic() - started:.0f} s.{PLAIN} All of it lies in {HERE}/; try for yourself:\n")
    print(f"  CKPTSTORE_FILEROOT={FILEROOT} .venv/bin/ckptstore\n")


if __name__ == "__main__":
    main()
