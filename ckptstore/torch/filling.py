"""Files made of tensors, wherever these are, as blocks of host memory: out of a ring of buffers that bounds it.

A block is filled from a file's parts in order: from a GPU by copies on a stream of our own, into pinned memory. Who takes the
blocks completes each, and its buffer goes back into the ring when nothing reads it any more.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ckptstore import native
from ckptstore.parallel import Stopped
from ckptstore.torch import memory


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


class Ring:
    """Buffers that are filled, read, and filled again. Thread-safe."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self.count = len(buffers)
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()  # whose put may come from anywhere, a finalizer too
        self._closed = threading.Event()
        for buffer in buffers:
            self._free.put(buffer)

    def take(self) -> torch.Tensor:
        """A buffer, as soon as there is one. Stopped once it is closed."""
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                buffer = self._free.get(timeout=0.1)
                if self.closed:
                    self.give(buffer)
                    continue
                return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Give a buffer back."""
        self._free.put(buffer)

    def lend(self, buffer: torch.Tensor, data: memoryview) -> memoryview:
        """`data`, which is the buffer's memory, to be read: it comes back by itself when nobody holds that any more.

        A library holds what it was given by Python's buffer protocol, and so keeps what it has not sent yet.
        """
        weakref.finalize(data.obj, self._free.put, buffer).atexit = False
        return data.toreadonly()

    @property
    def closed(self) -> bool:
        """Whether something has failed, or all is done."""
        return self._closed.is_set()

    def check(self) -> None:
        """Stopped once it is closed."""
        if self.closed:
            raise Stopped("stopped, since another block failed")

    def close(self) -> bool:
        """Nothing is taken any more. Whether all buffers are back: what is out may be read, or filled, by whoever has it."""
        self._closed.set()
        return self._free.qsize() == self.count


class _Crc:
    """The CRC-32 of a tensor, from its pieces in any order."""

    def __init__(self, length: int) -> None:
        self._missing_bytes = length
        self._pieces: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()
        self._known = threading.Event()
        if not length:
            self._known.set()

    def add(self, begin: int, data: memoryview) -> None:
        crc = native.crc32(data)
        with self._lock:
            self._pieces.append((begin, len(data), crc))
            self._missing_bytes -= len(data)
            if not self._missing_bytes:
                self._known.set()

    def wait(self, ring: Ring) -> int:
        while not self._known.wait(0.1):
            ring.check()
        whole = 0
        for _, length, crc in sorted(self._pieces):
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
class Block:
    """Bytes of a file from `offset` on, in a buffer: whole once `complete` returns."""

    offset: int
    buffer: torch.Tensor
    length: int = 0
    _slices: list[_Slice] = field(default_factory=list)
    _streams: set[Any] = field(default_factory=set)  #: that copy into it
    _events: list[tuple[Any, Any]] = field(default_factory=list)  #: of these streams, after the copies

    def add(self, flat: torch.Tensor | None, stream: Any, length: int) -> None:
        """Begin to copy bytes into it, on that stream; None: they come later."""
        if flat is not None:
            with memory.on(stream):
                self.buffer[self.length : self.length + length].copy_(flat, non_blocking=stream is not None)
        if stream is not None:
            self._streams.add(stream)
        self.length += length

    def filled(self) -> Block:
        """All copies have been asked for."""
        self._events = [(stream, memory.mark(stream)) for stream in self._streams]
        return self

    def complete(self, ring: Ring) -> memoryview:
        """Its bytes, when all copies have ended, with tails. On any thread; the blocks before it must have been begun."""
        for stream, event in self._events:
            memory.await_event(stream, event)
        view = memory.bytes_of(self.buffer)[: self.length]
        for piece in self._slices:
            if piece.tail is None:
                piece.crc.add(piece.begin, view[piece.at : piece.at + piece.length])
        for piece in self._slices:
            if piece.tail is not None:
                made = piece.tail.make(piece.crc.wait(ring))
                view[piece.at : piece.at + piece.length] = made[piece.begin : piece.begin + piece.length]
        return view


def fill(file: File, ring: Ring, streams: Streams, *, block_bytes: int) -> Iterator[Block]:
    """The file's blocks in order, filled or being filled; the last one may be shorter. Stopped when the ring is closed."""
    block: Block | None = None
    offset = 0
    crc: _Crc | None = None  #: of the tensor before a tail
    flat: torch.Tensor | None = None
    for part, following in itertools.pairwise([*file.parts, b""]):
        flat = None  # a copy on the device, before there is the next
        flat, stream, tail = _source(part, streams)
        begin, length = 0, _length(part)
        if tail is None:
            crc = _Crc(length) if isinstance(following, Tail) else None
        while begin < length:
            if block is None:
                block = Block(offset, ring.take())
            size = min(length - begin, block_bytes - block.length)
            if crc is not None:
                block._slices.append(_Slice(block.length, size, begin, crc, tail))
            block.add(None if flat is None else flat[begin : begin + size], stream, size)
            begin, offset = begin + size, offset + size
            if block.length == block_bytes:
                yield block.filled()
                block = None
    if block is not None:
        yield block.filled()


def in_memory(file: File) -> list[bytes | memoryview]:
    """The whole file as buffers in order: of tensors their own memory, where they are contiguous on the CPU."""
    buffers: list[bytes | memoryview] = []
    for part in file.parts:
        if isinstance(part, torch.Tensor):
            buffers.append(memory.bytes_of(memory.plain(part)))
        else:
            buffers.append(part.make(native.crc32(buffers[-1])) if isinstance(part, Tail) else part)
    return buffers


def _source(part: Part, streams: Streams) -> tuple[torch.Tensor | None, Any, Tail | None]:
    """(bytes to copy, the stream for it, what is made later)."""
    if isinstance(part, Tail):
        return None, None, part
    if isinstance(part, bytes):
        part = memoryview(bytearray(part))  # torch wants memory that can be written
    if isinstance(part, memoryview):
        return torch.frombuffer(part, dtype=torch.uint8) if part else None, None, None
    stream = streams.of(part)
    with memory.on(stream):
        return memory.flat(part.resolve_conj().resolve_neg().contiguous()), stream, None


def _length(part: Part) -> int:
    if isinstance(part, Tail):
        return part.length
    return part.nbytes if isinstance(part, torch.Tensor) else len(part)
