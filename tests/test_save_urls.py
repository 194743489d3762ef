"""Saves into a store at a URL: whole or not seen, whatever fails; loaded by ranges, each checked."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, listing, native, retention
from ckptstore.backends import open_backend, tries
from ckptstore.backends.fsspec import FsspecBackend
from ckptstore.errors import (
    CommitUncertain,
    IntegrityError,
    NotCommitted,
    NotFoundError,
    NothingToResumeError,
    RefusedError,
    SourceChangedError,
    StorageError,
    TransitError,
    UsageError,
)
from ckptstore.frameworks.steps import generations_in
from ckptstore.model import ATTEMPT_PREFIX, MANIFEST_NAME, Status
from ckptstore.parts import read_manifest
from ckptstore.retention import Keep
from ckptstore.saves import uploading
from ckptstore.transfer import claims
from ckptstore.transfer import push as pushing
from ckptstore.transfer.mirror import mirror
from ckptstore.transfer.pull import pull
from ckptstore.transfer.server_digests import Said
from tests import commands, faults, servers, warm
from tests.test_push_pull import send
from tests.test_remote_looking import sealed_run
from tests.test_server_digests import damaging

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"memory://saving-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


def make_source(folder: Path, seed: int = 0) -> Path:
    """A small file, one of several parts and chunks, an empty one, one in a folder."""
    (folder / "sub").mkdir(parents=True)
    dice = random.Random(seed)
    (folder / "small.json").write_bytes(dice.randbytes(100))
    (folder / "large.bin").write_bytes(dice.randbytes((17 << 20) + 12345))
    (folder / "empty").write_bytes(b"")
    (folder / "sub/some.bin").write_bytes(dice.randbytes(1 << 20))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }


def keys(url: str) -> list[str]:
    return sorted(blob.key for blob in open_backend(url).list())


def names(url: str) -> list[tuple[int, int, bool]]:
    """The steps' folders there: step, generation, whether it has a manifest."""
    return sorted((found.step, found.number, found.committed) for found in generations_in(open_backend(url).tree()))


def fetch(url: str, step: int, there: Path) -> dict[str, bytes]:
    backend = open_backend(url)
    checkpoint = next(found for found in listing.scan(backend).checkpoints if found.step == step)
    (fetched,) = pull(backend, checkpoint, str(there))
    return content(Path(fetched.path))


# --- files ---------------------------------------------------------------------------------------------------------


def test_files_there_and_back(url: str, source: Path, tmp_path: Path) -> None:
    store = CheckpointStore(url)
    seen = []
    manifest = store.save(5, source, metrics={"loss": 0.5, "nan": float("nan")}, progress=lambda *both: seen.append(both))
    assert seen[-1] == (sum(map(len, content(source).values())),) * 2
    assert (manifest.step, manifest.metrics, manifest.source) == (5, {"loss": 0.5}, "source")
    (checkpoint,) = store.list()
    assert (checkpoint.step, checkpoint.status, checkpoint.file_count) == (5, Status.COMMITTED, 4)
    report = store.verify(5)
    assert report.ok
    assert report.manifest_sha256 == (manifest.sha256,)
    expected = native.digest_files(source, [native.FileSpec("large.bin", (17 << 20) + 12345)])["large.bin"]
    assert {entry.path: entry.crc for entry in manifest.files}["large.bin"] == expected.crc  # type: ignore[union-attr]
    assert fetch(url, 5, tmp_path / "there") == content(source)
    assert (tmp_path / "there/step-5").is_dir(), "a disk needs no generations"
    assert CheckpointStore(tmp_path / "there").verify(5).ok


def test_saved_again_is_replaced(url: str, source: Path, tmp_path: Path) -> None:
    store = CheckpointStore(url)
    store.save(5, source)
    store.save(6, source)
    other = make_source(tmp_path / "other", seed=1)
    store.save(5, other)
    assert names(url) == [(5, 2, True), (6, 1, True)], "the first one is gone"
    assert fetch(url, 5, tmp_path / "there") == content(other)
    assert store.verify(5).ok


