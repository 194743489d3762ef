"""Reads ranges of a checkpoint's files straight into memory, in parallel, every byte checked against the manifest: one read.

A chunk that is wanted in part is read whole, since its digest covers all of it. From a disk the engine reads; at a URL the
chunks come by fetching.py, and what is wanted is copied out of them. Memory that a read cannot fill (of a GPU) gets checked
chunks by way of `BounceBuffers`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.errors import IntegrityError, SourceChangedError, from_os_error
from ckptstore.formats import streaming
from ckptstore.manifest import FileEntry
from ckptstore.transfer.fetching import Wanted, fetch

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MOST_THREADS = 16


class DeviceMemory(Protocol):
    """Memory that a read cannot fill: its length in bytes, and parts of it by slices."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> DeviceMemory: ...


class BounceBuffers(Protocol):
    """Host memory by which one thread's chunks get to a device."""

    def buffer(self) -> memoryview:
        """Room for a chunk, free to be written; the last ones may still be read from."""
        ...

    def deliver(self, target: Any, begin: int, /) -> None:
        """Begin to fill the device's memory from the buffer, from `begin` on there."""
        ...

    def close(self) -> None:
        """Wait until all of it is filled."""
        ...


class Want(NamedTuple):
    """Bytes of a file, from `offset` on, and the writable memory that they fill."""

    offset: int
    memory: memoryview | DeviceMemory


class _Chunk(NamedTuple):
    entry: FileEntry
    fd: int
    number: int
    wants: list[Want]  #: within the chunk, by offset


def read_into(
    backend: Backend,
    folder: str,
    files: Sequence[tuple[FileEntry, Sequence[Want]]],
    *,
    chunk_bytes: int,
    bounce: Callable[[int], BounceBuffers] | None = None,
) -> None:
    """Fill all wanted memory from files in a folder of `backend`; wants of one file must not overlap.

    `bounce` makes these buffers for chunks of that size, for each thread, where some memory is a device's: only on a disk.

    DigestMismatchError where a chunk is not what the manifest records, IntegrityError for a file of another size; the
    memory then holds anything. NotFoundError, AccessError, StorageError. Blocks; releases the GIL while it reads.
    """
    if not backend.is_folder:
        assert bounce is None
        _from_url(backend, folder, files, chunk_bytes)
        return
    root = os.path.join(backend.location, folder)
    if bounce is not None:
        files = _by_bounce(root, files, chunk_bytes, bounce)
    _from_disk(root, files, chunk_bytes)


