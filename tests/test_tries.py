"""How long a request to an object store is tried again: all alike, whoever makes it, and no longer than is said."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from ckptstore.backends import interruptible, open_backend, tries, waiting
from ckptstore.backends.s3control import control
from ckptstore.backends.s3multipart import multipart
from ckptstore.errors import CkptStoreError, StorageError, TransitError
from ckptstore.store import CheckpointStore
from ckptstore.transfer import sending
from tests import faults, servers
from tests.test_remote_looking import sealed_run

PART = 5 << 20


def requests(url: str) -> dict[str, Callable[[], Any]]:
    """Each kind of them, all of which succeed where `key` holds one byte."""
    backend = open_backend(url)
    uploads = multipart(control(backend), digests=True)
    return {
        "get": lambda: backend.get("key"),
        "a range": lambda: backend.get("key", offset_bytes=1, length_bytes=1),
        "view": lambda: backend.view("key", 0, 1),
        "list": lambda: list(backend.list()),
        "put": lambda: backend.put("key", b"1"),
        "a large put": lambda: backend.put("large", bytes(1 << 20)),
        "create": lambda: backend.put("new", b"1", if_absent=True),
        "replace": lambda: backend.replace("key", b"1", expected=b"1"),
        "put by parts": lambda: backend.put_parts("large", [bytes(PART), b"1"], part_bytes=PART),
        "delete": lambda: backend.delete("other"),
        "size": lambda: backend._size("key"),
        "head": lambda: control(backend).head("key"),
        "begin an upload": lambda: uploads.abort(uploads.begin("key")),
    }


@pytest.mark.parametrize("what", requests("s3://bucket/place"))
@pytest.mark.parametrize("kind", ["slowdown", "reset"])
def test_an_outage_is_survived_by_all_alike(seaweed, s3, monkeypatch, what, kind):
    """It is time that bounds it, and no number: a store that restarts refuses many tries within a moment."""
    monkeypatch.setattr(tries, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(tries, "LONGEST_PAUSE_S", 0.002)
    open_backend(s3).put("key", b"1")
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    request = requests(s3)[what]
    proxy.choose = lambda _: kind if len(proxy.hit) < 20 else ""
    request()
    proxy.close()
    assert proxy.hit == [kind] * 20


@pytest.mark.parametrize("if_absent", [False, True])
@pytest.mark.parametrize("times", [2, 99])
def test_what_arrives_damaged_is_sent_again_and_not_for_ever(seaweed, s3, monkeypatch, if_absent, times):
    """A claim, a manifest: one flipped bit on the way is no reason to end a push. Bad memory here damages each try."""
    monkeypatch.setattr(tries, "FIRST_PAUSE_S", 0.001)
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    backend = open_backend(s3)
    proxy.choose = lambda request: "flip_up" if request.method == "PUT" and len(proxy.hit) < times else ""
    with pytest.raises(TransitError, match="not what was sent") if times == 99 else contextlib.nullcontext():
        backend.put("key", b"manifest" * 99, if_absent=if_absent)
    assert proxy.hit == ["flip_up"] * min(times, 4)
    if times == 2:
        assert backend.get("key") == b"manifest" * 99
    proxy.close()


def test_a_store_that_is_gone_is_given_up_by_all_alike(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in servers.environment(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tries, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    took: dict[str, float] = {}

    def make(what: str, request: Callable[[], Any]) -> None:
        began = time.monotonic()
        with contextlib.suppress(StorageError):
            request()
            return
        took[what] = time.monotonic() - began

    asked = requests("s3://ckpts/place")
    crew = [threading.Thread(target=make, args=each) for each in asked.items()]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(20)
    assert sorted(took) == sorted(asked)
    assert all(0.9 < seconds < 1.8 for seconds in took.values()), took


PASSES = {"a conflict": (b"409 Conflict", b"OperationAborted"), "broken off": (b"400 Bad Request", b"IncompleteBody")}


@pytest.mark.parametrize("answer", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("what", ["put", "delete", "replace", "begin an upload"])
def test_what_is_refused_for_this_moment_passes(seaweed, s3, monkeypatch, what, answer):
    status, code = answer
    open_backend(s3).put("key", b"1")
    proxy = faults.Proxy(seaweed.port)
    proxy.instead = lambda _: faults.response(status, b"<Error><Code>%s</Code></Error>" % code)
    proxy.choose = lambda request: "instead" if request.method != "GET" and not proxy.hit else ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    requests(s3)[what]()
    proxy.close()
    assert proxy.hit == ["instead"]


FINAL = {
    "another region": (b"400 Bad Request", b"AuthorizationHeaderMalformed"),
    "moved": (b"301 Moved Permanently", b"PermanentRedirect"),
    "a name": (b"400 Bad Request", b"InvalidBucketName"),
    "length": (b"411 Length Required", b"MissingContentLength"),
}


@pytest.mark.parametrize("answer", FINAL.values(), ids=FINAL)
@pytest.mark.parametrize("what", ["get", "a range", "list", "put", "create", "delete", "size", "head"])
def test_what_will_not_change_is_said_at_once(seaweed, s3, monkeypatch, what, answer):
    status, code = answer
    proxy = faults.Proxy(seaweed.port, faults.always("instead"))
    said = b"<Error><Code>%s</Code></Error>" % code
    proxy.instead = lambda asked: faults.response(status, b"" if asked.method == "HEAD" else said)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    request = requests(s3)[what]
    with pytest.raises(CkptStoreError):
        request()
    proxy.close()
    assert len(proxy.seen) <= 2  # a range that is refused may be one that begins behind the end: its size is asked for


def test_after_ctrl_c_nothing_is_tried_again(monkeypatch):
    """What tidies up then is asked once: the store is gone, perhaps, and somebody waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in servers.environment(port).items():
        monkeypatch.setenv(name, value)
    backend = open_backend("s3://ckpts/place")
    for ask in (lambda: backend.delete("key"), lambda: control(backend).head("key")):
        began = time.monotonic()
        with interruptible.briefly(), pytest.raises(StorageError):
            ask()
        assert time.monotonic() - began < 0.5


