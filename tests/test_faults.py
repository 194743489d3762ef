"""Networks and stores that fail: every fault ends in success or in a typed error, and nothing half is ever visible."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from ckptstore import listing, parallel
from ckptstore.backends import object as object_backend
from ckptstore.backends import open_backend, tries
from ckptstore.errors import (
    AccessError,
    AlreadyExistsError,
    CkptStoreError,
    DigestMismatchError,
    RefusedError,
    StorageError,
    UnavailableError,
)
from ckptstore.model import Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer.pull import pull
from ckptstore.verify import verify
from tests import commands, faults, trees
from tests.test_push_pull import EXPORT, add_big_file, bring, same, send
from tests.test_remote_looking import sealed_run


@pytest.fixture
def run(tmp_path):
    run = sealed_run(tmp_path, (46,))
    trees.set_age(add_big_file(run, 20).parent, 3600)
    CheckpointStore(run).seal(46)
    return run


@pytest.fixture
def proxy(seaweed, s3, monkeypatch):
    """In front of the server; what retries is told not to take a test's time."""
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(object_backend, "STALL", timedelta(seconds=3))
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=20))
    yield proxy
    proxy.close()


def direct(seaweed, url: str, monkeypatch):
    """The same place, without anything in between."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{seaweed.port}")
    return open_backend(url)


def test_the_proxy_itself(proxy, s3, run, tmp_path):
    """Without a fault nothing is different."""
    send(run, s3)
    bring(s3, tmp_path / "there")
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)
    assert proxy.hit == []


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.soak] if kind == "stall" else []) for kind in faults.KINDS],  # it takes a while
)
def test_one_request_in_ten(proxy, seaweed, s3, run, tmp_path, monkeypatch, kind):
    """Push, verify and pull come through, or say what failed; in the end all is right there and here."""
    if kind == "stall":
        monkeypatch.setattr(object_backend, "REQUEST", timedelta(seconds=6))
    proxy.choose = faults.at_random((kind,), 0.1 if kind == "stall" else 0.2, seed=7)
    for _ in range(4):
        try:
            send(run, s3)
            break
        except CkptStoreError:
            assert_nothing_half(direct(seaweed, s3, monkeypatch))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    else:
        pytest.fail(f"four pushes failed with one request in five gone wrong: {proxy.hit}")
    remote = direct(seaweed, s3, monkeypatch)
    assert verify(remote, listing.scan(remote).checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    for _ in range(4):
        try:
            bring(s3, tmp_path / "there")
            break
        except CkptStoreError:
            assert not (tmp_path / "there" / EXPORT).exists()
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)
    assert CheckpointStore(tmp_path / "there").verify(46).ok


def assert_nothing_half(backend) -> None:
    """What a listing calls COMMITTED is whole."""
    try:
        found = listing.scan(backend).checkpoints
    except CkptStoreError:
        return  # nothing arrived yet
    for checkpoint in found:
        if checkpoint.status is Status.COMMITTED:
            report = verify(backend, checkpoint, Level.FULL)
            assert report.checkpoint.status is Status.COMMITTED, report.findings


@pytest.mark.parametrize("kind", ["reset", pytest.param("stall", marks=pytest.mark.soak), "slowdown", "internal", "cut"])
def test_a_store_that_is_gone(proxy, seaweed, s3, run, tmp_path, monkeypatch, kind):
    """All requests fail: a typed error that names the place, within the bounds; nothing is visible anywhere."""
    send(run, s3)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=3))
    monkeypatch.setattr(object_backend, "STALL", timedelta(seconds=1))
    monkeypatch.setattr(object_backend, "REQUEST", timedelta(seconds=2))
    proxy.choose = faults.always(kind)
    started = time.monotonic()
    with pytest.raises(StorageError, match="place-"):
        bring(s3, tmp_path / "there")
    with pytest.raises(StorageError, match="place-"):
        send(run, f"{s3}-other")
    assert time.monotonic() - started < 30
    assert not (tmp_path / "there").exists()


def test_a_flipped_bit_on_the_way_down_is_asked_for_again(proxy, s3, run, tmp_path):
    """Once: it comes through. Each time: it is an error, and never written."""
    send(run, s3)
    flips = iter([True])
    weights = "optim_world_size_1"
    proxy.choose = lambda request: "flip" if weights in request.path and request.method == "GET" and next(flips, False) else ""
    bring(s3, tmp_path / "there")
    assert proxy.hit == ["flip"]
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)
    proxy.choose = faults.always("flip", "GET", weights)
    with pytest.raises(DigestMismatchError, match=weights):
        bring(s3, tmp_path / "again")
    assert not (tmp_path / "again/default").exists()


def test_a_flipped_bit_on_the_way_up_is_refused(proxy, seaweed, s3, run, monkeypatch):
    """By the server, against the CRC-64/NVME that travels with each part; sent again, it is right."""
    flips = iter([True, True])
    proxy.choose = lambda request: "flip_up" if len(request.body) > 1 << 20 and next(flips, False) else ""
    try:
        send(run, s3)
    except StorageError:
        proxy.choose = lambda request: ""
        assert_nothing_half(direct(seaweed, s3, monkeypatch))
        send(run, s3)
    assert "flip_up" in proxy.hit
    remote = direct(seaweed, s3, monkeypatch)
    assert verify(remote, listing.scan(remote).checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED


@pytest.mark.parametrize("name", ["claim", "ckptstore.manifest.json"])
def test_a_create_whose_answer_is_lost(proxy, s3, run, name):
    """The retry finds what the first try left: it is ours, and no other writer's."""
    losses = iter([True])
    proxy.choose = lambda request: "lost" if request.method == "PUT" and name in request.path and next(losses, False) else ""
    assert send(run, s3)[0].sent_bytes == CheckpointStore(run).get(46).size_bytes
    assert proxy.hit == ["lost"]
    found = listing.scan(open_backend(s3)).checkpoints[0]
    assert found.status is Status.COMMITTED


