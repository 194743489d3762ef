"""Saves in the background: what is saved is the state at the call, one at a time, and no failure is lost."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, native
from ckptstore.errors import BusyError, CkptStoreError, UsageError
from ckptstore.retention import Keep
from ckptstore.saves import background as core
from ckptstore.saves import steps
from tests import warm
from tests.test_torch_state import same

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
from ckptstore.torch import background  # noqa: E402


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: BaseException | None = None
        self.options: list[Any] = []
        self.real = native.write_files
        patch.setattr(native, "write_files", self.write_files)

    def write_files(self, *args: Any, **kwargs: Any) -> Any:
        self.options.append(kwargs.get("options"))
        self.reached.set()
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        return self.real(*args, **kwargs)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()
    for line in core._lines.values():
        if line.last is not None and line.last._future is not None:
            line.last._future.exception(30)


def make(value: float) -> dict[str, Any]:
    return {"model": {"a": torch.full((1000,), value), "t": torch.full((3, 4), value).t()}, "step": int(value)}


def test_the_state_may_change_once_it_is_staged(store: CheckpointStore, gate: Gate) -> None:
    state = make(1)
    handle = ckpt.save_async(store, 1, state, metrics={"loss": 2})
    assert (handle.staged, handle.committed, handle.failed, handle.skipped) == (True, False, False, False)
    state["model"]["a"].zero_()
    state["model"]["t"].zero_()
    gate.open.set()
    manifest = handle.wait(30)
    assert handle.committed
    assert manifest is not None
    assert manifest.metrics == {"loss": 2.0}
    assert same(ckpt.load(store, 1), make(1))
    assert gate.options[0].nice == 10


def test_planted_a_save_without_a_copy(store: CheckpointStore, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background._Buffers, "take", lambda self, tensor: tensor.contiguous())
    state = make(1)
    handle = ckpt.save_async(store, 1, state)
    state["model"]["a"].zero_()
    gate.open.set()
    handle.wait(30)
    assert not same(ckpt.load(store, 1), make(1))


def test_buffers_are_used_again(store: CheckpointStore) -> None:
    ckpt.save_async(store, 1, make(1)).wait()
    buffers = background._buffers[os.path.realpath(store.folder)]
    before = [tensor.data_ptr() for tensor in buffers.tensors]
    ckpt.save_async(store, 2, make(2)).wait()
    assert [tensor.data_ptr() for tensor in buffers.tensors] == before
    other = {"model": {"a": torch.ones(5)}, "more": [torch.ones(2)] * 2, "x": torch.zeros(3, dtype=torch.int64)}
    ckpt.save_async(store, 3, other).wait()
    ckpt.save_async(store, 4, {"x": torch.zeros(3)}).wait()
    assert len(buffers.tensors) == 1
    for step, state in ((1, make(1)), (2, make(2)), (3, other), (4, {"x": torch.zeros(3)})):
        assert same(ckpt.load(store, step), state)
    loaded = ckpt.load(store, 3)["more"]
    assert loaded[0] is loaded[1]


def new_buffers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the tensors that are allocated for staging from now on."""
    sizes: list[int] = []
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", empty)
    return sizes


