"""One writer a run: a dead holder frees itself, a living one is told about, and garbage in the lock file harms nobody."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ckptstore import lock as locks
from ckptstore import recovery
from ckptstore.backends import LocalBackend
from ckptstore.errors import AccessError, BusyError, NotFoundError
from ckptstore.lock import RunLock, busy, read_holder
from ckptstore.plan import Options
from ckptstore.side import side_folder
from tests import trees
from tests.users import NOBODY, as_nobody, open_way_to

HOLD = """
import sys
from ckptstore.lock import RunLock
with RunLock(sys.argv[1], "setup of step 7") as lock:
    lock.update("copying default", 3_000_000_000, 4_000_000_000)
    lock._held.write()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock until its stdin is closed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(folder):
    with RunLock(str(folder), "test"):
        pass


def write_state(folder, **changes):
    state = {
        "host": socket.gethostname(), "pid": 999_999_999, "doing": "setup of step 7", "done_bytes": 1, "total_bytes": 2,
        "started_at_s": time.time() - 60, "heartbeat_at_s": time.time(),
    }  # fmt: skip
    (folder / "lock").write_text(json.dumps(state | changes))


def test_second_is_refused_and_told_how_far_the_first_is(tmp_path, other):
    with pytest.raises(BusyError, match=rf"pid {other.pid} on .*copying default, 3\.00 of 4\.00 GB \(75%\)"):
        take(tmp_path)
    holder = busy(str(tmp_path))
    assert (holder.pid, holder.doing, holder.done_bytes) == (other.pid, "copying default", 3_000_000_000)


def test_free_again_when_the_holder_is_done(tmp_path, other):
    other.communicate("")
    assert busy(str(tmp_path)) is None
    take(tmp_path)


def test_a_killed_holder_frees_its_lock(tmp_path, other):
    """kill -9 leaves its words in the file, and no lock."""
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert read_holder(str(tmp_path / "lock")).pid == other.pid
    assert busy(str(tmp_path)) is None
    take(tmp_path)


def test_two_setups_in_one_process(tmp_path):
    with RunLock(str(tmp_path), "first"), pytest.raises(BusyError, match="first"):
        take(tmp_path)
    take(tmp_path)


def test_setup_refuses_while_another_is_at_work(tmp_path):
    """Through the front door: nothing is copied, and the error is retryable."""
    run = trees.make_run(tmp_path, steps=(46,), logs=False)
    side = side_folder(str(run), f"{run}/default/recover_checkpoint")
    os.makedirs(side)
    with RunLock(side, "setup of step 46"), pytest.raises(BusyError, match="setup of step 46") as caught:
        recovery.setup(LocalBackend(run), options=Options(as_is=True))
    assert caught.value.retryable
    assert os.listdir(side) == ["lock"]
    recovery.setup(LocalBackend(run), options=Options(as_is=True))


def test_heartbeat_from_another_host(tmp_path, monkeypatch):
    """flock may not reach other machines: a fresh heartbeat counts, an old one does not."""
    monkeypatch.setattr(locks, "WATCH_S", 0.05)
    write_state(tmp_path, host="another-node", heartbeat_at_s=time.time() - locks.STALE_S / 2)
    assert busy(str(tmp_path)).host == "another-node"
    with pytest.raises(BusyError, match="another-node"):
        take(tmp_path)
    write_state(tmp_path, host="another-node", heartbeat_at_s=time.time() - locks.STALE_S * 2)
    assert busy(str(tmp_path)) is None
    take(tmp_path)


@pytest.mark.parametrize("ahead_s", [-3600, 3600, 365 * 86400], ids=str)
@pytest.mark.parametrize("lives", [False, True])
def test_another_host_whose_clock_is_wrong(tmp_path, monkeypatch, ahead_s, lives):
    """Dead: it locks nobody out, however far its clock ran ahead. Alive: its beats are seen, and no clock is asked."""
    monkeypatch.setattr(locks, "WATCH_S", 0.3)
    stop = threading.Event()

    def beat() -> None:
        while True:
            write_state(tmp_path, host="another-node", heartbeat_at_s=time.time() + ahead_s, started_at_s=time.time() + ahead_s)
            if not lives or stop.wait(0.05):
                return

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        while not (tmp_path / "lock").exists() or read_holder(str(tmp_path / "lock")) is None:
            time.sleep(0.01)
        if lives:
            with pytest.raises(BusyError, match="another-node") as caught:
                take(tmp_path)
            assert ("ahead" in str(caught.value)) == (ahead_s > 0)
            assert "since -" not in str(caught.value)
        else:
            assert busy(str(tmp_path)) is None
            take(tmp_path)
            assert (tmp_path / "lock").read_bytes() == b""
    finally:
        stop.set()
        heart.join()


