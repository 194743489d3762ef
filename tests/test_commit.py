"""The crash table of the commit, row by row: every operation fails, or is the last one, and the slot is the old or the new."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckptstore import commit, inplace, journal, native, recovery
from ckptstore import side as side_folders
from ckptstore.backends import LocalBackend
from ckptstore.choose import Selection
from ckptstore.commit import identity
from ckptstore.errors import (
    BusyError,
    CkptStoreError,
    CommitUncertain,
    ManifestError,
    NotCommitted,
    NotFoundError,
    RefusedError,
)
from ckptstore.journal import Journal, Move
from ckptstore.plan import Options
from tests import trees
from tests.crashing import Crash, Operations, Tree, content, refuse_exchange, without_manifest

PARTS = ("default", "critic")
KEPT = ("config.json", "model.safetensors", "tokenizer.json")
AS_IS = Options(as_is=True)


@pytest.fixture
def room(memory_path: Path) -> Path:
    """A folder in memory: the sweeps do ten thousand fsyncs."""
    return memory_path


def write_small(folder: Path, seed: int) -> None:
    trees.write_model(folder, seed=seed)
    for path in folder.iterdir():
        if path.name not in KEPT:
            path.unlink()


@dataclass
class Scene:
    """A run before a setup of its only export. `before` is what lies in each part's slot, None: not even a folder."""

    run: Path
    parts: tuple[str, ...]
    before: dict[str, Tree | None] = field(default_factory=dict)
    after: dict[str, Tree] = field(default_factory=dict)

    @property
    def backend(self) -> LocalBackend:
        return LocalBackend(self.run)

    @property
    def side(self) -> Path:
        return Path(side_folders.side_folder(str(self.run), str(self.slot("default"))))

    def slot(self, part: str) -> Path:
        return self.run / part / "recover_checkpoint"

    def setup(self) -> recovery.Outcome:
        return recovery.setup(self.backend, Selection(), AS_IS)

    def there(self, part: str) -> Tree | None:
        return without_manifest(content(self.slot(part))) if self.slot(part).is_dir() else None

    def which(self, part: str) -> str:
        """Old, new, missing or WRONG."""
        found = self.there(part)
        if found == self.after[part]:
            return "new"
        if found == self.before[part] or (not found and not self.before[part]):
            return "old"
        return "WRONG" if found else "missing"

    @property
    def state(self) -> str:
        """The one state of all slots, or all states."""
        found = {part: self.which(part) for part in self.parts}
        return next(iter(found.values())) if len(set(found.values())) == 1 else str(found)

    def assert_nothing_lost(self) -> None:
        """Wherever it stopped: the old slot's bytes are in the slot or kept beside, and nothing of ours is in the trial."""
        kept = [without_manifest(content(path)) for path in self.side.glob("*/*") if path.is_dir()]
        for part in self.parts:
            if self.before[part]:
                assert self.there(part) == self.before[part] or self.before[part] in kept, f"the old {part} is lost"
        strange = [path for path in self.run.rglob("*") if "ckptstore" in path.name or path.name.startswith(("stage-", "old-"))]
        for path in strange:
            assert path.name == "ckptstore.manifest.json", path
            assert path.parent.name == "recover_checkpoint", path


def make_scene(room: Path, kind: str) -> Scene:
    """`kind`: what lies in the slots before: one part or two (`both`, `half`: only default's), or nothing."""
    shutil.rmtree(room)
    parts = PARTS if kind in ("both", "half", "nothing") else PARTS[:1]
    run = room / "checkpoints/alice/exp/trial"
    scene = Scene(run, parts)
    for number, part in enumerate(parts):
        export = trees.checkpoint(run, 46, part)
        write_small(export, 10 + number)
        trees.set_age(export, 3600)
        scene.after[part] = content(export)
        slot = scene.slot(part)
        if kind in ("one", "both") or (kind == "half" and part == "default"):
            write_small(slot, 20 + number)
            trees.set_age(slot, 3600)
        elif kind == "empty":
            (slot / "deep").mkdir(parents=True)
        scene.before[part] = content(slot) if slot.is_dir() else None
    return scene


