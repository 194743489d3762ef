"""Signals that ask for a save, and the examples that a reader starts from."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, Keep, native, places
from ckptstore.errors import StorageError, UsageError
from tests import warm

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
from ckptstore.torch import background  # noqa: E402

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "examples/save_in_a_loop.py"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


@pytest.fixture
def emergency() -> Any:
    found = ckpt.install_signal_handlers(deadline_s=1.0)
    yield found
    found.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_usr1_is_answered_and_term_stays(store: CheckpointStore, emergency: Any) -> None:
    assert not emergency.requested
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (emergency.requested, emergency.stopping, list(emergency)) == (True, False, ["SIGUSR1"])
    outcome = emergency.save(store, 3, {"a": torch.ones(3)})
    assert (outcome.step, outcome.committed, outcome.problem) == (3, True, "")
    assert not emergency.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert emergency.stopping
    assert emergency.save(store, 4, {"a": torch.ones(3)}).committed
    assert emergency.stopping
    assert [one.step for one in store.list()] == [3, 4]


def test_the_deadline(store: CheckpointStore, emergency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too slow: it says that it was not committed, and the store is as it was."""
    ckpt.save(store, 1, {"a": torch.ones(3)})
    release = threading.Event()
    real = native.write_files

    def slow(*args: Any, **kwargs: Any) -> Any:
        release.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(native, "write_files", slow)
    os.kill(os.getpid(), signal.SIGTERM)
    started = time.monotonic()
    outcome = emergency.save(store, 2, {"a": torch.ones(3)})
    assert time.monotonic() - started < 5
    assert (outcome.committed, outcome.problem) == (False, "not committed within 1 s")
    assert [one.step for one in store.list()] == [1]
    release.set()
    ckpt.wait_all(20)


def test_a_failure_is_an_outcome(store: CheckpointStore, emergency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "write_files", full)
    outcome = emergency.save(store, 2, {"a": torch.ones(3)})
    assert not outcome.committed
    assert "No space left" in outcome.problem


def test_another_saves_failure_is_no_reason(
    store: CheckpointStore, emergency: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last save before the signal failed in the background, and nobody was told yet."""
    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> Any:
            raise OSError(28, "No space left on device")

        patch.setattr(native, "write_files", full)
        failed = ckpt.save_async(store, 1, {"a": torch.ones(3)})
        assert failed._future.exception(30) is not None
    os.kill(os.getpid(), signal.SIGTERM)
    outcome = emergency.save(store, 2, {"a": torch.ones(3)})
    assert (outcome.committed, outcome.problem) == (True, "")
    assert [one.step for one in store.list()] == [2]
    assert "step 1 failed" in caplog.text


def test_a_handler_before_is_called_too() -> None:
    called = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append(number))
    emergency = ckpt.install_signal_handlers(signals=[signal.SIGUSR1])
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (emergency.requested, called) == (True, [signal.SIGUSR1])
    finally:
        emergency.uninstall()
        signal.signal(signal.SIGUSR1, before)


def _wait(pipe: Any) -> None:
    pipe.send("here")
    time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_forked_child_dies_of_them_as_before(emergency: Any, number: int) -> None:
    """It trains nothing: a pool that is left, or a child that is terminated, would be waited for without end."""
    pipe, other = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_wait, args=(other,), daemon=True)
    child.start()
    assert pipe.poll(20)  # Python drops a signal that comes in the middle of a fork
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(10)
    if child.exitcode is None:
        child.kill()
        child.join(10)
    assert child.exitcode == -number
    assert not emergency.requested


def _with_handlers_of_its_own(pipe: Any) -> None:
    mine = ckpt.install_signal_handlers(5.0)
    os.kill(os.getpid(), signal.SIGTERM)
    pipe.send(list(mine))
    mine.uninstall()
    pipe.send(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)


def test_a_forked_child_may_train_itself(emergency: Any) -> None:
    pipe, other = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_with_handlers_of_its_own, args=(other,), daemon=True)
    child.start()
    assert pipe.poll(20)
    assert (pipe.recv(), pipe.recv()) == (["SIGTERM"], True)
    child.join(10)
    assert child.exitcode == 0


def test_a_handler_that_only_c_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls it None, and takes no None back."""
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    real = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: (real(number, handler), None)[1])
    try:
        ckpt.install_signal_handlers(signals=[signal.SIGUSR1]).uninstall()
    finally:
        real(signal.SIGUSR1, before)


