"""What the destination's file system really does, found out on scratch folders there, both sides checked.

Rented boxes put runs on network volumes, FUSE mounts and container overlays: some refuse the flags of renameat2, some
report an exchange done and have lost one side.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from dataclasses import dataclass

from ckptstore import native
from ckptstore.errors import from_os_error

NETWORK = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "lustre",
        "ceph",
        "beegfs",
        "gpfs",
        "9p",
        "virtiofs",
        "wekafs",
        "glusterfs",
    }
)


@dataclass(frozen=True, slots=True)
class Medium:
    """Facts about one folder's file system. Each was tried, none is looked up in a table of names."""

    file_system: str
    network: bool  #: free space is the server's word, and quotas are unseen
    overlay: bool  #: a container's own layer: gone with the container
    exchange: bool
    noreplace: bool
    direct: bool
    folder_fsync: bool
    fallocate: bool

    @property
    def method(self) -> str:
        """How a slot is replaced here."""
        return "exchange" if self.exchange else "rename"

    @property
    def durability(self) -> str:
        """What a power cut can do after a commit here, in words."""
        if not self.folder_fsync:
            return "this file system does not sync folders: a power cut right after may bring the old slot back"
        if not self.exchange:
            return (
                "durable; but this file system cannot exchange two folders: a crash in the instant between two renames leaves "
                "no slot until the next ckptstore command, and AReaL refuses to resume (--new-trial has no such instant)"
            )
        return "durable: files, folders and renames were synced"


def probe(folder: str) -> Medium:
    """Try everything in a scratch folder below `folder`, and leave nothing behind.

    StorageError where nothing can be written.
    """
    scratch = os.path.join(folder, f"probe-{secrets.token_hex(8)}")
    try:
        os.mkdir(scratch, 0o700)
    except OSError as error:
        raise from_os_error(error, doing="creating a folder in", path=folder) from error
    try:
        kind = file_system(folder)
        return Medium(
            file_system=kind,
            network=is_network(kind),
            overlay=kind in ("overlay", "aufs"),
            exchange=_exchanges(scratch),
            noreplace=_keeps_existing(scratch),
            direct=native.supports_direct(scratch),
            folder_fsync=_syncs_folders(scratch),
            fallocate=_allocates(scratch),
        )
    except OSError as error:
        raise from_os_error(error, doing="probing", path=folder) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make(path: str, mark: str) -> str:
    os.mkdir(path)
    with open(os.path.join(path, "mark"), "w", encoding="ascii") as file:
        file.write(mark)
    return path


def _mark(path: str) -> str:
    try:
        with open(os.path.join(path, "mark"), encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _exchanges(scratch: str) -> bool:
    a, b = _make(os.path.join(scratch, "a"), "a"), _make(os.path.join(scratch, "b"), "b")
    try:
        native.rename_exchange(a, b)
    except OSError:
        return False
    return _mark(a) == "b" and _mark(b) == "a" and sorted(os.listdir(scratch)) == ["a", "b"]


def _keeps_existing(scratch: str) -> bool:
    c, d = _make(os.path.join(scratch, "c"), "c"), os.path.join(scratch, "d")
    os.mkdir(d)  # empty: the case that a plain rename silently replaces
    try:
        native.rename_noreplace(c, d)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            return False
    else:
        return False
    try:
        native.rename_noreplace(c, os.path.join(scratch, "e"))
    except OSError:
        return False
    return _mark(os.path.join(scratch, "e")) == "c" and not os.path.lexists(c)


def _syncs_folders(scratch: str) -> bool:
    try:
        native.fsync_path(scratch)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            return False
        raise
    return True


def _allocates(scratch: str) -> bool:
    # The system call itself: posix_fallocate imitates it by writing zeros where a file system has none.
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is None:
        return False
    with open(os.path.join(scratch, "allocated"), "wb") as file:
        return int(call(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(1 << 16))) == 0


def file_system(path: str) -> str:
    """The type of the file system that holds `path`, by its mount point; "unknown" where that can't be read."""
    path = os.path.realpath(path)
    found, longest = "unknown", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                left, _, right = line.partition(" - ")
                mount = _unescape(left.split()[4])
                # Later lines cover earlier ones at the same place.
                if len(mount) >= longest and (path == mount or path.startswith(mount.rstrip("/") + "/")):
                    found, longest = right.split()[0], len(mount)
    except (OSError, IndexError):
        return "unknown"
    return found


def _unescape(mount: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount)


def is_network(kind: str) -> bool:
    """Whether free space on such a file system is somebody else's to give (quotas unseen)."""
    return kind in NETWORK or kind.startswith("fuse")
