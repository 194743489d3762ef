"""Saves of a state larger than the host memory for its copy: the same bytes, bounded, and no change goes unseen."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, native
from ckptstore.errors import SourceChangedError, StorageError, UsageError
from ckptstore.saves import steps
from tests.test_torch_state import same

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
from ckptstore.torch import background, blocks, waves  # noqa: E402

LIMIT = 2 * blocks.BLOCK_BYTES


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


def make(value: float, *, large_count: int = 9_000_001) -> dict[str, Any]:
    """54 MB in two files: pieces that end within tensors, a transposed one, a tied one, small ones, an empty one."""
    torch.manual_seed(int(value))
    large = torch.randn(large_count)
    return {
        "model": {"large": large, "tied": large, "half": torch.randn(1001).bfloat16(), "turned": torch.randn(1500, 1500).t()},
        "optimizer": {
            "m": torch.randn(1_500_000),
            "none": torch.empty(0),
            "step": torch.tensor(3),
            "flag": torch.tensor([True]),
        },
        "step": int(value),
    }


class Gate:
    """Holds every write of a piece until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.real: Callable[..., Any] = native.write_range
        self.error: BaseException | None = None
        patch.setattr(native, "write_range", self.write_range)

    def write_range(self, folder: Any, name: str, offset: int, data: Any) -> Any:
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        return self.real(folder, name, offset, data)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def save(store: CheckpointStore, step: int, state: Any, **more: Any) -> Any:
    return ckpt.save_async(store, step, state, max_host_bytes=LIMIT, **more)


def test_the_same_files_as_ever(store: CheckpointStore, tmp_path: Path) -> None:
    state = make(1)
    manifest = save(store, 1, state, config={"lr": 1}, metrics={"loss": 2}).wait(60)
    plain = ckpt.save(CheckpointStore(tmp_path / "plain"), 1, state, config={"lr": 1}, metrics={"loss": 2})
    assert manifest is not None
    assert manifest.content == plain.content, "byte for byte"
    assert [entry.chunks for entry in manifest.files] == [entry.chunks for entry in plain.files]
    assert manifest.metrics == plain.metrics
    assert store.verify(1).ok
    loaded = ckpt.load(store, 1)
    assert same(loaded, make(1))
    assert loaded["model"]["large"] is loaded["model"]["tied"]


def test_memory_is_bounded_and_used_again(store: CheckpointStore) -> None:
    save(store, 1, make(1)).wait(60)
    kept = background._buffers[os.path.realpath(store.folder)]
    before = [buffer.data_ptr() for buffer in kept.ring]
    assert sum(buffer.nbytes for buffer in kept.ring) == LIMIT
    assert kept.tensors == []
    save(store, 2, make(2)).wait(60)
    assert [buffer.data_ptr() for buffer in kept.ring] == before
    assert all(pointer % 4096 == 0 for pointer in before), "the disk takes them as they are"
    small = ckpt.save_async(store, 3, {"a": torch.ones(5)}, max_host_bytes=LIMIT)
    assert small.staged, "what fits is copied at once, as ever"
    small.wait(60)
    assert kept.ring == []
    assert same(ckpt.load(store, 2), make(2))
    assert same(ckpt.load(store, 3), {"a": torch.ones(5)})


def test_staged_when_the_last_piece_is_copied(store: CheckpointStore, gate: Gate) -> None:
    state = make(1)
    handle = save(store, 1, state)
    with pytest.raises(TimeoutError, match="not staged within"):
        handle.wait_staged(0.2)
    assert (handle.staged, handle.committed) == (False, False)
    gate.open.set()
    handle.wait_staged(60)
    assert handle.staged
    state["model"]["large"].zero_()
    state["optimizer"]["m"].zero_()
    handle.wait(60)
    assert same(ckpt.load(store, 1), make(1))


@pytest.mark.parametrize("change", [torch.Tensor.zero_, lambda tensor: tensor.add_(1), lambda tensor: tensor.t().mul_(2)])
def test_a_change_that_comes_too_early(store: CheckpointStore, gate: Gate, change: Any) -> None:
    save_before = ckpt.save(store, 1, {"a": torch.ones(3)})
    state = make(1)
    handle = save(store, 2, state)
    change(state["model"]["turned"])
    gate.open.set()
    with pytest.raises(SourceChangedError, match=r"model: turned was changed before it was staged"):
        handle.wait_staged(60)
    assert (handle.staged, handle.failed) == (False, True)
    assert [one.step for one in store] == [1]
    assert save_before.step == 1
    assert steps.leftovers(store.folder) == []
    save(store, 2, state).wait(60)
    assert store.verify(2).ok


def test_planted_versions_that_nobody_looks_at(store: CheckpointStore, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "_version", lambda tensor: 0)
    state = make(1)
    handle = save(store, 1, state)
    state["optimizer"]["m"].zero_()
    gate.open.set()
    handle.wait(60)
    assert not same(ckpt.load(store, 1), make(1)), "torn: what the versions are for"


def test_a_write_that_fails(store: CheckpointStore, gate: Gate) -> None:
    gate.error = OSError(28, "No space left on device")
    gate.open.set()
    handle = save(store, 1, make(1))
    with pytest.raises(StorageError, match="space"):
        handle.wait_staged(60)
    assert handle.failed
    assert not os.path.exists(os.path.join(store.folder, "step-1"))
    gate.error = None
    save(store, 2, make(2)).wait(60)
    assert store.verify(2).ok


def test_usage(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="the least"):
        ckpt.save_async(store, 1, make(1), max_host_bytes=1000)
    monkeypatch.setattr("ckptstore.transfer.sending.MAX_PARTS", 1)  # as for a file of hundreds of GB, whose parts are larger
    with pytest.raises(UsageError, match=r"max_host_bytes is 16,777,216, and 50,331,648 are the least"):
        save(CheckpointStore(f"memory://waves-{tmp_path.name}"), 1, make(1))
