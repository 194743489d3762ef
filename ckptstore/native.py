"""The C++ engine: copies and digests files at the speed of the disk, and the few system calls that Python lacks.

The only importer of `_native`. Everything here is thread-safe and releases the GIL while it works. Files are named by
relative POSIX paths below a root; links below the root are never followed. Sizes are bytes, times nanoseconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, cast

from ckptstore import _native, marshalling
from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.marshalling import CHUNK_BYTES as CHUNK_BYTES
from ckptstore.marshalling import WEIGHT_DTYPES as WEIGHT_DTYPES
from ckptstore.marshalling import CopyOptions as CopyOptions
from ckptstore.marshalling import CopyResult as CopyResult
from ckptstore.marshalling import Digest as Digest
from ckptstore.marshalling import Entry as Entry
from ckptstore.marshalling import FileSpec as FileSpec
from ckptstore.marshalling import Folder as Folder
from ckptstore.marshalling import Path as Path
from ckptstore.marshalling import Region as Region
from ckptstore.marshalling import Sum as Sum
from ckptstore.marshalling import WeightStats as WeightStats

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALGORITHM = "crc64nvme"

Progress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes) about ten times a second, in the calling thread. What it raises cancels."""

_CHECK_INPUT = b"123456789"
_CHECK_CRC64 = 0xAE8B14860A799888
_CHECK_CRC32 = 0xCBF43926
_MOST_BLOCK_BYTES = 1 << 30  # each thread has one
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def copy_files(
    source: Path,
    destination: Path,
    files: Sequence[FileSpec],
    *,
    options: CopyOptions | None = None,
    progress: Progress | None = None,
) -> CopyResult:
    """Copy files from below one folder to below another: one read, digested on the way, one write.

    Both folders must exist. Files are made 0600 and must not be there unless `resume`; sub-folders are made 0700; times of
    change are kept. Ctrl-C and an exception of `progress` stop it within moments. On any failure what was written stays:
    the destination is the caller's stage.

    Raises DigestMismatchError, SourceChangedError, RefusedError (links, pipes, devices), NoSpaceError, AccessError,
    NotFoundError, AlreadyExistsError, StorageError, MemoryError.
    """
    options = options or CopyOptions()
    marshalling.check_chunks(options.chunk_bytes)
    specs = [marshalling.plain(spec, options.chunk_bytes) for spec in marshalling.unique(files)]
    return _run_copy(source, destination, specs, options, progress)


def write_files(
    destination: Path,
    contents: Mapping[str, Buffer | Sequence[Buffer]],
    *,
    options: CopyOptions | None = None,
    progress: Progress | None = None,
) -> CopyResult:
    """Write files below a folder from memory (any contiguous buffers): digested on the way, as copy_files otherwise.

    A list or tuple of buffers is one file: they follow one another in it. The buffers must not be written to meanwhile.
    What ends up on the disk has the digests returned even so.
    """
    options = options or CopyOptions()
    marshalling.check_chunks(options.chunk_bytes)
    specs: list[tuple[bytes, int, int, int, Sequence[int] | None, tuple[Buffer, ...]]] = []
    for name, data in contents.items():
        encoded, *_ = marshalling.plain(FileSpec(name, 0), options.chunk_bytes)
        buffers = cast("Sequence[Buffer]", data if isinstance(data, list | tuple) else (data,))
        specs.append((encoded, 0, 0, 0, None, tuple(buffers)))
    return _run_copy(destination, destination, specs, options, progress)


def _run_copy(
    source: Path,
    destination: Path,
    specs: Sequence[_native._File],
    options: CopyOptions,
    progress: Progress | None,
) -> CopyResult:
    if options.strategy not in _native.STRATEGIES:
        raise UsageError(f"no copy strategy {options.strategy!r}; there are {', '.join(_native.STRATEGIES)}")
    if min(options.threads, options.block_bytes, options.nice) < 0 or options.block_bytes > _MOST_BLOCK_BYTES:
        raise UsageError(f"threads, block_bytes and nice must not be negative, and block_bytes at most {_MOST_BLOCK_BYTES}")
    start = time.monotonic()
    try:
        digests, copied, reused, by_strategy = _native.copy_files(
            marshalling.encoded(source),
            marshalling.encoded(destination),
            specs,
            threads=marshalling.threads_of(options.threads),
            block_bytes=marshalling.whole_pages(options.block_bytes),
            chunk_bytes=options.chunk_bytes,
            strategy=_native.STRATEGIES.index(options.strategy),
            durable=options.durable,
            verify_after_write=options.verify_after_write,
            nice=options.nice,
            resume=options.resume,
            progress=progress,
        )
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None
    return CopyResult(
        digests={os.fsdecode(spec[0]): Digest(*digest) for spec, digest in zip(specs, digests, strict=True)},
        bytes_copied=copied,
        bytes_reused=reused,
        seconds=time.monotonic() - start,
        strategies={name: size for name, size in zip(_native.STRATEGIES, by_strategy, strict=False) if size},
    )