@pytest.mark.parametrize("planted", [False, True])
def test_from_the_second_save_on_no_host_memory_is_allocated(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    """Not only fast: every tensor finds the buffer of its place. Planted: a staging that makes new ones each time."""
    state = {"model": {f"w{i}": torch.full((1000 + i,), 1.0) for i in range(5)}, "half": torch.ones(7).half()}
    ckpt.save_async(store, 1, state).wait()
    kept = list(background._buffers[os.path.realpath(store.folder)].tensors)
    if planted:
        monkeypatch.setattr(background._Buffers, "begin", lambda self: (self.tensors.clear(), setattr(self, "next", 0)))
    for step in (2, 3):
        sizes = new_buffers(monkeypatch)
        for tensor in state["model"].values():
            tensor.fill_(float(step))
        ckpt.save_async(store, step, state).wait()
        same_ones = all(a is b for a, b in zip(background._buffers[os.path.realpath(store.folder)].tensors, kept, strict=True))
        assert (sizes == [], same_ones) == (not planted, not planted)
    assert same(ckpt.load(store, 3), state)


def test_a_save_in_inference_mode_and_one_outside(store: CheckpointStore) -> None:
    """The host buffers of the one are the other's: what is made in that mode could be changed in no other."""
    for step, mode in ((1, True), (2, False), (3, True)):
        with torch.inference_mode(mode):
            ckpt.save_async(store, step, {"a": torch.full((5,), float(step))}).wait(30)
        assert ckpt.load(store, step)["a"].tolist() == [float(step)] * 5


def test_busy(store: CheckpointStore, gate: Gate) -> None:
    first = ckpt.save_async(store, 1, make(1))
    assert gate.reached.wait(10)
    skipped = ckpt.save_async(store, 2, make(2), on_busy="skip")
    assert (skipped.skipped, skipped.staged, skipped.committed, skipped.wait()) == (True, False, False, None)
    with pytest.raises(BusyError, match="step 1 is still in flight"):
        ckpt.save_async(store, 3, make(3), on_busy="raise")
    with pytest.raises(UsageError):
        ckpt.save_async(store, 3, make(3), on_busy="nonsense")
    with pytest.raises(TimeoutError):
        first.wait(0.01)
    waiting = threading.Thread(target=lambda: ckpt.save_async(store, 4, make(4)).wait())
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    gate.open.set()
    waiting.join(30)
    assert [one.step for one in store.list()] == [1, 4]


def test_stores_do_not_wait_for_each_other(store: CheckpointStore, gate: Gate, tmp_path: Path) -> None:
    ckpt.save_async(store, 1, make(1))
    other = CheckpointStore(tmp_path / "other")
    handle = ckpt.save_async(other, 1, make(2), on_busy="raise")
    gate.open.set()
    handle.wait(30)
    ckpt.wait_all(30)
    assert [len(one.list()) for one in (store, other)] == [1, 1]


def test_a_failure_is_raised_at_the_next_call(store: CheckpointStore, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    gate.open.set()
    gate.error = OSError(28, "No space left on device")
    with caplog.at_level(logging.ERROR, "ckptstore"):
        handle = ckpt.save_async(store, 1, make(1))
        with pytest.raises(OSError, match="No space left"):
            ckpt.save_async(store, 2, make(2))
    assert "step 1 failed" in caplog.text
    assert handle.failed
    gate.error = None
    ckpt.save_async(store, 3, make(3)).wait()
    assert [one.step for one in store.list()] == [3]


def test_a_failure_that_was_told_is_not_told_again(store: CheckpointStore, gate: Gate) -> None:
    gate.open.set()
    gate.error = OSError(28, "No space left on device")
    handle = ckpt.save_async(store, 1, make(1))
    with pytest.raises(OSError, match="No space left"):
        handle.wait(30)
    gate.error = None
    ckpt.wait_all(30)
    ckpt.save_async(store, 2, make(2)).wait(30)


def test_what_cannot_be_saved_is_said_at_once(store: CheckpointStore) -> None:
    with pytest.raises(UsageError):
        ckpt.save_async(store, 1, {"a": object()})
    ckpt.save_async(store, 2, make(2), keep=Keep(last=1)).wait()
    ckpt.save_async(store, 3, make(3), keep=Keep(last=1)).wait()
    assert [one.step for one in store.list()] == [3]


SCRIPT = """
import os, signal, sys, time, torch, ckptstore.torch as ckpt
from ckptstore import CheckpointStore, native
store = CheckpointStore(sys.argv[1])
real = native.write_files
def slow(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(float(sys.argv[3]))
    return real(*args, **kwargs)
ckpt.save(store, 1, {"a": torch.ones(10)})
native.write_files = slow
ckpt.save_async(store, 2, {"a": torch.ones(1000)})
if sys.argv[2] == "raise":
    raise RuntimeError("training failed")
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        from ckptstore.saves import background as core
        from ckptstore.torch import background
        os._exit(5 if core._lines or background._buffers else 0)
    assert os.waitpid(child, 0)[1] == 0
if sys.argv[2] == "sleep":
    time.sleep(60)
"""

#: Of those whose writing takes threads of its own, begun when the main thread has ended.
LATE = """
import sys, time, torch, ckptstore.torch as ckpt, torch.distributed as dist, torch.distributed.checkpoint as dcp
from ckptstore import CheckpointStore
from ckptstore.saves import saving
store, begin = CheckpointStore(sys.argv[1]), saving.begin
def late(*args):
    from concurrent.futures import thread
    while not thread._shutdown:
        time.sleep(0.01)
    return begin(*args)
saving.begin = late
state = {"a": torch.ones(5 << 20)}
if sys.argv[2] == "waves":
    ckpt.save_async(store, 2, state, max_host_bytes=16 << 20)
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dcp.async_save(state, storage_writer=ckpt.StoreWriter(store, 2))
"""


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 12, 2), reason="this Python can start no thread at its exit")
def test_a_save_in_flight_is_finished_at_exit(tmp_path: Path) -> None:
    """After an exception, and at the usual end, which is that of a process that has forked, too."""
    ends = {"raise": (SCRIPT, 1), "fork": (SCRIPT, 0), "waves": (LATE, 0), "dcp": (LATE, 0)}
    children = {
        how: subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / how, how, "0.5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for how, (script, _) in ends.items()
    }
    said = {how: child.communicate(timeout=90)[1] for how, child in children.items()}  # at once: most of it is to import torch
    assert {how: child.returncode for how, child in children.items()} == {how: code for how, (_, code) in ends.items()}, said
    for how, (script, _) in ends.items():
        store = CheckpointStore(tmp_path / how)
        assert [one.step for one in store.list()] == ([1, 2] if script is SCRIPT else [2]), how
        assert store.verify(2).ok


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_killed_while_it_writes(store: CheckpointStore, name: str) -> None:
    child = warm.Python("-c", SCRIPT, store.folder, "sleep", "30")
    assert child.stdout.readline() == "writing\n"
    child.send_signal(getattr(signal, name))
    assert child.finish(20).returncode == -getattr(signal, name)
    assert [one.step for one in store.list()] == [1]
    assert len(steps.leftovers(store.folder)) == 1
    ckpt.save(store, 2, {"a": torch.ones(1)})
    assert steps.leftovers(store.folder) == []


