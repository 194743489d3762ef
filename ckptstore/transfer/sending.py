"""Send files to a backend: part by part, the largest first, memory bounded, what fails as a whole sent anew for a while.

How many parts of our own uploads to S3 are on their way at once is tuned to what they bring (tuning.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptstore import native, parallel
from ckptstore.backends.base import Backend
from ckptstore.errors import NoSpaceError, StorageError, TransitError
from ckptstore.transfer import multipart
from ckptstore.transfer.tuning import Tuner

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ckptstore.backends.s3multipart import S3Multipart

PART_BYTES = 16 << 20
MAX_PARTS = 9000  #: of 10,000 that S3 allows one object
FILES_AT_ONCE = 4
FILE_TRIES = 4
SEND_AGAIN_S = 30.0  #: where nothing went for longer than this, it has been tried often enough, request by request
BUDGET_BYTES = 256 << 20  #: of parts on their way by the library, which holds them twice at most
AT_ONCE, MOST_AT_ONCE = 16, 32  #: parts of our own uploads on their way; they take no memory worth counting


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
    streams = _Streams(sum(map(_has_parts, ordered)), threads=threads, crew=crew)

    def send_whole(file: Outgoing, stop: parallel.Stop, moved: Callable[[int], None]) -> None:
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
        else:
            at_once = max(BUDGET_BYTES // (crew * threads) // part_bytes, 1)
            target.put_parts(file.key, parts(), part_bytes=part_bytes, parallel=at_once)

    def send_one(file: Outgoing, stop: parallel.Stop) -> None:
        """A file whose upload fails as a whole (damaged on its way, broken off as it began) is sent anew, for a while."""
        nonlocal done, found
        mine, moved_s = 0, time.monotonic()

        def moved(count_bytes: int) -> None:
            nonlocal done, mine, moved_s
            with lock:
                done += count_bytes
                mine += count_bytes
                moved_s = time.monotonic()

        uploading: multipart.Uploading | None = None
        for left in reversed(range(FILE_TRIES)):
            if uploading is None and uploads is not None:
                uploading = _uploading(uploads, file, progress=moved, stop=stop, streams=streams.of_each, sent=streams.sent)
            sent = False
            try:
                if uploading is not None:
                    uploading.run()
                else:
                    send_whole(file, stop, moved)
                sent = True
                file.arrived()
            except StorageError as error:
                gone = time.monotonic() > moved_s + SEND_AGAIN_S and not isinstance(error, TransitError)
                if not left or gone or isinstance(error, NoSpaceError):
                    raise
                if uploading is None or sent:  # else its parts are there, and stay
                    uploading = None
                    moved(-mine)
            else:
                if uploading is not None:
                    with lock:
                        found += uploading.there_bytes
                    streams.end()
                return

    tick = None if progress is None else lambda: progress(done, total)
    parallel.each(ordered, send_one, threads=threads, tick=tick)
    return found


def look(uploads: S3Multipart, files: Iterable[Outgoing], *, tick: Callable[[], None]) -> int:
    """How many bytes send() would find in unfinished uploads. Nothing is written. `tick` is called now and then."""
    found = 0
    for file in files:
        uploading = _uploading(uploads, file)
        if uploading is not None:
            uploading.look(tick)
            found += uploading.there_bytes
    return found


def _uploading(uploads: S3Multipart, file: Outgoing, **how: Any) -> multipart.Uploading | None:
    """A file by parts that stay when it is cut short; None for one of a single part, or whose digests are not known."""
    if file.content is None or not _has_parts(file):
        return None
    return multipart.Uploading(store=uploads, content=file.content, part_bytes=part_size(file.size_bytes), **how)


def _has_parts(file: Outgoing) -> bool:
    return file.size_bytes > part_size(file.size_bytes)


class _Streams:
    """How many parts of our own uploads are on their way, of the files that are sent together. Thread-safe."""

    def __init__(self, files: int, *, threads: int, crew: int) -> None:
        self._left = files  #: of several parts, and not there yet
        self._threads = threads
        self._lock = threading.Lock()
        start = min(AT_ONCE // crew, multipart.STREAMS * self._sharers)
        self._tuner = Tuner(max(start, 1), max(MOST_AT_ONCE // crew, 1))

    @property
    def _sharers(self) -> int:
        return max(min(self._threads, self._left), 1)

    def of_each(self) -> int:
        """Parts of one file. Those that have not begun have their share already."""
        return max(self._tuner.limit // self._sharers, 1)

    def end(self) -> None:
        """One file is there."""
        with self._lock:
            self._left -= 1

    def sent(self, begun_s: float, ended_s: float, size_bytes: int) -> None:
        """See multipart.Uploading."""
        with self._lock:
            self._tuner.done(begun_s, ended_s, size_bytes)


def part_size(size_bytes: int) -> int:
    """Bytes of a part: the same for a whole object (R2 demands it), in whole chunks, so that no object needs too many."""
    needed = -(-size_bytes // MAX_PARTS)
    return max(PART_BYTES, -(-needed // native.CHUNK_BYTES) * native.CHUNK_BYTES)
