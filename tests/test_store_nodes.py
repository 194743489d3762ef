"""Saves by nodes that have a disk each: what each keeps, what is loaded, kills, retention, and a store that was copied."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pickle
import random
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, errors, manifest, retention
from ckptstore import side as side_folders
from ckptstore.backends.fsspec import FsspecBackend
from ckptstore.cli import run as command
from ckptstore.errors import CkptStoreError, ManifestError, NotFoundError, StorageError
from ckptstore.manifest import Manifest
from ckptstore.model import NodeSet, Status
from ckptstore.retention import Candidate, Keep
from ckptstore.saves import node_sets, prepared, steps

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from ckptstore.torch import StoreWriter, nodes, resuming  # noqa: E402
from tests import warm  # noqa: E402
from tests.fusefs import fuse_mount  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]


def run(*words: object, timeout_s: float = 120) -> Any:
    done = warm.Python("-m", "tests.node_ranks", *words).finish(timeout_s)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_saves_and_loads_of_two_nodes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Four ranks, two a node: each node has its ranks' files and all that they need, and nothing else is ever loaded."""
    seen = run("look", tmp_path)
    mine = [{".metadata", "ckptstore.manifest.json", f"__{2 * node}_0.distcp", f"__{2 * node + 1}_0.distcp"} for node in (0, 1)]
    assert list(map(set, seen["files"])) == [mine[0], mine[0], mine[1], mine[1]]
    assert seen["loaded"] == [[5]] * 4, "objects and what is the same on all ranks, too"
    assert seen["saved again"] == [[7]] * 4
    for side in seen["side"]:
        assert not [name for name in side if name.startswith(("save-", "old-", "trash-", "new-"))], side
        assert len([name for name in side if name.startswith("whole-")]) == 2
    # Other ranks than saved it: a typed error, with the files' names, on all.
    for doing, files in (("elsewhere", [["__2_0.distcp"], ["__3_0.distcp"]]), ("fewer", [["__2_0.distcp", "__3_0.distcp"]])):
        for found in seen[doing]:
            assert [failure[0] for failure in found] == ["NotWholeError"] * len(files), found
            assert [failure[3] for failure in found] == files
    # One node has the step of an earlier save.
    assert {found[0][0] for found in seen["a mix"]} == {"NotWholeError"}
    assert {found[0][2] for found in seen["a mix"]} == {5}, "the step that all have"
    assert (seen["resume"], seen["resume beside a mix"]) == ([6] * 4, [5] * 4)
    assert seen["planted"] == [[7], [7], [6], [6]], "without the check: two saves in one state"

    # For itself, each node's part is whole, and says what it is.
    for node in (0, 1):
        store = CheckpointStore(tmp_path / f"node{node}")
        assert store.get(5).status is Status.COMMITTED
        report = store.verify(5)
        assert report.ok
        assert f"node {node + 1} of 2: the files of that node's ranks" in report.notes
    assert command(["show", "5", "--run", str(tmp_path / "node1")]) == 0
    assert "node 2 of 2" in capfd.readouterr().out
    (tmp_path / f"node1/step-5/{'__2_0.distcp'}").unlink()
    assert not CheckpointStore(tmp_path / "node1").verify(5).ok, "a file of its own is missed"


@pytest.mark.parametrize(
    ("who", "where", "first", "saves"),
    [
        (1, "exchange:before", 1001, [1, 2]),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                (1, "stage:before", 1000, [0, 1]),
                (0, "publish:before", 1000, [0, 1]),
                (0, "publish:after", 1000, [0, 1, 2]),
                (0, "commit:after", 1000, [0, 1, 2]),
                (1, "publish:before", 1000, [0, 1, 2]),
                (1, "publish:after", 1000, [0, 1, 2]),
                (0, "publish:before", 1001, [0, 1]),
                (0, "exchange:before", 1001, [0, 1]),
                (0, "publish:after", 1001, [1, 2]),
                (1, "publish:before", 1001, [1, 2]),
                (1, "publish:after", 1001, [1, 2]),
            )
        ),
    ],
)
def test_a_leader_dies_in_the_commit(tmp_path: Path, who: int, where: str, first: int, saves: list[int]) -> None:
    """The other rank fails in time. A save that one node had published is finished; one that none had is not there. Of three
    saves the third is cut; it replaces the first where `first` is odd.
    """
    seen = run("at", tmp_path, who, where, first)
    assert seen["returned"] == 2
    assert seen["saves"] == saves
    assert seen["seconds"] < 25


def test_drafts_that_a_crash_left(tmp_path: Path) -> None:
    """Published on the last node, too, where the others have it: of just this save, and sound in every byte."""
    finished(run("finish", tmp_path))


