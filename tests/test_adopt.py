"""Adoption: a slot becomes a step of its own beside the run, whole or not at all."""

from __future__ import annotations

import filecmp
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, adopt, native, pins, recovery
from ckptstore import side as side_folders
from ckptstore.backends import open_backend
from ckptstore.breaker import CircuitBreaker
from ckptstore.choose import Selection, resume_point
from ckptstore.errors import (
    AlreadyExistsError,
    CkptStoreError,
    DigestMismatchError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    TrainingHalted,
    UsageError,
)
from ckptstore.frameworks.areal.launch import find_installation
from ckptstore.ledger import Writer, path_in
from ckptstore.listing import read_adopted, scan
from ckptstore.model import Status
from ckptstore.plan import Options
from ckptstore.rules import REWARD
from tests import trees


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return trees.make_run(tmp_path, steps=[46, 93, 140], slot="era_a", slot_step=150, recover_info=150, logs=False)


def side(run: Path) -> Path:
    return run.parent / ".ckptstore" / run.name


def same(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir() if path.name != "ckptstore.manifest.json")
    kept = sorted(path.name for path in b.iterdir() if path.name != "ckptstore.manifest.json")
    return names == kept and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def test_adopted_step_equals_the_slot_and_lies_beside_the_run(run: Path) -> None:
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    checkpoint = adopt.adopt(open_backend(run))
    assert (checkpoint.step, checkpoint.kind, checkpoint.status) == (150, "adopted", Status.COMMITTED)
    store = side(run) / "adopted" / "globalstep150"
    assert same(run / "default/recover_checkpoint", store / "default")
    assert same(run / "recover_info", store / "recover_info")
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before  # the trial is AReaL's: untouched
    assert [name for name in os.listdir(side(run)) if name.startswith("stage-")] == []


def test_two_parts_are_one_step(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, steps=[46], parts=("default", "critic"), slot="era_a", recover_info=150)
    checkpoint = adopt.adopt(open_backend(run))
    assert [part.name for part in checkpoint.parts] == ["default", "critic"]
    assert scan(open_backend(run)).adopted[0].status is Status.COMMITTED


def test_adopting_twice_is_refused(run: Path) -> None:
    adopt.adopt(open_backend(run))
    with pytest.raises(AlreadyExistsError, match="150"):
        adopt.adopt(open_backend(run))


def test_a_slot_newer_than_recover_info_is_torn(run: Path) -> None:
    os.utime(run / "default/recover_checkpoint/model.safetensors")
    with pytest.raises(IntegrityError, match="newer than recover_info"):
        adopt.adopt(open_backend(run))
    assert not (side(run) / "adopted").exists()


def test_a_slot_without_recover_info_has_no_step(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, steps=[46], slot="era_a")
    with pytest.raises(RefusedError, match="step cannot be known"):
        adopt.adopt(open_backend(run))


def test_python_knows_it_as_the_command_line_does(run: Path, tmp_path: Path) -> None:
    """By its step; where an export has that step too, that is meant."""
    kept = adopt.adopt(open_backend(run))
    store = CheckpointStore(run)
    assert store.get(150) == kept
    assert store.get(140).kind == "export"
    assert store.verify(150).ok
    store.restore(150, tmp_path / "restored")
    assert same(tmp_path / "restored/default", Path(kept.store, "default"))
    with pytest.raises(NotFoundError, match="no checkpoint of step 149") as error:
        store.verify(149)
    assert "150" in error.value.hint
    trees.bitflip(Path(kept.store, "default/model.safetensors"))
    assert store.verify(150).checkpoint.status is Status.CORRUPT
    with pytest.raises(DigestMismatchError):
        store.restore(150, tmp_path / "again")
    with pytest.raises(UsageError, match="has its manifest"):
        store.seal(150)


