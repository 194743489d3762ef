"""Whose a draft is, and whether its writer still lives.

A file beside the draft is locked while its writer lives (flock): a dead one's lock frees itself. Where the file system has no
flock, as Lustre and NFS may be mounted, the words in the file do: a process, by its number and its start, of one kernel and one
process namespace. There its death is certain; of another machine, another container or before a reboot nothing can be told,
and a draft counts as left behind once nothing was written to it for LONG_DEAD_S.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from ckptstore import side as side_folders
from ckptstore.lock import NO_FLOCK, LockFile
from ckptstore.sizes import size

OWNER = "owner"  #: beside a draft's files
LONG_DEAD_S = 7 * 86400.0
_NEWBORN_S = 60.0  # what is younger may be alive though nothing is locked: a probe, a draft before its lock
_PATIENCE = 50  # times 20 ms: somebody may just be looking whether it is held
_MAX_BYTES = 4096
_LET_GO = {"pid": 0}  # by a process that goes on


class Life(StrEnum):
    """What is known of a draft's writer."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  #: no flock, and its process is not of this kernel and namespace


class Unsure(NamedTuple):
    """A draft of which it cannot be told whether its writer lives."""

    name: str  #: in the side folder
    size_bytes: int
    idle_s: float  #: nothing was written to it for so long
    writer: str

    @property
    def found(self) -> str:
        """What it is, for people."""
        return (
            f"{self.name} ({size(self.size_bytes)}) is an unfinished save, last written {self.idle_s / 3600:.1f} h ago by "
            f"{self.writer}: whether that lives cannot be told, as this file system has no flock, and it is of another "
            "machine, another container or before a reboot"
        )

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return (
            "Where no save runs, `ckptstore clean --older-than 1h` removes it an hour after its last write; else a save does, "
            f"after {LONG_DEAD_S / 86400:.0f} days."
        )

    @property
    def note(self) -> str:
        """Both."""
        return f"{self.found}. {self.remedy}".rstrip(".")


def create(path: str) -> LockFile:
    """Make the file, which must not exist, and hold it as long as it is open. OSError as it comes."""
    file = LockFile(path, mode=0o600, exclusive=True)
    with contextlib.suppress(OSError):  # no flock: the words do
        fcntl.flock(file, fcntl.LOCK_EX)
    _say(file, _process())
    return file


def take_over(home: str) -> LockFile:
    """Hold the file of a draft that somebody left. BlockingIOError where a living process has it; OSError as it comes."""
    file = LockFile(os.path.join(home, OWNER), mode=0o600)
    try:
        for patience in range(_PATIENCE, -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience:
                    raise
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                if _by_words(file.fileno()) is Life.ALIVE:
                    raise BlockingIOError(f"{_name(_words(file.fileno()))} holds it") from error
                break
        _say(file, _process())
    except BaseException:
        file.close()
        raise
    return file


def let_go(file: LockFile) -> None:
    """Hold it no longer; the draft stays."""
    _say(file, _LET_GO)
    file.close()


def life(home: str) -> Life:
    """Whether somebody holds the draft in this folder. ALIVE also for one so young that its writer may not hold it yet."""
    try:
        descriptor = os.open(os.path.join(home, OWNER), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return Life.DEAD if is_settled(home) else Life.ALIVE
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _by_words(descriptor) if error.errno in NO_FLOCK else Life.ALIVE
    finally:
        os.close(descriptor)
    return Life.DEAD


def is_dead(home: str, *, long_dead_s: float = LONG_DEAD_S) -> bool:
    """Whether the writer is dead, or counts as dead: nothing can be told of it, and nothing was written for so long."""
    found = life(home)
    return found is Life.DEAD or (found is Life.UNKNOWN and idle_s(home) > long_dead_s)


def unsure(side: str) -> Iterator[Unsure]:
    """The drafts in a side folder of whose writers nothing can be told."""
    for name in side_folders.names_in(side):
        home = os.path.join(side, name)
        if name.startswith("save-") and life(home) is Life.UNKNOWN:
            yield Unsure(name, side_folders.size_of(home), idle_s(home), _writer(home))


def is_settled(path: str) -> bool:
    """Whether it is too old for a writer that has not locked anything yet."""
    try:
        return time.time() - os.stat(path).st_mtime > _NEWBORN_S
    except OSError:
        return False  # gone, or not ours to judge


def idle_s(home: str) -> float:
    """How long ago something was written to a draft, by its files' and folders' times; 0 where that cannot be told."""
    try:
        newest = os.stat(home).st_mtime
        for folder, folders, files in os.walk(home):
            newest = max([newest, *(os.lstat(os.path.join(folder, name)).st_mtime for name in (*folders, *files))])
    except OSError:  # somebody is at work there
        return 0.0
    return time.time() - newest


def _process() -> dict[str, Any]:
    return {"host": socket.gethostname(), **_kernel(), "pid": os.getpid(), "started": _start(os.getpid())}


def _kernel() -> dict[str, str]:
    """What a process number is of; empty where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return {"boot": file.read().strip(), "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {}


def _start(pid: int) -> int:
    """When a process started, in ticks since the boot; 0 for one that has ended, -1 where that cannot be seen."""
    try:
        os.kill(pid, 0)  # sees those that /proc may hide
    except ProcessLookupError:
        return 0
    except PermissionError:
        pass  # another user's
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return -1


def _by_words(descriptor: int) -> Life:
    words = _words(descriptor)
    if words == _LET_GO:
        return Life.DEAD
    kernel = _kernel()
    here = {"host": socket.gethostname(), **kernel}
    pid, started = words.get("pid"), words.get("started")
    if not kernel or {key: words.get(key) for key in here} != here or type(pid) is not int or type(started) is not int:
        return Life.UNKNOWN
    if not 0 < pid < 1 << 31 or started <= 0 or (now := _start(pid)) < 0:
        return Life.UNKNOWN
    return Life.ALIVE if now == started else Life.DEAD


def _words(descriptor: int) -> dict[str, Any]:
    """What the file says; empty for one that an earlier version made, or that is damaged."""
    try:
        found = json.loads(os.pread(descriptor, _MAX_BYTES, 0) or b"null")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _say(file: LockFile, words: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a full disk: where there is flock, it is a courtesy; else nothing can be told
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), json.dumps(words).encode(), 0)


def _writer(home: str) -> str:
    try:
        descriptor = os.open(os.path.join(home, OWNER), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return _name({})
    try:
        return _name(_words(descriptor))
    finally:
        os.close(descriptor)


def _name(words: dict[str, Any]) -> str:
    pid, host = words.get("pid"), words.get("host")
    return f"pid {pid} on {host:.100}" if type(pid) is int and isinstance(host, str) else "a process that it does not name"