@pytest.mark.root
def test_drafts_that_a_crash_left_where_there_is_no_flock(tmp_path: Path) -> None:
    """The same, though nothing tells whether their writers live: what was decided is right whoever publishes it."""
    with fuse_mount(tmp_path, "noflock") as mount:
        finished(run("finish", mount.path))


def finished(seen: dict[str, Any]) -> None:
    for case in ("cut", "cut on the coordinator's"):
        assert seen.pop(case) == [6, [6], 0, 0], case
    assert seen.pop("between renames") == [6, [7], 0, 0]
    assert seen.pop("published by none") == [5, [5], 1, 1]
    assert seen.pop("saved again by none") == [6, [6], 1, 1]
    assert seen.pop("four ranks") == [6] * 4, "also those who do not publish"
    planted = {case: seen.pop(case) for case in list(seen) if case.startswith("planted")}
    for case, found in seen.items():
        assert found == [5, [5], 0, 1], f"{case}: the step before, and the draft is left to look at"
    assert len(seen) == 8
    assert planted == {
        "planted: published by none": [6, [6], 0, 0],
        "planted: a changed bit": [6, "DigestMismatchError", 0, 0],
        "planted: another digest": [6, [6], 0, 0],
    }, "without the three checks"


@pytest.mark.parametrize(
    ("world", "times"), [pytest.param(2, 50, marks=pytest.mark.soak), pytest.param(4, 50, marks=pytest.mark.soak)]
)
def test_ranks_and_nodes_killed_at_any_moment(tmp_path: Path, world: int, times: int) -> None:
    seen = run("kill", tmp_path, world, times, random.getrandbits(30), timeout_s=60 + 40 * times)
    print(f"\n{world} ranks on two nodes: {seen}")
    assert sum(seen["kills"].values()) == times


@pytest.mark.root
@pytest.mark.soak
def test_killed_at_any_moment_where_there_is_no_flock(tmp_path: Path) -> None:
    with fuse_mount(tmp_path, "noflock") as mount:
        seen = run("kill", mount.path, 2, 30, random.getrandbits(30), timeout_s=1300)
    print(f"\n2 ranks on two nodes without flock: {seen}")
    assert sum(seen["kills"].values()) == 30


# --- the pieces ----------------------------------------------------------------------------------------------------


def a_manifest(group: NodeSet | None) -> Manifest:
    return dataclasses.replace(steps.manifest_of(3, (), metrics={}, source=""), group=group)


def test_the_set_in_the_manifest() -> None:
    group = NodeSet("ab" * 16, 1, 4, "cd" * 32)
    data = a_manifest(group).to_bytes()
    assert manifest.parse(data).group == group
    assert group.whose == "node 2 of 4"
    assert b"group" not in a_manifest(None).to_bytes(), "others' manifests have the bytes that they had"
    assert manifest.parse(data.replace(b'"group"', b'"crowd"')) == dataclasses.replace(manifest.parse(data), group=None)
    for wrong in (b'"node":4', b'"node":-1', b'"node":true', b'"node":"1"', b'"knot":1'):
        with pytest.raises(ManifestError, match="no set of nodes"):
            manifest.parse(data.replace(b'"node":1', wrong))


def test_retention_counts_what_all_nodes_have() -> None:
    """The step before stays while the newest is not known to be whole; what never became whole goes."""
    steps_there = [Candidate(step, Status.COMMITTED, whole=step in (1, 3)) for step in range(5)]
    decisions = retention.decide(steps_there, Keep(last=1))
    assert {one.candidate.step: one.keep for one in decisions} == {0: False, 1: False, 2: False, 3: True, 4: True}
    assert decisions[4].why == "not known to be on all of its nodes yet"
    assert decisions[2].why == "not on all of its nodes; no rule counts it"
    planted = [dataclasses.replace(one, whole=True) for one in steps_there]
    assert not retention.decide(planted, Keep(last=1))[3].keep


