"""Makes a Hugging Face export out of an AReaL DCP slot of its FSDP engine, without torch."""

from __future__ import annotations

import json
import operator
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple

from ckptstore import native
from ckptstore.errors import CkptStoreError, IntegrityError, RefusedError, from_os_error
from ckptstore.formats import FormatError, dcp, streaming, torchzip
from ckptstore.frameworks.areal import hf_export
from ckptstore.model import MANIFEST_NAME, FileInfo

Path = str | os.PathLike[str]
SHARD_BYTES = 5_000_000_000  # where the Hugging Face library starts a new file too
_PREFIX = "dcp.model."
_DTYPES = {torch: name for name, torch in hf_export.DTYPES.items()}
_CONFIGURATION = re.compile(r".*\.(json|txt|model|jinja|tiktoken|py)")
_WEIGHTS = re.compile(r".*\.index\.json|" + re.escape(MANIFEST_NAME))


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion wrote: the digest of each file, in chunks of native.CHUNK_BYTES, and what is worth knowing."""

    digests: Mapping[str, native.Digest]
    bytes_written: int
    seconds: float
    notes: tuple[str, ...]


class _Chunk(NamedTuple):
    """One stored block of a tensor."""

    file: str
    offset: int  #: of its bytes, in the file
    data: torchzip.Data
    begin: tuple[int, ...]  #: in the tensor


class _Shard(NamedTuple):
    name: str
    header: bytes
    offsets: Mapping[str, int]  #: of each tensor, in the file
    size_bytes: int


def dcp_to_hf(
    source: Path,
    destination: Path,
    files: Sequence[FileInfo],
    *,
    configuration: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: native.Progress | None = None,
) -> ConvertResult:
    """Write the model in the DCP slot `files` of `source` as safetensors into the folder `destination`; durable.

    Each stored block's own CRC-32 is checked in the one read. `configuration`: an export of the same model, whose config and
    tokenizer are copied, and whose names and shapes the slot's must be. Raises RefusedError for slots that are not of AReaL's
    FSDP engine training a text model, IntegrityError for damage, and what native.copy_files raises.
    """
    start = time.monotonic()
    present = {info.name: info for info in files}
    settings = _configuration(configuration)
    notes: list[str] = []
    with ExitStack() as stack:
        metadata = _metadata(source, present)
        tensors = _model(metadata)
        if configuration is not None:
            _compare(tensors, configuration, settings)
        used = sorted({item.file for item in metadata.items if item.key.removeprefix(_PREFIX) in tensors})
        if missing := [name for name in used if name not in present]:
            raise IntegrityError(f"{missing[0]}: missing shard, named by .metadata")
        opened = dict(zip(used, stack.enter_context(streaming.opened(source, [present[name] for name in used])), strict=True))
        chunks = _chunks(metadata, tensors, present, opened)
        shards = _shards(tensors, shard_bytes)
        sinks = [
            stack.enter_context(streaming.created(os.path.join(destination, shard.name), shard.size_bytes)) for shard in shards
        ]
        ranges, blocks = [], []
        for number, shard in enumerate(shards):
            streaming.write_at(sinks[number], 0, shard.header)
            for key, offset in shard.offsets.items():
                for chunk in chunks[key]:
                    blocks.append((key, chunk))
                    ranges.append(_range(chunk, tensors[key], used.index(chunk.file), number, offset))
        sources = [streaming.Source(present[name], opened[name]) for name in used]
        job = streaming.Job(sources, sinks, ranges, progress=progress)
        job.run()
        for (key, chunk), crc in zip(blocks, job.crc32(), strict=True):
            if chunk.data.crc32 is not None and chunk.data.crc32 != crc:
                raise IntegrityError(f"{chunk.file}: the CRC-32 of {key}, stored from {chunk.offset} on, does not match")
            if chunk.data.crc32 is None and not any("CRC-32" in note for note in notes):
                notes.append("the slot was saved without CRC-32s: nothing proves its bytes")
    digests = _finish(destination, shards, tensors)
    digests |= _copy_configuration(configuration, destination, settings)
    if configuration is None:
        notes.append("no config.json and no tokenizer: copy those of the model beside it")
    written = sum(os.stat(os.path.join(destination, name)).st_size for name in digests)
    return ConvertResult(digests, written, time.monotonic() - start, tuple(notes))


def _metadata(source: Path, present: Mapping[str, FileInfo]) -> dcp.DcpMetadata:
    if dcp.METADATA_NAME not in present:
        raise RefusedError("no .metadata: not a DCP slot, or one whose save did not end")
    if "common.pt" in present or "metadata.json" in present:
        raise RefusedError("a Megatron checkpoint: its shards are laid out by its own parallelism")
    try:
        return dcp.load_metadata(hf_export.Reader(source, present, {}).read_at, present[dcp.METADATA_NAME])
    except FormatError as error:
        raise IntegrityError(f".metadata: {error.problem}") from None


def _model(metadata: dcp.DcpMetadata) -> dict[str, dcp.DcpTensor]:
    """The model's tensors; RefusedError where it is not one that has an export of the same names."""
    tensors = {key.removeprefix(_PREFIX): value for key, value in metadata.tensors.items() if key.startswith(_PREFIX)}
    if not tensors:
        raise RefusedError("no weights under dcp.model: not a slot of AReaL's FSDP engine")
    groups = [key for key in metadata.object_keys if key.startswith("dcp.optim.param_groups.")]
    if any(not key.split(".")[3].isdigit() for key in groups) or "tok_embeddings.weight" in tensors:
        raise RefusedError("an Archon checkpoint: its weights have names of its own")
    hf_export.refuse_names(tensors)
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise RefusedError(f"{key} is {tensor.dtype}: a quantised model is not exported")
    return tensors


