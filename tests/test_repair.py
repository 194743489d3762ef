"""repair: only what is damaged comes from elsewhere, whatever is damaged, and a kill in the middle loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from ckptstore import listing
from ckptstore import repair as repairing
from ckptstore.backends import open_backend, tries
from ckptstore.errors import AccessError, IntegrityError, NotFoundError, RefusedError, UsageError
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.repair import Repaired, repair
from ckptstore.store import CheckpointStore
from ckptstore.verify import verify, verify_all
from tests import commands, trees
from tests.test_attempts import cut_short
from tests.test_push_pull import EXPORT, add_big_file, flip, keys, other_content, same, send
from tests.test_remote_looking import sealed_run

BIG = "optim_world_size_1_rank_0.pt"


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://repair-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path):
    """A sealed checkpoint with a file of four chunks."""
    run = sealed_run(tmp_path, (46,))
    trees.set_age(add_big_file(run, 25).parent, 3600)
    (run / EXPORT / MANIFEST_NAME).unlink()
    CheckpointStore(run).seal(46)
    return run


@pytest.fixture
def good(run, tmp_path):
    """What it was."""
    return Path(shutil.copytree(run / EXPORT, tmp_path / "good"))


def mend(run: Path | str, replica: Path | str, **options) -> Repaired:
    backend = open_backend(run)
    return repair(backend, listing.scan(backend).checkpoints[0], open_backend(replica), **options)


def as_old(path: Path, change) -> None:
    """Changes a file, and no times: what a disk does."""
    times = path.stat()
    change(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damage_all(run: Path) -> None:
    """Bits in two files, a short one, one that is too long, one of garbage, and one that is gone."""
    folder = run / EXPORT
    flip(folder / BIG, 9 << 20)
    flip(folder / BIG, 26 << 20 if (folder / BIG).stat().st_size > (26 << 20) else (25 << 20) + 100)
    flip(folder / "model.safetensors", 100)
    as_old(folder / "merges.txt", lambda path: os.truncate(path, 3))
    as_old(folder / "config.json", lambda path: path.write_bytes(path.read_bytes() + b"x"))
    as_old(folder / "vocab.json", lambda path: path.write_bytes(random.Random(1).randbytes(path.stat().st_size)))
    (folder / "tokenizer.json").unlink()


def counting(monkeypatch, backend_type) -> list[int]:
    moved: list[int] = []
    real = backend_type.view

    def view(self, key, offset_bytes, length_bytes):
        moved.append(length_bytes)
        return real(self, key, offset_bytes, length_bytes)

    monkeypatch.setattr(backend_type, "view", view)
    return moved


def test_only_what_is_damaged(url, run, good, monkeypatch):
    """Every kind of damage at once; the bytes that come are those of the damaged chunks, and no other file is touched."""
    send(run, url)
    damage_all(run)
    untouched = {path.name: path.stat() for path in (run / EXPORT).iterdir()}
    moved = counting(monkeypatch, type(open_backend(url)))
    done = mend(run, url)
    assert same(run / EXPORT, good)
    kinds = {damage.entry.path: damage.kind for damage in done.damages}
    assert kinds == {
        BIG: "bytes", "model.safetensors": "bytes", "merges.txt": "size", "config.json": "size", "vocab.json": "bytes",
        "tokenizer.json": "missing",
    }  # fmt: skip
    small = sum((good / name).stat().st_size for name in ("model.safetensors", "merges.txt", "vocab.json"))
    wanted = small + (good / "tokenizer.json").stat().st_size + (8 << 20) + (good / BIG).stat().st_size - (24 << 20)
    assert done.moved_bytes == sum(moved) == wanted  # config.json lost nothing: it was cut
    assert sum(damage.bad_bytes for damage in done.damages) == wanted + (good / "config.json").stat().st_size
    assert done.ok
    assert done.report is not None
    assert done.report.checkpoint.status is Status.COMMITTED
    for name, before in untouched.items():
        if name not in kinds:
            assert (run / EXPORT / name).stat() == before
        elif name != "tokenizer.json":
            assert (run / EXPORT / name).stat().st_mode == before.st_mode
    assert not list((run.parent / ".ckptstore" / run.name).glob("stage-*"))
    assert CheckpointStore(run).get(46).status is Status.COMMITTED


def test_nothing_to_do(url, run, good):
    send(run, url)
    done = mend(run, url)
    assert (done.ok, done.damages, done.report) == (True, (), None)


def test_from_another_folder(run, good, tmp_path):
    """The replica may be a disk; what was found damaged earlier is forgotten."""
    shutil.copytree(run, tmp_path / "replica/trial0")
    flip(run / EXPORT / BIG, 9 << 20)
    verify_all(open_backend(run), CheckpointStore(run).list(), Level.FULL)
    assert CheckpointStore(run).get(46).status is Status.CORRUPT
    done = mend(run, tmp_path / "replica/trial0")
    assert (done.ok, done.moved_bytes) == (True, 8 << 20)
    assert same(run / EXPORT, good)
    assert CheckpointStore(run).get(46).status is Status.COMMITTED


def test_a_file_that_was_written_since(url, run, good):
    """It may be a save of the trainer's; or somebody's editor, and then --force says so."""
    send(run, url)
    (run / EXPORT / "merges.txt").write_text("newer")
    with pytest.raises(RefusedError, match="newer save"):
        mend(run, url)
    assert (run / EXPORT / "merges.txt").read_text() == "newer"
    assert mend(run, url, force=True).ok
    assert same(run / EXPORT, good)
    (run / EXPORT / "stranger").write_text("x")
    flip(run / EXPORT / BIG, 0)
    with pytest.raises(RefusedError, match="stranger"):
        mend(run, url, force=True)
    assert (run / EXPORT / "stranger").exists()


def test_only_its_time_changed(url, run, good):
    """A copy that lost its times: nothing is fetched, and the manifest counts again."""
    send(run, url)
    os.utime(run / EXPORT / "merges.txt")
    assert CheckpointStore(run).get(46).status is Status.COMPLETE
    done = mend(run, url)
    assert ([d.kind for d in done.damages], done.moved_bytes, done.ok) == (["time"], 0, True)
    assert CheckpointStore(run).get(46).status is Status.COMMITTED


def test_another_history_repairs_nothing(url, run, tmp_path):
    other = other_content(run, tmp_path)
    send(other, url)
    flip(run / EXPORT / BIG, 9 << 20)
    before = (run / EXPORT / BIG).read_bytes()
    with pytest.raises(IntegrityError, match="other bytes"):
        mend(run, url)
    assert (run / EXPORT / BIG).read_bytes() == before
    with pytest.raises(NotFoundError):
        mend(run, f"{url}/nowhere")


def test_without_a_manifest_nobody_knows(url, run, good):
    send(run, url)
    path = run / EXPORT / MANIFEST_NAME
    as_old(path, lambda path: path.write_bytes(b"garbage"))
    with pytest.raises(IntegrityError, match="no manifest that counts"):
        mend(run, url)
    path.unlink()
    with pytest.raises(IntegrityError, match="no manifest that counts"):
        mend(run, url)


def test_the_replica_is_damaged_too(url, run, good):
    """What it has right is taken; a damaged file is left as it was, and said."""
    send(run, url)
    backend = open_backend(url)
    data = bytearray((good / BIG).read_bytes())
    data[9 << 20] ^= 1
    backend.put(f"{EXPORT}/{BIG}", data)
    flip(run / EXPORT / BIG, 9 << 20)
    before = (run / EXPORT / BIG).read_bytes()
    flip(run / EXPORT / "merges.txt", 0)
    done = mend(run, url)
    assert not done.ok
    assert [damage.entry.path for damage in done.repaired] == ["merges.txt"]
    assert [damage.entry.path for damage, _ in done.failed] == [BIG]
    assert (run / EXPORT / BIG).read_bytes() == before
    flip(run / EXPORT / BIG, 9 << 20)  # back again: then another chunk, which the replica has right
    flip(run / EXPORT / BIG, 0)
    assert mend(run, url).ok
    assert same(run / EXPORT, good)


def test_written_while_it_is_repaired(url, run, good, monkeypatch):
    """The trainer's save is not replaced."""
    send(run, url)
    flip(run / EXPORT / "merges.txt", 0)
    real = repairing._read_back

    def late(*arguments):
        real(*arguments)
        (run / EXPORT / "merges.txt").write_text("newer")

    monkeypatch.setattr(repairing, "_read_back", late)
    done = mend(run, url)
    assert [damage.entry.path for damage, _ in done.failed] == ["merges.txt"]
    assert (run / EXPORT / "merges.txt").read_text() == "newer"