SCENES = ("one", "both", "half", "empty", "nothing")
METHODS = ("exchange", "rename")
#: Beside two parts that replace two slots; the sweep of the commit has all of them each time.
LESS = [pytest.param(kind, marks=pytest.mark.soak) for kind in ("one", "half")]


def count(scene: Scene, act, method: str) -> Operations:
    with Operations().watched(exchange=method == "exchange") as operations:
        act(scene)
    return operations


def assert_recovers(scene: Scene, hint: str, *, with_undo: bool = True) -> None:
    """What any command does next: it finishes or takes back, for all parts alike; then a setup and its undo work."""
    scene.assert_nothing_lost()
    said = commit.roll_forward(str(scene.side))
    assert "cannot be" not in said, hint
    assert scene.state in ("old", "new"), f"{hint}: {scene.state} after {said!r}"
    scene.assert_nothing_lost()
    assert not (scene.side / "journal.json").exists(), hint
    finished = scene.state
    outcome = scene.setup()
    assert scene.state == "new", hint
    assert bool(outcome.plan.nothing_to_do) == (finished == "new"), hint
    scene.assert_nothing_lost()
    if with_undo and any(scene.before.values()):
        recovery.undo(scene.backend)
        assert scene.state == "old", hint
        recovery.undo(scene.backend)
        assert scene.state == "new", hint


# --- crashes ------------------------------------------------------------------------------------------------------
# To crash before an operation is to crash after the one before it.


def sweep_setup(room: Path, kind: str, method: str, *, every: int) -> None:
    states = set()
    for at in count(make_scene(room, kind), Scene.setup, method).places(every):
        scene = make_scene(room, kind)
        operations = Operations(at=at, when="after", how=Crash())
        with operations.watched(exchange=method == "exchange"), pytest.raises(Crash):
            scene.setup()
        for part in scene.parts:
            allowed = {"old", "new", "missing"} if method == "rename" else {"old", "new"}
            assert scene.which(part) in allowed, operations.struck
        states.add(scene.state)
        assert_recovers(scene, operations.struck, with_undo=at % 3 == 0)
    assert {"old", "new"} <= states, "the sweep went through the commit"


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        # Where there is no slot, there is nothing to exchange.
        pytest.param(kind, method, marks=[pytest.mark.soak] if (kind, method) == ("nothing", "rename") else [])
        for kind in SCENES
        for method in METHODS
    ],
)
def test_crash_at_every_operation_of_the_commit(room, kind, method):
    """Dead after operation k, for every k: the next command makes all slots the old ones or all the new ones."""
    sweep_setup(room, kind, method, every=9)


@pytest.mark.soak
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SCENES)
def test_crash_at_every_operation_of_setup(room, kind, method):
    """The same from the first operation on."""
    sweep_setup(room, kind, method, every=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["both", *LESS])
def test_crash_at_every_operation_of_undo(room, kind, method):
    def placed() -> Scene:
        scene = make_scene(room, kind)
        scene.setup()
        return scene

    def undo(scene: Scene) -> None:
        recovery.undo(scene.backend)

    states = set()
    for at in count(placed(), undo, method).places(5):
        scene = placed()
        operations = Operations(at=at, when="after", how=Crash())
        with operations.watched(exchange=method == "exchange"), pytest.raises(Crash):
            undo(scene)
        states.add(scene.state)
        scene.assert_nothing_lost()
        commit.roll_forward(str(scene.side))
        assert scene.state in ("old", "new"), operations.struck
        scene.assert_nothing_lost()
        wanted = "old" if scene.state == "new" else "new"
        recovery.undo(scene.backend)
        assert scene.state == wanted, operations.struck
    assert {"old", "new"} <= states


