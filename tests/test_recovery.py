"""`setup` end to end: the right checkpoint, whole, where the trainer reads it; or a reason, and everything as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptstore import halt, native, probe, recovery, room
from ckptstore import side as side_folders
from ckptstore.backends import LocalBackend
from ckptstore.choose import Selection, resume_point
from ckptstore.errors import (
    IntegrityError,
    NoSpaceError,
    NothingToResumeError,
    RefusedError,
    StorageError,
    UsageError,
)
from ckptstore.listing import scan
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.parts import read_manifest
from ckptstore.plan import Options, plan
from ckptstore.running import signs_of_life
from ckptstore.seal import seal
from ckptstore.verify import verify
from tests import trees
from tests.crashing import content, without_manifest
from tests.fusefs import fuse_mount
from tests.native.conftest import mounted
from tests.users import NOBODY, as_nobody, open_way_to

AS_IS = Options(as_is=True)
NEWEST = Selection()
STEPS = (46, 93, 140)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(root, **options):
    return trees.make_run(root, **({"steps": STEPS, "logs": False} | options))


def slot(run, part="default"):
    return run / part / "recover_checkpoint"


def side(run):
    return Path(side_folders.side_folder(str(run), str(slot(run))))


def setup(run, selection=NEWEST, options=AS_IS, **more):
    return recovery.setup(LocalBackend(run), selection, options, **more)


def calm(run):
    """The trainer has ended an hour ago."""
    trees.set_age(run, 3600)


def seal_step(run, step):
    backend = LocalBackend(run)
    return seal(backend, scan(backend).at_step(step)[0])


def assert_holds(run, step, part="default"):
    """The slot is that export, byte by byte and with its times, and verifies as ours."""
    source = trees.checkpoint(run, step, part)
    assert without_manifest(content(slot(run, part))) == without_manifest(content(source))
    for path in source.rglob("*"):
        if path.is_file() and path.name != MANIFEST_NAME:
            assert (slot(run, part) / path.relative_to(source)).stat().st_mtime_ns == path.stat().st_mtime_ns
    backend = LocalBackend(run)
    manifest = read_manifest(backend, f"{part}/recover_checkpoint")
    assert (manifest.step, manifest.origin, manifest.source) == (step, "setup", str(source.relative_to(run)))
    placed = scan(backend).slot
    assert (placed.step, placed.status) == (step, Status.COMMITTED)
    assert verify(backend, placed, Level.FULL).ok


def snapshot(folder):
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


# --- choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "step"),
    [
        (Selection(), 140),
        (Selection(before_step=140), 93),
        (Selection(max_step=140), 140),
        (Selection(max_step=139), 93),
        (Selection(before_step=93, max_step=200), 46),
        (Selection(step=46), 46),
    ],
    ids=str,
)
def test_the_newest_within_the_bounds(run, selection, step):
    outcome = setup(run, selection)
    assert outcome.plan.point.checkpoint.step == step
    assert_holds(run, step)
    assert outcome.copied_bytes == outcome.plan.point.checkpoint.size_bytes
    assert outcome.manifest_sha256.keys() == {"default"}


def test_damaged_ones_are_skipped_each_with_its_reason(run):
    """Newest first: what is missing, what is torn, what was never finished."""
    trees.empty_epoch(run, 187)
    (trees.checkpoint(run, 140) / "config.json").unlink()
    trees.truncate(trees.checkpoint(run, 93) / "model.safetensors", 10)
    calm(run)
    outcome = setup(run)
    assert_holds(run, 46)
    reasons = {skipped.checkpoint.step: " ".join(skipped.reasons) for skipped in outcome.plan.point.skipped}
    assert list(reasons) == [187, 140, 93]
    assert "no files" in reasons[187]
    assert "config.json" in reasons[140]
    assert "truncated" in reasons[93]
    assert "3 newer ones skipped" in outcome.plan.point.why


def test_a_flipped_bit_is_found_while_copying(run):
    """Its digest differs: nothing of it reaches the slot, and the next candidate is taken."""
    seal_step(run, 140)
    trees.bitflip(trees.checkpoint(run, 140) / "model.safetensors")
    outcome = setup(run)
    assert_holds(run, 93)
    (skipped,) = outcome.plan.point.skipped
    assert "model.safetensors" in skipped.reasons[0]
    assert "found while copying" in skipped.reasons[0]
    assert not list(side(run).glob("stage-*"))


def test_all_damaged(run):
    for step in STEPS:
        seal_step(run, step)
        trees.bitflip(trees.checkpoint(run, step) / "model.safetensors")
    with pytest.raises(NothingToResumeError, match="3 looked at") as caught:
        setup(run)
    assert caught.value.exit_code == 4
    assert not slot(run).exists()


@pytest.mark.parametrize("sealed", [False, True])
def test_a_named_one_that_is_damaged_is_never_swapped_for_another(run, sealed):
    if sealed:
        seal_step(run, 140)
        trees.bitflip(trees.checkpoint(run, 140) / "model.safetensors")
    else:
        trees.truncate(trees.checkpoint(run, 140) / "model.safetensors", 10)
    for selection in (Selection(step=140), Selection(checkpoint_path=str(trees.checkpoint(run, 140)))):
        with pytest.raises(IntegrityError, match=r"model\.safetensors") as caught:
            setup(run, selection)
        assert caught.value.exit_code == 3
    assert not slot(run).exists()


def test_nothing_to_resume_from_says_what_there_is(run):
    with pytest.raises(NothingToResumeError) as caught:
        setup(run, Selection(before_step=46))
    assert "The first saved step is 46" in caught.value.hint
    with pytest.raises(NothingToResumeError):
        setup(run, Selection(step=47))
    with pytest.raises(NothingToResumeError):
        setup(make_run(run.parents[3] / "other", steps=()))


def test_impossible_selections():
    for impossible in ({"step": 1, "checkpoint_path": "x"}, {"step": 1, "max_step": 2}):
        with pytest.raises(UsageError):
            Selection(**impossible)


def test_a_checkpoint_elsewhere(run, tmp_path):
    """By its path; the step is that of its name, or of its manifest."""
    elsewhere = trees.write_model(tmp_path / "elsewhere" / trees.folder_name(200), seed=200)
    outcome = setup(run, Selection(checkpoint_path=str(elsewhere)))
    assert outcome.plan.point.checkpoint.step == 200
    assert without_manifest(content(slot(run))) == content(elsewhere)
    seal_step(run, 46)
    copied = shutil.copytree(trees.checkpoint(run, 46), tmp_path / "a copy")
    assert setup(run, Selection(checkpoint_path=str(copied))).plan.point.checkpoint.step == 46
    with pytest.raises(Exception, match="there is no such folder"):
        setup(run, Selection(checkpoint_path=str(tmp_path / "none")))


def test_two_parts(tmp_path):
    run = make_run(tmp_path, parts=("default", "critic"))
    trees.zero_length(trees.checkpoint(run, 140, "critic") / "model.safetensors")
    calm(run)
    setup(run)
    assert_holds(run, 93)
    assert_holds(run, 93, "critic")


# --- nothing to do ------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_verified(run):
    """The slot holds it, and every digest of it was read again."""
    setup(run)
    before = snapshot(run)
    outcome = setup(run)
    assert "the slot already holds step 140, every digest verified" in outcome.plan.nothing_to_do
    assert outcome.copied_bytes == 0
    assert snapshot(run) == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "save"])
def test_a_slot_that_is_not_right_is_filled_again(run, damage):
    setup(run)
    path = slot(run) / "model.safetensors"
    {
        "flip": lambda: trees.bitflip(path),
        "truncate": lambda: trees.truncate(path),
        "remove": path.unlink,
        "save": lambda: path.write_bytes(b"the trainer's"),
    }[damage]()
    trees.set_age(run, 3600, deep=False)
    outcome = setup(run, options=Options(as_is=True, force=True))
    assert not outcome.plan.nothing_to_do
    assert_holds(run, 140)


def test_a_source_that_was_saved_anew_is_copied_again(run):
    """The same step, trained once more: the slot's copy is of yesterday."""
    setup(run)
    trees.write_model(trees.checkpoint(run, 140), seed=999)
    outcome = setup(run, options=Options(as_is=True, force=True))
    assert not outcome.plan.nothing_to_do
    assert_holds(run, 140)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_resumable_state_does_not_leave_the_slot_unasked(tmp_path):
    """A DCP slot with its optimizer is worth more than an adapter; --as-is takes it, and --undo brings the slot back."""
    run = make_run(tmp_path, steps=(), slot="dcp", recover_info=60)
    trees.set_age(trees.write_lora(run / "default" / trees.folder_name(140)), 3600)
    before, info = content(slot(run)), content(run / "recover_info")
    with pytest.raises(RefusedError, match="--as-is"):
        setup(run, Selection(step=140), Options())
    assert content(slot(run)) == before
    setup(run, Selection(step=140))
    assert_holds(run, 140)
    assert content(run / "recover_info") == info
    recovery.undo(LocalBackend(run))
    assert content(slot(run)) == before
    assert content(run / "recover_info") == info, "what setup never touched, undo does not take away"


