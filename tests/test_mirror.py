"""watch --to URL: a finished save survives the machine, and training resumes from it on another one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from ckptstore import CheckpointStore, adopt, choose
from ckptstore.backends import Bandwidth, open_backend
from ckptstore.backends.fsspec import FsspecBackend
from ckptstore.errors import AlreadyExistsError, NotFoundError, StorageError, UsageError
from ckptstore.listing import mirror_of, scan
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.retention import Keep
from ckptstore.transfer import mirrored
from ckptstore.transfer.mirror import mirror
from ckptstore.transfer.pull import pull
from ckptstore.verify import verify
from tests import commands, trees
from tests.crashing import content, without_manifest


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://mirror-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    commands.isolate(monkeypatch, tmp_path)
    return trees.make_run(tmp_path, steps=[46], slot="era_a", slot_step=150, recover_info=150, logs=False)


def test_another_machine_resumes_from_what_was_mirrored(run, url, tmp_path, capfd):
    trees.write_recover_info(run, 150, world_size=2)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    done = commands.invoke(capfd, "watch", "--run", run, "--to", url, "--once")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert done.code == 0, done.err
    assert f"step 150 is committed in {url}" in done.err
    (found,) = scan(open_backend(url)).adopted
    assert (found.step, found.kind, found.status) == (150, "adopted", Status.COMMITTED)
    assert "150" in commands.invoke(capfd, "list", "--run", url).out
    assert mirror(open_backend(run), url) == []
    slot, info = content(run / "default/recover_checkpoint"), content(run / "recover_info")
    shutil.rmtree(run.parent)
    run.mkdir(parents=True)
    words = ("--areal-version", "0.3.4", "--world-size", "2", "--json")
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, *words)
    assert done.code == 0, (done.out, done.err)
    assert without_manifest(content(run / "default/recover_checkpoint")) == without_manifest(slot)
    assert without_manifest(content(run / "recover_info")) == without_manifest(info)


def test_half_of_it_is_nothing(run, url):
    adopt.adopt(open_backend(run))
    assert {sent.part for sent in mirror(open_backend(run), url)} == {"default", "recover_info"}
    there = open_backend(mirror_of(url, 150))
    there.delete(f"default/{MANIFEST_NAME}")
    assert scan(open_backend(url)).adopted == ()
    for blob in list(there.list("default")):
        there.delete(blob.key)
    assert scan(open_backend(url)).adopted == ()
    assert {sent.part for sent in mirror(open_backend(run), url)} == {"default", "recover_info"}
    assert len(scan(open_backend(url)).adopted) == 1


def test_the_same_step_of_another_history_is_told_from_what_is_there(run, url):
    """After a rollback step 150 is trained anew: it neither counts as mirrored nor replaces the other one."""
    backend = open_backend(run)
    adopt.adopt(backend)
    mirror(backend, url)
    trees.bitflip(run / "default/recover_checkpoint/model.safetensors")
    os.utime(run / "default/recover_checkpoint/model.safetensors")
    trees.write_recover_info(run, 150)
    adopt.adopt(backend)
    adopt.prune(backend, keep=1)
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        mirror(backend, url)


def test_nothing_is_removed_here_before_it_is_safe_there(run, tmp_path, monkeypatch, capfd):
    url = f"memory://mirror-down-{tmp_path.name}-{os.getpid()}"
    backend = open_backend(run)
    put = FsspecBackend.put
    monkeypatch.setattr(FsspecBackend, "put", lambda *words, **options: (_ for _ in ()).throw(StorageError("it is down")))
    for step in (150, 160):
        trees.write_recover_info(run, step)
        for path in (run / "default/recover_checkpoint").iterdir():
            os.utime(path)
        done = commands.invoke(capfd, "watch", "--run", run, "--to", url, "--keep", "1", "--once")
        assert "it is down" in done.err
        assert (done.code, f"globalstep{step}" in done.out) == (1, True), "kept here, and nobody tries again after --once"
    assert [checkpoint.step for checkpoint in scan(backend).adopted] == [150, 160]
    monkeypatch.setattr(FsspecBackend, "put", put)
    assert {sent.step for sent in mirror(backend, url)} == {46, 150, 160}
    assert adopt.prune(backend, keep=1) == [150], "and now it may go"
    assert [checkpoint.step for checkpoint in scan(open_backend(url)).adopted] == [150, 160]


def test_what_a_watch_left_does_not_wait_for_a_save(run, s3, tmp_path):
    """A preempted watch has adopted step 150; the next one pushes it, and an export, although nothing new is saved."""
    adopt.adopt(open_backend(run))
    words = [*commands.COMMAND, "watch", "--run", str(run), "--to", s3]
    watching = subprocess.Popen(words, env=os.environ.copy(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30

    def arrived() -> list[int]:
        try:
            there = scan(open_backend(s3))
        except NotFoundError:
            return []
        return [c.step for c in (*there.checkpoints, *there.adopted) if c.status is Status.COMMITTED]

    while arrived() != [46, 150] and time.monotonic() < deadline:
        time.sleep(0.1)
    watching.terminate()
    _, said = watching.communicate(timeout=20)
    assert (arrived(), watching.returncode) == ([46, 150], 0), said


def test_a_save_during_a_push_is_kept_and_goes_next(run, url, capfd, monkeypatch):
    """Three steps wait when the trainer saves the fourth: it is not overwritten in the slot while the old ones are sent."""
    from ckptstore.transfer import mirror as mirroring

    adopt.adopt(open_backend(run))
    exported(run, 93, 9000)
    push, pushed = mirroring._push, []

    def save(step: int) -> None:
        trees.write_recover_info(run, step)
        for path in (run / "default/recover_checkpoint").iterdir():
            os.utime(path)

    def saving(backend, url, checkpoint, **options):
        if checkpoint.step == 93 and 170 not in pushed:
            save(170)
        sent = push(backend, url, checkpoint, **options)
        pushed.append(checkpoint.step)
        if len(pushed) == 1:
            save(160)
        if len(pushed) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return sent

    monkeypatch.setattr(mirroring, "_push", saving)
    monkeypatch.setattr(mirroring, "LOOK_S", 0)
    monkeypatch.setattr(adopt, "POLL_S", 0.05)
    trees.set_age(trees.checkpoint(run, 46), 20_000)
    done = commands.invoke(capfd, "watch", "--run", run, "--to", url, "--json")
    # While 93 is sent 170 is saved: where that costs nothing 93 waits.
    assert pushed == ([150, 160, 170, 93, 46] if url.startswith("s3") else [150, 160, 93, 170, 46]), done.err
    assert '"step": 160' in done.out
    assert '"step": 170' in done.out


def test_many_adopted_steps_there_are_read_at_once(run, tmp_path, monkeypatch):
    """A week of training leaves hundreds: one after the other they would take minutes, before the newest is sent."""
    url = f"memory://mirror-many-{tmp_path.name}-{os.getpid()}"
    backend = open_backend(run)
    for step in range(150, 158):
        trees.write_recover_info(run, step)
        for path in (run / "default/recover_checkpoint").iterdir():
            os.utime(path)
        adopt.adopt(backend)
        mirror(backend, url)
        adopt.prune(backend, keep=1)
    get, keys, readers = FsspecBackend.get, [], set()

    def slow(self, key, **options):
        keys.append(f"{self.location}/{key}")
        readers.add(threading.get_ident())
        time.sleep(0.002)
        return get(self, key, **options)

    monkeypatch.setattr(FsspecBackend, "get", slow)
    assert [checkpoint.step for checkpoint in scan(open_backend(url)).adopted] == list(range(150, 158))
    assert len(readers) > 4
    looked = len(keys)
    (run.parent / ".ckptstore/trial0/mirror.json").unlink()
    assert all(sent.committed_before for sent in mirror(backend, url))
    assert all("globalstep157/" in key for key in keys[2 * looked :] if "/.ckptstore/adopted/" in key), "what is not here"


def test_an_outage_hides_no_adopted_step(run, tmp_path, monkeypatch):
    """Another one, or none, would be chosen to resume from."""
    url = f"memory://mirror-outage-{tmp_path.name}-{os.getpid()}"
    adopt.adopt(open_backend(run))
    mirror(open_backend(run), url)
    listed = FsspecBackend.list

    def down(self, prefix=""):
        if "adopted" in f"{self.location}/{prefix}":
            raise StorageError("the store does not answer")
        return listed(self, prefix)

    monkeypatch.setattr(FsspecBackend, "list", down)
    with pytest.raises(StorageError, match="does not answer"):
        scan(open_backend(url))


# --- exports, lag, retention ---------------------------------------------------------------------------------------


def exported(run: Path, step: int, age_s: float) -> Path:
    """One more export of that age."""
    folder = trees.write_model(trees.checkpoint(run, step), seed=step)
    trees.set_age(folder, age_s)
    return folder


def down(monkeypatch) -> None:
    """The store takes nothing."""

    def fail(*words: object, **options: object) -> None:
        raise StorageError("it is down")

    monkeypatch.setattr(FsspecBackend, "put", fail)


def test_exports_are_mirrored_when_they_are_finished(run, url, tmp_path):
    """Not one that the trainer wrote a moment ago; a sealed one at once."""
    exported(run, 93, 5)
    assert {sent.step for sent in mirror(open_backend(run), url)} == {46}
    CheckpointStore(run).seal(93)
    assert {sent.step for sent in mirror(open_backend(run), url)} == {93}
    assert [(c.step, c.status) for c in scan(open_backend(url)).checkpoints] == [(46, Status.COMMITTED), (93, Status.COMMITTED)]


def test_one_that_cannot_go_does_not_hold_up_the_others(run, url):
    """Another history's step 46 is there: it is said, and step 93 goes."""
    exported(run, 93, 3600)
    mirror(open_backend(run), url)
    trees.bitflip(trees.checkpoint(run, 46) / "model.safetensors")
    trees.set_age(trees.checkpoint(run, 46), 7200)
    exported(run, 140, 3600)
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        mirror(open_backend(run), url)
    assert [checkpoint.step for checkpoint in scan(open_backend(url)).checkpoints] == [46, 93, 140]
    record = mirrored.read(run.parent / ".ckptstore/trial0")
    assert sorted(record.safe) == [trees.folder_name(93), trees.folder_name(140)]
    assert "other bytes" in record.problem