@pytest.mark.parametrize("kind", ["both", "half"])
@pytest.mark.parametrize("method", METHODS)
def test_crash_while_finishing_what_a_crash_left(room, kind, method):
    """The second crash strikes at every operation of the finishing, after a first one in the middle of the commit."""
    log = count(make_scene(room, kind), Scene.setup, method).log
    first = {"exchange": log.index("rename_exchange") + 1, "rename": len(log) - 1 - log[::-1].index("rename_noreplace")}[method]

    def crashed() -> Scene:
        scene = make_scene(room, kind)
        with Operations(at=first, when="after", how=Crash()).watched(exchange=method == "exchange"), pytest.raises(Crash):
            scene.setup()
        return scene

    def finish(scene: Scene) -> None:
        commit.roll_forward(str(scene.side))

    for at in range(1, len(count(crashed(), finish, method).log) + 1):
        scene = crashed()
        operations = Operations(at=at, when="after", how=Crash())
        with operations.watched(exchange=method == "exchange"), pytest.raises(Crash):
            finish(scene)
        assert_recovers(scene, operations.struck)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["both", *LESS])
def test_error_at_every_operation_of_setup(room, kind, method, sticky):
    """Whatever the disk refuses, and whenever: a typed error that tells the truth, and no mixture of old and new."""
    counted = count(make_scene(room, kind), Scene.setup, method)
    outcomes = set()
    for at in counted.places(6):
        if counted.log[at - 1] == "copy_files":
            continue  # the engine's own errors have tests of their own
        scene = make_scene(room, kind)
        operations = Operations(at=at, how=OSError(errno.EIO, os.strerror(errno.EIO)), sticky=sticky)
        with operations.watched(exchange=method == "exchange"):
            try:
                scene.setup()
                outcome = "done"
            except CkptStoreError as error:
                outcome = type(error).__name__
        outcomes.add(outcome)
        scene.assert_nothing_lost()
        if outcome == "done":
            assert scene.state == "new", operations.struck
        elif outcome == "NotCommitted":
            assert scene.state == "old", operations.struck
            assert not (scene.side / "journal.json").exists(), operations.struck
        elif outcome == "CommitUncertain" and not sticky:
            assert scene.state == "new", operations.struck
        elif outcome != "CommitUncertain":
            assert scene.state == "old", operations.struck
        assert_recovers(scene, f"{outcome} {operations.struck}", with_undo=at % 3 == 0)
    assert {"NotCommitted", "CommitUncertain"} <= outcomes, outcomes


def failing(monkeypatch, module, name, when):
    """`name` fails where `when(*args)` says so; the calls before and after go through."""
    call = getattr(module, name)

    def maybe(*args, **kwargs):
        if when(*args):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
        return call(*args, **kwargs)

    monkeypatch.setattr(module, name, maybe)


def test_second_part_that_cannot_be_replaced_takes_the_first_back(room, monkeypatch):
    """Two parts are one checkpoint: where one slot cannot be exchanged, none is."""
    scene = make_scene(room, "both")
    failing(monkeypatch, native, "rename_exchange", lambda staged, slot: "critic/recover_checkpoint" in slot)
    with pytest.raises(NotCommitted, match="as it was"):
        scene.setup()
    assert scene.state == "old"
    monkeypatch.undo()
    assert_recovers(scene, "")


def test_fallback_whose_second_rename_fails_puts_the_old_one_back(room, monkeypatch):
    """Between both renames the slot is missing: it must not stay so."""
    scene = make_scene(room, "one")
    monkeypatch.setattr(native, "rename_exchange", refuse_exchange)
    failing(
        monkeypatch,
        native,
        "rename_noreplace",
        lambda staged, slot: slot.endswith("default/recover_checkpoint") and "stage-" in staged,
    )
    with pytest.raises(NotCommitted):
        scene.setup()
    assert scene.state == "old"


def test_unconfirmed_commit_is_uncertain(room, monkeypatch):
    """The last fsync of the slot's parent fails: visible and whole, unknown to the disk. The next command settles it."""
    scene = make_scene(room, "one")
    failing(monkeypatch, native, "fsync_path", lambda path: str(path) == str(scene.run / "default"))
    with pytest.raises(CommitUncertain) as caught:
        scene.setup()
    assert scene.state == "new"
    assert "Any ckptstore command" in caught.value.hint
    monkeypatch.undo()
    assert "was finished" in commit.roll_forward(str(scene.side))
    assert scene.state == "new"
    scene.assert_nothing_lost()


