"""A folder of a backend as a backend of its own: connections, credentials and bandwidth are shared, and opened once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ckptstore.backends.base import Backend, Blob

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Below(Backend):
    """What lies below `folder` of `backend`. Errors and thread-safety are the backend's."""

    def __init__(self, backend: Backend, folder: str) -> None:
        self.location = f"{backend.location}/{folder}"
        self.is_folder = backend.is_folder
        self.creates_atomically = backend.creates_atomically
        self._backend, self._folder = backend, folder

    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """See Backend.get."""
        return self._backend.get(self._key(key), offset_bytes=offset_bytes, length_bytes=length_bytes)

    def view(self, key: str, offset_bytes: int, length_bytes: int) -> Buffer:
        """See Backend.view."""
        return self._backend.view(self._key(key), offset_bytes, length_bytes)

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """See Backend.list."""
        for blob in self._backend.list(self._key(prefix) if prefix else self._folder):
            yield blob._replace(key=blob.key.removeprefix(f"{self._folder}/"))

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """See Backend.put."""
        self._backend.put(self._key(key), data, if_absent=if_absent)

    def put_parts(self, key: str, parts: Iterable[Buffer], *, part_bytes: int, parallel: int = 1) -> None:
        """See Backend.put_parts."""
        self._backend.put_parts(self._key(key), parts, part_bytes=part_bytes, parallel=parallel)

    def replace(self, key: str, data: Buffer, *, expected: bytes) -> None:
        """See Backend.replace."""
        self._backend.replace(self._key(key), data, expected=expected)

    def delete(self, key: str) -> None:
        """See Backend.delete."""
        self._backend.delete(self._key(key))

    def _key(self, key: str) -> str:
        return f"{self._folder}/{key}" if key else ""  # the empty key is refused as ever