def test_a_list_that_fails_is_no_empty_store(proxy, s3, run, monkeypatch):
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    send(run, s3)
    proxy.choose = faults.always("slowdown", "GET", "list-type")
    with pytest.raises(StorageError, match="listing"):
        listing.scan(open_backend(s3))


def test_a_manifest_that_cannot_be_read_is_not_none(proxy, s3, run, tmp_path, monkeypatch):
    """Else what came would count as "without a manifest", and its damage would go unseen."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    send(run, s3)
    backend = open_backend(s3)
    checkpoint = listing.scan(backend).checkpoints[0]
    proxy.choose = faults.always("internal", "GET", "ckptstore.manifest.json")
    with pytest.raises(StorageError, match="manifest"):
        pull(backend, checkpoint, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


# --- kill -9 -------------------------------------------------------------------------------------------------------


def start(*words: object, seaweed) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*commands.COMMAND, *map(str, words)],
        env=commands.environment(**seaweed.environment()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it was killed; False when it had ended by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    assert process.returncode == 0, process.communicate()[1]
    process.communicate()
    return False


def campaign(run: Path, s3: str, seaweed, folder: Path, *, rounds: int, seed: int) -> int:
    """Kill pushes and pulls at random moments; look after each; at last let them end. How many were killed."""
    dice = random.Random(seed)
    killed = 0
    for number in range(rounds):
        url, there = f"{s3}/{number}", folder / f"there-{number}/trial0"
        push_words = ("push", "46", "--run", run, "--to", url)
        for _ in range(2):
            killed += kill_after(start(*push_words, seaweed=seaweed), dice.uniform(0.2, 0.9))
            assert_nothing_half(open_backend(url))
        process = start(*push_words, seaweed=seaweed)
        assert process.wait(60) == 0, process.communicate()[1]
        process.communicate()
        remote = open_backend(url)
        assert verify(remote, listing.scan(remote).checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED
        pull_words = ("pull", "46", "--from", url, "--to", there)
        for _ in range(2):
            killed += kill_after(start(*pull_words, seaweed=seaweed), dice.uniform(0.2, 0.9))
            if there.is_dir():
                for checkpoint in CheckpointStore(there).list():
                    assert CheckpointStore(there).verify(checkpoint.step).ok
        process = start(*pull_words, seaweed=seaweed)
        assert process.wait(60) == 0, process.communicate()[1]
        process.communicate()
        assert same(run / EXPORT, there / EXPORT)
        left = [
            name for name in os.listdir(there.parent / ".ckptstore/trial0") if name != "lock" and not name.startswith("trash-")
        ]
        assert left == []
    return killed


def test_kill_9(run, s3, seaweed, tmp_path):
    """A small campaign; `./run soak` runs the large one."""
    assert campaign(run, s3, seaweed, tmp_path, rounds=1, seed=1) >= 1


@pytest.mark.soak
def test_kill_9_many_times(run, s3, seaweed, tmp_path):
    assert campaign(run, s3, seaweed, tmp_path, rounds=50, seed=int(time.time())) >= 50


def test_ctrl_c(run, s3, seaweed, tmp_path):
    """Within seconds, exit 130, and the same command goes on."""
    trees.set_age(add_big_file(run, 100).parent, 3600)
    CheckpointStore(run).seal(46)
    process = start("push", "46", "--run", run, "--to", s3, seaweed=seaweed)
    backend = open_backend(s3)
    while not any("claim" in blob.key for blob in backend.list()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    error = process.communicate(timeout=20)[1].decode()
    assert (process.returncode, time.monotonic() - began < 5) == (130, True), error
    assert "goes on" in error
    assert "Traceback" not in error
    assert_nothing_half(backend)
    assert send(run, s3)[0].committed_before is False


def test_ctrl_c_while_a_thread_comes_up(monkeypatch):
    """CPython turns it into `RuntimeError: release unlocked lock`; it must come out as what it was."""

    def start(thread):
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        parallel.each([1], lambda job, stop: None, threads=1)


def test_a_store_that_is_gone_is_asked_for_one_thing(proxy, s3, run, monkeypatch):
    """And the error says for which: the scratch key that could not be put is not removed."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    proxy.choose = faults.always("reset")
    with pytest.raises(StorageError, match="writing"):
        send(run, s3)
    assert {request.method for request in proxy.seen} == {"PUT"}


