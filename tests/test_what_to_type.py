"""What a command says to type next works when it is typed, and what it says of a place is of that kind of place."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore import CheckpointStore, CircuitBreaker, probe
from ckptstore.errors import TrainingHalted
from ckptstore.frameworks.areal import launch
from ckptstore.running import RECENT_S
from ckptstore.sizes import counted
from tests import commands, trees
from tests.commands import Result, flat

Cli = Callable[..., Result]
EXPERIMENT = "typed-grpo"


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(probe, "file_system", lambda path: "ext4")
    monkeypatch.setattr(launch, "_package_of_python_on_path", lambda: "")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return functools.partial(commands.invoke, capfd)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two steps in a place whose name a shell would take apart, with a metric."""
    path = tmp_path / "it's $HOME" / "mine"
    files = tmp_path / "files"
    files.mkdir()
    (files / "weights.bin").write_bytes(b"w" * 1000)
    for step in (10, 20):
        CheckpointStore(path).save(step, files, metrics={"loss": 1 / step, "accuracy": 0.5})
    return path


def labelled(result: Result, label: str) -> list[str]:
    """The words of the command that a line of a label names."""
    line = next(line for line in result.out.splitlines() if line.startswith(f"{label} "))
    words = shlex.split(line.removeprefix(label))
    assert words[0] == "ckptstore"
    return words[1:]


def test_what_list_says_to_type_next_finds_the_run(cli: Cli, tmp_path: Path) -> None:
    """With what found it: without that, the next command is asked where the runs are."""
    root = tmp_path / "my $root"
    trees.set_age(trees.make_run(root, experiment=EXPERIMENT, steps=[46, 93], recover_info=93), 3600)
    trees.set_age(root / "logs", 3600)
    found = cli("list", "--fileroot", root, "-t", "trial0", "--before-step", 90)
    assert labelled(found, "next") == ["verify", "46", "--fileroot", str(root), "-t", "trial0"]
    assert cli(*labelled(found, "next")).code == 0
    assert cli(*labelled(found, "or"), "--as-is").code == 0
    assert "--before-step" in labelled(found, "or")


def test_what_list_of_a_store_says_to_type_next(cli: Cli, store: Path) -> None:
    following = labelled(cli("list", "--run", store), "next")
    assert following == ["verify", "20", "--run", str(store)]
    assert cli(*following).code == 0


def test_a_verbs_option_before_any_verb(cli: Cli, store: Path) -> None:
    result = cli("--run", "a b")
    assert result.code == 2
    assert "`ckptstore resume --plan --run 'a b'`" in flat(result.err)
    assert "`ckptstore --help`" in flat(cli("--nonsense").err)


def test_a_file_is_not_said_to_be_missing(cli: Cli, store: Path, tmp_path: Path) -> None:
    (tmp_path / "run.log").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, kind in (("run.log", "is no folder"), ("gone", "is a link that leads nowhere")):
        result = cli("list", "--run", tmp_path / name)
        assert result.code == 1
        assert f"{tmp_path / name} {kind}" in flat(result.err)
        assert "Did you mean" not in result.err


def test_a_step_and_a_folder_of_stores_are_not_taken_for_a_run_of_areals(cli: Cli, store: Path) -> None:
    step = cli("list", "--run", store / "step-20")
    assert step.code == 2
    assert f"Say --run {store}." in flat(step.err)
    above = cli("list", "--run", store.parent)
    assert above.code == 2
    assert f"a run below it: {store}" in flat(above.err)
    nested = store.parent / "step-3"  # a store that is named as a step is
    CheckpointStore(nested).save(1, store / "step-20")
    assert cli("list", "--run", nested).code == 0


