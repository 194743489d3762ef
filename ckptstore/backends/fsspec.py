"""FsspecBackend: any URL that an fsspec file system serves (memory://, sftp://, hdfs://, hf://, …).

What fsspec promises is what is kept here: an exclusive create is as atomic as the file system makes it, and a key that is being
written may be seen unfinished where the file system shows it. A checkpoint is not taken for whole by either: its manifest
comes last, and says how long every file is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ckptstore.backends.base import Backend, Blob
from ckptstore.errors import AlreadyExistsError, CkptStoreError, NotFoundError, StorageError, UsageError, from_os_error
from ckptstore.model import DRAFT_PREFIX

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What file systems raise for the medium's failures, beside OSError: their clients' own classes derive from these.
_FAILURES = (OSError, ValueError, RuntimeError, EOFError, NotImplementedError)


class FsspecBackend(Backend):
    """Keys below one path of an fsspec file system. Thread-safe where that is."""

    creates_atomically = False

    def __init__(self, url: str) -> None:
        self.location = url
        try:
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            scheme = url.partition("://")[0]
            raise UsageError(
                f"{scheme}:// locations: {' '.join(str(error).split())[:200]}",
                hint="fsspec serves them once the library that it names is installed.",
            ) from error
        self._root = str(root).rstrip("/")

    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Backend.get."""
        path = self._path(key)
        if length_bytes == 0:
            return b""
        try:
            size = int(self._files.info(path)["size"])
            end = size if length_bytes is None else min(size, offset_bytes + length_bytes)
            if end <= offset_bytes:
                return b""
            self._pay(end - offset_bytes)
            return bytes(self._files.cat_file(path, start=offset_bytes, end=end))
        except _FAILURES as error:
            raise self._error(error, "reading", key) from error

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """See Backend.list."""
        below = self._path(prefix) if prefix else self._root
        try:
            self._files.invalidate_cache()  # what others wrote since must be seen
            found: dict[str, Any] = self._files.find(below, detail=True)
        except FileNotFoundError:
            return
        except _FAILURES as error:
            raise self._error(error, "listing", prefix) from error
        cut = len(self._root) + 1 if self._root else 0
        for path, info in found.items():
            if info.get("type") == "file":
                yield Blob(path[cut:], int(info.get("size") or 0), _when_ns(info))

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """See Backend.put."""
        path = self._path(key)
        try:
            self._make_room(path)
            if if_absent and self._files.exists(path):
                raise FileExistsError(path)
            self._pay(memoryview(data).nbytes)
            self._files.pipe_file(path, bytes(data), mode="create" if if_absent else "overwrite")
        except FileExistsError:
            raise AlreadyExistsError(f"{self.location}/{key} exists already") from None
        except _FAILURES as error:
            raise self._error(error, "writing", key) from error

    def put_parts(self, key: str, parts: Iterable[Buffer], *, part_bytes: int, parallel: int = 1) -> None:
        """See Backend.put_parts."""
        path = self._path(key)
        failed: list[BaseException] = []
        # Under another name first: some file systems show a file from its first byte on, memory:// even without the old one.
        draft = f"{path.rpartition('/')[0]}/{DRAFT_PREFIX}{secrets.token_hex(8)}"
        try:
            self._make_room(path)
            try:
                with self._files.open(draft, "wb", block_size=part_bytes) as file:
                    for part in self._paid(parts, failed):
                        file.write(part)
                        del part
                self._files.mv(draft, path)
            except BaseException:
                if self._files.exists(draft):
                    self._files.rm_file(draft)
                raise
        except _FAILURES as error:
            if failed:
                raise failed[0] from None
            raise self._error(error, "writing", key) from error

    def delete(self, key: str) -> None:
        """See Backend.delete."""
        path = self._path(key)
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return
        except _FAILURES as error:
            raise self._error(error, "removing", key) from error

    def _make_room(self, path: str) -> None:
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _path(self, key: str) -> str:
        if any(component in ("", ".", "..") for component in key.split("/")):
            raise NotFoundError(f"{key!r} is no key below {self.location}")
        return f"{self._root}/{key}"

    def _error(self, error: Exception, doing: str, key: str) -> CkptStoreError:
        where = f"{self.location}/{key}" if key else self.location
        if isinstance(error, OSError):
            if isinstance(error, FileNotFoundError):
                return NotFoundError(f"{doing} {where}: there is no such key")
            return from_os_error(error, doing=doing, path=where)
        return StorageError(f"{doing} {where}: {' '.join(str(error).split())[:300]}", operation=doing, path=where)


def _when_ns(info: dict[str, Any]) -> int:
    """When the file was written, by whichever name the file system has for it; 0 where it tells none."""
    for name in ("mtime", "created", "last_modified", "LastModified", "updated"):
        value = info.get(name)
        if isinstance(value, int | float):
            return int(value * 1e9)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
    return 0
