"""Saves of tensors, wherever these are, through a bounded ring of host buffers: onto a disk, or to a URL.

On a disk a block is one chunk of a file's digest: digested, and written past the page cache, by several threads, while the
next ones are filled. At a URL it is one part of an upload: digested, and on its way while the next ones are filled. So a state
on a GPU is never whole in host memory, and its copy, its digest and its write overlap. The files are the same.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import torch

from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.errors import UsageError
from ckptstore.formats import streaming
from ckptstore.parallel import Pool, Stopped
from ckptstore.saves import uploading
from ckptstore.saves.uploading import Written
from ckptstore.torch import memory
from ckptstore.torch.filling import Block, File, Ring, Streams, fill
from ckptstore.transfer import sending

BLOCK_BYTES = native.CHUNK_BYTES
RING_BYTES = 64 * BLOCK_BYTES  #: of host memory, where nobody bounds it
_SLAB_BYTES = 32 * BLOCK_BYTES  #: at most, in one allocation
_LEAST_THREADS, _MOST_THREADS = 4, 32  # as the engine's


def write(
    backend: Backend,
    place: str,
    files: Mapping[str, File],
    buffers: list[torch.Tensor],
    *,
    streams: Streams,
    ring_bytes: int = RING_BYTES,
    staged: Callable[[], None] = lambda: None,
    nice: int = 0,
) -> dict[str, Written]:
    """Write new files into a place (saving.place), durable and digested. Errors as native.write_files and uploading.write.

    `buffers` is the ring: made of `ring_bytes`, at most, and the caller's to keep. `staged` is called when the tensors are not
    needed any more: on a disk when all is copied; at a URL when all has arrived, since a file may have to be sent again until
    then. What it raises ends the write. Blocks; the tensors must not change before. UsageError for a negative `nice`, the
    priority of the threads that write to a disk.
    """
    if not 0 <= nice <= 19:
        raise UsageError(f"nice is {nice}, and 0 to 19 lower a priority")
    size_bytes = block_bytes(backend, files)
    count = sum(-(-file.size_bytes // size_bytes) for file in files.values())
    if not backend.is_folder:
        ring_bytes = min(ring_bytes, sending.BUDGET_BYTES)  # no more is on its way at once
    _fit(buffers, max(1, min(count, ring_bytes // size_bytes)), size_bytes, pinned=bool(streams))
    ring = Ring(buffers)
    try:
        if backend.is_folder:
            return _Run(place, ring, streams).run(files, staged, nice)
        contents = {name: _Content(file, ring, streams) for name, file in files.items()}
        written = uploading.write(backend, place, contents)
        staged()
        return written
    finally:
        if not ring.close():
            buffers.clear()  # a thread or a request that has not ended yet may have one
        streams.synchronize()  # nothing of ours still reads what the trainer may free


def block_bytes(backend: Backend, files: Mapping[str, File]) -> int:
    """What one buffer must hold: a chunk on a disk; the largest part that these files are sent in."""
    parts = (sending.part_size(file.size_bytes) for file in files.values())
    return BLOCK_BYTES if backend.is_folder else max(parts, default=sending.PART_BYTES)


def _fit(buffers: list[torch.Tensor], count: int, size_bytes: int, *, pinned: bool) -> None:
    """Make the ring of the buffers that there are and of new ones."""
    if buffers and (len(buffers) > count or buffers[0].nbytes != size_bytes or memory.pinned(buffers[0]) != pinned):
        buffers.clear()  # all of it: each is a piece of a larger allocation
    while (lacking := count - len(buffers)) > 0:
        # Few and large, by powers of two: pinned memory costs a call each, and torch rounds it up to one.
        new = min(max(_SLAB_BYTES // size_bytes, 1), 1 << (lacking.bit_length() - 1))
        buffers += memory.buffers(new, size_bytes, pinned=pinned)


class _Content:
    """A file to send. See uploading.Content."""

    def __init__(self, file: File, ring: Ring, streams: Streams) -> None:
        self._file, self._ring, self._streams = file, ring, streams
        self.size_bytes = file.size_bytes
        self.mtime_ns = time.time_ns()

    def parts(self, part_bytes: int) -> Iterator[memoryview]:
        """See uploading.Content. From the tensors anew each time."""
        try:
            for block in fill(self._file, self._ring, self._streams, block_bytes=part_bytes):
                yield self._ring.lend(block.buffer, block.complete(self._ring))
        except Exception:
            self._ring.close()  # a buffer that was being filled does not come back
            raise


class _Run:
    """One write onto a disk."""

    def __init__(self, folder: str, ring: Ring, streams: Streams) -> None:
        self.folder = folder
        self.ring = ring
        self.streams = streams

    def run(self, files: Mapping[str, File], staged: Callable[[], None], nice: int) -> dict[str, Written]:
        jobs: dict[str, list[Future[tuple[int, int, int]]]] = {name: [] for name in files}
        threads = min(self.ring.count, max(_LEAST_THREADS, min(_MOST_THREADS, len(os.sched_getaffinity(0)))))
        with contextlib.ExitStack() as stack:
            for name, file in files.items():
                stack.enter_context(streaming.created(os.path.join(self.folder, name), file.size_bytes))
            # Inside of the files: no thread writes to one that is closed.
            pool = stack.enter_context(Pool(threads, "ckptstore-block", begin=lambda: native.be_nice(nice)))
            try:
                for name, file in files.items():
                    for block in fill(file, self.ring, self.streams, block_bytes=BLOCK_BYTES):
                        jobs[name].append(pool.submit(self._put, name, block))
                self.streams.synchronize()
                self.ring.check()
                staged()
            except Stopped:
                pass  # why, the job that failed says
            except BaseException:
                self.ring.close()
                raise
            segments = {name: [job.result() for job in some] for name, some in jobs.items()}
        now = time.time_ns()
        return {name: Written(streaming.digest(segments[name]), file.size_bytes, now) for name, file in files.items()}

    def _put(self, name: str, block: Block) -> tuple[int, int, int]:
        """Digest and write a block, on a thread of the pool."""
        crc = 0
        try:
            self.ring.check()
            view = block.complete(self.ring)
            native.write_range(self.folder, name, block.offset, view)
            crc = native.crc64(view)
        except Stopped:
            pass  # another job's failure is the one to be raised
        except BaseException:
            self.ring.close()
            raise
        finally:
            self.ring.give(block.buffer)
        return block.offset, block.length, crc