def test_a_link_is_not_written_over(url, run, good, tmp_path):
    send(run, url)
    (run / EXPORT / "merges.txt").unlink()
    (run / EXPORT / "merges.txt").symlink_to(good / "merges.txt")
    with pytest.raises(RefusedError, match="symlink"):
        mend(run, url)


def test_a_store_of_steps(url, tmp_path):
    source = trees.write_model(tmp_path / "model", seed=1)
    store = CheckpointStore(tmp_path / "store")
    store.save(7, source)
    replica = shutil.copytree(tmp_path / "store", tmp_path / "replica")
    flip(tmp_path / "store/step-7/merges.txt", 0)
    (tmp_path / "store/step-7/config.json").unlink()
    assert mend(tmp_path / "store", replica).ok
    assert store.verify(7).ok


# --- the other way -------------------------------------------------------------------------------------------------


def test_a_remote_one_is_repaired(url, run, good, tmp_path):
    """Damaged, short and missing files are sent anew, and no other; there is nothing of another content to overwrite."""
    send(run, url)
    backend = open_backend(url)
    data = bytearray((good / BIG).read_bytes())
    data[-1] ^= 1
    backend.put(f"{EXPORT}/{BIG}", data)
    backend.put(f"{EXPORT}/merges.txt", b"short")
    backend.delete(f"{EXPORT}/vocab.json")
    before = {blob.key: blob for blob in backend.list()}
    would = mend(url, run, dry_run=True)
    assert {blob.key: blob for blob in backend.list()} == before
    assert {d.entry.path: d.kind for d in would.damages} == {BIG: "bytes", "merges.txt": "size", "vocab.json": "missing"}
    done = mend(url, run)
    assert done.ok
    assert done.moved_bytes == sum((good / name).stat().st_size for name in (BIG, "merges.txt", "vocab.json"))
    after = {blob.key: blob for blob in backend.list()}
    sent = {f"{EXPORT}/{name}" for name in (BIG, "merges.txt", "vocab.json")}
    assert {k: b for k, b in after.items() if k not in sent} == {k: b for k, b in before.items() if k not in sent}
    report = verify(backend, listing.scan(backend).checkpoints[0], Level.FULL)
    assert report.checkpoint.status is Status.COMMITTED
    assert same(run / EXPORT, good)
    assert mend(url, run).damages == ()


