"""A push that comes back in the moment in which `clean` removes its files: whatever comes between, no checkpoint has holes.

Both are real, against a store in memory; each of their operations on it waits for its turn, so that a schedule says who goes
when. The store's times are all the same: nothing is told by them. A schedule may also kill one of them where its turn ends.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable

import fsspec
import pytest

from ckptstore import listing
from ckptstore.backends import Blob
from ckptstore.backends.fsspec import FsspecBackend
from ckptstore.errors import CkptStoreError
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import claims, conditions, leftovers, sending
from ckptstore.transfer import push as pushing
from ckptstore.verify import verify
from tests.test_attempts import cut_short
from tests.test_push_pull import EXPORT, other_content
from tests.test_remote_looking import sealed_run

PUSH, CLEAN = "push", "clean"
ALL = 10**6


class Killed(BaseException):
    """The process is gone: nothing of it happens from now on."""


class Turns:
    """Who may touch the store now, and how often. `killed`: whose process ends where its next turn would begin."""

    def __init__(self, turns: list[tuple[str, int]], killed: str = "") -> None:
        self._turns = turns
        self._killed = killed
        self._ended: set[str] = set()
        self._changed = threading.Condition()
        self.operations: list[tuple[str, str, str]] = []

    def take(self, who: str, operation: str, key: str) -> None:
        with self._changed:
            while True:
                if who in self._ended:
                    raise Killed
                name, left = self._turns[0]
                if name == who and left:
                    self._turns[0] = (name, left - 1)
                    self.operations.append((who, operation, key.rpartition("/")[2]))
                    return
                if name == who or name in self._ended:
                    self._turns.pop(0)
                    if who == self._killed and all(name != who or left == ALL for name, left in self._turns):
                        self._ended.add(who)
                    self._changed.notify_all()
                    continue
                assert self._changed.wait(20), (who, self._turns)

    def end(self, who: str) -> None:
        with self._changed:
            self._ended.add(who)
            self._changed.notify_all()


class Scheduled(FsspecBackend):
    """A store in memory whose every operation waits for its turn: so its creation is atomic, and its times are all one."""

    creates_atomically = True
    turns: Turns | None = None
    who = ""

    def _turn(self, operation: str, key: str) -> None:
        if self.turns is not None:
            self.turns.take(self.who, operation, key)

    def get(self, key, **options):
        self._turn("get", key)
        return super().get(key, **options)

    def list(self, prefix=""):
        self._turn("list", prefix)
        return iter([Blob(blob.key, blob.size_bytes, 10**18) for blob in super().list(prefix)])

    def put(self, key, data, **options):
        self._turn("put", key)
        super().put(key, data, **options)

    def delete(self, key):
        self._turn("delete", key)
        super().delete(key)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """What a schedule plays on: a push that was cut short, in the step's own folder, in an attempt, or of a replacement."""
    monkeypatch.setattr(sending, "FILES_AT_ONCE", 1)
    monkeypatch.setattr(leftovers, "THREADS", 1)
    run = sealed_run(tmp_path, (46,))
    other = other_content(run, tmp_path)
    CheckpointStore(other).seal(46)
    numbers = itertools.count()

    def play(place: str, turns: list[tuple[str, int]], killed: str = "") -> Turns:
        url = f"memory://races-{os.getpid()}-{tmp_path.name}-{next(numbers)}"
        source, replace = (run, False) if place == "own" else (other, place == "replacement")
        if place == "own":
            cut_short(run, url, monkeypatch)
        else:
            (cut_short if place == "attempt" else push)(run, url, monkeypatch)
            with monkeypatch.context() as planted:
                planted.setattr(claims.Place, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    push(other, url, replace=replace)
        backends = {who: Scheduled(url) for who in (PUSH, CLEAN)}
        found, _ = leftovers.look(backends[CLEAN], older_than_s=-(10**9) * 4)
        doomed = [one for one in found if place == "own" or one.files_folder != EXPORT]
        assert len(doomed) == 1
        conditions.find_out(backends[PUSH])
        told = Turns([*turns, (CLEAN, ALL), (PUSH, ALL)], killed)
        outcome: dict[str, object] = {}

        def act(who: str, action: Callable[[Scheduled], object]) -> None:
            backends[who].turns, backends[who].who = told, who
            try:
                outcome[who] = action(backends[who])
            except (CkptStoreError, Killed) as error:
                outcome[who] = error
            finally:
                told.end(who)

        crew = [
            threading.Thread(
                target=act,
                args=(
                    PUSH,
                    lambda to: pushing.push(
                        CheckpointStore(source).backend, CheckpointStore(source).get(46), to, replace=replace
                    ),
                ),
            ),
            threading.Thread(target=act, args=(CLEAN, lambda at: leftovers.remove(at, doomed[0]))),
        ]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join(60)
            assert not thread.is_alive(), told.operations
        look(url, outcome, told, place)
        memory = fsspec.filesystem("memory")
        memory.rm(url, recursive=True)  # it lists by looking at all that it holds, from whatever schedule
        return told

    return play


def push(run, url, _=None, *, replace=False):
    store = CheckpointStore(run)
    return pushing.push(store.backend, store.get(46), FsspecBackend(url), replace=replace)


def look(url: str, outcome: dict[str, object], told: Turns, place: str) -> None:
    """What readers see is whole; and who was told that it is committed finds it so."""
    backend = FsspecBackend(url)
    try:
        found = listing.scan(backend).checkpoints
    except CkptStoreError:
        found = []
    seen = [checkpoint for checkpoint in found if any(blob.key == f"{EXPORT}/{MANIFEST_NAME}" for blob in backend.list())]
    for checkpoint in seen:
        report = verify(backend, checkpoint, Level.FULL)
        assert report.checkpoint.status is Status.COMMITTED, (report.findings, told.operations)
    assert seen or not isinstance(outcome[PUSH], list), told.operations
    assert seen or place != "replacement", told.operations


def schedules(first: int, second: int, third: tuple[int, ...]) -> list[list[tuple[str, int]]]:
    """One goes so far, then the other, then the first again, and both to their ends."""
    return [
        [(one, i), (other, j), (one, k)]
        for one, other in ((PUSH, CLEAN), (CLEAN, PUSH))
        for i in range(first)
        for j in range(1, second)
        for k in third
    ]


@pytest.mark.parametrize("place", ["own", "attempt", "replacement"])
def test_no_schedule_leaves_holes(stage, place):
    """Some of all; the soak plays every one. The ways it can end are all among them."""
    chosen = random.Random(7).sample(schedules(24, 24, (1, 2, 4, ALL)), 60 if place == "own" else 25)
    for turns in chosen:
        stage(place, turns)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("killed", [PUSH, CLEAN])
def test_no_kill_leaves_holes(stage, killed):
    for turns in random.Random(8).sample(schedules(24, 24, (1, 2, 4)), 40):
        stage("own", turns, killed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("killed", ["", PUSH])
@pytest.mark.parametrize("place", ["own", "attempt", "replacement"])
def test_the_manifest_comes_while_files_go(stage, place, killed):
    """The push has looked again, then files go, then its manifest comes; and it may die before it looks once more."""
    operations = [(operation, name) for who, operation, name in stage(place, [(PUSH, ALL)]).operations if who == PUSH]
    before = max(number for number, (what, name) in enumerate(operations) if name == MANIFEST_NAME and what != "get")
    removing = sum(who == CLEAN for who, _, _ in stage(place, [(CLEAN, ALL)]).operations)
    for count in range(1, removing - 2):  # nobody can see to a push that stands still all this time, and is killed then
        stage(place, [(PUSH, before), (CLEAN, count), (PUSH, 1)], killed)


@pytest.mark.soak
@pytest.mark.parametrize("place", ["own", "attempt", "replacement"])
def test_every_schedule(stage, place):
    for turns in schedules(17, 17, (1, 2, ALL)):  # neither has more than 17 operations before it has ended, or sends
        stage(place, turns)