def test_lag(run, tmp_path, monkeypatch, capfd):
    """What is waiting, by how many steps and for how long; in words and for programs."""
    url = f"memory://lag-{tmp_path.name}-{os.getpid()}"
    status = ("status", "--run", run)
    assert commands.invoke(capfd, *status, "--json").json["mirror"] is None
    mirror(open_backend(run), url)
    lag = commands.invoke(capfd, *status, "--json").json["mirror"]
    assert (lag["newest_local_step"], lag["newest_safe_step"], lag["waiting"], lag["behind_steps"]) == (46, 46, 0, 0)
    assert (lag["url"], lag["behind_seconds"], lag["problem"]) == (url, 0, "")
    assert "and all that is here" in commands.invoke(capfd, *status).out
    exported(run, 93, 3600)
    exported(run, 140, 600)
    with monkeypatch.context() as patch:
        down(patch)
        with pytest.raises(StorageError):
            mirror(open_backend(run), url)
    lag = commands.invoke(capfd, *status, "--json").json["mirror"]
    assert (lag["newest_local_step"], lag["newest_safe_step"], lag["waiting"], lag["behind_steps"]) == (140, 46, 2, 94)
    assert 3590 < lag["behind_seconds"] < 3700
    assert lag["problem"] == "it is down"
    text = commands.flat(commands.invoke(capfd, *status).out)
    assert "step 46 is safe there; 2 here are not" in text
    assert "94 steps" in text
    assert "it is down" in text
    trees.set_age(trees.checkpoint(run, 46), 50)
    assert mirrored.lag(mirrored.read(run.parent / ".ckptstore/trial0"), scan(open_backend(run)).checkpoints).waiting == 3, (
        "46 was saved anew: that one is not safe"
    )