def test_what_is_damaged_here_is_not_sent(url, run, good):
    send(run, url)
    backend = open_backend(url)
    backend.delete(f"{EXPORT}/{BIG}")
    flip(run / EXPORT / BIG, 9 << 20)
    done = mend(url, run)
    assert (done.ok, [damage.entry.path for damage, _ in done.failed]) == (False, [BIG])
    assert f"{EXPORT}/{BIG}" not in keys(url)


def test_an_attempt(run, good, tmp_path, monkeypatch):
    """Both ways, where the manifest there names a folder of its own."""
    url = f"memory://repair-attempt-{tmp_path.name}-{os.getpid()}"
    cut_short(other_content(run, tmp_path), url, monkeypatch)
    (sent,) = send(run, url)
    base = sent.url.removeprefix(f"{url}/")
    assert base != EXPORT
    backend = open_backend(url)
    backend.delete(f"{base}/vocab.json")
    assert [damage.entry.path for damage in mend(url, run).repaired] == ["vocab.json"]
    assert f"{base}/vocab.json" in keys(url)
    (run / EXPORT / "vocab.json").unlink()
    assert mend(run, url).ok
    assert same(run / EXPORT, good)


def test_two_urls(url, run):
    with pytest.raises(UsageError):
        mend(url, url) if send(run, url) else None


def test_an_outage_is_no_damage(seaweed, s3, run, good, monkeypatch):
    """A store that refuses repairs nothing and is blamed for nothing."""
    send(run, s3)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    with pytest.raises(AccessError):
        mend(s3, run)


# --- as people use it, and killed ----------------------------------------------------------------------------------


