"""Folders saved in the background, without torch; and saves beside forks, signals and ends of all kinds."""

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

from ckptstore import CheckpointStore, Keep, native, wait_all
from ckptstore.errors import BusyError, CkptStoreError, NotFoundError, RefusedError, SourceChangedError, UsageError
from ckptstore.lock import RunLock
from ckptstore.saves import background, steps
from tests.crashing import content, without_manifest
from tests.test_steps import step_folder, write


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", "one")


class Gate:
    """Holds every copy until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: BaseException | None = None
        self.options: list[native.CopyOptions] = []
        self.real = native.copy_files
        patch.setattr(native, "copy_files", self.copy_files)

    def copy_files(self, *args: Any, **kwargs: Any) -> Any:
        self.options.append(kwargs["options"])
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
    for line in background._lines.values():
        if line.last is not None and line.last._future is not None:
            line.last._future.exception(30)


def numbers(store: CheckpointStore) -> list[int]:
    return [one.step for one in store.list()]


def test_a_folder_in_the_background(store: CheckpointStore, source: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged when all is copied, and not before; then the folder may go."""
    may_commit = threading.Event()
    commit = steps.commit

    def slow_commit(*args: Any, **kwargs: Any) -> Any:
        assert may_commit.wait(30)
        return commit(*args, **kwargs)

    monkeypatch.setattr(steps, "commit", slow_commit)
    before = content(source)
    handle = store.save_async(3, source, metrics={"loss": 2})
    assert gate.reached.wait(10)
    assert (handle.staged, handle.committed, handle.failed, handle.skipped) == (False, False, False, False)
    gate.open.set()
    assert handle._staged.wait(10)
    assert (handle.staged, handle.committed) == (True, False)
    for path in sorted(source.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    may_commit.set()
    manifest = handle.wait(30)
    assert manifest is not None
    assert (handle.committed, manifest.metrics, manifest.source) == (True, {"loss": 2.0}, "source")
    assert without_manifest(content(step_folder(store, 3))) == before
    assert store.verify(3).ok
    assert gate.options[0].nice == 10
    assert repr(handle) == "SaveHandle(step=3, committed)"


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_the_folder_as_it_was_at_the_call(store: CheckpointStore, source: Path, gate: Gate, how: str) -> None:
    """Never a mix of two: what changes before it is copied fails the save; what comes later is not in it."""
    handle = store.save_async(1, source)
    assert gate.reached.wait(10)
    (source / "later.bin").write_bytes(b"x")
    if how == "changed":
        (source / "weights.bin").write_bytes(b"two" * 3000)
    else:
        (source / "weights.bin").unlink()
    gate.open.set()
    with pytest.raises((SourceChangedError, NotFoundError)):
        handle.wait(30)
    assert handle.failed
    assert not step_folder(store, 1).exists()
    store.save_async(2, write(source, "two")).wait(30)
    assert {entry.path for entry in _manifest(store, 2)} == {"weights.bin", "optim/rank0.pt", "empty.txt", "later.bin"}


def _manifest(store: CheckpointStore, step: int) -> Any:
    from ckptstore.parts import read_manifest

    return read_manifest(store.backend, f"step-{step}").files


def test_busy_and_keep(store: CheckpointStore, source: Path, gate: Gate) -> None:
    first = store.save_async(1, source)
    assert gate.reached.wait(10)
    skipped = store.save_async(2, source, on_busy="skip")
    assert (skipped.skipped, skipped.staged, skipped.committed, skipped.wait()) == (True, False, False, None)
    with pytest.raises(BusyError, match="step 1 is still in flight"):
        store.save_async(3, source, on_busy="raise")
    with pytest.raises(UsageError, match="on_busy"):
        store.save_async(3, source, on_busy="never")  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        first.wait(0.01)
    waiting = threading.Thread(target=lambda: store.save_async(4, source, keep=Keep(last=1)).wait())
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    gate.open.set()
    waiting.join(30)
    assert numbers(store) == [4]


def test_a_failure_is_logged_and_raised_at_the_next_call(
    store: CheckpointStore, source: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open.set()
    gate.error = OSError(28, "No space left on device")
    with caplog.at_level(logging.ERROR, "ckptstore"):
        store.save_async(1, source)
        with pytest.raises(OSError, match="No space left"):
            store.save_async(2, source)
    assert "step 1 failed: [Errno 28]" in caplog.text
    store.save_async(3, source)
    with pytest.raises(OSError, match="No space left"):
        wait_all(30)
    wait_all(30)
    gate.error = None
    store.save_async(4, source).wait(30)
    assert numbers(store) == [4]


def test_all_are_waited_for_though_one_fails(
    store: CheckpointStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = CheckpointStore(tmp_path / "slow")
    real, failed = native.copy_files, threading.Event()

    def copy_files(source: str, destination: str, *args: Any, **kwargs: Any) -> Any:
        if destination.startswith(store.folder):
            failed.set()
            raise OSError(28, "No space left on device")
        assert failed.wait(10)
        threading.Event().wait(0.3)
        return real(source, destination, *args, **kwargs)

    monkeypatch.setattr(native, "copy_files", copy_files)
    store.save_async(1, source)
    slow = other.save_async(1, source)
    with pytest.raises(OSError, match="No space left"):
        wait_all(30)
    assert slow.committed


def test_what_cannot_be_saved_is_said_at_once(store: CheckpointStore, source: Path, tmp_path: Path) -> None:
    with pytest.raises(CkptStoreError):
        store.save_async(1, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no files"):
        store.save_async(1, tmp_path / "empty")
    (source / "link").symlink_to("weights.bin")
    with pytest.raises(RefusedError, match="link"):
        store.save_async(1, source)
    assert not Path(store.folder).exists()


# --- forks ---------------------------------------------------------------------------------------------------------


def in_a_child(work: Any) -> int:
    """The code that a forked child ends with, by `sys.exit` and all that runs then."""
    script = os.fork()
    if script == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])


def test_a_child_has_no_saves_and_can_save(store: CheckpointStore, source: Path, gate: Gate, tmp_path: Path) -> None:
    """While its parent's is in flight: the child neither waits for it, nor ends it, nor is kept from its own."""
    handle = store.save_async(1, source)
    assert gate.reached.wait(10)
    draft = next(Path(steps.side_of(store.folder)).glob("save-*"))

    def work() -> int:
        gate.open.set()  # of the child's own memory
        wait_all(1)
        try:
            handle.wait(1)
        except UsageError:
            CheckpointStore(tmp_path / "other").save_async(5, source).wait(20)
            CheckpointStore(store.folder).save_async(6, source).wait(20)
            return 0
        return 1

    assert in_a_child(work) == 0
    assert draft.is_dir()
    gate.open.set()
    handle.wait(30)
    assert numbers(store) == [1, 6]
    assert store.verify(1).ok
    assert CheckpointStore(tmp_path / "other").verify(5).ok


def test_a_child_does_not_abandon_its_parents_draft(store: CheckpointStore, source: Path) -> None:
    """Whatever runs in it at its end: finalizers and `finally` of what it was forked from."""
    draft = steps.begin(store.folder, 1)
    digests = native.copy_files(source, draft.path, steps.files_in(str(source))).digests

    def work() -> int:
        steps.abandon(draft)
        return 0

    assert in_a_child(work) == 0
    steps.commit(draft, digests)
    assert store.verify(1).ok


def test_a_child_that_lives_on_holds_no_lock(store: CheckpointStore, source: Path) -> None:
    """A data loader's worker, forked while the store was locked, has the lock's file open for as long as it lives."""
    store.save(1, source)
    reading, writing = os.pipe()
    with RunLock(steps.side_of(store.folder), "a test"):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent closes it
            os._exit(0)
    os.close(reading)
    try:
        with RunLock(steps.side_of(store.folder), "another"):
            pass
        store.save(2, source)
    finally:
        os.close(writing)
        os.waitpid(child, 0)
    assert numbers(store) == [1, 2]


# --- ends ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from ckptstore import CheckpointStore, native
store, source, how = CheckpointStore(sys.argv[1]), sys.argv[2], sys.argv[3]
real = native.copy_files
def slow(*args, **kwargs):
    print("copying", flush=True)
    time.sleep(float(sys.argv[4]))
    if how == "fail":
        raise OSError(28, "No space left on device")
    return real(*args, **kwargs)
store.save(1, source)
native.copy_files = slow
store.save_async(2, source)
if how == "raise":
    raise RuntimeError("training failed")
if how == "exit":
    sys.exit(3)
if how == "fork":
    if os.fork() == 0:
        sys.exit(0)     # an orderly end, with all finalizers, while its parent saves
    os.wait()
if how == "sleep":
    time.sleep(60)
"""


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 12, 2), reason="this Python can start no thread at its exit")
@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 1), ("exit", 3), ("fork", 0)])
def test_a_save_in_flight_is_finished(store: CheckpointStore, source: Path, how: str, code: int) -> None:
    words = [sys.executable, "-c", SCRIPT, store.folder, source, how, "0.5"]
    done = subprocess.run(words, capture_output=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert numbers(store) == [1, 2]
    assert store.verify(2).ok


def test_a_failure_at_exit_is_said(store: CheckpointStore, source: Path) -> None:
    """Nobody is left to raise it to: it is on stderr."""
    words = [sys.executable, "-c", SCRIPT, store.folder, source, "fail", "0.1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert "the background save of step 2 failed: [Errno 28] No space left on device" in done.stderr
    assert numbers(store) == [1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_killed_while_it_copies(store: CheckpointStore, source: Path, name: str) -> None:
    words = [sys.executable, "-c", SCRIPT, store.folder, source, "sleep", "30"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"copying\n"
        os.kill(child.pid, getattr(signal, name))
        assert child.wait(20) == -getattr(signal, name)
    assert numbers(store) == [1]
    assert len(steps.leftovers(store.folder)) == 1
    store.save(2, source)
    assert steps.leftovers(store.folder) == []
