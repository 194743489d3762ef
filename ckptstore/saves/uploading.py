"""Saves into a store of steps at a URL: straight from memory or from files, and nothing is seen before all of it is there.

An object store has no rename, so that each save writes below a prefix of its own, which counts from its manifest on:

    1  begin       one LIST: the next generation of the step, `step-N.G.<random>/`. Nobody else ever writes there
    2  write       every file under its final key, in parts, digested on the way (several ranks may write below one prefix).
                   Where the store computes digests of its own, each file's is compared with ours; what differs is sent again
    3  look again  all keys are there, with the sizes that were written, and no others
    4  manifest    where steps of higher numbers were there at the beginning, they are noted as left (left.py). Then it is
                   created: from here on the step is this one. A generation before it was untouched until now
    5  discard     what the step was before, its manifest first

A crash leaves a prefix without a manifest: the next save of that step removes it, and any save after STALE_S.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ckptstore import left, native, pages
from ckptstore.backends import interruptible
from ckptstore.backends.base import Backend
from ckptstore.errors import (
    AccessError,
    CkptStoreError,
    CommitUncertain,
    IntegrityError,
    NotCommitted,
    NotFoundError,
    RefusedError,
)
from ckptstore.formats import streaming
from ckptstore.frameworks import steps as layout
from ckptstore.frameworks.areal.layout import SIDE
from ckptstore.leaving import left_by
from ckptstore.left import Left
from ckptstore.listing import scan
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import MANIFEST_NAME, FileInfo
from ckptstore.names import check_names
from ckptstore.native import Folder
from ckptstore.parts import read_manifest
from ckptstore.saves.steps import manifest_of
from ckptstore.transfer import conditions, server_digests
from ckptstore.transfer.sending import Outgoing, send

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ckptstore.backends.s3control import S3Control

_DAMAGES = "The way there, the memory here, or the store damages data; or somebody else writes there."
STALE_S = 24 * 3600.0  #: a prefix without a manifest, on which nothing has come for so long, is nobody's


@dataclass(slots=True)
class Upload:
    """A step on its way: `write` below its `prefix`, then `publish`, else `discard`. Not thread-safe."""

    target: Backend
    step: int
    prefix: str
    before: Sequence[str] = ()  #: prefixes of the step that it replaces
    leaves: Mapping[str, Left] = field(default_factory=dict)  #: what training has left, where it has gone back to save this
    ended: bool = False
    process: int = field(default_factory=os.getpid)


class Written(NamedTuple):
    """A file that was written."""

    digest: native.Digest
    size_bytes: int
    mtime_ns: int  #: of the file that it is a copy of, or when it was written


class Content(Protocol):
    """A file to write, from memory, from another file, or through buffers that are used again."""

    size_bytes: int
    mtime_ns: int

    def parts(self, part_bytes: int) -> Iterator[Buffer]:
        """Its bytes in parts of that size, the last one shorter; from the start each time. Each stays until nobody holds it."""


def begin(target: Backend, step: int) -> Upload:
    """A new generation of the step. RefusedError for a place that holds something else than steps."""
    tree = _tree(target)
    foreign = [entry.name for entry in tree[""].entries if not entry.name.startswith(".")]
    if foreign and not layout.is_store(tree):
        raise RefusedError(
            f"{target.location} holds {foreign[0]} and is no store of steps: nothing is saved into it",
            hint="Name a prefix that nothing lies below yet.",
        )
    generations = layout.generations_in(tree)
    for found in generations:
        if found.number and not found.committed and found.step != step and _age_s(tree, found.folder) > STALE_S:
            with contextlib.suppress(CkptStoreError):  # its remains harm nobody
                remove(target, found.folder)
    mine = [found for found in generations if found.step == step]
    number = max((found.number for found in mine), default=0) + 1
    leaves: Mapping[str, Left] = {}
    with contextlib.suppress(AccessError):  # who may not read saves all the same, and loads nothing
        leaves = left_by(target, step, (found.folder for found in generations if found.committed))
    return Upload(target, step, layout.generation_name(step, number), [found.folder for found in mine], leaves)


def _tree(target: Backend) -> Mapping[str, Folder]:
    try:
        return target.tree(max_depth=4)
    except NotFoundError:  # an empty place, or no such bucket: writing will tell
        return {"": Folder(0, [])}


def _age_s(tree: Mapping[str, Folder], folder: str) -> float:
    inside = [found for path, found in tree.items() if path == folder or path.startswith(f"{folder}/")]
    newest_ns = max((entry.mtime_ns for found in inside for entry in found.entries), default=0)
    return time.time() - newest_ns / 1e9 if newest_ns else 0.0  # where a store tells no times, nothing is old


class Memory:
    """A file made of buffers in order, which must not change meanwhile."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [view for buffer in buffers if (view := memoryview(buffer).cast("B")).nbytes]
        self.size_bytes = sum(view.nbytes for view in self._views)
        self.mtime_ns = time.time_ns()

    def parts(self, part_bytes: int) -> Iterator[Buffer]:
        """See Content. The memory itself, where a part lies in one buffer."""
        waiting: list[memoryview] = []
        room = part_bytes
        for view in self._views:
            while view.nbytes:
                waiting.append(view[:room])
                room -= waiting[-1].nbytes
                view = view[waiting[-1].nbytes :]
                if not room:
                    yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
                    waiting, room = [], part_bytes
        if waiting:
            yield waiting[0] if len(waiting) == 1 else b"".join(waiting)


