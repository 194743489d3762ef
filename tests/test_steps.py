"""A store of steps: saves are all or nothing, whatever stops them, and the verbs know it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore import CheckpointStore, native, seal
from ckptstore.errors import (
    AlreadyExistsError,
    BusyError,
    CkptStoreError,
    CommitUncertain,
    IntegrityError,
    NotCommitted,
    NotFoundError,
    RefusedError,
    UsageError,
    from_os_error,
)
from ckptstore.lock import RunLock
from ckptstore.manifest import Manifest
from ckptstore.model import Status
from ckptstore.parts import find_manifest
from ckptstore.retention import Keep
from ckptstore.saves import steps
from tests import commands, trees
from tests.crashing import Crash, Operations, Tree, content, without_manifest


def write(folder: Path, mark: str, size: int = 3000) -> Path:
    """A trainer's folder whose every byte depends on `mark`."""
    (folder / "optim").mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(mark.encode() * size)
    (folder / "optim" / "rank0.pt").write_bytes(mark[::-1].encode() * size)
    (folder / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "runs" / "mine")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", "one")


@pytest.fixture
def room(memory_path: Path) -> Path:
    """A folder in memory: the sweeps do thousands of fsyncs."""
    return memory_path


def step_folder(store: CheckpointStore, step: int) -> Path:
    return Path(store.backend.location) / f"step-{step}"


# --- from Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a bit", "shorter", "gone"])
def test_a_copy_without_its_times_is_compared(store: CheckpointStore, source: Path, tmp_path: Path, how: str) -> None:
    """Nobody writes into a saved step again: other times are no reason to believe other bytes."""
    store.save(7, source)
    shutil.copytree(store.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = CheckpointStore(tmp_path / "copy")
    report = copy.verify(7)
    assert report.ok
    assert (copy.get(7).status, copy.get(7).parts[0].notes) == (Status.COMMITTED, ())
    copy.restore(7, tmp_path / "restored")
    damaged = step_folder(copy, 7) / "weights.bin"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] if how == "shorter" else bytes([data[0] ^ 1]) + data[1:])
    if how == "gone":
        damaged.unlink()
    report = copy.verify(7)
    assert not report.ok
    assert "weights.bin" in str(report.checkpoint.parts[0].findings)
    with pytest.raises(CkptStoreError):
        copy.restore(7, tmp_path / "again")
    assert not os.path.lexists(tmp_path / "again")
    part = copy.get(7).parts[0]
    with pytest.raises(IntegrityError, match=r"weights\.bin is not what was saved"):
        seal.describe(copy.backend, copy.get(7), part, None)  # for a push: else the damage would be sealed as it is