def _chunks(
    metadata: dcp.DcpMetadata, tensors: Mapping[str, dcp.DcpTensor], present: Mapping[str, FileInfo], opened: Mapping[str, int]
) -> dict[str, list[_Chunk]]:
    """Where each tensor's blocks lie. IntegrityError unless they are what .metadata says, and cover the tensor exactly."""
    found: dict[str, list[_Chunk]] = {key: [] for key in tensors}
    known = {key: set(tensor.chunks) for key, tensor in tensors.items()}
    for item in metadata.items:
        key = item.key.removeprefix(_PREFIX)
        if not item.key.startswith(_PREFIX) or key not in tensors:
            continue
        tensor, fd = tensors[key], opened[item.file]
        if item.offset + item.length > present[item.file].size_bytes:
            raise IntegrityError(f"{item.file}: truncated: {key} ends at {item.offset + item.length}")
        begin = item.chunk if item.chunk is not None else (0,) * len(tensor.shape)
        try:
            data = torchzip.find_data(_within(fd, item), item.length)
        except OSError as error:
            raise from_os_error(error, doing="reading", path=item.file) from error
        except FormatError as error:
            raise IntegrityError(f"{item.file}: {key}, stored from {item.offset} on: {error.problem}") from None
        if data.dtype != tensor.dtype or (begin, data.shape) not in known[key]:
            raise IntegrityError(f"{item.file}: {key}, stored from {item.offset} on, is not what .metadata says")
        if data.length:  # a rank may have none of a small tensor
            found[key].append(_Chunk(item.file, item.offset + data.offset, data, begin))
    for key, tensor in tensors.items():
        _check_cover(key, tensor, found[key])
    return found


def _within(fd: int, item: dcp.StorageItem) -> Callable[[int, int], bytes]:
    return lambda offset, length: os.pread(fd, min(length, item.length - offset), item.offset + offset)


def _check_cover(key: str, tensor: dcp.DcpTensor, chunks: Sequence[_Chunk]) -> None:
    """Whether the blocks are a grid, as every sharding over a device mesh is: cuts along each dimension, every cell once."""
    boxes = {tuple(zip(chunk.begin, chunk.data.shape, strict=True)) for chunk in chunks}
    cells = 1
    for dimension, whole in enumerate(tensor.shape):
        cuts = sorted({box[dimension] for box in boxes})
        if [begin for begin, _ in cuts] != [0, *accumulate(size for _, size in cuts)][:-1] or sum(n for _, n in cuts) != whole:
            cells = -1
        cells *= len(cuts)
    if not len(boxes) == len(chunks) == (cells if prod(tensor.shape) else 0):
        raise IntegrityError(f"the stored blocks of {key} do not cover it exactly")


def _range(chunk: _Chunk, tensor: dcp.DcpTensor, source: int, sink: int, offset: int) -> streaming.Range:
    place = _Rows(tensor.shape, chunk.begin, chunk.data.shape, torchzip.ITEM_BYTES[tensor.dtype], offset)
    if place.row_bytes == chunk.data.length:
        return streaming.Range(source, chunk.offset, chunk.data.length, sink, place.start(0))
    return streaming.Range(source, chunk.offset, chunk.data.length, sink, 0, place)