def test_retention_of_a_node(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        draft = steps.begin(store.folder, step)
        Path(draft.path, "f").write_bytes(b"")
        group = NodeSet(f"{step:032x}", 0, 2, "0" * 64)
        found = steps.describe(draft, {"f": _nothing()}, metrics={}, group=group, created_at="2026-01-01T00:00:00Z")
        steps.publish(draft, found)
        steps.abandon(draft)
        if step < 3:
            node_sets.note_whole(store.folder, step, group)
    store.prune(Keep(last=1))
    assert [one.step for one in store.list()] == [2, 3]
    assert [name for name in os.listdir(steps.side_of(store.folder)) if name.startswith("whole-")] == [f"whole-2-{2:032x}"]


def a_draft(store: CheckpointStore, step: int, node: int = 1) -> steps.Draft:
    """Prepared, by a writer that is gone."""
    draft = steps.begin(store.folder, step)
    Path(draft.path, "f").write_bytes(b"")
    group = NodeSet(draft.name, node, 2, "0" * 64)
    steps.describe(draft, {"f": _nothing()}, metrics={}, group=group, created_at="2026-01-01T00:00:00Z")
    steps.leave(draft)
    return draft


def names(store: CheckpointStore) -> list[str]:
    return [name for name in os.listdir(steps.side_of(store.folder)) if name.startswith("save-")]


def test_one_prepared_draft_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Saves of earlier steps, `clean` and `list` leave it; it goes with a save that makes it useless, or when told to."""
    store = CheckpointStore(tmp_path / "store")
    older = a_draft(store, 7)
    os.utime(f"{older.path}/ckptstore.manifest.json", (1, 1))
    newer = a_draft(store, 5)
    alive = steps.begin(store.folder, 9)
    assert sorted(names(store)) == sorted(f"save-{one.name}" for one in (newer, alive)), "two, and the newest stays"
    steps.abandon(alive)

    assert command(["list", "--run", store.folder]) == 0
    seen = capfd.readouterr()
    assert f"save-{newer.name} is step 5 of node 2 of 2" in " ".join((seen.out + seen.err).split())
    assert command(["clean", "--run", store.folder, "--json"]) == 0
    seen = capfd.readouterr()
    assert json.loads(seen.out)["removed"] == []
    assert "resume_step" in json.loads(seen.out)["notes"][0]
    (tmp_path / "f").mkdir()
    (tmp_path / "f/w").write_text("w")
    store.save(4, tmp_path / "f")
    assert names(store) == [f"save-{newer.name}"]
    store.save(5, tmp_path / "f")
    assert names(store) == [], "step 5 is there"

    last = a_draft(store, 8)
    assert command(["clean", "--run", store.folder, "--old-slots", "--dry-run"]) == 0
    assert f"save-{last.name}" in capfd.readouterr().out.replace("\n", "")
    assert command(["clean", "--run", store.folder, "--old-slots"]) == 0
    assert names(store) == []


def test_whose_writer_lives_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    draft = a_draft(store, 5)
    (found,) = prepared.left(steps.side_of(store.folder))
    held = node_sets.take_over(store.folder, found)
    assert prepared.left(steps.side_of(store.folder)) == []
    with pytest.raises(errors.BusyError):
        node_sets.take_over(store.folder, found)
    steps.publish(held, found.manifest, keep_old=True)
    steps.abandon(held)
    assert [one.step for one in store.list()] == [5]
    assert not os.path.exists(draft.home)


class _OnePlace:
    """Two nodes in this process, over a key-value store of torch's."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int = 3) -> None:
        meeting = torch.distributed.HashStore()
        meeting.set_timeout(timedelta(seconds=5))
        monkeypatch.setattr(nodes, "_get_default_store", lambda: meeting)
        self.stores = [CheckpointStore(tmp_path / f"node{node}") for node in range(2)]
        self.draft = steps.begin(self.stores[0].folder, step)
        other = steps.begin(self.stores[1].folder, step, name=self.draft.name)
        self.follower = nodes.Follower(nodes.Channel(self.draft.name), 1, other)

    def commit(self) -> Manifest:
        shares = [nodes.Share(b"same", {}) for _ in range(2)]
        return nodes.commit(nodes.Channel(self.draft.name), self.draft, shares, {})

    def left(self) -> list[tuple[int, int]]:
        """By node: how many steps, and how many prepared drafts."""
        self.follower.stop()
        assert [name for store in self.stores for name in names(store) if not prepared.left(steps.side_of(store.folder))] == []
        return [(len(store.list()), len(prepared.left(steps.side_of(store.folder)))) for store in self.stores]


def test_who_may_give_up_what_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the coordinator, and only while it has not published."""
    publish = steps.publish

    def failing(kind: type[CkptStoreError], *, real: bool = False, on: str = "node0") -> Any:
        def instead(draft: Any, *more: Any, **options: Any) -> None:
            if on not in draft.root or real:
                publish(draft, *more, **options)
            if on in draft.root:
                raise kind("planted")

        return instead

    place = _OnePlace(tmp_path / "fine", monkeypatch)
    place.commit()
    assert place.left() == [(1, 0), (1, 0)]

    place = _OnePlace(tmp_path / "told nothing", monkeypatch)
    steps.abandon(place.draft)
    assert place.left() == [(0, 0), (0, 0)], "nothing had been prepared"

    for name, instead, error, left in (
        ("not committed", failing(errors.NotCommitted), errors.NotCommitted, [(0, 0), (0, 0)]),
        ("uncertain", failing(errors.CommitUncertain, real=True), errors.CommitUncertain, [(1, 0), (0, 1)]),
        ("the other", failing(errors.NotCommitted, on="node1"), errors.CommitUncertain, [(1, 0), (0, 1)]),
    ):
        place = _OnePlace(tmp_path / name, monkeypatch)
        monkeypatch.setattr(steps, "publish", instead)
        with pytest.raises(error):
            place.commit()
        monkeypatch.setattr(steps, "publish", publish)
        assert place.left() == left, name
    for step, left in ((2, [(2, 0), (1, 1)]), (4, [(3, 0), (2, 0)])):
        place = _OnePlace(tmp_path / "the other", monkeypatch, step)
        place.commit()
        assert place.left() == left, "it goes with a step that is not older"


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("first", ["the writer", "resume_step"])
def test_a_writer_that_lives_while_resume_step_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, over: bool
) -> None:
    """Where there is no flock that may be: the step is there, once and whole, and no more than uncertain to its writer."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    publish, seen = steps.publish, []
    if over:
        _OnePlace(tmp_path, monkeypatch).commit()
    monkeypatch.setattr(fcntl, "flock", refuse)
    place = _OnePlace(tmp_path, monkeypatch)
    store = place.stores[1]

    def racing(draft: steps.Draft, manifest: Manifest, **options: Any) -> None:
        if seen or "node1" not in draft.root:
            publish(draft, manifest, **options)
            return
        Path(draft.home, "owner").write_bytes(b"{}")  # nothing tells that it lives
        seen.extend(prepared.waiting(steps.side_of(store.folder)))
        if first == "the writer":
            publish(draft, manifest, **options)
            resuming._publish(store, seen[0])
        else:
            resuming._publish(store, seen[0])
            publish(draft, manifest, **options)

    monkeypatch.setattr(steps, "publish", racing)
    with pytest.raises(errors.CommitUncertain) if first == "resume_step" else contextlib.nullcontext():
        place.commit()
    assert place.left() == [(1, 0), (1, 0)]
    (one,) = seen
    assert [resuming.held(each)[3][0] for each in place.stores] == [resuming.identity(one.manifest)] * 2
    assert [each.status for each in store.list()] == [Status.COMMITTED]
    kept = [name for name in os.listdir(steps.side_of(store.folder)) if name.startswith("old-step-3-")]
    assert len(kept) == (over and first == "resume_step"), "what it replaced stays until all are known to have it"


def test_one_unsound_part_keeps_the_others_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three nodes the first has published, this one could, and the third cannot: published here it would help nobody."""
    store = CheckpointStore(tmp_path)
    draft = a_draft(store, 5)
    (one,) = prepared.left(steps.side_of(store.folder))
    save = resuming._Save(5, resuming.identity(one.manifest))
    ranks = [resuming.Seen("another"), resuming.Seen("here", prepared={save: one.group})]
    monkeypatch.setattr(resuming.dist, "get_rank", lambda group: 1)
    for unsound, there in (({save}, []), (set(), [5])):
        monkeypatch.setattr(resuming, "_gather", lambda value, group, unsound=unsound: [unsound, value or set()])
        resuming._finish(store, None, ranks, [save])
        assert [checkpoint.step for checkpoint in store.list()] == there
    assert not os.path.exists(draft.home)


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """What is asked of a store, by name of the call."""
    asked: list[str] = []
    for name in names:
        real = getattr(FsspecBackend, name)

        def call(self: Any, *words: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            asked.append(name)
            return real(self, *words, **options)

        monkeypatch.setattr(FsspecBackend, name, call)
    return asked


def in_a_bucket(tmp_path: Path, steps: int) -> CheckpointStore:
    store = CheckpointStore(f"memory://resume-{tmp_path.name}-{os.getpid()}")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/model.bin").write_bytes(b"weights")
    for step in range(steps):
        store.save(step, tmp_path / "state")
    return store


def test_resume_step_lists_a_bucket_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each rank of each start: one listing, and each manifest once."""
    store = in_a_bucket(tmp_path, 3)
    asked = counted(monkeypatch, "list", "get")
    assert resuming.resume_step(store) == 2
    assert (asked.count("list"), asked.count("get")) == (1, 3)


def test_a_step_that_is_pruned_while_resume_step_looks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine prunes, or saves, between the listing and the manifests."""
    store = in_a_bucket(tmp_path, 3)
    other = CheckpointStore(store.backend.location)
    listed, raced = CheckpointStore.scan, []

    def racing(self: CheckpointStore) -> Any:
        found = listed(self)
        if self is store and not raced:
            raced.append(True)
            other.prune(Keep(last=1))
            other.save(7, tmp_path / "state")
        return found

    monkeypatch.setattr(CheckpointStore, "scan", racing)
    assert resuming.resume_step(store) == 7
    raced.clear()
    assert list(resuming.held(store)) == [7], "saved anew: under another name, and no less there"


def test_an_outage_chooses_no_older_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest step's manifest cannot be fetched: that is no reason to go back, and is said on all ranks."""
    store = in_a_bucket(tmp_path, 3)
    get = FsspecBackend.get

    def failing(self: Any, key: str, **options: Any) -> bytes:
        if key.startswith("step-2"):
            raise StorageError("planted outage", operation="reading", path=key)
        return get(self, key, **options)

    monkeypatch.setattr(FsspecBackend, "get", failing)
    with pytest.raises(errors.RankError, match="planted outage"):
        resuming.resume_step(store)


def test_a_draft_is_durable_before_it_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folders that it is found by: a power cut may come as soon as another node has published."""
    done: list[str] = []
    sync, tell = side_folders.sync_folder, nodes.Channel.tell
    monkeypatch.setattr(side_folders, "sync_folder", lambda path: (done.append(path), sync(path))[1])
    monkeypatch.setattr(nodes.Channel, "tell", lambda self, key, document: (done.append(key), tell(self, key, document))[1])
    place = _OnePlace(tmp_path, monkeypatch)
    place.commit()
    place.follower.stop()
    home = f"{steps.side_of(place.stores[1].folder)}/save-{place.draft.name}"
    assert {f"{home}/step", home, os.path.dirname(home)} <= set(done[: done.index("prepared/1")])


def _nothing() -> Any:
    from ckptstore.native import Digest

    return Digest(0, ())


def test_a_store_that_was_copied_to_another_node(tmp_path: Path) -> None:
    """Two disks with one identity: an error that says so, before anything is written."""
    here, there = CheckpointStore(tmp_path / "a"), CheckpointStore(tmp_path / "b")
    assert node_sets.identity(here.folder) == node_sets.identity(here.folder) != node_sets.identity(there.folder)
    shutil.copy(tmp_path / "a/.ckptstore/id", tmp_path / "b/.ckptstore/id")
    writer, other = StoreWriter(here, 1), StoreWriter(there, 1)
    writer.set_up_storage_writer(True)
    plan = other.prepare_local_plan(_a_plan())
    (plan,) = writer.prepare_global_plan([plan])
    shutil.move(tmp_path / "a", tmp_path / "not here")
    with pytest.raises(NotFoundError, match="this is the same store by") as caught:
        other.write_data(plan, _a_planner())
    assert "Remove" in str(caught.value.hint) or "remove" in caught.value.hint


def _a_planner() -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner()
    planner.set_up_planner({"w": torch.ones(4)}, is_coordinator=True)
    return planner


def _a_plan() -> Any:
    return _a_planner().create_local_plan()


def test_plan_caching_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(CheckpointStore(tmp_path), 1)
    with pytest.raises(errors.UsageError, match="place of its own"):
        writer.prepare_local_plan(dataclasses.replace(_a_plan(), usable=False))


def _kinds(kind: type[CkptStoreError]) -> list[type[CkptStoreError]]:
    return [kind, *(below for one in kind.__subclasses__() for below in _kinds(one))]


@pytest.mark.parametrize("kind", _kinds(CkptStoreError))
def test_errors_travel_between_ranks(kind: type[CkptStoreError]) -> None:
    """torch pickles what a rank raises for the others."""
    if kind.__module__ != errors.__name__:
        pytest.skip("not of the tree")
    more: dict[str, Any] = {"hint": "try"}
    more |= {name: value for name, value in _MORE.items() if name in _names(kind)}
    error = kind("what", **more)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (its own)
    assert type(again) is kind
    assert (str(again), again.hint) == ("what", "try")
    for name, value in more.items():
        assert getattr(again, name) == value


_MORE: dict[str, Any] = {
    "rank": 3, "path": "p", "offset_bytes": 8, "errno": 5, "operation": "op", "usable_step": 7, "files": ("f",), "step": 9,
}  # fmt: skip


def _names(kind: type) -> set[str]:
    return {name for one in kind.__mro__ if "__init__" in vars(one) for name in _arguments(one)}


def _arguments(kind: type) -> tuple[str, ...]:
    code = getattr(vars(kind)["__init__"], "__code__", None)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