def test_lag_after_a_rollback(run, tmp_path, capfd, monkeypatch):
    """Steps of the history that was left are safe, and say nothing of the one that the run is in."""
    url = f"memory://left-{tmp_path.name}-{os.getpid()}"

    def lag() -> tuple[object, ...]:
        found = commands.invoke(capfd, "status", "--run", run, "--json").json["mirror"]
        return tuple(found[name] for name in ("newest_local_step", "newest_safe_step", "behind_steps", "waiting"))

    trees.set_age(trees.checkpoint(run, 46), 9000)
    for step, age_s in ((93, 8000), (140, 7000), (200, 6000), (240, 5000)):
        exported(run, step, age_s)
    mirror(open_backend(run), url)
    assert lag() == (240, 240, 0, 0)
    exported(run, 150, 1000)  # back to 140, and on from there
    assert lag() == (150, 140, 10, 1)
    with monkeypatch.context() as patch:
        down(patch)
        with pytest.raises(StorageError):
            mirror(open_backend(run), url)
    assert lag() == (150, 140, 10, 1)
    shutil.rmtree(trees.checkpoint(run, 140))  # by the trainer's own retention: it is safe there all the same
    assert lag() == (150, 140, 10, 1)
    mirror(open_backend(run), url)
    assert lag() == (150, 150, 0, 0)
    exported(run, 160, 500)
    shutil.rmtree(trees.checkpoint(run, 150))
    assert lag() == (160, 150, 10, 1)
    for step in (46, 93, 160, 200, 240):
        shutil.rmtree(trees.checkpoint(run, step))
    assert lag() == (None, 150, None, 0)
    record = run.parent / ".ckptstore/trial0/mirror.json"
    document = json.loads(record.read_text())
    assert (document["newest_step"], document.pop("present_step")) == (240, 150)
    record.write_text(json.dumps(document))  # of an older ckptstore
    assert lag()[1] == 240


