"""push and pull: a checkpoint into a store and back, whole or not at all, and never twice."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from ckptstore import listing
from ckptstore import side as side_folders
from ckptstore.backends import open_backend, profile
from ckptstore.errors import (
    AccessError,
    AlreadyExistsError,
    BusyError,
    DigestMismatchError,
    IntegrityError,
    ManifestError,
    SourceChangedError,
    StorageError,
    TransitError,
    UsageError,
)
from ckptstore.model import ATTEMPT_PREFIX, MANIFEST_NAME, Level, Status
from ckptstore.model import CLAIM_NAME as CLAIM
from ckptstore.store import CheckpointStore
from ckptstore.transfer import fetching, sending
from ckptstore.transfer import push as pushing
from ckptstore.transfer.pull import pull
from ckptstore.transfer.push import push
from ckptstore.verify import verify
from tests import commands, servers, trees
from tests.test_remote_looking import sealed_run, upload

EXPORT = f"default/{trees.folder_name(46)}"


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://moving-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path):
    return sealed_run(tmp_path)


def add_big_file(run: Path, megabytes: int = 40, step: int = 46) -> Path:
    """A weights file of several parts and chunks (no structure that is checked: an optimizer's)."""
    path = run / "default" / trees.folder_name(step) / "optim_world_size_1_rank_0.pt"
    path.write_bytes(os.urandom((megabytes << 20) + 12345))
    return path


def send(run: Path, url: str, step: int = 46, **options) -> list[pushing.Sent]:
    backend = open_backend(run)
    return push(backend, CheckpointStore(run).get(step), open_backend(url), **options)


def bring(url: str, run: Path, step: int = 46, **options):
    backend = open_backend(url)
    checkpoint = next(c for c in listing.scan(backend).checkpoints if c.step == step)
    return pull(backend, checkpoint, str(run), **options)


def same(one: Path, other: Path) -> bool:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    return filecmp.cmpfiles(one, other, names, shallow=False)[1:] == ([], [])


def keys(url: str) -> list[str]:
    return sorted(blob.key for blob in open_backend(url).list())


def test_there_and_back(url, run, tmp_path):
    """All files, names, times and the manifest itself: its SHA-256 can be pinned across the way."""
    sent = send(run, url)
    assert [(s.part, s.there_bytes, s.committed_before) for s in sent] == [("default", 0, False)]
    assert sent[0].sent_bytes == CheckpointStore(run).get(46).size_bytes
    remote = listing.scan(open_backend(url))
    assert [(c.step, c.status) for c in remote.checkpoints] == [(46, Status.COMMITTED)]
    assert verify(open_backend(url), remote.checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED
    there = tmp_path / "new/box/trial0"
    fetched = bring(url, there)
    assert same(run / EXPORT, there / EXPORT)
    for path in (run / EXPORT).iterdir():
        if path.name != MANIFEST_NAME:
            assert path.stat().st_mtime_ns == (there / EXPORT / path.name).stat().st_mtime_ns
    store = CheckpointStore(there)
    assert [(c.step, c.status) for c in store.list()] == [(46, Status.COMMITTED)]
    report = store.verify(46)
    assert report.ok
    assert report.manifest_sha256 == (sent[0].manifest_sha256,) == (fetched[0].manifest_sha256,)
    assert sorted(os.listdir(there.parent / ".ckptstore/trial0")) in (["lock"], [])
    assert not any(CLAIM in key or "probe" in key for key in keys(url))


def test_large_files(url, run, tmp_path):
    """Of several parts and chunks."""
    trees.set_age(add_big_file(run).parent, 3600)
    CheckpointStore(run).seal(46)
    send(run, url)
    bring(url, tmp_path / "there")
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)


def test_several_parts_of_a_checkpoint(url, tmp_path):
    run = trees.make_run(tmp_path, steps=(46,), parts=("critic", "default"))
    sent = send(run, url)
    assert [s.part for s in sent] == ["critic", "default"]
    assert [f.part for f in bring(url, tmp_path / "there")] == ["critic", "default"]
    found = CheckpointStore(tmp_path / "there").get(46)
    assert (found.status, {part.name for part in found.parts}) == (Status.COMMITTED, {"critic", "default"})


def test_not_sealed(url, tmp_path):
    """It gets a manifest there; nothing is written here."""
    run = trees.make_run(tmp_path, steps=(46,))
    send(run, url)
    assert not (run / EXPORT / MANIFEST_NAME).exists()
    assert listing.scan(open_backend(url)).checkpoints[0].status is Status.COMMITTED
    again = send(run, url)
    assert (again[0].committed_before, again[0].sent_bytes) == (True, 0)


def test_pushed_twice(url, run):
    """Nothing is sent again, and nothing changes."""
    first = send(run, url)
    before = {blob.key: blob for blob in open_backend(url).list()}
    again = send(run, url)
    assert (again[0].sent_bytes, again[0].committed_before) == (0, True)
    assert again[0].manifest_sha256 == first[0].manifest_sha256
    assert {blob.key: blob for blob in open_backend(url).list()} == before


def test_pulled_twice(url, run, tmp_path):
    send(run, url)
    bring(url, tmp_path / "there")
    again = bring(url, tmp_path / "there")
    assert (again[0].there_before, again[0].fetched_bytes) == (True, 0)


def test_a_file_lost_there_is_sent_again(url, run):
    send(run, url)
    open_backend(url).delete(f"{EXPORT}/vocab.json")
    again = send(run, url)
    assert again[0].sent_bytes == (run / EXPORT / "vocab.json").stat().st_size
    assert listing.scan(open_backend(url)).checkpoints[0].status is Status.COMMITTED


def test_killed_when_all_was_in_its_place(url, run, tmp_path, monkeypatch):
    """The next pull finds that it is there, and removes the stage that was left."""

    def killed(*args):
        raise KeyboardInterrupt

    send(run, url)
    there = tmp_path / "box/trial0"
    with monkeypatch.context() as patch:
        patch.setattr(side_folders, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(url, there)
    side = there.parent / ".ckptstore/trial0"
    assert list(side.glob("stage-*"))
    assert bring(url, there)[0].there_before
    assert not list(side.glob("stage-*"))


def test_dry_runs_change_nothing(url, run, tmp_path):
    would = send(run, url, dry_run=True)
    assert would[0].sent_bytes == CheckpointStore(run).get(46).size_bytes
    assert keys(url) == []
    send(run, url)
    before = sorted(tmp_path.rglob("*"))
    assert bring(url, tmp_path / "there", dry_run=True)[0].fetched_bytes == would[0].sent_bytes
    assert sorted(tmp_path.rglob("*")) == before


# --- what is not whole does not travel -----------------------------------------------------------------------------


def test_a_damaged_file_is_not_pushed(url, run):
    """Its manifest says so while it is read; nothing is committed, and the file itself never arrives."""
    path = add_big_file(run)
    trees.set_age(path.parent, 3600)
    CheckpointStore(run).seal(46)
    flip(path, 20 << 20)
    with pytest.raises(DigestMismatchError, match="optim"):
        send(run, url)
    assert not any(key.endswith((MANIFEST_NAME, path.name)) for key in keys(url))


def flip(path: Path, position: int) -> None:
    """Another bit, the same times."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 4]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_partial_checkpoint_is_not_pushed(url, run):
    (run / EXPORT / "config.json").unlink()
    with pytest.raises(IntegrityError, match="PARTIAL"):
        send(run, url)
    assert keys(url) == []


def test_a_save_meanwhile_is_not_pushed(url, run, monkeypatch):
    """The trainer writes into the checkpoint after its files were read."""
    real = pushing._Push._look_again

    def late(self):
        real(self)
        (run / EXPORT / "merges.txt").write_text("another")

    monkeypatch.setattr(pushing._Push, "_look_again", late)
    with pytest.raises(SourceChangedError):
        send(run, url)
    assert not any(key.endswith(MANIFEST_NAME) for key in keys(url))


@pytest.mark.parametrize("position", [0, 17 << 20, -1])
def test_a_flipped_bit_there_is_not_pulled(url, run, tmp_path, position):
    path = add_big_file(run, 20)
    trees.set_age(path.parent, 3600)
    CheckpointStore(run).seal(46)
    send(run, url)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    open_backend(url).put(f"{EXPORT}/{path.name}", data)
    with pytest.raises(DigestMismatchError, match=path.name):
        bring(url, tmp_path / "there")
    assert CheckpointStore(tmp_path / "there").list() == ()


def test_a_torn_file_there_is_not_pulled(url, run, tmp_path):
    send(run, url)
    open_backend(url).put(f"{EXPORT}/model.safetensors", b"short")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        bring(url, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_without_a_manifest(url, tmp_path):
    """What another tool uploaded: structure checked, and said to be no more than that."""
    run = trees.make_run(tmp_path, steps=(46, 93))
    upload(run, open_backend(url))
    fetched = bring(url, tmp_path / "there")
    assert "nobody can say" in fetched[0].notes[0]
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)
    assert CheckpointStore(tmp_path / "there").get(46).status is Status.COMPLETE
    weights = f"default/{trees.folder_name(93)}/model.safetensors"
    data = (run / weights).read_bytes()
    open_backend(url).put(weights, data[:8] + b"X" + data[9:])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        bring(url, tmp_path / "there", 93)
    assert [c.step for c in CheckpointStore(tmp_path / "there").list()] == [46]


# --- two writers, and what others put there ------------------------------------------------------------------------


def other_content(run: Path, folder: Path) -> Path:
    """The same step with other bytes: a history that was rolled back."""
    copy = folder / "other/trial0"
    shutil.copytree(run, copy)
    (copy / EXPORT / MANIFEST_NAME).unlink()
    (copy / EXPORT / "merges.txt").write_text("#version: 0.2\nx y\nz w\n")
    (copy / EXPORT / "added_tokens.json").write_text("{}")
    (copy / EXPORT / "generation_config.json").unlink()
    trees.set_age(copy / "default", 3600)
    return copy


def test_another_content_is_never_replaced(url, run, tmp_path):
    send(run, url)
    before = {blob.key: blob for blob in open_backend(url).list()}
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        send(other_content(run, tmp_path), url)
    assert {blob.key: blob for blob in open_backend(url).list()} == before


@pytest.mark.parametrize("other", [False, True])
def test_a_claim_of_another_content_is_respected(url, run, tmp_path, monkeypatch, other):
    """A push that died, or is alive: its keys are not touched. Who comes second writes beside them, and may win."""
    with monkeypatch.context() as planted:
        planted.setattr(pushing._Push, "_look_again", lambda self: crash())
        with pytest.raises(KeyboardInterrupt):
            send(run, url)
    before = {blob.key: blob for blob in open_backend(url).list()}
    assert any(CLAIM in key for key in before)
    found = listing.scan(open_backend(url)).checkpoints[0]
    assert (found.status, "push is at work" in str(found.findings)) == (Status.PARTIAL, True)
    if not other:
        again = send(run, url)
        assert (again[0].sent_bytes, again[0].committed_before) == (0, False)
        assert listing.scan(open_backend(url)).checkpoints[0].status is Status.COMMITTED
        return
    (won,) = send(other_content(run, tmp_path), url)
    after = {blob.key: blob for blob in open_backend(url).list()}
    assert {key: after[key] for key in before} == before
    assert ATTEMPT_PREFIX in won.url
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        send(run, url)
    assert {blob.key: blob for blob in open_backend(url).list()} == after
    assert listing.scan(open_backend(url)).checkpoints[0].status is Status.COMMITTED


def crash():
    raise KeyboardInterrupt


def test_a_folder_that_a_console_made_is_no_file(s3, run):
    """An empty object whose key ends with a slash: of the run, and of the step."""
    for folder in (s3, f"{s3}/{EXPORT}"):
        servers.make_folder(folder)
    assert "" not in keys(s3)
    assert not send(run, s3)[0].committed_before
    assert [checkpoint.status for checkpoint in listing.scan(open_backend(s3)).checkpoints] == [Status.COMMITTED]


def test_files_of_others_are_not_touched(url, run):
    upload(run, open_backend(url), but=(MANIFEST_NAME,))
    before = {blob.key: blob for blob in open_backend(url).list()}
    with pytest.raises(AlreadyExistsError, match="no push of ckptstore"):
        send(run, url)
    assert {blob.key: blob for blob in open_backend(url).list()} == before


def test_strangers_during_a_push_stop_it(url, run, monkeypatch):
    real = pushing._Push.send

    def with_stranger(self, *arguments, **options):
        real(self, *arguments, **options)
        self.target.put(f"{self.folder}/stranger", b"x")

    monkeypatch.setattr(pushing._Push, "send", with_stranger)
    with pytest.raises(StorageError, match="stranger"):
        send(run, url)
    assert not any(key.endswith(MANIFEST_NAME) for key in keys(url))


@pytest.mark.parametrize("equal", [True, False])
def test_two_writers_at_once(s3, run, tmp_path, equal):
    """Of other bytes one wins and the other is told; of the same bytes both succeed. What is there is one of them, whole."""
    second = run
    if not equal:
        second = other_content(run, tmp_path)
    for attempt in range(3):
        url = f"{s3}/{attempt}"
        outcomes: dict[int, object] = {}

        def write(number: int, source: Path, url: str = url, outcomes: dict[int, object] = outcomes) -> None:
            try:
                outcomes[number] = send(source, url)
            except (AlreadyExistsError, BusyError) as error:
                outcomes[number] = error

        crew = [threading.Thread(target=write, args=(n, source)) for n, source in enumerate((run, second))]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        winners = [source for n, source in enumerate((run, second)) if isinstance(outcomes[n], list)]
        assert len(winners) == (2 if equal else 1), outcomes
        bring(url, tmp_path / f"there-{attempt}")
        merges = f"{EXPORT}/merges.txt"
        assert (tmp_path / f"there-{attempt}" / merges).read_bytes() == (winners[0] / merges).read_bytes()
        remote = open_backend(url)
        assert verify(remote, listing.scan(remote).checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED


def test_a_store_without_conditions_is_named(run, s3, monkeypatch):
    """One that overwrites on a create-only put."""
    from ckptstore.backends.object import ObjectBackend

    real = ObjectBackend.put
    monkeypatch.setattr(ObjectBackend, "put", lambda self, key, data, *, if_absent=False: real(self, key, data))
    assert "does not keep two writers apart" in send(run, s3)[0].notes[0]


def test_what_lies_here_is_not_replaced(url, run, tmp_path):
    """Neither another checkpoint of this name nor one that cannot be compared."""
    send(run, url)
    there = tmp_path / "there"
    shutil.copytree(run / EXPORT, there / EXPORT)
    (there / EXPORT / MANIFEST_NAME).unlink()
    with pytest.raises(AlreadyExistsError, match="not the same"):
        bring(url, there)
    assert (there / EXPORT / "merges.txt").read_bytes() == (run / EXPORT / "merges.txt").read_bytes()
    shutil.rmtree(there / EXPORT)
    (there / EXPORT).mkdir()
    bring(url, there)
    assert same(run / EXPORT, there / EXPORT)


# --- interrupted ---------------------------------------------------------------------------------------------------


def test_an_interrupted_pull_goes_on(url, run, tmp_path, monkeypatch):
    """With the chunks that are here and right; those that are wrong are fetched again."""
    path = add_big_file(run, 64)
    trees.set_age(path.parent, 3600)
    CheckpointStore(run).seal(46)
    send(run, url)
    seen = 0

    def stop_half_way(doing: str, done: int, total: int) -> None:
        nonlocal seen
        seen = done
        if done >= total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        bring(url, tmp_path / "there", notify=stop_half_way)
    assert CheckpointStore(tmp_path / "there").list() == ()
    stage = next((tmp_path / ".ckptstore/there").glob("stage-*/default"))
    again = bring(url, tmp_path / "there") if seen else None
    assert again is not None
    assert again[0].kept_bytes >= min(seen, 16 << 20)
    assert again[0].fetched_bytes + again[0].kept_bytes == CheckpointStore(run).get(46).size_bytes
    assert not stage.exists()
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)


def test_wrong_chunks_in_a_stage_are_fetched_again(url, run, tmp_path, monkeypatch):
    import ckptstore.transfer.pull as pulling

    path = add_big_file(run, 30)
    trees.set_age(path.parent, 3600)
    CheckpointStore(run).seal(46)
    send(run, url)
    with monkeypatch.context() as planted:
        planted.setattr(pulling, "_publish", lambda *a, **k: crash())
        with pytest.raises(KeyboardInterrupt):
            bring(url, tmp_path / "there")
    staged = next((tmp_path / ".ckptstore/there").glob("stage-*/default")) / path.name
    flip(staged, 9 << 20)
    again = bring(url, tmp_path / "there")
    assert again[0].fetched_bytes == 8 << 20
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)


def each_in_turn(jobs, work, *, threads, tick):
    """The smallest file first, and its parts in order, on this thread."""
    for job in sorted(jobs, key=lambda file: getattr(file, "size_bytes", 0)):
        work(job, sending.parallel.Stop())


def test_an_interrupted_push_goes_on(url, run, monkeypatch):
    """With the files that arrived, and on S3 with the parts."""
    path = add_big_file(run, 20)
    trees.set_age(path.parent, 3600)
    CheckpointStore(run).seal(46)
    real = pushing._Push._fill

    def stop_at_its_second_part(self, fill, file, start, view, *, crc):
        if start >= sending.PART_BYTES:
            raise KeyboardInterrupt
        return real(self, fill, file, start, view, crc=crc)

    with monkeypatch.context() as planted:
        planted.setattr(pushing._Push, "_fill", stop_at_its_second_part)
        planted.setattr(sending.parallel, "each", each_in_turn)
        with pytest.raises(KeyboardInterrupt):
            send(run, url)
    assert not any(key.endswith((MANIFEST_NAME, path.name)) for key in keys(url))
    again = send(run, url)
    arrived = sending.PART_BYTES if url.startswith("s3:") else 0
    assert again[0].sent_bytes == path.stat().st_size - arrived
    assert listing.scan(open_backend(url)).checkpoints[0].status is Status.COMMITTED


def test_part_sizes():
    """Never more parts than a store takes, and one size for an object."""
    for size in (1, 16 << 20, 144 << 30, (144 << 30) + (1 << 20), 5 << 40):
        part = sending.part_size(size)
        assert -(-size // part) <= sending.MAX_PARTS
        assert part % (8 << 20) == 0
    assert sending.part_size(10 << 30) == sending.PART_BYTES


# --- as people use it ----------------------------------------------------------------------------------------------


def test_other_tools_get_a_loadable_folder(seaweed, s3, run, tmp_path):
    """`aws s3 cp --recursive` of what we pushed."""
    send(run, s3)
    there = tmp_path / "there" / EXPORT
    environment = {**os.environ, **seaweed.environment()}
    subprocess.run(
        ["aws", "--endpoint-url", environment["AWS_ENDPOINT_URL"], "s3", "cp", "--recursive", f"{s3}/{EXPORT}", str(there)],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert same(run / EXPORT, there)
    assert CheckpointStore(tmp_path / "there").get(46).status.usable


def test_command_line(url, run, tmp_path, capfd, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    there = tmp_path / "there"
    would = commands.invoke(capfd, "push", "--all", "--run", run, "--to", url, "--dry-run", "--json").json
    assert (would["done"], [p["step"] for p in would["parts"]]) == (False, [93, 46])
    assert keys(url) == []
    done = commands.invoke(capfd, "push", "46", "93", "--run", run, "--to", url)
    assert done.code == 0, done.err
    assert done.out.count("is committed") == 2
    monkeypatch.setenv("CKPTSTORE_URL", url)
    again = commands.invoke(capfd, "push", "--latest", "--run", run, "--json").json
    assert [(p["step"], p["sent_bytes"], p["committed_before"]) for p in again["parts"]] == [(93, 0, True)]
    pulled = commands.invoke(capfd, "pull", "--log-step", "47", "--to", there, "--json")
    assert pulled.code == 0, pulled.out
    assert [(p["step"], p["there_before"]) for p in pulled.json["parts"]] == [(46, False)]
    assert "93" in commands.invoke(capfd, "pull", "--latest", "--to", there).out
    assert json.loads(commands.invoke(capfd, "verify", "--run", there, "--json").out)["ok"]
    assert commands.invoke(capfd, "pull", "--all", "--to", there).out.count("here already") == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("push", "--latest"), "--to is missing"),
        (("push", "--latest", "--to", "/tmp/folder"), "is no URL"),
        (("push", "--to", "memory://x/y"), "name steps"),
        (("push", "46", "--latest", "--to", "memory://x/y"), "name steps"),
        (("push", "--latest", "--to", "s3://me:hush@bucket/x"), "credentials in it"),
    ],
)
def test_usage(words, text, run, tmp_path, capfd, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    done = commands.invoke(capfd, *words, "--run", run)
    assert done.code == 2
    assert text in done.err
    assert "hush" not in done.err


def test_pull_usage(tmp_path, capfd, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    assert "folder of this machine" in commands.invoke(capfd, "pull", "46", "--from", "memory://x/y", "--to", "s3://b/x").err
    assert commands.invoke(capfd, "pull", "46", "--from", "memory://x/nowhere", "--to", tmp_path / "there").code == 1
    assert not (tmp_path / "there").exists()


def test_a_folder_is_no_target(run, tmp_path):
    with pytest.raises(UsageError):
        push(open_backend(run), CheckpointStore(run).get(46), open_backend(tmp_path / "x"))


def test_names_from_a_store_are_not_trusted(run, tmp_path):
    """A manifest that names a file outside."""
    url = f"memory://names-{tmp_path.name}-{os.getpid()}"
    send(run, url)
    backend = open_backend(url)
    key = f"{EXPORT}/{MANIFEST_NAME}"
    backend.put(key, backend.get(key).replace(b'"merges.txt"', b'"../../x"'))
    with pytest.raises(ManifestError, match="unsafe"):
        bring(url, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    checkpoint = listing.scan(backend).checkpoints[0]
    assert verify(backend, checkpoint, Level.QUICK).checkpoint.status is Status.COMPLETE


def test_results_are_plain(run, s3):
    assert dataclasses.asdict(send(run, s3)[0])["url"] == f"{s3}/{EXPORT}"


def test_progress_counts_what_others_sent_meanwhile():
    """A file that is sent again takes back what it had told, and nothing of another one's."""
    there, again, told = threading.Event(), iter([True]), []

    def damaged_once() -> None:
        if next(again, False):
            assert there.wait(10)
            raise TransitError("damaged", operation="comparing", path="a")

    target = open_backend(f"memory://progress-{os.getpid()}")
    files = [
        sending.Outgoing("a", 10, lambda part_bytes: iter([b"a" * 10]), damaged_once),
        sending.Outgoing("b", 5, lambda part_bytes: iter([b"b" * 5]), there.set),
    ]
    sending.send(target, files, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (15, 15)


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "localhost", "http://", "http://ho st", "http://host:port", "http://me:hunter2@"]
)
def test_an_endpoint_that_is_no_url_is_said_and_no_crash(endpoint, monkeypatch, capfd):
    """obstore panics over it, at the first request; its name is repeated, and no password in it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    result = commands.invoke(capfd, "list", "--run", "s3://bucket/run")
    assert result.code == 2
    assert "is no URL" in result.err
    assert "$AWS_ENDPOINT_URL" in result.err
    assert "hunter2" not in result.err


def test_an_upper_case_scheme_is_one_too(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("http", "HTTP"))
    open_backend(s3).put("key", b"1")


def test_without_keys_it_is_said_who_was_asked(s3, monkeypatch, tmp_path):
    """A machine without a role answers in words that nobody understands."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "No key is set" in profile.whose()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert profile.whose() == ""
    with pytest.raises(AccessError) as caught:
        open_backend(s3).put("key", b"1")
    assert "<" not in str(caught.value), "the store's words, and not its XML"
    assert "403 Forbidden: InvalidAccessKeyId: " in str(caught.value)
