"""Fill a folder of a stage with a part that lies in an object store: what `pull` and `setup --from` have in common."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from ckptstore import native
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import IntegrityError, NoSpaceError, from_os_error
from ckptstore.manifest import Manifest
from ckptstore.model import Part
from ckptstore.parts import files_folder_of
from ckptstore.sizes import size
from ckptstore.transfer.fetching import Wanted, fetch
from ckptstore.verify import check_part_structure


class Filled(NamedTuple):
    """What is in the folder now: each file's digest, and how many bytes an earlier try had brought."""

    digests: Mapping[str, native.Digest]
    kept_bytes: int


class Bringing(Protocol):
    """Fetches what is missing of `wanted` into their files below `target`, each right; their digests."""

    def __call__(
        self,
        source: Backend,
        wanted: Sequence[Wanted],
        target: str,
        *,
        chunk_bytes: int,
        progress: native.Progress | None,
    ) -> Mapping[str, native.Digest]:
        """The digests, of all files whose chunks are known."""


def bring(
    source: Backend,
    wanted: Sequence[Wanted],
    target: str,
    *,
    chunk_bytes: int,
    progress: native.Progress | None,
    crew: int = 1,
) -> Mapping[str, native.Digest]:
    """Bringing by this process alone, or by one of `crew` of this machine.

    The files are there, as long as they shall be; the first error is raised.
    """
    fetched = fetch(
        source,
        wanted,
        chunk_bytes=chunk_bytes,
        sink=functools.partial(native.write_range, target),
        stop_at_error=True,
        progress=progress,
        crew=crew,
    )
    return {name: digest for name, digest in fetched.items() if isinstance(digest, native.Digest)}


def _check_room(target: str, part: Part) -> None:
    """NoSpaceError where the files do not fit: before they take what room there is from others."""
    lacking = 0
    for file in part.files:
        path = os.path.join(target, file.name)
        held_bytes = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
        lacking += max(0, file.size_bytes - held_bytes)
    free = shutil.disk_usage(target).free
    if lacking > free:
        raise NoSpaceError(
            f"{part.path} needs {size(lacking)} more, and {size(free)} are free on {target}",
            operation="fetching",
            path=target,
            hint="Free some space; `ckptstore clean` removes leftovers.",
        )


def fill(
    source: Backend,
    part: Part,
    manifest: Manifest | None,
    target: str,
    *,
    bringing: Bringing = bring,
    progress: native.Progress | None = None,
) -> Filled:
    """Fill the folder `target` of a stage with the files of one part: theirs alone, with the writer's times, durable.

    What an earlier try left there is kept chunk by chunk, as far as the manifest's digests say that it is right.
    DigestMismatchError for bytes that are wrong in the store; without a manifest IntegrityError for a broken structure.
    """
    chunk_bytes = manifest.chunk_bytes if manifest else native.CHUNK_BYTES
    expected = {entry.path: entry.chunks for entry in manifest.files} if manifest else {}
    folder = files_folder_of(source, part)
    try:
        if manifest is None:
            side_folders.remove_tree(target)
        os.makedirs(target, mode=0o700, exist_ok=True)
        side_folders.keep_only(target, (file.name for file in part.files))
        have = _right_chunks(target, part, expected, chunk_bytes)
        _check_room(target, part)
        for file in part.files:
            path = os.path.join(target, file.name)
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(descriptor).st_size > file.size_bytes:
                    os.ftruncate(descriptor, file.size_bytes)
                native.allocate(descriptor, file.size_bytes, path)  # a full disk is found before anything is fetched
            finally:
                os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, doing="creating", path=target) from error
    wanted = [
        Wanted(
            file.name,
            f"{folder}/{file.name}" if folder else file.name,
            file.size_bytes,
            expected.get(file.name),
            have.get(file.name, {}),
        )
        for file in part.files
    ]
    kept = sum(
        min(chunk_bytes, file.size_bytes - number * chunk_bytes) for file in part.files for number in have.get(file.name, {})
    )

    digests = bringing(source, wanted, target, chunk_bytes=chunk_bytes, progress=progress)
    try:
        for file in part.files:
            path = os.path.join(target, file.name)
            os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
            native.fsync_path(path)
        for inside, _, _ in os.walk(target, topdown=False):
            side_folders.sync_folder(inside)
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=target) from error
    if manifest is None:
        here = dataclasses.replace(part, path=target)
        if findings := check_part_structure(LocalBackend(target), here):
            raise IntegrityError(f"{part.path}: {findings[0]}", hint="It came like this: use another checkpoint.")
    return Filled(digests, kept)


def _right_chunks(
    target: str, part: Part, expected: Mapping[str, tuple[int, ...]], chunk_bytes: int
) -> dict[str, dict[int, int]]:
    """Chunks that an interrupted pull has brought, by file and number."""
    specs = []
    for file in part.files:
        try:
            size = os.stat(os.path.join(target, file.name), follow_symlinks=False).st_size
        except OSError:
            continue
        if size == file.size_bytes and file.name in expected:
            specs.append(native.FileSpec(file.name, size))
    found = native.digest_files(target, specs, chunk_bytes=chunk_bytes) if specs else {}
    return {
        name: {number: crc for number, crc in enumerate(digest.chunks) if crc == expected[name][number]}
        for name, digest in found.items()
        if isinstance(digest, native.Digest)
    }