def test_the_old_one_is_untouched_until_the_new_one_is_there(url: str, source: Path, tmp_path: Path) -> None:
    store = CheckpointStore(url)
    store.save(5, source)
    before = keys(url)
    backend = open_backend(url)
    upload = uploading.begin(backend, 5)
    uploading.write(backend, upload.prefix, {"a": uploading.Memory([b"new"])})
    assert store.verify(5).ok
    assert set(before) < set(keys(url))
    assert fetch(url, 5, tmp_path / "there") == content(source)
    with_draft = keys(url)
    upload.process += 1  # as seen by a child that was forked meanwhile
    uploading.discard(upload)
    assert keys(url) == with_draft
    upload.process -= 1
    uploading.discard(upload)
    assert keys(url) == before


def test_what_is_not_whole_is_not_seen(url: str, source: Path) -> None:
    backend = open_backend(url)
    upload = uploading.begin(backend, 1)
    written = uploading.write(backend, upload.prefix, {"state.json": uploading.Memory([b"{}"])})
    assert list(CheckpointStore(url)) == []
    assert CheckpointStore(url).latest() is None
    missing = written | {"more": written["state.json"]}
    with pytest.raises(NotCommitted, match="more is not what was written there"):
        uploading.publish(upload, missing)
    backend.put(f"{upload.prefix}/state.json", b"{} ")
    with pytest.raises(NotCommitted, match=r"state\.json is not what was written there: 3, not 2"):
        uploading.publish(upload, written)
    backend.put(f"{upload.prefix}/state.json", b"{}")
    backend.put(f"{upload.prefix}/stranger", b"")
    with pytest.raises(NotCommitted, match="stranger"):
        uploading.publish(upload, written)
    backend.delete(f"{upload.prefix}/stranger")
    uploading.publish(upload, written)
    assert [one.step for one in CheckpointStore(url)] == [1]


