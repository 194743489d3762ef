"""--run and --fileroot take a URL on every verb where that means something; on the others the error says what to do."""

from __future__ import annotations

import os

import pytest

from ckptstore.backends import open_backend
from ckptstore.cli import VERBS
from ckptstore.store import CheckpointStore
from ckptstore.transfer.push import push
from tests import commands, trees
from tests.test_remote_looking import sealed_run

#: What each verb does with a URL: it works, or its error names the way.
WORKS = {"list": [], "show": ["46"], "verify": ["46"]}
REFUSES = {
    "setup": ([], "--from URL"),
    "resume": ([], "--from URL"),
    "push": (["46", "--to", "memory://other"], "pull --from URL"),
    "seal": (["46"], "pull"),
    "adopt": ([], "watch --to URL"),
    "watch": ([], "watch --to URL"),
    "status": ([], "list --run URL"),
    "plot": ([], "list --run URL"),
    "doctor": ([], "verify --run URL"),
}
NO_RUN = {"pull"}  #: says where by --from and --to
CHANGES = {"clean", "repair", "prune"}  #: work at a URL too: test_leftovers.py, test_repair.py, test_save_urls.py


@pytest.fixture
def fileroot(tmp_path, monkeypatch):
    """A fileroot in an object store with one run, and none here."""
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    run = sealed_run(tmp_path / "trained")
    root = f"memory://urls-{tmp_path.name}-{os.getpid()}/outputs"
    push(open_backend(run), CheckpointStore(run).get(46), open_backend(f"{root}/checkpoints/alice/gsm8k-grpo/trial0"))
    return root


def run_of(fileroot: str) -> str:
    return f"{fileroot}/checkpoints/alice/gsm8k-grpo/trial0"


def test_every_verb_is_in_the_table():
    assert {*WORKS, *REFUSES, *NO_RUN, *CHANGES} == {*VERBS}


@pytest.mark.parametrize("verb", WORKS)
def test_verbs_that_take_one(fileroot, capfd, monkeypatch, verb):
    """By --run, by --fileroot with names and without, and by the variables."""
    run = run_of(fileroot)
    ways = [["--run", run], ["--fileroot", fileroot, "--user", "alice", "-e", "gsm8k-grpo", "-t", "trial0"]]
    ways += [["--fileroot", fileroot], ["--fileroot", fileroot, "-e", "gsm8k-grpo"], ["--fileroot", f"{fileroot}/"]]
    found = [commands.invoke(capfd, verb, *WORKS[verb], *way, "--json") for way in ways]
    monkeypatch.setenv("CKPTSTORE_FILEROOT", fileroot)
    found.append(commands.invoke(capfd, verb, *WORKS[verb], "--json"))
    monkeypatch.delenv("CKPTSTORE_FILEROOT")
    monkeypatch.setenv("CKPTSTORE_URL", run)
    found.append(commands.invoke(capfd, verb, *WORKS[verb], "--json"))
    for done in found:
        assert done.code == 0, (done.out, done.err)
        if verb != "verify":
            assert f"{run}/default" in done.out


@pytest.mark.parametrize("verb", REFUSES)
@pytest.mark.parametrize("option", ["--run", "--fileroot"])
def test_verbs_that_do_not(capfd, tmp_path, monkeypatch, verb, option):
    """Exit code 2, which option, which verb does it instead; nothing is made."""
    commands.isolate(monkeypatch, tmp_path)
    words, way = REFUSES[verb]
    done = commands.invoke(capfd, verb, *words, option, "s3://bucket/outputs")
    assert done.code == 2, (done.out, done.err)
    text = commands.flat(done.err)
    assert option in text
    assert "a run of this machine" in text
    assert way in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--run", "--fileroot", "--to", "--from"])
def test_secrets_in_a_url_are_not_repeated(capfd, tmp_path, monkeypatch, option):
    commands.isolate(monkeypatch, tmp_path)
    verb = {"--to": ["push", "46", "--run", tmp_path], "--from": ["pull", "46", "--to", tmp_path]}.get(option, ["list"])
    done = commands.invoke(capfd, *verb, option, "s3://me:hunter2@bucket/run")
    assert done.code == 2
    assert "hunter2" not in done.out + done.err


def test_a_name_that_is_not_there(fileroot, capfd):
    """What is there instead is said."""
    done = commands.invoke(capfd, "list", "--fileroot", fileroot, "-e", "nonsense")
    assert done.code == 1
    assert "alice/gsm8k-grpo/trial0" in done.err


def test_the_variable_is_not_taken_for_another_run(fileroot, capfd, monkeypatch):
    """$CKPTSTORE_URL names one run: who asks for another one by name, or by its folder, does not get it."""
    monkeypatch.setenv("CKPTSTORE_URL", run_of(fileroot))
    assert commands.invoke(capfd, "list", "-e", "gsm8k-grpo", "--fileroot", "nowhere").code == 0
    assert commands.invoke(capfd, "list", "-e", "another", "--fileroot", "nowhere").code == 1
    assert commands.invoke(capfd, "list", "--run", "nowhere/trial0").code == 1


def test_the_yaml_names_it(fileroot, capfd, tmp_path, monkeypatch):
    """`ckptstore.url`, its references resolved: for list, push, and setup on a machine that lost its disk."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "experiment_name: gsm8k-grpo\ntrial_name: trial0\n"
        f"cluster: {{fileroot: {tmp_path}/new}}\n"
        f"ckptstore: {{url: '{fileroot}/checkpoints/alice/${{experiment_name}}/${{trial_name}}'}}\n"
    )
    done = commands.invoke(capfd, "list", "--config", config, "--json")
    assert done.code == 0, done.err
    assert done.json["run"]["path"] == run_of(fileroot)
    done = commands.invoke(capfd, "setup", "--config", config, "--as-is", "--json")
    assert done.code == 0, (done.out, done.err)
    assert "ckptstore.url of" in done.err
    assert (tmp_path / "new/checkpoints/alice/gsm8k-grpo/trial0/default/recover_checkpoint").is_dir()
    trained = tmp_path / "trained"
    words = ("push", "46", "--config", config, f"cluster.fileroot={trained}", "--dry-run", "--json")
    done = commands.invoke(capfd, *words)
    assert done.code == 0, (done.out, done.err)
    assert done.json["to"] == run_of(fileroot)
    monkeypatch.setenv("CKPTSTORE_URL", "memory://the/variable")
    assert commands.invoke(capfd, *words).json["to"] == "memory://the/variable"
    assert commands.invoke(capfd, *words, "--to", "memory://said").json["to"] == "memory://said"


def test_several_runs_there(fileroot, capfd, tmp_path):
    other = trees.make_run(tmp_path / "more", steps=(46,), experiment="other")
    push(open_backend(other), CheckpointStore(other).get(46), open_backend(f"{fileroot}/checkpoints/alice/other/trial0"))
    done = commands.invoke(capfd, "list", "--fileroot", fileroot)
    assert done.code == 2
    assert "alice/other/trial0" in done.err
    assert commands.invoke(capfd, "list", "--fileroot", fileroot, "-e", "other").code == 0
