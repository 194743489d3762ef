"""Files made of tensors, wherever these are, written block by block through a bounded ring of host buffers.

A block is one chunk of a file's digest. It is filled from the tensors in order (from a GPU by copies on a stream of our own,
pinned), digested, and written past the page cache, while the next blocks are filled. So a state on a GPU is never whole in
host memory, and its copy, its digest and its write overlap.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ckptstore import native
from ckptstore.errors import UsageError
from ckptstore.formats import streaming
from ckptstore.torch import memory
from ckptstore.uploading import Written

BLOCK_BYTES = native.CHUNK_BYTES
RING_BYTES = 64 * BLOCK_BYTES  #: of host memory, where nobody bounds it
_SLAB_BLOCKS = 32  #: at most, in one allocation
_LEAST_THREADS, _MOST_THREADS = 4, 32  # as the engine's


class Tail(NamedTuple):
    """Bytes after a tensor that hold its CRC-32: made of it once it is known."""

    length: int
    make: Callable[[int], bytes]


Part = bytes | memoryview | torch.Tensor | Tail


class File(NamedTuple):
    """What a file is made of, in order. A `Tail` follows its tensor."""

    parts: Sequence[Part]

    @property
    def size_bytes(self) -> int:
        """Of all its parts."""
        return sum(_length(part) for part in self.parts)


class Streams:
    """A stream beside the caller's on each device, after all that the caller has asked of its current stream there.

    Made by the thread that trains; UsageError while it captures a graph.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._of: dict[torch.device, Any] = {}
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            memory.refuse_capture(device)
            self._of[device] = memory.side_stream(device, 0)
            self._of[device].wait_event(torch.cuda.current_stream(device).record_event())

    def __bool__(self) -> bool:
        return bool(self._of)

    def of(self, tensor: torch.Tensor) -> Any:
        """The stream to copy it on; None on the CPU."""
        return self._of[tensor.device] if tensor.is_cuda else None

    def synchronize(self) -> None:
        """Wait for these streams: not for the device, on which the trainer may have much work waiting."""
        memory.synchronize(self._of.values())


def write(
    folder: str,
    files: Mapping[str, File],
    buffers: list[torch.Tensor],
    *,
    streams: Streams,
    ring_bytes: int = RING_BYTES,
    staged: Callable[[], None] = lambda: None,
    nice: int = 0,
) -> dict[str, Written]:
    """Write new files into a folder, durable and digested. Errors as native.write_files.

    `buffers` is the ring: made of `ring_bytes`, at most, and the caller's to keep. `staged` is called when all of the tensors
    has been copied; what it raises ends the write. Blocks; the tensors must not change before. UsageError for a negative
    `nice`, the priority of the writing threads.
    """
    if not 0 <= nice <= 19:
        raise UsageError(f"nice is {nice}, and 0 to 19 lower a priority")
    _fit(buffers, min(ring_bytes, sum(file.size_bytes for file in files.values())), pinned=bool(streams))
    return _Run(folder, buffers, streams).run(files, staged, nice)