def test_dead_drafts_go(url: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the same step with the next save, others after a day."""
    backend = open_backend(url)
    for step in (1, 2):
        upload = uploading.begin(backend, step)
        uploading.write(backend, upload.prefix, {"a": uploading.Memory([b"x"])})
    store = CheckpointStore(url)
    store.save(1, source)
    assert names(url) == [(1, 2, True), (2, 1, False)]
    monkeypatch.setattr(uploading, "STALE_S", -10.0)
    store.save(3, source)
    assert names(url) == [(1, 2, True), (3, 1, True)]


def test_refused(url: str, source: Path, tmp_path: Path) -> None:
    store = CheckpointStore(url)
    with pytest.raises(UsageError, match="whole number"):
        store.save(-1, source)
    (source / "link").symlink_to("small.json")
    with pytest.raises(RefusedError, match="link"):
        store.save(1, source)
    open_backend(url).put("something/else", b"x")
    with pytest.raises(RefusedError, match="no store of steps"):
        store.save(1, make_source(tmp_path / "more"))
    assert keys(url) == ["something/else"]


def test_a_source_that_changes(url: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = uploading.File.parts

    def late(self: uploading.File, part_bytes: int) -> Any:
        for data in real(self, part_bytes):
            yield data
            (source / "large.bin").touch()

    monkeypatch.setattr(uploading.File, "parts", late)
    with pytest.raises(SourceChangedError):
        CheckpointStore(url).save(1, source)
    assert keys(url) == []


# --- a failing store -----------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(seaweed: servers.Server, s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


def test_one_request_in_ten(proxy: faults.Proxy, s3: str, source: Path, tmp_path: Path) -> None:
    proxy.choose = faults.at_random(("reset", "lost", "cut", "slowdown", "internal", "flip", "flip_up"), 0.1, seed=3)
    store = CheckpointStore(s3)
    for step in (1, 2, 3):
        store.save(step, source)
    assert proxy.hit
    proxy.choose = lambda request: ""
    assert [store.verify(step).ok for step in (1, 2, 3)] == [True] * 3
    assert fetch(s3, 3, tmp_path / "there") == content(source)


@pytest.mark.parametrize("name", ["some.bin", "large.bin"])
@pytest.mark.parametrize("times", [1, 99])
def test_a_flipped_bit_that_the_store_keeps(
    proxy: faults.Proxy, seaweed: servers.Server, s3: str, source: Path, tmp_path: Path, name: str, times: int
) -> None:
    """In a single put and in a part; no checksum on the way sees it. Once: sent again. Each time: an error, nothing is seen."""
    left = iter(range(times))

    def meant(request: faults.Request) -> str:
        return "instead" if request.method == "PUT" and name in request.path and next(left, None) is not None else ""

    proxy.instead, proxy.choose = damaging(seaweed, meant)
    store = CheckpointStore(s3)
    if times == 1:
        store.save(1, source)
        assert proxy.hit == ["instead"]
        assert fetch(s3, 1, tmp_path / "there") == content(source)
        assert not any("probe" in key for key in keys(s3))
        return
    with pytest.raises(StorageError, match=f"{name} is not what was sent"):
        store.save(1, source)
    assert keys(s3) == []


@pytest.mark.parametrize("kind", ["slowdown", "reset"])
def test_a_store_that_fails_in_the_middle(
    proxy: faults.Proxy, s3: str, source: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = CheckpointStore(s3)
    store.save(1, source)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    monkeypatch.setattr("ckptstore.transfer.sending.FILE_TRIES", 1)
    proxy.choose = faults.always(kind, "PUT", "large.bin")
    with pytest.raises(StorageError, match=r"large\.bin"):
        CheckpointStore(s3).save(1, source)
    proxy.choose = lambda request: ""
    assert names(s3) == [(1, 1, True)], "what was brought is removed, what was there is there"
    assert store.verify(1).ok


def test_a_manifest_whose_answer_is_lost(proxy: faults.Proxy, s3: str, source: Path) -> None:
    losses = iter([True])
    proxy.choose = lambda request: (
        "lost" if request.method == "PUT" and MANIFEST_NAME in request.path and next(losses, False) else ""
    )
    CheckpointStore(s3).save(1, source)
    assert proxy.hit == ["lost"]
    assert CheckpointStore(s3).verify(1).ok


@pytest.mark.parametrize("arrives", [True, False])
def test_a_store_that_goes_at_the_manifest(
    proxy: faults.Proxy, s3: str, source: Path, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """Nobody knows whether it is in: that is said, and nothing is removed. The next look tells."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    store = CheckpointStore(s3)
    store.save(1, source)
    gone: list[bool] = []

    def choose(request: faults.Request) -> str:
        if request.method == "PUT" and MANIFEST_NAME in request.path and not gone:
            gone.append(True)
            return "lost" if arrives else "reset"
        return "reset" if gone else ""

    proxy.choose = choose
    with pytest.raises(CommitUncertain, match="may be in"):
        store.save(1, source)
    proxy.choose = lambda request: ""
    assert names(s3) == [(1, 1, True), (1, 2, arrives)]
    assert CheckpointStore(s3).verify(1).ok
    store.save(1, source)
    assert names(s3) == [(1, 3, True)]


# --- tensors -------------------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
from tests.test_store_dcp import blank, finish, make_state, ranks, run  # noqa: E402
from tests.test_store_dcp import load as load_dcp  # noqa: E402
from tests.test_store_dcp import save as save_dcp  # noqa: E402
from tests.test_torch_state import same  # noqa: E402


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    weight = torch.randn(500_001)
    model = {"w": weight, "tied": weight, "odd": torch.randn(5, 7).t(), "none": torch.empty(0), "large": torch.randn(4_600_000)}
    return {"model": model, "optimizer": {"m": torch.randn(11)}, "step": seed, "text": "ü"}


def test_a_bucket_that_is_not_there_is_no_empty_store(s3: str) -> None:
    """Whoever begins anew where nothing was saved must not do so for a misspelled name."""
    from ckptstore.torch import resuming

    there, misspelled = CheckpointStore(f"{s3}/nothing-yet"), CheckpointStore("s3://no-such-bucket/run")
    assert resuming.held(there) == {}
    with pytest.raises(NothingToResumeError, match="no whole step"):
        ckpt.load(there)
    for ask in (ckpt.load, resuming.held):
        with pytest.raises(NotFoundError, match="there is no such bucket"):
            ask(misspelled)


def test_tensors(url: str) -> None:
    store = CheckpointStore(url)
    with pytest.raises(NothingToResumeError):
        ckpt.load(store)
    ckpt.save(store, 1, state_of(1), config={"lr": 1})
    handle = ckpt.save_async(store, 2, state_of(2))
    assert handle.wait(60) is not None
    for step in (1, 2):
        loaded = ckpt.load(store, step)
        assert same(loaded, state_of(step))
        assert loaded["model"]["w"] is loaded["model"]["tied"]
    assert same(ckpt.load(store), state_of(2))
    assert store.verify(2).ok
    assert store.get(1).format == "state"


def test_a_flipped_bit_there_is_found(url: str) -> None:
    store = CheckpointStore(url)
    ckpt.save(store, 1, state_of(1))
    backend = open_backend(url)
    for name in ("model.safetensors", "state.json", "optimizer.safetensors"):
        key = next(key for key in keys(url) if key.endswith(name))
        data = bytearray(backend.get(key))
        for at in (len(data) // 2, len(data) - 1):
            data[at] ^= 1
            backend.put(key, data)
            with pytest.raises(IntegrityError):
                ckpt.load(store, 1)
            data[at] ^= 1
        backend.put(key, data)


def test_torch_distributed(url: str) -> None:
    store = CheckpointStore(url)
    state = make_state()
    writer = save_dcp(store, 4, state)
    assert same(load_dcp(store, 4, blank(state)), state)
    assert store.verify(4).ok
    assert store.get(4).format == "dcp"
    assert writer.manifest is not None
    assert {entry.path for entry in writer.manifest.files} == {".metadata", "__0_0.distcp"}


def test_a_part_of_the_state_reads_a_part(s3: str, proxy: faults.Proxy) -> None:
    store = CheckpointStore(s3)
    big = {f"t{i}": torch.randn(4_000_000) for i in range(5)}
    save_dcp(store, 1, big)
    proxy.seen.clear()
    found = load_dcp(store, 1, {"t2": torch.zeros(4_000_000)})
    assert same(found["t2"], big["t2"])
    asked = [
        line for request in proxy.seen if "distcp" in request.path for line in request.head.split(b"\r\n") if b"ange:" in line
    ]
    ranges = [tuple(map(int, line.rpartition(b"=")[2].split(b"-"))) for line in asked]
    assert 16_000_000 < sum(end - begin + 1 for begin, end in ranges) <= 16_000_000 + 3 * native.CHUNK_BYTES


def test_two_ranks(s3: str, tmp_path: Path) -> None:
    """Each sends its own shard, rank 0 commits; another number of ranks loads; a rank that dies means no commit."""
    store = CheckpointStore(s3)
    run("save", store, 5, 2, tmp_path / "saved.pt")
    assert store.verify(5).ok
    assert {key.rpartition("/")[2] for key in keys(s3)} == {"__0_0.distcp", "__1_0.distcp", ".metadata", MANIFEST_NAME}
    run("load", store, 5, 1, tmp_path / "loaded.pt")
    assert same(torch.load(tmp_path / "loaded.pt"), torch.load(tmp_path / "saved.pt"))
    children = ranks("die", store, 5, 2, "1:after")
    (done,) = finish([children[0]])
    assert (done.returncode, "FAILED" in done.stdout) == (7, True), done
    children[1].kill()
    assert store.verify(5).ok
    assert same(torch.load(tmp_path / "loaded.pt"), torch.load(tmp_path / "saved.pt"))


# --- kill -9 -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, ckptstore.torch as ckpt
from ckptstore import CheckpointStore
from tests.test_save_urls import state_of
store, seed = CheckpointStore(sys.argv[1]), int(sys.argv[2])
state = state_of(seed)
print("BEGIN", flush=True)
if seed % 2:
    ckpt.save(store, 5, state)
else:
    ckpt.save_async(store, 5, state, max_host_bytes=16 << 20).wait()
print("DONE", flush=True)
"""


def campaign(seaweed: servers.Server, url: str, *, rounds: int, seed: int) -> int:
    """Kill saves over a step that is there, plain ones and in waves: it is the old one or the new one, whole. How many were."""
    dice = random.Random(seed)
    store = CheckpointStore(url)
    environment = commands.environment(**seaweed.environment())
    ckpt.save(store, 5, state_of(0))
    good, killed = {0}, 0
    for number in range(1, rounds + 1):
        child = warm.Python("-c", SCRIPT, url, number, env=environment)
        assert child.stdout.readline() == "BEGIN\n"
        time.sleep(dice.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        done = "DONE" in child.stdout.read()
        killed += child.wait() == -signal.SIGKILL and not done
        child.kill()
        assert store.verify(5).ok
        found = ckpt.load(store)
        assert found["step"] in good | {number}
        assert same(found, state_of(found["step"]))
        good = {found["step"]}
        assert not done or good == {number}
    ckpt.save(store, 5, state_of(0))
    assert len(names(url)) == 1, "the next save has removed what they left"
    return killed


def test_kill_9(seaweed: servers.Server, s3: str) -> None:
    """A small campaign; `./run soak` runs the large one."""
    assert campaign(seaweed, s3, rounds=2, seed=1) >= 1


@pytest.mark.soak
def test_kill_9_many_times(seaweed: servers.Server, s3: str) -> None:
    assert campaign(seaweed, s3, rounds=60, seed=int(time.time())) >= 30


# --- retention -----------------------------------------------------------------------------------------------------


def there(url: str) -> dict[int, bool]:
    """Steps of which anything lies there, and whether they have a manifest."""
    backend = open_backend(url)
    found: dict[int, bool] = {}
    for one in generations_in(backend.tree(max_depth=4)):
        found[one.step] = found.get(one.step, False) or one.committed
    return found


def test_retention_at_a_url(url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the same rules; a dry run changes nothing; what is saved again goes with all its generations."""
    store = CheckpointStore(url)
    source = tmp_path / "small"
    source.mkdir()
    (source / "f.bin").write_bytes(b"x" * 1000)
    for step in range(1, 6):
        store.save(step, source, metrics={"loss": abs(step - 2)})
    before = {blob.key for blob in open_backend(url).list()}
    words = ("prune", "--run", url, "--keep-last", "1", "--keep-best", "1", "--metric", "loss", "--mode", "min", "--json")
    done = commands.invoke(capfd, *words, "--dry-run")
    assert done.code == 0, done.err
    assert {one["step"]: one["keep"] for one in done.json["steps"]} == {1: False, 2: True, 3: False, 4: False, 5: True}
    assert {blob.key for blob in open_backend(url).list()} == before
    assert commands.invoke(capfd, *words).code == 0
    assert there(url) == {2: True, 5: True}
    store.save(6, source, keep=Keep(last=2))
    assert there(url) == {5: True, 6: True}
    assert store.verify(6).ok
    store.prune(Keep(every=1000))
    assert there(url) == {6: True}, "never the newest good one"


def test_a_prune_at_a_url_that_is_cut_short(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest goes first: what is left is no step, neither the one that was pruned nor one that it had replaced."""
    store = CheckpointStore(url)
    source = tmp_path / "small"
    source.mkdir()
    (source / "f.bin").write_bytes(b"old")
    with monkeypatch.context() as planted:
        planted.setattr(uploading, "remove", lambda target, folder: None)  # as if the old one could not be removed
        store.save(1, source)
        (source / "f.bin").write_bytes(b"newer")
        store.save(1, source)
    store.save(2, source)
    assert [one.committed for one in generations_in(open_backend(url).tree(max_depth=4))] == [True] * 3
    real, deleted = type(store.backend).delete, []

    def delete(self: Any, key: str) -> None:
        deleted.append(key)
        if len(deleted) == 4:
            raise StorageError("the network is gone")
        real(self, key)

    with monkeypatch.context() as planted:
        planted.setattr(type(store.backend), "delete", delete)
        with pytest.raises(StorageError, match="network"):
            store.prune(Keep(last=1))
    assert deleted[0].endswith(MANIFEST_NAME)
    assert deleted[2].endswith(MANIFEST_NAME)
    assert there(url) == {1: False, 2: True}
    assert [one.step for one in store.list()] == [2]


# --- where several have written ------------------------------------------------------------------------------------


def test_dcp_load_follows_the_manifests_base(url: str, tmp_path: Path) -> None:
    """A store of steps that was mirrored while somebody else had claimed its place: the files lie in an attempt."""
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    from ckptstore.torch import StoreReader, StoreWriter

    store = CheckpointStore(tmp_path / "store")
    dcp.save({"w": torch.arange(5000), "n": 3}, storage_writer=StoreWriter(store, 1), no_dist=True)
    claims.make(open_backend(url), "step-1", claims.Claim("another", ()))
    (sent,) = mirror(store.backend, url)
    assert ATTEMPT_PREFIX in sent.url
    state = {"w": torch.zeros(5000, dtype=torch.int64), "n": 0}
    dcp.load(state, storage_reader=StoreReader(CheckpointStore(url), 1), no_dist=True)
    assert torch.equal(state["w"], torch.arange(5000))
    assert state["n"] == 3


def test_a_rank_that_helps_a_push_deletes_nothing(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store says that a key is not what was sent, who leads the push judges it: it may be of a committed part."""
    run = sealed_run(tmp_path, (46,))
    (sent,) = send(run, s3)
    target = open_backend(s3)
    folder = sent.url.removeprefix(f"{target.location}/")
    manifest = read_manifest(target, folder)
    before = {blob.key for blob in target.list(folder)}
    monkeypatch.setattr(pushing.server_digests, "ask", lambda *args: Said.OTHER)
    name = manifest.files[0].path
    with pytest.raises(TransitError, match="is not what was sent there"):
        pushing.send_share(
            open_backend(run), target, manifest, [name], folder=folder, base="", crew=1, progress=lambda done, total: None
        )
    assert {blob.key for blob in target.list(folder)} == before


@pytest.mark.parametrize("what", ["outage", "garbled"])
def test_what_the_store_does_not_tell_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The best step's manifest, which holds its metrics, cannot be read just now: it is the best all the same."""
    store = CheckpointStore(f"memory://told-{tmp_path.name}-{os.getpid()}")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/w").write_bytes(b"w")
    for step, loss in enumerate((0.5, 0.1, 0.4, 0.3)):
        store.save(step, tmp_path / "state", metrics={"loss": loss})
    get = FsspecBackend.get

    def failing(self: Any, key: str, **options: Any) -> bytes:
        if not key.startswith("step-1."):
            return get(self, key, **options)
        if what == "garbled":
            return b"{"
        raise StorageError("planted outage", operation="reading", path=key)

    keep = Keep(last=1, best=1, metric="loss", mode="min")
    with monkeypatch.context() as patch:
        patch.setattr(FsspecBackend, "get", failing)
        with pytest.raises(StorageError, match="planted") if what == "outage" else contextlib.nullcontext():
            store.prune(keep)
    assert 1 in [one.step for one in store]
    store.prune(keep)
    assert [one.step for one in store] == [1, 3]


def test_a_prune_of_many_steps_does_not_ask_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps at a store that is far away: minutes, without a word."""
    store = CheckpointStore(f"memory://many-{tmp_path.name}-{os.getpid()}")
    (tmp_path / "state").mkdir()
    (tmp_path / "state/w").write_bytes(b"w")
    for step in range(8):
        store.save(step, tmp_path / "state")
    together = threading.Barrier(4, timeout=20)

    def meeting(work: Any) -> Any:
        def met(*arguments: Any) -> Any:
            together.wait()  # breaks where fewer than four are at work at once
            return work(*arguments)

        return met

    monkeypatch.setattr("ckptstore.retention.manifest_told", meeting(retention.manifest_told))
    assert [one.keep for one in store.prune(Keep(last=4), dry_run=True)] == [False] * 4 + [True] * 4
    monkeypatch.setattr(uploading, "remove", meeting(uploading.remove))
    store.prune(Keep(last=4))
    assert [one.step for one in store] == [4, 5, 6, 7]
