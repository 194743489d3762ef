"""LocalBackend: a folder of a local or mounted file system."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.errors import StorageError, from_os_error
from ckptstore.model import MANIFEST_NAME


class LocalBackend(Backend):
    """Keys are paths below one folder."""

    def __init__(self, root: str | Path) -> None:
        self.location = os.path.abspath(root)

    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Backend.get."""
        try:
            descriptor = open_beneath(self.location, key)
        except OSError as error:
            raise from_os_error(error, doing="reading", path=f"{self.location}/{key}") from error
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise StorageError(f"reading {self.location}/{key}: not a regular file", operation="open", path=key)
            wanted = max(info.st_size - offset_bytes, 0)
            if length_bytes is not None:
                wanted = min(wanted, length_bytes)
            parts = []
            while wanted > 0 and (data := os.pread(descriptor, min(wanted, 1 << 26), offset_bytes)):
                parts.append(data)
                offset_bytes += len(data)
                wanted -= len(data)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            raise from_os_error(error, doing="reading", path=f"{self.location}/{key}") from error
        finally:
            os.close(descriptor)

    def tree(self, prefix: str = "", *, max_depth: int = 4) -> dict[str, native.Folder]:
        """See Backend.tree."""
        path = os.path.join(self.location, prefix) if prefix else self.location
        return native.scan_tree(path, max_depth=max_depth, wanted=MANIFEST_NAME)


def open_beneath(root: str, key: str) -> int:
    """A read-only descriptor of `root`/`key`, following no link below `root` (ELOOP). The caller closes it."""
    if any(component in ("", ".", "..") for component in key.split("/")) or "\0" in key:
        raise OSError(errno.ENOENT, "not a relative path of a file below the folder", key)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    *above, name = key.split("/")
    try:
        for component in above:
            inner = os.open(component, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=folder)  # O_NONBLOCK: a fifo must not hang us
    finally:
        os.close(folder)
