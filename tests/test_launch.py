"""The command that resumes: for the AReaL at hand, with everything known, and a marked gap for what is not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ckptstore.config import RunConfig
from ckptstore.errors import UsageError
from ckptstore.frameworks.areal.launch import (
    NEW_LAUNCHER,
    OLD_LAUNCHER,
    Installation,
    find_installation,
    logged_config,
    resume_command,
)
from ckptstore.frameworks.areal.layout import run_ref
from tests import commands, trees

RUN = run_ref("/data/checkpoints/alice/gsm8k-grpo/trial0")
NAMES = ("experiment_name=gsm8k-grpo", "trial_name=trial0", "++recover.mode=auto")
OLD = Installation("/areal", "0.5.0", OLD_LAUNCHER, "the current folder")
NEW = Installation("/areal", "1.0.2", NEW_LAUNCHER, "the current folder")
NONE = Installation("", "", "", "not found")


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", "")  # no python there: nothing that is installed here counts


def checkout(root: Path, version: str = "") -> Path:
    """The files of an AReaL checkout that tell its launchers: v0.x or v1.x by `version`."""
    launcher = "areal/launcher" if not version or version.startswith("0.") else "areal/infra/launcher"
    for name in (f"{launcher}/local.py", "areal/utils/recover.py", "areal/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("raise RuntimeError('imported')\n")  # looking must not run any of it
    if version:
        (root / "pyproject.toml").write_text(f'[project]\nname = "areal"\nversion = "{version}"\n')
    return root


def config(**values: object) -> RunConfig:
    return RunConfig("/logs/config.yaml", values)


# --- which AReaL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "launcher"), [("0.3.4", OLD_LAUNCHER), ("0.5.3", OLD_LAUNCHER), ("1.0.4", NEW_LAUNCHER)])
def test_a_checkout_in_the_current_folder(tmp_path: Path, version: str, launcher: str) -> None:
    checkout(tmp_path, version)
    assert find_installation() == Installation(str(tmp_path), version, launcher, "the current folder")


@pytest.mark.parametrize("below", ["", "areal"])
def test_areal_dir_is_the_checkout_or_the_package(tmp_path: Path, below: str) -> None:
    checkout(tmp_path / "elsewhere", "0.5.0")
    found = find_installation(str(tmp_path / "elsewhere" / below))
    assert (found.path, found.launcher, found.how) == (str(tmp_path / "elsewhere"), OLD_LAUNCHER, "--areal-dir")


def test_areal_dir_without_areal_is_refused(tmp_path: Path) -> None:
    checkout(tmp_path, "1.0.0")  # the current folder must not stand in for it
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there is no AReaL"):
        find_installation(str(tmp_path / "empty"))


@pytest.mark.parametrize(("version", "launcher"), [("v0.5.1", OLD_LAUNCHER), ("0.3.4", OLD_LAUNCHER), ("1.0", NEW_LAUNCHER)])
def test_the_version_said_beats_what_lies_here(tmp_path: Path, version: str, launcher: str) -> None:
    checkout(tmp_path, "1.0.0" if launcher == OLD_LAUNCHER else "0.3.0")
    found = find_installation("", version)
    assert (found.launcher, found.version, found.how) == (launcher, version.lstrip("v"), "--areal-version")


@pytest.mark.parametrize("version", ["main", "latest", "x1.0", " 1.0"])
def test_a_version_that_is_none(version: str) -> None:
    """It was taken for no version: the slot's format was assumed, whatever had been meant."""
    with pytest.raises(UsageError, match="is no version"):
        find_installation("", version)


def test_the_package_of_python_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = checkout(tmp_path / "site", "0.4.1")
    (site / "pyproject.toml").unlink()
    (site / "areal-0.4.1.dist-info").mkdir()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_installation() == Installation(str(site), "0.4.1", OLD_LAUNCHER, "the package of python on PATH")


def test_none_at_all_is_said() -> None:
    found = find_installation()
    assert found.launcher == ""
    assert str(found) == "AReaL: not found here"


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("installation", "launcher"), [(OLD, OLD_LAUNCHER), (NEW, NEW_LAUNCHER)])
def test_everything_known(installation: Installation, launcher: str) -> None:
    cmd = resume_command(RUN, installation, config=config(), script="train.py")
    assert cmd.words == ("python", "-m", f"{launcher}.local", "train.py", "--config", "/logs/config.yaml", *NAMES)
    assert cmd.placeholders == cmd.notes == ()


def test_gaps_are_marked_and_explained() -> None:
    cmd = resume_command(RUN, NEW, config=None)
    assert "<SCRIPT>" in cmd.words
    assert "<CONFIG>" in cmd.words
    assert [text.partition(":")[0] for text in cmd.placeholders] == ["<SCRIPT>", "<CONFIG>"]
    assert "--script" in cmd.placeholders[0]
    assert "--config" in cmd.placeholders[1]


def test_without_areal_the_newest_layout_is_assumed_and_said() -> None:
    cmd = resume_command(RUN, NONE, config=config(), script="train.py")
    assert cmd.words[2] == f"{NEW_LAUNCHER}.local"
    (text,) = cmd.notes
    assert OLD_LAUNCHER in text
    assert "--areal-version" in text


