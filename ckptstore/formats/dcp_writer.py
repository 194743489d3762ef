"""Writes a torch.distributed.checkpoint folder, without torch: `__0_0.distcp`, then `.metadata`.

What torch writes from one process, byte for byte in its parts: each item is a torch.save archive; `.metadata` is a pickle
of torch's own classes, emitted from templates. Sizes are known beforehand, so that every place in the shard is fixed
before the first byte moves, and the tensors' bytes stream from their sources in any order. Keys may share an item.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from ckptstore import native
from ckptstore.errors import from_os_error
from ckptstore.formats import dcp, pickling, streaming, torchzip
from ckptstore.formats.pickling import Memo, emit
from ckptstore.model import FileInfo

SHARD_NAME = "__0_0.distcp"
_META = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"  # of the format, as torch has written it since 2.9; older ones ignore it
KeyPath = tuple[str | int, ...]


class Origin(NamedTuple):
    """Where a tensor's bytes come from: a file, by its place among the sources, and the offset in it."""

    source: int
    offset: int


@dataclass(frozen=True, slots=True)
class TensorItem:
    """One tensor, whole; without origin, zeros (of which one element is stored)."""

    dtype: str
    shape: tuple[int, ...]
    origin: Origin | None


@dataclass(frozen=True, slots=True, eq=False)  # told apart by identity: its value may be a list
class ObjectItem:
    """One value made of builtins."""

    value: pickling.Value


Item = TensorItem | ObjectItem


class _Placed(NamedTuple):
    item: Item
    offset: int
    layout: torchzip.Layout | None  #: of a tensor
    content: bytes = b""  #: of an object

    @property
    def length(self) -> int:
        return self.layout.length if self.layout is not None else len(self.content)


def write(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    files: Sequence[FileInfo],
    entries: Mapping[KeyPath, Item],
    *,
    expected: Mapping[str, Sequence[int]] | None = None,
    also_read: Sequence[streaming.Range] = (),
    chunk_bytes: int = native.CHUNK_BYTES,
    progress: native.Progress | None = None,
) -> dict[str, native.Digest]:
    """Write both files into a folder that has neither, durable; their digests, in chunks of native.CHUNK_BYTES.

    `entries`: the path of keys that leads to each item; equal items are stored once. `files`, below `source`, are those that
    origins number. `expected`: CRCs of their chunks of `chunk_bytes`, checked where the tensors and `also_read` cover a
    chunk. Raises the errors of native.copy_files; what was written stays, the destination is the caller's stage.
    """
    placed = _place(dict.fromkeys(entries.values()))
    size_bytes = max((item.offset + item.length for item in placed.values()), default=0)
    streamed = {
        item: _range(place, place.layout, item.origin)
        for item, place in placed.items()
        if isinstance(item, TensorItem) and item.origin is not None and place.layout is not None
    }
    ranges = [*streamed.values(), *also_read]
    shard = os.path.join(destination, SHARD_NAME)
    with ExitStack() as stack:
        fds = stack.enter_context(streaming.opened(source, files))
        sink = stack.enter_context(streaming.created(shard, size_bytes))
        sources = [streaming.Source(info, fd, (expected or {}).get(info.name)) for info, fd in zip(files, fds, strict=True)]
        job = streaming.Job(sources, [sink], ranges, chunk_bytes, progress=progress)
        job.run()
        crcs: dict[Item, int] = dict(zip(streamed, job.crc32(), strict=False))
        segments = [*job.written(0), *_write_rest(sink, placed.values(), crcs)]
    digests = {SHARD_NAME: streaming.digest(segments), dcp.METADATA_NAME: native.Digest(0, ())}
    content = metadata(entries, {item: (place.offset, place.length) for item, place in placed.items()})
    path = os.path.join(destination, dcp.METADATA_NAME)
    with streaming.created(path, len(content)) as fd:
        digests[dcp.METADATA_NAME] = streaming.digest(streaming.write_at(fd, 0, content))
    try:
        native.fsync_path(destination)
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=os.fspath(destination)) from error
    return digests


def _place(items: Iterable[Item]) -> dict[Item, _Placed]:
    placed: dict[Item, _Placed] = {}
    offset = 0
    for item in items:
        if isinstance(item, TensorItem):
            layout = torchzip.tensor(item.dtype, item.shape, expanded=item.origin is None)
            placed[item] = _Placed(item, offset, layout)
        else:
            placed[item] = _Placed(item, offset, None, torchzip.value(item.value))
        offset += placed[item].length
    return placed


