"""Saves in waves into a store at a URL: the same bytes, a bounded ring, and no buffer is filled while it is being sent."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore
from ckptstore.backends import tries
from ckptstore.errors import SourceChangedError, StorageError, TransitError
from tests import faults, servers
from tests import test_save_waves as on_a_disk
from tests.test_save_urls import fetch, keys, names
from tests.test_server_digests import damaging
from tests.test_torch_state import same

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
from ckptstore.torch import background, filling, waves  # noqa: E402

PART = 16 << 20
LIMIT = PART  #: one buffer, for two files that are sent at once


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3")) if request.param == "s3" else f"memory://waves-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def proxy(seaweed: servers.Server, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[faults.Proxy]:
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


class Gate:
    """Holds the requests that are meant until it is opened."""

    def __init__(self, proxy: faults.Proxy, meant: Callable[[faults.Request], bool]) -> None:
        self.open, self.reached, self.meant = threading.Event(), threading.Event(), meant
        proxy.choose = self.choose

    def choose(self, request: faults.Request) -> str:
        if self.meant(request):
            self.reached.set()
            assert self.open.wait(30)
        return ""


def sends(request: faults.Request) -> bool:
    """A part of a file, or all of a small one."""
    return request.method == "PUT" and ".safetensors" in request.path


def completes(request: faults.Request) -> bool:
    """Of a file in parts: all of them are there."""
    return request.method == "POST" and "uploadId=" in request.path


def save(url: str, step: int, state: Any, **more: Any) -> Any:
    return ckpt.save_async(CheckpointStore(url), step, state, max_host_bytes=LIMIT, **more)


def make(value: float) -> dict[str, Any]:
    """35 MB in three parts of two files: more than two buffers."""
    return on_a_disk.make(value, large_count=5_000_001)


def ring(url: str) -> list[Any]:
    kept: list[Any] = background._buffers[os.path.realpath(CheckpointStore(url).backend.location)].ring
    return kept


def test_the_same_files_as_on_a_disk(url: str, tmp_path: Path) -> None:
    state = on_a_disk.make(1)
    manifest = save(url, 1, state, config={"lr": 1}, metrics={"loss": 2}).wait(60)
    plain = ckpt.save(CheckpointStore(tmp_path / "plain"), 1, state, config={"lr": 1}, metrics={"loss": 2})
    assert (manifest.content, manifest.metrics) == (plain.content, plain.metrics)
    assert [entry.chunks for entry in manifest.files] == [entry.chunks for entry in plain.files]
    there = fetch(url, 1, tmp_path / "there")
    assert sorted(there) == ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert all(data == (tmp_path / "plain/step-1" / name).read_bytes() for name, data in there.items()), "byte for byte"
    assert CheckpointStore(url).verify(1).ok
    assert same(ckpt.load(CheckpointStore(url), 1), state)


def test_one_buffer_goes_round(url: str) -> None:
    """Two files, three parts, and never more than the one buffer; it is kept for the next save."""
    save(url, 1, make(1)).wait(60)
    (buffer,) = ring(url)
    assert buffer.nbytes == LIMIT
    where = buffer.data_ptr()
    del buffer
    save(url, 2, make(2)).wait(60)
    assert [again.data_ptr() for again in ring(url)] == [where]
    small = save(url, 3, {"a": torch.ones(5)})
    assert small.staged, "what fits is copied at once, as ever"
    small.wait(60)
    assert ring(url) == []
    for step, state in ((1, make(1)), (2, make(2)), (3, {"a": torch.ones(5)})):
        assert same(ckpt.load(CheckpointStore(url), step), state)


def peak_bytes(work: Callable[[], object]) -> int:
    """What this process takes at most while it works, beyond what it has."""

    def read(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def test_memory_is_bounded(s3: str) -> None:
    """256 MiB through 64: the ring, and what the network's client takes beside it."""
    state = {name: {"large": torch.ones(128 << 18)} for name in ("model", "optimizer")}  # the heap has no such piece by chance
    store = CheckpointStore(s3)
    save(s3, 1, make(1)).wait(60)  # threads, connections
    bounded = peak_bytes(lambda: ckpt.save_async(store, 2, state, max_host_bytes=64 << 20).wait(100))
    assert sum(buffer.nbytes for buffer in ring(s3)) == 64 << 20
    other = CheckpointStore(f"{s3}-other")  # with no ring that it could give up for the copy
    whole = peak_bytes(lambda: ckpt.save_async(other, 1, state["model"]).wait(100))
    assert bounded < 96 << 20, f"{bounded >> 20} MiB"
    assert whole > 112 << 20, f"{whole >> 20} MiB for a copy of 128: this measures nothing"
    assert same(ckpt.load(store, 2), state)