def test_what_fails_after_the_commit(store: CheckpointStore, emergency: Any) -> None:
    """Pruning did; the step is there, and nobody is told otherwise."""
    ckpt.save(store, 1, {"a": torch.ones(3)})
    side = places.side_of(store.folder)
    os.makedirs(side, exist_ok=True)
    Path(side, "pins.json").write_text("{")
    outcome = emergency.save(store, 2, {"a": torch.ones(3)}, keep=Keep(last=1))
    assert outcome.committed
    assert re.fullmatch("step 2 is saved, and pruning after it failed: .*pins.json is damaged.*", outcome.problem)
    for number, save in ((3, ckpt.save), (4, lambda *args, **more: ckpt.save_async(*args, **more).wait())):
        with pytest.raises(StorageError, match=f"step {number} is saved, and pruning after it failed"):
            save(store, number, {"a": torch.ones(3)}, keep=Keep(last=1))
    Path(side, "pins.json").unlink()
    assert emergency.save(store, 5, {"a": torch.ones(3)}, keep=Keep(last=1)).problem == ""
    assert [one.step for one in store] == [5]


def test_an_error_of_torchs_is_an_outcome(store: CheckpointStore, emergency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging may run out of a device's memory, or meet one that failed."""

    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(background._Buffers, "take", fail)
    outcome = emergency.save(store, 2, {"a": torch.ones(3)})
    assert (outcome.committed, outcome.problem) == (False, "CUDA out of memory")


def test_usage() -> None:
    with pytest.raises(UsageError, match="positive"):
        ckpt.install_signal_handlers(0)
    failed: list[BaseException] = []

    def install() -> None:
        try:
            ckpt.install_signal_handlers()
        except UsageError as error:
            failed.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert failed


def run_loop(store: CheckpointStore, steps: int, **more: str) -> warm.Python:
    return warm.Python(LOOP, store.backend.location, steps, env=os.environ | more)


def test_the_loop_goes_on_where_it_stopped(store: CheckpointStore, tmp_path: Path) -> None:
    """Interrupted by SIGTERM and started again, it computes what an uninterrupted one computes."""
    child = run_loop(store, 100, STEP_S="0.02")
    while "step 39" not in (line := child.stdout.readline()):
        assert line, "it ended"
    child.send_signal(signal.SIGUSR1)
    child.send_signal(signal.SIGTERM)
    done = child.finish(60)
    assert done.returncode == 0, done
    stopped = int(re.search(r"SIGTERM.*: step (\d+) committed: True", done.stdout)[1])  # type: ignore[index]
    assert stopped in [one.step for one in store]
    second = run_loop(store, 100).finish(60)
    assert second.returncode == 0, second
    assert f"resumed after step {stopped}" in second.stdout
    whole = CheckpointStore(tmp_path / "whole")
    assert run_loop(whole, 100).finish(60).returncode == 0
    one, two = ckpt.load(store, 99), ckpt.load(whole, 99)
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in two["model"])


DEAF = """
import sys, time
from ckptstore.torch import signals
signals.SAME_NOTICE_S = 0.5
signals.install_signal_handlers()
print("ready", flush=True)
time.sleep(60)
"""


def test_one_notice_may_come_twice_and_a_second_one_ends_it() -> None:
    """A scheduler signals all processes of a job, and torchrun passes the same on to its workers: that is one notice."""
    child = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    with child.stdout, child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGTERM)
        time.sleep(0.1)  # or the kernel makes one of them
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.0)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM


RANK = """
import sys, time
import torch, torch.distributed as dist
import ckptstore.torch as ckpt
from ckptstore import CheckpointStore
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
emergency = ckpt.install_signal_handlers(deadline_s=20)
print("ready", flush=True)
saved = []
for step in range(3000):
    weights = torch.ones(8)
    dist.all_reduce(weights)
    time.sleep(0.01)
    if emergency.agree():
        if rank == 0:
            assert emergency.save(CheckpointStore(f"{place}/store"), step, {"step": step}).committed
        saved.append(step)
        dist.barrier()
        print("saved", flush=True)
        if emergency.stopping:
            break
print(saved, flush=True)
time.sleep(1)  # the other's signals may come now
"""


def test_all_ranks_save_at_the_same_step(tmp_path: Path) -> None:
    """Told in different steps, or only one of them: without an agreement one saves or ends, and the others wait for it."""
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) for rank in (0, 1)]
    outputs = []
    with ranks[0], ranks[1]:
        try:
            pipes = [rank.stdout for rank in ranks if rank.stdout is not None]
            assert [pipe.readline() for pipe in pipes] == [b"ready\n"] * 2
            ranks[1].send_signal(signal.SIGUSR1)
            assert [pipe.readline() for pipe in pipes] == [b"saved\n"] * 2
            time.sleep(0.2)
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                rank.send_signal(signal.SIGTERM)
            outputs = [pipe.read().splitlines() for pipe in pipes]
            assert [rank.wait(20) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
    assert outputs[0] == outputs[1]
    steps = [one.step for one in CheckpointStore(tmp_path / "store")]
    assert outputs[0] == [b"saved", str(steps).encode()]
    assert len(steps) == 2
