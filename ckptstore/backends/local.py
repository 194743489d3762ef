"""LocalBackend: a folder of a local or mounted file system."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ckptstore import native
from ckptstore.backends.base import Backend, Blob, Fill
from ckptstore.errors import CkptStoreError, NotFoundError, StorageError, from_os_error
from ckptstore.model import DRAFT_PREFIX, MANIFEST_NAME

if TYPE_CHECKING:
    from typing_extensions import Buffer


_MOST_BYTES = 1 << 26  #: of one call: Ctrl-C waits for no more


class LocalBackend(Backend):
    """Keys are paths below one folder."""

    is_folder = True

    def __init__(self, root: str | Path) -> None:
        self.location = os.path.abspath(root)

    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Backend.get."""
        with self._open(key) as descriptor:
            wanted = max(os.fstat(descriptor).st_size - offset_bytes, 0)
            if length_bytes is not None:
                wanted = min(wanted, length_bytes)
            parts = []
            while wanted > 0 and (data := os.pread(descriptor, min(wanted, _MOST_BYTES), offset_bytes)):
                parts.append(data)
                offset_bytes += len(data)
                wanted -= len(data)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextlib.contextmanager
    def reader(self, key: str) -> Iterator[Fill]:
        """See Backend.reader."""
        with self._open(key) as descriptor:

            def fill(offset_bytes: int, memory: memoryview) -> int:
                filled = 0
                while filled < len(memory) and (
                    count := os.preadv(descriptor, [memory[filled : filled + _MOST_BYTES]], offset_bytes + filled)
                ):
                    filled += count
                return filled

            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # small ranges: the kernel shall read ahead
            yield fill

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[int]:
        """A descriptor of a regular file; what fails while it is used, too, is said as an error of reading it."""
        try:
            descriptor = open_beneath(self.location, key)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise StorageError(f"reading {self.location}/{key}: not a regular file", operation="open", path=key)
                yield descriptor
            finally:
                os.close(descriptor)
        except CkptStoreError:  # some of which are OSErrors too
            raise
        except OSError as error:
            raise from_os_error(error, doing="reading", path=f"{self.location}/{key}") from error

    def tree(self, prefix: str = "", *, max_depth: int = 4) -> dict[str, native.Folder]:
        """See Backend.tree."""
        path = os.path.join(self.location, prefix) if prefix else self.location
        return native.scan_tree(path, max_depth=max_depth, wanted=MANIFEST_NAME)

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """See Backend.list."""
        try:
            tree = self.tree(prefix, max_depth=64)
        except NotFoundError:
            return
        for folder, found in tree.items():
            above = "/".join(filter(None, (prefix, folder)))
            for entry in found.entries:
                if stat.S_ISREG(entry.mode) and not entry.name.startswith(DRAFT_PREFIX):
                    yield Blob(f"{above}/{entry.name}" if above else entry.name, entry.size_bytes, entry.mtime_ns)

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """See Backend.put."""
        self._write(key, (data,), if_absent=if_absent)

    def put_parts(self, key: str, parts: Iterable[Buffer], *, part_bytes: int, parallel: int = 1) -> None:
        """See Backend.put_parts."""
        failed: list[BaseException] = []
        try:
            self._write(key, self._paid(parts, failed), if_absent=False)
        except CkptStoreError:
            if failed:
                raise failed[0] from None
            raise

    def _write(self, key: str, parts: Iterable[Buffer], *, if_absent: bool) -> None:
        """Under a name of its own first, durable, then renamed: readers see all of it or nothing."""
        path = self._path(key)
        draft = os.path.join(os.path.dirname(path), f"{DRAFT_PREFIX}{secrets.token_hex(8)}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(draft, "xb") as file:
                for part in parts:
                    file.write(part)
                    del part
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                os.link(draft, path)
            else:
                os.rename(draft, path)
            native.fsync_path(os.path.dirname(path))
        except OSError as error:
            raise from_os_error(error, doing="writing", path=f"{self.location}/{key}") from error
        finally:
            _remove(draft)

    def delete(self, key: str) -> None:
        """See Backend.delete."""
        path = self._path(key)
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, doing="removing", path=f"{self.location}/{key}") from error

    def _path(self, key: str) -> str:
        if not _is_plain(key):
            raise NotFoundError(f"{key!r} is not a relative path of a file below {self.location}")
        return os.path.join(self.location, key)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return


def _is_plain(key: str) -> bool:
    return not any(component in ("", ".", "..") for component in key.split("/")) and "\0" not in key


def open_beneath(root: str, key: str) -> int:
    """A read-only descriptor of `root`/`key`, following no link below `root` (ELOOP). The caller closes it."""
    if not _is_plain(key):
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
