"""Moves ranges of files into other files in one pass: each byte is read once, digested, checked and written.

The work is cut into pieces that threads take in order; memory is a buffer of BLOCK_BYTES a thread. CRCs of pieces combine
into those of tensors (CRC-32) and of chunks (CRC-64), so the pieces may end in any order.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptstore import native, pages
from ckptstore.errors import CkptStoreError, DigestMismatchError, RefusedError, SourceChangedError, from_os_error
from ckptstore.model import FileInfo

BLOCK_BYTES = 8 << 20
Place = Callable[[int, int], Iterable[tuple[int, int]]]
"""(offset, length) within a range → where it goes, as (offset in the file written, length), in order."""


class Source(NamedTuple):
    """An open file to read. `expected`: CRC-64s of its chunks, checked where all of a chunk is read."""

    info: FileInfo
    fd: int
    expected: Sequence[int] | None = None


class Range(NamedTuple):
    """A range of a source, and where it goes: from `target` on, or scattered by `place`, or (sink -1) nowhere."""

    source: int
    offset: int
    length: int
    sink: int = -1
    target: int = 0
    place: Place | None = None


class Piece(NamedTuple):
    """A part of the range with that number, at most BLOCK_BYTES long, and its CRCs once it has been read."""

    range: int
    begin: int  #: within the range
    length: int
    crc32: int = 0
    crc64: int = 0


@dataclass(slots=True)
class Job:
    """Ranges to move. Pieces end at multiples of `chunk_bytes` in the source and of `sink_chunk_bytes` in the sinks."""

    sources: Sequence[Source]
    sinks: Sequence[int]
    ranges: Sequence[Range]
    chunk_bytes: int = native.CHUNK_BYTES
    sink_chunk_bytes: int = native.CHUNK_BYTES
    progress: native.Progress | None = None
    pieces: list[Piece] = field(default_factory=list)

    def run(self) -> None:
        """Move everything; `pieces` then has the CRCs. Raises the errors of native.copy_files, and what progress raises."""
        self.pieces = [piece for number in range(len(self.ranges)) for piece in self._cut(number)]
        _Run(self).run()

    def crc32(self) -> list[int]:
        """The CRC-32 of each range."""
        found = [0] * len(self.ranges)
        for piece in self.pieces:
            found[piece.range] = native.crc32_combine(found[piece.range], piece.crc32, piece.length)
        return found

    def written(self, sink: int) -> Iterator[tuple[int, int, int]]:
        """(offset, length, CRC-64) of each piece that was written to a sink, except those that were scattered."""
        for piece in self.pieces:
            part = self.ranges[piece.range]
            if part.sink == sink and part.place is None:
                yield part.target + piece.begin, piece.length, piece.crc64

    def _cut(self, number: int) -> Iterator[Piece]:
        part = self.ranges[number]
        begin = 0
        while begin < part.length:
            room = min(BLOCK_BYTES, self.chunk_bytes - (part.offset + begin) % self.chunk_bytes)
            if part.sink >= 0 and part.place is None:
                room = min(room, self.sink_chunk_bytes - (part.target + begin) % self.sink_chunk_bytes)
            length = min(room, part.length - begin)
            yield Piece(number, begin, length)
            begin += length


class _Run:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.next = 0
        self.done_bytes = 0
        self.total_bytes = sum(part.length for part in job.ranges)
        self.open_chunks: dict[tuple[int, int], list[Piece]] = {}

    def run(self) -> None:
        # Reading and writing block: more threads than cores keep the disk busy, and each costs one buffer.
        threads = min(16, 2 * len(os.sched_getaffinity(0)), max(1, len(self.job.pieces)))
        with ThreadPoolExecutor(threads, thread_name_prefix="ckptstore-convert") as pool:
            workers = {pool.submit(self.work) for _ in range(threads)}
            try:
                running = workers
                while running and not any(worker.done() and worker.exception() for worker in workers):
                    _, running = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION)
                    if self.job.progress is not None:
                        self.job.progress(self.done_bytes, self.total_bytes)
            finally:
                self.stop.set()
        for worker in workers:
            worker.result()

    def work(self) -> None:
        buffer = pages.new(BLOCK_BYTES)
        try:
            while not self.stop.is_set() and (taken := self.take()):
                for number in taken:
                    self.move(number, buffer)
        except BaseException:
            self.stop.set()
            raise

    def take(self) -> range:
        """The next pieces in order, about a block of them: a lock for each small tensor would cost more than its copy."""
        with self.lock:
            begin, size = self.next, 0
            while self.next < len(self.job.pieces) and size < BLOCK_BYTES // 2:
                size += self.job.pieces[self.next].length
                self.next += 1
            return range(begin, self.next)

    def move(self, number: int, buffer: memoryview) -> None:
        piece = self.job.pieces[number]
        part = self.job.ranges[piece.range]
        source = self.job.sources[part.source]
        data = buffer[: piece.length]
        read_at(source.fd, part.offset + piece.begin, data, name=source.info.name)
        piece = piece._replace(crc32=native.crc32(data), crc64=native.crc64(data))
        self.job.pieces[number] = piece
        if source.expected is not None:
            self.check(source, part, piece)
        if part.sink >= 0:
            places = (
                [(part.target + piece.begin, piece.length)] if part.place is None else part.place(piece.begin, piece.length)
            )
            for target, length in places:
                _write(self.job.sinks[part.sink], target, data[:length])
                data = data[length:]
        with self.lock:
            self.done_bytes += piece.length

    def check(self, source: Source, part: Range, piece: Piece) -> None:
        """Compare a chunk of the source as soon as all of its pieces have been read."""
        size = self.job.chunk_bytes
        chunk = (part.offset + piece.begin) // size
        begin, end = chunk * size, min(source.info.size_bytes, (chunk + 1) * size)
        with self.lock:
            known = self.open_chunks.setdefault((part.source, chunk), [])
            known.append(piece)
            if sum(other.length for other in known) < end - begin:
                return
            del self.open_chunks[part.source, chunk]
        crc = 0
        for other in sorted(known, key=lambda other: self.job.ranges[other.range].offset + other.begin):
            crc = native.crc64_combine(crc, other.crc64, other.length)
        if source.expected is not None and crc != source.expected[chunk]:
            raise mismatch(source.info.name, begin)


def mismatch(name: str, offset_bytes: int) -> DigestMismatchError:
    """The error for a file whose bytes from there on are not those that a digest was made of."""
    return DigestMismatchError(
        f"{name}: the bytes from {offset_bytes} on are not those that the digest was made of",
        path=name,
        offset_bytes=offset_bytes,
        hint="Use another checkpoint, or repair this one from a replica.",
    )


@contextmanager
def opened(root: str | os.PathLike[str], files: Sequence[FileInfo]) -> Iterator[list[int]]:
    """The files below `root`, open for reading, links refused; at the end, compared with what `files` says of them."""
    fds: list[int] = []
    try:
        for info in files:
            path = os.path.join(root, info.name)
            try:
                fds.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                raise from_os_error(error, doing="opening", path=path) from error
            _compare(info, fds[-1])
        yield fds
        for info, fd in zip(files, fds, strict=True):
            _compare(info, fd)
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def created(path: str | os.PathLike[str], size_bytes: int) -> Iterator[int]:
    """A new file of that size, open for writing; durable at the end. Whatever fails leaves it: the folder is a stage."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            native.allocate(fd, size_bytes, path)
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
    except CkptStoreError:  # some of which are OSErrors too
        raise
    except OSError as error:
        raise from_os_error(error, doing="writing", path=os.fspath(path)) from error


