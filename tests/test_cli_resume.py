"""`resume` and the bare command: what is chosen, what it costs, who is refused, and the exact command; asked on a terminal."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore import running
from ckptstore.frameworks.areal import launch
from ckptstore.manifest import parse
from ckptstore.model import MANIFEST_NAME
from tests import commands, trees
from tests.commands import Result, Terminal, flat

Cli = Callable[..., Result]
EXPERIMENT = "resume-grpo"  # of its own: a trainer of this name that another test starts would be ours
TRAINER = ("--areal-version", "0.3.4", "--world-size", "2")  # files as they are, and optimizer shards beside them


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("CKPTSTORE_FILEROOT", str(tmp_path))
    monkeypatch.setattr(launch, "_package_of_python_on_path", lambda: "")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return functools.partial(commands.invoke, capfd)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three exports and a slot after the last, all of AReaL v0.3."""
    path = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46, 93, 140], slot="era_a", slot_step=140)
    trees.set_age(trees.write_recover_info(path, 140, world_size=2), 3600)
    trees.set_age(tmp_path / "logs", 3600)
    return path


def slot_step(run: Path) -> int:
    """The step of what setup placed; 0 for what the trainer saved."""
    path = run / "default/recover_checkpoint" / MANIFEST_NAME
    return parse(path.read_bytes()).step if path.exists() else 0


def command_of(result: Result) -> list[str]:
    lines = result.out.split("go on training with\n\n")[-1].split("\n\n")[0]
    return lines.replace("\\\n", " ").split()


# --- the first screen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["resume"], ["resume", "--plan"], ["resume", "--step", 93, *TRAINER]])
def test_planning_changes_nothing(cli: Cli, run: Path, words: list[object]) -> None:
    before = commands.snapshot(run.parent)
    result = cli(*words)
    assert result.code == 0, result.err
    assert commands.snapshot(run.parent) == before


def test_the_bare_command_is_the_first_screen_of_resume(cli: Cli, run: Path) -> None:
    assert cli().out == cli("resume", "--plan").out


def test_the_screen_says_why_then_what_is_lost_then_what_is_restored_then_the_command(cli: Cli, run: Path) -> None:
    text = cli("resume", "--step", 93, *TRAINER).out
    order = [
        text.index(part)
        for part in (
            "run      ", "saver    every 1 epoch", "recover  mode disabled", "trainer  AReaL 0.3.4", "chosen",
            "global step 93 (the log says: Train step 94)", "why       you named it", "not restored", "Adam's moments",
            "\nrestored", "weights of step 93", "\nplan", "go on training with", "nothing was changed: --yes sets it up",
        )
    ]  # fmt: skip
    assert order == sorted(order)


def test_the_command_is_exact(cli: Cli, run: Path, tmp_path: Path) -> None:
    config = tmp_path / f"logs/alice/{EXPERIMENT}/trial0/config.yaml"
    names = [f"experiment_name={EXPERIMENT}", "trial_name=trial0", "++recover.mode=auto"]
    result = cli("resume", "--script", "gsm8k_grpo.py", *TRAINER)
    assert command_of(result) == ["python", "-m", "areal.launcher.local", "gsm8k_grpo.py", "--config", str(config), *names]
    document = cli("resume", "--script", "gsm8k_grpo.py", "--areal-version", "1.0.4", "--json").json
    assert document["command"] == [
        "python",
        "-m",
        "areal.infra.launcher.local",
        "gsm8k_grpo.py",
        "--config",
        str(config),
        *names,
    ]
    assert (document["done"], document["placeholders"]) == (False, [])


def test_what_cannot_be_known_is_a_marked_gap(cli: Cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / f"logs/alice/{EXPERIMENT}/trial0/config.yaml").unlink()
    result = cli("resume")
    assert "<SCRIPT>" in command_of(result)
    assert "<CONFIG>" in command_of(result)
    assert "<SCRIPT> the training script that started the run (--script FILE" in result.out


def test_a_config_with_overrides_is_used_and_kept(cli: Cli, run: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"experiment_name: {EXPERIMENT}\ntrial_name: none\ncluster: {{fileroot: {tmp_path}}}\nscheduler: {{type: local}}\n"
    )
    words = ["resume", "--config", yaml, "trial_name=trial0", "actor.lr=1e-6", "--script", "t.py", "--json"]
    command = cli(*words).json["command"]
    assert command[:4] == ["python", "t.py", "--config", str(yaml)]
    assert command[-1] == "actor.lr=1e-6"
    assert command.count("trial_name=trial0") == 1