def _from_url(backend: Backend, folder: str, files: Sequence[tuple[FileEntry, Sequence[Want]]], chunk_bytes: int) -> None:
    chunks: dict[str, Mapping[int, list[Want]]] = {}
    wanted = []
    for entry, wants in files:
        chunks[entry.path] = inside = _by_chunk(wants, chunk_bytes)
        unread = {number: crc for number, crc in enumerate(entry.chunks) if number not in inside}
        wanted.append(Wanted(entry.path, f"{folder}/{entry.path}", entry.size_bytes, entry.chunks, unread))

    def fill(name: str, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        for number in range(offset // chunk_bytes, -(-(offset + view.nbytes) // chunk_bytes)):
            for want in chunks[name][number]:
                # A chunk larger than a request comes in pieces.
                assert isinstance(want.memory, memoryview)
                begin, end = max(want.offset, offset), min(want.offset + want.memory.nbytes, offset + view.nbytes)
                if begin < end:
                    want.memory[begin - want.offset : end - want.offset] = view[begin - offset : end - offset]

    fetch(backend, wanted, chunk_bytes=chunk_bytes, sink=fill, stop_at_error=True)


def _from_disk(root: str, files: Sequence[tuple[FileEntry, Sequence[Want]]], chunk_bytes: int) -> None:
    wanted = []
    for entry, wants in files:
        parts = []
        for offset, memory in wants:
            assert isinstance(memory, memoryview)
            parts.append((offset, memory))
        wanted.append((native.FileSpec(entry.path, entry.size_bytes, expected=entry.chunks), parts))
    try:
        native.read_files(root, wanted, chunk_bytes=chunk_bytes)
    except SourceChangedError as error:  # what is committed does not change
        raise IntegrityError(
            f"{os.path.join(root, error.path)} is not the file that the manifest describes: {error}",
            hint="Use another checkpoint.",
        ) from error


def _by_bounce(
    root: str,
    files: Sequence[tuple[FileEntry, Sequence[Want]]],
    chunk_bytes: int,
    bounce: Callable[[int], BounceBuffers],
) -> list[tuple[FileEntry, list[Want]]]:
    """All chunks of which a device gets something; what is left to read."""
    fds: list[int] = []
    left: list[tuple[FileEntry, list[Want]]] = []
    try:
        chunks = []
        for entry, wants in files:
            fds.append(_open(root, entry))
            left.append((entry, []))
            for number, parts in _by_chunk(wants, chunk_bytes).items():
                if any(not isinstance(part.memory, memoryview) for part in parts):
                    chunks.append(_Chunk(entry, fds[-1], number, parts))
                else:
                    left[-1][1].extend(parts)
        count = min(_MOST_THREADS, 2 * len(os.sched_getaffinity(0)), len(chunks))
        if count == 0:
            return left
        queue = iter(chunks)
        largest = max(min(chunk_bytes, chunk.entry.size_bytes) for chunk in chunks)
        with ThreadPoolExecutor(count, thread_name_prefix="ckptstore-load") as pool:
            list(pool.map(lambda _: _work(queue, chunk_bytes, bounce(largest)), range(count)))
        return left
    finally:
        for fd in fds:
            os.close(fd)


def read_whole(backend: Backend, folder: str, entry: FileEntry, *, chunk_bytes: int) -> bytes:
    """A small file, checked. Errors as read_into's."""
    data = bytearray(entry.size_bytes)
    read_into(backend, folder, [(entry, [Want(0, memoryview(data))] if data else [])], chunk_bytes=chunk_bytes)
    return bytes(data)


def _open(root: str, entry: FileEntry) -> int:
    path = os.path.join(root, entry.path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error
    size_bytes = os.fstat(fd).st_size
    if size_bytes != entry.size_bytes:
        os.close(fd)
        raise IntegrityError(
            f"{path} has {size_bytes:,} bytes, and the manifest says {entry.size_bytes:,}", hint="Use another checkpoint."
        )
    return fd


def _by_chunk(wants: Sequence[Want], chunk_bytes: int) -> Mapping[int, list[Want]]:
    found: dict[int, list[Want]] = {}
    for want in sorted(wants, key=lambda want: want.offset):
        offset, memory = want
        while len(memory):
            number = offset // chunk_bytes
            room = (number + 1) * chunk_bytes - offset
            found.setdefault(number, []).append(Want(offset, memory[:room]))
            offset, memory = offset + room, memory[room:]
    return found


def _work(queue: Iterator[_Chunk], chunk_bytes: int, bounce: BounceBuffers) -> None:
    try:
        while (chunk := next(queue, None)) is not None:
            begin = chunk.number * chunk_bytes
            whole = bounce.buffer()[: min(chunk_bytes, chunk.entry.size_bytes - begin)]
            _read(chunk, whole, begin)
            if native.crc64(whole) != chunk.entry.chunks[chunk.number]:
                raise streaming.mismatch(chunk.entry.path, begin)
            for offset, memory in chunk.wants:
                if isinstance(memory, memoryview):
                    memory[:] = whole[offset - begin :][: len(memory)]
                else:
                    bounce.deliver(memory, offset - begin)
    finally:
        bounce.close()


def _read(chunk: _Chunk, buffer: memoryview, at: int) -> None:
    try:
        while buffer:
            count = os.preadv(chunk.fd, [buffer], at)
            if count == 0:
                raise IntegrityError(f"{chunk.entry.path} became shorter while it was read", hint="Use another checkpoint.")
            at, buffer = at + count, buffer[count:]
    except OSError as error:
        raise from_os_error(error, doing="reading", path=chunk.entry.path) from error
