"""StoreReader: torch.distributed.checkpoint loads from a store of steps, every byte that is used checked against the manifest.

`.metadata` is read as data, never unpickled. A tensor's bytes go from the file into the target's own memory (that of a GPU by
bounce.py) where what is wanted lies in one piece there and in the file; else by way of a buffer. Objects (items that are no
tensors) are handed to torch's planner, which unpickles them: their digests have been checked by then.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptstore.errors import IntegrityError, NotWholeError, UsageError
from ckptstore.formats import FormatError, dcp, torchzip
from ckptstore.formats.inert import uncollected
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.parts import files_folder_of
from ckptstore.saves.loading import Want, read_into, read_whole
from ckptstore.store import CheckpointStore
from ckptstore.torch import resuming
from ckptstore.torch.bounce import onto, target_of
from ckptstore.torch.memory import bytes_of, has_memory
from ckptstore.torch.simple import find

_WAVE_BYTES = 512 << 20  # of buffers, for what cannot go straight into its target


@dataclass(slots=True)
class _Stored:
    """One stored item, and all that is wanted of it."""

    item: dcp.StorageItem
    dtype: str  #: empty for an object
    shape: tuple[int, ...]
    requests: list[ReadItem] = field(default_factory=list)


@dataclass(frozen=True)
class _Seen:
    """What a rank tells the coordinator of its store: resuming.identity of the step, and of all others in a set of nodes."""

    step: int
    identity: str
    others: Mapping[int, str]


class StoreReader(StorageReader):
    """A storage reader for `dcp.load`: the step of the store, or with None the newest whole one (name it where others save).

    Only what the plan asks for is read, in whole chunks of the manifest. All ranks must see the same save, on a shared disk
    or on their own: else NotWholeError, which names the newest step that is the same for all (`resume_step` does so before),
    and so it is where files are needed that lie on other nodes. DigestMismatchError for damage. All of them inside the
    CheckpointException that torch raises on every rank. Not thread-safe.
    """

    def __init__(self, store: CheckpointStore, step: int | None = None) -> None:
        super().__init__()
        part, manifest = find(store, step)
        self._store = store
        self._backend = store.backend
        self._folder = files_folder_of(store.backend, part)
        self._path = part.path
        self._manifest: Manifest = manifest
        self._files: dict[str, FileEntry] = {entry.path: entry for entry in manifest.files}
        self._metadata: dcp.DcpMetadata | None = None
        self.step = manifest.step

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The start of a load, by torch. UsageError for a checkpoint_id: the step says what."""
        if checkpoint_id:
            raise UsageError(f"checkpoint_id {checkpoint_id!r} beside StoreReader", hint="The store and the step say what.")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """`.metadata` as torch's classes, made from what was read as data."""
        entry = self._files.get(dcp.METADATA_NAME)
        if entry is None:
            raise UsageError(
                f"step {self.step} is no checkpoint of torch.distributed", hint="ckptstore.torch.load reads what save wrote."
            )
        try:
            found = dcp.read_metadata(read_whole(self._backend, self._folder, entry, chunk_bytes=self._manifest.chunk_bytes))
        except FormatError as error:
            raise IntegrityError(f"step {self.step}: {error}", hint="Does a plain dcp.load read it?") from error
        self._metadata = found
        with uncollected():
            return _as_torch(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing more to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say what this rank sees, and refuse what it cannot read."""
        lacking = sorted({stored.item.file for stored in self._wanted(plan.items)} - self._files.keys())
        if lacking and (group := self._manifest.group) is not None:
            shown = f"{', '.join(lacking[:5])}{' …' if len(lacking) > 5 else ''}"
            raise NotWholeError(
                f"step {self.step} in {self._path} is of {group.whose}, and this rank needs {shown}, which other nodes have",
                files=tuple(lacking),
                hint="It loads on as many ranks as saved it, each on its node. For any others push it from all nodes "
                "at once to a URL (torchrun … -m -- ckptstore.recover push), and load it there, or pull it.",
            )
        if lacking:
            raise IntegrityError(
                f"step {self.step}: {lacking[0]} is named by .metadata, and missing", hint="Load another step."
            )
        others = resuming.held(self._store) if self._manifest.group is not None else {}
        seen = _Seen(self.step, resuming.identity(self._manifest), {step: name for step, (name, _) in others.items()})
        return dataclasses.replace(plan, storage_data=seen)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are, where all ranks see the same save."""
        seen = [plan.storage_data for plan in plans if isinstance(plan.storage_data, _Seen)]
        for rank, other in enumerate(seen):
            if (other.step, other.identity) != (seen[0].step, seen[0].identity):
                usable = resuming.newest_on_all([one.others for one in seen])
                raise NotWholeError(
                    f"rank {rank} sees another save of step {other.step} than rank 0 sees of step {seen[0].step}",
                    usable_step=usable,
                    hint=f"Load step {usable}, the newest that all ranks have."
                    if usable >= 0
                    else "No step is the same for all.",
                )
        return [dataclasses.replace(plan, storage_data=None) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and check what the plan asks for."""
        for wave in _waves(self._wanted(plan.items)):
            self._read(wave, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _wanted(self, requests: Iterable[ReadItem]) -> list[_Stored]:
        assert self._metadata is not None
        items = {(item.key, item.chunk): item for item in self._metadata.items}
        found: dict[tuple[str, int, int], _Stored] = {}
        for request in requests:
            index = request.storage_index
            chunk = None if index.offset is None else tuple(index.offset)
            item = items.get((index.fqn, chunk)) or items.get((index.fqn, None))
            if item is None:
                raise IntegrityError(f"step {self.step}: {index.fqn} has no place in its files", hint="Load another step.")
            entry = self._files.get(item.file)
            if entry is not None and item.offset + item.length > entry.size_bytes:  # before memory is made for it
                raise IntegrityError(
                    f"step {self.step}: .metadata places {index.fqn} behind the end of {item.file}", hint="Load another step."
                )
            dtype, shape = "", tuple[int, ...]()
            if request.type == LoadItemType.TENSOR:
                tensor = self._metadata.tensors[index.fqn]
                dtype = tensor.dtype.removeprefix("torch.")
                shape = dict(tensor.chunks).get(chunk or (), tensor.shape)
            stored = found.setdefault((item.file, item.offset, item.length), _Stored(item, dtype, shape))
            stored.requests.append(request)
        return list(found.values())

    def _read(self, wave: list[_Stored], planner: LoadPlanner) -> None:
        wants: dict[str, list[Want]] = {}
        after: list[_Reading] = []
        for stored in wave:
            reading = _Reading(stored, planner, self._backend.is_folder)
            wants.setdefault(stored.item.file, []).extend(reading.wants())
            after.append(reading)
        files = [(self._files[name], parts) for name, parts in wants.items()]
        bounce = onto(reading.target for reading in after if reading.target is not None)
        read_into(self._backend, self._folder, files, chunk_bytes=self._manifest.chunk_bytes, bounce=bounce)
        for reading in after:
            if not reading.deliver():
                data = bytearray(reading.stored.item.length)
                want = Want(reading.stored.item.offset, memoryview(data))
                entry = self._files[reading.stored.item.file]
                read_into(self._backend, self._folder, [(entry, [want])], chunk_bytes=self._manifest.chunk_bytes)
                reading.deliver_archive(data)

    @property
    def checkpoint_id(self) -> str:
        """The step's folder, or its URL."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch must not choose this reader by a path."""
        return False


class _Reading:
    """How one stored item is read and handed over."""

    def __init__(self, stored: _Stored, planner: LoadPlanner, on_disk: bool) -> None:
        self.stored = stored
        self.planner = planner
        self.direct = {"cpu", "cuda"} if on_disk else {"cpu"}  #: devices whose memory is filled as it is read
        self.head = b""  #: expected
        self.found = bytearray()  #: the archive's head as it was read, or all of an object
        self.target: torch.Tensor | None = None  #: filled directly
        self.whole: torch.Tensor | None = None  #: the stored tensor, in a buffer

    def wants(self) -> Iterator[Want]:
        item, dtype, shape = self.stored.item, self.stored.dtype, self.stored.shape
        layout = torchzip.tensor(dtype, shape) if dtype in torchzip.ITEM_BYTES else None
        if layout is None or layout.length != item.length:  # an object, or an archive that we don't write
            self.found = bytearray(item.length)
            yield Want(item.offset, memoryview(self.found))
            return
        self.head, self.found = layout.head, bytearray(len(layout.head))
        yield Want(item.offset, memoryview(self.found))
        if not layout.data_bytes:
            self.whole = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            return
        begin = item.offset + len(layout.head)
        if len(self.stored.requests) == 1:
            request = self.stored.requests[0]
            target = self.planner.resolve_tensor(request).detach()
            place = _in_one_piece(request, shape)
            # Whether its memory is its values.
            plain = has_memory(target) and target.is_contiguous() and not target.is_conj() and not target.is_neg()
            if place is not None and plain and target.device.type in self.direct and (
                str(target.dtype) == f"torch.{dtype}" and tuple(target.shape) == tuple(request.lengths)
            ):  # fmt: skip
                self.target = target
                yield Want(begin + place * torchzip.ITEM_BYTES[dtype], target_of(target))
                return
        self.whole = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        yield Want(begin, bytes_of(self.whole))

    def deliver(self) -> bool:
        """Hand over what was read; False where the archive turns out to be laid out otherwise."""
        if not self.head:
            self.deliver_archive(self.found)
            return True
        if self.found != self.head:
            return False
        if self.target is not None:
            self.planner.commit_tensor(self.stored.requests[0], self.target)
        else:
            assert self.whole is not None
            self._copy(self.whole)
        return True

    def deliver_archive(self, data: bytearray) -> None:
        """Hand over what is in an archive, or an object's bytes."""
        if self.stored.dtype:
            self._copy(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
            return
        for request in self.stored.requests:
            self.planner.load_bytes(request, io.BytesIO(data))

    def _copy(self, stored: torch.Tensor) -> None:
        for request in self.stored.requests:
            piece = stored
            for dim, (begin, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
                piece = piece.narrow(dim, begin, length)
            target = self.planner.resolve_tensor(request).detach()
            if target.shape != piece.shape:
                raise IntegrityError(f"{self.stored.item.key}: {tuple(piece.shape)} stored, {tuple(target.shape)} wanted")
            target.copy_(piece)
            self.planner.commit_tensor(request, target)


def _in_one_piece(request: ReadItem, shape: tuple[int, ...]) -> int | None:
    """Where the wanted part begins in the stored tensor, in items, if it lies there in one piece."""
    offsets, lengths = tuple(request.storage_offsets), tuple(request.lengths)
    partial = max((dim for dim, size in enumerate(shape) if lengths[dim] != size), default=0)
    if any(length != 1 for length in lengths[:partial]):
        return None
    return sum(begin * prod(shape[dim + 1 :]) for dim, begin in enumerate(offsets))


def _waves(stored: list[_Stored]) -> Iterator[list[_Stored]]:
    wave: list[_Stored] = []
    size = 0
    for one in sorted(stored, key=lambda one: (one.item.file, one.item.offset)):
        if wave and size + one.item.length > _WAVE_BYTES:
            yield wave
            wave, size = [], 0
        wave.append(one)
        size += one.item.length
    if wave:
        yield wave


def _as_torch(found: dcp.DcpMetadata) -> Metadata:
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in found.object_keys}
    for key, tensor in found.tensors.items():
        dtype = getattr(torch, tensor.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"{key} has the dtype {tensor.dtype}, which this torch ({torch.__version__}) lacks")
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor.chunks]
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor.shape), chunks)
    entries = {key: entries[key] for key in found.paths if key in entries} | entries  # in the order of what was saved
    places = {MetadataIndex(item.key, item.chunk): _StorageInfo(item.file, item.offset, item.length) for item in found.items}
    return Metadata(entries, planner_data=dict(found.paths), storage_data=places)
