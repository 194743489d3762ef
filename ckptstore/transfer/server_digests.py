"""What a store says of its own objects: the CRC-64/NVME that it keeps of each, against the manifest's. No byte is read back.

It is what the store computed when the object arrived: a bit that was flipped on the way, or a wrong object, shows. One that
rots on the store's disks shows only when it is read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from ckptstore import parallel
from ckptstore.backends.base import Backend
from ckptstore.errors import AccessError, NotFoundError, TransitError
from ckptstore.manifest import FileEntry

if TYPE_CHECKING:
    from ckptstore.backends.s3control import S3Control

THREADS = 16


class Said(Enum):
    """What the store says of a file."""

    SAME = "the same digest"
    OTHER = "another digest, or another size"
    MISSING = "there is none"
    NOTHING = "it keeps no digest of it"


def ask(store: S3Control, key: str, file: FileEntry) -> Said:
    """One HEAD. Errors as the backend's, but for a missing key."""
    try:
        stored = store.head(key)
    except NotFoundError:
        return Said.MISSING
    if stored.size_bytes != file.size_bytes:
        return Said.OTHER
    if stored.crc64 is None:
        return Said.NOTHING
    return Said.SAME if stored.crc64 == file.crc else Said.OTHER


def compare(target: Backend, store: S3Control, key: str, file: FileEntry, *, keep: bool = False, hint: str) -> Said:
    """What the store says of a file that has just arrived. TransitError for another one, or none.

    What differs is removed, unless told to `keep` it: nobody shall take it for the file by its size.
    """
    said = ask(store, key, file)
    if said is Said.OTHER and not keep:
        with contextlib.suppress(AccessError):  # where nothing may be removed, what is sent again takes its place
            target.delete(key)
    if said in (Said.OTHER, Said.MISSING):
        raise TransitError(
            f"{target.location}/{key} is not what was sent there: the store says, {said.value}",
            operation="comparing digests",
            path=key,
            hint=hint,
        )
    return said


def ask_all(
    store: S3Control, folder: str, files: Sequence[FileEntry], *, tick: Callable[[int], None] | None = None
) -> dict[str, Said]:
    """ask() for many at once, by path; `tick` gets the bytes whose digests are known. The first error ends it."""
    lock = threading.Lock()
    found: dict[str, Said] = {}
    done = 0

    def one(file: FileEntry, stop: parallel.Stop) -> None:
        nonlocal done
        said = ask(store, f"{folder}/{file.path}" if folder else file.path, file)
        with lock:
            found[file.path] = said
            done += file.size_bytes

    ticking = None if tick is None else lambda: tick(done)
    parallel.each(files, one, threads=min(THREADS, len(files)), tick=ticking)
    return found
