# What csrc/module.cpp binds. Only ckptstore/native.py uses it. Paths and names are bytes; a file is
# (name, size_bytes, mtime_ns, inode, expected chunk CRCs or None); a digest is (crc, chunk CRCs);
# an error is (kind, what, path, number), raised as NativeError or returned in a digest's place.
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from typing_extensions import Buffer

_File = (
    tuple[bytes, int, int, int, Sequence[int] | None]
    | tuple[bytes, int, int, int, Sequence[int] | None, tuple[Buffer, ...]]  # its bytes are in memory
)
_Digest = tuple[int, tuple[int, ...]]
_Failure = tuple[str, str, bytes, int]
_Progress = Callable[[int, int], object]
_Folder = TypeVar("_Folder")

STRATEGIES: tuple[str, ...]

class NativeError(Exception):
    args: _Failure

def copy_files(
    source: bytes,
    destination: bytes,
    files: Iterable[_File],
    *,
    threads: int,
    block_bytes: int,
    chunk_bytes: int,
    strategy: int,
    durable: bool,
    verify_after_write: bool,
    nice: int,
    resume: bool,
    progress: _Progress | None,
) -> tuple[list[_Digest], int, int, list[int]]: ...
def digest_files(
    root: bytes,
    files: Iterable[_File],
    *,
    sums: Iterable[Iterable[tuple[int, int, int]]],
    threads: int,
    chunk_bytes: int,
    direct: bool,
    nice: int,
    progress: _Progress | None,
) -> list[_Digest | _Failure]: ...
def read_files(
    root: bytes,
    files: Iterable[_File],
    wanted: Iterable[Iterable[tuple[int, Buffer]]],
    *,
    threads: int,
    chunk_bytes: int,
    progress: _Progress | None,
) -> list[_Digest | _Failure]: ...
def find_records(root: bytes, windows: Iterable[tuple[bytes, int, int]]) -> list[list[tuple[str, int, int, int]] | None]: ...
def scan_tree(
    root: bytes,
    *,
    max_depth: int,
    wanted: bytes,
    wanted_bytes: int,
    threads: int,
    folder_type: type[_Folder],
    entry_type: type,
) -> dict[str, _Folder]: ...
def crc64(data: Buffer, value: int, implementation: str) -> int: ...
def crc64_combine(a: int, b: int, b_bytes: int) -> int: ...
def crc32(data: Buffer, value: int, implementation: str) -> int: ...
def crc32_combine(a: int, b: int, b_bytes: int) -> int: ...
def implementations() -> list[str]: ...
def write_range(folder: bytes, name: bytes, data: Buffer, offset: int) -> None: ...
def allocate(fd: int, bytes: int, path: bytes) -> bool: ...
def be_nice(nice: int) -> None: ...
def rename_with(a: bytes, b: bytes, flags: int) -> None: ...
def sync_path(path: bytes) -> None: ...
def supports_direct(folder: bytes) -> bool: ...
def scan_weights(
    root: bytes, regions: Iterable[tuple[bytes, int, int, int]], *, threads: int, progress: _Progress | None
) -> list[tuple[int, int, int, int, int, int, float, float, float, int] | _Failure]: ...
