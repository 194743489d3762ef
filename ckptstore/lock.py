"""One writer a run. The lock says who holds it and how far it is, so that a second `setup` can show that.

flock decides on one machine: a dead holder's lock frees itself. Where file systems don't carry flock to other machines, the
heartbeat does: a holder on another host counts as alive while its heartbeat is within STALE_S of this machine's clock. Where it
is not, the clocks differ, or it is dead: who wants the lock watches it for WATCH_S, and any beat says that it lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ckptstore import parallel
from ckptstore.errors import BusyError, from_os_error
from ckptstore.untrusted import open_regular

STALE_S = 120.0
HEARTBEAT_S = 5.0
WATCH_S = 10.0  #: ten beats: a network file system may show an older one for some seconds
NO_FLOCK = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  #: what flock says where a file system has none


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock, as it last said."""

    host: str
    pid: int
    doing: str
    done_bytes: int
    total_bytes: int
    started_at_s: float
    heartbeat_at_s: float

    def __str__(self) -> str:
        beat_s = self.heartbeat_at_s - time.time()  # a beat of the future tells how far its clock is ahead
        ahead = f", whose clock is {beat_s:.0f} s ahead," if beat_s > STALE_S else ""
        since_s = max(time.time() + (beat_s if ahead else 0) - self.started_at_s, 0)
        text = f"pid {self.pid} on {self.host}{ahead} since {since_s:.0f} s: {self.doing}"
        if self.total_bytes:
            text += (
                f", {self.done_bytes / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB ({self.done_bytes / self.total_bytes:.0%})"
            )
        return text


class LockFile(io.FileIO):
    """A file to lock: closed, and so let go of, with its object at the latest. Made where it is missing; raises OSError."""

    def __init__(self, path: str, *, mode: int, exclusive: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0)
        super().__init__(path, "r+", opener=lambda path, _: os.open(path, flags, mode))

    def __del__(self) -> None:
        self.close()  # without the warning of other files: Ctrl-C may come before anybody has hold of it


class RunLock:
    """A lock on a run's side folder; a context manager. Not reentrant; `update` may be called from any thread.

    It is let go of with its object at the latest: Ctrl-C may come where no `with` has hold of it yet, or any more.
    """

    def __init__(self, side: str, doing: str) -> None:
        self._path = os.path.join(side, "lock")
        self._held = _Held(doing)
        weakref.finalize(self, self._held.release).atexit = False

    def __enter__(self) -> RunLock:
        try:
            self._enter()
        except BaseException:
            self._held.release()
            raise
        return self

    def _enter(self) -> None:
        held = self._held
        try:
            held.file = LockFile(self._path, mode=0o644)
            with contextlib.suppress(PermissionError):  # root's setup must not lock out the user who trains
                side = os.stat(os.path.dirname(self._path))
                os.fchown(held.file.fileno(), side.st_uid, side.st_gid)
        except OSError as error:
            raise from_os_error(error, doing="locking", path=self._path) from error
        holder = read_holder(self._path)
        taken = self._take(held.file, holder) and not (holder and _alive_elsewhere(holder, self._path, sure=True))
        if not taken:
            raise BusyError(
                f"another ckptstore is at work on this run: {holder or 'it has not said who it is'}",
                hint="Wait for it, or stop that process; a dead one's lock frees itself, that of another machine after "
                f"{2 * STALE_S / 60:.0f} minutes at most.",
            )
        held.ours = True
        with contextlib.suppress(OSError):  # what it says is a courtesy: on a full disk the lock holds all the same
            held.write()
        parallel.start(held.heart)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._held.release()
        except BaseException:  # Ctrl-C
            self._held.release()
            raise

    def update(self, doing: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """What to tell others from the next heartbeat on."""
        self._held.state |= {"doing": doing, "done_bytes": done_bytes, "total_bytes": total_bytes}

    def _take(self, file: LockFile, holder: Holder | None) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise from_os_error(error, doing="locking", path=self._path) from error
            # No flock here: what the holder last said has to do.
            return holder is None or holder.pid == os.getpid() or not _alive_here(holder, self._path)
        return True


class _Held:
    """What is locked, and the heartbeat in it. It knows nothing of its RunLock, which may go while the thread lives."""

    def __init__(self, doing: str) -> None:
        self.state: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "doing": doing,
            "done_bytes": 0,
            "total_bytes": 0,
            "started_at_s": time.time(),
        }
        self.file: LockFile | None = None
        self.ours = False
        self.heart = threading.Thread(target=self._beat, name="ckptstore-heartbeat", daemon=True)
        self._written_bytes = 512
        self._stop = threading.Event()

    def write(self) -> None:
        assert self.file is not None
        data = json.dumps(self.state | {"heartbeat_at_s": time.time()}).encode()
        # One write over the old text, padded: readers never see half of it cut off, nor the end of a longer one.
        self._written_bytes = max(self._written_bytes, len(data))
        os.pwrite(self.file.fileno(), data.ljust(self._written_bytes), 0)

    def release(self) -> None:
        """Let go of it, or finish that; once it is free, nothing."""
        if self.file is None or self.file.closed or self.state["pid"] != os.getpid():  # a forked child's parent holds it
            return
        self._stop.set()
        if self.heart.ident is not None:
            self.heart.join()
        if self.ours:
            # Emptied, not deleted: a waiter that has it open would lock a file that nobody else sees.
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), 0)
            with contextlib.suppress(OSError):  # closing alone frees nothing that a child, forked meanwhile, still has open
                fcntl.flock(self.file, fcntl.LOCK_UN)
        self.file.close()

    def _beat(self) -> None:
        while not self._stop.wait(min(HEARTBEAT_S, 1.0)):
            with contextlib.suppress(OSError):  # a full disk must not end the copy for want of a heartbeat
                self.write()