REFUSALS = {
    "put": lambda backend: backend.put("key", b"1"),
    "put_parts": lambda backend: backend.put_parts("key", iter([bytes(5 << 20)] * 2), part_bytes=5 << 20),
    "create": lambda backend: backend.put("key", b"1", if_absent=True),
    "get": lambda backend: backend.get("key"),
    "view": lambda backend: backend.view("key", 0, 1),
    "list": lambda backend: list(backend.list()),
    "delete": lambda backend: backend.delete("key"),
}


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
@pytest.mark.parametrize("what", REFUSALS)
def test_credentials_that_have_expired(proxy, s3, what, code):
    """S3 answers with 400: asked once, and said as what it is."""
    proxy.instead = lambda request: faults.response(b"400 Bad Request", b"<Error><Code>%s</Code></Error>" % code.encode())
    proxy.choose = lambda request: "instead"
    with pytest.raises(AccessError, match=code):
        REFUSALS[what](open_backend(s3))
    assert len(proxy.seen) == 1


def test_a_request_that_a_store_does_not_know(proxy, s3, monkeypatch):
    """It is there, and says so: it is not asked again by us, and nobody is told to look for it."""
    body = b"<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality ...</Message></Error>"
    proxy.instead = lambda request: faults.response(b"501 Not Implemented", body)
    proxy.choose = lambda request: "instead"
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    for what in ("create", "get", "list"):
        with pytest.raises(UnavailableError, match="does not do what was asked"):
            REFUSALS[what](open_backend(s3))


def test_a_store_that_is_down_for_a_moment_still_knows_conditions(proxy, s3, monkeypatch):
    """What was found out by trying is not what a failure says."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    backend = open_backend(s3)
    backend.put("key", b"1")
    proxy.choose = lambda request: "internal" if b"if-match" in request.head.lower() else ""
    with pytest.raises(StorageError, match="500"):
        backend.replace("key", b"2", expected=b"1")
    proxy.choose = lambda request: ""
    backend.replace("key", b"2", expected=b"1")
    assert [blob.key for blob in backend.list()] == ["key"]
    proxy.instead = lambda request: faults.response(b"501 Not Implemented", b"<Error><Code>NotImplemented</Code></Error>")
    proxy.choose = lambda request: "instead" if b"if-match" in request.head.lower() else ""
    with pytest.raises(RefusedError, match="If-Match"):
        open_backend(s3).replace("key", b"3", expected=b"2")


def test_a_conflict_is_no_existing_key(proxy, s3, monkeypatch):
    """S3 answers a create-only request with 409 while another one is under way, whatever comes of that: asked again."""
    proxy.instead = lambda request: faults.response(b"409 Conflict", b"<Error><Code>ConditionalRequestConflict</Code></Error>")
    conflicts = iter([True, True])
    proxy.choose = lambda request: "instead" if request.method == "PUT" and next(conflicts, False) else ""
    backend = open_backend(s3)
    backend.put("key", b"1", if_absent=True)
    assert proxy.hit == ["instead", "instead"]
    assert backend.get("key") == b"1"
    with pytest.raises(AlreadyExistsError):
        backend.put("key", b"1", if_absent=True)
    proxy.choose = lambda request: "instead" if request.method == "PUT" else ""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    with pytest.raises(StorageError, match="other"):
        backend.put("other", b"1", if_absent=True)


def test_a_push_in_which_each_create_meets_a_conflict_first(proxy, s3, run, tmp_path):
    """The claim and the manifest: where they always go, and no attempt for nobody's sake."""
    met: set[str] = set()

    def choose(request: faults.Request) -> str:
        if request.method == "PUT" and b"if-none-match" in request.head.lower() and request.path not in met:
            met.add(request.path)
            return "instead"
        return ""

    proxy.instead = lambda request: faults.response(b"409 Conflict", b"<Error><Code>ConditionalRequestConflict</Code></Error>")
    proxy.choose = choose
    (sent,) = send(run, s3)
    assert sent.url.endswith(EXPORT)
    assert len(met) == 3
    assert {found.status for found in CheckpointStore(s3)} == {Status.COMMITTED}
