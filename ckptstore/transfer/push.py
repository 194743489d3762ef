"""Push: a checkpoint of a local run into an object store, so that readers see all of it or nothing.

Each part of a checkpoint, into `URL/{part}/{export}/`, the main model last:

    1  look       a manifest of the same content: only what is missing is sent. Of another one: the push ends, or with `replace`
                  makes an attempt. Files that no push of ours brought, and no manifest: the push ends
    2  claim      create-only, names the content. The first writer claims the folder itself; who finds it claimed for other
                  bytes makes an attempt, a folder of its own (claims.py). A claim of the same content is shared, since whoever
                  holds it writes the same bytes: so an interrupted push goes on, and two that do the same harm nobody
    3  data       every file under its final key, unless it is there already, and with S3 the parts of an upload that was cut
                  short (multipart.py); each byte read once, checked against the manifest on the way; a file that differs is
                  never completed. Where the store computes digests of its own, each file's is compared with the manifest's,
                  also where it was there already: what differs is sent again
    4  look again all keys with the right sizes, and no others; the claim still ours
    5  manifest   create-only, or for a replacement only over the one that was seen; its `base` names the attempt. From here on
                  it is COMMITTED. Who loses this race is told, and has touched no key of the winner's. Then 4 once more: where
                  `clean` removed the files in this very moment, the manifest is taken back
    6  claim away

A crash leaves a claim, whole files and uploads, which no reader takes for a checkpoint; the same push goes on with them, and
`clean --run URL` removes what never will (leftovers.py).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ckptstore import native, pages
from ckptstore.backends.base import Backend, Fill
from ckptstore.errors import (
    AccessError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    UnavailableError,
    UsageError,
)
from ckptstore.formats.streaming import mismatch
from ckptstore.frameworks.areal import layout
from ckptstore.listing import scan
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import ATTEMPT_PREFIX, Checkpoint, Part
from ckptstore.parts import folder_of, read_manifest, read_part
from ckptstore.seal import describe
from ckptstore.transfer import conditions, multipart, server_digests
from ckptstore.transfer.claims import RENEW_S, Place
from ckptstore.transfer.conditions import Conditions
from ckptstore.transfer.sending import Outgoing, look, part_size, send
from ckptstore.transfer.server_digests import Said, ask_all
from ckptstore.verify import Notify

if TYPE_CHECKING:
    from ckptstore.backends.s3multipart import S3Multipart

    Find = Callable[[Backend], tuple[S3Multipart | None, str]]

PIECE_BYTES = 256 << 10  #: stays in a core's cache from the file to the connection
_DAMAGES = "The way there, or the store, damages data; or somebody else writes there. Nothing was committed."


@dataclass(frozen=True, slots=True)
class Sent:
    """What a push did for one part of a checkpoint, or with `dry_run` would do."""

    step: int
    part: str
    url: str  #: the prefix: the files lie below it
    sent_bytes: int
    there_bytes: int  #: were there already, in files and, where this process sent, in parts of uploads that were cut short
    committed_before: bool  #: its manifest was there already
    manifest_sha256: str
    notes: tuple[str, ...] = ()
    server_checked_bytes: int = 0  #: of files whose digest the store itself tells, and it is the manifest's
    server_check: str = ""  #: that digest's name, or why the store was not asked for it


class Sending(Protocol):
    """Sends files of a part, each checked against the manifest on the way (step 3)."""

    def __call__(
        self,
        folder: str,
        base: str,
        manifest: Manifest,
        missing: Sequence[FileEntry],
        *,
        there_bytes: int,
        progress: native.Progress,
    ) -> None:
        """All of `missing` lie below `folder`, there in the attempt `base` if it is not empty, when this returns."""


def push(
    backend: Backend,
    checkpoint: Checkpoint,
    target: Backend,
    *,
    replace: bool = False,
    dry_run: bool = False,
    whole: Manifest | None = None,
    sending: Sending | None = None,
    notify: Notify | None = None,
) -> list[Sent]:
    """Push one checkpoint of the local run `backend` to the run `target`. Thread-safe; several machines may push at once.

    IntegrityError for a checkpoint that is not whole, or whose bytes differ from its manifest; SourceChangedError when the
    trainer writes it meanwhile; AlreadyExistsError where another content of this step lies there, or came first. With
    `replace` the new one takes its place in one act, and the old files stay until they are cleaned; RefusedError where that
    cannot be one act. After any error and any kill, readers see what they saw before. `sending` sends the files, where
    this process alone shall not (sharing.py); `whole` says what they are, where this machine has a part of them (gathering.py).
    """
    if target.is_folder or not backend.is_folder:
        raise UsageError("a push goes from a folder to a URL", hint="Say --to s3://BUCKET/PREFIX.")
    if not checkpoint.status.usable:
        raise IntegrityError(
            f"step {checkpoint.step} is {checkpoint.status}: {'; '.join(map(str, checkpoint.findings[:3]))}",
            hint="Only whole checkpoints are pushed.",
        )
    if replace:
        _refuse_several(checkpoint, target)
    store = conditions.look(target) if dry_run else conditions.find_out(target)
    ordered = sorted(checkpoint.parts, key=lambda part: part.name == layout.MAIN_PART)
    done: list[Sent] = []
    before = 0
    for part in ordered:
        doing = f"pushing step {checkpoint.step}"

        def progress(done_bytes: int, _: int, before: int = before, doing: str = doing) -> None:
            if notify is not None:
                notify(doing, before + done_bytes, checkpoint.size_bytes if whole is None else whole.size_bytes)

        def digesting(done_bytes: int, total_bytes: int, part: Part = part) -> None:
            if notify is not None:
                notify(f"digesting {part.name}", done_bytes, total_bytes)

        folder = folder_of(backend, part)
        manifest = describe(backend, checkpoint, part, digesting) if whole is None else whole
        fixed = part.name == layout.RECOVER_INFO  # read where AReaL reads it
        place = Place(target, folder, manifest.at_home, replace=replace, fixed=fixed)
        way = _Push(backend, folder, part, manifest.at_home, place, store, sending)
        done.append(way.run(dry_run=dry_run, progress=progress))
        before += part.size_bytes
    return done


def _refuse_several(checkpoint: Checkpoint, target: Backend) -> None:
    """A checkpoint of several parts, here or there, has several manifests: readers would see some of each."""
    try:
        there = scan(target).at_step(checkpoint.step)
    except NotFoundError:
        there = []
    names = {part.name for found in (checkpoint, *there) for part in found.parts}
    if len(names) > 1:
        raise RefusedError(
            f"step {checkpoint.step} has {len(names)} parts, which cannot be replaced in one act", hint="Push to another URL."
        )


def resend(
    backend: Backend, part: Part, manifest: Manifest, target: Backend, *, entry: FileEntry, progress: native.Progress
) -> None:
    """Send one file of a part that is committed in `target` as `manifest` says. Errors as push's."""
    folder = folder_of(backend, part)
    place = Place(target, folder, manifest, base=manifest.base)
    way = _Push(backend, folder, part, manifest, place, conditions.find_out(target), committed=True)
    way.send([entry], 0, progress)


