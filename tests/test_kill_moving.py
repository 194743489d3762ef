"""kill -9 of push and pull at random moments of every phase: what `list` shows afterwards, `verify` accepts.

Each process goes on where the dead one was, at the same place, until one comes to its end; then a fresh place is begun.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckptstore import listing
from ckptstore.backends import open_backend
from ckptstore.errors import NotFoundError
from ckptstore.model import ATTEMPT_PREFIX, MANIFEST_NAME, Checkpoint, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import leftovers
from ckptstore.verify import verify
from tests import trees
from tests.test_push_pull import EXPORT, bring, other_content, same, send
from tests.test_remote_looking import sealed_run

CHILD = Path(__file__).parent / "kill_moving_child.py"
PHASES = {
    "push": ("start-up", "look", "claim", "data", "look again", "manifest", "claim away"),
    "pull": ("start-up", "look", "fetch", "manifest", "publish", "discard"),
}
LONG_S = {"start-up": 0.3, "data": 0.25, "fetch": 0.2}  #: how long a phase may be slept into before the kill
SHORT_S = 0.006


@pytest.fixture
def run(tmp_path):
    """25 MiB in files of one part and of several."""
    run = sealed_run(tmp_path, (46,))
    folder = run / EXPORT
    for number, size in enumerate((9 << 20, 3 << 20, 3 << 20, 3 << 20)):
        (folder / f"optim_world_size_4_rank_{number}.pt").write_bytes(random.Random(number).randbytes(size))
    trees.set_age(folder, 3600)
    (folder / MANIFEST_NAME).unlink()
    CheckpointStore(run).seal(46)
    return run


class Mover:
    """A push or a pull in a process of its own."""

    def __init__(self, *words: object) -> None:
        self.phase = ""
        self._told = threading.Condition()
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, CHILD, str(writing), *map(str, words)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(CHILD.parents[1]), *sys.path])},
            pass_fds=[writing],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        os.close(writing)
        self._thread = threading.Thread(target=self._listen, args=(reading,))
        self._thread.start()

    def _listen(self, reading: int) -> None:
        with open(reading, encoding="ascii") as pipe:
            for line in pipe:
                with self._told:
                    self.phase = line.strip()
                    self._told.notify_all()
        with self._told:
            self.phase += "."
            self._told.notify_all()

    def kill_in(self, phase: str, chance: random.Random) -> None:
        """Wait for the phase to begin, then for a random moment of it, and kill."""
        with self._told:
            self._told.wait_for(lambda: self.phase in (phase, f"{phase}.") or self.phase.endswith("."), 60)
        time.sleep(chance.uniform(0, LONG_S.get(phase, SHORT_S)))
        self.process.kill()

    def end(self) -> tuple[int, str, str]:
        """Exit code, the phase that was told last, and what it said."""
        said = self.process.communicate()[1].decode()
        self._thread.join()
        return self.process.returncode, self.phase.rstrip("."), said


def shown(location: str) -> list[Checkpoint]:
    """What `list` takes for whole."""
    try:
        found = listing.scan(open_backend(location)).checkpoints
    except NotFoundError:
        return []
    return [checkpoint for checkpoint in found if checkpoint.status.usable]


def judge(location: str, sources: list[Path], what: str) -> bool:
    """Whether something whole is shown; then it is COMMITTED, verify accepts it, and it is one of `sources`."""
    backend = open_backend(location)
    for checkpoint in shown(location):
        assert checkpoint.status is Status.COMMITTED, what
        report = verify(backend, checkpoint, Level.FULL)
        assert report.checkpoint.status is Status.COMMITTED, (what, report.findings)
        pins = [verify(open_backend(source), CheckpointStore(source).get(46)).manifest_sha256 for source in sources]
        assert report.manifest_sha256 in pins, what
        return True
    return False


class Campaign:
    """Kills one process after the other, and counts the kills by the phase that they hit."""

    def __init__(self, verb: str, chance: random.Random) -> None:
        self.verb, self.chance = verb, chance
        self.kills: collections.Counter[str] = collections.Counter()
        self.finished = 0

    def strike(self, *words: object) -> bool:
        """One process, killed; True when it was faster."""
        mover = Mover(self.verb, "46", *words, "--json")
        # The phase that has had the fewest yet, most of the time.
        rarest = min(PHASES[self.verb], key=lambda phase: (self.kills[phase], self.chance.random()))
        mover.kill_in(rarest if self.chance.random() < 0.6 else self.chance.choice(PHASES[self.verb]), self.chance)
        code, phase, said = mover.end()
        if code == -signal.SIGKILL:
            self.kills[phase] += 1
            return False
        assert code == 0, said
        self.finished += 1
        return True

    @property
    def count(self) -> int:
        return sum(self.kills.values())


def kill_pushes(run: Path, url: str, count: int, seed: int) -> Campaign:
    campaign = Campaign("push", random.Random(seed))
    place = 0
    while campaign.count < count:
        here = f"{url}/{place}"
        ended = campaign.strike("--run", run, "--to", here)
        there = judge(here, [run], f"place {place}, {campaign.kills}")
        assert there or not ended
        if ended or there or campaign.chance.random() < 0.1:  # begin anew; sometimes in the midst of it
            send(run, here)
            assert judge(here, [run], f"place {place} at its end")
            for leftover in leftovers.look(open_backend(here), older_than_s=-1000).leftovers:
                leftovers.remove(open_backend(here), leftover)
            assert judge(here, [run], f"place {place} cleaned")
            names = {blob.key.rpartition("/")[2] for blob in open_backend(here).list()}
            assert names == {path.name for path in (run / EXPORT).iterdir()}
            place += 1
    return campaign


def kill_pulls(run: Path, url: str, folder: Path, count: int, seed: int) -> Campaign:
    campaign = Campaign("pull", random.Random(seed))
    send(run, url)
    place = 0
    while campaign.count < count:
        here = folder / f"place-{place}"
        ended = campaign.strike("--from", url, "--to", here)
        there = here.exists() and judge(str(here), [run], f"place {place}, {campaign.kills}")
        assert there or not ended
        if ended or there or campaign.chance.random() < 0.1:
            bring(url, here)
            assert same(run / EXPORT, here / EXPORT)
            shutil.rmtree(here)
            shutil.rmtree(folder / ".ckptstore", ignore_errors=True)
            place += 1
    return campaign


def kill_two_pushers(run: Path, other: Path, url: str, count: int, seed: int) -> collections.Counter[str]:
    """Two that push one step with other bytes, both killed again and again, until one is through. Its bytes are there."""
    chance = random.Random(seed)
    seen: collections.Counter[str] = collections.Counter()
    place = 0
    while seen["kills"] < count:
        here = f"{url}/{place}"
        place += 1
        while not judge(here, [run, other], f"place {place}"):
            movers = [Mover("push", "46", "--run", source, "--to", here, "--json") for source in (run, other)]
            victims = [mover for mover in movers if chance.random() < 0.7]
            for mover in victims:
                mover.kill_in(chance.choice(PHASES["push"]), chance)
            for mover, (code, phase, said) in zip(movers, [mover.end() for mover in movers], strict=True):
                if code == -signal.SIGKILL:
                    seen["kills"] += 1
                    seen[f"killed in {phase}"] += 1
                elif code == 0:
                    seen["committed"] += 1
                else:
                    assert "other bytes" in said, (mover.phase, said)
                    seen["told"] += 1
        before = {blob.key: blob for blob in open_backend(here).list()}
        codes = [mover.end() for mover in [Mover("push", "46", "--run", source, "--to", here) for source in (run, other)]]
        assert sorted(code for code, _, _ in codes) == [0, 1], codes
        after = {blob.key: blob for blob in open_backend(here).list()}
        base = next((key.split("/")[2] for key in after if ATTEMPT_PREFIX in key), "")
        assert {key: blob for key, blob in after.items() if "claim" not in key} == {
            key: blob for key, blob in before.items() if "claim" not in key
        }, base
        assert judge(here, [run, other], f"place {place} at its end")
        seen["places"] += 1
        seen["places of an attempt"] += bool(base)
        for leftover in leftovers.look(open_backend(here), older_than_s=-1000).leftovers:
            leftovers.remove(open_backend(here), leftover)
        assert judge(here, [run, other], f"place {place} cleaned")
    return seen


def test_kill_9_a_few_times(run, s3, tmp_path):
    """Each phase at least once."""
    pushes = kill_pushes(run, f"{s3}/push", 9, seed=1)
    pulls = kill_pulls(run, f"{s3}/pull", tmp_path, 7, seed=2)
    assert len(pushes.kills) >= 4, pushes.kills
    assert len(pulls.kills) >= 3, pulls.kills


@pytest.mark.soak
@pytest.mark.parametrize("verb", ["push", "pull"])
def test_kill_9_many_times(run, s3, tmp_path, verb, record_property):
    """200 random kills, and at least ten in each phase."""
    seed = int(os.environ.get("KILL_SEED", "1"))
    campaign = kill_pushes(run, s3, 200, seed) if verb == "push" else kill_pulls(run, s3, tmp_path, 200, seed)
    record_property("kills", json.dumps(campaign.kills))
    print(f"\n{verb}: {campaign.count} kills, {dict(campaign.kills)}; {campaign.finished} were faster")
    assert all(campaign.kills[phase] >= 10 for phase in PHASES[verb]), campaign.kills


@pytest.mark.soak
def test_kill_9_two_pushers_of_one_step(run, s3, tmp_path, record_property):
    other = other_content(run, tmp_path)
    CheckpointStore(other).seal(46)
    seen = kill_two_pushers(run, other, s3, 200, int(os.environ.get("KILL_SEED", "1")))
    record_property("kills", json.dumps(seen))
    print(f"\ntwo pushers: {dict(seen)}")
    assert seen["places of an attempt"]
