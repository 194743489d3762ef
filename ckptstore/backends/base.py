"""The Backend contract: keys to bytes on one medium."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ckptstore.native import Folder


class Backend(ABC):
    """Read access to a tree of keys. A key is a relative path with `/`; thread-safe; concurrency is threads.

    Errors: a missing key is NotFoundError, a denied one AccessError, any other failure of the medium StorageError.
    """

    #: What to print and to join keys to: an absolute path, or a URL without credentials.
    location: str

    @abstractmethod
    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """The bytes of `key` from `offset_bytes`; fewer than `length_bytes` only where the file ends.

        Links are never followed, and only regular files are read.
        """

    @abstractmethod
    def tree(self, prefix: str = "", *, max_depth: int = 4) -> dict[str, Folder]:
        """All folders at or below `prefix` ("" first, paths relative to it) with their entries, links not followed.

        Where the medium gives it with the listing, a folder comes with the `content` of its MANIFEST_NAME.
        A folder that cannot be read is there with its errno and no entries. A missing `prefix` is NotFoundError.
        """
