"""The examples for other frameworks, each run as it stands. `./run soak` installs the frameworks; without them they skip."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptstore import CheckpointStore

ROOT = Path(__file__).parent.parent


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(example: str, *words: object) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / example), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs("lightning")
def test_lightning(tmp_path: Path) -> None:
    out = run("lightning_io.py", tmp_path / "store")
    assert "from None to 20; kept [10, 15, 20]; the newest is the model: True" in out
    assert "from step=20 to 40; kept [30, 35, 40]; the newest is the model: True" in out
    store = CheckpointStore(tmp_path / "store")
    assert all(store.verify(one.step).ok for one in store)
    assert not list(tmp_path.rglob("*.ckpt")), "Lightning itself wrote nothing"


@needs("lightning")
def test_lightning_into_a_bucket(s3: str) -> None:
    out = run("lightning_io.py", s3)
    assert "from step=20 to 40; kept [5, 10, 15, 20, 25, 30, 35, 40]; the newest is the model: True" in out
    assert CheckpointStore(s3).verify(40).ok


@needs("torchtitan")
def test_torchtitan(tmp_path: Path) -> None:
    out = run("torchtitan_manager.py", tmp_path)
    assert "loaded is saved: True" in out
    store = CheckpointStore(tmp_path / "store")
    steps = [one.step for one in store]
    assert steps[-2:] == [4, 5]
    assert len(steps) <= 3, "keep_latest_k, and the one in flight"
    assert all(store.verify(step).ok for step in steps)


@needs("trl", "transformers", "accelerate", "datasets")
def test_trl(tmp_path: Path) -> None:
    out = run("trl_grpo.py", tmp_path)
    assert "from None to 4; kept [2, 4]" in out
    assert "from checkpoint-4 to 8; kept [4, 6, 8]" in out
    store = CheckpointStore(tmp_path / "store")
    assert all(store.verify(step).ok for step in (4, 6, 8))


@needs("transformers", "accelerate")
def test_hugging_face(tmp_path: Path) -> None:
    out = run("hf_trainer.py", tmp_path)
    assert "from None to 10; kept [5, 10]" in out
    assert "from checkpoint-10 to 20; kept [10, 15, 20]" in out
    store = CheckpointStore(tmp_path / "store")
    assert all(store.verify(step).ok for step in (10, 15, 20))


#: The last rank is late with what it adds to a checkpoint.
LATE = """
import os, sys, time
from transformers import Trainer
write = Trainer._save_rng_state
def late(self, folder):
    time.sleep(float(os.environ["RANK"]) * 1.5)
    write(self, folder)
Trainer._save_rng_state = late
sys.path.insert(0, {examples!r})
import hf_trainer
hf_trainer.main()
"""


@needs("transformers", "accelerate")
def test_hugging_face_on_two_ranks(tmp_path: Path) -> None:
    """A step holds what each rank has written, and one rank copies it for all."""
    script = tmp_path / "late.py"
    script.write_text(LATE.format(examples=str(ROOT / "examples")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    for _ in range(2):  # the second finds the first one's copy, of a step that it saves anew
        done = subprocess.run(
            [*command, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
    store = CheckpointStore(tmp_path / "store")
    for step in store:
        names = {file.name for file in step.parts[0].files}
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= names