def digest(segments: Iterable[tuple[int, int, int]], chunk_bytes: int = native.CHUNK_BYTES) -> native.Digest:
    """The digest of a file that these (offset, length, CRC-64) cover, none across a multiple of `chunk_bytes`."""
    chunks: list[int] = []
    lengths: list[int] = []
    for offset, length, crc in sorted(segments):
        if offset % chunk_bytes == 0:
            chunks.append(0)
            lengths.append(0)
        chunks[-1] = native.crc64_combine(chunks[-1], crc, length)
        lengths[-1] += length
    whole = 0
    for crc, length in zip(chunks, lengths, strict=True):
        whole = native.crc64_combine(whole, crc, length)
    return native.Digest(whole, tuple(chunks))


def write_at(
    fd: int, offset: int, data: bytes | memoryview, chunk_bytes: int = native.CHUNK_BYTES
) -> list[tuple[int, int, int]]:
    """Write `data`; what `digest` takes of it."""
    view = memoryview(data)
    _write(fd, offset, view)
    segments = []
    while view:
        piece = view[: chunk_bytes - offset % chunk_bytes]
        segments.append((offset, len(piece), native.crc64(piece)))
        view, offset = view[len(piece) :], offset + len(piece)
    return segments


def _compare(info: FileInfo, fd: int) -> None:
    now = os.fstat(fd)
    if not stat.S_ISREG(now.st_mode):
        raise RefusedError(f"{info.name} is not a regular file")
    if (now.st_size, now.st_mtime_ns, now.st_ino) != (info.size_bytes, info.mtime_ns, info.inode):
        raise SourceChangedError(
            f"{info.name} was written while it was read",
            path=info.name,
            hint="Let the trainer finish its save, then try again.",
        )


def read_at(fd: int, offset: int, data: memoryview, *, name: str) -> None:
    """Fill `data` from a file at `offset`; `name` is for errors. SourceChangedError where the file ends before."""
    try:
        while data:
            count = os.preadv(fd, [data], offset)
            if count == 0:
                raise SourceChangedError(f"{name} became shorter while it was read", path=name)
            data, offset = data[count:], offset + count
    except OSError as error:
        raise from_os_error(error, doing="reading", path=name) from error


def _write(fd: int, offset: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
