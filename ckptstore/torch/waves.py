"""Saves of a state that is larger than the host memory for its copy: staged and written piece by piece, in waves.

The first pieces fill the buffers; each buffer that has been written takes the next piece. The state may change when the last
piece has been copied (`staged`). In-place changes before that are found by torch's version counters: such a save fails.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ckptstore import native, saving
from ckptstore.errors import SourceChangedError, UsageError
from ckptstore.formats import streaming
from ckptstore.manifest import Manifest
from ckptstore.retention import Keep
from ckptstore.store import CheckpointStore
from ckptstore.torch import memory, simple
from ckptstore.torch import state as states
from ckptstore.uploading import Written

PIECE_BYTES = native.CHUNK_BYTES
_STREAMS = 2  #: per device: while one waits for its copy, the other one's is under way
_Segments = list[tuple[int, int, int]]


class _File(NamedTuple):
    """A safetensors file: its head, and its tensors in order."""

    head: bytes
    tensors: list[torch.Tensor]

    @property
    def size_bytes(self) -> int:
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors)


class Waves:
    """One save of a state in waves: made by the thread that trains, then `write`, once, on any."""

    def __init__(self, state_dict: Mapping[str, Any], config: Mapping[str, Any] | None, *, max_host_bytes: int) -> None:
        if max_host_bytes < 2 * PIECE_BYTES:
            raise UsageError(f"max_host_bytes is {max_host_bytes:,}, and {2 * PIECE_BYTES:,} are the least")
        encoded = states.Encoder(state_dict, torch.Tensor.detach)
        self._files = {
            f"{name}{simple.SUFFIX}": _File(*memory.safetensors_layout(tensors))
            for name, tensors in encoded.tensors.items()
            if tensors
        }
        self._rest = simple.documents(encoded, config)
        self._versions = [
            (f"{file}: {name}", tensor, _version(tensor))
            for file, tensors in encoded.tensors.items()
            for name, tensor in tensors.items()
        ]
        devices = {tensor.device for _, tensor, _ in self._versions if tensor.is_cuda}
        for device in devices:
            memory.refuse_capture(device)
        self._ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}
        self._streams: dict[torch.device, list[Any]] = {}
        self._count = max_host_bytes // PIECE_BYTES
        self.fits = sum(file.size_bytes for file in self._files.values()) <= max_host_bytes

    def write(
        self,
        store: CheckpointStore,
        step: int,
        buffers: list[torch.Tensor],
        *,
        staged: Callable[[], None],
        metrics: Mapping[str, float] | None = None,
        keep: Keep | None = None,
        nice: int = 0,
    ) -> Manifest:
        """Stage, write and commit. `buffers` are used, and kept for the next save. Errors as `save`; SourceChangedError.

        `staged` is called when all of the state has been copied.
        """
        draft = saving.begin(store.backend, step)
        try:
            written = self._write(saving.place(draft), buffers, staged, nice)
            written |= saving.write_buffers(store.backend, saving.place(draft), self._rest)
            manifest = saving.commit(draft, written, metrics=metrics)
        finally:
            saving.abandon(draft)
        if keep is not None:
            store.prune(keep)
        return manifest

    def _write(self, folder: str, buffers: list[torch.Tensor], staged: Callable[[], None], nice: int) -> dict[str, Written]:
        pinned = bool(self._ready)
        if not buffers or memory.pinned(buffers[0]) != pinned:
            buffers.clear()
        del buffers[self._count :]
        lacking = self._count - len(buffers)
        buffers += [memory.host((PIECE_BYTES,), torch.uint8, pinned=pinned) for _ in range(lacking)]
        free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in buffers:
            free.put(buffer)
        failed = threading.Event()

        def put(fd: int, offset: int, buffer: torch.Tensor, length: int, copied: torch.cuda.Event | None) -> _Segments:
            try:
                if copied is not None:
                    copied.synchronize()
                return streaming.write_at(fd, offset, memory.bytes_of(buffer)[:length])
            except BaseException:
                failed.set()
                raise
            finally:
                free.put(buffer)

        segments: dict[str, _Segments] = {}
        jobs: list[tuple[str, Future[_Segments]]] = []
        threads = min(self._count, 8, 2 * len(os.sched_getaffinity(0)))
        with contextlib.ExitStack() as stack:
            fds = {
                name: stack.enter_context(streaming.created(os.path.join(folder, name), file.size_bytes))
                for name, file in self._files.items()
            }
            # Inside of the files: no thread writes to one that is closed.
            pool = stack.enter_context(ThreadPoolExecutor(threads, "ckptstore-wave", initializer=os.nice, initargs=(nice,)))
            for name, file in self._files.items():
                segments[name] = streaming.write_at(fds[name], 0, file.head)
            for name, offset, piece, stream in self._pieces():
                buffer = free.get()
                if failed.is_set():
                    break
                copied = _copy(piece, buffer, stream)
                jobs.append((name, pool.submit(put, fds[name], offset, buffer, piece.numel(), copied)))
            else:
                self._end_staging()
                staged()
            for name, job in jobs:
                segments[name] += job.result()
        now = time.time_ns()
        return {name: Written(streaming.digest(found), self._files[name].size_bytes, now) for name, found in segments.items()}

    def _pieces(self) -> Iterator[tuple[str, int, torch.Tensor, Any]]:
        """(file, offset in it, bytes of a tensor, the stream to copy them on) in order; none crosses a buffer's size."""
        new: Any = torch.cuda.Stream  # torch gives it no types
        self._streams = {device: [new(device) for _ in range(_STREAMS)] for device in self._ready}
        for device, ours in self._streams.items():
            for one in ours:
                one.wait_event(self._ready[device])
        number = 0
        for name, file in self._files.items():
            offset = len(file.head)
            for tensor in file.tensors:
                stream: Any = self._streams[tensor.device][number % _STREAMS] if tensor.is_cuda else None
                number += 1
                with torch.cuda.stream(stream):
                    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                for begin in range(0, flat.numel(), PIECE_BYTES):
                    yield name, offset + begin, flat[begin : begin + PIECE_BYTES], stream
                offset += flat.numel()

    def _end_staging(self) -> None:
        for ours in self._streams.values():
            for one in ours:  # not the device: the trainer may have much work waiting on it
                one.synchronize()
        for name, tensor, version in self._versions:
            if version != _version(tensor):
                raise SourceChangedError(
                    f"{name} was changed before it was staged: nothing is saved",
                    path=name,
                    hint="Call handle.wait_staged() before the optimizer's step.",
                )


def _copy(piece: torch.Tensor, buffer: torch.Tensor, stream: Any) -> Any:
    """Copy a piece to the start of a buffer; the event of its end, where it is under way on a stream."""
    with torch.cuda.stream(stream):
        buffer[: piece.numel()].copy_(piece, non_blocking=stream is not None)
    return stream.record_event() if stream is not None else None


def _version(tensor: torch.Tensor) -> int:
    """How often it was changed in place; torch does not count that of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version
