"""Loads onto a GPU by bounce buffers: each thread reads a chunk into pinned memory, checks it, and copies it over meanwhile.

The copies go on a stream beside the caller's, after what the caller has asked of its current stream: what a tensor's memory
was used for before has ended. `close` waits for them, so that the caller may use what was loaded on any stream.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ckptstore.torch import memory

_BUFFERS = 2  #: a thread: one is read into while the other's copies are under way


class DeviceBytes:
    """The memory of a contiguous tensor on a device, as loading.DeviceMemory."""

    __slots__ = ("_bytes",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bytes = memory.flat(tensor.detach())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._bytes.device

    def __len__(self) -> int:
        return self._bytes.numel()

    def __getitem__(self, part: slice) -> DeviceBytes:
        found = DeviceBytes.__new__(DeviceBytes)
        found._bytes = self._bytes[part]
        return found

    def fill(self, data: torch.Tensor) -> None:
        """Begin to copy pinned memory to it, on the current stream."""
        self._bytes.copy_(data, non_blocking=True)


def target_of(tensor: torch.Tensor) -> memoryview | DeviceBytes:
    """The memory of a contiguous tensor as read_into takes it."""
    return DeviceBytes(tensor) if tensor.is_cuda else memory.bytes_of(tensor)


class BounceBuffers:
    """One thread's, for the devices with what each is to wait for."""

    def __init__(self, ready: Mapping[torch.device, Any], numbers: Iterator[int], chunk_bytes: int) -> None:
        self._buffers = memory.buffers(_BUFFERS, chunk_bytes, pinned=True)
        self._views = [memory.bytes_of(buffer) for buffer in self._buffers]
        self._events: list[list[tuple[Any, Any]]] = [[] for _ in self._buffers]
        self._now = 0
        number = next(numbers)
        self._streams = {device: memory.side_stream(device, number) for device in ready}
        for device, stream in self._streams.items():
            stream.wait_event(ready[device])

    def buffer(self) -> memoryview:
        """The buffer after the last one, as soon as the copies from it have ended."""
        self._events[self._now] = [(stream, memory.mark(stream)) for stream in self._streams.values()]
        self._now = (self._now + 1) % len(self._buffers)
        for stream, event in self._events[self._now]:
            memory.await_event(stream, event)
        return self._views[self._now]

    def deliver(self, target: DeviceBytes, begin: int) -> None:
        """Begin to copy the buffer to its place, from `begin` on."""
        # That mode is a thread's: what the caller made in it can be changed in no other, and other tensors in it too.
        with torch.inference_mode(), memory.on(self._streams[target.device]):
            target.fill(self._buffers[self._now][begin : begin + len(target)])

    def close(self) -> None:
        """Wait for the copies."""
        memory.synchronize(self._streams.values())


def onto(tensors: Iterable[torch.Tensor]) -> Callable[[int], BounceBuffers] | None:
    """What read_into takes as `bounce` for these tensors; None where none is on a GPU. UsageError in a graph's capture.

    Called by the thread whose current streams they belong to.
    """
    ready = {}
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        memory.refuse_capture(device)
        ready[device] = torch.cuda.current_stream(device).record_event()
    return functools.partial(BounceBuffers, ready, itertools.count(1)) if ready else None