@dataclass(slots=True)
class _Push:
    """One part on its way."""

    backend: Backend
    folder: str
    part: Part
    manifest: Manifest
    place: Place
    store: Conditions
    sending: Sending | None = None
    crew: int = 1  #: processes of this machine that send at once, and share its memory
    committed: bool = False
    said: dict[str, Said] = field(default_factory=dict)  #: what the store tells of the files that are there
    notes: tuple[str, ...] = ()
    found_bytes: int = 0  #: in uploads that were cut short

    @property
    def target(self) -> Backend:
        return self.place.target

    def run(self, *, dry_run: bool, progress: native.Progress) -> Sent:
        self.committed = self.place.find(dry_run=dry_run)
        present = self._present()
        missing = [file for file in self.manifest.files if present.get(file.path) != file.size_bytes]
        if self.store.control is not None:
            lies_there = [file for file in self.manifest.files if present.get(file.path) == file.size_bytes]
            self.said = ask_all(self.store.control, self.place.files_folder, lies_there)
            missing += [file for file in lies_there if self.said[file.path] in (Said.OTHER, Said.MISSING)]
        there = self.manifest.size_bytes - sum(file.size_bytes for file in missing)
        sent = self.manifest.size_bytes - there
        if dry_run:
            self._look_for_parts(missing, lambda: progress(0, self.manifest.size_bytes))
        else:
            self._move(missing, there, progress)
            self._look_again()
            if not self.committed:
                self._refuse_changed()
                self.committed = not self.place.publish()
        sha256 = read_manifest(self.target, self.place.folder).sha256 if self.committed else self.manifest.sha256
        return Sent(
            self.manifest.step,
            self.part.name,
            self._url,
            sent - self.found_bytes,
            there + self.found_bytes,
            self.committed,
            sha256,
            (*self.store.notes, *self.notes),
            server_checked_bytes=sum(f.size_bytes for f in self.manifest.files if self.said.get(f.path) is Said.SAME),
            server_check=self.store.check,
        )

    @property
    def _url(self) -> str:
        return f"{self.target.location}/{self.place.files_folder}"

    def _key(self, name: str) -> str:
        return f"{self.place.files_folder}/{name}"

    def _present(self) -> dict[str, int]:
        """Sizes of what lies where our files go, attempts of others left out."""
        above = self._key("")
        found = {blob.key.removeprefix(above): blob.size_bytes for blob in self.target.list(self.place.files_folder)}
        return {name: size for name, size in found.items() if not name.startswith(ATTEMPT_PREFIX)}

    def _move(self, missing: Sequence[FileEntry], there: int, progress: native.Progress) -> None:
        """Step 3, by this process or by several; our claim is kept young meanwhile."""
        renewed = time.monotonic()

        def tick(done: int, total: int) -> None:
            nonlocal renewed
            if not self.committed and time.monotonic() > renewed + RENEW_S:
                self.place.keep()
                renewed = time.monotonic()
            progress(done, total)

        if self.sending is None:
            self.send(missing, there, tick)
        else:
            self.sending(self.folder, self.place.base, self.manifest, missing, there_bytes=there, progress=tick)
            for file in missing:
                self._compare(file)
        if not self.committed:
            self.place.keep()

    def send(self, missing: Sequence[FileEntry], there: int, progress: native.Progress) -> None:
        """Send files of the part by this process alone."""
        uploads = self._uploads(missing, conditions.find_uploads)
        files = [self._outgoing(file) for file in missing]
        self.found_bytes = send(self.target, files, there=there, crew=self.crew, uploads=uploads, progress=progress)

    def _outgoing(self, file: FileEntry) -> Outgoing:
        return Outgoing(
            self._key(file.path),
            file.size_bytes,
            functools.partial(self._read, file),
            functools.partial(self._compare, file),
            self._content(file),
        )

    def _look_for_parts(self, missing: Sequence[FileEntry], tick: Callable[[], None]) -> None:
        """What send() would find of files that were cut short. Nothing is written."""
        uploads = self._uploads(missing, conditions.look_for_uploads)
        if uploads is None:
            return
        try:
            self.found_bytes = look(uploads, [self._outgoing(file) for file in missing], tick=tick)
        except (UnavailableError, AccessError) as error:
            self._say_why_anew(str(error))

    def _uploads(self, missing: Sequence[FileEntry], find: Find) -> S3Multipart | None:
        """By what files of several parts go on after a crash; None where it cannot be, which the notes then say."""
        if all(file.size_bytes <= part_size(file.size_bytes) for file in missing):
            return None
        uploads, why = find(self.target)
        if uploads is None:
            self._say_why_anew(why)
        return uploads

    def _say_why_anew(self, why: str) -> None:
        self.notes = (f"a file that is cut short on its way there starts over: {why}",)

    def _content(self, file: FileEntry) -> multipart.Content | None:
        """The file for an upload that can go on: each of its parts must be whole chunks."""
        if part_size(file.size_bytes) % self.manifest.chunk_bytes:
            return None

        def crc(offset: int, length: int) -> int:
            step, value = self.manifest.chunk_bytes, 0
            for start in range(offset, offset + length, step):
                value = native.crc64_combine(value, file.chunks[start // step], min(step, offset + length - start))
            return value

        def read(offset: int, length: int) -> Iterator[memoryview]:
            memory, crc = pages.new(min(PIECE_BYTES, length)), 0
            with self._reader(file) as fill:
                for start in range(offset, offset + length, PIECE_BYTES):
                    piece = memory[: offset + length - start]
                    crc = self._fill(fill, file, start, piece, crc=crc)
                    yield piece

        return multipart.Content(self._key(file.path), file.size_bytes, file.crc, read, crc)

    def _compare(self, file: FileEntry) -> None:
        """What arrived, by the store's own digest, where it tells one."""
        if self.store.control is not None:
            self.said[file.path] = server_digests.compare(
                self.target, self.store.control, self._key(file.path), file, keep=self.committed, hint=_DAMAGES
            )

    def _read(self, file: FileEntry, part_bytes: int) -> Iterator[memoryview]:
        """A file's bytes, part by part, none of them yielded after a chunk that is not what the manifest records."""
        crc = 0
        with self._reader(file) as fill:
            for start in range(0, file.size_bytes, part_bytes):
                data = pages.new(min(part_bytes, file.size_bytes - start))
                crc = self._fill(fill, file, start, data, crc=crc)
                yield data

    def _reader(self, file: FileEntry) -> contextlib.AbstractContextManager[Fill]:
        return self.backend.reader(f"{self.folder}/{file.path}")

    def _fill(self, fill: Fill, file: FileEntry, start: int, view: memoryview, *, crc: int) -> int:
        """Read bytes of a file; the digest so far of the chunk that they end in. `crc`: of the one that they begin in."""
        length = len(view)
        if fill(start, view) != length:
            raise SourceChangedError(f"{self.part.path}/{file.path} became shorter while it was pushed", path=file.path)
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
        return crc

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
        self.place.look_again(committed=self.committed)


def send_share(
    backend: Backend,
    target: Backend,
    manifest: Manifest,
    names: Sequence[str],
    *,
    folder: str,
    base: str,
    crew: int,
    progress: native.Progress,
) -> None:
    """Step 3 for these files of a part, by one of several processes; whoever leads them does all other steps."""
    part = read_part(backend, manifest.part, folder, backend.tree(max_depth=5))
    files = [file for file in manifest.files if file.path in set(names)]
    place = Place(target, folder, manifest, base=base)
    # As if committed: whether a damaged key may go is for the leader to say, who compares them all afterwards.
    way = _Push(backend, folder, part, manifest, place, conditions.find_out(target), crew=crew, committed=True)
    way.send(files, 0, progress)
