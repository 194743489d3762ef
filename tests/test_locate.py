"""Finding the run from little, and saying what is there when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptstore import locate as module
from ckptstore import probe
from ckptstore.errors import AccessError, UsageError
from ckptstore.locate import NoRunError, Where, WhichRunError, current_user, locate
from tests import commands, trees, users


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(probe, "file_system", lambda path: "ext4")  # whatever this machine is made of


def run(root: Path, *names: str, steps: tuple[int, ...] = (46,)) -> Path:
    user, experiment, trial = names
    return trees.make_run(root, user=user, experiment=experiment, trial=trial, steps=steps, logs=False)


def config(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- where the fileroot comes from -------------------------------------------------------------------------------


def test_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = {name: tmp_path / name for name in ("flag", "variable", "yaml", "usual")}
    paths = {name: run(root, "alice", "grpo", name) for name, root in roots.items()}
    yaml = config(tmp_path / "run.yaml", f"cluster: {{fileroot: {roots['yaml']}}}\n")
    monkeypatch.setattr(module, "USUAL_FILEROOTS", (str(tmp_path / "none"), str(roots["usual"])))
    found = locate(Where())
    assert (found.run.path, found.how) == (str(paths["usual"]), f"fileroot from the usual place {roots['usual']}")
    assert locate(Where(config=yaml)).run.path == str(paths["yaml"])
    monkeypatch.setenv("CKPTSTORE_FILEROOT", str(roots["variable"]))
    found = locate(Where(config=yaml))
    assert (found.run.path, found.how) == (str(paths["variable"]), "fileroot from $CKPTSTORE_FILEROOT")
    found = locate(Where(config=yaml, fileroot=str(roots["flag"])))
    assert (found.run.path, found.how) == (str(paths["flag"]), "fileroot from --fileroot")
    assert found.config is not None


def test_the_usual_places_are_those_of_the_guide() -> None:
    assert module.USUAL_FILEROOTS == ("/workspace/outputs/grpo", "./outputs/grpo")


def test_nowhere_to_look_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(NoRunError) as caught:
        locate(Where())
    assert any("/workspace/outputs/grpo/checkpoints" in fact for fact in caught.value.facts)
    assert any(f"{tmp_path}/outputs/grpo/checkpoints" in fact for fact in caught.value.facts)
    for option in ("--fileroot", "--config", "--run", "$CKPTSTORE_FILEROOT"):
        assert option in caught.value.hint


def test_a_fileroot_with_its_checkpoints_folder_is_understood(tmp_path: Path) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    found = locate(Where(fileroot=f"{tmp_path}/checkpoints/"))
    assert found.run.path == str(path)
    assert "without its /checkpoints" in found.how


def test_a_fileroot_that_is_too_deep_is_corrected(tmp_path: Path) -> None:
    run(tmp_path, "alice", "grpo", "trial0")
    with pytest.raises(NoRunError) as caught:
        locate(Where(fileroot=f"{tmp_path}/checkpoints/alice"))
    assert f"--fileroot {tmp_path}" in caught.value.hint


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_paths_and_file_urls(tmp_path: Path, prefix: str) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    assert locate(Where(run=f"{prefix}{path}")).run.path == str(path)
    assert locate(Where(fileroot=f"{prefix}{tmp_path}")).run.path == str(path)


@pytest.mark.parametrize("where", [Where(run="s3://bucket/run"), Where(fileroot="gs://bucket")])
def test_urls_of_object_stores_are_refused_by_name(where: Where) -> None:
    with pytest.raises(UsageError, match="a run of this machine"):
        locate(where)


def test_home_in_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(tmp_path / "home", "alice", "grpo", "trial0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert locate(Where(fileroot="~/checkpoints")).run.path == str(path)  # --fileroot=~/x: no shell expands that


# --- which run ----------------------------------------------------------------------------------------------------


def test_names_of_the_configuration_count(tmp_path: Path) -> None:
    run(tmp_path, "alice", "grpo", "trial0")
    second = run(tmp_path, "alice", "grpo", "trial1")
    yaml = config(tmp_path / "run.yaml", f"experiment_name: grpo\ntrial_name: trial0\ncluster: {{fileroot: {tmp_path}}}\n")
    assert locate(Where(config=yaml, overrides=("trial_name=trial1",))).run.path == str(second)
    assert locate(Where(config=yaml, trial="trial1")).run.path == str(second)


def test_overrides_without_a_configuration() -> None:
    with pytest.raises(UsageError, match="--config names none"):
        locate(Where(overrides=("trial_name=x",)))


def test_the_only_user_found_is_taken_and_said(tmp_path: Path) -> None:
    path = run(tmp_path, "bob", "grpo", "trial0")
    found = locate(Where(fileroot=str(tmp_path)))
    assert found.run.path == str(path)
    assert any("bob" in text and "alice" in text for text in found.warnings)


def test_of_several_users_the_current_one(tmp_path: Path) -> None:
    run(tmp_path, "bob", "grpo", "trial0")
    mine = run(tmp_path, "alice", "grpo", "trial0")
    assert locate(Where(fileroot=str(tmp_path))).run.path == str(mine)
    assert "/bob/" in locate(Where(fileroot=str(tmp_path), user="bob")).run.path


def test_several_trials_are_listed_newest_first(tmp_path: Path) -> None:
    old = run(tmp_path, "alice", "grpo", "trial0", steps=(46,))
    new = run(tmp_path, "alice", "grpo", "trial1", steps=(46, 93))
    trees.set_age(old / "default" / trees.folder_name(46), 90_000)
    trees.set_age(new / "default" / trees.folder_name(93), 7200)
    with pytest.raises(WhichRunError) as caught:
        locate(Where(fileroot=str(tmp_path)))
    assert caught.value.exit_code == 2
    first, second = caught.value.facts
    assert first == "grpo/trial1  (newest step 93, 2.0 h ago)"
    assert second == "grpo/trial0  (newest step 46, 25.0 h ago)"
    assert "-t" in caught.value.hint


def test_a_person_is_asked(tmp_path: Path) -> None:
    run(tmp_path, "alice", "grpo", "trial0")
    wanted = run(tmp_path, "alice", "other", "trial0")
    asked = []

    def ask(question: str, choices: list[str]) -> str:
        asked.append(question)
        return next(choice for choice in choices if choice.startswith("other/"))

    assert locate(Where(fileroot=str(tmp_path)), ask=ask).run.path == str(wanted)
    assert asked == ["Which run?"]


# --- nothing found ------------------------------------------------------------------------------------------------


def test_what_exists_is_told(tmp_path: Path) -> None:
    run(tmp_path, "alice", "grpo", "trial0")
    run(tmp_path, "bob", "sft", "first")
    with pytest.raises(NoRunError) as caught:
        locate(Where(fileroot=str(tmp_path), experiment="unheard-of"))
    assert "experiment 'unheard-of'" in str(caught.value)
    assert f"{tmp_path}/checkpoints" in str(caught.value)
    assert "there are: user alice: grpo/trial0" in caught.value.facts
    assert "there are: user bob: sft/first" in caught.value.facts


@pytest.mark.parametrize(
    ("where", "near"),
    [
        (Where(experiment="gsm8k-gpro"), "'gsm8k-grpo' for 'gsm8k-gpro'"),
        (Where(experiment="GSM8K-GRPO"), "'gsm8k-grpo' for 'GSM8K-GRPO'"),
        (Where(trial="trail0"), "'trial0' for 'trail0'"),
        (Where(user="alicee"), "'alice' for 'alicee'"),
    ],
)
def test_near_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Where, near: str) -> None:
    run(tmp_path, "alice", "gsm8k-grpo", "trial0")
    monkeypatch.setenv("CKPTSTORE_FILEROOT", str(tmp_path))
    with pytest.raises(NoRunError) as caught:
        locate(where)
    assert near in caught.value.hint


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        ("nothing", "does not exist"),
        ("other", "has no folder checkpoints/; it holds logs"),
        ("empty", "holds no USER/EXPERIMENT/TRIAL"),
    ],
)
def test_a_fileroot_without_runs(tmp_path: Path, make: str, fact: str) -> None:
    root = tmp_path / "root"
    if make == "other":
        (root / "logs").mkdir(parents=True)
    if make == "empty":
        (root / "checkpoints").mkdir(parents=True)
    with pytest.raises(NoRunError) as caught:
        locate(Where(fileroot=str(root)))
    assert any(fact in text for text in caught.value.facts), caught.value.facts


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody who may not read")
def test_folders_that_may_not_be_read_are_named(tmp_path: Path) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    path.parent.parent.chmod(0o700)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    code = (
        "import os, sys; from ckptstore.locate import *; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: locate(Where(fileroot=sys.argv[1]))\n"
        "except NoRunError as error: print(*error.facts, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"{path.parent.parent} cannot be read by" in done.stdout, done.stderr


# --- --run --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_not_there_has_a_near_name(tmp_path: Path) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    with pytest.raises(NoRunError) as caught:
        locate(Where(run=f"{path.parent}/trial_0"))
    assert caught.value.hint == f"Did you mean {path}?"


def test_a_run_that_is_like_nothing_there_lists_what_is(tmp_path: Path) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    with pytest.raises(NoRunError) as caught:
        locate(Where(run=f"{path.parent}/zzz"))
    assert caught.value.facts == (f"{path.parent} holds trial0",)


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("", "Say --run {run}"),  # the experiment's folder
        ("trial0/default", "Say --run {run}."),
        (f"trial0/default/{trees.folder_name(46)}", "Say --run {run}, or `ckptstore setup --checkpoint-path"),
    ],
)
def test_another_folder_than_the_run_is_corrected(tmp_path: Path, inside: str, says: str) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    with pytest.raises(UsageError) as caught:
        locate(Where(run=str(path.parent / inside)))
    assert caught.value.hint.startswith(says.format(run=path))


def test_a_fileroot_given_as_the_run(tmp_path: Path) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    with pytest.raises(WhichRunError) as caught:
        locate(Where(run=str(tmp_path)))
    assert caught.value.facts == (f"a run below it: {path}",)


def test_a_run_outside_of_the_layout(tmp_path: Path) -> None:
    path = run(tmp_path, "alice", "grpo", "trial0")
    moved = tmp_path / "rescued"
    path.rename(moved)
    found = locate(Where(run=str(moved)))
    assert (found.run.path, found.run.fileroot, found.run.trial) == (str(moved), "", "rescued")


# --- warnings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "says"), [("overlay", "gone with the container"), ("tmpfs", "gone with the machine")])
def test_disks_that_do_not_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: str) -> None:
    run(tmp_path, "alice", "grpo", "trial0")
    monkeypatch.setattr(probe, "file_system", lambda path: kind)
    assert any(says in text and str(tmp_path) in text for text in locate(Where(fileroot=str(tmp_path))).warnings)
    with pytest.raises(NoRunError) as caught:
        locate(Where(fileroot=str(tmp_path), trial="none"))
    assert any(says in fact for fact in caught.value.facts)


def test_an_ordinary_disk_has_no_warning(tmp_path: Path) -> None:
    run(tmp_path, "alice", "grpo", "trial0")
    assert locate(Where(fileroot=str(tmp_path))).warnings == ()


def test_a_relative_fileroot_in_the_yaml(tmp_path: Path) -> None:
    run(tmp_path / "outputs", "alice", "grpo", "trial0")
    yaml = config(tmp_path / "run.yaml", "cluster: {fileroot: ./outputs}\n")
    (warning,) = locate(Where(config=yaml)).warnings
    assert "./outputs is relative" in warning
    assert str(tmp_path) in warning


def test_the_usual_relative_place_is_relative_too(tmp_path: Path) -> None:
    run(tmp_path / "outputs/grpo", "alice", "grpo", "trial0")
    (warning,) = locate(Where()).warnings
    assert "./outputs/grpo is relative" in warning


# --- who ----------------------------------------------------------------------------------------------------------


def test_a_user_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert current_user() == "54321"


def test_a_yaml_that_hydra_composes_says_what_of_it_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("defaults: [base, _self_]\nexperiment_name: x\ntrial_name: y\n")
    with pytest.raises(module.NoRunError) as refused:
        module.locate(module.Where(config="run.yaml"))
    assert "what its defaults: name is not read (base)" in refused.value.facts


def test_what_may_not_be_looked_into_is_not_said_to_be_missing(tmp_path: Path) -> None:
    """Another user's fileroot: "it holds nothing" sends one to look elsewhere, or to start anew."""
    path = run(tmp_path / "root", "alice", "closed", "trial0")
    users.open_way_to(path)
    for folder in (path, *path.parents[: len(path.relative_to(tmp_path).parts) - 1]):
        folder.chmod(0o755)
    assert not isinstance(users.as_nobody(lambda: locate(Where(run=str(path)))), Exception)
    (tmp_path / "root").chmod(0o700)
    by_run = users.as_nobody(lambda: locate(Where(run=str(path))))
    assert isinstance(by_run, AccessError)
    assert str(by_run).endswith(f"may not look into {tmp_path / 'root'}")
    by_name = users.as_nobody(lambda: locate(Where(fileroot=str(tmp_path / "root"), experiment="closed")))
    assert isinstance(by_name, NoRunError)
    assert [fact for fact in by_name.facts if "nothing" in fact or "not exist" in fact] == []
    assert any(fact.startswith(f"{tmp_path / 'root'} cannot be read by") for fact in by_name.facts)
    missing = users.as_nobody(lambda: locate(Where(run=str(tmp_path / "elsewhere"))))
    assert isinstance(missing, NoRunError)