FORKS = """
import os, sys, threading, time, torch, torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader
import ckptstore.torch as ckpt
from ckptstore import CheckpointStore, native
store = CheckpointStore(sys.argv[1])
real, writing = native.write_files, threading.Event()
def slow(*args, **kwargs):
    writing.set()
    time.sleep(0.3)
    return real(*args, **kwargs)
native.write_files = slow
data = DataLoader(list(range(64)), batch_size=8, num_workers=2, persistent_workers=True)
for step in range(3):
    ckpt.save_async(store, step, {"w": torch.full((1000,), float(step))})
    assert sum(int(batch.sum()) for batch in data) == 2016      # at the first: forks while the save is in flight
del data
ckpt.wait_all(30)
writing.clear()
saving = threading.Thread(
    target=lambda: dcp.save({"w": torch.ones(1000)}, storage_writer=ckpt.StoreWriter(store, 9), no_dist=True)
)
saving.start()
writing.wait()
if os.fork() == 0:
    sys.exit(0)     # an orderly end: it runs the finalizers that it was forked with
os.wait()
saving.join()
"""


def test_data_loaders_and_other_children(store: CheckpointStore) -> None:
    """Workers that live through several saves, and a child that ends while its parent writes: no save is harmed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, store.folder], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [one.step for one in store.list()] == [0, 1, 2, 9]
    assert all(store.verify(step).ok for step in (0, 1, 2, 9))
    for step in range(3):
        assert same(ckpt.load(store, step), {"w": torch.full((1000,), float(step))})


def test_errors_are_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((CkptStoreError, OSError)):
        ckpt.save_async(CheckpointStore(tmp_path / "file"), 1, make(1)).wait()


@pytest.mark.parametrize("kind", ["state", "folder"])
def test_metrics_are_those_of_the_call(store: CheckpointStore, gate: Gate, tmp_path: Path, kind: str) -> None:
    """A loop changes its metrics in place; retention must not take the best step by those of a later one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_bytes(b"x")
    loss = torch.tensor(0.25)
    metrics = {"loss": loss, "lr": 0.5}
    if kind == "state":
        handle = ckpt.save_async(store, 1, {"a": torch.ones(3)}, metrics=metrics)
    else:
        handle = store.save_async(1, tmp_path / "out", metrics=metrics)
    loss.fill_(9.0)
    metrics["lr"] = 9.0
    gate.open.set()
    assert handle.wait().metrics == {"loss": 0.25, "lr": 0.5}