class Slow:
    """A file that takes a while, and arrives damaged, or breaks off, `bad` times."""

    def __init__(self, bad: int, error: Exception) -> None:
        self.bad, self.error = bad, error
        self.outgoing = sending.Outgoing("key", 1, self.parts, self.arrived)

    def parts(self, part_bytes: int) -> Iterator[bytes]:
        time.sleep(0.02)
        yield b"1"

    def arrived(self) -> None:
        if self.bad:
            self.bad -= 1
            raise self.error


@pytest.mark.parametrize("error", [TransitError("planted"), StorageError("planted")])
def test_a_file_that_took_long_is_sent_anew_all_the_same(monkeypatch, error):
    """What counts is how long nothing went, not how long it all took."""
    monkeypatch.setattr(sending, "SEND_AGAIN_S", 0.015)
    target = open_backend("memory://took-long")
    sending.send(target, [Slow(2, error).outgoing])
    with pytest.raises(type(error)):
        sending.send(target, [Slow(4, error).outgoing])


def test_a_file_of_which_nothing_goes_is_given_up(monkeypatch):
    """Its requests have been tried for long: one that is made of them is not."""
    monkeypatch.setattr(sending, "SEND_AGAIN_S", 0.01)
    tried: list[str] = []

    def gone(key: str, data: bytes) -> None:
        tried.append(key)
        time.sleep(0.02)
        raise StorageError("planted")

    target = open_backend("memory://gone")
    monkeypatch.setattr(target, "put", gone)
    with pytest.raises(StorageError):
        sending.send(target, [Slow(0, StorageError("")).outgoing])
    assert tried == ["key"]


def test_who_ends_a_mirror_does_not_wait_for_a_store_that_is_gone(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in servers.environment(port).items():
        monkeypatch.setenv(name, value)
    failed = threading.Event()
    monkeypatch.setattr(waiting, "notice", lambda *_: failed.set())
    mirror = CheckpointStore(sealed_run(tmp_path, (46,))).mirror("s3://ckpts/place")
    assert failed.wait(20)
    began = time.monotonic()
    mirror.close()
    assert time.monotonic() - began < 5
    assert not mirror._thread.is_alive()
