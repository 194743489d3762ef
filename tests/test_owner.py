"""Whether a draft's writer lives, where the file system has no flock: certain, or not known; and what goes then, and when."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore
from ckptstore.errors import BusyError
from ckptstore.saves import node_sets, owner, prepared, steps
from ckptstore.saves.owner import Life
from tests import commands
from tests.fusefs import fuse_mount
from tests.test_steps import KILLED, write

HOUR_S = 3600.0
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    """On a file system that has no flock."""
    with fuse_mount(tmp_path, "noflock") as mount:
        yield CheckpointStore(mount.path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "files", "one", 50_000)


def home_with(folder: Path, **changed: Any) -> str:
    """A draft's folder, of this process but for what is changed."""
    folder.mkdir()
    (folder / owner.OWNER).write_text(json.dumps(owner._process() | changed))
    return str(folder)


class Writer:
    """A process that has begun to save step 5, and waits."""

    def __init__(self, store: CheckpointStore, source: Path, *before: str) -> None:
        words = [*before, sys.executable, "-c", KILLED, store.folder, str(source)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def drafts(store: CheckpointStore) -> list[Path]:
    return sorted(Path(store.folder).glob(".ckptstore/save-*"))


def age(draft: Path, seconds: float) -> None:
    """As if nothing had been written for so long."""
    for path in [*draft.rglob("*"), draft]:
        os.utime(path, (time.time() - seconds,) * 2)


# --- one draft -----------------------------------------------------------------------------------------------------


def test_what_the_words_tell(tmp_path: Path, no_flock: None) -> None:
    assert owner.life(home_with(tmp_path / "mine")) is Life.ALIVE
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    born = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    zombie = home_with(tmp_path / "zombie", pid=child.pid, started=born)
    assert owner.life(zombie) is Life.DEAD
    child.wait()
    assert owner.life(zombie) is Life.DEAD, "it is gone"
    assert owner.life(home_with(tmp_path / "again", started=12345)) is Life.DEAD, "its number was given again"
    for name, changed in {
        "boot": {"boot": "0" * 36}, "container": {"namespace": "pid:[1]"}, "host": {"host": "another"},
        "no start": {"started": None}, "number": {"pid": 1 << 40}, "nobody": {"pid": -1}, "text": {"pid": "1"},
    }.items():  # fmt: skip
        assert owner.life(home_with(tmp_path / name, **changed)) is Life.UNKNOWN, name
    for number, garbage in enumerate((b"", b"null", b"[]", b"{", b"\xff" * 9, b"[" * 4000, b'{"pid": 1}')):
        home = home_with(tmp_path / str(number))
        Path(home, owner.OWNER).write_bytes(garbage)
        assert owner.life(home) is Life.UNKNOWN, garbage


def test_where_there_is_flock_it_decides(tmp_path: Path) -> None:
    """The words are nothing beside it: a living process that has let go, and one of another machine that holds."""
    assert owner.life(home_with(tmp_path / "mine")) is Life.DEAD
    home = home_with(tmp_path / "held", boot="0" * 36)
    with open(f"{home}/owner", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert owner.life(home) is Life.ALIVE
    assert owner.life(home) is Life.DEAD


def test_who_cannot_be_seen(tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's process, where /proc hides it, is there all the same."""
    home = home_with(tmp_path / "other", pid=1 << 22)

    def kill(pid: int, _: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", kill)
    assert owner.life(home) is Life.UNKNOWN


def test_a_prepared_draft_is_taken_over_by_one(tmp_path: Path, no_flock: None) -> None:
    home = home_with(tmp_path / "held", pid=os.getppid(), started=owner._start(os.getppid()))
    with pytest.raises(BlockingIOError, match=f"pid {os.getppid()}"):
        owner.take_over(home)
    Path(home, owner.OWNER).write_bytes(b"")
    descriptor = owner.take_over(home)
    assert owner.life(home) is Life.ALIVE
    owner.let_go(descriptor)
    assert owner.life(home) is Life.DEAD


def test_a_writer_that_publishes_after_all(tmp_path: Path, no_flock: None) -> None:
    """It was not known to live: what it has put aside meanwhile is no draft, and stays where it is."""
    from tests.test_store_nodes import a_draft

    store = CheckpointStore(tmp_path / "store")
    draft = a_draft(store, 5)
    aside = Path(steps.side_of(store.folder), f"old-step-5-{draft.name}")
    os.rename(draft.path, aside)
    (found,) = prepared.waiting(steps.side_of(store.folder))
    assert found.path == str(aside)
    (aside / "ckptstore.manifest.json").write_text("{}")  # the exchange: now it holds what was replaced
    with pytest.raises(BusyError):
        node_sets.take_over(store.folder, found)
    assert sorted(os.listdir(aside)) == ["ckptstore.manifest.json", "f"]


# --- saves on such a file system ------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_killed_writer_of_this_machine(store: CheckpointStore, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Known to be dead at once, and known to live however long nothing was written."""
    writer = Writer(store, source)
    (draft,) = drafts(store)
    age(draft, 30 * 24 * HOUR_S)
    store.save(4, source)
    done = commands.invoke(capfd, "clean", "--run", store.folder, "--older-than", "1h", "--json").json
    assert (done["removed"], done["notes"]) == ([], [])
    assert drafts(store) == [draft], "it lives"
    writer.kill()
    assert steps.leftovers(store.folder) == [draft.name]
    store.save(4, source)
    assert drafts(store) == []


@pytest.mark.root
def test_a_writer_of_another_container(store: CheckpointStore, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing tells whether it lives: it stays, all verbs say so and what to do, and it goes when told to, or after a week."""
    store.save(3, source)
    writer = Writer(store, source, *NAMESPACE)
    (draft,) = drafts(store)
    for died in (False, True):
        if died:
            writer.kill()
        store.save(4, source)
        found = commands.invoke(capfd, "list", "--run", store.folder, "--json").json["notes"]
        assert len(found) == 1, "this can be told of no living one either"
        assert draft.name in found[0]
        assert "clean --older-than 1h" in found[0]
        for words in ((), ("--older-than", "1h")):
            done = commands.invoke(capfd, "clean", "--run", store.folder, "--json", *words).json
            assert (done["removed"], done["notes"]) == ([], found)
        said = commands.invoke(capfd, "doctor", "--run", store.folder, "--json").json["findings"]
        by_check = {one["check"]: one for one in said}
        assert "without flock" in by_check["locks"]["found"]
        assert draft.name in by_check["leftovers"]["found"]
        assert "clean --older-than 1h" in by_check["leftovers"]["remedy"]
    age(draft, 2 * HOUR_S)
    assert commands.invoke(capfd, "clean", "--run", store.folder, "--json").json["removed"] == [], "a week by default"
    would = commands.invoke(capfd, "clean", "--run", store.folder, "--older-than", "1h", "--dry-run", "--json").json
    assert [one["name"] for one in would["removed"]] == [draft.name]
    assert drafts(store) == [draft]
    young = next(path for path in draft.glob("step/*") if path.is_file())
    os.utime(young)
    done = commands.invoke(capfd, "clean", "--run", store.folder, "--older-than", "1h", "--json").json
    assert done["removed"] == [], "one file was written just now"
    age(draft, 2 * HOUR_S)
    assert "removed 1" in commands.invoke(capfd, "clean", "--run", store.folder, "--older-than", "1h").out
    assert drafts(store) == []

    writer = Writer(store, source, *NAMESPACE)
    writer.kill()
    age(*drafts(store), 8 * 24 * HOUR_S)
    store.save(6, source)
    assert drafts(store) == []
    assert [one.step for one in store.list()] == [3, 4, 6]


@pytest.mark.root
def test_a_save_whose_draft_was_cleaned(store: CheckpointStore, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Who cleans under a living save loses that save, which says so, and nothing else."""
    store.save(5, source)
    before = (Path(store.folder) / "step-5/ckptstore.manifest.json").read_bytes()
    writer = Writer(store, source, *NAMESPACE)
    age(*drafts(store), 2 * HOUR_S)
    assert commands.invoke(capfd, "clean", "--run", store.folder, "--older-than", "1h").code == 0
    _, _ = writer.process.communicate(b"go on", timeout=60)
    assert writer.process.returncode not in (0, None)
    assert (Path(store.folder) / "step-5/ckptstore.manifest.json").read_bytes() == before
    assert store.verify(5).ok
    assert drafts(store) == []


@pytest.mark.root
def test_the_doctor_where_there_is_flock(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a store of steps it says nothing of AReaL's."""
    store = CheckpointStore(tmp_path / "store")
    store.save(3, source)
    Writer(store, source).kill()
    done = commands.invoke(capfd, "doctor", "--run", store.folder, "--json")
    by_check = {one["check"]: one for one in done.json["findings"]}
    assert by_check["locks"]["severity"] == "ok"
    assert "dead writers left 0.3 MB" in by_check["leftovers"]["found"]
    assert set(by_check) == {"disk", "permissions", "space", "clock", "checkpoints", "locks", "leftovers"}


def test_what_the_doctor_says_of_a_prepared_part(tmp_path: Path, no_flock: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Once, and that resume_step may publish it; with --old-slots it goes when it is old, as any other."""
    from tests.test_store_nodes import a_draft

    store = CheckpointStore(tmp_path / "store")
    store.save(3, write(tmp_path / "files", "one", 1000))
    draft = a_draft(store, 5)
    (Path(draft.home) / owner.OWNER).write_bytes(b"{}")
    said = commands.invoke(capfd, "doctor", "--run", store.folder, "--json").json["findings"]
    (found,) = [one["found"] for one in said if one["check"] == "leftovers"]
    assert "resume_step publishes it" in found
    (note,) = commands.invoke(capfd, "list", "--run", store.folder, "--json").json["notes"]
    assert note == found
    words = ("clean", "--run", store.folder, "--old-slots", "--json")
    assert "--older-than 1h" in commands.invoke(capfd, *words).json["notes"][0], "it is young"
    age(Path(draft.home), 2 * HOUR_S)
    assert commands.invoke(capfd, *words, "--older-than", "1h").json["removed"][0]["name"] == f"save-{draft.name}"
    assert drafts(store) == []