def test_own_command_after_two_dashes(cli: Cli, run: Path) -> None:
    words = ["resume", "--json", "--", "PYTHONPATH=.", "torchrun", "--nproc-per-node", "2", "train.py", "--config", "c.yaml"]
    command = cli(*words).json["command"]
    assert command[:7] == ["PYTHONPATH=.", "torchrun", "--nproc-per-node", "2", "train.py", "--config", "c.yaml"]
    assert command[7:] == [f"experiment_name={EXPERIMENT}", "trial_name=trial0", "++recover.mode=auto"]
    assert "AREAL_RECOVER_RUN=1" in cli(*words).json["command_notes"][0]


def test_own_command_for_another_trial_is_refused(cli: Cli, run: Path) -> None:
    result = cli("resume", "--", "python", "t.py", "trial_name=trial1")
    assert result.code == 2
    assert "AReaL would start another run" in flat(result.err)


def test_quoting_survives_the_shell(cli: Cli, run: Path) -> None:
    text = cli("resume", "--", "python", "my train.py", "prompt=$(rm -rf /)").out
    assert "python 'my train.py' 'prompt=$(rm -rf /)'" in text


# --- who is refused -----------------------------------------------------------------------------------------------


def test_another_user_is_refused_with_both_paths(cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "bob")
    before = commands.snapshot(run.parent)
    result = cli("resume", "--yes")
    assert result.code == 1
    assert "start fresh" in flat(result.err)
    assert f"the run:      {run}\n" in result.err
    assert f"AReaL reads:  {tmp_path}/checkpoints/bob/{EXPERIMENT}/trial0\n" in result.err
    assert "LOGNAME=alice" in result.err
    assert commands.snapshot(run.parent) == before
    assert len(cli("resume", "--json").json["facts"]) == 2


def test_a_name_from_the_environment_is_said_to_the_training_too(cli: Cli, run: Path) -> None:
    assert "run it with LOGNAME=alice set" in flat(cli("resume").out)  # alice is no account here


@pytest.mark.parametrize("how", ["config", "command"])
def test_another_fileroot_is_refused_with_both_paths(cli: Cli, run: Path, tmp_path: Path, how: str) -> None:
    other = tmp_path / "elsewhere"
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"cluster: {{fileroot: {other if how == 'config' else tmp_path}}}\n")
    words = ["--", "python", "t.py", f"cluster.fileroot={other}"] if how == "command" else []
    result = cli("resume", "--run", run, "--config", yaml, *words)
    assert result.code == 1
    assert f"AReaL reads:  {other}/checkpoints/alice/{EXPERIMENT}/trial0\n" in result.err
    assert f"cluster.fileroot={tmp_path}" in result.err
    if how == "config":  # what it says to give helps
        hint = flat(result.err).split("try:")[1].split()
        assert hint[0] == "Give"
        assert cli("resume", "--run", run, "--plan", *hint[1:3], hint[3].rstrip(".")).code == 0


