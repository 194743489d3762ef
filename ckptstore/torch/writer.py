"""StoreWriter: torch.distributed.checkpoint saves into a store of steps.

The files are torch's own: `__{rank}_0.distcp` with one torch.save archive an item, and `.metadata`. The coordinator begins
the draft and tells all ranks where it is; each rank lays its archives out around its tensors' own memory and hands them to
the engine (or sends them to the store's URL), durable and digested; the coordinator commits once, when all have written.
Nothing is visible before that.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptstore import native, saving
from ckptstore.errors import UsageError
from ckptstore.formats import dcp, torchzip
from ckptstore.manifest import Manifest
from ckptstore.store import CheckpointStore
from ckptstore.torch.memory import bytes_of, plain
from ckptstore.uploading import Written


@dataclasses.dataclass(frozen=True)
class _Place:
    """What the coordinator tells a rank: where the draft is (saving.place), and the rank's own file in it."""

    draft: str
    file: str


@dataclasses.dataclass(frozen=True)
class _Written(WriteResult):
    """A result that also says what the rank's file is: on its first item only."""

    files: Mapping[str, Written] | None = None


class _MetadataFile(FileSystemWriter):
    """Writes `.metadata` as torch does, without the path of the draft in it."""

    def storage_meta(self) -> StorageMeta | None:
        """None: where a checkpoint lies is no property of it."""
        return None


class StoreWriter(StorageWriter):
    """A storage writer for `dcp.save` and `dcp.async_save`: saves `step` into the store, visible only when all ranks are done.

    Construct it on every rank, with the same store and step; all ranks see the same folder, or URL. One save each. A rank
    that fails or dies means an error on the others (at the latest after the process group's timeout) and no commit.
    `metrics` are recorded by the coordinator. `nice` lowers the priority of the writing threads. After the save, `manifest`
    is the coordinator's. Not thread-safe.
    """

    def __init__(self, store: CheckpointStore, step: int, *, metrics: Mapping[str, float] | None = None, nice: int = 0) -> None:
        super().__init__()
        self._store = store
        self._step = step
        self._metrics = dict(metrics or {})
        self._options = native.CopyOptions(nice=nice)
        self._draft: saving.Draft | None = None
        self.manifest: Manifest | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The start of a save, by torch. UsageError for a checkpoint_id: the step says where."""
        if checkpoint_id:
            raise UsageError(f"checkpoint_id {checkpoint_id!r} beside StoreWriter", hint="The store and the step say where.")
        self.manifest = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin the draft, on the coordinator."""
        if kwargs.get("use_collectives", True) is False:
            raise UsageError("StoreWriter commits once for all ranks", hint="Leave use_collectives as it is.")
        if self._draft is not None:
            saving.abandon(self._draft)
            self._draft = None
        if is_coordinator:
            self._draft = saving.begin(self._store.backend, self._step)
            # A save that fails on another rank ends without a word to us: then the draft goes with the writer.
            weakref.finalize(self, saving.abandon, self._draft)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank where to write."""
        assert self._draft is not None
        where = saving.place(self._draft)
        return [dataclasses.replace(plan, storage_data=_Place(where, f"__{rank}_0.distcp")) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, durable."""
        place: _Place = plan.storage_data
        done: Future[list[WriteResult]] = Future()
        try:
            done.set_result(self._write(place, plan.items, planner) if plan.items else [])
        except BaseException:
            self.close()
            raise
        return done

    def _write(self, place: _Place, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        values = [planner.resolve_data(item) for item in items]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))), thread_name_prefix="ckptstore-crc32") as pool:
            pieces = list(pool.map(_archive, (item.type for item in items), values))
        buffers = [buffer for piece in pieces for buffer in piece.buffers]
        written = saving.write_buffers(self._store.backend, place.draft, {place.file: buffers}, options=self._options)
        results: list[WriteResult] = []
        offset = 0
        for item, piece in zip(items, pieces, strict=True):
            info = _StorageInfo(place.file, offset, piece.length)
            results.append(_Written(item.index, piece.length, info, None if results else written))
            offset += piece.length
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata` and commit, on the coordinator."""
        draft = self._draft
        assert draft is not None
        written: dict[str, Written] = {}
        plain = []
        for ranks in results:
            for result in ranks:
                if isinstance(result, _Written) and result.files:
                    written.update(result.files)
            plain.append([WriteResult(result.index, result.size_in_bytes, result.storage_data) for result in ranks])
        with tempfile.TemporaryDirectory(prefix="ckptstore-") as scratch:  # torch writes it to a path, and nowhere else
            _MetadataFile(scratch, sync_files=False).finish(metadata, plain)
            content = Path(scratch, dcp.METADATA_NAME).read_bytes()
        written |= saving.write_buffers(self._store.backend, saving.place(draft), {dcp.METADATA_NAME: [content]})
        self._draft = None
        try:
            self.manifest = saving.commit(draft, written, metrics=self._metrics)
        finally:
            saving.abandon(draft)

    def close(self) -> None:
        """Remove what an unfinished save left. Happens by itself when the writer goes."""
        if self._draft is not None:
            saving.abandon(self._draft)
            self._draft = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_draft": None}  # another process begins its own

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch must not choose this writer by a path."""
        return False

    def storage_meta(self) -> StorageMeta | None:
        """None: the step is in the manifest."""
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Archive:
    """One item as buffers in order; `owner` keeps their memory alive."""

    buffers: tuple[Any, ...]
    length: int
    owner: object = None


def _archive(kind: WriteItemType, value: Any) -> _Archive:
    if kind == WriteItemType.BYTE_IO:
        data = value.getbuffer()
        return _Archive((data,), len(data), value)
    tensor = plain(value)
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in torchzip.ITEM_BYTES:  # float8, uint8 and the like: small, or rare; by way of memory
        stream = io.BytesIO()
        torch.save(tensor.clone(), stream)
        data = stream.getbuffer()
        return _Archive((data,), len(data), stream)
    layout = torchzip.tensor(name, tensor.shape)
    data = bytes_of(tensor)
    return _Archive((layout.head, data, layout.tail(native.crc32(data))), layout.length, tensor)
