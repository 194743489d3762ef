"""Where the numbers of a part lie: each tensor of its safetensors, .pt/.bin and DCP files, without torch, nothing unpickled."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from ckptstore import native
from ckptstore.formats import FormatError, archives, dcp, inert, safetensors
from ckptstore.formats.reading import not_regular, read_exactly
from ckptstore.model import FileInfo, ReadAt
from ckptstore.native import WEIGHT_DTYPES

_OPTIMIZER_FILE = re.compile(r"(?:^|/)(?:optim|optimizer)[^/]*$")
_OPTIMIZER_KEY = re.compile(r"(?:^|[./])(?:optims?|optimizers?|optim(?:izer)?_state)(?:[./]|$)")
_TORCH = {  # torch's names, of dtypes and of the storages of old
    **dict.fromkeys(("float64", "double", "DoubleStorage"), "F64"),
    **dict.fromkeys(("float32", "float", "FloatStorage"), "F32"),
    **dict.fromkeys(("float16", "half", "HalfStorage"), "F16"),
    **dict.fromkeys(("bfloat16", "BFloat16Storage"), "BF16"),
    **dict.fromkeys(("complex64", "ComplexFloatStorage"), "C64"),
    **dict.fromkeys(("complex128", "ComplexDoubleStorage"), "C128"),
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_LITTLE_CRC32 = native.crc32(b"little")  #: so that the word is not read again in each of a hundred thousand archives
_UNREADABLE = ("float8_", "float4_", "float6_", "F8_", "F4", "F6_", "C64", "C128")  #: numbers that are not scanned


class Place(NamedTuple):
    """One tensor, or one chunk of one. `key` has no prefix of the format; `optimizer`: it is no weight."""

    key: str
    file: str
    offset: int
    length: int
    dtype: str  #: of native.WEIGHT_DTYPES
    optimizer: bool


class Places(NamedTuple):
    """All that can be scanned, and what is not, as sentences."""

    found: tuple[Place, ...]
    not_scanned: tuple[str, ...]


def places(read_at: ReadAt, files: Mapping[str, FileInfo], *, root: str | os.PathLike[str] | None = None) -> Places:
    """The tensors in a part's files. Damage makes a file "not scanned": `verify` says what is wrong with it.

    `root`: the folder that the files lie below, where they lie in one; it is faster then.
    """
    found: list[Place] = []
    missed: list[str] = []
    for name, info in files.items():
        base = name.rpartition("/")[2]
        if base.endswith(".safetensors"):
            look = _safetensors
        elif base == dcp.METADATA_NAME:
            look = partial(_dcp, files, root)
        elif base.endswith(archives.SUFFIXES) and base != "training_args.bin":
            look = _torch_file
        else:
            continue
        try:
            if (problem := not_regular(info)) is not None:
                raise FormatError(problem.problem)
            here = list(look(read_at, info))
        except FormatError as error:
            missed.append(f"{name}: {error.problem}")
            continue
        kinds = {place.dtype for place in here} - WEIGHT_DTYPES.keys()
        if strange := sorted(kind for kind in kinds if kind.startswith(_UNREADABLE)):
            missed.append(f"{name}: numbers of type {', '.join(strange)}")
        found += [place for place in here if place.dtype in WEIGHT_DTYPES and place.length]
    # Several keys may share one place (aliased optimizer moments, tied weights): it is read once.
    unique = {(place.file, place.offset, place.length): place for place in reversed(found)}
    return Places(tuple(sorted(unique.values(), key=lambda place: (place.file, place.offset))), tuple(missed))


def _safetensors(read_at: ReadAt, info: FileInfo) -> Iterator[Place]:
    tensors = safetensors.read_header(read_at, info.name, info.size_bytes)
    begin = 8 + int.from_bytes(read_exactly(read_at, info.name, 0, 8), "little")
    optimizer = _OPTIMIZER_FILE.search(info.name) is not None
    for key, tensor in tensors.items():
        yield Place(key, info.name, begin + tensor.begin, tensor.end - tensor.begin, tensor.dtype, optimizer)


def _dcp(
    files: Mapping[str, FileInfo], root: str | os.PathLike[str] | None, read_at: ReadAt, info: FileInfo
) -> Iterator[Place]:
    metadata = dcp.load_metadata(read_at, info)
    folder = info.name.removesuffix(dcp.METADATA_NAME)
    stored: list[tuple[str, str]] = []  # the key and dtype of what is in each window
    windows: list[archives.Window] = []
    for item in metadata.items:
        tensor = metadata.tensors.get(item.key)
        if tensor is None:
            continue
        file = folder + item.file
        if file not in files or files[file].kind != "file" or item.offset + item.length > files[file].size_bytes:
            raise FormatError(f"{item.file[:80]!a} does not hold all that it names there")
        windows.append(archives.Window(read_at, file, item.offset, item.length))
        stored.append((item.key, _TORCH.get(tensor.dtype, tensor.dtype)))
    for (key, dtype), (window, found) in zip(stored, archives.looked_at(windows, root), strict=True):
        if isinstance(found, FormatError):
            raise found
        # An item is an archive of one tensor, which holds exactly one storage.
        for offset, length in _storages(window, found).values():
            place = Place(_plain_key(key), window.name, offset, length, dtype, _OPTIMIZER_KEY.search(key) is not None)
            yield _whole(place)


def _plain_key(key: str) -> str:
    # AReaL wraps the state in {"dcp": {"model": …}}; exports have the bare names.
    return key.removeprefix("dcp.model.")


def _torch_file(read_at: ReadAt, info: FileInfo) -> Iterator[Place]:
    window = archives.Window(read_at, info.name, 0, info.size_bytes)
    storages = _storages(window, archives.records(window))
    optimizer = _OPTIMIZER_FILE.search(info.name) is not None
    for key, (name, dtype) in _named_storages(_code(window)).items():
        if key in storages:
            offset, length = storages[key]
            yield _whole(Place(name, info.name, offset, length, dtype, optimizer or _OPTIMIZER_KEY.search(name) is not None))


def _whole(place: Place) -> Place:
    item_bytes = WEIGHT_DTYPES.get(place.dtype, 1)
    if place.length % item_bytes:
        raise FormatError(f"{place.key[:80]!a} has {place.length} bytes, not whole numbers of type {place.dtype}")
    return place


# --- archives as torch.save makes them ---------------------------------------------------------------------------------


def _storages(window: archives.Window, records: Iterable[archives.Record]) -> dict[str, tuple[int, int]]:
    """Storage key → offset in the file and length in bytes. Little-endian ones only."""
    found: dict[str, tuple[int, int]] = {}
    for record in records:
        if (
            record.name == "byteorder"
            and record.crc32 != _LITTLE_CRC32
            and window.at(record.offset - window.begin, min(record.length, 16)) != b"little"
        ):
            raise FormatError("not little-endian")
        if record.name.startswith("data/"):
            found[record.name.removeprefix("data/")] = (record.offset, record.length)
    return found


def _code(window: archives.Window) -> bytes:
    with archives.opened(window) as archive:
        entry = next((entry for entry in archive.infolist() if entry.filename.partition("/")[2] == "data.pkl"), None)
        if entry is None or entry.file_size > archives.MAX_READ_BYTES:
            raise FormatError("an archive without a data.pkl of sane size")
        return _content(archive, entry)


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise FormatError("an archive whose records are compressed")
    try:
        return archive.read(entry)
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise FormatError(f"{entry.filename[:40]!a}: {str(error)[:60]}") from None


def _named_storages(code: bytes) -> dict[str, tuple[str, str]]:
    """Storage key → (path to the first tensor in it, dtype), from a data.pkl that is read as data."""
    named: dict[str, tuple[str, str]] = {}
    # Any name may occur in a training state; none is imported. What counts are torch's storages and tensors.
    waiting: list[tuple[str, Any]] = [("", inert.read(code, lambda name: True))]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, (list, tuple, inert.Record)):
            if id(value) in seen:  # a crafted pickle may hold itself
                continue
            seen.add(id(value))
        if isinstance(value, inert.Pairs):
            for key, item in zip(value[::2], value[1::2], strict=False):
                waiting.append((f"{path}.{key}" if path else str(key), item) if isinstance(key, (str, int)) else (path, item))
        elif isinstance(value, (list, tuple)):
            waiting += [(path, item) for item in value]
        elif isinstance(value, inert.Record):
            if (storage := _storage_of(value)) is not None:
                named.setdefault(storage[0], (path or "tensor", storage[1]))
            waiting += [(path, value.arguments), (path, value.state), (path, value.pairs)]
    return named


def _storage_of(record: inert.Record) -> tuple[str, str] | None:
    """The storage key and dtype of a tensor's record; None for what is no tensor."""
    if not record.made_by.name.startswith("_rebuild_tensor") or not isinstance(record.arguments, tuple):
        return None
    storage = record.arguments[0] if record.arguments else None
    about = storage.arguments if isinstance(storage, inert.Record) else None
    if not isinstance(about, tuple) or len(about) < 3 or not isinstance(about[1], inert.Name) or not isinstance(about[2], str):
        return None
    # Types without a storage class of their own are named beside an untyped one.
    names = [about[1].name, *(item.name for item in record.arguments if isinstance(item, inert.Name))]
    return about[2], next((_TORCH[name] for name in names if name in _TORCH), names[-1])
