"""The Backend contract: keys to bytes on one medium."""

from __future__ import annotations

import contextlib
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from typing import TYPE_CHECKING, NamedTuple

from ckptstore.backends.bandwidth import Bandwidth
from ckptstore.errors import AlreadyExistsError, NotFoundError, StorageError
from ckptstore.native import Entry, Folder

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: From an offset on into memory: how many bytes came, fewer only where the file ends.
Fill = Callable[[int, memoryview], int]


class Blob(NamedTuple):
    """One key as the medium shows it. `mtime_ns`: when the medium got it, which says nothing of the trainer's file."""

    key: str
    size_bytes: int
    mtime_ns: int


class Backend(ABC):
    """A tree of keys. A key is a relative path with `/`; thread-safe; concurrency is threads.

    A put is all or nothing for readers (what fsspec's file systems do is up to them). Errors: a missing key is
    NotFoundError, a denied one AccessError, any other failure of the medium StorageError, after a bounded number of tries.
    """

    #: What to print and to join keys to: an absolute path, or a URL without credentials.
    location: str

    #: Keys are paths of a folder on this machine: times and inodes are the writer's own, and the engine can read it.
    is_folder: bool = False

    #: Bounds the bytes a second that go through; backends that move bytes over a network pay for each request.
    bandwidth: Bandwidth | None = None

    #: Of several that create one key at once, exactly one is told that it did.
    creates_atomically: bool = True

    @abstractmethod
    def get(self, key: str, *, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
        """The bytes of `key` from `offset_bytes`; fewer than `length_bytes` only where the file ends.

        Links are never followed, and only regular files are read.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Blob]:
        """All keys below the folder `prefix` ("": all) in one pass, in no order; nothing where there is none."""

    @abstractmethod
    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Write `data` (any contiguous buffer) as `key`. With `if_absent` AlreadyExistsError where the key is there."""

    @abstractmethod
    def put_parts(self, key: str, parts: Iterable[Buffer], *, part_bytes: int, parallel: int = 1) -> None:
        """Write what `parts` yields, each of `part_bytes` but the last; at most `parallel` + 2 of them in memory.

        What `parts` raises is raised, and nothing is visible then. Each part is held until it needs not be sent again, and no
        longer: none is held for the next one to come. `parts` may use its buffer again then.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is no error."""

    def replace(self, key: str, data: Buffer, *, expected: bytes) -> None:
        """Overwrite `key` where it still holds `expected`, else AlreadyExistsError. RefusedError where a store cannot tell.

        As atomic as the medium's creation is (`creates_atomically`).
        """
        if self.get(key) != expected:
            raise AlreadyExistsError(f"{self.location}/{key} holds something else by now")
        self.put(key, data)

    def view(self, key: str, offset_bytes: int, length_bytes: int) -> Buffer:
        """The bytes of a range that is known to be there, copied as little as the medium allows. StorageError if shorter."""
        return self._exact(key, offset_bytes, length_bytes, self.get(key, offset_bytes=offset_bytes, length_bytes=length_bytes))

    @contextlib.contextmanager
    def reader(self, key: str) -> Iterator[Fill]:
        """Read `key` range by range, the file held open where the medium has such a thing. Errors as get's."""

        def fill(offset_bytes: int, memory: memoryview) -> int:
            data = self.get(key, offset_bytes=offset_bytes, length_bytes=len(memory))
            memory[: len(data)] = data
            return len(data)

        yield fill

    def _pay(self, count_bytes: int) -> None:
        """Wait until so much may go."""
        if self.bandwidth is not None:
            self.bandwidth.take(count_bytes)

    def _paid(self, parts: Iterable[Buffer], failed: MutableSequence[BaseException]) -> Iterator[Buffer]:
        """Each of `parts` when it may go. What they raise is noted in `failed`: it is not the medium's."""
        try:
            for part in parts:
                self._pay(memoryview(part).nbytes)
                yield part
                del part
        except GeneratorExit:  # the medium has failed, and takes no more
            raise
        except BaseException as error:
            failed.append(error)
            raise

    def _exact(self, key: str, offset_bytes: int, length_bytes: int, data: Buffer) -> Buffer:
        found = memoryview(data).nbytes
        if found != length_bytes:
            raise StorageError(
                f"reading {self.location}/{key}: {found:,} bytes came from {offset_bytes:,} on, not {length_bytes:,}",
                operation="reading",
                path=f"{self.location}/{key}",
            )
        return data

    def tree(self, prefix: str = "", *, max_depth: int = 4) -> dict[str, Folder]:
        """All folders at or below `prefix` ("" first, paths relative to it) with their entries, links not followed.

        Where the medium gives it with the listing, a folder comes with the `content` of its MANIFEST_NAME.
        A folder that cannot be read is there with its errno and no entries. A missing `prefix` is NotFoundError.
        """
        above = f"{prefix}/" if prefix else ""
        folders: dict[str, Folder] = {"": Folder(0, [])}
        for blob in self.list(prefix):
            *parents, name = blob.key.removeprefix(above).split("/")
            folder = _folder(folders, parents[:max_depth])
            if len(parents) <= max_depth and name:
                folder.entries.append(Entry(name, blob.size_bytes, blob.mtime_ns, 0, stat.S_IFREG | 0o644, 0))
            elif len(parents) > max_depth:
                _mention(folder, parents[max_depth])
        if not folders[""].entries:
            raise NotFoundError(
                f"there is nothing below {self.location}{f'/{prefix}' if prefix else ''}",
                hint="Is it spelled as it was pushed to?",
            )
        return folders


def _folder(folders: dict[str, Folder], parents: Iterable[str]) -> Folder:
    """The folder `parents`, made where it is new, and mentioned in the one above."""
    path = ""
    above = folders[""]
    for name in parents:
        path = f"{path}/{name}" if path else name
        found = folders.get(path)
        if found is None:
            found = folders[path] = Folder(0, [])
            above.entries.append(Entry(name, 0, 0, 0, stat.S_IFDIR | 0o755, 0))
        above = found
    return above


def _mention(folder: Folder, name: str) -> None:
    if all(entry.name != name for entry in folder.entries):
        folder.entries.append(Entry(name, 0, 0, 0, stat.S_IFDIR | 0o755, 0))