def test_a_clock_that_was_set_back_here(tmp_path, monkeypatch):
    """Where there is no flock: the words of a dead process whose number lives, as all do in a container."""

    def none(descriptor, operation):
        raise OSError(errno.ENOSYS, "planted")

    monkeypatch.setattr(locks, "WATCH_S", 0.05)
    monkeypatch.setattr(fcntl, "flock", none)
    write_state(tmp_path, pid=os.getppid(), heartbeat_at_s=time.time() + 86400)
    assert busy(str(tmp_path)) is None
    take(tmp_path)


def test_a_refused_second_leaves_the_first_ones_words(tmp_path, other):
    before = (tmp_path / "lock").read_bytes()
    with pytest.raises(BusyError):
        take(tmp_path)
    after = json.loads((tmp_path / "lock").read_bytes())
    assert {**json.loads(before), "heartbeat_at_s": 0} == {**after, "heartbeat_at_s": 0}


def test_the_heart_beats(tmp_path, monkeypatch):
    """By an event of its own: every beat renews the time that others read."""
    beats = []
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    with RunLock(str(tmp_path), "x") as held:
        write = held._held.write

        def counted():
            write()
            beats.append(read_holder(str(tmp_path / "lock")).heartbeat_at_s)
            if len(beats) == 3:
                held._held._stop.set()

        held._held.write = counted
        held._held.heart.join(10)
    assert len(beats) == 3
    assert beats == sorted(beats)


GARBAGE = [
    b"", b"null", b"[]", b"{", b"\xff" * 100, b"[" * 4000, b'{"host": 1}', b'{"a": 1}', b"x" * 100_000,
    *(
        json.dumps({"host": "h", "pid": 1, "doing": "d", "done_bytes": 0, "total_bytes": 0, "started_at_s": 0,
                    "heartbeat_at_s": 0} | change).encode()
        for change in ({"heartbeat_at_s": "x"}, {"started_at_s": None}, {"host": 5}, {"pid": "1"}, {"total_bytes": [1]},
                       {"heartbeat_at_s": float("nan")}, {"heartbeat_at_s": float("inf")}, {"more": 1})
    ),
]  # fmt: skip


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content[:40]))
def test_garbage_in_the_lock_file_locks_nobody_out(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    assert busy(str(tmp_path)) is None
    take(tmp_path)


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content[:40]))
def test_garbage_in_a_held_lock_file_is_still_held(tmp_path, content):
    with RunLock(str(tmp_path), "x"):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(BusyError):
            take(tmp_path)


def test_long_words_never_leave_a_tail(tmp_path):
    """A shorter line over a longer one must be readable."""
    with RunLock(str(tmp_path), "x") as held:
        held.update("y" * 900, 1, 2)
        held._held.write()
        held.update("short", 1, 2)
        held._held.write()
        assert read_holder(str(tmp_path / "lock")).doing == "short"


def test_a_link_is_not_followed(tmp_path):
    """A link with the lock's name would make root write into what it points to."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(Exception, match="locking"):
        take(tmp_path)
    assert victim.read_text() == "precious"


def test_no_folder(tmp_path):
    with pytest.raises(NotFoundError):
        take(tmp_path / "none")


def test_a_full_disk_does_not_unlock(tmp_path, monkeypatch):
    """The words are a courtesy: without room for them the lock must hold all the same."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with RunLock(str(tmp_path), "x"), pytest.raises(BusyError):
        take(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_without_flock_the_words_decide(tmp_path, monkeypatch, code):
    """Some network file systems have none: who said lately that he is at work here, and lives, is believed."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_state(tmp_path, pid=os.getppid())
    with pytest.raises(BusyError):
        take(tmp_path)
    assert busy(str(tmp_path)).pid == os.getppid()
    for dead in ({"pid": 999_999_999}, {"pid": os.getppid(), "heartbeat_at_s": time.time() - 2 * locks.STALE_S}):
        write_state(tmp_path, **dead)
        assert busy(str(tmp_path)) is None
        take(tmp_path)


def test_no_descriptor_is_lost(tmp_path):
    def descriptors():
        return sorted(os.listdir("/proc/self/fd"))

    with RunLock(str(tmp_path), "x"):
        before = descriptors()
        for _ in range(5):
            with pytest.raises(BusyError):
                take(tmp_path)
        assert descriptors() == before


@pytest.mark.root
def test_roots_lock_does_not_lock_out_the_user_who_trains(tmp_path):
    """The side folder is the user's: so is the lock in it."""
    open_way_to(tmp_path / "x")
    os.chown(tmp_path, NOBODY, NOBODY)
    take(tmp_path)
    assert as_nobody(lambda: take(tmp_path)) is None


@pytest.mark.root
def test_a_folder_that_one_may_not_write(tmp_path):
    open_way_to(tmp_path / "x")
    assert isinstance(as_nobody(lambda: take(tmp_path)), AccessError)
