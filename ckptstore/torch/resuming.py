"""Which step to resume from where each node has a disk of its own; and the end of a commit that a crash cut.

A step counts that all ranks see, and see the same of. Where a set is published on some nodes and prepared on all others
(prepared.py), the save was decided: it is published there too, as the save itself would have done. A set that is published on
no node may have been given up, and stays as it is.

    look       every rank says what its store holds, and what is prepared there; all know the same then
    check      the first rank of each node reads what it is to publish: every file, every digest. It may replace a step, and has
               waited on a disk that has just seen a crash
    publish    what is sound on all nodes that are to publish it
    look again, and choose

Without anything to finish, which is as good as always, there is the first look only.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist

from ckptstore import parallel
from ckptstore.backends.local import LocalBackend
from ckptstore.choose import passed_over
from ckptstore.errors import CkptStoreError, IntegrityError, NothingToResumeError, RankError
from ckptstore.frameworks.steps import read_signs
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint, Level, NodeSet, Status
from ckptstore.parts import folder_of, manifest_told, read_part
from ckptstore.ranks import Alone, together
from ckptstore.saves import node_sets, prepared, steps
from ckptstore.saves.prepared import Prepared
from ckptstore.store import CheckpointStore, needed
from ckptstore.torch.simple import see_nothing
from ckptstore.verify import verify

_log = logging.getLogger("ckptstore")
_LOOKS = 2
_AT_ONCE = 16  #: requests to a store: one after the other, a hundred steps take each rank seconds


class _Save(NamedTuple):
    """A step as one save of it by several nodes."""

    step: int
    identity: str


@dataclass(frozen=True)
class Seen:
    """What a rank sees in its store."""

    store: str = ""  #: node_sets.identity; "" where there is none
    held: Mapping[int, tuple[str, NodeSet | None]] = field(default_factory=dict)
    prepared: Mapping[_Save, NodeSet] = field(default_factory=dict)
    bad: Mapping[int, str] = field(default_factory=dict)  #: what is passed over, and why; a node alone may know it
    problem: str = ""


def identity(manifest: Manifest) -> str:
    """Equal for manifests on several disks that are of one save, or of the same bytes."""
    return f"{manifest.group.id} {manifest.group.digest}" if manifest.group else manifest.content


def held(store: CheckpointStore) -> dict[int, tuple[str, NodeSet | None]]:
    """What is committed in a store, by step: its identity, and the set that it is of."""
    return {one.step: (identity(manifest), manifest.group) for one, manifest in _committed(store)}


def _committed(store: CheckpointStore) -> list[tuple[Checkpoint, Manifest]]:
    """By one listing, or another where a manifest went away since: pruned, or its step was saved anew under another name."""
    found: list[tuple[Checkpoint, Manifest]] = []
    for _ in range(_LOOKS):
        try:
            listing = store.scan()
            listing.refuse_doubt()
            usable = [checkpoint for checkpoint in listing.checkpoints if checkpoint.status.usable]
        except FileNotFoundError:
            see_nothing(store)
            return []
        manifests: dict[int, Manifest | None] = {}

        def read(checkpoint: Checkpoint, _: parallel.Stop, manifests: dict[int, Manifest | None] = manifests) -> None:
            manifests[checkpoint.step] = manifest_told(store.backend, folder_of(store.backend, checkpoint.parts[0]))

        parallel.each(usable, read, threads=1 if store.backend.is_folder else _AT_ONCE)
        found = [(one, manifest) for one in usable if (manifest := manifests[one.step]) is not None]
        if len(found) == len(usable):
            break
    return found


def newest_on_all(ranks: Sequence[Mapping[int, str]]) -> int:
    """The newest step that is the same for all; -1 where there is none."""
    return max((step for step, _ in _common(ranks)), default=-1)


def _common(ranks: Sequence[Mapping[int, str]]) -> set[tuple[int, str]]:
    return set.intersection(*(set(rank.items()) for rank in ranks))


def resume_step(store: CheckpointStore, process_group: dist.ProcessGroup | None = None) -> int:
    """The newest step that all ranks see, and see the same of: where each node has a disk of its own, one that all nodes have.

    Passed over, with a warning, is one of which a breaker's metrics say that training had gone bad, one whose own loss was NaN,
    and one that training has left: it went back, and saved a step of a lower number since.
    A collective: every rank of the group calls it, with its own store; one process alone needs no process group. A save that a
    crash cut between its nodes' commits is finished first: what is published on one node, and prepared on all others, is read,
    checked and published there. NothingToResumeError on all where there is no such step, RankError on all where one cannot
    look, UsageError where there are several ranks (WORLD_SIZE) that have not met yet. What is whole on all nodes counts for
    retention from then on, and what it replaced is removed.
    """
    needed(store)
    ranks = _look(store, process_group)
    if cut := undone(ranks):
        _finish(store, process_group, ranks, cut)
        ranks = _look(store, process_group)
    identities = [{step: name for step, (name, _) in rank.held.items()} for rank in ranks]
    bad = {step: why for rank in ranks for step, why in rank.bad.items()}
    newest = newest_on_all(identities)
    step = newest_on_all([{step: name for step, name in one.items() if step not in bad} for one in identities])
    if not any(rank.held for rank in ranks):
        where = store.backend.location
        raise NothingToResumeError(f"there is no whole step in {where}", hint="Nothing has been saved there yet.")
    if step < 0:
        own = ranks[together(process_group).rank].held
        raise NothingToResumeError(
            f"no step that is the same for all ranks is good: step {newest} has {bad[newest]}"
            if newest >= 0
            else f"no step is the same for all ranks; in {store.backend.location} there are {sorted(own)[-20:]}",
            hint="Name a step to load it."
            if newest >= 0
            else "Is the store of one node new? What a node lacks must be copied there.",
        )
    if step != newest:
        _log.warning("step %d is chosen, not %d: %s (name a step to load it)", step, newest, bad[newest])
    for whole, _ in sorted(_common(identities)):
        group = ranks[0].held[whole][1]
        nodes = {found.node for rank in ranks if (found := rank.held[whole][1]) is not None}
        if group is not None and nodes == set(range(group.nodes)):
            with contextlib.suppress(CkptStoreError):  # a full disk: it is for retention only
                node_sets.settle(store.folder, whole, group)
    return step


def undone(ranks: Sequence[Seen]) -> list[_Save]:
    """The saves that are published on some nodes, and prepared on all others. The same for all who have seen the same."""
    ready: dict[_Save, set[NodeSet]] = {}
    for rank in ranks:
        for save, group in rank.prepared.items():
            ready.setdefault(save, set()).add(group)
    found = []
    for save, groups in sorted(ready.items()):
        published = {
            part
            for rank in ranks
            if (there := rank.held.get(save.step)) and there[0] == save.identity and (part := there[1]) is not None
        }
        parts = groups | published
        sizes = {part.nodes for part in parts}
        if published and len(sizes) == 1 and {part.node for part in parts} == set(range(*sizes)):
            found.append(save)
    return found


def _look(store: CheckpointStore, process_group: dist.ProcessGroup | None) -> list[Seen]:
    """What every rank sees."""
    seen = Seen()
    try:
        name = ""
        if store.backend.is_folder and os.path.isdir(steps.side_of(store.folder)):
            with contextlib.suppress(CkptStoreError):  # a store that can only be read
                name = node_sets.identity(store.folder)
        ready = {save: one.group for save, one in _prepared(store).items()} if name else {}
        there = _committed(store)
        manifests: dict[int, Manifest | None] = {one.step: manifest for one, manifest in there}
        bad = passed_over(store.backend.location, [checkpoint for checkpoint, _ in there], manifests)
        names = {one.step: (identity(manifest), manifest.group) for one, manifest in there}
        seen = Seen(name, names, ready, bad)
    except CkptStoreError as error:
        seen = Seen(problem=str(error))
    ranks: list[Seen] = _gather(seen, process_group)
    for rank, one in enumerate(ranks):
        if one.problem:
            raise RankError(f"rank {rank} cannot look into its store: {one.problem}", rank=rank)
    return ranks


def _prepared(store: CheckpointStore) -> dict[_Save, Prepared]:
    found = prepared.waiting(steps.side_of(os.path.realpath(store.folder)))
    return {_Save(one.manifest.step, identity(one.manifest)): one for one in found}


def _finish(
    store: CheckpointStore, process_group: dist.ProcessGroup | None, ranks: Sequence[Seen], cut: Sequence[_Save]
) -> None:
    """Publish on the nodes that have not what others have. What fails is logged, and leaves the step where it was."""
    own = together(process_group).rank
    leads = next(rank for rank, seen in enumerate(ranks) if seen.store == ranks[own].store) == own
    mine = {save: one for save, one in _prepared(store).items() if save in cut} if leads and ranks[own].store else {}
    unsound = {save for save, one in mine.items() if not _tried("checking", save, lambda one=one: _check(one))}
    given_up = set().union(*_gather(unsound, process_group))
    for save, one in mine.items():
        if save not in given_up and _tried("publishing", save, lambda one=one: _publish(store, one)):
            _log.warning("step %d, %s: published here now, as on the other nodes of its save", save.step, one.group.whose)
    _gather(None, process_group)  # nobody looks again before all have published


def _tried(doing: str, save: _Save, work: Any) -> bool:
    try:
        work()
    except (CkptStoreError, OSError) as error:
        _log.error("step %d: %s what a crash left prepared here failed: %s", save.step, doing, error)
        return False
    return True


def _check(one: Prepared) -> None:
    """IntegrityError where it is not, file by file and byte by byte, what its manifest says."""
    backend = LocalBackend(one.path)
    part = read_part(backend, steps.PART, "", backend.tree(max_depth=5), read_signs=read_signs)
    report = verify(backend, Checkpoint(one.manifest.step, -1, -1, "export", (part,)), Level.FULL)
    if report.checkpoint.status is not Status.COMMITTED:
        found = [*map(str, report.findings), *report.notes]
        raise IntegrityError(f"{one.path} is {report.checkpoint.status}: {'; '.join(found[:3])}")


def _publish(store: CheckpointStore, one: Prepared) -> None:
    draft = node_sets.take_over(store.folder, one)
    try:
        steps.publish(draft, one.manifest, keep_old=True)
    except BaseException:
        steps.leave(draft)
        raise
    steps.abandon(draft)


def _gather(value: Any, process_group: dist.ProcessGroup | None) -> list[Any]:
    if isinstance(together(process_group), Alone):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(gathered, value, group=process_group)
    return gathered