def test_a_part_in_the_slot_that_the_checkpoint_lacks(tmp_path):
    """Filling the one would leave the other of another step."""
    run = make_run(tmp_path)
    trees.set_age(trees.write_era_a_slot(slot(run, "critic")), 3600)
    with pytest.raises(RefusedError, match="has a part critic"):
        setup(run, options=Options())


@pytest.fixture
def idle(run):
    assert setup(run, options=AS_IS).plan.refusals == ()
    shutil.rmtree(slot(run))
    return run


def test_a_trainer_that_just_wrote(idle):
    (idle / "recover_info").mkdir()
    (idle / "recover_info/step_info.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"recover_info/step_info\.json was written 0 s ago.*--force"):
        setup(idle)
    assert not slot(idle).exists()
    setup(idle, options=Options(as_is=True, force=True))


def test_a_trainer_whose_clock_is_ahead(idle):
    """Another node's: a time in the near future is as recent as one in the past."""
    path = trees.checkpoint(idle, 140) / "merges.txt"
    os.utime(path, (time.time() + 60,) * 2)
    with pytest.raises(RefusedError, match="seems to be running"):
        setup(idle)
    os.utime(path, (time.time() + 86_400,) * 2)
    setup(idle)


def test_a_trainer_that_just_logged(tmp_path):
    run = make_run(tmp_path, logs=True)
    with pytest.raises(RefusedError, match=r"config\.yaml was written"):
        setup(run)
    trees.set_age(tmp_path / "logs", 3600)
    setup(run)


def test_a_trainer_that_was_halted_and_has_ended(tmp_path):
    """The breaker's message says what to type: it works at once, if the halted process is gone, and not before."""
    run = make_run(tmp_path, logs=True)
    trainer = a_process("somebody")
    try:
        trip = halt.Trip(run=str(run), step=196, at_s=time.time(), host=socket.gethostname(), pid=trainer.pid)
        side_folders.make_side(side := side_folders.side_folder(str(run), str(slot(run))))
        assert halt.write_first(side, trip)
        with pytest.raises(RefusedError, match=r"config\.yaml was written"):
            setup(run)
        trainer.communicate("")
        halt.rewrite(side, dataclasses.replace(trip, at_s=time.time() - 60))
        with pytest.raises(RefusedError, match=r"config\.yaml was written"):  # long after the halt: somebody else's
            setup(run)
        halt.rewrite(side, dataclasses.replace(trip, host="elsewhere"))
        with pytest.raises(RefusedError, match=r"config\.yaml was written"):
            setup(run)
        halt.rewrite(side, trip)
        setup(run)
        assert halt.read(side) is None
    finally:
        trainer.kill()
        trainer.wait()


def a_process(*words):
    """A Python process with these words on its command line, which waits to be ended."""
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(
    ("words", "running"),
    [
        (["experiment_name=gsm8k-grpo", "trial_name=trial0"], True),
        (["experiment_name=gsm8k-grpo", "trial_name=trial01"], False),
        (["experiment_name=other", "trial_name=trial0"], False),
        (["--path={run}"], True),
        (["{run}/default"], True),
        (["{run}1/default"], False),
    ],
    ids=str,
)
def test_a_process_that_names_the_run(run, words, running):
    """The trial itself, by its names or its path, and not one whose name only begins like it."""
    process = a_process(*(word.format(run=run) for word in words))
    try:
        if running:
            with pytest.raises(RefusedError, match=f"process {process.pid} names this run"):
                setup(run)
        else:
            setup(run)
    finally:
        process.communicate("")
    setup(run)


def test_a_trainer_whose_interpreter_lies_in_a_folder_of_our_name(run, tmp_path):
    """A checkout of ours, say: its path is no sign that the process is ours; the console script's name is one."""
    place = tmp_path / "ckptstore"
    (place / "bin").mkdir(parents=True)
    (place / "python").symlink_to(sys.executable)
    for script, seen in (("train.py", True), ("ckptstore", False)):
        (place / "bin" / script).write_text("import sys; print('up', flush=True); sys.stdin.read()")
        words = [place / "python", place / "bin" / script, f"--path={run}"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "up\n"
            assert any(f"process {process.pid} names" in sign for sign in signs_of_life(scan(LocalBackend(run)))) is seen
        finally:
            process.communicate("")


# --- what goes wrong with the source ------------------------------------------------------------------------------


def during_copy(change):
    """A notify that changes something once the copy has begun."""
    done = []

    def notify(doing, done_bytes, total_bytes):
        if doing.startswith("copying") and not done:
            done.append(doing)
            change()

    return notify


@pytest.mark.parametrize("change", ["write", "remove", "link", "add"])
def test_a_source_that_changes_while_it_is_copied_is_passed_over(run, change):
    """Nothing half of one save and half of another may reach the slot."""
    path = trees.checkpoint(run, 140) / "merges.txt"
    does = {
        "write": lambda: path.write_text("a later save"),
        "remove": path.unlink,
        "link": lambda: trees.symlink_file(path, run.parent / "elsewhere/merges.txt"),
        "add": lambda: (path.parent / "more.json").write_text("{}"),
    }[change]
    outcome = setup(run, options=Options(as_is=True, force=True), notify=during_copy(does))
    assert_holds(run, 93)
    assert "found while copying" in outcome.plan.point.skipped[0].reasons[0]


@pytest.mark.root
def test_a_file_that_may_not_be_read_is_the_checkpoints_fault(run):
    """As another user: level structure does not open every file, the copy does; the next candidate is taken."""
    for path in [run.parent, *run.parent.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    open_way_to(run)
    os.chown(trees.checkpoint(run, 140) / "merges.txt", 0, 0)
    (trees.checkpoint(run, 140) / "merges.txt").chmod(0o600)
    outcome = as_nobody(lambda: setup(run))
    assert isinstance(outcome, recovery.Outcome), repr(outcome)
    assert outcome.plan.point.checkpoint.step == 93
    assert "merges.txt" in str(outcome.plan.point.skipped[0].reasons)


@pytest.mark.parametrize("name", ["a\nb.txt", "back\\slash", "MERGES.TXT"])
def test_names_that_no_manifest_can_hold_are_found_before_the_copy(run, name, monkeypatch):
    (trees.checkpoint(run, 140) / name).write_bytes(b"x")
    trees.set_age(trees.checkpoint(run, 140), 3600)
    copied = []
    copy_files = native.copy_files
    monkeypatch.setattr(native, "copy_files", lambda source, *a, **k: (copied.append(source), copy_files(source, *a, **k))[1])
    setup(run)
    assert_holds(run, 93)
    assert copied == [str(trees.checkpoint(run, 93))]


# --- interrupted --------------------------------------------------------------------------------------------------


def test_an_interrupted_copy_goes_on_where_it_was(run):
    """Ctrl-C keeps the stage; the same checkpoint again reuses what is right of it, and copies what is not."""

    def interrupt(doing, done_bytes, total_bytes):
        if doing.startswith("copying") and done_bytes == total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup(run, notify=interrupt)
    assert not slot(run).exists()
    (stage,) = side(run).glob("stage-*")
    assert plan(LocalBackend(run), Selection(), AS_IS).reusable_bytes > 0
    trees.bitflip(stage / "default/tokenizer.json")
    outcome = setup(run)
    assert_holds(run, 140)
    assert outcome.reused_bytes > 0
    assert outcome.copied_bytes + outcome.reused_bytes == outcome.plan.needed_bytes
    assert 0 < outcome.copied_bytes < outcome.plan.needed_bytes
    assert not list(side(run).glob("stage-*"))


@pytest.mark.root
def test_sigint_stops_a_running_copy(tmp_path):
    """A real Ctrl-C of a real process in the middle of the copy: 130, the stage is kept and named, the slot is as it was."""
    with fuse_mount(tmp_path, delay_ms=20) as mount:
        run = make_run(mount.backing, steps=(46,))
        (trees.checkpoint(run, 46) / "big.txt").write_bytes(os.urandom(24 << 20))
        trees.set_age(run, 3600)
        through = mount.path / run.relative_to(mount.backing)
        process = subprocess.Popen(
            [sys.executable, "-m", "ckptstore.recover", "setup", "--as-is", "--run", through], stderr=subprocess.PIPE, text=True
        )
        stages = mount.backing / side(run).relative_to(mount.backing)
        wait_for(lambda: list(stages.glob("stage-*/default/big.txt")))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "clean" in said
        assert not slot(run).exists()
        assert list(stages.glob("stage-*/default/big.txt"))
    setup(run)
    assert_holds(run, 46)


def wait_for(condition, timeout_s=30):
    """Looks again and again; only a test that would fail anyway waits for long."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        os.sched_yield()


def test_another_checkpoints_stage_is_not_mixed_in(run):
    """A stage belongs to one checkpoint as it was: another one, or the same one saved anew, starts over."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup(run, notify=interrupt)
    outcome = setup(run, Selection(step=93))
    assert outcome.reused_bytes == 0
    assert_holds(run, 93)


def test_what_does_not_belong_in_a_kept_stage_goes(run):
    """Drafts and files that a crash, or somebody, left in it never reach the slot; read-only ones are no obstacle."""

    def interrupt(doing, done_bytes, total_bytes):
        if done_bytes == total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup(run, notify=interrupt)
    (stage,) = side(run).glob("stage-*/default")
    (stage / ".ckptstore.manifest.0a1b2c3d").write_text("{")
    (stage / "strange").write_text("x")
    (stage / "strange-folder/deep").mkdir(parents=True)
    (stage / "config.json").unlink()
    (stage / "config.json").symlink_to(run / "nowhere")
    for path in stage.iterdir():
        if path.is_file():
            path.chmod(0o400)
    stage.chmod(0o500)
    setup(run)
    assert_holds(run, 140)
    assert not (run / "nowhere").exists()
    assert not [path for path in slot(run).iterdir() if path.is_dir()]


# --- room ---------------------------------------------------------------------------------------------------------

BIG_BYTES = 12 << 20


@pytest.fixture
def small(tmp_path):
    """A disk that holds a checkpoint and a slot, but not a second copy."""
    with mounted("tmpfs", tmp_path / "small", size_mib=48) as at:
        run = make_run(at, steps=(46,))
        (trees.checkpoint(run, 46) / "big.txt").write_bytes(os.urandom(BIG_BYTES))
        trees.set_age(trees.write_model(slot(run), seed=3), 3600)
        (slot(run) / "old.txt").write_bytes(os.urandom(BIG_BYTES))
        trees.set_age(run, 3600)
        yield run


@pytest.mark.root
def test_no_room_is_said_before_the_first_byte(small, monkeypatch):
    """What it needs, what is free, what could go; the slot and the space are as they were."""
    monkeypatch.setattr(native, "copy_files", None)
    before = content(slot(small))
    with pytest.raises(NoSpaceError, match=r"needs 12\.6 MB") as caught:
        setup(small)
    assert "--replace" in caught.value.hint
    assert content(slot(small)) == before
    assert not list(side(small).glob("stage-*"))


@pytest.mark.root
def test_a_disk_that_fills_up_while_copying_gets_its_space_back(small, monkeypatch):
    """Where free space is only a guess (quotas, network volumes) ENOSPC comes in the middle."""
    monkeypatch.setattr("ckptstore.plan.probe.is_network", lambda kind: True)
    filler = small.parent / "filler"
    filler.write_bytes(b"x" * (16 << 20))
    free = shutil.disk_usage(small).free
    before = content(slot(small))
    with pytest.raises(NoSpaceError) as caught:
        setup(small)
    assert "--replace" in caught.value.hint
    assert content(slot(small)) == before
    assert not list(side(small).glob("stage-*"))
    assert shutil.disk_usage(small).free > free - (1 << 20)


@pytest.mark.root
@pytest.mark.parametrize("known", [True, False])
def test_replace_makes_room_of_the_old_slot(small, monkeypatch, known):
    """When asked, the old slot goes first: also where only the failing copy shows that there is no room."""
    if not known:
        monkeypatch.setattr("ckptstore.plan.probe.is_network", lambda kind: True)
        (small.parent / "filler").write_bytes(b"x" * (16 << 20))
    outcome = setup(small, options=Options(as_is=True, replace=True))
    assert_holds(small, 46)
    assert outcome.old_slot == ""
    assert not list(side(small).glob("old-*"))


@pytest.mark.root
@pytest.mark.parametrize("known", [True, False])
def test_replace_removes_nothing_where_that_is_not_enough(small, monkeypatch, known):
    """Known beforehand, or found out in the middle of the copy: the old slot must not go for nothing."""
    (small.parent / "filler").write_bytes(b"x" * (16 << 20))
    if not known:
        monkeypatch.setattr(room, "make_room", lambda current, options: None)
    before = content(slot(small))
    with pytest.raises(NoSpaceError) as caught:
        setup(small, options=Options(as_is=True, replace=True))
    assert content(slot(small)) == before
    assert "--replace" not in caught.value.hint
    if known:
        assert "without the old slot" in str(caught.value)


@pytest.mark.root
def test_what_has_another_name_frees_nothing(small):
    """A slot whose file is linked from elsewhere holds less than its size."""
    filler = small.parent / "filler"
    filler.write_bytes(b"x" * (6 << 20))
    os.link(slot(small) / "old.txt", small.parent / "kept.txt")
    before = content(slot(small))
    with pytest.raises(NoSpaceError):
        setup(small, options=Options(as_is=True, replace=True))
    assert content(slot(small)) == before
    (small.parent / "kept.txt").unlink()
    setup(small, options=Options(as_is=True, replace=True))
    assert_holds(small, 46)


@pytest.mark.root
def test_replace_removes_nothing_for_a_damaged_checkpoint(small):
    """Every byte of the new one is read before the old one goes."""
    seal_step(small, 46)
    trees.bitflip(trees.checkpoint(small, 46) / "big.txt")
    before = content(slot(small))
    with pytest.raises((IntegrityError, NothingToResumeError)):
        setup(small, options=Options(as_is=True, replace=True))
    assert content(slot(small)) == before


@pytest.mark.root
def test_replace_keeps_the_old_slot_where_there_is_room(tmp_path):
    run = make_run(tmp_path, slot="hf")
    outcome = setup(run, options=Options(as_is=True, replace=True))
    assert os.path.isdir(outcome.old_slot)


@pytest.mark.root
def test_stages_of_dead_writers_go_before_anything_else_has_to(small):
    """Another checkpoint's interrupted copy is only a copy."""
    shutil.rmtree(slot(small))
    os.makedirs(side(small) / "stage-dead/default")
    (side(small) / "stage-dead/stage.json").write_text('{"key": "another"}')
    (side(small) / "stage-dead/default/x").write_bytes(b"x" * (20 << 20))
    setup(small)
    assert_holds(small, 46)


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


@pytest.mark.root
def test_a_full_disk(small):
    """Not a byte left, so that not even a probe can be made: still a NoSpaceError that says what could go."""
    fill(small.parent / "filler")
    with pytest.raises(NoSpaceError) as caught:
        setup(small)
    assert "--replace" in caught.value.hint


def test_ideas_for_room_name_sizes(run):
    setup(run)
    setup(run, Selection(step=93))
    ideas = " | ".join(room.what_could_go(plan(LocalBackend(run), Selection(step=140), AS_IS)))
    assert "older checkpoints hold" in ideas
    assert "--replace" in ideas
    assert "clean --old-slots" in ideas


# --- faults below Python ------------------------------------------------------------------------------------------

FAULTY = """
import os, sys
from ckptstore import recovery
from ckptstore.backends import LocalBackend
from ckptstore.choose import Selection
from ckptstore.plan import Options
try:
    recovery.setup(LocalBackend(sys.argv[1]), Selection(), Options(as_is=True, verify_after_write=sys.argv[2] == "verify"))
except Exception as error:
    print(type(error).__name__, getattr(error, "errno", ""), error)
else:
    print("done")
"""


def setup_with_fault(run, library, fault, *words):
    log = run.parent / "hits"
    more = {"LD_PRELOAD": str(library), "FAULT": fault, "FAULT_PATH": "stage-", "FAULT_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", FAULTY, run, *(words or ("",))],
        env=os.environ | more,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert log.read_text(), "the fault was never reached"
    return done.stdout


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (f"pwrite64:3+:{errno.EDQUOT}", f"NoSpaceError {errno.EDQUOT}"),
        (f"pwrite64:3:{errno.ENOSPC}", f"NoSpaceError {errno.ENOSPC}"),
        (f"pwrite64:3:{errno.EFBIG}", f"NoSpaceError {errno.EFBIG}"),
        (f"pwrite64:3:{errno.EIO}", f"StorageError {errno.EIO}"),
        (f"fsync:2:{errno.EIO}", f"StorageError {errno.EIO}"),
        (f"fsync:2:{errno.ENOSPC}", f"NoSpaceError {errno.ENOSPC}"),
        (f"renameat2:1:{errno.EIO}", "NotCommitted"),
    ],
)
def test_a_failing_destination_is_no_fault_of_the_checkpoint(tmp_path, faults, fault, said):
    """The quota counts as space; no candidate is skipped for it, the old slot stays, and the next setup works."""
    run = make_run(tmp_path, slot="hf")
    before = content(slot(run))
    assert setup_with_fault(run, faults, fault).startswith(said)
    assert content(slot(run)) == before
    setup(run)
    assert_holds(run, 140)


def test_a_write_that_lies_is_found_by_reading_back(tmp_path, faults):
    """The disk says that it wrote. Reading back finds it, and blames the disk, not the checkpoint."""
    run = make_run(tmp_path, slot="hf")
    for step in STEPS:
        seal_step(run, step)
    before = content(slot(run))
    assert setup_with_fault(run, faults, "pwrite64:1:lie", "verify").startswith("StorageError")
    assert content(slot(run)) == before
    assert all(checkpoint.status is Status.COMMITTED for checkpoint in scan(LocalBackend(run)).checkpoints)
    setup(run)
    assert_holds(run, 140)


# --- where it goes ------------------------------------------------------------------------------------------------


def test_another_slot(run, tmp_path):
    """--recover-dir: the folder that is named, its parent made; AReaL's own slot is left alone; undo by the same name."""
    target = tmp_path / "new/place/slot"
    options = Options(as_is=True, recover_dir=str(target))
    outcome = setup(run, options=options)
    assert without_manifest(content(target)) == content(trees.checkpoint(run, 140))
    assert not slot(run).exists()
    assert str(outcome.plan.side).startswith(str(target.parent))
    assert setup(run, options=options).plan.nothing_to_do
    setup(run, Selection(step=46), options)
    recovery.undo(LocalBackend(run), options)
    assert without_manifest(content(target)) == content(trees.checkpoint(run, 140))


def test_old_guides_slot_can_be_named(run):
    target = run / "recover_checkpoint"
    setup(run, options=Options(as_is=True, recover_dir=str(target)))
    assert without_manifest(content(target)) == content(trees.checkpoint(run, 140))
    assert sorted(path.name for path in run.iterdir()) == ["default", "recover_checkpoint"]


def test_the_trainers_own_slot_goes_to_another_place(tmp_path):
    """The newest is the slot itself: for another folder that is a source like any, and not "nothing to do"."""
    run = make_run(tmp_path, steps=(46,), slot="dcp", recover_info=60)
    target = tmp_path / "elsewhere"
    outcome = setup(run, options=Options(as_is=True, recover_dir=str(target)))
    assert outcome.plan.point.checkpoint.kind == "slot"
    assert without_manifest(content(target)) == content(slot(run))


@pytest.mark.parametrize("where", ["{run}", "{run}/..", "{run}/default", "{export}", "/"])
def test_a_slot_that_would_replace_the_run_itself(run, where):
    """The folder named is exchanged as a whole: never one that holds the checkpoints."""
    target = where.format(run=run, export=trees.checkpoint(run, 93))
    before = content(run)
    with pytest.raises(UsageError, match="would replace"):
        setup(run, options=Options(as_is=True, recover_dir=target))
    assert content(run) == before


def test_another_slot_takes_one_part_only(tmp_path):
    run = make_run(tmp_path, parts=("default", "critic"))
    with pytest.raises(UsageError, match="one folder"):
        setup(run, options=Options(as_is=True, recover_dir=str(tmp_path / "x")))


@pytest.mark.parametrize("old", [True, False])
def test_mode_and_owner(run, old):
    """Those of the old slot, else of the folder that the slot is in; no set-id bits, nothing to execute."""
    model = slot(run) if old else run / "default"
    if old:
        trees.set_age(trees.write_model(slot(run), seed=3), 3600)
        for path in slot(run).iterdir():
            path.chmod(0o640)
    model.chmod(0o2750)
    if os.geteuid() == 0:
        for path in [model, *(slot(run).iterdir() if old else ())]:
            os.chown(path, 12345, 12346)
    setup(run)
    assert stat.S_IMODE(slot(run).stat().st_mode) == 0o750
    for path in slot(run).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
        if os.geteuid() == 0:
            assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)
    if os.geteuid() == 0:
        assert (slot(run).stat().st_uid, slot(run).stat().st_gid) == (12345, 12346)
    assert_holds(run, 140)