def test_a_relative_fileroot_is_fine_only_where_it_leads_to_the_run(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text("cluster: {fileroot: .}\n")
    assert cli("resume", "--run", run, "--config", yaml).code == 0
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    result = cli("resume", "--run", run, "--config", yaml)
    assert result.code == 1
    assert f"relative to {tmp_path}/inner" in flat(result.err)


def test_a_running_trainer_is_refused_and_the_plan_still_shown(cli: Cli, run: Path) -> None:
    (run / "default/recover_checkpoint/config.json").touch()
    for words in (["resume", "--step", 93, *TRAINER], ["resume", "--step", 93, "--yes", *TRAINER]):
        result = cli(*words)
        assert result.code == 1
        assert "refused: the trainer seems to be running" in result.out
        assert slot_step(run) == 0
    assert cli("resume", "--step", 93, *TRAINER, "--json").code == 1


# --- without a terminal -------------------------------------------------------------------------------------------


def test_yes_sets_it_up(cli: Cli, run: Path) -> None:
    result = cli("resume", "--step", 93, "--yes", *TRAINER)
    assert result.code == 0, result.err
    assert "✓ global step 93" in result.out
    assert result.out.count("go on training with") == 1
    assert slot_step(run) == 93
    document = cli("resume", "--step", 46, "--yes", "--json", *TRAINER).json
    assert document["done"] is True
    assert document["command"][:2] == ["python", "-m"]
    assert slot_step(run) == 46


@pytest.mark.parametrize("words", [["--exec"], ["--exec", "--plan"], ["--exec", "--json", "--yes"]])
def test_exec_is_never_meant_by_accident(cli: Cli, run: Path, words: list[str]) -> None:
    before = commands.snapshot(run.parent)
    assert cli("resume", *words, "--", "touch", "started").code == 2
    assert not Path("started").exists()
    assert commands.snapshot(run.parent) == before


def test_exec_does_not_run_a_command_with_gaps(cli: Cli, run: Path) -> None:
    result = cli("resume", "--yes", "--exec", "--step", 93, *TRAINER)
    assert result.code == 2
    assert "<SCRIPT>" in result.err
    assert slot_step(run) == 0


def test_a_command_that_is_not_there_is_found_before_the_slot_is_replaced(cli: Cli, run: Path) -> None:
    result = cli("resume", "--yes", "--exec", "--step", 93, *TRAINER, "--", "no-such-trainer", "x")
    assert result.code == 2
    assert "there is no command no-such-trainer" in result.err
    assert slot_step(run) == 0


def test_exec_does_not_run_what_areal_would_not_resume(cli: Cli, run: Path) -> None:
    trees.write_bin_model(trees.checkpoint(run, 187))
    trees.set_age(trees.checkpoint(run, 187), 3600)
    result = cli("resume", "--yes", "--exec", "--step", 187, *TRAINER, "--", "touch", "started")
    assert result.code == 1
    assert "refused: " in result.out
    assert "this is hf-bin" in result.out
    assert not Path("started").exists()
    assert slot_step(run) == 0


PRINTER = "import json, os, sys; json.dump([sys.argv[1:], os.environ.get('MARK', '')], open('started', 'w'))"


@pytest.mark.parametrize("step", [93, 140])  # 140 lies in the slot already: nothing to do but to run it
def test_exec_becomes_the_training(run: Path, tmp_path: Path, step: int) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path))
    own = ["MARK=set", sys.executable, "-c", PRINTER]
    result = commands.spawn("resume", "--yes", "--exec", "--step", step, *TRAINER, "--", *own, env=env, cwd=tmp_path)
    assert result.code == 0, result.err
    words, mark = json.loads(Path("started").read_text())
    assert words == [f"experiment_name={EXPERIMENT}", "trial_name=trial0", "++recover.mode=auto"]
    assert mark == "set"
    assert slot_step(run) == (93 if step == 93 else 0)


def test_a_step_without_its_option_is_no_command(cli: Cli, run: Path) -> None:
    for words in (["93"], ["--yes", "93"], ["a.b=c", "93"]):
        result = cli("resume", *words, *TRAINER)
        assert result.code == 2
        assert "--step 93" in result.err
    assert slot_step(run) == 0


@pytest.mark.parametrize("writes_on", [False, True])
def test_a_job_that_follows_the_one_that_has_just_ended_waits(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, writes_on: bool
) -> None:
    """A chained job starts within seconds of the last write: a refusal would end the chain. Who writes on is at work."""
    now_s = time.time()
    written = trees.checkpoint(run, 140) / "README.md"
    written.write_text("the last write")
    os.utime(written, (now_s, now_s - 20))
    monkeypatch.setattr(
        running.time, "sleep", lambda s: os.utime(written) if writes_on else os.utime(written, (0, now_s - 200))
    )
    result = cli("resume", "--yes", "--exec", "--step", 93, *TRAINER, "--", "touch", "started")
    assert "README.md was just written: waiting " in flat(result.err)
    assert ("the trainer seems to be running" in flat(result.err)) is writes_on
    assert (result.code, Path("started").exists(), slot_step(run)) == ((1, False, 0) if writes_on else (0, True, 93))


def test_exec_passes_on_the_trainings_exit_code(run: Path, tmp_path: Path) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path))
    own = ["bash", "-c", "exit 37"]
    assert commands.spawn("resume", "--yes", "--exec", "--step", 93, *TRAINER, "--", *own, env=env).code == 37


