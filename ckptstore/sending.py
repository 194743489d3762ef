"""Send files to a backend: part by part, the largest first, memory bounded, what fails as a whole sent anew for a while.

How many parts of our own uploads to S3 are on their way at once is tuned to what they bring (tuning.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ckptstore import multipart, native, parallel
from ckptstore.backends.base import Backend
from ckptstore.errors import NoSpaceError, StorageError
from ckptstore.tuning import Tuner

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ckptstore.backends.s3multipart import S3Multipart

PART_BYTES = 16 << 20
MAX_PARTS = 9000  #: of 10,000 that S3 allows one object
FILES_AT_ONCE = 4
FILE_TRIES = 4
SEND_AGAIN_S = 60.0  #: what failed for longer than this has been tried often enough, request by request
BUDGET_BYTES = 256 << 20  #: of parts on their way; the library holds them twice at most, and of our own there may be so many


class Outgoing(NamedTuple):
    """A file to send. `parts(part_bytes)` yields its bytes, from the start, in parts of that size, the last one shorter.

    `arrived` is called when it is there; what it raises counts as the upload's. `content`: the same bytes, where their digests
    are known beforehand: an upload of it that was cut short can go on.
    """

    key: str
    size_bytes: int
    parts: Callable[[int], Iterator[Buffer]]
    arrived: Callable[[], None] = lambda: None
    content: multipart.Content | None = None


def send(
    target: Backend,
    files: Iterable[Outgoing],
    *,
    there: int = 0,
    crew: int = 1,
    uploads: S3Multipart | None = None,
    progress: native.Progress | None = None,
) -> int:
    """Send files. What `parts` raises is raised, and that file is not there then; so are StorageError and AccessError.

    `there`: bytes that count as done, for `progress`. `crew`: processes of this machine that send at once and share its
    memory. `uploads`: by which a file of several parts whose content is known goes on where an earlier upload stopped; how
    many bytes were found there is what comes back. Thread-safe; Ctrl-C ends it within moments.
    """
    ordered = sorted(files, key=lambda file: -file.size_bytes)
    lock = threading.Lock()
    done = there
    found = 0
    total = there + sum(file.size_bytes for file in ordered)
    threads = min(max(FILES_AT_ONCE // crew, 1), max(len(ordered), 1))
    large = [file for file in ordered if file.size_bytes > part_size(file.size_bytes)]
    at_once = max(BUDGET_BYTES // crew // part_size(large[0].size_bytes), 1) if large else 1
    tuner = Tuner(min(at_once, multipart.STREAMS * min(threads, max(len(large), 1))), 2 * at_once)
    shared_by = 0  #: files whose parts are tuned together

    def streams() -> int:
        return max(tuner.limit // max(shared_by, 1), 1)

    def sent(begun_s: float, ended_s: float, size_bytes: int) -> None:
        with lock:
            tuner.done(begun_s, ended_s, size_bytes)

    def moved(count_bytes: int) -> None:
        nonlocal done
        with lock:
            done += count_bytes

    def send_one(file: Outgoing, stop: parallel.Stop) -> None:
        nonlocal found, shared_by
        part_bytes = part_size(file.size_bytes)

        def parts() -> Iterator[Buffer]:
            for data in file.parts(part_bytes):
                stop.check()
                size_bytes = memoryview(data).nbytes
                yield data
                del data  # its buffer may be the next part's
                moved(size_bytes)

        if file.size_bytes <= part_bytes:
            (data,) = list(parts()) or [b""]
            target.put(file.key, data)
        elif uploads is not None and file.content is not None:
            with lock:
                shared_by += 1
            try:
                before = multipart.upload(
                    uploads, file.content, part_bytes=part_bytes, streams=streams, sent=sent, stop=stop, progress=moved
                )
            finally:
                with lock:
                    shared_by -= 1
            with lock:
                found += before
        else:
            target.put_parts(file.key, parts(), part_bytes=part_bytes, parallel=max(at_once // threads, 1))
        file.arrived()

    def send_again(file: Outgoing, stop: parallel.Stop) -> None:
        """A file whose upload fails as a whole (damaged on its way, broken off as it began) is sent anew, for a while."""
        nonlocal done
        deadline = time.monotonic() + SEND_AGAIN_S
        for left in reversed(range(FILE_TRIES)):
            before = done
            try:
                send_one(file, stop)
            except StorageError as error:
                if not left or time.monotonic() > deadline or isinstance(error, NoSpaceError):
                    raise
                with lock:
                    done = min(before, done)
            else:
                return

    tick = None if progress is None else lambda: progress(done, total)
    parallel.each(ordered, send_again, threads=threads, tick=tick)
    return found


def look(uploads: S3Multipart, files: Iterable[Outgoing], *, tick: Callable[[], None]) -> int:
    """How many bytes send() would find in unfinished uploads. Nothing is written. `tick` is called now and then."""
    found = 0
    for file in files:
        part_bytes = part_size(file.size_bytes)
        if file.content is not None and file.size_bytes > part_bytes:
            streams = min(max(BUDGET_BYTES // part_bytes, 1), multipart.STREAMS)
            found += multipart.look(uploads, file.content, part_bytes=part_bytes, streams=streams, tick=tick)
    return found


def part_size(size_bytes: int) -> int:
    """Bytes of a part: the same for a whole object (R2 demands it), in whole chunks, so that no object needs too many."""
    needed = -(-size_bytes // MAX_PARTS)
    return max(PART_BYTES, -(-needed // native.CHUNK_BYTES) * native.CHUNK_BYTES)
