"""What the engine is given and what it gives back, as Python has it: the types, their checks, and errors.

`native` gives these types to everybody else. Sizes are bytes, times nanoseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ckptstore.errors import (
    CkptStoreError,
    DigestMismatchError,
    RefusedError,
    SourceChangedError,
    UsageError,
    from_os_error,
)

CHUNK_BYTES = 8 << 20

Path = str | os.PathLike[str]

_ALIGNMENT_BYTES = 4096
_MOST_BYTES = 1 << 63
_MOST_THREADS = 1024
_MOST_CHUNKS = 1 << 26  # of one file: half a gigabyte of digests


class Digest(NamedTuple):
    """CRC-64/NVME of a file and of each of its chunks (the last may be short). An empty file has crc 0 and no chunks."""

    crc: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A file to read, and what is known of it. `mtime_ns` and `inode` 0: not checked.

    `expected`: the CRCs of its chunks, checked while it is read.
    """

    name: str
    size_bytes: int
    mtime_ns: int = 0
    inode: int = 0
    expected: Sequence[int] | None = None


class Sum(NamedTuple):
    """The CRC-32 that somebody left of `length` bytes of a file, from `offset` on."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy; 0 means chosen by the engine.

    `strategy` is what to try first: what the file system refuses falls back, and the result tells. `durable`: everything
    is on the disk before the return. `verify_after_write`: read everything again from the disk, and compare. `nice`
    lowers the priority of the worker threads alone. `resume`: destination files may be there already; what is right in
    them (by `expected`, else by comparing with the source) is kept, so it also serves to update an older copy.
    """

    threads: int = 0
    block_bytes: int = 0
    chunk_bytes: int = CHUNK_BYTES
    strategy: Literal["auto", "clone", "direct", "warm", "buffered"] = "auto"
    durable: bool = True
    verify_after_write: bool = False
    nice: int = 0
    resume: bool = False


@dataclass(frozen=True)
class CopyResult:
    """What a copy did. `strategies`: how many bytes travelled each way, only those that were used."""

    digests: dict[str, Digest] = field(repr=False)
    bytes_copied: int
    bytes_reused: int
    seconds: float
    strategies: dict[str, int] = field(default_factory=dict)


class Entry(NamedTuple):
    """One name in a folder, as lstat sees it. `mode` includes the file type (see the module `stat`)."""

    name: str
    size_bytes: int
    mtime_ns: int
    inode: int
    mode: int
    uid: int


class Folder(NamedTuple):
    """What a folder holds, in no order. `error`: the errno if it could not be read (entirely), else 0.

    `content`: of the file that scan_tree was asked to read, where it is there, not large, and could be read.
    """

    error: int
    entries: list[Entry]
    content: bytes | None = None


WEIGHT_DTYPES: dict[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Number formats that `scan_weights` knows, by safetensors' names, and the bytes of a number; in the engine's order."""


class Region(NamedTuple):
    """Numbers in a file: `length` bytes from `offset` on, whole numbers of type `dtype` (of WEIGHT_DTYPES)."""

    name: str
    offset: int
    length: int
    dtype: str


class WeightStats(NamedTuple):
    """What a region's numbers are like. Positions are -1 where there is none; sums, min and max are of the finite ones."""

    numbers: int
    nan: int
    infinite: int
    first_nonfinite: int  #: index of the number
    zero_blocks: int  #: of 4096 bytes each, all zero
    first_zero_block: int  #: bytes from the region's start
    sum_squares: float
    min: float
    max: float
    crc: int


def error_of(kind: str, what: str, path: bytes, number: int) -> CkptStoreError:
    """What to raise, of what the engine's error says."""
    name = os.fsdecode(path)
    match kind:
        case "mismatch":
            return DigestMismatchError(
                f"{name}: the bytes from {number} on are not those that the digest was made of",
                path=name,
                offset_bytes=number,
                hint="Use another checkpoint, or repair this one from a replica.",
            )
        case "read back":
            return DigestMismatchError(
                f"{name}: the disk gives back other bytes than were written, from {number} on",
                path=name,
                offset_bytes=number,
                hint="The destination's disk or memory is failing: use another one.",
            )
        case "sum":
            return DigestMismatchError(
                f"{name}: the CRC-32 that was left of the bytes from {number:,} on does not match",
                path=name,
                offset_bytes=number,
                hint="Use another checkpoint, or repair this one from a replica.",
            )
        case "changed":
            return SourceChangedError(f"{name} {what}", path=name, hint="Let the trainer finish its save, then try again.")
        case "refused":
            return RefusedError(f"{name} {what}")
        case _:
            return from_os_error(OSError(number, os.strerror(number)), doing=what, path=name)


def encoded(path: Path) -> bytes:
    """As the system takes it. UsageError for what is no path."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:  # C would take what is before it for the path
        raise UsageError(f"not a path: {path!r}")
    return encoded


def check_chunks(chunk_bytes: int) -> None:
    """UsageError for a size that no chunks have."""
    if not 0 < chunk_bytes < _MOST_BYTES or chunk_bytes % _ALIGNMENT_BYTES:
        raise UsageError(f"chunk_bytes must be a positive multiple of {_ALIGNMENT_BYTES}, not {chunk_bytes}")


def threads_of(threads: int) -> int:
    """0 means chosen by the engine. More than these help nothing, and a process can have only so many."""
    if threads < 0:
        raise UsageError(f"threads must not be negative: {threads}")
    return min(threads, _MOST_THREADS)


def whole_pages(size_bytes: int) -> int:
    """The next whole number of pages."""
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def unique(files: Sequence[FileSpec]) -> Iterable[FileSpec]:
    """The same files. UsageError where one is named twice."""
    seen = set()
    for spec in files:
        if spec.name in seen:
            raise UsageError(f"{spec.name!r} is named twice")
        seen.add(spec.name)
        yield spec


def plain(spec: FileSpec, chunk_bytes: int) -> tuple[bytes, int, int, int, Sequence[int] | None]:
    """As the engine takes it. UsageError for what is no file below a root, or is not covered by its digests."""
    name = spec.name
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UsageError(f"not a relative path of a file below the root: {name!r}")
    if not 0 <= spec.size_bytes < _MOST_BYTES:
        raise UsageError(f"{name!r} has a size that no file has: {spec.size_bytes}")
    if spec.size_bytes // chunk_bytes >= _MOST_CHUNKS:
        raise UsageError(f"{name!r}: {spec.size_bytes} bytes are not read in chunks of {chunk_bytes}: they would be too many")
    if spec.expected is not None and len(spec.expected) != -(-spec.size_bytes // chunk_bytes):
        raise UsageError(
            f"{name!r}: {len(spec.expected)} chunk digests do not cover {spec.size_bytes} bytes in chunks of {chunk_bytes}"
        )
    return os.fsencode(name), spec.size_bytes, spec.mtime_ns, spec.inode, spec.expected
