"""StoreWriter: torch.distributed.checkpoint saves into a store of steps.

The files are torch's own: `__{rank}_0.distcp` with one torch.save archive an item, and `.metadata`. The coordinator begins
the draft and tells all ranks where it is; each rank lays its archives out around its tensors' own memory and hands them to
the engine (or sends them to the store's URL), durable and digested; the coordinator commits once, when all have written.
Nothing is visible before that.

Ranks that do not see the coordinator's folder have a disk of their own (node_sets.identity tells): the first rank of each such
node begins a draft there, and all nodes commit together (nodes.py). torch writes what several ranks hold alike once; a node
that would lack it writes it once more, and its own `.metadata` says so: each node has all that its own ranks need.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptstore import native
from ckptstore.errors import NotFoundError, UsageError
from ckptstore.formats import dcp, torchzip
from ckptstore.formats.inert import uncollected
from ckptstore.manifest import Manifest
from ckptstore.parallel import Pool
from ckptstore.saves import node_sets, saving, steps
from ckptstore.saves.saving import Metrics
from ckptstore.saves.uploading import Written
from ckptstore.store import CheckpointStore, needed
from ckptstore.torch import blocks, memory, nodes
from ckptstore.torch.filling import File, Streams, Tail, in_memory

#: Its dcp.async_save copies what is on the CPU for no writer but one that stages.
_STAGES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What the coordinator tells a rank: where the draft is (saving.place), and the rank's own file in it."""

    draft: str  #: with several nodes the draft's name: each node has its own
    file: str
    node: int = 0
    nodes: int = 1
    leads: bool = False  #: whether it begins its node's draft
    again: Sequence[MetadataIndex] = ()  #: of its own items, to be written once more for its node


@dataclasses.dataclass(frozen=True)
class _Offer:
    """What a rank tells the coordinator: which store it sees (node_sets.identity), and all that it holds."""

    store: str
    items: Sequence[MetadataIndex]


@dataclasses.dataclass(frozen=True)
class _Written(WriteResult):
    """A result that also says what the rank's file is (on its first item only), and on which node."""

    files: Mapping[str, Written] | None = None
    node: int = 0
    again: bool = False  #: whether it lies on another node too


class _MetadataFile(FileSystemWriter):
    """Writes `.metadata` as torch does, without the path of the draft in it."""

    def storage_meta(self) -> StorageMeta | None:
        """None: where a checkpoint lies is no property of it."""
        return None