class File:
    """A file below a folder, which must not change meanwhile: SourceChangedError."""

    def __init__(self, root: str, spec: native.FileSpec) -> None:
        self._root = root
        self._info = FileInfo(spec.name, spec.size_bytes, spec.mtime_ns, spec.inode)
        self.size_bytes = spec.size_bytes
        self.mtime_ns = spec.mtime_ns

    def parts(self, part_bytes: int) -> Iterator[Buffer]:
        """See Content."""
        with streaming.opened(self._root, [self._info]) as (descriptor,):
            for start in range(0, self.size_bytes, part_bytes):
                data = pages.new(min(part_bytes, self.size_bytes - start))
                streaming.read_at(descriptor, start, data, name=self._info.name)
                yield data


def write(
    target: Backend, prefix: str, contents: Mapping[str, Content], *, progress: native.Progress | None = None
) -> dict[str, Written]:
    """Write files below a prefix, by any rank; digested as they are sent. StorageError, AccessError, SourceChangedError.

    TransitError for one that arrives damaged each time that it is sent, where the store tells (S3 with the extra `[s3]`).
    """
    written: dict[str, Written] = {}
    control = _control(target)

    def parts(name: str, part_bytes: int) -> Iterator[Buffer]:
        whole = 0
        chunks: list[int] = []

        def digest(view: memoryview) -> None:
            nonlocal whole
            for start in range(0, view.nbytes, native.CHUNK_BYTES):
                piece = view[start : start + native.CHUNK_BYTES]
                chunks.append(native.crc64(piece))
                whole = native.crc64_combine(whole, chunks[-1], piece.nbytes)

        for data in contents[name].parts(part_bytes):
            digest(memoryview(data))
            yield data
            del data  # its buffer may be the next part's
        written[name] = Written(native.Digest(whole, tuple(chunks)), contents[name].size_bytes, contents[name].mtime_ns)

    def arrived(name: str) -> None:
        if control is not None:
            server_digests.compare(target, control, f"{prefix}/{name}", _entry(name, written[name]), hint=_DAMAGES)

    files = [
        Outgoing(f"{prefix}/{name}", file.size_bytes, partial(parts, name), partial(arrived, name))
        for name, file in contents.items()
    ]
    send(target, files, progress=progress)
    return written


@lru_cache(maxsize=4)
def _control(target: Backend) -> S3Control | None:
    """Asks for the store's own digests; None where there are none, or who saves may not find out."""
    if conditions.look(target).control is None:
        return None
    try:
        return conditions.find_out(target).control
    except AccessError:  # whoever may write may not remove: the scratch key of this one try stays
        return None


