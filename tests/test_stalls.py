"""Connections that stand still are broken off in seconds, and slow ones are not."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ckptstore import listing
from ckptstore.backends import open_backend, stalls
from ckptstore.model import Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.verify import verify
from tests import commands, faults, trees
from tests.test_push_pull import add_big_file
from tests.test_remote_looking import sealed_run

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="Linux tells what a connection does")
PART = b"p" * (1 << 20)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(stalls, "STALL_S", 0.6)
    monkeypatch.setattr(stalls, "ANSWER_S", 0.6)
    monkeypatch.setattr(stalls, "TICK_S", 0.1)


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and the server's end of its connection, with small buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        client.settimeout(20)
        client.connect(listening.getsockname())
        server, _ = listening.accept()
        with server:
            yield client, server


def broken(client: socket.socket, action) -> bool:
    """Whether the client's connection broke while it did this."""
    try:
        action()
    except TimeoutError:
        return False
    except OSError:
        return True
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_nobody_takes_the_bytes(soon):
    with pair() as (client, _), stalls.StallWatch() as watch:
        began = time.monotonic()
        assert broken(client, lambda: client.sendall(PART * 64))
        assert time.monotonic() - began < 5
        assert watch.broken == 1


def test_a_connection_that_bounds_its_own_time_is_left_alone(soon):
    with pair() as (client, _), pair() as (other, _), stalls.StallWatch() as watch:
        client.settimeout(2)
        stalls.pass_over(client)
        threading.Thread(target=broken, args=(other, lambda: other.sendall(PART * 64)), daemon=True).start()
        assert not broken(client, lambda: client.sendall(PART * 64))
        assert watch.broken == 1


def test_a_slow_line_is_left_alone(soon):
    """Far longer than a stall may take, and always something moves."""
    with pair() as (client, server), stalls.StallWatch() as watch:
        ended = threading.Event()

        def take() -> None:
            while not ended.wait(0.05):
                server.recv(60_000)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            assert not broken(client, lambda: client.sendall(b"p" * 3_000_000))
        finally:
            ended.set()
            thread.join()
        assert watch.broken == 0


def test_no_answer_to_a_part(soon):
    with pair() as (client, server), stalls.StallWatch() as watch:
        client.sendall(b"p" * 200_000)
        taken = 0
        while taken < 200_000:
            taken += len(server.recv(1 << 20))
        began = time.monotonic()
        assert client.recv(1) == b""
        assert time.monotonic() - began < 5
        assert watch.broken == 1


@pytest.mark.parametrize("answer", [True, False])
def test_idle_connections_and_small_requests_are_left_alone(soon, answer):
    """One that is kept for the next request; and one whose small request takes long to answer."""
    with pair() as (client, server), stalls.StallWatch() as watch:
        client.sendall(b"p" * (200_000 if answer else 500))
        taken = 0
        while taken < (200_000 if answer else 500):
            taken += len(server.recv(1 << 20))
        if answer:
            server.sendall(b"fine")
            assert client.recv(4) == b"fine"
        time.sleep(1.8)
        assert watch.broken == 0
        server.sendall(b"more")
        assert client.recv(4) == b"more"


class Told:
    """A connection of which the kernel tells what it is told to."""

    def __init__(self) -> None:
        self.unacked = 0

    def getsockopt(self, *_: int) -> bytes:
        return stalls._LAYOUT.pack(1, self.unacked, 0, 0, 700, 900, 0)


def test_a_request_after_a_long_rest_is_on_its_way(monkeypatch):
    """Nothing has moved for long, and its first bytes are not taken yet: the way there takes its time."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch, connection = stalls.StallWatch(), Told()

    def stalled(seconds: int) -> list[bool]:
        nonlocal now
        looks = []
        for _ in range(2 * seconds):
            now += 0.5
            looks.append(watch._stalled("it", connection))
        return looks

    assert not any(stalled(60))
    connection.unacked = 1
    looks = stalled(12)
    assert (any(looks[:19]), all(looks[20:])) == (False, True)


def test_other_descriptors_are_left_alone(soon, tmp_path):
    """Files, pipes, sockets of other kinds and such as listen."""
    one, other = socket.socketpair()
    with one, other, socket.create_server(("127.0.0.1", 0)) as listening, stalls.StallWatch() as watch:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(PART)
        time.sleep(1.5)
        assert watch.broken == 0
        assert listening.getsockname()


def test_it_ends_with_its_block(soon):
    with stalls.StallWatch() as watch:
        pass
    assert not watch._thread.is_alive()


PROGRAM = """
import sys
from datetime import timedelta
for name in ("awscrt", "awscrt.auth", "awscrt.http"):  # our own uploads find it themselves: tests/test_multipart.py
    sys.modules[name] = None
from ckptstore.transfer import sending
from ckptstore.backends import stalls, tries
from ckptstore.backends import object as objects
sending.FILE_TRIES = 2
stalls.STALL_S = stalls.ANSWER_S = 1.0
tries.RETRY_FOR = timedelta(seconds=2)
objects.STALL = timedelta(seconds=2)
from ckptstore.recover import main
sys.exit(main())
"""


@pytest.mark.parametrize("always", [False, True])
def test_a_push_whose_upload_stalls(seaweed, s3, tmp_path, always):
    """Once: the part is sent again, and all is right. Always: a typed error, soon; nothing is visible."""
    run = sealed_run(tmp_path, (46,))
    trees.set_age(add_big_file(run, 20).parent, 3600)
    CheckpointStore(run).seal(46)
    proxy = faults.Proxy(seaweed.port)
    once = iter([True])
    meant = lambda request: "partNumber" in request.path and (always or next(once, False))  # noqa: E731
    proxy.choose = lambda request: "stall" if meant(request) else ""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "push", "46", "--run", str(run), "--to", s3],
        env=commands.environment(**seaweed.environment(proxy.port)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    took = time.monotonic() - began
    proxy.close()
    assert "stall" in proxy.hit
    assert "broken off" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    if always:
        assert (done.returncode, took < 90) == (1, True), done.stderr
        assert "optim_world_size_1" in done.stderr
        assert not any("ckptstore.manifest.json" in blob.key for blob in open_backend(s3).list())
        return
    assert done.returncode == 0, done.stderr
    checkpoint = listing.scan(open_backend(s3)).checkpoints[0]
    assert verify(open_backend(s3), checkpoint, Level.FULL).checkpoint.status is Status.COMMITTED
