"""Damage that was found once is known from then on, for as long as the manifest counts that showed it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptstore import recovery
from ckptstore.backends import open_backend
from ckptstore.choose import Selection
from ckptstore.model import Level, Status
from ckptstore.plan import Options
from ckptstore.store import CheckpointStore
from tests import trees


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = trees.make_run(tmp_path, steps=[46, 93], logs=False)
    store = CheckpointStore(run)
    for step in (46, 93):
        store.seal(step)
    return run


def flip(path: Path) -> None:
    """As a disk does: the times stay."""
    info = path.stat()
    trees.bitflip(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_what_verify_found_is_listed(run: Path) -> None:
    store = CheckpointStore(run)
    weights = trees.checkpoint(run, 93) / "model.safetensors"
    flip(weights)
    assert store.get(93).status is Status.COMMITTED  # a look that reads no weights cannot know
    assert not store.verify(93).ok
    assert store.get(93).status is Status.CORRUPT
    assert "found earlier" in str(store.get(93).findings[0])
    assert store.resume_point().checkpoint.step == 46
    assert store.get(46).status is Status.COMMITTED
    flip(weights)  # repaired
    assert not store.verify(93, Level.STRUCTURE).ok  # reads no weights either
    assert store.verify(93, Level.FULL).ok
    assert store.get(93).status is Status.COMMITTED


def test_what_setup_found_while_copying_is_listed(run: Path) -> None:
    flip(trees.checkpoint(run, 93) / "model.safetensors")
    outcome = recovery.setup(open_backend(run), Selection(), Options(as_is=True))
    assert outcome.plan.point.checkpoint.step == 46
    assert CheckpointStore(run).get(93).status is Status.CORRUPT
    assert recovery.plan(open_backend(run), Selection(), Options(as_is=True)).point.checkpoint.step == 46


def test_a_new_save_of_the_trainer_is_innocent(run: Path) -> None:
    store = CheckpointStore(run)
    flip(trees.checkpoint(run, 93) / "model.safetensors")
    store.verify(93)
    trees.write_model(trees.checkpoint(run, 93), seed=5)
    assert store.get(93).status is Status.COMPLETE


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{", b'{"parts": 3}', b'{"parts": {"default": []}}', b"\xff"])
def test_a_garbled_note_is_none(run: Path, garbage: bytes) -> None:
    side = run.parent / ".ckptstore" / run.name
    side.mkdir(parents=True, exist_ok=True)
    (side / "damaged.json").write_bytes(garbage)
    assert [c.status for c in CheckpointStore(run)] == [Status.COMMITTED, Status.COMMITTED]