def test_a_store_copied_without_its_times_goes_on(store: CheckpointStore, source: Path, tmp_path: Path, cli: Cli) -> None:
    """As `aws s3 cp` brings it: its steps count for retention, and are pushed as they are."""
    for step in (1, 2, 3):
        store.save(step, source)
    shutil.copytree(store.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = CheckpointStore(tmp_path / "copy")
    url = f"memory://without-times-{os.getpid()}"
    assert cli("push", 3, "--run", copy.folder, "--to", url).code == 0
    assert CheckpointStore(url).verify(3).ok
    copy.save(4, source, keep=Keep(last=2))
    assert [one.step for one in copy.list()] == [3, 4]


def test_save_list_verify_restore(store: CheckpointStore, source: Path, tmp_path: Path) -> None:
    manifest = store.save(7, source, metrics={"loss": 1, "bad": float("nan")})
    store.save(100, source)
    assert [(one.step, one.status) for one in store.list()] == [(7, Status.COMMITTED), (100, Status.COMMITTED)]
    assert (manifest.step, manifest.origin, manifest.metrics) == (7, "save", {"loss": 1.0})
    assert {entry.path for entry in manifest.files} == {"weights.bin", "optim/rank0.pt", "empty.txt"}
    assert find_manifest(store.backend, "step-7") == manifest
    newest = store.latest()
    assert newest is not None
    assert newest.step == 100
    report = store.verify(7)
    assert report.ok
    assert report.manifest_sha256 == (manifest.sha256,)
    store.restore(7, tmp_path / "out")
    assert without_manifest(content(tmp_path / "out")) == content(source)
    assert os.stat(step_folder(store, 7)).st_mode & 0o777 == os.stat(store.backend.location).st_mode & 0o777
    assert os.stat(step_folder(store, 7) / "weights.bin").st_mtime_ns == os.stat(source / "weights.bin").st_mtime_ns
    assert [path.name for path in Path(steps.side_of(store.backend.location)).iterdir()] == ["lock"]


def test_resave_replaces_in_one_act(store: CheckpointStore, source: Path) -> None:
    store.save(7, source)
    write(source, "two")
    (source / "more").write_bytes(b"x")
    store.save(7, source)
    assert without_manifest(content(step_folder(store, 7))) == content(source)
    assert store.verify(7).ok


def test_damage_is_found_and_remembered(store: CheckpointStore, source: Path) -> None:
    for step in (1, 2):
        store.save(step, source)
    trees.bitflip(step_folder(store, 2) / "weights.bin")
    before = os.stat(step_folder(store, 1) / "weights.bin")
    os.utime(step_folder(store, 2) / "weights.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.get(2).status is Status.COMMITTED, "quick does not read"
    report = store.verify(2)
    assert report.checkpoint.status is Status.CORRUPT
    assert store.get(2).status is Status.CORRUPT, "found once, known from then on"
    newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    store.save(2, source)
    assert store.get(2).status is Status.COMMITTED, "another save, another manifest"


def test_a_missing_file_and_a_strange_step(store: CheckpointStore, source: Path) -> None:
    store.save(1, source)
    store.save(2, source)
    (step_folder(store, 1) / "weights.bin").unlink()
    os.rename(step_folder(store, 2), step_folder(store, 3))
    (step_folder(store, 4)).mkdir()
    assert {one.step: one.status for one in store.list()} == {1: Status.PARTIAL, 3: Status.COMMITTED, 4: Status.PARTIAL}
    assert not store.verify(3).ok, "its manifest is of another step"


@pytest.mark.parametrize("step", [-1, True, 1.0, "7", 10**15])
def test_steps_are_whole_numbers(store: CheckpointStore, source: Path, step: object) -> None:
    with pytest.raises(UsageError, match="whole number"):
        store.save(step, source)  # type: ignore[arg-type]
    assert not Path(store.backend.location).exists()


def test_refusals_leave_nothing(store: CheckpointStore, source: Path, tmp_path: Path) -> None:
    store.save(1, source)
    (source / "link").symlink_to("weights.bin")
    with pytest.raises(RefusedError, match="symlink"):
        store.save(2, source)
    with pytest.raises(NotFoundError):
        store.save(2, tmp_path / "none")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="no files"):
        store.save(2, tmp_path / "nothing")
    assert [one.step for one in store.list()] == [1]
    assert [path.name for path in Path(steps.side_of(store.backend.location)).iterdir()] == ["lock"]


def test_a_run_of_areal_is_no_store(tmp_path: Path, source: Path) -> None:
    run = trees.make_run(tmp_path, steps=(46,))
    before = content(run)
    with pytest.raises(RefusedError, match="no store of steps"):
        CheckpointStore(run).save(1, source)
    assert content(run) == before
    assert not (run / ".ckptstore").exists()


def test_a_store_of_steps_has_no_slot(store: CheckpointStore, source: Path) -> None:
    store.save(1, source)
    with pytest.raises(UsageError, match="no slot"):
        store.setup()
    assert store.resume_point().checkpoint.step == 1


def test_a_store_through_a_link(store: CheckpointStore, source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    linked = CheckpointStore(tmp_path / "link")
    linked.save(1, source)
    assert [one.step for one in linked] == [1]


# --- several at once -----------------------------------------------------------------------------------------------


def test_saves_of_several_threads(store: CheckpointStore, tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def save(step: int) -> None:
        try:
            store.save(step, write(tmp_path / f"s{step}", f"mark{step}"))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=save, args=(step,)) for step in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for step in range(8):
        assert without_manifest(content(step_folder(store, step))) == content(tmp_path / f"s{step}")


def test_the_lock_is_waited_for_and_not_for_ever(store: CheckpointStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(1, source)
    with RunLock(steps.side_of(store.backend.location), "a test"):
        monkeypatch.setattr(steps, "LOCK_PATIENCE_S", 0.2)
        with pytest.raises(NotCommitted, match="another ckptstore is at work"):
            store.save(2, source)
    assert [one.step for one in store.list()] == [1]


def test_a_living_draft_is_not_swept(store: CheckpointStore, source: Path) -> None:
    """A writer that takes its time keeps its draft, and a dead one's is removed by the next save."""
    draft = steps.begin(store.backend.location, 1)
    native.copy_files(source, draft.path, steps.files_in(str(source)))
    store.save(2, source)
    assert Path(draft.path, "weights.bin").exists()
    assert steps.leftovers(store.backend.location) == []
    draft.held.close()  # as if its process had died
    assert steps.leftovers(store.backend.location) == [os.path.basename(draft.home)]
    store.save(3, source)
    assert not os.path.exists(draft.home)
    assert [one.step for one in store.list()] == [2, 3]


# --- stopped anywhere ----------------------------------------------------------------------------------------------


class Scene:
    """A store with step 1 and step 5, and a save of step 5 (or 6) to be stopped."""

    def __init__(self, room: Path, step: int) -> None:
        shutil.rmtree(room, ignore_errors=True)
        self.store = CheckpointStore(room / "store")
        self.step = step
        self.old: dict[int, Tree] = {}
        for number in (1, 5):
            self.store.save(number, write(room / "source", f"old{number}", 50))
            self.old[number] = content(step_folder(self.store, number))
        self.source = write(room / "source", "new", 50)
        self.new = content(self.source)

    def save(self) -> None:
        self.store.save(self.step, self.source)

    def check(self, *, committed: bool | None) -> str:
        """After the next look, every step is whole: as it was, or new."""
        found = {one.step: one.status for one in self.store.list()}
        assert set(found.values()) == {Status.COMMITTED}, found
        assert {1, 5} <= set(found) <= {1, 5, self.step}
        assert content(step_folder(self.store, 1)) == self.old[1]
        is_new = self.step in found and without_manifest(content(step_folder(self.store, self.step))) == self.new
        if not is_new:
            assert content(step_folder(self.store, 5)) == self.old[5]
            assert committed is not True, "it said that it was committed"
        assert committed is not False or not is_new, "it said that it was not"
        assert all(self.store.verify(step).ok for step in found)
        return "new" if is_new else "old"


@pytest.mark.parametrize(
    ("step", "exchange"),
    [
        pytest.param(6, True, id="save-exchange"),
        pytest.param(6, False, id="save-no-exchange", marks=pytest.mark.soak),  # there is nothing to exchange
        pytest.param(5, True, id="re-save-exchange"),
        pytest.param(5, False, id="re-save-no-exchange"),
    ],
)
@pytest.mark.parametrize("how", ["crash", "error"])
def test_stopped_at_every_operation(room: Path, step: int, how: str, exchange: bool) -> None:
    scene = Scene(room, step)
    with Operations().watched(exchange=exchange) as seen:
        scene.save()
    assert scene.check(committed=True) == "new"
    assert len(seen.log) > 15
    outcomes = set()
    for at in range(1, len(seen.log) + 1):
        for when in ("after",) if how == "crash" else ("before", "after"):  # before one is after the one before it
            scene = Scene(room, step)
            cause: BaseException = Crash() if how == "crash" else OSError(errno.EIO, os.strerror(errno.EIO))
            committed: bool | None = None
            stopped = Operations(at=at, when=when, how=cause)
            with stopped.watched(exchange=exchange):
                try:
                    scene.save()
                    committed = True
                except CommitUncertain:
                    committed = None
                except NotCommitted:
                    committed = False
                except (Crash, CkptStoreError, OSError):
                    committed = None
            outcomes.add(scene.check(committed=committed))
            scene.save()  # and nothing that was left is in the way
            assert scene.check(committed=True) == "new", stopped.struck
    assert outcomes == {"old", "new"}


def test_the_sweep_sees_a_commit_that_copies_in_place(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a writer that fills the step's own folder, as most tools do."""

    def in_place(draft: steps.Draft, manifest: Manifest, *, keep_old: bool) -> None:
        target = step_folder_of(draft)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(draft.path, target)

    def step_folder_of(draft: steps.Draft) -> str:
        return os.path.join(draft.root, f"step-{draft.step}")

    monkeypatch.setattr(steps, "_publish", in_place)
    with pytest.raises(AssertionError):
        _sweep_in_place(room)


def _sweep_in_place(room: Path) -> None:
    for at in range(1, 60):
        scene = Scene(room, 5)
        with Operations(at=at, how=Crash()).watched(), contextlib.suppress(Crash):
            scene.save()
        scene.check(committed=None)


KILLED = """
import sys
from ckptstore import CheckpointStore
from ckptstore.saves import steps
store = CheckpointStore(sys.argv[1])
real = steps.side_folders.write_manifest
def write_manifest(*args, **kwargs):
    print("ready", flush=True)
    sys.stdin.read()
steps.side_folders.write_manifest = write_manifest
store.save(5, sys.argv[2])
"""


def test_killed_before_its_manifest(store: CheckpointStore, source: Path) -> None:
    store.save(5, source)
    before = content(step_folder(store, 5))
    write(source, "two")
    words = [sys.executable, "-c", KILLED, store.backend.location, str(source)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert steps.leftovers(store.backend.location) == [], "it lives"
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert content(step_folder(store, 5)) == before
    assert len(steps.leftovers(store.backend.location)) == 1
    store.save(5, source)
    assert steps.leftovers(store.backend.location) == []


def test_a_full_disk(store: CheckpointStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(1, source)

    def full(*args: object, **kwargs: object) -> None:
        raise from_os_error(OSError(errno.ENOSPC, "No space left on device"), doing="write", path="x")

    monkeypatch.setattr(native, "copy_files", full)
    with pytest.raises(CkptStoreError, match="No space left"):
        store.save(2, source)
    assert [one.step for one in store.list()] == [1]
    assert [path.name for path in Path(steps.side_of(store.backend.location)).iterdir()] == ["lock"]


def test_a_disk_that_does_not_confirm(store: CheckpointStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is in; the one that it replaced is kept beside, and the error says so."""
    store.save(1, source)
    before = without_manifest(content(step_folder(store, 1)))
    write(source, "two")
    real = native.fsync_path

    def fsync(path: object) -> None:
        if str(path) == store.backend.location:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "fsync_path", fsync)
    with pytest.raises(CommitUncertain, match="has not confirmed"):
        store.save(1, source)
    assert without_manifest(content(step_folder(store, 1))) == content(source)
    kept = list(Path(steps.side_of(store.backend.location)).glob("old-step-1-*"))
    assert [without_manifest(content(path)) for path in kept] == [before]


# --- the command line ----------------------------------------------------------------------------------------------

Cli = Callable[..., commands.Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    commands.isolate(monkeypatch, tmp_path)
    return functools.partial(commands.invoke, capfd)


def test_list_show_verify(store: CheckpointStore, source: Path, cli: Cli) -> None:
    for step in (5, 10):
        store.save(step, source, metrics={"loss": 0.5})
    where = ("--run", store.backend.location)
    result = cli("list", *where)
    assert result.code == 0, result.err
    assert "step" in result.out
    assert "log" not in result.out.split("\n")[2]
    assert "recover_info" not in result.out
    assert "setup" not in result.out
    assert [one["step"] for one in cli("list", *where, "--json").json["checkpoints"]] == [5, 10]
    assert [one["step"] for one in cli("list", *where, "--latest", "--json").json["checkpoints"]] == [10]
    shown = cli("show", "5", *where)
    assert (shown.code, "weights.bin" in shown.out, "Train step" in shown.out) == (0, True, False)
    assert cli("show", "5", *where, "--json").json["log_step"] == -1
    assert cli("verify", *where).code == 0
    trees.bitflip(step_folder(store, 10) / "weights.bin")
    stat = os.stat(step_folder(store, 5) / "weights.bin")
    os.utime(step_folder(store, 10) / "weights.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cli("verify", "10", *where).code == 3
    assert cli("list", *where, "--json").json["checkpoints"][1]["status"] == "CORRUPT"


@pytest.mark.parametrize("verb", ["setup", "resume", "adopt", "watch", "seal"])
def test_verbs_for_areal_say_so(store: CheckpointStore, source: Path, cli: Cli, verb: str) -> None:
    store.save(5, source)
    words = ("--all",) if verb == "seal" else ("--once",) if verb == "watch" else ()
    result = cli(verb, *words, "--run", store.backend.location)
    assert result.code == 2
    assert "store of steps" in result.err


def test_clean_removes_what_the_dead_left(store: CheckpointStore, source: Path, cli: Cli) -> None:
    store.save(5, source)
    dead = steps.begin(store.backend.location, 6)
    living = steps.begin(store.backend.location, 7)
    dead.held.close()
    where = ("--run", store.backend.location)
    planned = cli("clean", *where, "--dry-run", "--json").json
    assert [one["name"] for one in planned["removed"]] == [os.path.basename(dead.home)]
    assert os.path.exists(dead.home)
    assert cli("clean", *where).code == 0
    assert not os.path.exists(dead.home)
    assert os.path.exists(living.home)
    steps.abandon(living)


def test_pins_lie_in_the_store(store: CheckpointStore, source: Path, cli: Cli) -> None:
    store.save(5, source)
    result = cli("status", "--run", store.backend.location, "--pin", "5")
    assert result.code == 0, result.err
    assert Path(steps.side_of(store.backend.location), "pins.json").exists()


def test_errors_are_of_the_tree() -> None:
    assert issubclass(NotCommitted, CkptStoreError)
    assert not issubclass(NotCommitted, AlreadyExistsError | BusyError)