class _Rows:
    """Where the bytes of a block go: rows that are contiguous in the tensor as well."""

    def __init__(
        self, shape: tuple[int, ...], begin: tuple[int, ...], sizes: tuple[int, ...], item_bytes: int, offset: int
    ) -> None:
        outer = len(shape)
        while outer > 0 and sizes[outer:] == shape[outer:]:
            outer -= 1
        # Dimensions after `outer` are whole, so that one step along `outer` continues the row.
        self.sizes = sizes[:outer]
        self.row_bytes = prod(sizes[outer:]) * item_bytes
        strides = [prod(shape[n + 1 :]) * item_bytes for n in range(len(shape))]
        self.strides = strides[:outer]
        self.first = offset + sum(map(operator.mul, begin, strides))

    def start(self, row: int) -> int:
        """Where that row begins."""
        at: int = self.first
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            row, index = divmod(row, size)
            at += index * stride
        return at

    def __call__(self, begin: int, length: int) -> Iterator[tuple[int, int]]:
        while length:
            row, within = divmod(begin, self.row_bytes)
            piece = min(length, self.row_bytes - within)
            yield self.start(row) + within, piece
            begin, length = begin + piece, length - piece


def _shards(tensors: Mapping[str, dcp.DcpTensor], shard_bytes: int) -> list[_Shard]:
    groups: list[dict[str, int]] = [{}]
    for key, tensor in tensors.items():
        size = prod(tensor.shape) * torchzip.ITEM_BYTES[tensor.dtype]
        if groups[-1] and sum(groups[-1].values()) + size > shard_bytes:
            groups.append({})
        groups[-1][key] = size
    shards = []
    for number, group in enumerate(groups, 1):
        name = hf_export.WHOLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, at = {}, 0
        # Wide elements first: each tensor then lies at a multiple of its element's size.
        for key in sorted(group, key=lambda key: -torchzip.ITEM_BYTES[tensors[key].dtype]):
            header[key] = {
                "dtype": _DTYPES[tensors[key].dtype],
                "shape": list(tensors[key].shape),
                "data_offsets": [at, at + group[key]],
            }
            places[key] = at
            at += group[key]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        offsets = {key: begin + place for key, place in places.items()}
        shards.append(_Shard(name, struct.pack("<Q", len(text)) + text, offsets, begin + at))
    return shards


def _finish(destination: Path, shards: Sequence[_Shard], tensors: Mapping[str, dcp.DcpTensor]) -> dict[str, native.Digest]:
    """Write the index where there are several files, and digest everything: from the page cache, where it still is."""
    specs = [native.FileSpec(shard.name, shard.size_bytes) for shard in shards]
    if len(shards) > 1:
        total = sum(prod(tensor.shape) * torchzip.ITEM_BYTES[tensor.dtype] for tensor in tensors.values())
        weight_map = {key: shard.name for shard in shards for key in shard.offsets}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        content = json.dumps(index, indent=2).encode() + b"\n"
        with streaming.created(os.path.join(destination, hf_export.INDEX), len(content)) as fd:
            streaming.write_at(fd, 0, content)
        specs.append(native.FileSpec(hf_export.INDEX, len(content)))
    digests = {}
    for name, outcome in native.digest_files(destination, specs).items():
        if isinstance(outcome, CkptStoreError):
            raise outcome
        digests[name] = outcome
    try:
        native.fsync_path(destination)
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=os.fspath(destination)) from error
    return digests


def _configuration(folder: Path | None) -> dict[str, FileInfo]:
    """The files of an export, if one is given; RefusedError where it is not of a model that can be exported."""
    if folder is None:
        return {}
    try:
        with os.scandir(folder) as entries:
            stats = {entry.name: entry.stat() for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError as error:
        raise from_os_error(error, doing="listing", path=os.fspath(folder)) from error
    files = {name: FileInfo(name, found.st_size, found.st_mtime_ns, found.st_ino) for name, found in stats.items()}
    hf_export.refuse_config(files, hf_export.Reader(folder, files, {}).json(hf_export.CONFIG))
    return files


def _compare(tensors: Mapping[str, dcp.DcpTensor], folder: Path, files: Mapping[str, FileInfo]) -> None:
    """RefusedError unless the slot has the names and shapes of that export, where it holds weights."""
    if hf_export.WHOLE not in files and hf_export.INDEX not in files:
        return
    theirs = {name: weight.shape for name, weight in hf_export.read(folder, list(files.values())).weights.items()}
    ours = {name: tensor.shape for name, tensor in tensors.items()}
    if different := {name for name, _ in ours.items() ^ theirs.items()} - {hf_export.HEAD}:
        raise RefusedError(f"the slot and {os.fspath(folder)} are not the same model: {min(different)} differs")


def _copy_configuration(folder: Path | None, destination: Path, files: Mapping[str, FileInfo]) -> dict[str, native.Digest]:
    wanted = [info for name, info in files.items() if _CONFIGURATION.fullmatch(name) and not _WEIGHTS.fullmatch(name)]
    if folder is None or not wanted:
        return {}
    return native.copy_files(folder, destination, [native.FileSpec(*info[:4]) for info in wanted]).digests
