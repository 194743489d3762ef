"""Read files of any backend in parallel ranges, and digest them on the way: what `verify` reads and `pull` writes.

Every range is checked against the manifest's chunk digests as soon as it is there. One that differs is asked for once more: a
second answer that is the same is what the medium holds, any other was damaged on its way. How many ranges are under way at once
is tuned to what they bring (tuning.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptstore import native, parallel
from ckptstore.backends.base import Backend
from ckptstore.errors import CkptStoreError, DigestMismatchError
from ckptstore.formats.streaming import mismatch
from ckptstore.transfer.tuning import Tuner

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: One request's bytes at most, and how many are under way at once: to begin with, and where that makes it faster.
RANGE_BYTES = 16 << 20
THREADS = 8
MOST_THREADS = 32
BUDGET_BYTES = RANGE_BYTES * THREADS  #: of ranges under way: more of them are smaller ones, of a chunk at least
#: A range that differs each time it is asked for: the way is damaged, not the medium.
READS = 4

#: Called with a file's name, an offset and bytes that are right (as far as is known); on any thread.
Sink = Callable[[str, int, "Buffer"], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to read. `expected`: its chunks' CRCs; `have`: chunks that need not be read, since they are there."""

    name: str
    key: str
    size_bytes: int
    expected: Sequence[int] | None = None
    have: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Range:
    file: Wanted
    offset: int
    length: int


def fetch(
    backend: Backend,
    files: Sequence[Wanted],
    *,
    chunk_bytes: int = native.CHUNK_BYTES,
    sink: Sink | None = None,
    stop_at_error: bool = False,
    progress: native.Progress | None = None,
    crew: int = 1,
) -> dict[str, native.Digest | CkptStoreError]:
    """Read `files`, hand their bytes to `sink` in no order, and digest them. Thread-safe; memory is bounded.

    `crew`: processes of this machine that read at once, and share its memory.

    Where a file fails (DigestMismatchError at its first different chunk, NotFoundError, StorageError), its error stands in the
    result and the others go on, or it is raised with `stop_at_error`. What `sink` raises is raised.
    """
    # A chunk larger than a request is read in pieces, and known only when all of them are there.
    unit = chunk_bytes if chunk_bytes <= RANGE_BYTES else _divisor(chunk_bytes)
    lock = threading.Lock()
    pieces: dict[str, dict[int, int]] = {file.name: {} for file in files}
    errors: dict[str, CkptStoreError] = {}
    total = sum(file.size_bytes for file in files)
    done = total - sum(job.length for job in _ranges(files, chunk_bytes, unit))
    budget = BUDGET_BYTES // crew
    start = max(THREADS // crew, min(THREADS, 2))
    tuner = Tuner(start, max(min(MOST_THREADS // crew, 2 * budget // unit), start))

    def read(job: _Range, stop: parallel.Stop) -> None:
        nonlocal done
        if job.file.name in errors:
            return
        begun_s = time.monotonic()
        try:
            data, crcs = _read(backend, job, unit, chunk_bytes)
        except CkptStoreError as error:
            if stop_at_error:
                raise
            with lock:
                before = errors.get(job.file.name)
                if before is None or _offset(error) < _offset(before):
                    errors[job.file.name] = error
            return
        stop.check()
        if sink is not None:
            sink(job.file.name, job.offset, data)
        with lock:
            pieces[job.file.name].update(crcs)
            done += job.length
            tuner.done(begun_s, time.monotonic(), job.length)

    tick = None if progress is None else lambda: progress(done, total)
    ranges = _ranges(files, chunk_bytes, unit, lambda: budget // tuner.limit)
    parallel.each(ranges, read, threads=lambda: tuner.limit, tick=tick)
    results: dict[str, native.Digest | CkptStoreError] = {}
    for file in files:
        results[file.name] = errors.get(file.name) or _digest(file, pieces[file.name], chunk_bytes, unit)
        if stop_at_error and isinstance(error := results[file.name], CkptStoreError):
            raise error
    return results


def _divisor(chunk_bytes: int) -> int:
    """The largest size of a request that a chunk is a multiple of."""
    return next(size for size in range(RANGE_BYTES, 0, -4096) if not chunk_bytes % size)


def _ranges(
    files: Iterable[Wanted], chunk_bytes: int, unit: int, at_most: Callable[[], int] = lambda: RANGE_BYTES
) -> Iterator[_Range]:
    """What is missing of `files`, in requests of whole units, each of what `at_most` says when it is begun."""
    for file in files:
        start = 0
        while start < file.size_bytes:
            step = max(min(RANGE_BYTES, at_most()) // unit, 1) * unit
            if start // chunk_bytes in file.have:
                start = (start // chunk_bytes + 1) * chunk_bytes
                continue
            end = min(start + step, file.size_bytes)
            known = (offset for offset in range(start, end, unit) if offset // chunk_bytes in file.have)
            end = min(next(known, end), end)
            yield _Range(file, start, end - start)
            start = end


def _read(backend: Backend, job: _Range, unit: int, chunk_bytes: int) -> tuple[Buffer, dict[int, int]]:
    """The bytes of a range, and the CRC of each unit in it by its number. DigestMismatchError where they stay wrong."""
    expected = job.file.expected if unit == chunk_bytes else None
    seen: set[tuple[int, ...]] = set()
    for _ in range(READS):
        data = memoryview(backend.view(job.file.key, job.offset, job.length))
        crcs = [native.crc64(data[start : start + unit]) for start in range(0, job.length, unit)]
        first = job.offset // unit
        wrong = next((n for n, crc in enumerate(crcs) if expected is not None and crc != expected[first + n]), None)
        if wrong is None:
            return data, {first + number: crc for number, crc in enumerate(crcs)}
        if tuple(crcs) in seen:
            break
        seen.add(tuple(crcs))
    assert wrong is not None
    raise mismatch(job.file.name, (first + wrong) * unit)


def _digest(file: Wanted, pieces: Mapping[int, int], chunk_bytes: int, unit: int) -> native.Digest | CkptStoreError:
    """The digest of a file from those of its units."""
    chunks: list[int] = []
    whole = 0
    per_chunk = chunk_bytes // unit
    for number in range(-(-file.size_bytes // chunk_bytes)):
        start = number * chunk_bytes
        crc = file.have.get(number)
        if crc is None:
            crc = 0
            for piece in range(number * per_chunk, -(-min(start + chunk_bytes, file.size_bytes) // unit)):
                crc = native.crc64_combine(crc, pieces[piece], min(unit, file.size_bytes - piece * unit))
        if file.expected is not None and crc != file.expected[number]:
            return mismatch(file.name, start)
        chunks.append(crc)
        whole = native.crc64_combine(whole, crc, min(chunk_bytes, file.size_bytes - start))
    return native.Digest(whole, tuple(chunks))


def _offset(error: CkptStoreError) -> int:
    return error.offset_bytes if isinstance(error, DigestMismatchError) else -1