# --- when the state may change -------------------------------------------------------------------------------------


def test_staged_when_all_has_arrived(proxy: faults.Proxy, s3: str) -> None:
    """Not before: what arrived as something else is copied, and sent, again."""
    gate = Gate(proxy, completes)
    state = make(1)
    handle = save(s3, 1, state)
    assert gate.reached.wait(30)
    with pytest.raises(TimeoutError, match="not staged within"):
        handle.wait_staged(0.3)
    assert (handle.staged, handle.committed) == (False, False)
    gate.open.set()
    handle.wait_staged(60)
    for tensor in (state["model"]["large"], state["optimizer"]["m"]):
        tensor.zero_()
    handle.wait(60)
    assert same(ckpt.load(CheckpointStore(s3), 1), make(1))


@pytest.mark.parametrize("planted", [False, True])
def test_a_change_that_comes_too_early(proxy: faults.Proxy, s3: str, monkeypatch: pytest.MonkeyPatch, planted: bool) -> None:
    """Nothing of it is seen. Planted: nobody looks at the versions, and what is saved is torn."""
    ckpt.save(CheckpointStore(s3), 1, {"a": torch.ones(3)})
    if planted:
        monkeypatch.setattr(waves, "_version", lambda tensor: 0)
    gate = Gate(proxy, sends)
    state = make(1)
    handle = save(s3, 2, state)
    assert gate.reached.wait(30)
    state["model"]["turned"].zero_()
    state["model"]["large"].zero_()
    gate.open.set()
    if planted:
        handle.wait(60)
        assert not same(ckpt.load(CheckpointStore(s3), 2), make(1))
        return
    with pytest.raises(SourceChangedError, match="was changed before it was staged"):
        handle.wait_staged(60)
    assert (handle.staged, handle.failed) == (False, True)
    assert names(s3) == [(1, 1, True)], "what was sent is removed"
    save(s3, 2, state).wait(60)
    assert CheckpointStore(s3).verify(2).ok


# --- a failing store -----------------------------------------------------------------------------------------------


def test_one_request_in_five(proxy: faults.Proxy, s3: str, tmp_path: Path) -> None:
    """What is sent again by the library comes from the same buffer, which nobody has filled anew."""
    proxy.choose = faults.at_random(("reset", "lost", "cut", "slowdown", "internal", "flip_up"), 0.2, seed=5)
    for step in (1, 2):
        ckpt.save_async(CheckpointStore(s3), step, make(step), max_host_bytes=step * PART).wait(100)
    assert proxy.hit
    proxy.choose = lambda request: ""
    for step in (1, 2):
        assert CheckpointStore(s3).verify(step).ok
        assert same(ckpt.load(CheckpointStore(s3), step), make(step))


@pytest.mark.parametrize(("name", "times"), [("model", 1), ("optimizer", 1), ("model", 99)])
def test_a_file_that_arrives_damaged(proxy: faults.Proxy, seaweed: servers.Server, s3: str, name: str, times: int) -> None:
    """Found when all of it has been copied: it is copied, and sent, again, since the state may not change yet."""
    left = iter(range(times))

    def meant(request: faults.Request) -> str:
        return "instead" if request.method == "PUT" and name in request.path and next(left, None) is not None else ""

    proxy.instead, proxy.choose = damaging(seaweed, meant)
    handle = save(s3, 1, make(1))
    if times == 1:
        handle.wait(60)
        assert proxy.hit == ["instead"]
        assert same(ckpt.load(CheckpointStore(s3), 1), make(1))
        return
    with pytest.raises(TransitError, match=r"model\.safetensors is not what was sent"):
        handle.wait_staged(60)
    assert keys(s3) == []