def test_single_controller_runs_have_no_launcher() -> None:
    cmd = resume_command(RUN, NEW, config=config(scheduler={"type": "local"}), script="train.py")
    assert cmd.words == ("python", "train.py", "--config", "/logs/config.yaml", *NAMES)
    assert "scheduler.type=local" in cmd.notes[0]


def test_several_nodes_leave_the_launcher_open() -> None:
    cmd = resume_command(RUN, OLD, config=config(cluster={"n_nodes": 4}), script="train.py")
    assert cmd.words[2] == "areal.launcher.<LAUNCHER>"
    assert cmd.placeholders == ("<LAUNCHER>: ray or slurm; the run has 4 nodes, take the one that started it",)


def test_overrides_of_the_configuration_are_kept_and_ours_win() -> None:
    given = RunConfig("/run.yaml", {}, ("actor.lr=1e-6", "trial_name=other", "recover.mode=disabled", "+extra.key=1"))
    words = resume_command(RUN, NEW, config=given, script="train.py").words
    assert words[-2:] == ("actor.lr=1e-6", "+extra.key=1")
    assert [word for word in words if word.startswith("trial_name") or "recover.mode" in word] == [
        "trial_name=trial0",
        "++recover.mode=auto",
    ]


def test_what_the_checkpoint_demands_is_added_once() -> None:
    words = resume_command(RUN, NEW, config=config(), script="t.py", overrides=("++recover.no_load_optim=true",)).words
    assert words[-1] == "++recover.no_load_optim=true"
    own = ("python", "t.py", "recover.no_load_optim=true")
    words = resume_command(RUN, NEW, config=None, command=own, overrides=("++recover.no_load_optim=true",)).words
    assert [word for word in words if "no_load_optim" in word] == ["recover.no_load_optim=true"]


@pytest.mark.parametrize("command", [(), ("python", "t.py", "--config", "/logs/config.yaml")])
def test_what_the_yaml_may_have_no_key_for_is_added_to_it(command: tuple[str, ...]) -> None:
    """AReaL's Hydra ends with "Could not override" for a bare KEY=VALUE whose KEY is not in the YAML."""
    words = resume_command(RUN, NEW, config=config(recover={"freq_steps": 20}), script="t.py", command=command).words
    assert "++recover.mode=auto" in words
    assert "recover.mode=auto" not in words


# --- the user's own command ---------------------------------------------------------------------------------------


def test_own_command_gets_what_makes_it_resume() -> None:
    cmd = resume_command(RUN, NEW, config=None, command=("torchrun", "t.py", "--config", "c.yaml", "trial_name=trial0"))
    assert cmd.words[:5] == ("torchrun", "t.py", "--config", "c.yaml", "trial_name=trial0")
    assert set(cmd.words[5:]) == {"experiment_name=gsm8k-grpo", "++recover.mode=auto"}
    assert cmd.placeholders == ()


@pytest.mark.parametrize("mode", ["auto", "resume", "fault", "on"])
def test_a_mode_that_resumes_stays(mode: str) -> None:
    cmd = resume_command(RUN, NEW, config=None, command=("python", "t.py", f"recover.mode={mode}"))
    assert [word for word in cmd.words if "recover.mode" in word] == [f"recover.mode={mode}"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trial_name=trial1", "trial_name=trial1"),
        ("+experiment_name=other", "experiment_name=other"),
        ("recover.mode=disabled", "start fresh"),
        ("recover.mode=off", "start fresh"),
    ],
)
def test_own_command_for_another_run_is_refused(word: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        resume_command(RUN, NEW, config=None, command=("python", "t.py", word))


@pytest.mark.parametrize(
    ("command", "installation", "told"),
    [
        (("torchrun", "t.py"), OLD, True),
        (("torchrun", "t.py"), NONE, True),
        (("torchrun", "t.py"), NEW, False),
        (("python", "-m", "areal.launcher.local", "t.py"), OLD, False),
    ],
)
def test_the_variable_that_old_launchers_set(command: tuple[str, ...], installation: Installation, told: bool) -> None:
    notes = resume_command(RUN, installation, config=None, command=command).notes
    assert any("AREAL_RECOVER_RUN=1" in text for text in notes) == told


# --- the configuration that AReaL kept ----------------------------------------------------------------------------


def test_the_logged_configuration(tmp_path: Path) -> None:
    path = trees.make_run(tmp_path, steps=[46])
    found = logged_config(run_ref(str(path)))
    assert found is not None
    assert found.path == os.path.join(tmp_path, "logs/alice/gsm8k-grpo/trial0/config.yaml")
    assert found.text("trial_name") == "trial0"


@pytest.mark.parametrize("damage", ["missing", "torn", "elsewhere"])
def test_without_a_readable_one_there_is_none(tmp_path: Path, damage: str) -> None:
    path = trees.make_run(tmp_path, steps=[46])
    logged = tmp_path / "logs/alice/gsm8k-grpo/trial0/config.yaml"
    if damage == "missing":
        logged.unlink()
    elif damage == "torn":
        logged.write_text("a: [")
    else:
        path = path.rename(tmp_path / "rescued")
    assert logged_config(run_ref(str(path))) is None