def digest_files(
    root: Path,
    files: Sequence[FileSpec],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    threads: int = 0,
    direct: bool = False,
    nice: int = 0,
    sums: Mapping[str, Sequence[Sum]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Digest | CkptStoreError]:
    """Digest files below a folder; where one fails, its error stands in the result and the others go on.

    With `expected`, a file that differs yields a DigestMismatchError at its first different chunk; with `sums` of its name,
    at the first range of which the CRC-32 differs. `direct` reads the disk rather than the page cache. Raises only what is
    not about one file: a missing root, MemoryError, Ctrl-C.
    """
    marshalling.check_chunks(chunk_bytes)
    specs = [marshalling.plain(spec, chunk_bytes) for spec in marshalling.unique(files)]
    left = [(sums or {}).get(spec.name, ()) for spec in files]
    for spec, ranges in zip(files, left, strict=True):
        if any(offset < 0 or length <= 0 or offset + length > spec.size_bytes for offset, length, _ in ranges):
            raise UsageError(f"{spec.name}: a CRC-32 of bytes that are not there")
    try:
        outcomes = _native.digest_files(
            marshalling.encoded(root),
            specs,
            sums=left,
            threads=marshalling.threads_of(threads),
            chunk_bytes=chunk_bytes,
            direct=direct,
            nice=nice,
            progress=progress,
        )
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None
    return {
        spec.name: Digest(*outcome) if len(outcome) == 2 else marshalling.error_of(*outcome)
        for spec, outcome in zip(files, outcomes, strict=True)
    }


def read_files(
    root: Path,
    files: Sequence[tuple[FileSpec, Sequence[tuple[int, Buffer]]]],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Read parts of files below a folder into memory: of each file (offset, writable contiguous buffer), none overlapping.

    A chunk of which anything is wanted is read whole, once, and its CRC compared with `expected`. What is not in the page
    cache is read past it. Errors as those of copy_files; the buffers hold anything then.
    """
    marshalling.check_chunks(chunk_bytes)
    specs = [marshalling.plain(spec, chunk_bytes) for spec in marshalling.unique([spec for spec, _ in files])]
    wanted = []
    for spec, parts in files:
        ordered = sorted(((offset, memoryview(buffer)) for offset, buffer in parts), key=lambda part: part[0])
        end = 0
        for offset, view in ordered:
            if offset < end or offset + view.nbytes > spec.size_bytes:
                raise UsageError(f"{spec.name}: bytes {offset} to {offset + view.nbytes} are wanted twice, or are not there")
            if view.readonly:
                raise UsageError(f"{spec.name}: the memory for its bytes from {offset} on cannot be written")
            end = offset + view.nbytes
        wanted.append(ordered)
    try:
        outcomes = _native.read_files(
            marshalling.encoded(root),
            specs,
            wanted,
            threads=marshalling.threads_of(threads),
            chunk_bytes=chunk_bytes,
            progress=progress,
        )
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None
    for outcome in outcomes:
        if len(outcome) != 2:
            raise marshalling.error_of(*outcome)


def scan_tree(
    root: Path, *, max_depth: int = 4, wanted: str = "", wanted_bytes: int = 1 << 16, threads: int = 0
) -> dict[str, Folder]:
    """List `root` and the folders below it, `max_depth` levels down (0: the root alone), with what lstat says.

    Keys are paths relative to the root, "" for the root itself. Links are listed and never followed; a folder that cannot
    be read has its errno. Names that vanish meanwhile are left out. A regular file named `wanted`, up to `wanted_bytes`,
    is read on the way. Raises NotFoundError or AccessError for the root.
    """
    try:
        return _native.scan_tree(
            marshalling.encoded(root),
            max_depth=max_depth,
            wanted=os.fsencode(wanted),
            wanted_bytes=wanted_bytes,
            threads=marshalling.threads_of(threads),
            folder_type=Folder,
            entry_type=Entry,
        )
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None


def find_records(root: Path, windows: Sequence[tuple[str, int, int]]) -> list[list[tuple[str, int, int, int]] | None]:
    """The records of archives of torch.save: of each (file, offset, length), all (name, offset in the file, length, CRC-32).

    None where anything is not just as torch writes it, which need not mean that it is no archive: zipfile tells. Nothing is
    read but the directories. Raises AccessError, NotFoundError, StorageError, RefusedError.
    """
    plain = [(marshalling.plain(FileSpec(name, 0), CHUNK_BYTES)[0], offset, length) for name, offset, length in windows]
    try:
        return _native.find_records(marshalling.encoded(root), plain)
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None


def crc64(data: Buffer, value: int = 0, *, implementation: str = "auto") -> int:
    """CRC-64/NVME of `data` (any contiguous buffer) after bytes whose CRC is `value`.

    `implementation`: one of `implementations()`, for tests; ValueError for one that this processor lacks.
    """
    return _native.crc64(data, value, implementation)


def crc64_combine(a: int, b: int, b_bytes: int) -> int:
    """CRC-64/NVME of A followed by B, from both CRCs and the length of B."""
    return _native.crc64_combine(a, b, b_bytes)


def crc32(data: Buffer, value: int = 0, *, implementation: str = "auto") -> int:
    """CRC-32 as in zip archives, what zlib.crc32 computes, at the speed of `crc64`. Arguments as there."""
    return _native.crc32(data, value, implementation)


def crc32_combine(a: int, b: int, b_bytes: int) -> int:
    """CRC-32 of A followed by B, from both CRCs and the length of B."""
    return _native.crc32_combine(a, b, b_bytes)


def implementations() -> list[str]:
    """Return the CRC implementations usable on this processor, fastest first; what is right of them is used."""
    return _native.implementations()


def self_check() -> None:
    """Compute the published check values with every usable implementation; RuntimeError where one differs."""
    text = _CHECK_INPUT * 512  # long enough for the widest folding loop
    for crc, check_value in ((_native.crc64, _CHECK_CRC64), (_native.crc32, _CHECK_CRC32)):
        wanted = crc(text, 0, "portable")
        for name in implementations():
            if crc(_CHECK_INPUT, 0, name) != check_value or crc(text, 0, name) != wanted:
                raise RuntimeError(f"the CRC implementation {name} is wrong on this processor: {crc.__name__}")


def write_range(folder: Path, name: str, offset_bytes: int, data: Buffer) -> None:
    """Write `data` into the file `name` below a folder, which must be there, at an offset; not durable before fsync_path.

    Past the page cache where that goes: memory that a fresh machine has yet to hand out costs more than the disk. Several
    threads may write ranges of one file.
    """
    encoded, *_ = marshalling.plain(FileSpec(name, 0), CHUNK_BYTES)
    try:
        _native.write_range(marshalling.encoded(folder), encoded, data, offset_bytes)
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None


def allocate(fd: int, size_bytes: int, path: Path) -> None:
    """Give an open file that size, where it has less, and room on the disk, where the file system can; NoSpaceError.

    `path` is for errors.
    """
    try:
        _native.allocate(fd, size_bytes, marshalling.encoded(path))
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None


def be_nice(nice: int) -> None:
    """Lower the priority of the calling thread alone to `nice`, 0 to 19. Best effort: never raises it, and no error."""
    _native.be_nice(nice)


def rename_exchange(a: Path, b: Path) -> None:
    """Swap two names atomically. Plain OSError: EINVAL or ENOSYS where the file system cannot."""
    _rename(a, b, _RENAME_EXCHANGE)


def rename_noreplace(a: Path, b: Path) -> None:
    """Rename `a` to `b`, which must not exist. Plain OSError: EEXIST; EINVAL or ENOSYS where it cannot."""
    _rename(a, b, _RENAME_NOREPLACE)


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's names, durable. Plain OSError, which is final: never retry an fsync."""
    try:
        _native.sync_path(marshalling.encoded(path))
    except _native.NativeError as error:
        _raise_os_error(error)


def supports_direct(folder: Path) -> bool:
    """Whether files in this folder take O_DIRECT, by trying it on a scratch file. Plain OSError if it can't be made."""
    try:
        return _native.supports_direct(marshalling.encoded(folder))
    except _native.NativeError as error:
        _raise_os_error(error)


def _rename(a: Path, b: Path, flags: int) -> None:
    try:
        _native.rename_with(marshalling.encoded(a), marshalling.encoded(b), flags)
    except _native.NativeError as error:
        _raise_os_error(error, os.fspath(b))


def _raise_os_error(error: _native.NativeError, other: str | None = None) -> NoReturn:
    _, _, path, number = error.args
    raise OSError(number, os.strerror(number), os.fsdecode(path), None, other) from None


def scan_weights(
    root: Path, regions: Sequence[Region], *, threads: int = 0, progress: Progress | None = None
) -> list[WeightStats | CkptStoreError]:
    """Look at the numbers in files below a folder: one read, in parallel, a few MiB of memory a thread.

    Where a region fails, its error stands in its place. Raises only what is not about one region, UsageError for a region
    that is none.
    """
    kinds = list(WEIGHT_DTYPES)
    plain = []
    for region in regions:
        if region.dtype not in WEIGHT_DTYPES or region.length % WEIGHT_DTYPES[region.dtype] or min(region[1:3]) < 0:
            raise UsageError(f"not a range of numbers: {region}")
        name, *_ = marshalling.plain(FileSpec(region.name, 0), CHUNK_BYTES)
        plain.append((name, region.offset, region.length, kinds.index(region.dtype)))
    try:
        found = _native.scan_weights(
            marshalling.encoded(root), plain, threads=marshalling.threads_of(threads), progress=progress
        )
    except _native.NativeError as error:
        raise marshalling.error_of(*error.args) from None
    return [WeightStats(*item) if len(item) == 10 else marshalling.error_of(*item) for item in found]