class StoreWriter(StorageWriter):
    """A storage writer for `dcp.save` and `dcp.async_save`: saves `step` into the store, visible only when all ranks are done.

    Construct it on every rank, with its store and the same step. Ranks that see the same folder, or URL, save one checkpoint
    there; where nodes have a disk each, it is found out, and each node gets the files of its own ranks
    (docs/distributed.md). One save each. A rank that fails or dies means an error on the others (at the latest after the
    process group's timeout) and no commit.
    `metrics` are recorded by the coordinator. `nice` lowers the priority of the writing threads. After the save, `manifest`
    is the coordinator's. Not thread-safe.
    """

    def __init__(self, store: CheckpointStore, step: int, *, metrics: Metrics | None = None, nice: int = 0) -> None:
        super().__init__()
        needed(store)
        self._store = store
        self._step = step
        self._metrics = saving.numbers_of(metrics)
        self._options = native.CopyOptions(nice=nice)
        self._draft: saving.Draft | None = None
        self._follower: nodes.Follower | None = None
        self._items: Mapping[MetadataIndex, WriteItem] = {}
        self._nodes = 1  #: that have a disk of their own
        self.manifest: Manifest | None = None

    if _STAGES:
        _synchronize_after_execute = should_synchronize_after_execute = False

        def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            """A copy of the state on the CPU, by dcp.async_save."""
            copied: dict[str, Any] = _copy_state_dict(state_dict, _create_cpu_state_dict(state_dict))
            return copied

        def synchronize_staging(self) -> None:
            """Nothing to wait for."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The start of a save, by torch. UsageError for a checkpoint_id: the step says where."""
        if checkpoint_id:
            raise UsageError(f"checkpoint_id {checkpoint_id!r} beside StoreWriter", hint="The store and the step say where.")
        self.manifest = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin the draft, on the coordinator."""
        self.close()
        if kwargs.get("use_collectives", True) is False:
            raise UsageError("StoreWriter commits once for all ranks", hint="Leave use_collectives as it is.")
        if is_coordinator:
            self._draft = saving.begin(self._store.backend, self._step)
            # A save that fails on another rank ends without a word to us: then the draft goes with the writer.
            weakref.finalize(self, saving.abandon, self._draft)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Say which store this rank sees, and what it holds."""
        if not getattr(plan, "usable", True):
            raise UsageError("every save has a place of its own", hint="Leave the planner's enable_plan_caching out.")
        backend = self._store.backend
        self._items = {item.index: item for item in plan.items}
        offer = _Offer(node_sets.identity(backend.location) if backend.is_folder else "", tuple(self._items))
        return dataclasses.replace(plan, storage_data=offer)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank where to write."""
        assert self._draft is not None
        here = node_sets.identity(self._draft.root) if isinstance(self._draft, steps.Draft) else ""
        offers = [plan.storage_data if isinstance(plan.storage_data, _Offer) else _Offer(here, ()) for plan in plans]
        places = [_Place(saving.place(self._draft), f"__{rank}_0.distcp") for rank in range(len(plans))]
        stores = list(dict.fromkeys([here, *(offer.store for offer in offers)]))
        self._nodes = len(stores)
        if self._nodes > 1:
            assert isinstance(self._draft, steps.Draft)
            found = [stores.index(offer.store) for offer in offers]
            lacking = _lacking(found, offers, plans)
            places = [
                dataclasses.replace(
                    place, draft=self._draft.name, node=node, nodes=self._nodes, leads=node > 0 and rank == found.index(node),
                    again=lacking[rank],
                )
                for rank, (place, node) in enumerate(zip(places, found, strict=True))
            ]  # fmt: skip
        return [dataclasses.replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, durable. The first rank of a node then waits for the coordinator's word, in a thread."""
        place: _Place = plan.storage_data
        done: Future[list[WriteResult]] = Future()
        try:
            channel = nodes.Channel(place.draft) if place.nodes > 1 else None
            if place.leads:
                self._draft = steps.begin(self._store.backend.location, self._step, name=place.draft)
            items = [*plan.items, *(self._items[index] for index in place.again)]
            done.set_result(self._write(place, self._folder(place, channel), items, planner) if items else [])
            if place.leads:
                assert channel is not None
                assert isinstance(self._draft, steps.Draft)
                draft, self._draft = self._draft, None
                self._follower = nodes.Follower(channel, place.node, draft)
                weakref.finalize(self, self._follower.stop)
        except BaseException:
            self.close()
            raise
        return done

    def _folder(self, place: _Place, channel: nodes.Channel | None) -> str:
        """Where this rank writes: the coordinator's draft, or that of its node."""
        backend = self._store.backend
        if not backend.is_folder:
            return place.draft
        folder = place.draft
        if channel is not None:
            root = backend.location
            folder = os.path.join(steps.home_of(root, place.draft), "step")
            if place.node and not place.leads:
                nodes.await_draft(folder, min(channel.timeout_s, nodes.BEGIN_S))
        if not os.path.isdir(folder):
            identity = os.path.join(steps.side_of(backend.location), node_sets.IDENTITY)
            raise NotFoundError(
                f"{folder}, where the coordinator has begun to save, is not here, though this is the same store by {identity}",
                hint=f"Was the store copied from another node's disk? Then remove {identity} here.",
            )
        return folder

    def _write(self, place: _Place, folder: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        values = [planner.resolve_data(item) for item in items]
        streams = Streams([value for value in values if isinstance(value, torch.Tensor)])
        backend = self._store.backend
        if streams:  # by blocks: what lies on a GPU is never whole in host memory
            archives = list(map(_archive, items, values))
            files = {place.file: File([part for archive in archives for part in archive.parts])}
            written = blocks.write(backend, folder, files, [], streams=streams, nice=self._options.nice)
        else:
            with Pool(min(len(items), len(os.sched_getaffinity(0))), "ckptstore-crc32") as pool:
                archives = pool.map(_archive, items, values)
                buffers = list(itertools.chain(*pool.map(in_memory, archives)))
            written = saving.write_buffers(backend, folder, {place.file: buffers}, options=self._options)
        return _results(place, items, [archive.size_bytes for archive in archives], written)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata` and commit, on the coordinator."""
        draft = self._draft
        assert draft is not None
        written: list[dict[str, Written]] = [{} for _ in range(self._nodes)]
        for result in itertools.chain(*results):
            if isinstance(result, _Written) and result.files:
                written[result.node].update(result.files)
        contents = [_metadata_of(metadata, results, node) for node in range(self._nodes)]
        self._draft = None
        try:
            if self._nodes > 1:
                assert isinstance(draft, steps.Draft)
                shares = [nodes.Share(content, files) for content, files in zip(contents, written, strict=True)]
                self.manifest = nodes.commit(nodes.Channel(draft.name), draft, shares, self._metrics)
            else:
                files = written[0] | saving.write_buffers(
                    self._store.backend, saving.place(draft), {dcp.METADATA_NAME: contents}
                )
                self.manifest = saving.commit(draft, files, metrics=self._metrics)
        finally:
            saving.abandon(draft)

    def close(self) -> None:
        """Remove what an unfinished save left. Happens by itself when the writer goes."""
        if self._draft is not None:
            saving.abandon(self._draft)
            self._draft = None
        if self._follower is not None:
            self._follower.stop()
            self._follower = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_draft": None, "_follower": None}  # another process begins its own

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: torch must not choose this writer by a path."""
        return False

    def storage_meta(self) -> StorageMeta | None:
        """None: the step is in the manifest."""
        return None


def _lacking(nodes_of: Sequence[int], offers: Sequence[_Offer], plans: Sequence[SavePlan]) -> list[list[MetadataIndex]]:
    """By rank, what it is to write for its node beside its plan: what the node's ranks hold, and ranks elsewhere write."""
    there: dict[int, set[MetadataIndex]] = {node: set() for node in nodes_of}
    for node, plan in zip(nodes_of, plans, strict=True):
        there[node].update(item.index for item in plan.items)
    lacking = []
    for node, offer in zip(nodes_of, offers, strict=True):
        lacking.append([index for index in offer.items if index not in there[node]])
        there[node].update(lacking[-1])
    return lacking


def _counts(result: WriteResult, node: int) -> bool:
    return not isinstance(result, _Written) or not result.again or result.node == node


def _metadata_of(metadata: Metadata, results: Sequence[Sequence[WriteResult]], node: int) -> bytes:
    """`.metadata` for a node: of what lies on several nodes, where it lies on this one."""
    plain = [
        [WriteResult(result.index, result.size_in_bytes, result.storage_data) for result in chosen]
        for again in (False, True)  # what comes later counts
        for ranks in results
        if (chosen := [result for result in ranks if _counts(result, node) and getattr(result, "again", False) == again])
    ]
    with tempfile.TemporaryDirectory(prefix="ckptstore-") as scratch:  # torch writes it to a path, and nowhere else
        with uncollected():
            _MetadataFile(scratch, sync_files=False).finish(metadata, plain)
        content = Path(scratch, dcp.METADATA_NAME).read_bytes()
    if len(content) > dcp.MAX_METADATA_BYTES:  # better said now than at the resume
        raise UsageError(
            f".metadata has {len(content):,} bytes for {sum(map(len, plain)):,} shards of tensors, and StoreReader reads "
            f"{dcp.MAX_METADATA_BYTES:,} at most",
            hint="Save fewer and larger tensors (experts stacked in one), or on fewer ranks.",
        )
    return content


def _results(
    place: _Place, items: Sequence[WriteItem], lengths: Sequence[int], written: Mapping[str, Written]
) -> list[WriteResult]:
    again = set(place.again)
    results: list[WriteResult] = []
    offset = 0
    for item, length in zip(items, lengths, strict=True):
        info = _StorageInfo(place.file, offset, length)
        files = None if results else written
        results.append(_Written(item.index, length, info, files, place.node, item.index in again))
        offset += length
    return results


def _archive(item: WriteItem, value: Any) -> File:
    """One item as torch.save makes it, its tensor where it is. UsageError for one that is nowhere."""
    if item.type == WriteItemType.BYTE_IO:
        return File([value.getvalue()])  # a view of its buffer that outlives it is an error on stderr (Python 3.13)
    name = str(value.dtype).removeprefix("torch.")
    composed = memory.is_made_of_others(value)
    if not composed and not memory.has_memory(value):
        raise memory.without_memory(value, item.index.fqn)
    if composed or name not in torchzip.ITEM_BYTES:  # the dtype of a newer torch, perhaps: by way of memory, as torch does
        stream = io.BytesIO()
        torch.save(memory.plain(value).clone(), stream)
        stream.seek(0)
        if unknown := torch.serialization.get_unsafe_globals_in_checkpoint(stream):  # better said now than at the resume
            raise UsageError(
                f"{item.index.fqn} is a {type(value).__name__}, and torch would not load it again: {', '.join(unknown)}",
                hint="Make these known by torch.serialization.add_safe_globals, where it is saved and where it is loaded.",
            )
        return File([stream.getvalue()])
    layout = torchzip.tensor(name, value.shape)
    return File([layout.head, value.detach(), Tail(layout.tail_bytes, layout.tail)])