def test_a_truncated_shard_is_not_adopted(run: Path) -> None:
    shard = run / "default/recover_checkpoint/model.safetensors"
    info = shard.stat()
    trees.truncate(shard)
    os.utime(shard, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(IntegrityError, match="torn"):
        adopt.adopt(open_backend(run))


def test_a_save_during_adoption_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer overwrites a file after it was copied and before the last look."""
    real = native.copy_files

    def copy_then_save(source, destination, files, **rest):  # type: ignore[no-untyped-def]
        result = real(source, destination, files, **rest)
        if "recover_info" in str(source):
            (run / "default/recover_checkpoint/config.json").write_text("{}")
        return result

    monkeypatch.setattr(native, "copy_files", copy_then_save)
    with pytest.raises(SourceChangedError):
        adopt.adopt(open_backend(run))
    assert os.listdir(side(run) / "adopted") == [] if (side(run) / "adopted").exists() else True
    assert scan(open_backend(run)).adopted == ()


def test_setup_takes_an_adopted_step_with_its_own_recover_info(run: Path) -> None:
    """The slot is lost to a later, torn save: setup brings the adopted step back, optimizer and data cursor included."""
    store = Path(adopt.adopt(open_backend(run)).store)
    info = {name.name: name.read_bytes() for name in (run / "recover_info").iterdir()}
    trees.truncate(run / "default/recover_checkpoint/model.safetensors")
    (run / "recover_info/step_info.json").write_text('{"epoch": 4')
    for path in run.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    outcome = recovery.setup(open_backend(run), Selection())
    assert outcome.plan.point.checkpoint.kind == "adopted"
    assert same(run / "default/recover_checkpoint", store / "default")
    assert {name: (run / "recover_info" / name).read_bytes() for name in info} == info
    listing = scan(open_backend(run))
    assert listing.slot is not None
    assert (listing.slot.step, listing.slot.status) == (150, Status.COMMITTED)


def test_optimizer_state_beats_slightly_newer_weights(run: Path) -> None:
    """An adopted step with optimizer state is chosen over an export up to 20 steps newer, and the export is named."""
    adopt.adopt(open_backend(run))
    trees.write_model(trees.checkpoint(run, 163), seed=163)
    trees.set_age(run, 3600)
    listing = scan(open_backend(run))
    point = resume_point(open_backend(run), listing, Selection(max_step=163))
    assert point.checkpoint.step == 150
    assert point.alternative is not None
    assert point.alternative.step == 163
    assert resume_point(open_backend(run), listing, Selection(max_step=163, prefer="newest")).checkpoint.step == 163


def test_watch_adopts_each_save_and_keeps_the_newest(run: Path) -> None:
    """Saves at 150, 160, 170 with keep=2: 160 and 170 stay, and each was adopted once."""
    backend = open_backend(run)
    stop = threading.Event()
    later = [160, 170]

    def next_save(seconds: float) -> None:
        if not later:
            stop.set()
            return
        step = later.pop(0)
        trees.write_recover_info(run, step)

    seen = [c.step for c in adopt.watch(backend, keep=2, stop=stop.is_set, wait=next_save)]
    assert seen == [150, 160, 170]
    assert [c.step for c in scan(backend).adopted] == [160, 170]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_last_good_step_and_what_is_pinned_are_kept_beside_the_newest(
    run: Path, tmp_path: Path, keep: int, elsewhere: bool
) -> None:
    """The reward is 0 from step 165 on, and the saves go on: with the newest alone no healthy optimizer state would be left."""
    backend, into = open_backend(run), str(tmp_path / "other") if elsewhere else ""
    side_folders.make_side(str(side(run)))
    pins.add(str(side(run)), 140, why="by hand")
    writer = Writer(path_in(str(side(run))))
    kept = []
    for step in (140, 150, 160, 170, 180, 190):
        trees.write_recover_info(run, step)
        for at in range(step - 9, step):  # the metrics of a step come after its save
            writer.record(at, 1000.0 + at, {REWARD: 0.0 if at >= 165 else 0.7})
        adopt.adopt(backend, into=into)
        writer.record(step, 1000.0 + step, {REWARD: 0.0 if step >= 165 else 0.7})
        adopt.prune(backend, keep=keep, into=into)
        kept.append([c.step for c in read_adopted(str(tmp_path / "other/gsm8k-grpo/trial0") if elsewhere else str(side(run)))])
    writer.close()
    assert kept[2] == ([140, 160] if keep == 1 else [140, 150, 160]), "in good times just the newest, and what is pinned"
    assert kept[-1] == ([140, 160, 190] if keep == 1 else [140, 160, 180, 190])


def test_a_trip_goes_back_to_an_adopted_step(run: Path) -> None:
    """What it names and pins, and bounds the recovery by, was the last good export: older, and without optimizer state."""
    adopt.adopt(open_backend(run))
    trees.write_recover_info(run, 170)  # saved over it, amid zeros
    breaker = CircuitBreaker(run)
    for step in range(130, 174):
        breaker.observe({REWARD: 0.7 if step < 165 else 0.0}, step)
    with pytest.raises(TrainingHalted) as halted:
        breaker.observe({REWARD: 0.0}, 174)
    error = halted.value
    assert (error.last_good_step, error.command.split()[-2:]) == (150, ["--max-step", "150"])
    assert [pin.step for pin in pins.read(str(side(run)))] == [150]
    chosen = resume_point(open_backend(run), scan(open_backend(run)), Selection(max_step=150)).checkpoint
    assert (chosen.step, chosen.kind) == (150, "adopted")


def test_kept_on_another_disk(run: Path, tmp_path: Path) -> None:
    """Two runs may share the folder; the run's own disk can be lost but for the trial itself."""
    other = tmp_path / "other disk"
    checkpoint = next(adopt.watch(open_backend(run), into=str(other)))
    store = other / "gsm8k-grpo/trial0/adopted/globalstep150"
    assert checkpoint.store == str(store)
    assert same(run / "recover_info", store / "recover_info")
    assert not side(run).exists()
    with pytest.raises(AlreadyExistsError):
        adopt.adopt(open_backend(run), into=str(other))
    with pytest.raises(UsageError, match="inside of the trial"):
        adopt.adopt(open_backend(run), into=str(run / "kept"))
    slot = run / "default/recover_checkpoint"
    shutil.rmtree(slot)
    shutil.rmtree(run / "recover_info")
    trees.set_age(run, 3600)
    outcome = recovery.setup(
        open_backend(run), Selection(checkpoint_path=str(store)), Options(installation=find_installation(version="0.3.4"))
    )
    assert (outcome.plan.point.checkpoint.step, outcome.plan.info.action) == (150, "keep")
    assert same(slot, store / "default")
    assert same(run / "recover_info", store / "recover_info")


def test_prune_keeps_at_least_one(run: Path) -> None:
    adopt.adopt(open_backend(run))
    assert adopt.prune(open_backend(run), keep=0) == []
    assert [c.step for c in scan(open_backend(run)).adopted] == [150]


def test_watch_outlives_a_full_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once, and the save is kept when there is room again: a watcher that ended would keep none from then on."""
    room, copies, waited, told = False, native.copy_files, [], []

    def copy(*args: Any, **options: Any) -> Any:
        if not room:
            raise NoSpaceError("allocate: No space left on device", operation="copy", path=str(run))
        return copies(*args, **options)

    def wait(seconds: float) -> None:
        nonlocal room
        waited.append(seconds)
        room = len(waited) >= 3

    monkeypatch.setattr(native, "copy_files", copy)
    seen = adopt.watch(open_backend(run), problem=told.append, stop=lambda: len(waited) >= 5, wait=wait)
    assert [checkpoint.step for checkpoint in seen] == [150]
    assert [type(error) for error in told] == [NoSpaceError]
    assert waited == [adopt.RETRY_S] * 3 + [adopt.POLL_S] * 2


def test_watch_says_that_it_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot without recover_info is never kept. It may be a save in progress, so that it is said only after a while."""
    run = trees.make_run(tmp_path, steps=[46], slot="era_a", logs=False)
    looks, told = 0, []

    def wait(_: float) -> None:
        nonlocal looks
        looks += 1
        monkeypatch.setattr(adopt.time, "monotonic", lambda: looks * 50.0)

    monkeypatch.setattr(adopt.time, "monotonic", lambda: 0.0)

    def problem(error: CkptStoreError) -> None:
        told.append((looks, str(error)))

    assert list(adopt.watch(open_backend(run), problem=problem, stop=lambda: looks >= 6, wait=wait)) == []
    ((when, what),) = told
    assert (when, "step cannot be known" in what) == (3, True)
