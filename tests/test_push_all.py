"""`push --all` and `pull --all`: one checkpoint that cannot go does not hold up the others, and each failure is said."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest

from ckptstore.backends import open_backend, tries
from ckptstore.cli import moving
from ckptstore.errors import RankError, StorageError
from ckptstore.listing import scan
from ckptstore.store import CheckpointStore
from tests import commands, servers, trees
from tests.test_push_pull import flip
from tests.test_remote_looking import sealed_run

STEPS = (46, 93, 140)


@pytest.fixture
def run(tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    return sealed_run(tmp_path, STEPS)


@pytest.fixture
def url(tmp_path):
    return f"memory://push-all-{tmp_path.name}-{os.getpid()}"


def steps_at(url: str) -> list[int]:
    return [checkpoint.step for checkpoint in scan(open_backend(url)).checkpoints if checkpoint.status.usable]


def weights(run, step):
    return run / "default" / trees.folder_name(step) / "model.safetensors"


def break_two(run, url: str) -> None:
    """The newest is damaged here, and of the next one other bytes are there."""
    flip(weights(run, 140), weights(run, 140).stat().st_size - 1)
    open_backend(url).put(f"default/{trees.folder_name(93)}/theirs", b"1")


@pytest.mark.parametrize("words", [["--all"], [140, 93, 46]])
def test_the_good_ones_leave(run, url, capfd, words):
    break_two(run, url)
    done = commands.invoke(capfd, "push", *words, "--run", run, "--to", url)
    assert steps_at(url) == [46]
    assert done.code == 3, done.err
    err = commands.flat(done.err)
    assert "step 140 is not pushed: model.safetensors" in err
    assert "step 93 is not pushed: " in err
    assert "✓ step 46, default is committed" in done.out


def test_for_programs(run, url, capfd):
    break_two(run, url)
    done = commands.invoke(capfd, "push", "--all", "--run", run, "--to", url, "--json")
    assert [part["step"] for part in done.json["parts"]] == [46]
    assert [(one["step"], one["exit_code"]) for one in done.json["failed"]] == [(140, 3), (93, 1)]
    assert "model.safetensors" in done.json["failed"][0]["error"]
    assert done.code == 3


def test_one_alone_ends_as_ever(run, url, capfd):
    break_two(run, url)
    done = commands.invoke(capfd, "push", "140", "--run", run, "--to", url, "--json")
    assert (done.code, done.json["exit_code"]) == (3, 3)


def test_what_is_damaged_there_does_not_hold_up_a_pull(run, url, capfd, tmp_path):
    assert commands.invoke(capfd, "push", "--all", "--run", run, "--to", url).code == 0
    key = f"default/{trees.folder_name(46)}/model.safetensors"
    data = bytearray(open_backend(url).get(key))
    data[-1] ^= 1
    open_backend(url).put(key, data)
    done = commands.invoke(capfd, "pull", "--all", "--from", url, "--to", tmp_path / "there", "--json")
    assert done.code == 3
    assert [one["step"] for one in done.json["failed"]] == [46]
    assert [checkpoint.step for checkpoint in CheckpointStore(tmp_path / "there")] == [93, 140]


def test_a_store_that_is_gone_is_not_asked_for_each(run, capfd, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in servers.environment(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    done = commands.invoke(capfd, "push", "--all", "--run", run, "--to", "s3://ckpts/place", "--json")
    assert done.code == 1
    said = {one["step"]: one["error"] for one in done.json["failed"]}
    assert list(said) == [140, 93, 46]
    assert "Connection refused" in said[140]
    assert "Connection refused" in said[93]
    assert "not tried" in said[46]


def test_another_rank_ends_all(run, url):
    """It has gone: nobody sends its share of the others."""
    picked = list(CheckpointStore(run))

    def move(checkpoint):
        raise RankError("planted", rank=1)

    with pytest.raises(RankError):
        moving.move_each(picked, move, store=open_backend(url), failed=[])


def test_a_disk_that_cannot_be_read_is_no_store_that_is_gone(run, url):
    """Each on a bad sector of its own: all are tried."""
    tried: list[int] = []
    failed: list[moving.Failed] = []

    def move(checkpoint):
        tried.append(checkpoint.step)
        raise StorageError(f"reading {run}/default: Input/output error")

    moving.move_each(list(CheckpointStore(run)), move, store=open_backend(url), failed=failed)
    assert tried == [one.step for one in failed] == [46, 93, 140]