def test_a_store_that_fails_in_the_middle(proxy: faults.Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(s3, 1, make(1)).wait(60)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    monkeypatch.setattr("ckptstore.transfer.sending.FILE_TRIES", 2)
    proxy.choose = faults.always("reset", "PUT", "partNumber=2")
    handle = save(s3, 1, make(2))
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        handle.wait_staged(60)
    assert (handle.staged, handle.failed) == (False, True)
    proxy.choose = lambda request: ""
    assert names(s3) == [(1, 1, True)], "what was there is there, and nothing else"
    assert same(ckpt.load(CheckpointStore(s3), 1), make(1))
    save(s3, 1, make(3)).wait(60)
    assert same(ckpt.load(CheckpointStore(s3), 1), make(3))


def test_a_file_system_that_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is sent anew, through the one buffer that the failure had."""
    failures = iter([False, True])

    def write(self: Any, data: Any) -> int:
        if next(failures, False):
            raise OSError("planted")
        return io.BytesIO.write(self, data)

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.write", write, raising=False)
    store = CheckpointStore(f"memory://waves-{tmp_path.name}-{os.getpid()}")
    save(store.backend.location, 1, make(1)).wait(60)
    assert list(failures) == []
    assert same(ckpt.load(store, 1), make(1))


def test_an_upload_that_outlives_its_save(proxy: faults.Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file fails while another one's requests hang: their buffers are not used again, whatever becomes of them."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    monkeypatch.setattr("ckptstore.transfer.sending.FILE_TRIES", 1)
    ended = threading.Event()

    def choose(request: faults.Request) -> str:
        if sends(request) and "optimizer" in request.path:
            return "reset"
        if sends(request):
            ended.wait(30)
        return ""

    proxy.choose = choose
    handle = ckpt.save_async(CheckpointStore(s3), 1, on_a_disk.make(1), max_host_bytes=3 * PART)
    with pytest.raises(StorageError, match=r"optimizer\.safetensors"):
        handle.wait(60)
    assert ring(s3) == []
    proxy.choose = lambda request: ""
    again = ckpt.save_async(CheckpointStore(s3), 2, on_a_disk.make(2), max_host_bytes=3 * PART)
    ended.set()
    again.wait(60)
    assert len(ring(s3)) == 3
    assert CheckpointStore(s3).verify(2).ok
    assert same(ckpt.load(CheckpointStore(s3), 2), on_a_disk.make(2))


# --- buffers that are used too early -------------------------------------------------------------------------------


def test_no_buffer_is_filled_before_its_part_has_arrived(proxy: faults.Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store does not answer for a part, its buffer is not in the ring; with the answer it comes back."""
    filled: list[int] = []
    real = filling.Ring.take

    def take(self: Any) -> Any:
        buffer = real(self)
        filled.append(buffer.data_ptr())
        return buffer

    monkeypatch.setattr(filling.Ring, "take", take)
    gate = Gate(proxy, sends)
    handle = ckpt.save_async(CheckpointStore(s3), 1, make(1), max_host_bytes=2 * PART)
    assert gate.reached.wait(30)
    with pytest.raises(TimeoutError):
        handle.wait_staged(1)
    assert len(filled) == len(set(filled)) == 2, "one for each buffer, and none again"
    gate.open.set()
    handle.wait(60)
    assert len(filled) > 2
    assert same(ckpt.load(CheckpointStore(s3), 1), make(1))


def test_planted_a_buffer_that_is_filled_too_early(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring takes a part's buffer back as soon as the library has it: the store gets other bytes than were digested."""

    def lend(self: Any, buffer: Any, data: memoryview) -> memoryview:
        self.give(buffer)
        return data

    monkeypatch.setattr(filling.Ring, "lend", lend)
    with pytest.raises(TransitError, match="not what was sent"):
        save(s3, 1, on_a_disk.make(1)).wait(60)  # parts enough that one is filled before it has been read
    assert keys(s3) == []
