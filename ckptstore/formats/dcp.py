"""What a torch.distributed.checkpoint folder proves about itself, without torch and without running its
pickle.

`.metadata` is written last, by rename; it lists where each item lies in which shard (`__0_0.distcp`). A shard
that is absent or shorter than its items need is PARTIAL: writing it was interrupted. A `.metadata` that
cannot be read as data is CORRUPT. Shards that are longer than needed, and items that share bytes, are
legitimate. Megatron's torch_dist format is the same one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from ckptstore.formats import inert
from ckptstore.formats.reading import FormatError, check_safe_name, not_regular, read_exactly
from ckptstore.model import FileInfo, Finding, ReadAt, Status

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 256 << 20  #: an item takes about 145 bytes: 2,000 tensors in the shards of 800 ranks
_VALUE_BYTES = 4  #: at least, of a value in a `.metadata` of torch's, which has one in 5: bounds memory to 25 times the file
MISSING_SHARD = "missing shard, named by .metadata"

_DCP = "torch.distributed.checkpoint"
_METADATA = {f"{_DCP}.metadata.Metadata", "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"}
_TENSOR = f"{_DCP}.metadata.TensorStorageMetadata"
_BYTES = f"{_DCP}.metadata.BytesStorageMetadata"
_INDEX = f"{_DCP}.metadata.MetadataIndex"
_INFO = f"{_DCP}.filesystem._StorageInfo"
_ALLOWED = {
    *_METADATA,
    _TENSOR,
    _BYTES,
    _INDEX,
    _INFO,
    *(
        f"{_DCP}.metadata.{name}"
        for name in ("ChunkStorageMetadata", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    # Megatron keeps its save plans in the metadata.
    *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    f"{_DCP}.filesystem._StoragePrefix",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}
_DTYPE = re.compile(r"torch\.((b?float|u?int|complex|q?u?int|float8_|float4_|float6_)[a-z0-9_]*|bool|half|double|long)")
_KINDS = {  # a component near the front of a key → what is stored below it
    **dict.fromkeys(("optim", "optims", "optimizer", "optimizers", "optimizer_state", "optim_state"), "optimizer"),
    **dict.fromkeys(("lr_scheduler", "lr_schedulers", "scheduler", "opt_param_scheduler"), "scheduler"),
    **dict.fromkeys(("rng", "rng_state", "rng_states"), "rng"),
    **dict.fromkeys(("dataloader", "dataloader_state"), "dataloader"),
}
_ORDER = ("weights", "optimizer", "scheduler", "rng", "dataloader")


class StorageItem(NamedTuple):
    """Where one tensor chunk, or one pickled object, lies. `chunk`: the chunk's offsets in its tensor, as far as recorded."""

    key: str
    file: str
    offset: int
    length: int
    chunk: tuple[int, ...] | None = None


class DcpTensor(NamedTuple):
    """One tensor; each chunk is (offsets, sizes) within `shape`."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """What a `.metadata` says."""

    items: tuple[StorageItem, ...]
    tensors: Mapping[str, DcpTensor]
    object_keys: tuple[str, ...]  #: keys whose values are pickled objects, not tensors
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)  #: key → the nested keys that it stands for

    @property
    def shard_bytes(self) -> dict[str, int]:
        """Each shard's name and the fewest bytes that hold all of its items."""
        shards: dict[str, int] = {}
        for item in self.items:
            shards[item.file] = max(shards.get(item.file, 0), item.offset + item.length)
        return shards

    @property
    def holds(self) -> tuple[str, ...]:
        """Of weights, optimizer, scheduler, rng, dataloader: those that some key stands for."""
        found = {_kind(key) or "weights" for key in self.tensors} | {_kind(key) for key in self.object_keys}
        return tuple(kind for kind in _ORDER if kind in found)


class Summary(NamedTuple):
    """What a listing and a structure's check need of a `.metadata`: little, and kept: an item takes 40 µs to parse."""

    holds: tuple[str, ...]
    shard_bytes: Mapping[str, int]


_summaries: dict[bytes, Summary] = {}  #: by the SHA-256 of the file
_MOST_SUMMARIES = 16


def _kind(key: str) -> str | None:
    front = re.split(r"[./]", key, maxsplit=3)[:3]
    return next((_KINDS[part] for part in front if part in _KINDS), None)


