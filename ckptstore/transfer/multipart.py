"""A large file to S3 part by part, and on from where an earlier upload of it stopped.

What is there already is not trusted by its size: a part counts when the CRC-64/NVME that the store tells of it is that of the
file's digests, and no byte is read here; or, where it tells none, when its ETag is the MD5 of our bytes, read and checked now.
Any other part is sent. In the end the store makes the object of the parts that were named, and where it checks digests, it
does so only if the whole is what the file's digests say.

Nobody knows whether an upload that is found is a dead push's or a living one's. Either way it is joined: whoever sends the same
content sends the same bytes under the same part numbers. The first to complete makes the object; the other finds its upload
gone and the object there, by its digest. An upload of which no part is right is another content's: it is left alone.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ckptstore import parallel
from ckptstore.backends.connections import Body
from ckptstore.backends.s3control import Upload
from ckptstore.backends.s3multipart import GoneError, Part, S3Multipart
from ckptstore.errors import TransitError

if TYPE_CHECKING:
    from typing_extensions import Buffer

STREAMS = 8  #: parts of one file on their way at once, to begin with: what a kill may cost
ROUNDS = 3
LOOKED_AT = 4  #: the newest uploads of a key, and the parts of each, that are looked at for a right one
_MD5 = re.compile(r"[0-9a-f]{32}")


class Content(NamedTuple):
    """A file whose digests are known beforehand. Both functions are for whole parts, by offset and length."""

    key: str
    size_bytes: int
    crc64: int
    #: Its bytes, in pieces, each checked as soon as a chunk of them is there. A piece holds until the next one.
    read: Callable[[int, int], Iterable[Buffer]]
    crc: Callable[[int, int], int]  #: the CRC-64/NVME of such bytes


@dataclass(slots=True, kw_only=True)
class Uploading:
    """One file on its way, or looked for.

    `streams` says how many parts may be on their way now. On any thread: `progress` gets the bytes of each part, once, when it
    is there; `sent`, for each one that was sent, the monotonic times from its reading to the store's answer, and its bytes.
    """

    store: S3Multipart
    content: Content
    part_bytes: int
    streams: Callable[[], int] = lambda: STREAMS
    progress: Callable[[int], None] = lambda _: None
    sent: Callable[[float, float, int], None] = lambda begun_s, ended_s, size_bytes: None
    stop: parallel.Stop = field(default_factory=parallel.Stop)
    there_bytes: int = 0  #: found there, and not sent by us
    lock: threading.Lock = field(default_factory=threading.Lock)
    told: set[int] = field(default_factory=set)  #: numbers of the parts that `progress` knows of
    before: frozenset[int] | None = None  #: and of those that were there when we came

    @property
    def count(self) -> int:
        """Parts that the file has."""
        return -(-self.content.size_bytes // self.part_bytes)

    def run(self) -> None:
        """Make the object. After an error none is made, the parts stay, and the next run, by whomever, goes on with them.

        Errors as S3Multipart's and `read`'s; TransitError where the store keeps other bytes than were sent.
        """
        found = self._find()
        code = ""
        for _ in range(ROUNDS):
            if found is None:
                self.there_bytes = 0  # of one that has ended meanwhile
            at = self.store.begin(self.content.key) if found is None else found
            parts: dict[int, Part] = {}
            try:
                sent = self._bring(at, parts, fresh=found is None)
                code = self.store.complete(at, parts, crc64=self.content.crc64, stop=self.stop)
            except GoneError:
                code = "NoSuchUpload"
            content = self.content
            if not code or self.store.holds(content.key, content.size_bytes, parts, crc64=content.crc64):
                return
            found = None
            if code != "NoSuchUpload":
                if sent:  # a part that arrived as something else is found by its digest, and sent again
                    found = at
                else:
                    self.store.abort(at)
        raise TransitError(
            f"writing {self.content.key}: the store does not make it of the parts that were sent ({code})",
            operation="completing an upload",
            path=self.content.key,
            hint="The way there, or the store, damages data; or somebody else writes there.",
        )

    def look(self, tick: Callable[[], None]) -> None:
        """See how much is there of the upload that run() would go on with. Nothing is begun or ended."""
        try:
            parts = self.store.parts(found) if (found := self._find()) is not None else []
        except GoneError:
            parts = []

        def one(part: Part, stop: parallel.Stop) -> None:
            if self._is_right(part):
                with self.lock:
                    self.there_bytes += part.size_bytes

        parallel.each(parts, one, threads=min(self.streams(), len(parts)), tick=tick)

    def _find(self) -> Upload | None:
        """The newest upload that has some of this content."""
        for found in self.store.unfinished(self.content.key)[:LOOKED_AT]:
            try:
                parts = self.store.parts(found)
            except GoneError:
                continue
            if parts and parts[-1].number <= self.count and any(self._is_right(part) for part in parts[:LOOKED_AT]):
                return found
        return None

    def _bring(self, at: Upload, parts: dict[int, Part], *, fresh: bool) -> int:
        """All parts into the upload `at`, and into `parts`; how many had to be sent."""
        there = {} if fresh else {part.number: part for part in self.store.parts(at)}
        if self.before is None:
            self.before = frozenset(there)
        before = self.before
        sent = 0

        def one(number: int, stop: parallel.Stop) -> None:
            nonlocal sent
            offset, length = self._place(number)
            part = there.get(number)
            right = part is not None and self._is_right(part)
            if part is None or not right:
                begun_s = time.monotonic()
                crc = self.content.crc(offset, length)
                body = Body(length, functools.partial(self.content.read, offset, length))
                part = self.store.put(at, number, body, crc64=crc, stop=stop)
                self.sent(begun_s, time.monotonic(), length)
            with self.lock:
                parts[number] = part._replace(crc64=self.content.crc(offset, length))
                sent += not right
                new = number not in self.told
                self.told.add(number)
                self.there_bytes += length if right and new and number in before else 0
            if new:
                self.progress(length)

        parallel.each(range(1, self.count + 1), one, threads=lambda: min(self.streams(), self.count), tick=self.stop.check)
        return sent

    def _is_right(self, part: Part) -> bool:
        """Whether the store has what we would send as this part."""
        offset, length = self._place(part.number)
        if part.size_bytes != length:
            return False
        if part.crc64 is not None:
            return part.crc64 == self.content.crc(offset, length)
        if not _MD5.fullmatch(part.etag):
            return False
        digest = hashlib.md5(usedforsecurity=False)
        for piece in self.content.read(offset, length):
            digest.update(piece)
        return digest.hexdigest() == part.etag

    def _place(self, number: int) -> tuple[int, int]:
        offset = (number - 1) * self.part_bytes
        return offset, min(self.part_bytes, self.content.size_bytes - offset)