@pytest.mark.root
def test_a_trial_that_is_a_mount_of_its_own(tmp_path):
    """Renames do not leave a mount: our side folder moves inside, to where AReaL ignores it, and disturbs no second setup."""
    with mounted("tmpfs", tmp_path / "trial", size_mib=64) as at:
        for step in STEPS:
            trees.write_model(trees.checkpoint(at, step), seed=step)
        trees.set_age(at, 3600)
        setup(at)
        setup(at, Selection(step=93))
        assert_holds(at, 93)
        assert sorted(os.listdir(at)) == ["default"]
        recovery.undo(LocalBackend(at))
        assert_holds(at, 140)


#: The engine fails a copy where folders cannot be synced, although the probe reports it as a property (csrc/copy.cpp).


@pytest.mark.root
@pytest.mark.parametrize(
    "modes",
    [
        (),
        ("refuse",),
        ("lie",),
        pytest.param(("nodirect", "nofallocate"), marks=pytest.mark.soak),  # the next one has both
        ("nofsyncdir", "nodirect", "nofallocate"),
        ("refuse", "nofsyncdir"),
    ],
)
def test_rented_volumes(tmp_path, modes):
    """Set up, set up again, undo: whatever the volume refuses or lies about; and the result says what was used."""
    with fuse_mount(tmp_path, *modes) as mount:
        backing = make_run(mount.backing, parts=("default", "critic"))
        run = mount.path / backing.relative_to(mount.backing)
        outcome = setup(run)
        assert outcome.medium.method == ("rename" if {"refuse", "lie"} & set(modes) else "exchange")
        assert ("does not sync folders" in outcome.medium.durability) == ("nofsyncdir" in modes)
        assert outcome.plan.free_bytes is None
        setup(run, Selection(step=93))
        for part in ("default", "critic"):
            assert_holds(run, 93, part)
        recovery.undo(LocalBackend(run))
        for part in ("default", "critic"):
            assert_holds(run, 140, part)
        lost = {path.name for folder in mount.lost for path in folder.rglob("*")}
        assert lost <= {"mark"}, "nothing but the probe's scratch was entrusted to an exchange that loses a side"