def saved(store: CheckpointStore, step: int, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(os.urandom(100_000))
    store.save(step, folder)


def test_retention_keeps_what_is_not_safe(tmp_path, url, capfd):
    """Until it is, or until it is told otherwise; and so when the record cannot be read."""
    store = CheckpointStore(tmp_path / "store")
    for step in (1, 2, 3):
        saved(store, step, tmp_path / "state")
    mirror(store.backend, url)
    for step in (4, 5):
        saved(store, step, tmp_path / "state")
    kept = {one.candidate.step: one for one in store.prune(Keep(last=1), dry_run=True)}
    assert [step for step, one in kept.items() if one.keep] == [4, 5]
    assert kept[4].why == f"not yet safe in {url}"
    done = commands.invoke(capfd, "prune", "--run", tmp_path / "store", "--keep-last", 1, "--json")
    assert [one["step"] for one in done.json["steps"] if one["keep"]] == [4, 5]
    assert [checkpoint.step for checkpoint in store.list()] == [4, 5]
    record = tmp_path / "store/.ckptstore/mirror.json"
    text = record.read_text()
    record.write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        store.prune(Keep(last=1))
    record.write_text(text)
    store.prune(Keep(last=1), unmirrored=True)
    assert [checkpoint.step for checkpoint in store.list()] == [5]


def test_a_step_that_was_lost_there_is_sent_again(tmp_path, url):
    """The record is not believed blindly: what went away in the store is not safe any more."""
    store = CheckpointStore(tmp_path / "store")
    saved(store, 7, tmp_path / "state")
    mirror(store.backend, url)
    target = open_backend(url)
    for blob in list(target.list()):
        target.delete(blob.key)
    assert [sent.step for sent in mirror(store.backend, url)] == [7]


def test_the_newest_goes_first(tmp_path, url, capfd):
    """A machine that may be gone in a minute has its newest step there first, also one that was saved meanwhile."""
    store = CheckpointStore(tmp_path / "store")
    for step in (1, 2, 3):
        saved(store, step, tmp_path / "state")

    def meanwhile(doing: str, done: int, total: int) -> None:
        if doing == "pushing step 3" and store.list()[-1].step != 4:
            saved(store, 4, tmp_path / "state")

    assert [sent.step for sent in mirror(store.backend, url, notify=meanwhile)] == [3, 4, 2, 1]
    saved(store, 5, tmp_path / "state")
    saved(store, 6, tmp_path / "state")
    done = commands.invoke(capfd, "push", "--all", "--run", tmp_path / "store", "--to", url, "--json")
    assert [part["step"] for part in done.json["parts"]] == [6, 5, 4, 3, 2, 1]


def test_an_old_step_gives_way_to_a_newer_one(tmp_path, url, monkeypatch):
    """On a slow line the newest does not wait for a large old one, whose parts stay; it is itself sent to its end."""
    from ckptstore.transfer import mirror as mirroring

    monkeypatch.setattr(mirroring, "LOOK_S", 0)
    store = CheckpointStore(tmp_path / "store")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/large.bin").write_bytes(os.urandom(40 << 20))
    saved(store, 1, tmp_path / "state")
    (tmp_path / "state/large.bin").unlink()
    saved(store, 2, tmp_path / "state")
    newer = {"pushing step 1": 3, "pushing step 3": 4}

    def meanwhile(doing: str, done: int, total: int) -> None:
        if done and (step := newer.pop(doing, 0)):
            saved(store, step, tmp_path / "state")

    sent = mirror(store.backend, url, bandwidth=Bandwidth(100e6), notify=meanwhile)
    if url.startswith("memory"):  # half a file that was sent would be lost
        assert [one.step for one in sent] == [2, 1, 3, 4]
    else:
        assert [one.step for one in sent] == [2, 3, 4, 1]
        assert sent[-1].there_bytes >= 16 << 20
    assert [checkpoint.status for checkpoint in scan(open_backend(url)).checkpoints] == [Status.COMMITTED] * 4


def test_what_a_cut_push_left_waits_for_a_newer_step(tmp_path, s3):
    """Half of step 1 is there when step 2 is saved: 2 goes first, and then the other half of 1."""
    store = CheckpointStore(tmp_path / "store")
    saved(store, 1, tmp_path / "state")
    (tmp_path / "state/more.bin").write_bytes(os.urandom(12 << 20))
    saved(store, 1, tmp_path / "state")

    def cut(doing: str, done: int, total: int) -> None:
        if list(open_backend(s3).list("step-1")):
            raise StorageError("the machine is gone")

    with pytest.raises(StorageError, match="gone"):
        mirror(store.backend, s3, notify=cut)
    saved(store, 2, tmp_path / "state")
    sent = mirror(store.backend, s3)
    assert [one.step for one in sent] == [2, 1]
    assert sent[1].there_bytes > 0


def test_of_a_rollback_what_was_saved_last_goes_first_and_bad_steps_last(run, tmp_path, url):
    """Step 140 was trained anew after 240 was saved; 200 is of a time when the reward was zero."""
    trees.set_age(trees.checkpoint(run, 46), 20_000)
    for step, age_s in ((93, 9000), (200, 7200), (240, 7000), (140, 600)):
        exported(run, step, age_s)
    ledger = run.parent / ".ckptstore/trial0/metrics.jsonl"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()

    def line(step: int, age_s: float) -> str:
        reward = 0.0 if 190 <= step <= 210 else 0.7
        return json.dumps({"step": step, "at": now - age_s, "m": {"grpo_actor/task_reward/avg": reward}})

    lines = [line(step, 9000 - (step - 93) * 13) for step in range(90, 245)] + [line(step, 650) for step in range(130, 141)]
    ledger.write_text("\n".join(lines) + "\n")
    assert [sent.step for sent in mirror(open_backend(run), url)] == [140, 240, 93, 46, 200]
    ledger.unlink()
    ledger.mkdir()
    assert [c.step for c in choose.newest_first(str(run), scan(open_backend(run)).checkpoints)] == [140, 240, 200, 93, 46], (
        "no ledger that can be read: they are sent all the same"
    )


def test_in_the_background(tmp_path, url):
    """Any trainer's store: steps follow as they are saved, in order, and come back from there whole."""
    store = CheckpointStore(tmp_path / "store")
    with store.mirror(url, max_bytes_per_s=50e6) as mirroring:
        assert mirroring.lag.newest_local_step is None
        for step in (10, 20, 30):
            saved(store, step, tmp_path / "state")
        assert mirroring.lag.newest_local_step == 30
        assert mirroring.wait(30)
        lag = mirroring.lag
        assert (lag.newest_safe_step, lag.waiting, lag.behind_steps, lag.problem) == (30, 0, 0, "")
    remote = open_backend(url)
    there = scan(remote)
    assert [(c.step, c.status) for c in there.checkpoints] == [(n, Status.COMMITTED) for n in (10, 20, 30)]
    assert store.prune(Keep(last=1))[0].keep is False
    pull(remote, there.checkpoints[0], str(tmp_path / "back"))
    back = CheckpointStore(tmp_path / "back")
    assert verify(back.backend, back.get(10), Level.FULL).ok


def test_an_outage_is_waited_out(tmp_path, monkeypatch, caplog):
    """Nothing comes to the trainer; it is logged and told, and the next try goes on."""
    from ckptstore.transfer import mirror as mirroring

    monkeypatch.setattr(mirroring, "POLL_S", 0.05)
    url = f"memory://outage-{tmp_path.name}-{os.getpid()}"
    store = CheckpointStore(tmp_path / "store")
    saved(store, 1, tmp_path / "state")
    with store.mirror(url) as running:
        assert running.wait(20)
        with monkeypatch.context() as patch:
            down(patch)
            saved(store, 2, tmp_path / "state")
            assert not running.wait(0.5)
            assert running.lag.problem == "it is down"
            assert [one.keep for one in store.prune(Keep(last=1), dry_run=True)] == [False, True]
            saved(store, 3, tmp_path / "state")
            assert [one.keep for one in store.prune(Keep(last=1), dry_run=True)] == [False, True, True]
        assert running.wait(20)
    assert "it is down" in caplog.text
    assert [checkpoint.step for checkpoint in scan(open_backend(url)).checkpoints] == [1, 2, 3]


def test_what_is_refused_there_keeps_nobody_waiting(tmp_path, s3, monkeypatch, caplog):
    """Two machines train one run by mistake. `wait` ends, the store is not asked without pause, and later steps go at once."""
    from ckptstore.transfer import mirror as mirroring

    passes = []
    monkeypatch.setattr(mirroring, "POLL_S", 1.5)
    monkeypatch.setattr(mirroring, "scan", lambda backend: (passes.append(backend.location), scan(backend))[1])
    other = CheckpointStore(tmp_path / "other")
    saved(other, 1, tmp_path / "state")
    mirror(other.backend, s3)
    store = CheckpointStore(tmp_path / "store")
    saved(store, 1, tmp_path / "state")
    with store.mirror(s3) as running:
        began = time.monotonic()
        assert not any(running.wait(15) for _ in range(3))
        assert time.monotonic() - began < 12
        assert passes.count(s3) <= 5
        assert running.lag.waiting == 1
        assert "with other bytes" in running.lag.problem
        saved(store, 2, tmp_path / "state")
        deadline = time.monotonic() + 7  # the pause is 12 s by now
        while running.lag.newest_safe_step != 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (running.lag.newest_safe_step, running.lag.waiting) == (2, 1)
    assert "Push to another URL" in caplog.text


@pytest.mark.parametrize("way", ["watch", "store"])
def test_what_never_can_be_a_mirror_is_refused_at_once(run, capfd, way):
    """A misspelled scheme: as a mirror it would keep every step on this disk for ever."""
    if way == "watch":
        done = commands.invoke(capfd, "watch", "--run", run, "--to", "s4://bucket/run")
        assert done.code == 2
        assert "s4" in done.err
    else:
        with pytest.raises(UsageError, match="s4"):
            CheckpointStore(run).mirror("s4://bucket/run")
    assert not list(run.parent.rglob("mirror.json"))


def test_closing_does_not_wait_for_a_long_push(tmp_path, s3):
    """It ends in the middle, nothing half is seen there, and the next one goes on."""
    store = CheckpointStore(tmp_path / "store")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/model.bin").write_bytes(os.urandom(40 << 20))
    store.save(1, tmp_path / "state")
    running = store.mirror(s3, max_bytes_per_s=2e6)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not list(open_backend(s3).list()):
        time.sleep(0.05)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 6
    assert all(checkpoint.status is not Status.COMMITTED for checkpoint in scan(open_backend(s3)).checkpoints)
    assert [sent.step for sent in mirror(store.backend, s3)] == [1]
