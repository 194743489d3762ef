"""Training starts from nothing only where everything that was named could be read, and was empty."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptstore import probe
from ckptstore.errors import CkptStoreError, RefusedError
from ckptstore.fresh import is_fresh
from tests import trees

NAMES = ("alice", "gsm8k-grpo", "trial0")


@pytest.fixture(autouse=True)
def persistent_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests run on counts as a volume, unless a test says otherwise."""
    monkeypatch.setattr(probe, "file_system", lambda path: "ext4")


def test_no_trace_is_fresh(tmp_path: Path) -> None:
    assert is_fresh(str(tmp_path / "not/yet"), *NAMES)
    assert is_fresh(str(tmp_path), *NAMES)
    trees.make_run(tmp_path, trial="another", steps=[46])
    assert is_fresh(str(tmp_path), *NAMES)


def test_empty_folders_are_no_trace(tmp_path: Path) -> None:
    """AReaL's helpers make them while they look."""
    (tmp_path / "checkpoints/alice/gsm8k-grpo/trial0/default/recover_checkpoint").mkdir(parents=True)
    assert is_fresh(str(tmp_path), *NAMES)


@pytest.mark.parametrize("damage", [None, "torn"])
def test_any_file_is_a_trace(tmp_path: Path, damage: str | None) -> None:
    run = trees.make_run(tmp_path, steps=[46])
    if damage:
        trees.truncate(trees.checkpoint(run, 46) / "model.safetensors")
    assert not is_fresh(str(tmp_path), *NAMES)


@pytest.mark.parametrize("kind", ["overlay", "tmpfs"])
def test_an_unmounted_volume_is_not_taken_for_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(probe, "file_system", lambda path: kind)
    with pytest.raises(RefusedError, match="not mounted"):
        is_fresh(str(tmp_path / "outputs"), *NAMES)
    with pytest.raises(RefusedError, match="not mounted"):
        is_fresh(str(tmp_path), *NAMES)


def test_a_place_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.make_run(tmp_path, steps=[46])
    real = os.listdir

    def stale(path: str) -> list[str]:
        if str(path).endswith("alice"):
            raise OSError(116, "Stale file handle", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", stale)
    with pytest.raises(CkptStoreError, match="Stale file handle"):
        is_fresh(str(tmp_path), *NAMES)