# --- around -------------------------------------------------------------------------------------------------------


def test_a_plan_writes_nothing_and_tells_all(tmp_path):
    run = make_run(tmp_path, slot="hf")
    trees.empty_epoch(run, 187)
    trees.set_age(run, 3600)
    before = snapshot(run.parents[3])
    found = plan(LocalBackend(run), Selection(), AS_IS)
    assert snapshot(run.parents[3]) == before
    assert found.point.checkpoint.step == 140
    assert found.slots == {"default": str(slot(run))}
    assert found.needed_bytes == found.point.checkpoint.size_bytes
    assert found.free_bytes == pytest.approx(shutil.disk_usage(run).free, rel=0.2)
    assert found.file_system == probe.file_system(str(run))
    assert found.old_slot is not None
    assert found.refusals == ()


def test_what_an_interrupted_setup_left_is_told(run):
    """The next setup finishes it first, and says so."""
    from tests.crashing import Crash, Operations

    with Operations().watched() as counted:
        setup(run)
    shutil.rmtree(side(run))
    shutil.rmtree(slot(run))
    journal = next(
        at for at, detail in enumerate(counted.details, 1) if detail.startswith("rename ") and "journal.json" in detail
    )
    with Operations(at=journal, when="after", how=Crash()).watched(), pytest.raises(Crash):
        setup(run)
    outcome = setup(run, Selection(step=93))
    assert "an interrupted setup of step 140 was finished" in outcome.rolled
    assert_holds(run, 93)
    recovery.undo(LocalBackend(run))
    assert_holds(run, 140)