@pytest.mark.parametrize("value", [None, "low", torch.ones(2), torch.ones((), device="meta"), 10**400])
def test_a_metric_that_is_no_number_is_said_at_once(store: CheckpointStore, tmp_path: Path, value: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_bytes(b"x")
    metrics = {"reward": 1.0, "loss": value}
    state = {"a": torch.ones(3)}
    for save in (
        lambda: ckpt.save(store, 1, state, metrics=metrics),
        lambda: ckpt.save_async(store, 1, state, metrics=metrics),
        lambda: store.save(1, tmp_path / "out", metrics=metrics),
        lambda: store.save_async(1, tmp_path / "out", metrics=metrics),
        lambda: ckpt.StoreWriter(store, 1, metrics=metrics),
    ):
        with pytest.raises(UsageError, match=r"the metric 'loss' is .* no number"):
            save()
    assert not os.path.exists(store.folder)


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, 10**30])
def test_a_step_that_is_none_is_said_at_once(store: CheckpointStore, tmp_path: Path, step: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_bytes(b"x")
    for save in (
        lambda: ckpt.save_async(store, step, {"a": torch.ones(3)}),
        lambda: store.save_async(step, tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="a step is a whole number"):
            save()
    assert not os.path.exists(store.folder)


def test_an_interrupt_before_a_save_is_noted(store: CheckpointStore, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after the save was handed to its thread: it goes on, and the next one must not take its buffers."""
    ckpt.save_async(store, 0, make(0.0))
    gate.open.set()
    ckpt.wait_all()
    gate.open.clear()
    (line,) = (line for folder, line in core._lines.items() if folder == store.folder)
    real = line.pool.submit

    def submit(*args: Any) -> Any:
        found = real(*args)
        if args[0] is core._run:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(line.pool, "submit", submit)
    monkeypatch.setattr(native, "write_files", gate.write_files)
    with pytest.raises(KeyboardInterrupt):
        ckpt.save_async(store, 1, make(1.0))
    monkeypatch.setattr(native, "write_files", gate.write_files)
    opened = threading.Timer(0.3, gate.open.set)
    opened.start()
    ckpt.save_async(store, 2, make(2.0)).wait(30)
    assert [same(ckpt.load(store, step), make(float(step))) for step in (1, 2)] == [True, True]


def test_a_wait_that_is_too_short_says_so(store: CheckpointStore, gate: Gate) -> None:
    handle = ckpt.save_async(store, 7, make(1.0))
    for wait in (handle.wait, ckpt.wait_all):
        with pytest.raises(TimeoutError, match=r"step 7 was not committed within 0(\.01)? s; the save goes on"):
            wait(0.01)
    gate.open.set()
    assert handle.wait(30).step == 7


def test_a_timeout_that_ended_the_save_is_its_own(store: CheckpointStore, gate: Gate) -> None:
    gate.error = TimeoutError("the disk gave no answer")
    gate.open.set()
    handle = ckpt.save_async(store, 7, make(1.0))
    with pytest.raises(TimeoutError, match="the disk gave no answer"):
        handle.wait(30)