def _fit(buffers: list[torch.Tensor], wanted_bytes: int, *, pinned: bool) -> None:
    """Make the ring of the buffers that there are and of new ones."""
    count = max(1, -(-wanted_bytes // BLOCK_BYTES))
    if len(buffers) > count or (buffers and memory.pinned(buffers[0]) != pinned):
        buffers.clear()  # all of it: each is a piece of a larger allocation
    while (lacking := count - len(buffers)) > 0:
        # Few and large, by powers of two: pinned memory costs a call each, and torch rounds it up to one.
        buffers += memory.buffers(min(_SLAB_BLOCKS, 1 << (lacking.bit_length() - 1)), BLOCK_BYTES, pinned=pinned)


@dataclass(slots=True)
class _Crc:
    """The CRC-32 of a tensor, from its pieces in any order."""

    missing_bytes: int
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    known: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if not self.missing_bytes:
            self.known.set()

    def add(self, begin: int, data: memoryview) -> None:
        crc = native.crc32(data)
        with self.lock:
            self.pieces.append((begin, len(data), crc))
            self.missing_bytes -= len(data)
            if not self.missing_bytes:
                self.known.set()

    def value(self) -> int:
        whole = 0
        for _, length, crc in sorted(self.pieces):
            whole = native.crc32_combine(whole, crc, length)
        return whole


class _Slice(NamedTuple):
    """A part of a block that is not filled by a copy alone."""

    at: int  #: in the block
    length: int
    begin: int  #: in the tensor, or the tail
    crc: _Crc
    tail: Tail | None  #: None: the tensor itself


@dataclass(slots=True)
class _Block:
    name: str
    offset: int
    buffer: torch.Tensor
    length: int = 0
    slices: list[_Slice] = field(default_factory=list)
    streams: set[Any] = field(default_factory=set)  #: that copy into it
    events: list[tuple[Any, Any]] = field(default_factory=list)  #: of these streams, after the copies

    def filled(self) -> _Block:
        """All copies have been asked for."""
        self.events = [(stream, memory.mark(stream)) for stream in self.streams]
        return self


class _Run:
    def __init__(self, folder: str, buffers: Sequence[torch.Tensor], streams: Streams) -> None:
        self.folder = folder
        self.streams = streams
        self.count = len(buffers)
        self.free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in buffers:
            self.free.put(buffer)
        self.failed = threading.Event()

    def run(self, files: Mapping[str, File], staged: Callable[[], None], nice: int) -> dict[str, Written]:
        jobs: dict[str, list[Future[tuple[int, int, int]]]] = {name: [] for name in files}
        threads = min(self.count, max(_LEAST_THREADS, min(_MOST_THREADS, len(os.sched_getaffinity(0)))))
        with contextlib.ExitStack() as stack:
            for name, file in files.items():
                stack.enter_context(streaming.created(os.path.join(self.folder, name), file.size_bytes))
            # Inside of the files: no thread writes to one that is closed.
            pool = stack.enter_context(
                ThreadPoolExecutor(threads, "ckptstore-block", initializer=native.be_nice, initargs=(nice,))
            )
            try:
                for name, file in files.items():
                    for block in self._blocks(name, file):
                        jobs[name].append(pool.submit(self._put, block))
                if not self.failed.is_set():
                    self.streams.synchronize()
                    staged()
            except BaseException:
                self.failed.set()
                raise
            finally:
                self.streams.synchronize()  # nothing of ours still reads what the trainer may free
            segments = {name: [job.result() for job in some] for name, some in jobs.items()}
        now = time.time_ns()
        return {name: Written(streaming.digest(segments[name]), file.size_bytes, now) for name, file in files.items()}

    def _blocks(self, name: str, file: File) -> Iterator[_Block]:
        """The file's blocks in order, filled or being filled; the last one may end early."""
        block: _Block | None = None
        offset = 0
        crc: _Crc | None = None  #: of the tensor before a tail
        flat: torch.Tensor | None = None
        for part, following in itertools.pairwise([*file.parts, b""]):
            flat = None  # a copy on the device, before there is the next
            flat, stream, tail = self._source(part)
            begin, length = 0, _length(part)
            if tail is None:
                crc = _Crc(length) if isinstance(following, Tail) else None
            while begin < length:
                if block is None:
                    buffer = self.free.get()
                    if self.failed.is_set():
                        return
                    block = _Block(name, offset, buffer)
                size = min(length - begin, BLOCK_BYTES - block.length)
                if flat is not None:
                    with memory.on(stream):
                        target = block.buffer[block.length : block.length + size]
                        target.copy_(flat[begin : begin + size], non_blocking=stream is not None)
                if crc is not None:
                    block.slices.append(_Slice(block.length, size, begin, crc, tail))
                begin, offset = begin + size, offset + size
                block.length += size
                if stream is not None:
                    block.streams.add(stream)
                if block.length == BLOCK_BYTES:
                    yield block.filled()
                    block = None
        if block is not None:
            yield block.filled()

    def _source(self, part: Part) -> tuple[torch.Tensor | None, Any, Tail | None]:
        """(bytes to copy, the stream for it, what is made later)."""
        if isinstance(part, Tail):
            return None, None, part
        if isinstance(part, bytes):
            part = memoryview(bytearray(part))  # torch wants memory that can be written
        if isinstance(part, memoryview):
            return torch.frombuffer(part, dtype=torch.uint8) if part else None, None, None
        stream = self.streams.of(part)
        with memory.on(stream):
            return part.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8), stream, None

    def _put(self, block: _Block) -> tuple[int, int, int]:
        """Digest and write a block, on a thread of the pool. Blocks before it have been begun: their CRCs come."""
        try:
            if self.failed.is_set():
                return block.offset, block.length, 0
            for stream, event in block.events:
                memory.await_event(stream, event)
            view = memory.bytes_of(block.buffer)[: block.length]
            for piece in block.slices:
                if piece.tail is None:
                    piece.crc.add(piece.begin, view[piece.at : piece.at + piece.length])
            for piece in block.slices:
                if piece.tail is not None:
                    while not piece.crc.known.wait(0.1):
                        if self.failed.is_set():  # that failure is the one to be raised
                            return block.offset, block.length, 0
                    made = piece.tail.make(piece.crc.value())
                    view[piece.at : piece.at + piece.length] = made[piece.begin : piece.begin + piece.length]
            native.write_range(self.folder, block.name, block.offset, view)
            return block.offset, block.length, native.crc64(view)
        except BaseException:
            self.failed.set()
            raise
        finally:
            self.free.put(block.buffer)


def _length(part: Part) -> int:
    if isinstance(part, Tail):
        return part.length
    return part.nbytes if isinstance(part, torch.Tensor) else len(part)