def test_the_doctor_of_a_store_speaks_of_no_slot(cli: Cli, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cli("doctor", "--run", store, "--saves", 2)
    assert "2 more saves (0.0 MB each): 0.0 MB" in flat(found.out)
    assert "everything that a save replaces" in flat(found.out)
    assert "slot" not in found.out
    (store / "step-20" / "weights.bin").unlink()
    monkeypatch.setattr(probe, "file_system", lambda path: "tmpfs")
    ill = flat(cli("doctor", "--run", store, "--saves", 10**12).out)
    assert "`ckptstore prune`" in ill
    assert "Put the store on a mounted volume" in ill
    assert "a load passes over it" in ill
    assert "1 whole, step 10" in ill
    shutil.rmtree(store / "step-10")
    ill += flat(cli("doctor", "--run", store).out)
    shutil.rmtree(store / "step-20")
    ill += flat(cli("doctor", "--run", store).out)
    assert "none of 1 is whole" in ill
    assert "no step is saved yet" in ill
    for word in ("AReaL", "fileroot", "setup", "YAML", "export"):
        assert word not in ill


def test_show_tells_the_metrics_of_a_save(cli: Cli, store: Path) -> None:
    assert "metrics   accuracy 0.5, loss 0.05" in cli("show", 20, "--run", store).out
    document = json.loads(cli("show", 20, "--run", store, "--json").out)
    assert document["parts"][0]["metrics"] == {"accuracy": 0.5, "loss": 0.05}


def test_a_setup_right_after_the_crash_says_how_long_it_would_be_refused(cli: Cli, tmp_path: Path) -> None:
    trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46], recover_info=46)
    result = cli("setup", "--fileroot", tmp_path, "--as-is", "--dry-run")
    assert f"{RECENT_S:.0f} s without a write count as stopped" in flat(result.err)
    assert "try:" not in result.err


def test_verify_leaves_the_breaking_of_lines_to_the_terminal(cli: Cli, tmp_path: Path) -> None:
    trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46])
    text = cli("verify", "--fileroot", tmp_path).out
    assert "which bytes were written; `ckptstore seal --all` records that from now on\n" in text


def test_titles_stand_over_their_columns(cli: Cli, tmp_path: Path) -> None:
    """Colours count for nothing: the status stood eight characters left of its title, and a column was left out for them."""
    run = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46, 93])
    breaker = CircuitBreaker(run)
    for step in range(94):
        breaker.observe({"grpo_actor/task_reward/avg": 0.7 if step < 93 else 0.0}, step)
    title, *rows = cli("list", "--fileroot", tmp_path).out.splitlines()[2:5]
    assert "health" in title
    for row in rows:
        assert row.index("COMPLETE") - 2 == title.index("status")


def test_one_of_a_kind_is_no_plural(cli: Cli, store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    (store / "step-20" / "weights.bin").write_bytes(b"x" * 1000)
    words = ("repair", 20, "--run", store, "--from", tmp_path / "copy", "--force")
    assert "1 file would be repaired" in cli(*words, "--dry-run").out
    assert "1 file repaired with" in cli(*words).out
    CircuitBreaker(store).observe({"grpo_actor/task_reward/avg": 0.7}, 20)
    assert "metrics  1 step, " in cli("status", "--run", store).out
    run = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46])
    assert "whole is 46" in flat(cli("setup", "--run", run, "--step", 5).err)
    assert (counted(0, "file"), counted(1, "file"), counted(2, "file")) == ("0 files", "1 file", "2 files")


def test_what_was_done_is_said_within_the_terminal(store: Path) -> None:
    """A long path may stick out; the words do not."""
    words = [*commands.COMMAND, "clean", "--run", str(store)]
    with commands.Terminal(words, columns=60) as terminal:
        terminal.finish()
    (line,) = [line for line in commands.plain(terminal.shown).splitlines() if "nothing to remove" in line]
    assert line == "✓ nothing to remove in"


def test_a_store_knows_no_train_step(cli: Cli, store: Path) -> None:
    """Only AReaL's log is known to count from 1: of a loop of one's own the second number was made up."""
    breaker = CircuitBreaker(store, threshold=2)
    for step in range(15, 23):
        breaker.observe({"grpo_actor/task_reward/avg": 0.7 if step < 22 else 0.0}, step)
    with pytest.raises(TrainingHalted) as halted:
        breaker.observe({"grpo_actor/task_reward/avg": 0.0}, 23)
    said = [str(halted.value), cli("status", "--run", store).out, cli("plot", "--run", store).out]
    with pytest.raises(TrainingHalted) as again:
        CircuitBreaker(store)
    for text in (*said, str(again.value), cli("doctor", "--run", store).out):
        assert "of the log" not in text
        assert "Train step" not in text
        assert "the log counts" not in text
    assert "halted at step 23:" in said[0]
    assert "since step 22 " in said[0]