def test_journal_that_cannot_be_synced_is_no_promise(room, monkeypatch):
    """NotCommitted is said: then no later command may carry it out."""
    scene = make_scene(room, "one")

    def journal_is_there(path):
        return str(path) == str(scene.side) and (scene.side / "journal.json").exists()

    failing(monkeypatch, native, "fsync_path", journal_is_there)
    with pytest.raises(NotCommitted):
        scene.setup()
    monkeypatch.undo()
    assert commit.roll_forward(str(scene.side)) == ""
    assert scene.state == "old"


def test_exchange_that_only_says_so(room, monkeypatch):
    """A file system that reports an exchange it has not made, after the probe believed it."""
    scene = make_scene(room, "one")
    exchange = native.rename_exchange

    def lie(a, b):
        if "recover_checkpoint" not in str(b):
            exchange(a, b)

    monkeypatch.setattr(native, "rename_exchange", lie)
    with pytest.raises(NotCommitted):
        scene.setup()
    assert scene.state == "old"
    scene.assert_nothing_lost()


# --- somebody else writes -----------------------------------------------------------------------------------------


def crash_in_commit(scene: Scene, method: str, *, name: str, when: str, nth: int = -1) -> None:
    """Crash at the nth operation of that name within the commit."""
    log = count(make_scene(scene.run.parents[3], kind_of(scene)), Scene.setup, method).log
    places = [at for at, operation in enumerate(log, 1) if operation == name]
    fresh = make_scene(scene.run.parents[3], kind_of(scene))
    with Operations(at=places[nth], when=when, how=Crash()).watched(exchange=method == "exchange"), pytest.raises(Crash):
        fresh.setup()


def kind_of(scene: Scene) -> str:
    return "both" if len(scene.parts) == 2 else "one"


def foreign_save(slot: Path) -> Tree:
    """What a trainer does that does not know of us: its own state in place of what was there."""
    shutil.rmtree(slot, ignore_errors=True)
    trees.write_dcp_slot(slot, seed=99)
    return content(slot)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("method", "name"), [("exchange", "rename_exchange"), ("rename", "rename_noreplace")])
@pytest.mark.parametrize("kind", ["one", "both"])
def test_a_slot_written_between_crash_and_recovery_is_never_replaced(room, kind, method, name, when):
    """The trainer was started again before any command of ours: its save stays, and the old slot is kept."""
    scene = make_scene(room, kind)
    crash_in_commit(scene, method, name=name, when=when)
    if scene.which(scene.parts[-1]) == "old":
        scene.before[scene.parts[-1]] = None  # then it is the trainer that overwrites it
    saved = foreign_save(scene.slot(scene.parts[-1]))
    said = commit.roll_forward(str(scene.side))
    assert "was given up" in said
    assert content(scene.slot(scene.parts[-1])) == saved
    scene.assert_nothing_lost()
    # Neither cleaning nor the next setup, which goes on with the stage, may destroy what is kept.
    for leftover in side_folders.leftovers(str(scene.side)):
        side_folders.discard(str(scene.side), leftover)
    scene.assert_nothing_lost()
    trees.set_age(scene.run, 3600)
    scene.setup()
    assert scene.state == "new"
    scene.assert_nothing_lost()
    kept = [content(path) for path in scene.side.glob("old-*/*")]
    assert saved in kept


def test_a_slot_that_the_trainer_wrote_into_keeps_our_manifest_and_is_foreign(room):
    """AReaL saves in place, over a slot of ours: the manifest that stays behind vouches for nothing."""
    scene = make_scene(room, "one")
    scene.setup()
    trees.write_dcp_slot(scene.slot("default"), seed=99)
    assert not commit.identity(str(scene.slot("default"))).startswith("commit:")