def _entry(name: str, file: Written) -> FileEntry:
    return FileEntry(name, file.size_bytes, file.mtime_ns, 0, file.digest.crc, file.digest.chunks)


def publish(
    upload: Upload, written: Mapping[str, Written], *, metrics: Mapping[str, float] | None = None, source: str = ""
) -> Manifest:
    """Steps 3 to 5, for the files of all ranks. NotCommitted, CommitUncertain."""
    try:
        check_names(written)
        _look_again(upload, written)
    except CkptStoreError as error:
        raise NotCommitted(f"step {upload.step} was not saved: {error}", hint=error.hint) from error
    entries = tuple(_entry(name, file) for name, file in sorted(written.items()))
    manifest = manifest_of(upload.step, entries, metrics=metrics or {}, source=source)
    try:
        _leave(upload)
        upload.target.put(f"{upload.prefix}/{MANIFEST_NAME}", manifest.to_bytes(), if_absent=True)
    except CkptStoreError as error:
        if not _is_in(upload, manifest, error):
            raise NotCommitted(f"step {upload.step} was not saved: {error}", hint=error.hint) from error
    upload.ended = True
    for folder in upload.before:
        with contextlib.suppress(CkptStoreError):  # a later save of the step does it
            remove(upload.target, folder)
    return manifest


def _leave(upload: Upload) -> None:
    """Note what training has left, before anybody sees this step: it must not go on from there later."""
    if upload.leaves:
        key = f"{SIDE}/{left.NAME}"
        known = scan(upload.target).left
        upload.target.put(key, left.to_bytes({**known, **upload.leaves}))
        left.warn(upload.step, upload.leaves)


def _look_again(upload: Upload, written: Mapping[str, Written]) -> None:
    present = {blob.key.removeprefix(f"{upload.prefix}/"): blob.size_bytes for blob in upload.target.list(upload.prefix)}
    expected = {name: file.size_bytes for name, file in written.items()}
    if present != expected:
        wrong = sorted(name for name in present.keys() | expected.keys() if present.get(name) != expected.get(name))
        raise IntegrityError(
            f"{upload.target.location}/{upload.prefix}/{wrong[0]} is not what was written there: "
            f"{present.get(wrong[0], 'missing')}, not {expected.get(wrong[0], 'missing')} (bytes)",
            hint="Does anybody else write or remove there? Nothing was committed.",
        )


def _is_in(upload: Upload, manifest: Manifest, error: CkptStoreError) -> bool:
    """Whether a put that failed has come through after all. CommitUncertain where the store does not tell."""
    where = f"{upload.target.location}/{upload.prefix}"
    try:
        return read_manifest(upload.target, upload.prefix) == manifest
    except NotFoundError:
        return False
    except CkptStoreError:
        upload.ended = True  # what may be a checkpoint is not removed
        raise CommitUncertain(
            f"step {upload.step} may be in {where}: the store did not confirm it, and does not answer now",
            hint="Look with `ckptstore list` when it does: the step is the old one or the new one, whole.",
        ) from error


def discard(upload: Upload) -> None:
    """Remove what an upload that was not published has brought. What cannot be removed is left for a later save.

    In a child that was forked meanwhile it does nothing: the upload is its parent's.
    """
    if not upload.ended and upload.process == os.getpid():
        upload.ended = True
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)  # who saves calls this in a `finally`
        with interruptible.briefly() if interrupted else contextlib.nullcontext(), contextlib.suppress(CkptStoreError):
            remove(upload.target, upload.prefix)


def remove(target: Backend, folder: str) -> None:
    """Remove a step's folder, its manifest first: from then on it is none."""
    keys = [blob.key for blob in target.list(folder)]
    for key in sorted(keys, key=lambda key: key != f"{folder}/{MANIFEST_NAME}"):
        target.delete(key)