def test_command_line(url, run, good, tmp_path, capfd, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    send(run, url)
    words = ("repair", "46", "--run", run)
    assert commands.invoke(capfd, *words).code == 2
    fine = commands.invoke(capfd, *words, "--from", url)
    assert (fine.code, "nothing is damaged" in fine.out) == (0, True)
    damage_all(run)
    before = {path.name: path.read_bytes() for path in (run / EXPORT).iterdir()}
    would = commands.invoke(capfd, *words, "--from", url, "--dry-run", "--json")
    assert (would.code, would.json["ok"], would.json["done"]) == (3, False, False)
    assert {(file["path"], file["kind"]) for file in would.json["files"]} >= {("merges.txt", "size"), (BIG, "bytes")}
    assert {path.name: path.read_bytes() for path in (run / EXPORT).iterdir()} == before
    assert "6 files would be repaired" in commands.invoke(capfd, *words, "--from", url, "--dry-run").out
    done = commands.invoke(capfd, *words, "--from", url, "--json")
    assert (done.code, done.json["ok"], {file["repaired"] for file in done.json["files"]}) == (0, True, {True})
    assert same(run / EXPORT, good)
    open_backend(url).delete(f"{EXPORT}/merges.txt")
    flip(run / EXPORT / "merges.txt", 0)
    lost = commands.invoke(capfd, *words, "--from", url)
    assert (lost.code, "missing too" in lost.err + lost.out) == (3, True)
    assert commands.invoke(capfd, "repair", "46", "47", "--run", run, "--from", url).code == 2


CHILD = """
import os, signal, sys
from ckptstore import cli
import ckptstore.repair, ckptstore.cli.repair
nth, where, seen = int(sys.argv[1]), sys.argv[2], 0
def look(event, arguments):
    global seen
    if event in ("os.rename", "os.utime", "os.truncate", "os.chmod", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
        seen += any(str(argument).startswith(where) for argument in arguments)
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(look)
code = cli.run(sys.argv[3:])
print(seen, file=sys.stderr)
sys.exit(code)
"""


class Killing:
    """Kills one repair after the other, each of the same damaged run, and judges what each left."""

    def __init__(self, run: Path, good: Path, folder: Path) -> None:
        self.run, self.good, self.template = run, good, folder / "template"
        self.replica = folder / "replica/trial0"
        shutil.copytree(run, self.replica)
        damage_all(run)
        shutil.copytree(run, self.template)
        self.damaged = {path.name: path.read_bytes() for path in (run / EXPORT).iterdir()}
        self.states: set[int] = set()

    def strike(self, nth: int, *, below: Path | None = None) -> int:
        """Kill at the nth operation (on paths `below`); how many there were, where it came to its end."""
        shutil.rmtree(self.run.parent / ".ckptstore", ignore_errors=True)
        shutil.rmtree(self.run)
        shutil.copytree(self.template, self.run)
        words = [str(nth), str(below or ""), "repair", "46", "--run", str(self.run), "--from", str(self.replica), "--json"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", CHILD, *words], env=environment, capture_output=True, check=False)
        now = {path.name: path.read_bytes() for path in (self.run / EXPORT).iterdir()}
        right = {path.name: path.read_bytes() for path in self.good.iterdir()}
        for name in right:
            assert now.get(name) in (self.damaged.get(name), right[name]), (nth, name)
        assert now.keys() <= right.keys(), (nth, now.keys())
        self.states.add(sum(now.get(name) == right[name] for name in right))
        if done.returncode == 0:
            assert json.loads(done.stdout)["ok"]
            return int(done.stderr.split()[-1])
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert mend(self.run, self.replica).ok, nth
        assert same(self.run / EXPORT, self.good), nth
        return 0


def test_killed_in_the_middle(run, good, tmp_path):
    """At what it does in the checkpoint: every file is what it was or whole, and the same command ends it."""
    killing = Killing(run, good, tmp_path)
    operations = killing.strike(10**9, below=run / EXPORT)
    assert operations >= 12
    for nth in range(2, operations + 1, 3):
        assert killing.strike(nth, below=run / EXPORT) == 0
    assert len(killing.states) >= 3, killing.states


@pytest.mark.soak
def test_killed_at_every_operation(run, good, tmp_path):
    killing = Killing(run, good, tmp_path)
    operations = killing.strike(10**9)
    for nth in range(1, operations + 1):
        assert killing.strike(nth) == 0
    assert len(killing.states) == 7, killing.states
    print(f"\nkilled at each of {operations} operations")