def read_metadata(data: bytes) -> DcpMetadata:
    """The content of a `.metadata` file; FormatError if it is not one. Nothing in it is executed or
    imported.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise FormatError(f"a DCP metadata of {len(data)} bytes, more than are read")
    most_values = max(inert.MAX_VALUES, len(data) // _VALUE_BYTES)
    try:
        with inert.uncollected():
            root = inert.read(
                data, lambda name: name in _ALLOWED or _DTYPE.fullmatch(name) is not None, most_values=most_values
            )
            return _interpret(root, len(data))
    except FormatError as error:
        reason = error.problem
    raise FormatError(f"not a DCP metadata that can be read without executing it: {reason}")


def _interpret(root: Any, budget: int) -> DcpMetadata:
    if not (isinstance(root, inert.Record) and root.made_by.full in _METADATA):
        raise FormatError("not a Metadata object")
    fields = dict(_pairs(root.state))
    tensors, object_keys = {}, []
    for key, value in _pairs(fields.get("state_dict_metadata")):
        if not isinstance(value, inert.Record) or value.made_by.full not in (_TENSOR, _BYTES):
            raise FormatError("an entry of state_dict_metadata is neither tensor nor object")
        if value.made_by.full == _BYTES:
            object_keys.append(key)
            continue
        tensor = tensors[key] = _tensor(value)
        budget -= len(tensor.chunks)
        if budget < 0:  # lists that refer to each other describe more chunks than their bytes could
            raise FormatError("lists more chunks than it has bytes")
    items = tuple(_item(index, info) for index, info in _raw_pairs(fields.get("storage_data")))
    return DcpMetadata(items, tensors, tuple(object_keys), _paths(fields.get("planner_data")))


def _paths(value: Any) -> dict[str, tuple[str | int, ...]]:
    """What torch's own planner keeps; another planner's data is passed over."""
    if type(value) is not inert.Pairs or len(value) % 2:
        return {}
    found = dict(zip(value[::2], value[1::2], strict=True)) if all(type(key) is str for key in value[::2]) else {}
    plain = all(type(path) is tuple and all(type(part) in (str, int) for part in path) for path in found.values())
    return found if plain else {}


def _tensor(record: inert.Record) -> DcpTensor:
    fields = dict(_pairs(record.state))
    properties, chunks = fields.get("properties"), fields.get("chunks")
    state = properties.state if isinstance(properties, inert.Record) else None
    if not (isinstance(state, tuple) and state and isinstance(state[0], inert.Name)) or not isinstance(chunks, list):
        raise FormatError("a tensor without dtype or chunks")
    described = []
    for chunk in chunks:
        places = dict(_pairs(chunk.state)) if isinstance(chunk, inert.Record) else {}
        described.append((_size(places.get("offsets")), _size(places.get("sizes"))))
    return DcpTensor(state[0].name, _size(fields.get("size")), tuple(described))


def _item(index: Any, info: Any) -> StorageItem:
    if not (isinstance(index, inert.Record) and index.made_by.full == _INDEX):
        raise FormatError("storage_data has a key that is no MetadataIndex")
    if not (isinstance(info, inert.Record) and info.made_by.full == _INFO):
        raise FormatError("storage_data has a value that is no _StorageInfo")
    which = dict(_pairs(index.state))
    key, chunk = which.get("fqn"), which.get("offset")
    place = dict(_pairs(info.state))
    offset, length = place.get("offset"), place.get("length")
    if not isinstance(key, str) or not _is_size(offset) or not _is_size(length):
        raise FormatError("storage_data has an entry without key, offset or length")
    begin = None if chunk is None else _size(chunk)
    return StorageItem(key, check_safe_name(place.get("relative_path")), offset, length, begin)


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, inert.Record) and isinstance(value.arguments, tuple) and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple) or len(value) > 64 or not all(map(_is_size, value)):
        raise FormatError("a size that is none")
    return value


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _raw_pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    if type(value) is not inert.Pairs or len(value) % 2:
        raise FormatError("a dict is missing or not whole")
    return zip(value[::2], value[1::2], strict=True)


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    for key, item in _raw_pairs(value):
        if not isinstance(key, str):
            raise FormatError("a dict has a key that is no text")
        yield key, item


def check_folder(read_at: ReadAt, files: Mapping[str, FileInfo]) -> list[Finding]:
    """What is wrong with a DCP folder whose files are `files`, with names relative to it."""
    info = files.get(METADATA_NAME)
    if info is None:
        return [Finding(METADATA_NAME, "missing: the save did not end", Status.PARTIAL)]
    try:
        summary = load_summary(read_at, info)
    except FormatError as error:
        return [error.finding(METADATA_NAME)]
    findings = []
    for name, needed_bytes in summary.shard_bytes.items():
        shard = files.get(name)
        if shard is None:
            findings.append(Finding(name, MISSING_SHARD, Status.PARTIAL))
        elif (problem := not_regular(shard)) is not None:
            findings.append(problem)
        elif shard.size_bytes == 0:
            findings.append(Finding(name, "zero-length file", Status.PARTIAL))
        elif shard.size_bytes < needed_bytes:
            problem_text = f"truncated: {shard.size_bytes} of {needed_bytes} bytes"
            findings.append(Finding(name, problem_text, Status.PARTIAL))
    return findings


def load_summary(read_at: ReadAt, info: FileInfo) -> Summary:
    """The summary of the file `info`; errors as load_metadata. Of bytes that were read before it is remembered."""
    data = _content(read_at, info)
    which = hashlib.sha256(data).digest()
    found = _summaries.get(which)
    if found is None:
        metadata = read_metadata(data)
        found = Summary(metadata.holds, metadata.shard_bytes)
        if len(_summaries) >= _MOST_SUMMARIES:
            _summaries.clear()
        _summaries[which] = found
    return found


def load_metadata(read_at: ReadAt, info: FileInfo) -> DcpMetadata:
    """The metadata in the file `info`; FormatError where it is not one or not a regular file."""
    return read_metadata(_content(read_at, info))


def _content(read_at: ReadAt, info: FileInfo) -> bytes:
    if (problem := not_regular(info)) is not None:
        raise FormatError(problem.problem, problem.status)
    if info.size_bytes == 0:
        raise FormatError("zero-length file", Status.PARTIAL)
    if info.size_bytes > MAX_METADATA_BYTES:
        raise FormatError(f"a DCP metadata of {info.size_bytes} bytes, more than are read")
    return read_exactly(read_at, info.name, 0, info.size_bytes)