def read_holder(path: str) -> Holder | None:
    """Who holds (or last held, and died) the lock at `path`; None when it is free or unreadable."""
    try:
        with open_regular(path) as file:
            state = json.loads(file.read(65536) or b"null")
        holder = Holder(**state) if isinstance(state, dict) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return holder if holder is not None and _is_plain(holder) else None


def _is_plain(holder: Holder) -> bool:
    numbers = (holder.done_bytes, holder.total_bytes, holder.started_at_s, holder.heartbeat_at_s)
    return (
        isinstance(holder.host, str)
        and isinstance(holder.doing, str)
        and type(holder.pid) is int
        and 0 <= holder.pid < 1 << 31
        and all(type(number) in (int, float) and abs(number) < 1e18 for number in numbers)
    )


def busy(side: str) -> Holder | None:
    """The live holder of the run's lock, None when it is free."""
    path = os.path.join(side, "lock")
    holder = read_holder(path)
    if holder is None:
        return None
    if _alive_elsewhere(holder, path):
        return holder
    with contextlib.suppress(OSError), _opened(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder
        except OSError as error:
            if error.errno in NO_FLOCK and _alive_here(holder, path):
                return holder
    return None


def has_flock(side: str) -> bool | None:
    """Whether the file system of a side folder has flock; None where no lock file tells. Changes nothing."""
    with contextlib.suppress(FileNotFoundError), _opened(os.path.join(side, "lock")) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            return None if error.errno not in NO_FLOCK else False
        return True
    return None


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _alive_here(holder: Holder, path: str) -> bool:
    return os.path.exists(f"/proc/{holder.pid}") and _beats(holder, path)


def _alive_elsewhere(holder: Holder, path: str, *, sure: bool = False) -> bool:
    return holder.host != socket.gethostname() and _beats(holder, path, sure=sure)


def _beats(holder: Holder, path: str, *, sure: bool = False) -> bool:
    """Whether the holder lives: by the clocks where they can tell, else by what it writes meanwhile.

    A beat of the future has no age. An old one is a dead holder's, unless one must be `sure`: its clock may be behind.
    """
    age_s = time.time() - holder.heartbeat_at_s
    if abs(age_s) < STALE_S:
        return True
    if age_s > 0 and not sure:
        return False
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(0.2, WATCH_S))
        if read_holder(path) != holder:
            return True
    return False