def test_set_aside_slots_that_are_mere_copies_are_not_kept_for_ever(run):
    """Our own copy of a checkpoint that is still there can be made again; the trainer's own state cannot."""
    trees.set_age(trees.write_dcp_slot(slot(run), seed=5), 3600)
    trainers = content(slot(run))
    for step in (46, 93, 140, 46, 93):
        setup(run, Selection(step=step))
    kept = [without_manifest(content(path)) for path in side(run).glob("old-*/default")]
    assert trainers in kept
    assert len(kept) == 2, "the trainer's, and the one that undo brings back"


def test_a_set_aside_copy_of_a_checkpoint_that_was_overwritten_is_kept(run):
    """The source has other bytes now: the copy is the only one."""
    setup(run, Selection(step=46))
    first = content(trees.checkpoint(run, 46))
    trees.write_model(trees.checkpoint(run, 46), seed=777)
    trees.set_age(trees.checkpoint(run, 46), 60)
    force = Options(as_is=True, force=True)
    setup(run, Selection(step=93), force)
    setup(run, Selection(step=140), force)
    assert first in [without_manifest(content(path)) for path in side(run).glob("old-*/default")]


def test_progress_never_runs_backwards(tmp_path):
    run = make_run(tmp_path, parts=("default", "critic"))
    seen = []
    setup(run, notify=lambda doing, done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {plan(LocalBackend(run), Selection(step=93), AS_IS).needed_bytes}
    assert seen[-1][0] == seen[-1][1]


class Counting(LocalBackend):
    """Counts what is read."""

    def __init__(self, root):
        super().__init__(root)
        self.reads = self.trees = 0

    def get(self, key, **options):
        self.reads += 1
        return super().get(key, **options)

    def tree(self, *args, **options):
        self.trees += 1
        return super().tree(*args, **options)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_thousands_of_checkpoints_cost_one_look_at_each(memory_path, count):
    """Listing reads one tree, which brings the manifests along; choosing opens the files of the chosen one alone."""
    run = trees.make_many(memory_path, count)
    for step in range(0, count if count <= 300 else 0, 10):
        seal_step(run, step)
    backend = Counting(run)
    listing = scan(backend)
    assert len(listing.checkpoints) == count
    sealed = sum(checkpoint.status is Status.COMMITTED for checkpoint in listing.checkpoints)
    assert sealed == (count // 10 if count <= 300 else 0)
    assert (backend.trees, backend.reads) == (1, 0)
    backend = Counting(run)
    point = resume_point(backend, listing, Selection())
    assert point.checkpoint.step == count - 1
    assert backend.reads <= 4 * len(trees.MODEL_FILES)


def test_errors_carry_what_a_person_needs(run):
    """Kind, place and way out; and the builtins that people catch."""
    with pytest.raises(NothingToResumeError, match=str(run)) as caught:
        setup(run, Selection(step=999))
    assert caught.value.hint
    assert issubclass(NoSpaceError, StorageError)
    assert issubclass(StorageError, OSError)