def test_a_slot_written_while_the_copy_runs_is_not_replaced(room):
    """Two minutes of copying are enough for a save: setup refuses, and keeps what it has copied."""
    scene = make_scene(room, "one")
    saved = {}

    def save(doing, done, total):
        if doing.startswith("copying") and not saved:
            saved.update(foreign_save(scene.slot("default")))

    with pytest.raises(BusyError, match="was written while"):
        recovery.setup(scene.backend, Selection(), AS_IS, notify=save)
    assert content(scene.slot("default")) == saved
    assert any(name.startswith("stage-") for name in os.listdir(scene.side))


@pytest.mark.parametrize("make", ["link", "file", "dangling"])
def test_a_slot_that_is_no_folder_is_refused(room, tmp_path, make):
    """Somebody put the slot on another disk by a link, or made it something else: not ours to replace."""
    scene = make_scene(room, "nothing")
    slot = scene.slot("default")
    if make == "file":
        slot.write_text("precious")
    else:
        slot.symlink_to(tmp_path if make == "link" else "nowhere")
    with pytest.raises(RefusedError, match="is not replaced"):
        scene.setup()
    assert slot.is_symlink() or slot.read_text() == "precious"
    with pytest.raises(RefusedError):
        commit.plan_moves(str(scene.side), str(scene.side / "stage-1"), {"default": str(slot)})


def test_files_that_come_into_an_empty_slot_are_never_removed(room, monkeypatch):
    """Empty folders of AReaL's helpers are removed one by one, so that a file in one of them stops it."""
    scene = make_scene(room, "empty")
    monkeypatch.setattr(native, "rename_exchange", refuse_exchange)
    remove_empty = side_folders.remove_empty

    def late(path):
        (scene.slot("default") / "deep/precious").write_text("x")
        remove_empty(path)

    monkeypatch.setattr(side_folders, "remove_empty", late)
    with pytest.raises(NotCommitted):
        scene.setup()
    assert (scene.slot("default") / "deep/precious").exists()


# --- undo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "both", "half"])
def test_undo_and_undo_of_undo(room, kind):
    """Back and forth as often as one likes; a part that had no slot before has none afterwards."""
    scene = make_scene(room, kind)
    outcome = scene.setup()
    assert scene.state == "new"
    assert outcome.old_slot
    for wanted in ("old", "new", "old", "new"):
        step, kept = recovery.undo(scene.backend)
        assert scene.state == wanted
        assert step == (46 if wanted == "new" else -1)
        assert os.path.isdir(kept)
        scene.assert_nothing_lost()
    assert len(list(scene.side.glob("old-*"))) == 1


def test_undo_without_anything_set_aside(room):
    scene = make_scene(room, "nothing")
    with pytest.raises(NotFoundError, match="nothing to undo"):
        recovery.undo(scene.backend)
    scene.setup()
    with pytest.raises(NotFoundError, match="nothing to undo"):
        recovery.undo(scene.backend)
    os.mkdir(scene.side / "old-29990101T000000Z-00000000")
    with pytest.raises(NotFoundError, match="nothing to undo"):
        recovery.undo(scene.backend)


def test_undo_takes_the_newest_of_several(room):
    """Two setups within one second: order must not be left to chance."""
    scene = make_scene(room, "one")
    write_small(trees.checkpoint(scene.run, 93), 77)
    trees.set_age(scene.run, 3600)
    for round_trip in range(6):
        recovery.setup(scene.backend, Selection(step=46), AS_IS)
        recovery.setup(scene.backend, Selection(step=93), AS_IS)
        recovery.undo(scene.backend)
        assert scene.which("default") == "new", round_trip


# --- journals -----------------------------------------------------------------------------------------------------


def journal_for(scene: Scene, **changes) -> dict:
    move = Move("default", "../../trial/default/recover_checkpoint", "stage-1/default", "old-1/default", "commit:1", "files:2")
    document = dataclasses.asdict(Journal("setup", 46, "exchange", (move,), "2026-11-24T16:00:00Z"))
    document |= {"format": "ckptstore.journal", "version": 1}
    return {key: value for key, value in (document | changes).items() if value is not ...}