def test_exec_of_a_command_that_cannot_be_started(run: Path, tmp_path: Path) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path))
    program = tmp_path / "train.sh"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    result = commands.spawn("resume", "--yes", "--exec", "--step", 93, *TRAINER, "--", program, env=env)
    assert result.code == 1
    assert "train.sh: No such file" in result.err
    assert "The run is set up" in result.err
    assert slot_step(run) == 93


# --- on a terminal ------------------------------------------------------------------------------------------------


def on_terminal(tmp_path: Path, *words: object) -> Terminal:
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path), TERM="xterm-256color")
    return Terminal([*commands.COMMAND, "resume", *words], env=env)


@pytest.mark.parametrize(("answer", "step"), [("y\n", 93), ("n\n", 0), ("\n", 0)])
def test_it_asks_before_it_replaces_the_slot(run: Path, tmp_path: Path, answer: str, step: int) -> None:
    with on_terminal(tmp_path, "--step", 93, *TRAINER) as terminal:
        terminal.expect("Replace the slot? [y/N]:")
        assert "go on training with" in flat(terminal.shown)  # what it is for stands above the question
        assert slot_step(run) == 0
        terminal.type(answer)
        result = terminal.finish()
    assert result.code == 0
    assert slot_step(run) == step
    assert ("✓ global step 93" in flat(result.out)) == bool(step)
    assert ("nothing was changed" in result.out) == (not step)
    assert commands.ESCAPE in result.out  # in colour


def test_nothing_to_do_is_not_asked(run: Path, tmp_path: Path) -> None:
    with on_terminal(tmp_path, *TRAINER) as terminal:
        result = terminal.finish()
    assert result.code == 0
    assert "nothing to do: the slot already holds step 140" in flat(result.out)
    assert "[y/N]" not in result.out


def test_ctrl_c_at_the_question(run: Path, tmp_path: Path) -> None:
    before = commands.snapshot(run.parent)
    with on_terminal(tmp_path, "--step", 93, *TRAINER) as terminal:
        terminal.expect("Replace the slot? [y/N]:")
        result = terminal.press_ctrl_c()
    assert result.code == 130
    assert "interrupted" in result.out
    assert commands.snapshot(run.parent) == before


def test_no_color_on_a_terminal(run: Path, tmp_path: Path) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path), TERM="xterm-256color", NO_COLOR="1")
    with Terminal([*commands.COMMAND, "list"], env=env) as terminal:
        result = terminal.finish()
    assert result.code == 0
    assert commands.ESCAPE not in result.out


def test_the_printed_command_can_be_pasted(run: Path, tmp_path: Path) -> None:
    """Broken over lines for a narrow terminal, it is still what --json says."""
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path), TERM="xterm")
    with Terminal(
        [*commands.COMMAND, "resume", "--plan", "--script", "my train.py", *TRAINER], columns=80, env=env
    ) as terminal:
        result = terminal.finish()
    shown = commands.plain(result.out).split("go on training with\n\n")[1].split("\n\n")[0]
    assert " \\\n" in shown
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True, check=True)
    done = echoed.stdout.splitlines()
    assert done[:4] == ["python", "-m", "areal.launcher.local", "my train.py"]
    assert done[-3:] == [f"experiment_name={EXPERIMENT}", "trial_name=trial0", "++recover.mode=auto"]


def test_several_trials_are_asked_for(run: Path, tmp_path: Path) -> None:
    trees.make_run(tmp_path, experiment=EXPERIMENT, trial="trial1", steps=[46, 93])
    trees.set_age(tmp_path / "logs", 3600)
    env = commands.environment(CKPTSTORE_FILEROOT=str(tmp_path), TERM="xterm")
    with Terminal([*commands.COMMAND, "list"], env=env) as terminal:
        terminal.expect("Which run?")
        assert f"1  {EXPERIMENT}/trial" in terminal.shown
        number = next(line.split()[0] for line in terminal.shown.splitlines() if f"{EXPERIMENT}/trial1" in line)
        terminal.type(f"{number}\n")
        result = terminal.finish()
    assert result.code == 0
    assert f"{EXPERIMENT}/trial1  (" in result.out
