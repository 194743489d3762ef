"""How many requests are under way at once: as many as make it faster, no more."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from ckptstore import native, parallel
from ckptstore.backends import open_backend, s3multipart
from ckptstore.backends.s3control import control
from ckptstore.transfer import fetching, multipart, sending, tuning
from ckptstore.transfer.fetching import Wanted, fetch
from ckptstore.transfer.tuning import HOLD_S, WARM_S, Tuner
from tests.faults import Meter

MIB = 1 << 20
SIZE = 16 * MIB


def play(each: Callable[[int, float], float], *, until_s: float, start: int = 8, most: int = 32) -> list[tuple[float, int]]:
    """Requests of 16 MiB, as many as the tuner says, each as fast as `each` says; (moment, limit) of each end."""
    tuner = Tuner(start, most)
    now, step_s = 0.0, 0.01
    flying: list[tuple[float, float]] = []  # begun at, bytes left
    seen = []
    while now < until_s:
        flying += [(now, SIZE)] * (tuner.limit - len(flying))
        now += step_s
        moved = each(len(flying), now) * step_s
        for begun, left in flying:
            if left <= moved:
                tuner.done(begun, now, SIZE)
                seen.append((now, tuner.limit))
        flying = [(begun, left - moved) for begun, left in flying if left > moved]
    return seen


def limits(seen: list[tuple[float, int]], after_s: float = 0.0) -> set[int]:
    return {limit for now, limit in seen if now >= after_s}


def slow_connections(under_way: int, now: float) -> float:
    return 20e6


def slow_line(under_way: int, now: float) -> float:
    return 200e6 / under_way


def test_it_grows_where_each_connection_is_slow():
    seen = play(slow_connections, until_s=20)
    assert limits(seen, 6) == {32}
    assert len(seen) * SIZE / 20 > 2.5 * 8 * 20e6


def test_it_stays_where_the_line_is_slow():
    """One try, and none again for a while."""
    seen = play(slow_line, until_s=HOLD_S)
    assert limits(seen) == {8, 16}
    assert limits(seen, WARM_S + 4) == {8}
    assert limits(play(slow_line, until_s=3 * HOLD_S), HOLD_S + 1) == {8, 16}


def test_it_stops_growing_where_the_line_is_full():
    """Fast enough for 16: twice as many bring a tenth more."""
    seen = play(lambda under_way, now: min(20e6, 350e6 / under_way), until_s=HOLD_S)
    assert 32 in limits(seen)
    assert limits(seen, 10) == {16}


def test_it_falls_back_when_the_store_sends_requests_away():
    """SlowDown: what more are under way is sent away, and waits. It does not come back at once."""
    seen = play(lambda under_way, now: 20e6 if under_way <= 8 or now < 10 else 4e6, until_s=10 + HOLD_S)
    assert 32 in limits([one for one in seen if one[0] < 10])
    assert limits(seen, 25) == {8}


def test_it_grows_again_when_the_line_does():
    seen = play(lambda under_way, now: (slow_line if now < 20 else slow_connections)(under_way, now), until_s=90)
    assert limits(seen, 75) == {32}


@pytest.mark.parametrize(("start", "most"), [(1, 1), (2, 3), (8, 8), (3, 32)])
def test_bounds(start, most):
    seen = play(slow_connections, until_s=30, start=start, most=most)
    assert min(limits(seen)) >= start
    assert max(limits(seen)) == most


# --- as many threads as are wanted now -----------------------------------------------------------------------------


def test_threads_come_and_go():
    """As many as the function says, within moments; each job is done once."""
    wanted = 2
    lock = threading.Lock()
    under_way = 0
    most = {2: 0, 12: 0, 3: 0}
    done = []

    def work(job: int, stop: parallel.Stop) -> None:
        nonlocal wanted, under_way
        with lock:
            under_way += 1
            done.append(job)
            if job == 20:
                wanted = 12
            elif job == 200:
                wanted = 3
            if job < 20 or 60 < job < 200 or job > 230:
                most[wanted] = max(most[wanted], under_way)
        time.sleep(0.01)
        with lock:
            under_way -= 1

    parallel.each(range(300), work, threads=lambda: wanted)
    assert sorted(done) == list(range(300))
    assert most == {2: 2, 12: 12, 3: 3}


# --- over a line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Ranges of 512 KiB, 1 MiB where few are under way, and a short while before more are tried: for a short test."""
    monkeypatch.setattr(tuning, "WARM_S", 0.4)
    monkeypatch.setattr(fetching, "RANGE_BYTES", MIB)
    monkeypatch.setattr(fetching, "BUDGET_BYTES", 8 * MIB)


