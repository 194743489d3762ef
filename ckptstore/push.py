"""Push: a checkpoint of a local run into an object store, so that readers see all of it or nothing.

Each part of a checkpoint, into `URL/{part}/{export}/`, the main model last:

    1  claim      `.ckptstore.manifest.claim`, create-only: names the content (sizes and digests of all files) and the writer.
                  A claim of the same content may be shared, since whoever holds it writes the same bytes: so an interrupted
                  push goes on, and two that do the same harm nobody. One of another content ends the push here
    2  look       a manifest of the same content: only what is missing is sent; of another one: the push ends, and so where
                  keys lie below that no claim of ours brought
    3  data       every file under its final key, unless it is there already; each byte read once, checked against the
                  manifest on the way; a file that differs is never completed
    4  look again all keys with the right sizes, and no others
    5  manifest   create-only: from here on it is COMMITTED. Who loses this race has written the same content
    6  claim away

A crash leaves a claim and whole files, which no reader takes for a checkpoint; the same push goes on with them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from ckptstore import native, parallel
from ckptstore.backends.base import Backend
from ckptstore.errors import (
    AlreadyExistsError,
    BusyError,
    IntegrityError,
    ManifestError,
    NoSpaceError,
    NotFoundError,
    SourceChangedError,
    StorageError,
    UsageError,
)
from ckptstore.formats.streaming import mismatch
from ckptstore.frameworks.areal import layout
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import DRAFT_PREFIX, MANIFEST_NAME, Checkpoint, Part
from ckptstore.parts import folder_of, read_manifest, read_part
from ckptstore.seal import describe
from ckptstore.verify import Notify

CLAIM = f"{DRAFT_PREFIX}claim"
PART_BYTES = 16 << 20
MAX_PARTS = 9000  #: of 10,000 that S3 allows one object
FILES_AT_ONCE = 4
FILE_TRIES = 4
SEND_AGAIN_S = 60.0  #: what failed for longer than this has been tried often enough, request by request
BUDGET_BYTES = 256 << 20  #: of parts on their way; the library holds them twice at most


@dataclass(frozen=True, slots=True)
class Sent:
    """What a push did for one part of a checkpoint, or with `dry_run` would do."""

    step: int
    part: str
    url: str  #: the prefix: everything below it is the checkpoint
    sent_bytes: int
    there_bytes: int  #: were there already
    committed_before: bool  #: its manifest was there already
    manifest_sha256: str
    notes: tuple[str, ...] = ()


class Sending(Protocol):
    """Sends files of a part, each checked against the manifest on the way (step 3)."""

    def __call__(
        self,
        folder: str,
        manifest: Manifest,
        missing: Sequence[FileEntry],
        *,
        there_bytes: int,
        progress: native.Progress,
    ) -> None:
        """All of `missing` lie below `folder` when this returns."""


def push(
    backend: Backend,
    checkpoint: Checkpoint,
    target: Backend,
    *,
    dry_run: bool = False,
    sending: Sending | None = None,
    notify: Notify | None = None,
) -> list[Sent]:
    """Push one checkpoint of the local run `backend` to the run `target`. Thread-safe; several machines may push at once.

    IntegrityError for a checkpoint that is not whole, or whose bytes differ from its manifest; SourceChangedError when the
    trainer writes it meanwhile; AlreadyExistsError where another content of this step lies there; BusyError where another push
    has claimed it. After any error and any kill, no reader sees a part of it. `sending` sends the files, where this process
    alone shall not (sharing.py).
    """
    if target.is_folder or not backend.is_folder:
        raise UsageError("a push goes from a folder to a URL", hint="Say --to s3://BUCKET/PREFIX.")
    if not checkpoint.status.usable:
        raise IntegrityError(
            f"step {checkpoint.step} is {checkpoint.status}: {'; '.join(map(str, checkpoint.findings[:3]))}",
            hint="Only whole checkpoints are pushed.",
        )
    notes = () if dry_run else _conditions(target)
    ordered = sorted(checkpoint.parts, key=lambda part: part.name == layout.MAIN_PART)
    done: list[Sent] = []
    before = 0
    for part in ordered:
        doing = f"pushing step {checkpoint.step}"

        def progress(done_bytes: int, _: int, before: int = before, doing: str = doing) -> None:
            if notify is not None:
                notify(doing, before + done_bytes, checkpoint.size_bytes)

        def digesting(done_bytes: int, total_bytes: int, part: Part = part) -> None:
            if notify is not None:
                notify(f"digesting {part.name}", done_bytes, total_bytes)

        folder = folder_of(backend, part)
        manifest = describe(backend, checkpoint, part, digesting)
        done.append(
            _Push(backend, folder, part, manifest, target, sending).run(dry_run=dry_run, notes=notes, progress=progress)
        )
        before += part.size_bytes
    return done


def _conditions(target: Backend) -> tuple[str, ...]:
    """What to know of a store on which create-only means nothing: found by trying."""
    key = f"{DRAFT_PREFIX}probe-{secrets.token_hex(8)}"
    atomic = target.creates_atomically
    if atomic:
        try:
            target.put(key, b"1", if_absent=True)
            target.put(key, b"2", if_absent=True)
            atomic = False
        except AlreadyExistsError:
            pass
        finally:
            target.delete(key)
    text = "this store does not keep two writers apart: push a step from one machine at a time"
    return () if atomic else (text,)


@dataclass(slots=True)
class _Push:
    """One part on its way."""

    backend: Backend
    folder: str
    part: Part
    manifest: Manifest
    target: Backend
    sending: Sending | None = None
    crew: int = 1  #: processes of this machine that send at once, and share its memory

    def run(self, *, dry_run: bool, notes: tuple[str, ...], progress: native.Progress) -> Sent:
        if not dry_run:
            self._claim()
        present = {blob.key.removeprefix(f"{self.folder}/"): blob.size_bytes for blob in self.target.list(self.folder)}
        committed = self._committed(present)
        missing = [file for file in self.manifest.files if present.get(file.path) != file.size_bytes]
        there = self.manifest.size_bytes - sum(file.size_bytes for file in missing)
        sent = self.manifest.size_bytes - there
        if not dry_run:
            if self.sending is None:
                self._send(missing, there, progress)
            else:
                self.sending(self.folder, self.manifest, missing, there_bytes=there, progress=progress)
            self._look_again()
            if not committed:
                self._refuse_changed()
                committed = not self._publish()
            self.target.delete(self._key(CLAIM))
        sha256 = read_manifest(self.target, self.folder).sha256 if committed else self.manifest.sha256
        url = f"{self.target.location}/{self.folder}"
        return Sent(self.manifest.step, self.part.name, url, sent, there, committed, sha256, notes)

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _claim(self) -> None:
        """Step 1; what lies there without a claim or a manifest is somebody else's."""
        found = self._read_claim()
        if found is None and not self._has_manifest() and (strangers := [blob.key for blob in self.target.list(self.folder)]):
            found = self._read_claim()  # another push may have begun between those two looks
            if found is None and not self._has_manifest():
                raise AlreadyExistsError(
                    f"{self.target.location}/{self.folder} holds {len(strangers)} files that no push of ckptstore brought "
                    f"({strangers[0].rpartition('/')[2]})",
                    hint="Push to another URL, or move them away. `ckptstore verify --run URL` says whether they are whole.",
                )
        if found is None:
            mine = {
                "content": self.manifest.content,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            }
            try:
                self.target.put(self._key(CLAIM), json.dumps(mine).encode(), if_absent=True)
                return
            except AlreadyExistsError:  # another one was faster, or our own first try came through after all
                found = self._read_claim() or {}
        if found.get("content") != self.manifest.content and not self._has_manifest():
            since = " ".join(f"{name} {found[name]}" for name in ("host", "pid", "at") if name in found)
            raise BusyError(
                f"another push of step {self.manifest.step} has claimed {self.target.location}/{self.folder} for other bytes"
                + (f" ({since})" if since else ""),
                hint="When that push is dead for certain, remove everything below this prefix, then push again.",
            )

    def _read_claim(self) -> dict[str, object] | None:
        try:
            data = self.target.get(self._key(CLAIM), length_bytes=65536)
        except NotFoundError:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _has_manifest(self) -> bool:
        try:
            self.target.get(self._key(MANIFEST_NAME), length_bytes=1)
        except NotFoundError:
            return False
        return True

    def _committed(self, present: dict[str, int]) -> bool:
        """Step 2: whether this content is committed there."""
        if MANIFEST_NAME not in present:
            return False
        try:
            theirs = read_manifest(self.target, self.folder)
        except ManifestError as error:
            self._unclaim()
            where = f"{self.target.location}/{self.folder}"
            raise AlreadyExistsError(f"{where} has a manifest that does not count: {error}") from None
        if theirs.content == self.manifest.content:
            return True
        self._unclaim()
        raise AlreadyExistsError(
            f"{self.target.location}/{self.folder} holds step {theirs.step} with other bytes, committed {theirs.created_at}",
            hint="Nothing is replaced there. Push to another URL.",
        )

    def _unclaim(self) -> None:
        """Take our own claim away, where something of another content is committed."""
        found = self._read_claim()
        if found is not None and found.get("content") == self.manifest.content:
            self.target.delete(self._key(CLAIM))

    def _send(self, missing: Sequence[FileEntry], there: int, progress: native.Progress) -> None:
        """Step 3, the largest files first."""
        lock = threading.Lock()
        done = there
        total = self.manifest.size_bytes
        threads = min(max(FILES_AT_ONCE // self.crew, 1), max(len(missing), 1))

        def send(file: FileEntry, stop: parallel.Stop) -> None:
            nonlocal done
            part_bytes = part_size(file.size_bytes)

            def parts() -> Iterator[bytes]:
                nonlocal done
                for data in self._read(file, part_bytes):
                    stop.check()
                    yield data
                    with lock:
                        done += len(data)

            if file.size_bytes <= part_bytes:
                self.target.put(self._key(file.path), b"".join(parts()))
            else:
                at_once = max(BUDGET_BYTES // self.crew // threads // part_bytes, 1)
                self.target.put_parts(self._key(file.path), parts(), part_bytes=part_bytes, parallel=at_once)

        def send_again(file: FileEntry, stop: parallel.Stop) -> None:
            """A file whose upload fails as a whole (damaged on its way, broken off as it began) is sent anew, for a while."""
            nonlocal done
            deadline = time.monotonic() + SEND_AGAIN_S
            for left in reversed(range(FILE_TRIES)):
                before = done
                try:
                    send(file, stop)
                except StorageError as error:
                    if not left or time.monotonic() > deadline or isinstance(error, NoSpaceError):
                        raise
                    with lock:
                        done = min(before, done)
                else:
                    return

        ordered = sorted(missing, key=lambda file: -file.size_bytes)
        parallel.each(ordered, send_again, threads=threads, tick=lambda: progress(done, total))

    def _read(self, file: FileEntry, part_bytes: int) -> Iterator[bytes]:
        """A file's bytes, part by part, none of them yielded after a chunk that is not what the manifest records."""
        name = f"{self.folder}/{file.path}"
        crc = 0
        for start in range(0, file.size_bytes, part_bytes):
            length = min(part_bytes, file.size_bytes - start)
            data = self.backend.get(name, offset_bytes=start, length_bytes=length)
            if len(data) != length:
                raise SourceChangedError(f"{self.part.path}/{file.path} became shorter while it was pushed", path=file.path)
            view = memoryview(data)
            position = start
            while position < start + length:
                number = position // self.manifest.chunk_bytes
                end = min((number + 1) * self.manifest.chunk_bytes, start + length)
                crc = native.crc64(view[position - start : end - start], crc)
                if end == min((number + 1) * self.manifest.chunk_bytes, file.size_bytes):
                    if crc != file.chunks[number]:
                        self._refuse_changed()
                        raise mismatch(file.path, number * self.manifest.chunk_bytes)
                    crc = 0
                position = end
            yield data

    def _refuse_changed(self) -> None:
        """The manifest must still be that of what lies here."""
        now = read_part(self.backend, self.part.name, self.folder, self.backend.tree(max_depth=5))
        if now.files != self.part.files:
            raise SourceChangedError(
                f"{self.part.path} was written while it was pushed",
                path=self.part.path,
                hint="Wait until the trainer has saved, then push again.",
            )

    def _look_again(self) -> None:
        """Step 4."""
        present = {blob.key.removeprefix(f"{self.folder}/"): blob.size_bytes for blob in self.target.list(self.folder)}
        wrong = [file.path for file in self.manifest.files if present.get(file.path) != file.size_bytes]
        listed = {file.path for file in self.manifest.files} | {MANIFEST_NAME}
        extra = [name for name in present if name not in listed and not name.rpartition("/")[2].startswith(DRAFT_PREFIX)]
        if wrong or extra:
            name = (wrong or extra)[0]
            raise StorageError(
                f"{self.target.location}/{self.folder}/{name} is not what was sent there: "
                + ("another size, or missing" if wrong else "nothing of this name was"),
                operation="looking again",
                path=self._key(name),
                hint="Does anybody else write there? Nothing was committed.",
            )

    def _publish(self) -> bool:
        """Step 5; whether it was our manifest that came first."""
        data = self.manifest.to_bytes()
        try:
            self.target.put(self._key(MANIFEST_NAME), data, if_absent=True)
        except AlreadyExistsError:
            theirs = read_manifest(self.target, self.folder)
            if theirs == self.manifest:
                return True  # a first try came through after all
            if theirs.content == self.manifest.content:
                return False
            raise
        return True


def send_share(
    backend: Backend,
    target: Backend,
    manifest: Manifest,
    names: Sequence[str],
    *,
    folder: str,
    crew: int,
    progress: native.Progress,
) -> None:
    """Step 3 for these files of a part, by one of several processes; whoever leads them does all other steps."""
    part = read_part(backend, manifest.part, folder, backend.tree(max_depth=5))
    files = [file for file in manifest.files if file.path in set(names)]
    _Push(backend, folder, part, manifest, target, crew=crew)._send(files, 0, progress)


def part_size(size_bytes: int) -> int:
    """Bytes of a part: the same for a whole object (R2 demands it), in whole MiB, so that no object needs too many."""
    needed = -(-size_bytes // MAX_PARTS)
    return max(PART_BYTES, -(-needed // (8 << 20)) * (8 << 20))
