"""Push: a checkpoint of a local run into an object store, so that readers see all of it or nothing.

Each part of a checkpoint, into `URL/{part}/{export}/`, the main model last:

    1  claim      `.ckptstore.manifest.claim`, create-only: names the content (sizes and digests of all files), the files and
                  the writer. A claim of the same content may be shared, since whoever holds it writes the same bytes: so an
                  interrupted push goes on, and two that do the same harm nobody. One of another content ends the push here
    2  look       a manifest of the same content: only what is missing is sent; of another one: the push ends, and so where
                  keys lie below that no claim of ours brought
    3  data       every file under its final key, unless it is there already; each byte read once, checked against the
                  manifest on the way; a file that differs is never completed. Where the store computes digests of its own,
                  each file's is compared with the manifest's, also where it was there already: what differs is sent again
    4  look again all keys with the right sizes, and no others
    5  manifest   create-only: from here on it is COMMITTED. Who loses this race has written the same content
    6  claim away

A crash leaves a claim and whole files, which no reader takes for a checkpoint; the same push goes on with them.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ckptstore import conditions, native, parallel, server_digests
from ckptstore.backends.base import Backend
from ckptstore.conditions import Conditions
from ckptstore.errors import (
    AlreadyExistsError,
    BusyError,
    IntegrityError,
    ManifestError,
    NoSpaceError,
    NotFoundError,
    SourceChangedError,
    StorageError,
    TransitError,
    UsageError,
)
from ckptstore.formats.streaming import mismatch
from ckptstore.frameworks.areal import layout
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import DRAFT_PREFIX, MANIFEST_NAME, Checkpoint, Part
from ckptstore.parts import folder_of, read_manifest, read_part
from ckptstore.seal import describe
from ckptstore.server_digests import Said, ask_all
from ckptstore.verify import Notify

CLAIM = f"{DRAFT_PREFIX}claim"
MAX_CLAIM_BYTES = 16 << 20
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
    server_checked_bytes: int = 0  #: of files whose digest the store itself tells, and it is the manifest's
    server_check: str = ""  #: that digest's name, or why the store was not asked for it


def push(
    backend: Backend,
    checkpoint: Checkpoint,
    target: Backend,
    *,
    dry_run: bool = False,
    notify: Notify | None = None,
) -> list[Sent]:
    """Push one checkpoint of the local run `backend` to the run `target`. Thread-safe; several machines may push at once.

    IntegrityError for a checkpoint that is not whole, or whose bytes differ from its manifest; SourceChangedError when the
    trainer writes it meanwhile; AlreadyExistsError where another content of this step lies there; BusyError where another push
    has claimed it. After any error and any kill, no reader sees a part of it.
    """
    if target.is_folder or not backend.is_folder:
        raise UsageError("a push goes from a folder to a URL", hint="Say --to s3://BUCKET/PREFIX.")
    if not checkpoint.status.usable:
        raise IntegrityError(
            f"step {checkpoint.step} is {checkpoint.status}: {'; '.join(map(str, checkpoint.findings[:3]))}",
            hint="Only whole checkpoints are pushed.",
        )
    store = conditions.look(target) if dry_run else conditions.find_out(target)
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
        done.append(_Push(backend, folder, part, manifest, target, store).run(dry_run=dry_run, progress=progress))
        before += part.size_bytes
    return done


@dataclass(slots=True)
class _Push:
    """One part on its way."""

    backend: Backend
    folder: str
    part: Part
    manifest: Manifest
    target: Backend
    store: Conditions
    committed: bool = False
    said: dict[str, Said] = field(default_factory=dict)  #: what the store tells of the files that are there

    def run(self, *, dry_run: bool, progress: native.Progress) -> Sent:
        if not dry_run:
            self._claim()
        present = {blob.key.removeprefix(f"{self.folder}/"): blob.size_bytes for blob in self.target.list(self.folder)}
        self.committed = self._committed(present)
        missing = [file for file in self.manifest.files if present.get(file.path) != file.size_bytes]
        if self.store.control is not None:
            lies_there = [file for file in self.manifest.files if present.get(file.path) == file.size_bytes]
            self.said = ask_all(self.store.control, self.folder, lies_there)
            missing += [file for file in lies_there if self.said[file.path] in (Said.OTHER, Said.MISSING)]
        there = self.manifest.size_bytes - sum(file.size_bytes for file in missing)
        sent = self.manifest.size_bytes - there
        if not dry_run:
            self._send(missing, there, progress)
            self._look_again()
            if not self.committed:
                self._refuse_changed()
                self.committed = not self._publish()
            self.target.delete(self._key(CLAIM))
        sha256 = read_manifest(self.target, self.folder).sha256 if self.committed else self.manifest.sha256
        url = f"{self.target.location}/{self.folder}"
        return Sent(
            self.manifest.step,
            self.part.name,
            url,
            sent,
            there,
            self.committed,
            sha256,
            self.store.notes,
            server_checked_bytes=sum(f.size_bytes for f in self.manifest.files if self.said.get(f.path) is Said.SAME),
            server_check=self.store.check,
        )

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
            try:
                self.target.put(self._key(CLAIM), self._my_claim(), if_absent=True)
                return
            except AlreadyExistsError:  # another one was faster, or our own first try came through after all
                found = self._read_claim() or {}
        if found.get("content") != self.manifest.content and not self._has_manifest():
            since = " ".join(f"{name} {found[name]}" for name in ("host", "pid", "at") if name in found)
            raise BusyError(
                f"another push of step {self.manifest.step} has claimed {self.target.location}/{self.folder} for other bytes"
                + (f" ({since})" if since else ""),
                hint="Where it is dead, `ckptstore clean --run URL --older-than 36h` removes what it left; then push again.",
            )
        if found.get("content") == self.manifest.content:
            self.target.put(self._key(CLAIM), self._my_claim())  # it is young again: whoever cleans sees us at work

    def _my_claim(self) -> bytes:
        mine: dict[str, object] = {
            "content": self.manifest.content,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        }
        data = json.dumps(mine | {"files": [file.path for file in self.manifest.files]}).encode()
        return data if len(data) < MAX_CLAIM_BYTES else json.dumps(mine).encode()

    def _read_claim(self) -> dict[str, object] | None:
        try:
            data = self.target.get(self._key(CLAIM), length_bytes=MAX_CLAIM_BYTES)
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
        threads = min(FILES_AT_ONCE, max(len(missing), 1))

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
                at_once = max(BUDGET_BYTES // threads // part_bytes, 1)
                self.target.put_parts(self._key(file.path), parts(), part_bytes=part_bytes, parallel=at_once)
            self._compare(file)

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

    def _compare(self, file: FileEntry) -> None:
        """What arrived, by the store's own digest. What differs goes: nobody shall take it for the file by its size."""
        if self.store.control is None:
            return
        said = self.said[file.path] = server_digests.ask(self.store.control, self._key(file.path), file)
        if said in (Said.OTHER, Said.MISSING):
            if said is Said.OTHER and not self.committed:
                self.target.delete(self._key(file.path))
            raise TransitError(
                f"{self.target.location}/{self._key(file.path)} is not what was sent there: the store says, {said.value}",
                operation="comparing digests",
                path=self._key(file.path),
                hint="The way there, or the store, damages data; or somebody else writes there. Nothing was committed.",
            )

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


def part_size(size_bytes: int) -> int:
    """Bytes of a part: the same for a whole object (R2 demands it), in whole MiB, so that no object needs too many."""
    needed = -(-size_bytes // MAX_PARTS)
    return max(PART_BYTES, -(-needed // (8 << 20)) * (8 << 20))