def with_move(**changes) -> dict:
    move = {"part": "default", "slot": "../../trial/default/recover_checkpoint", "staged": "stage-1/default",
            "aside": "old-1/default", "new": "commit:1", "old": "files:2"}  # fmt: skip
    return {"moves": [{key: value for key, value in (move | changes).items() if value is not ...}]}


GARBAGE = [
    b"", b"null", b"[]", b"\xff", b"[" * 200_000,
    *(json.dumps({"a": 1} | change).encode() for change in ({}, {"moves": 1})),
]  # fmt: skip
CHANGES = [
    {"format": "x"}, {"version": 2}, {"method": "swap"}, {"method": 1}, {"step": "46"}, {"action": None}, {"moves": [1]},
    {"moves": ...}, {"created_at": ...}, with_move(slot=1), with_move(slot="/etc"), with_move(slot="../../../../etc"),
    with_move(slot="../../../other"), with_move(slot=".."), with_move(slot="../.."), with_move(slot="../../a/../../b"),
    with_move(slot="../../a\0b"), with_move(staged="../x"), with_move(staged="/etc"), with_move(aside="../../x"),
    with_move(part=".."), with_move(part=...), with_move(extra=1), with_move(new=None),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: json.dumps(change, default=str)[:60])
def test_a_journal_that_cannot_be_trusted_moves_nothing(room, change):
    """Root lists other people's runs: a journal must not make it rename what is none of our business."""
    scene = make_scene(room, "one")
    os.makedirs(scene.side)
    document = journal_for(scene) | change
    (scene.side / "journal.json").write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    before = content(room)
    with pytest.raises(ManifestError, match=r"not a journal of ours"):
        journal.pending(str(scene.side))
    assert "cannot be finished" in commit.roll_forward(str(scene.side))
    with pytest.raises(ManifestError):
        scene.setup()
    (scene.side / "lock").unlink()
    assert content(room) == before


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:20]))
def test_garbage_for_a_journal(room, data):
    scene = make_scene(room, "one")
    os.makedirs(scene.side)
    (scene.side / "journal.json").write_bytes(data)
    assert "cannot be finished" in commit.roll_forward(str(scene.side))
    with pytest.raises(ManifestError) as caught:
        scene.setup()
    assert "Move it away" in caught.value.hint
    (scene.side / "journal.json").unlink()
    scene.setup()
    assert scene.state == "new"


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_that_is_gone_is_no_dead_end(room, method):
    """Somebody removed the stage that the journal needs: the slot stays the old one, and life goes on."""
    scene = make_scene(room, "one")
    name = {"exchange": "rename_exchange", "rename": "rename_noreplace"}[method]
    crash_in_commit(scene, method, name=name, when="before")
    assert scene.state == ("old" if method == "exchange" else "missing")
    for stage in scene.side.glob("stage-*"):
        shutil.rmtree(stage)
    assert "was taken back" in commit.roll_forward(str(scene.side))
    assert scene.state == "old"
    assert_recovers(scene, method)


def test_clean_never_takes_what_a_journal_needs(room):
    """After an exchange the stage's name holds the old slot."""
    scene = make_scene(room, "one")
    crash_in_commit(scene, "exchange", name="rename_exchange", when="after")
    assert scene.state == "new"
    for name in side_folders.leftovers(str(scene.side)):
        side_folders.discard(str(scene.side), name)
    scene.assert_nothing_lost()
    assert "was finished" in commit.roll_forward(str(scene.side))
    scene.assert_nothing_lost()


def test_leftovers_are_all_removable(room):
    """Whatever a crash can leave: folders, drafts of a journal, links."""
    scene = make_scene(room, "one")
    os.makedirs(scene.side / "stage-1/default")
    (scene.side / "journal.json.0a1b").write_text("{")
    (scene.side / "trash-1").write_text("x")
    (scene.side / "probe-1").symlink_to(scene.run)
    os.mkdir(scene.side / "old-1")
    before = content(scene.run)
    for name in side_folders.leftovers(str(scene.side)):
        side_folders.discard(str(scene.side), name)
    assert os.listdir(scene.side) == []
    assert content(scene.run) == before