def through(url: str, size: int) -> tuple[float, int]:
    """Seconds that it takes to fetch the file, which is right; and how many ranges were under way at once."""
    backend = open_backend(url)
    lock = threading.Lock()
    under_way = most = 0

    def view(key: str, offset_bytes: int, length_bytes: int) -> object:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        try:
            return type(backend).view(backend, key, offset_bytes, length_bytes)
        finally:
            with lock:
                under_way -= 1

    backend.view = view
    began = time.monotonic()
    found = fetch(backend, [Wanted("big", "big", size)], chunk_bytes=MIB // 2)["big"]
    took = time.monotonic() - began
    assert isinstance(found, native.Digest)
    assert found.crc == EXPECTED[size]
    return took, most


EXPECTED: dict[int, int] = {}


@pytest.fixture
def line(seaweed, s3, monkeypatch):
    def make(size: int, **limit: float) -> Meter:
        data = os.urandom(size)
        EXPECTED[size] = native.crc64(data)
        open_backend(s3).put_parts("big", [data], part_bytes=size)
        meter = Meter(seaweed.port, **limit)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{meter.port}")
        meters.append(meter)
        return meter

    meters: list[Meter] = []
    yield make
    for meter in meters:
        meter.close()


def test_twice_as_fast_over_slow_connections(line, s3, small, monkeypatch):
    line(64 * MIB, each_bytes_per_s=1.5e6)
    tuned, most = through(s3, 64 * MIB)
    assert most == 32
    monkeypatch.setattr(fetching, "MOST_THREADS", fetching.THREADS)
    plain, most = through(s3, 64 * MIB)
    assert most == fetching.THREADS
    assert plain > 2 * tuned, (plain, tuned)


@pytest.mark.soak
def test_no_more_over_a_slow_line(line, s3, small, monkeypatch):
    """It tries sixteen, and sees that they bring nothing."""
    line(48 * MIB, together_bytes_per_s=16e6)
    tuned, most = through(s3, 48 * MIB)
    assert most == 16
    monkeypatch.setattr(fetching, "MOST_THREADS", fetching.THREADS)
    assert tuned < 1.1 * through(s3, 48 * MIB)[0]


# --- up ------------------------------------------------------------------------------------------------------------


class Counted:
    """Uploads of a backend, and how many of their parts were on their way at once."""

    def __init__(self, uploads: s3multipart.S3Multipart) -> None:
        self._uploads, self._lock, self._under_way, self.most = uploads, threading.Lock(), 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._uploads, name)

    def put(self, *arguments: object, **more: object) -> object:
        with self._lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        try:
            return self._uploads.put(*arguments, **more)
        finally:
            with self._lock:
                self._under_way -= 1


def outgoing(key: str, data: bytes) -> sending.Outgoing:
    def read(offset: int, length: int) -> list[memoryview]:
        return [memoryview(data)[offset : offset + length]]

    def crc(offset: int, length: int) -> int:
        return native.crc64(memoryview(data)[offset : offset + length])

    content = multipart.Content(key, len(data), native.crc64(data), read, crc)
    return sending.Outgoing(key, len(data), lambda _: iter(()), content=content)


def up_through(url: str, data: bytes) -> tuple[float, int]:
    """Seconds that it takes to send a file, which is right; and how many parts were on their way at once."""
    backend = open_backend(url)
    uploads = Counted(s3multipart.multipart(control(backend), digests=True))

    began = time.monotonic()
    sending.send(backend, [outgoing("up", data)], uploads=uploads)
    took = time.monotonic() - began
    assert control(backend).head("up") == (len(data), native.crc64(data))
    return took, uploads.most


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 5 MiB, no smaller ones are allowed; 2 to 8 of them at once, soon."""
    monkeypatch.setattr(tuning, "WARM_S", 0.4)
    monkeypatch.setattr(multipart, "STREAMS", 2)
    monkeypatch.setattr(sending, "part_size", lambda size_bytes: 5 * MIB)
    monkeypatch.setattr(sending, "MOST_AT_ONCE", 8)


def test_more_parts_go_up_over_slow_connections(line, s3, small_parts):
    line(MIB, each_bytes_per_s=8e6)
    _, most = up_through(s3, os.urandom(100 * MIB))
    assert most == 8


def test_files_of_several_parts_share_what_is_on_its_way(s3, monkeypatch):
    """All of them, also those that are smaller than a part of the largest one."""
    monkeypatch.setattr(sending, "part_size", lambda size_bytes: 25 * MIB if size_bytes > 50 * MIB else 5 * MIB)
    monkeypatch.setattr(sending, "AT_ONCE", 4)
    monkeypatch.setattr(sending, "MOST_AT_ONCE", 4)
    backend = open_backend(s3)
    uploads = Counted(s3multipart.multipart(control(backend), digests=True))
    files = {"large": os.urandom(60 * MIB)} | {f"small {number}": os.urandom(24 * MIB) for number in range(3)}
    sending.send(backend, [outgoing(name, data) for name, data in files.items()], uploads=uploads)
    assert uploads.most == 4
    for name, data in files.items():
        assert control(backend).head(name) == (len(data), native.crc64(data))


@pytest.mark.soak
def test_twice_as_fast_up_over_slow_connections(line, s3, small_parts, monkeypatch):
    line(MIB, each_bytes_per_s=4e6)
    data = os.urandom(200 * MIB)
    tuned, most = up_through(s3, data)
    assert most == 8
    monkeypatch.setattr(sending, "MOST_AT_ONCE", 2)
    plain, most = up_through(s3, data)
    assert most == 2
    assert plain > 2 * tuned, (plain, tuned)


@pytest.mark.soak
def test_no_more_parts_go_up_over_a_slow_line(line, s3, small_parts, monkeypatch):
    line(MIB, together_bytes_per_s=16e6)
    data = os.urandom(150 * MIB)
    tuned, most = up_through(s3, data)
    assert most == 4
    monkeypatch.setattr(sending, "MOST_AT_ONCE", 2)
    assert tuned < 1.1 * up_through(s3, data)[0]
