"""The demo and the examples run, and do what they say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ckptstore.manifest import parse
from ckptstore.model import MANIFEST_NAME
from tests import commands, trees, warm

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPERIMENT = "example-grpo"


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)


def example(name: str, *words: object, **env: str) -> commands.Result:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        env=commands.environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return commands.Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = trees.make_run(
        tmp_path, experiment=EXPERIMENT, steps=[46, 93, 140, 187], slot="era_a", slot_step=187, recover_info=187
    )
    trees.truncate(trees.checkpoint(path, 140) / "model.safetensors")
    trees.set_age(trees.checkpoint(path, 140), 3600)
    trees.set_age(tmp_path / "logs", 3600)
    return path


def test_inspect_run(run: Path) -> None:
    result = example("inspect_run.py", run)
    assert result.code == 3, result.err
    found = [line.split()[1:3] for line in result.out.splitlines() if line.startswith("step ")]
    assert [step for step, _ in found] == ["46", "93", "140", "187"]
    assert [status for _, status in found[:2]] == ["COMPLETE", "COMPLETE"]
    assert found[2][1] in ("PARTIAL", "CORRUPT")
    assert "training would go on at global step 188" in result.out
    assert example("inspect_run.py", run / "nowhere").code == 1


def test_inspect_run_of_a_slot_whose_step_nothing_tells(tmp_path: Path) -> None:
    path = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46], slot="hf")
    assert "the slot holds step unknown" in example("inspect_run.py", path).out


@pytest.mark.parametrize("name", ["save_in_a_loop.py", "breaker_in_a_loop.py"])
def test_an_example_without_its_folder_says_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=f"python examples/{name} DIR"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_setup_from_python(run: Path) -> None:
    words = [run, "--before-step", 187, "--areal-version", "0.4.0"]
    before = commands.snapshot(run.parent)
    planned = example("setup_from_python.py", *words)
    assert planned.code == 0, planned.err
    assert "step 93: the newest good checkpoint before step 187" in planned.out
    assert "not step 140" in planned.out
    assert "lost: optimizer state" in planned.out
    assert commands.snapshot(run.parent) == before
    done = example("setup_from_python.py", *words, "--yes")
    assert done.code == 0, done.err + done.out
    assert "the slot holds step 93" in done.out
    assert parse((run / "default/recover_checkpoint" / MANIFEST_NAME).read_bytes()).step == 93
    assert example("setup_from_python.py", run, "--before-step", 3).code == 4


def test_the_demo_shows_the_whole_way(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = warm.Python(EXAMPLES / "demo.py", env=commands.environment()).finish(120)
    assert done.returncode == 0, done
    assert commands.ESCAPE not in done.stdout
    order = [
        done.stdout.index(text)
        for text in (
            "$ ckptstore list", "$ ckptstore seal --all", "Then a disk flips one bit",
            "$ ckptstore setup --dry-run",
            "step 187: health bad", "$ ckptstore setup\n", "✓ global step 93 (the log says: Train step 94) is in the slot",
            "found while copying", "✓ torch loads the slot", "$ ckptstore verify 140", "✗ CORRUPT", "$ ckptstore resume --plan",
            "go on training with", "$ ckptstore setup --undo", "Done in ",
        )
    ]  # fmt: skip
    assert order == sorted(order)
    assert (tmp_path / "demo/outputs/checkpoints").is_dir()


#: The demo's way to run a command, without torch, which takes seconds to import.
ONE_COMMAND = """
import sys, types
for name in ("torch", "torch.distributed", "torch.distributed.checkpoint", "safetensors", "safetensors.torch", "sample_run"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["safetensors.torch"].load_file = None
sys.modules["torch.distributed"].checkpoint = sys.modules["torch.distributed.checkpoint"]
sys.modules["torch"].distributed = sys.modules["torch.distributed"]
sys.path.insert(0, sys.argv[1])
import demo
demo.ckptstore("--version", code=int(sys.argv[2]))
"""


@pytest.mark.parametrize("expected", [0, 3])
def test_the_demo_fails_when_a_command_ends_otherwise_than_it_should(expected: int) -> None:
    words = [sys.executable, "-c", ONE_COMMAND, str(EXAMPLES), str(expected)]
    done = subprocess.run(words, env=commands.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == (1 if expected else 0), done.stderr
    assert ("`ckptstore --version` exited with 0, and 3 was expected" in done.stderr) == bool(expected)