# --- identities ---------------------------------------------------------------------------------------------------


def test_identity_tells_content_apart(tmp_path):
    """By name, size and time; empty for what holds no file; a rename keeps it."""
    assert commit.identity(str(tmp_path / "none")) == ""
    a = tmp_path / "a"
    (a / "deep").mkdir(parents=True)
    assert commit.identity(str(a)) == ""
    write_small(a / "deep", 1)
    trees.set_age(a, 100)
    first = commit.identity(str(a))
    a.rename(tmp_path / "b")
    assert commit.identity(str(tmp_path / "b")) == first
    path = tmp_path / "b/deep/config.json"
    os.utime(path, (1, 1))
    assert commit.identity(str(tmp_path / "b")) != first


def test_deep_or_unreadable_folders_are_not_empty(tmp_path):
    """What the look does not reach may hold somebody's files."""
    deep = tmp_path / "a"
    for level in range(12):
        deep = deep / str(level)
    deep.mkdir(parents=True)
    (deep / "precious").write_text("x")
    assert commit.identity(str(tmp_path / "a")) != ""


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000])
def test_identity_with_garbage_for_a_manifest(tmp_path, content):
    write_small(tmp_path / "a", 1)
    (tmp_path / "a/ckptstore.manifest.json").write_bytes(content)
    assert commit.identity(str(tmp_path / "a")).startswith("files:")
    (tmp_path / "a/ckptstore.manifest.json").unlink()
    (tmp_path / "a/ckptstore.manifest.json").symlink_to("config.json")
    assert commit.identity(str(tmp_path / "a")).startswith("files:")


# --- recover_info where folders cannot be exchanged ----------------------------------------------------------------


class TestInPlace:
    """inplace.py: whatever is in the folder meanwhile, its deciding file is the one that AReaL refuses."""

    def folders(self, tmp_path):
        side, folder, source = (tmp_path / name for name in ("side", "recover_info", "new"))
        for path in (side, folder, source):
            path.mkdir()
        (folder / inplace.DECIDING).write_text('{"old": 1}')
        (folder / "step_info.json").write_text("old")
        (folder / "odd").mkdir()
        (folder / "odd" / "file").write_text("old")
        (source / inplace.DECIDING).write_text('{"new": 1}')
        (source / "step_info.json").write_text("new")
        (source / "more.json").write_text("new")
        (source / "more.json").chmod(0o640)
        os.utime(source / "more.json", ns=(5, 7_000_000_001))
        return str(side), str(folder), str(source)

    def test_block_and_fill(self, tmp_path):
        side, folder, source = self.folders(tmp_path)
        before, after = identity(folder), identity(source)
        inplace.keep(side, folder, os.path.join(side, "kept"))
        assert identity(os.path.join(side, "kept")) == before
        inplace.block(side, folder)
        assert inplace.is_blocked(folder)
        assert identity(folder) == inplace.BLOCKED
        assert (tmp_path / "recover_info/step_info.json").read_text() == "old"
        inplace.fill(side, folder, source)
        assert identity(folder) == after
        assert sorted(os.listdir(folder)) == sorted(os.listdir(source))
        copied = os.stat(os.path.join(folder, "more.json"))
        assert (copied.st_mode & 0o777, copied.st_mtime_ns) == (0o640, 7_000_000_001)
        assert sorted(os.listdir(side)) == ["kept"]

    def test_fill_goes_on_where_it_was_killed(self, tmp_path, monkeypatch):
        side, folder, source = self.folders(tmp_path)
        inplace.block(side, folder)
        rename = os.rename
        for allowed in range(10):
            left = [allowed]

            def counted(*names, left=left):
                if not left[0]:
                    raise OSError(errno.EIO, "killed here")
                left[0] -= 1
                rename(*names)

            with monkeypatch.context() as patch:
                patch.setattr(os, "rename", counted)
                try:
                    inplace.fill(side, folder, source)
                except OSError:
                    assert inplace.is_blocked(folder), allowed
                else:
                    break
        assert allowed == 3
        assert identity(folder) == identity(source)