def _range(placed: _Placed, layout: torchzip.Layout, origin: Origin) -> streaming.Range:
    begin = placed.offset + len(layout.head)
    return streaming.Range(origin.source, origin.offset, layout.data_bytes, 0, begin)


def _write_rest(sink: int, placed: Iterable[_Placed], crcs: Mapping[Item, int]) -> Iterator[tuple[int, int, int]]:
    """Write everything but the tensors' data, now that its CRCs are known."""
    pending, begin = b"", 0  # what lies between two tensors' data is written at once
    for item in placed:
        if item.layout is None:
            pending += item.content
            continue
        pending += item.layout.head
        if item.item in crcs:
            yield from streaming.write_at(sink, begin, pending)
            begin, pending = item.offset + len(item.layout.head) + item.layout.data_bytes, b""
            pending = item.layout.tail(crcs[item.item])
        else:
            zeros = bytes(item.layout.data_bytes)
            pending += zeros + item.layout.tail(native.crc32(zeros))
    yield from streaming.write_at(sink, begin, pending)


def metadata(entries: Mapping[KeyPath, Item], places: Mapping[Item, tuple[int, int]]) -> bytes:
    """The `.metadata` of a checkpoint whose items lie at these (offset, length) in its one shard."""
    once = Memo()
    keys = {path: emit(".".join(map(str, path))) for path in entries}
    # Each part is made where it stands in the pickle: the memo counts on it.
    parts = [
        b"\x80\x04",
        _new(once, _META, "Metadata"),
        b"}(",
        once(emit("state_dict_metadata")),
        b"}(",
        *(once(keys[path]) + _storage(once, item) for path, item in entries.items()),
        b"u",
        once(emit("planner_data")),
        b"}(",
        *(once(keys[path]) + b"(" + b"".join(once(emit(part)) for part in path) + b"t" for path in entries),
        b"u",
        once(emit("storage_data")),
        b"}(",
        *(_index(once, keys[path], item) + _info(once, *places[item]) for path, item in entries.items()),
        b"u",
        emit("storage_meta") + b"N" + emit("version") + emit(_VERSION),
        b"ub.",
    ]
    return b"".join(parts)


def _storage(once: Memo, item: Item) -> bytes:
    if isinstance(item, ObjectItem):
        return _new(once, _META, "BytesStorageMetadata") + b"}b"
    return b"".join(
        [
            _new(once, _META, "TensorStorageMetadata"),
            b"}(",
            once(emit("properties")),
            _new(once, _META, "TensorProperties"),
            b"(",
            once(pickling.name("torch", item.dtype)),
            once(pickling.call(pickling.name("torch.serialization", "_get_layout"), ("torch.strided",))),
            b"\x89",  # requires_grad
            once(pickling.call(pickling.name(_META, "_MEM_FORMAT_ENCODING"), (0,))),
            b"\x89",  # pin_memory
            b"tb",
            once(emit("size")),
            _size(once, item.shape),
            once(emit("chunks")),
            b"](",
            _new(once, _META, "ChunkStorageMetadata"),
            b"}(",
            once(emit("offsets")),
            _size(once, (0,) * len(item.shape)),
            once(emit("sizes")),
            _size(once, item.shape),
            b"ubeub",
        ]
    )


def _index(once: Memo, key: bytes, item: Item) -> bytes:
    start = _new(once, _META, "MetadataIndex") + b"}(" + once(emit("fqn")) + once(key) + once(emit("index"))
    if isinstance(item, ObjectItem):
        return start + b"Nub"
    return start + b"K\x00" + once(emit("offset")) + _size(once, (0,) * len(item.shape)) + b"ub"


def _info(once: Memo, offset: int, length: int) -> bytes:
    return b"".join(
        [
            _new(once, "torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            b"}(",
            once(emit("relative_path")),
            once(emit(SHARD_NAME)),
            once(emit("offset")),
            pickling.integer(offset),
            once(emit("length")),
            pickling.integer(length),
            b"ub",
        ]
    )


def _new(once: Memo, module: str, qualified: str) -> bytes:
    return once(pickling.name(module, qualified)) + b")\x81"


def _size(once: Memo, shape: Sequence[int]) -> bytes:
    return once(pickling.name("torch", "Size")) + emit(tuple(shape)) + b"\x85R"
