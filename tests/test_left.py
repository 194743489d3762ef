"""After a rollback nobody resumes from what was left: in AReaL's runs, in stores of steps, on this machine and at a URL."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import ckptstore.torch as ckpt
from ckptstore import CheckpointStore, Keep, native, recovery
from ckptstore.adopt import adopt
from ckptstore.backends import open_backend
from ckptstore.backends.local import LocalBackend
from ckptstore.choose import Selection
from ckptstore.errors import NotCommitted, NothingToResumeError, StorageError
from ckptstore.plan import Options, plan
from ckptstore.saves import saving
from ckptstore.seal import seal
from ckptstore.transfer.mirror import is_safe, mirror
from ckptstore.transfer.pull import pull
from ckptstore.transfer.push import push
from tests import commands, trees

STEPS = (46, 93, 140, 187)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return trees.make_run(tmp_path, steps=STEPS, logs=False, slot="dcp", slot_step=187, recover_info=187)


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "s3":
        return CheckpointStore(str(request.getfixturevalue("s3")))
    return CheckpointStore(tmp_path / "store" if request.param == "folder" else f"memory://left-{tmp_path.name}-{os.getpid()}")


def go_back(run: Path, **selection: int) -> recovery.Outcome:
    return recovery.setup(LocalBackend(str(run)), Selection(**selection), Options(as_is=True))


def train(run: Path, step: int) -> None:
    """The trainer saves, and ends."""
    trees.set_age(trees.write_model(trees.checkpoint(run, step), seed=9), 600)


def resumes_from(run: Path) -> int:
    return CheckpointStore(run).resume_point().checkpoint.step


def left_in(run: Path) -> list[int]:
    return [one.step for one in CheckpointStore(run).list() if one.left]


# --- AReaL ------------------------------------------------------------------------------------------------------------


def test_who_goes_back_stays_back(run: Path) -> None:
    outcome = go_back(run, before_step=140)
    assert outcome.plan.notes[-1].startswith("2 checkpoints with higher numbers than step 93 are left")
    assert resumes_from(run) == 93, "a restart that names no step"
    train(run, 100)  # training goes on
    point = CheckpointStore(run).resume_point()
    assert point.checkpoint.step == 100
    assert [(one.checkpoint.step, one.reasons[0][:38]) for one in point.skipped] == [
        (step, "left: setup went back to step 93 on 20") for step in (187, 140)
    ]
    assert CheckpointStore(run).latest().step == 100
    before = os.stat(run.parent / ".ckptstore/trial0/left.json")
    recovery.setup(LocalBackend(str(run)), Selection(), Options(as_is=True))
    assert os.stat(run.parent / ".ckptstore/trial0/left.json") == before, "nobody has gone back"
    go_back(run, before_step=100)
    assert left_in(run) == [100, 140, 187]


def test_what_is_trained_anew_counts(run: Path) -> None:
    go_back(run, step=93)
    path = trees.checkpoint(run, 140)
    shutil.rmtree(path)
    train(run, 140)
    assert left_in(run) == [187]
    assert resumes_from(run) == 140


def test_a_seal_or_a_copy_makes_nothing_new_of_it(run: Path, tmp_path: Path) -> None:
    """By its files where it has no manifest, and by its manifest where a copy has other times."""
    backend = LocalBackend(str(run))
    seal(backend, CheckpointStore(run).get(187))
    go_back(run, step=93)
    seal(backend, CheckpointStore(run).get(140))
    assert left_in(run) == [140, 187]
    for file in trees.checkpoint(run, 187).iterdir():
        os.utime(file, (1e9, 1e9))
    assert left_in(run) == [140, 187]


def test_undo_forgets_it(run: Path) -> None:
    go_back(run, step=140)
    go_back(run, step=46)
    assert left_in(run) == [93, 140, 187]
    recovery.undo(LocalBackend(str(run)))
    assert left_in(run) == [187], "the first of the two holds"
    assert resumes_from(run) == 140


def test_who_names_what_was_left_returns_there(run: Path) -> None:
    go_back(run, step=46)
    train(run, 60)
    assert go_back(run, step=140).plan.point.checkpoint.step == 140
    assert left_in(run) == [187], "60 is no part of that history, but lower: nobody takes it for newer"
    assert resumes_from(run) == 140


def test_a_slot_that_holds_it_already(run: Path) -> None:
    go_back(run, step=46)
    recovery.undo(LocalBackend(str(run)))
    go_back(run, step=46)
    assert not go_back(run, step=46).copied_bytes
    assert left_in(run) == [93, 140, 187]


@pytest.mark.parametrize("options", [Options(as_is=True, new_trial="other"), Options(as_is=True, recover_dir="elsewhere")])
def test_another_trial_leaves_nothing(run: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recovery.setup(LocalBackend(str(run)), Selection(step=46), options)
    assert not left_in(run)


def test_a_plan_writes_nothing(run: Path) -> None:
    planned = plan(LocalBackend(str(run)), Selection(step=46), Options(as_is=True))
    assert len(planned.leaves) == 3
    assert not left_in(run)
    assert not (run.parent / ".ckptstore").exists()


def test_what_was_kept_of_slots_too(run: Path) -> None:
    adopt(LocalBackend(str(run)))
    go_back(run, step=46)
    listing = CheckpointStore(run).scan()
    assert [bool(one.left) for one in listing.adopted] == [True]
    assert resumes_from(run) == 46


def test_a_pushed_copy_was_left_too(run: Path, tmp_path: Path) -> None:
    url = f"memory://left-areal-{tmp_path.name}-{os.getpid()}"
    for checkpoint in CheckpointStore(run).list():
        push(LocalBackend(str(run)), checkpoint, open_backend(url))
    go_back(run, step=46)
    for step in (140, 187):
        shutil.rmtree(trees.checkpoint(run, step))
    planned = plan(LocalBackend(str(run)), Selection(url=url), Options(as_is=True))
    assert planned.point.checkpoint.step == 46
    named = plan(LocalBackend(str(run)), Selection(url=url, step=140), Options(as_is=True))
    assert named.point.checkpoint.step == 140


def test_only_the_copy_is_still_there(run: Path, tmp_path: Path) -> None:
    """Going back by what a URL has leaves what has a higher number there."""
    url = f"memory://left-there-{tmp_path.name}-{os.getpid()}"
    for checkpoint in CheckpointStore(run).list():
        push(LocalBackend(str(run)), checkpoint, open_backend(url))
    for step in STEPS:
        shutil.rmtree(trees.checkpoint(run, step))
    backend = LocalBackend(str(run))
    recovery.setup(backend, Selection(url=url, step=93), Options(as_is=True))
    assert plan(backend, Selection(url=url), Options(as_is=True)).point.checkpoint.step == 93


def test_a_record_that_cannot_be_trusted_chooses_nothing(run: Path) -> None:
    """What looks goes on, and says so."""
    go_back(run, step=46)
    record = run.parent / ".ckptstore/trial0/left.json"
    for text in ('{"left": 3}', '{"left": {"a": {}}}', "[" * 99999, '{"left"', "[]"):
        record.write_text(text)
        with pytest.raises(StorageError, match=r"left is not known: .*left\.json is damaged") as caught:
            resumes_from(run)
        assert "name the step" in str(caught.value.hint)
        listing = CheckpointStore(run).scan()
        assert len(listing.checkpoints) == len(STEPS)
        assert "left.json is damaged" in listing.notes[-1]
    assert go_back(run, step=93).plan.point.checkpoint.step == 93
    assert left_in(run) == [140, 187], "which makes the record anew"


def test_what_people_see(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands.isolate(monkeypatch, tmp_path)
    said = commands.invoke(capfd, "setup", "--run", str(run), "--step", "46", "--as-is", "--yes")
    assert "3 checkpoints with higher numbers than step 46 are left" in (said.out + said.err)
    said = commands.invoke(capfd, "list", "--run", str(run))
    assert said.out.count("COMPLETE (left)") == 3
    assert "steps 93 to 187 (3): left: setup went back to step 46" in (said.out + said.err)
    assert "is the newest whole one listed that training has not left" in said.out
    said = commands.invoke(capfd, "list", "--run", str(run), "--latest", "--json")
    (only,) = json.loads(said.out)["checkpoints"]
    assert (only["step"], only["left"]) == (46, "")
    url = f"memory://left-latest-{tmp_path.name}-{os.getpid()}"
    said = commands.invoke(capfd, "push", "--latest", "--run", str(run), "--to", url)
    assert [one.step for one in CheckpointStore(url).list()] == [46], "nor does a push of the newest send what was left"
    said = commands.invoke(capfd, "show", "187", "--run", str(run))
    assert "left: setup went back to step 46" in (said.out + said.err)
    said = commands.invoke(capfd, "setup", "--run", str(run), "--as-is", "--dry-run")
    assert "left: setup went back to step 46" in (said.out + said.err)


# --- a mirror ---------------------------------------------------------------------------------------------------------


def test_a_new_machine_knows_it_from_the_mirror(run: Path, tmp_path: Path) -> None:
    """Before anything is trained anew, and although the copies there are the old ones."""
    url = f"memory://left-mirror-{tmp_path.name}-{os.getpid()}"
    backend = LocalBackend(str(run))
    adopt(backend)
    mirror(backend, url)
    go_back(run, step=46)
    assert not is_safe(backend, url)
    mirror(backend, url)
    assert is_safe(backend, url)
    assert [one.step for one in CheckpointStore(url).list() if one.left] == [93, 140, 187]
    for place in (run, run.parent / ".ckptstore"):
        shutil.rmtree(place)
    run.mkdir()
    planned = plan(backend, Selection(url=url), Options(as_is=True))
    assert planned.point.checkpoint.step == 46
    recovery.setup(backend, Selection(url=url), Options(as_is=True))
    train(run, 60)
    shutil.copytree(run.parent, tmp_path / "kept")
    assert not is_safe(backend, url)
    mirror(backend, url)
    assert [one.step for one in CheckpointStore(url).list() if one.left] == [93, 140, 187], "what the new one adds, it keeps"
    assert plan(backend, Selection(url=url), Options(as_is=True)).point.checkpoint.step == 60


def test_a_mirror_follows_who_returns(run: Path, tmp_path: Path) -> None:
    url = f"memory://left-return-{tmp_path.name}-{os.getpid()}"
    backend = LocalBackend(str(run))
    mirror(backend, url)
    go_back(run, step=46)
    mirror(backend, url)
    recovery.undo(backend)
    assert not is_safe(backend, url)
    mirror(backend, url)
    assert not [one.step for one in CheckpointStore(url).list() if one.left]
    mirror(backend, other := f"{url}-2")
    assert not CheckpointStore(other).scan().left, "nothing is put there where nothing was left"


def test_a_mirrored_store_of_steps(tmp_path: Path) -> None:
    url = f"memory://left-steps-{tmp_path.name}-{os.getpid()}"
    here = CheckpointStore(tmp_path / "here")
    for step in (100, 200):
        ckpt.save(here, step, state(step))
    mirror(here.backend, url)
    ckpt.save(here, 110, state(110))
    mirror(here.backend, url)
    assert loaded(CheckpointStore(url)) == 110
    assert CheckpointStore(url).latest().step == 110


# --- stores of steps ----------------------------------------------------------------------------------------------------


def state(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8,), float(number))}


def loaded(store: CheckpointStore) -> float:
    return float(ckpt.load(store)["w"][0])


def test_a_save_of_a_lower_step_goes_back(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    for step in (100, 200, 300, 400):
        ckpt.save(store, step, state(step))
    assert not caplog.text
    ckpt.save(store, 210, state(210))
    assert "step 210 goes back: 2 saved steps of higher numbers are left" in caplog.text
    assert loaded(store) == 210
    assert "step 210 is loaded, not 400: left: a save went back to step 210" in caplog.text
    assert store.latest().step == 210
    assert store.resume_point().checkpoint.step == 210
    assert float(ckpt.load(store, 400)["w"][0]) == 400, "it is there, for who names it"
    for step in (300, 310):
        ckpt.save(store, step, state(step + 1))
    assert [one.step for one in store.list() if one.left] == [400]
    assert loaded(store) == 311
    ckpt.save(store, 400, state(401))
    assert loaded(store) == 401
    ckpt.save(store, 90, state(90))
    assert [one.step for one in store.list() if one.left] == [100, 200, 210, 300, 310, 400]


def test_all_ranks_know(store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (100, 50):
        ckpt.save(store, step, state(step))
    caplog.clear()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert ckpt.resume_step(store) == 50
    finally:
        torch.distributed.destroy_process_group()
    assert "step 50 is chosen, not 100: left" in caplog.text


def test_a_save_that_is_overtaken_leaves_nothing(store: CheckpointStore) -> None:
    """Step 11, saved while 10 was being written, is of one history with it."""
    slow = saving.begin(store.backend, 10)
    written = saving.write_buffers(store.backend, saving.place(slow), {"a": [b"10"]})
    ckpt.save(store, 11, state(11))
    saving.commit(slow, written)
    assert not [one for one in store.list() if one.left]
    assert loaded(store) == 11


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "store")
    ckpt.save(store, 100, state(100))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(native, "write_files", full)
        with pytest.raises((NotCommitted, OSError)):
            ckpt.save(store, 50, state(50))
    assert loaded(store) == 100


def test_an_ordinary_save_looks_at_no_other_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "store")
    for step in (1, 2, 2):
        with monkeypatch.context() as patch:
            patch.setattr("ckptstore.listing.scan", None)
            ckpt.save(store, step, state(step))
    assert not (tmp_path / "store/.ckptstore/left.json").exists()


def test_a_copy_of_a_store_was_left_as_well(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    for step in (100, 50):
        ckpt.save(store, step, state(step))
    shutil.copytree(tmp_path / "store", tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    assert loaded(CheckpointStore(tmp_path / "copy")) == 50


def test_retention_keeps_both_ends(store: CheckpointStore) -> None:
    """The one that was saved last, and what has the highest number: a run that began anew by mistake removes nothing of it."""
    for step in (100, 200, 300):
        ckpt.save(store, step, state(step))
    ckpt.save(store, 10, state(10), keep=Keep(last=1))
    assert [one.step for one in store.list()] == [10, 300]
    assert loaded(store) == 10


def test_nothing_but_what_was_left(store: CheckpointStore) -> None:
    for step in (100, 10):
        ckpt.save(store, step, state(step))
    if not store.backend.is_folder:
        return
    shutil.rmtree(Path(store.folder) / "step-10")
    with pytest.raises(NothingToResumeError, match="there is no good step") as caught:
        ckpt.load(store)
    assert "step 100 has left: a save went back to step 10" in str(caught.value.hint)


def test_pulled_steps_are_of_one_history(tmp_path: Path) -> None:
    """A pull of older steps is no save."""
    here, there = CheckpointStore(tmp_path / "here"), CheckpointStore(tmp_path / "there")
    for step in (1, 2):
        ckpt.save(there, step, state(step))
    ckpt.save(here, 3, state(3))
    url = f"memory://left-pull-{tmp_path.name}-{os.getpid()}"
    for checkpoint in there.list():
        push(there.backend, checkpoint, open_backend(url))
    source = open_backend(url)
    for checkpoint in CheckpointStore(url).list():
        pull(source, checkpoint, here.folder)
    assert loaded(here) == 3


def test_a_damaged_record_ends_no_training(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    for step in (100, 50):
        ckpt.save(store, step, state(step))
    if store.backend.is_folder:
        Path(store.folder, ".ckptstore/left.json").write_text("{")
    else:
        store.backend.put(".ckptstore/left.json", b"{")
    with pytest.raises(StorageError, match="left is not known"):
        ckpt.load(store)
    with pytest.raises(StorageError, match="left is not known"):
        store.latest()
    assert float(ckpt.load(store, 100)["w"][0]) == 100
    ckpt.save(store, 60, state(60))
    assert [one.step for one in store.list() if one.left] == [100]
    assert loaded(store) == 60
