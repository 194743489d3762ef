"""The zip archives that torch.save makes, one a file or one an item of a DCP file: where their records lie, and their CRC-32s.

Nothing is unpickled. A record's bytes lie as they are, so they can be compared with the CRC-32 that torch left in the
directory at the end, by whoever has no manifest of ours. The format: https://pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import itertools
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from ckptstore import native
from ckptstore.errors import DigestMismatchError, from_os_error
from ckptstore.formats import dcp
from ckptstore.formats.reading import FormatError
from ckptstore.model import FileInfo, Finding, ReadAt, Status

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")  #: of files that may be one archive each
WINDOWS_AT_ONCE = 4096  #: looked at by the engine in one call
MAX_READ_BYTES = 256 << 20  #: of a directory, or of a pickle


class Record(NamedTuple):
    """A record of an archive: `length` bytes of the file from `offset` on."""

    name: str  #: without the archive's own
    file: str
    offset: int
    length: int
    crc32: int


class Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, read_at: ReadAt, name: str, offset: int, length: int) -> None:
        self._read_at, self.name, self.begin, self.length, self._at = read_at, name, offset, length, 0

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file; OSError before the beginning."""
        at = offset + (0, self._at, self.length)[whence]
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """As of any file, but at most MAX_READ_BYTES: OSError."""
        left = max(self.length - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_READ_BYTES:
            raise OSError(f"{wanted} bytes in one piece")
        data = self._read_at(self.name, self.begin + self._at, wanted) if wanted else b""
        self._at += len(data)
        return data

    @property
    def place(self) -> tuple[str, int, int]:
        """The file, where the range begins in it, and its length."""
        return self.name, self.begin, self.length

    def at(self, offset: int, size: int) -> bytes:
        """What lies there; less, or nothing, outside."""
        if offset < 0:
            return b""
        self.seek(offset)
        return self.read(size)


def opened(window: Window) -> zipfile.ZipFile:
    """The archive there; FormatError where there is none."""
    try:
        return zipfile.ZipFile(window)
    except (zipfile.BadZipFile, OSError, struct.error, ValueError, NotImplementedError, EOFError) as error:
        raise FormatError(f"not an archive of torch.save ({str(error)[:60]})") from None


def records(window: Window) -> Iterator[Record]:
    """All records with any bytes. FormatError for what torch.save does not make."""
    with opened(window) as archive:
        for entry in archive.infolist():
            if not entry.file_size:
                continue
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise FormatError("an archive whose records are compressed")
            local = window.at(entry.header_offset, 30)
            if len(local) < 30 or not local.startswith(b"PK\3\4"):
                raise FormatError("an archive's record without its header")
            name_bytes, extra_bytes = struct.unpack_from("<2H", local, 26)
            begin = entry.header_offset + 30 + name_bytes + extra_bytes
            if begin + entry.file_size > window.length:
                raise FormatError("an archive's record that ends behind the archive")
            name = entry.filename.partition("/")[2]
            yield Record(name, window.name, window.begin + begin, entry.file_size, entry.CRC)


def looked_at(
    windows: Iterable[Window], root: str | os.PathLike[str] | None
) -> Iterator[tuple[Window, list[Record] | FormatError]]:
    """Each of the windows with its records(), or the error that they raise.

    Where the files lie below the folder `root`, the engine looks: one file may have hundreds of thousands of archives.
    """
    waiting = iter(windows)
    while some := list(itertools.islice(waiting, WINDOWS_AT_ONCE)):
        found = [None] * len(some) if root is None else native.find_records(root, [window.place for window in some])
        for window, plain in zip(some, found, strict=True):
            try:
                yield window, list(records(window)) if plain is None else [_record(window, *one) for one in plain]
            except FormatError as error:
                yield window, error


def checked(read_at: ReadAt, files: Mapping[str, FileInfo], *, root: str | os.PathLike[str] | None = None) -> list[Record]:
    """The records in a part's files of which torch left a CRC-32, each once, by file and offset.

    What is no archive, or was saved without CRC-32s (torch.serialization.set_crc32_options), has none. `root`: as of
    looked_at. Raises as `read_at`, and native.find_records.
    """
    found: dict[tuple[str, int, int], Record] = {}
    for window, here in looked_at(_windows(read_at, files), root):
        if isinstance(here, FormatError):
            continue  # it proves nothing; what is wrong with it, the structure's checks say
        # Told to compute none, writers leave 0 in every record. Records that share bytes are not torch's.
        if any(record.crc32 for record in here) and sum(record.length for record in here) <= window.length:
            found |= {(record.file, record.offset, record.length): record for record in here}
    return [found[key] for key in sorted(found)]


def _record(window: Window, name: str, offset: int, length: int, crc32: int) -> Record:
    return Record(name.partition("/")[2], window.name, offset, length, crc32)


def _windows(read_at: ReadAt, files: Mapping[str, FileInfo]) -> Iterator[Window]:
    for name, info in files.items():
        if info.kind != "file" or not info.size_bytes:
            continue
        if name.endswith(SUFFIXES):
            yield Window(read_at, name, 0, info.size_bytes)
        elif name.rpartition("/")[2] == dcp.METADATA_NAME:
            try:
                items = dcp.load_metadata(read_at, info).items
            except FormatError:
                continue
            folder = name.removesuffix(dcp.METADATA_NAME)
            for file, offset, length in dict.fromkeys((folder + item.file, item.offset, item.length) for item in items):
                if file in files and files[file].kind == "file" and offset + length <= files[file].size_bytes:
                    yield Window(read_at, file, offset, length)


class Compared(NamedTuple):
    """`compared_bytes` of the `total_bytes` that were read have a CRC-32; `findings`: the first of each file that differs.

    `digests`: of each file, as native.digest_files makes them, from the same read.
    """

    digests: Mapping[str, native.Digest]
    findings: tuple[Finding, ...]
    compared_bytes: int
    total_bytes: int


def compare(
    root: str | os.PathLike[str], files: Mapping[str, FileInfo], *, progress: native.Progress | None = None
) -> Compared | None:
    """Read all of a part's files below `root` once, and compare them with the CRC-32s in them; None where there are none.

    Raises what native.copy_files does of files that cannot be read, or change meanwhile.
    """
    regular = [info for info in files.values() if info.kind == "file"]
    total_bytes = sum(info.size_bytes for info in regular)
    known = checked(partial(_read, root), files, root=root)
    compared_bytes = sum(record.length for record in known)
    if not known or compared_bytes > total_bytes:
        return None
    sums: dict[str, list[native.Sum]] = {}
    for record in known:
        sums.setdefault(record.file, []).append(native.Sum(record.offset, record.length, record.crc32))
    specs = [native.FileSpec(info.name, info.size_bytes, info.mtime_ns, info.inode) for info in regular]
    digests: dict[str, native.Digest] = {}
    findings: list[Finding] = []
    for name, found in native.digest_files(root, specs, sums=sums, progress=progress).items():
        if isinstance(found, native.Digest):
            digests[name] = found
        elif isinstance(found, DigestMismatchError):
            problem = f"the CRC-32 that torch.save left of the bytes from {found.offset_bytes:,} on does not match"
            findings.append(Finding(name, problem, Status.CORRUPT))
        else:
            raise found
    return Compared(digests, tuple(findings), compared_bytes, total_bytes)


def _read(root: str | os.PathLike[str], name: str, offset: int, length: int) -> bytes:
    path = os.path.join(root, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error
