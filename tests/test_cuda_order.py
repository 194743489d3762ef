"""The order of CUDA calls while a state is staged, on a fake device that copies as late as CUDA may.

No GPU here: a copy or a kernel on a fake stream happens when somebody waits for it, and not before. What is read too early,
or changed too early, shows in what was saved.
"""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, native
from ckptstore.errors import DigestMismatchError, UsageError
from ckptstore.saves import loading
from ckptstore.transfer.sending import PART_BYTES
from tests import reads
from tests.test_torch_state import same

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from ckptstore.torch import StoreReader, StoreWriter, background, blocks, bounce, memory  # noqa: E402
from tests.fake_card import Card, Event, OnCard, Stream  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card(monkeypatch)
    yield card
    assert not card.faults


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


def weights(stream: Stream, value: float, items: int = 1000) -> tuple[Any, Any]:
    """A tensor on the device whose value a kernel in `stream` has still to write, and its memory."""
    under = torch.zeros(items)
    stream.add(lambda: under.data.fill_(value))
    return under.as_subclass(OnCard), under


def saved(store: CheckpointStore, step: int) -> list[float]:
    found: list[float] = ckpt.load(store, step)["model"]["w"].unique().tolist()
    return found


def test_staging_follows_the_trainers_stream(card: Card, store: CheckpointStore) -> None:
    """Copied after the work on the current stream, staged when the copies have ended; buffers are used again."""
    side = Stream()
    with card.stream(side):
        for step in (1, 2, 3):
            tensor, under = weights(side, float(step))
            before = card.allocated
            handle = ckpt.save_async(store, step, {"model": {"w": tensor}})
            assert handle.staged
            assert side.done == len(side.work), "nothing is under way once it is staged"
            under.data.fill_(-1.0)
            handle.wait(30)
            assert saved(store, step) == [float(step)]
            assert step == 1 or card.allocated == before + 1, "nothing but what the load made"
    assert not card.default.work, "no other stream was used"


@pytest.mark.parametrize("stream", ["default", "trainer"])
def test_planted_a_copy_that_nobody_waits_for(
    card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    side = Stream()
    if stream == "trainer":  # staged at once
        monkeypatch.setattr(background._Buffers, "finish", lambda self: None)
    else:  # on a stream that does not wait for the trainer's
        real = background._Buffers.take

        def take(self: Any, tensor: Any) -> Any:
            with card.stream(card.default):
                kept = real(self, tensor)
            card.default.synchronize()
            return kept

        monkeypatch.setattr(background._Buffers, "take", take)
    with card.stream(side):
        tensor, _ = weights(side, 5.0)
        ckpt.save_async(store, 1, {"model": {"w": tensor}}).wait(30)
    assert saved(store, 1) != [5.0]


def test_no_buffer_is_filled_while_it_is_written(card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save waits for the first one's write before the first copy into its buffers."""
    real, entered, go = native.write_files, threading.Event(), threading.Event()

    def write_files(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(native, "write_files", write_files)
    first = ckpt.save_async(store, 1, {"model": {"w": weights(card.default, 1.0)[0]}})
    assert entered.wait(30)
    enqueued = len(card.default.work)
    second: list[Any] = []
    tensor, _ = weights(card.default, 2.0)
    thread = threading.Thread(target=lambda: second.append(ckpt.save_async(store, 2, {"model": {"w": tensor}})))
    thread.start()
    thread.join(0.3)
    assert len(card.default.work) == enqueued + 1, "the trainer's kernel, and no copy"
    go.set()
    thread.join(30)
    first.wait(30)
    second[0].wait(30)
    assert (saved(store, 1), saved(store, 2)) == ([1.0], [2.0])


def test_waves_follow_it_too(card: Card, store: CheckpointStore) -> None:
    side = Stream()
    items = 3 * blocks.BLOCK_BYTES // 4
    with card.stream(side):
        tensor, under = weights(side, 3.0, items)
        later = len(side.work)
        handle = ckpt.save_async(store, 1, {"model": {"w": tensor}}, max_host_bytes=2 * blocks.BLOCK_BYTES)
        side.add(lambda: None)  # what the trainer does meanwhile is not waited for
        handle.wait_staged(30)
        assert side.done == later
        under.data.fill_(-1.0)
        handle.wait(30)
    assert saved(store, 1) == [3.0]


def test_planted_waves_that_do_not_wait(card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    side = Stream()
    with card.stream(side):
        tensor, _ = weights(side, 3.0, 3 * blocks.BLOCK_BYTES // 4)
        ckpt.save_async(store, 1, {"model": {"w": tensor}}, max_host_bytes=2 * blocks.BLOCK_BYTES).wait(30)
    assert saved(store, 1) != [3.0]


@pytest.mark.parametrize("planted", [False, True])
def test_dcp_save_waits_for_the_trainers_stream(
    card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    """It copies on a stream of its own: after what is on the trainer's."""
    side = Stream()
    if planted:
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    with card.stream(side):
        tensor, _ = weights(side, 4.0)
        dcp.save({"w": tensor}, storage_writer=StoreWriter(store, 1), no_dist=True)
    found = {"w": torch.zeros(1000)}
    dcp.load(found, checkpoint_id=str(Path(store.folder, "step-1")), no_dist=True)
    assert (found["w"].unique().tolist() == [4.0]) is not planted


# --- at URLs -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    name = request.param
    return CheckpointStore(request.getfixturevalue("s3") if name == "s3" else f"memory://order-{tmp_path.name}-{os.getpid()}")


ITEMS = 5 * PART_BYTES // 8  #: of two and a half parts


def saved_there(store: CheckpointStore, how: str, tensor: Any, under: Any) -> Any:
    """What is found in the store, when it was saved in that way and changed as soon as it may be."""
    if how == "dcp":
        dcp.save({"w": tensor}, storage_writer=StoreWriter(store, 1), no_dist=True)
        under.data.fill_(-1.0)
        found = {"w": torch.zeros(ITEMS)}
        dcp.load(found, storage_reader=StoreReader(store, 1), no_dist=True)
        return found["w"]
    if how == "save":
        ckpt.save(store, 1, {"model": {"w": tensor}})
        under.data.fill_(-1.0)
    else:
        handle = ckpt.save_async(store, 1, {"model": {"w": tensor}}, max_host_bytes=PART_BYTES)
        handle.wait_staged(60)
        under.data.fill_(-1.0)
        handle.wait(60)
    return ckpt.load(store, 1)["model"]["w"]


@pytest.mark.parametrize("how", ["save", "dcp", "waves"])
def test_at_a_url(card: Card, remote: CheckpointStore, how: str) -> None:
    """After the trainer's work on its stream, through the ring alone."""
    side = Stream()
    with card.stream(side):
        found = saved_there(remote, how, *weights(side, 3.0, ITEMS))
    assert found.unique().tolist() == [3.0]
    assert not card.default.work, "no other stream was used"
    if how == "waves":
        (buffer,) = background._buffers[os.path.realpath(remote.backend.location)].ring
        assert buffer.nbytes == PART_BYTES
        assert memory.pinned(buffer)
    assert card.pinned_bytes == PART_BYTES * (1 if how == "waves" else 3)
    assert remote.verify(1).ok


@pytest.mark.parametrize("how", ["save", "dcp", "waves"])
@pytest.mark.parametrize("planted", ["before the trainer's work", "before the copies have ended"])
def test_planted_at_a_url(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, planted: str) -> None:
    if planted == "before the trainer's work":
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    else:
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    store = CheckpointStore(f"memory://order-{tmp_path.name}-{os.getpid()}")
    side = Stream()
    with card.stream(side):
        found = saved_there(store, how, *weights(side, 3.0, ITEMS))
    assert found.unique().tolist() != [3.0]


def test_the_same_files_at_a_url(card: Card, store: CheckpointStore, tmp_path: Path) -> None:
    """Byte for byte, with tensors and tails that cross parts."""
    torch.manual_seed(1)
    sizes = [5, PART_BYTES // 4 - 100, 7, 3 * PART_BYTES // 8, 1, 0, PART_BYTES // 2]
    state = {f"t{number}": torch.rand(size).as_subclass(OnCard) for number, size in enumerate(sizes)}
    state |= {"turned": torch.rand(30, 40).t().as_subclass(OnCard), "cpu": torch.arange(5), "bytes": torch.arange(9).byte()}
    remote = CheckpointStore(f"memory://order-{tmp_path.name}-{os.getpid()}")
    for target in (store, remote):
        ckpt.save(target, 1, {"model": state, "lr": 0.1})
        dcp.save(state, storage_writer=StoreWriter(target, 2), no_dist=True)
    for step, files in ((1, {"model.safetensors", "state.json"}), (2, {".metadata", "__0_0.distcp"})):
        (folder,) = {blob.key.rpartition("/")[0] for blob in remote.backend.list() if blob.key.startswith(f"step-{step}.")}
        for name in files:
            assert remote.backend.get(f"{folder}/{name}") == Path(store.folder, f"step-{step}", name).read_bytes(), name


@pytest.mark.parametrize("how", ["save", "dcp", "waves"])
def test_saves_in_inference_mode(card: Card, tmp_path: Path, how: str) -> None:
    """The mode is a thread's, and other threads fill the buffers."""
    with torch.inference_mode():
        under = torch.full((ITEMS,), 3.0)
        tensor = under.as_subclass(OnCard)
        found = saved_there(CheckpointStore(f"memory://order-{tmp_path.name}-{os.getpid()}"), how, tensor, under)
    assert found.unique().tolist() == [3.0]


# --- loads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tensor of many chunks in step 1 (by save) and in step 2 (by dcp.save); one thread reads all of them."""
    monkeypatch.setattr(loading, "_MOST_THREADS", 1)
    tensor = torch.arange(9 * blocks.BLOCK_BYTES // 8)
    ckpt.save(store, 1, {"model": {"w": tensor, "small": torch.ones(3)}})
    dcp.save({"w": tensor, "small": torch.ones(3)}, storage_writer=StoreWriter(store, 2), no_dist=True)
    return tensor


def loaded(card: Card, store: CheckpointStore, like: Any, how: str) -> Any:
    """What is found on the device once all that was asked of it has ended."""
    side = Stream()
    with card.stream(side):
        if how == "load":
            found = ckpt.load(store, 1, map_location="cuda:1")["model"]
        else:
            under = torch.zeros_like(like)

            def trainer() -> None:  # what it still does with that memory
                with torch.inference_mode():
                    under.fill_(-7)

            side.add(trainer)
            found = {"w": under.as_subclass(OnCard), "small": torch.zeros(3).as_subclass(OnCard)}
            dcp.load(found, storage_reader=StoreReader(store, 2), no_dist=True)
    done = [tensor.as_subclass(torch.Tensor).clone() for tensor in (found["w"], found["small"])]
    side.synchronize()
    assert all(isinstance(tensor, OnCard) for tensor in found.values())
    assert torch.equal(done[0], found["w"].as_subclass(torch.Tensor)), "something comes after the load"
    return done


@pytest.mark.parametrize("how", ["load", "dcp.load"])
def test_loads(card: Card, store: CheckpointStore, large: Any, how: str) -> None:
    """What is loaded is there when the load returns, after what was done with that memory before."""
    found, small = loaded(card, store, large, how)
    assert torch.equal(found, large)
    assert small.tolist() == [1.0] * 3
    assert not card.default.work, "no other stream was used"


@pytest.mark.parametrize("planted", ["a buffer is filled while it is copied", "nobody waits for the end"])
def test_planted_loads(card: Card, store: CheckpointStore, large: Any, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    if planted == "nobody waits for the end":
        monkeypatch.setattr(bounce.BounceBuffers, "close", lambda self: None)
    else:
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    found, _ = loaded(card, store, large, "load")
    assert not torch.equal(found, large)


def test_planted_loads_before_the_trainers_work(
    card: Card, store: CheckpointStore, large: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    with pytest.raises(AssertionError, match="after the load"):
        loaded(card, store, large, "dcp.load")


def test_a_part_of_it_on_the_host(card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an optimizer that is kept there: the engine reads what no device gets, and nothing is read twice."""
    given: list[loading.Want] = []
    read = loading._from_disk

    def reading(root: str, files: Any, chunk_bytes: int) -> None:
        given.extend(want for _, wants in files for want in wants)
        read(root, files, chunk_bytes)

    monkeypatch.setattr(loading, "_from_disk", reading)
    host = {"a": torch.arange(3 * blocks.BLOCK_BYTES // 8), "b": torch.arange(999), "c": torch.arange(blocks.BLOCK_BYTES // 4)}
    there = {"aa": torch.arange(2 * blocks.BLOCK_BYTES // 8), "bb": torch.ones(5)}
    dcp.save(host | there, storage_writer=StoreWriter(store, 3), no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in host.items()}
    found |= {name: torch.zeros_like(tensor).as_subclass(OnCard) for name, tensor in there.items()}
    before = reads.count_bytes()
    dcp.load(found, storage_reader=StoreReader(store, 3), no_dist=True)
    taken = reads.count_bytes() - before
    size = Path(store.folder, "step-3", "__0_0.distcp").stat().st_size
    assert size <= taken < size + 1_000_000
    assert sum(len(want.memory) for want in given) > 3 * blocks.BLOCK_BYTES
    for name, tensor in (host | there).items():
        assert torch.equal(found[name].as_subclass(torch.Tensor), tensor), name


def test_single_elements_out_of_larger_tensors(card: Card, store: CheckpointStore) -> None:
    """They count as contiguous, at any stride."""
    whole = torch.arange(32.0).reshape(4, 8)
    parts = {
        "one": whole[0, 3:4:8],
        "none": whole[0, ::2][:0],
        "corner": whole[1:2, ::8],
        "odd": torch.arange(3, dtype=torch.uint8),
    }
    parts["f8"] = torch.ones(7).to(torch.float8_e5m2)
    state = {name: tensor.as_subclass(OnCard) for name, tensor in parts.items()}
    ckpt.save(store, 1, {"model": state})
    dcp.save(state, storage_writer=StoreWriter(store, 2), no_dist=True)
    target = {name: torch.zeros_like(tensor) for name, tensor in parts.items()}
    target |= {"one": torch.zeros(8)[::8], "corner": torch.zeros(4, 8)[1:2, ::8]}
    found = {name: tensor.as_subclass(OnCard) for name, tensor in target.items()}
    dcp.load(found, storage_reader=StoreReader(store, 2), no_dist=True)
    for loaded in (ckpt.load(store, 1)["model"], ckpt.load(store, 1, map_location="cuda:1")["model"], found):
        assert same({name: tensor.as_subclass(torch.Tensor) for name, tensor in loaded.items()}, parts)


def test_damage_is_found_before_it_is_on_the_device(card: Card, store: CheckpointStore, large: Any) -> None:
    path = Path(store.folder, "step-1", "model.safetensors")
    with path.open("r+b") as file:
        file.seek(5 * blocks.BLOCK_BYTES + 99)
        file.write(b"\x5a")
    with pytest.raises(DigestMismatchError):
        loaded(card, store, large, "load")


def test_no_load_in_the_capture_of_a_graph(card: Card, store: CheckpointStore, large: Any) -> None:
    card.capturing = True
    with pytest.raises(UsageError, match="capture"):
        loaded(card, store, large, "load")


@pytest.mark.parametrize("how", ["load", "dcp.load"])
def test_loads_in_inference_mode(card: Card, store: CheckpointStore, large: Any, how: str) -> None:
    """The mode is a thread's, and other threads fill what was made in it."""
    with torch.inference_mode():
        assert torch.equal(loaded(card, store, large, how)[0], large)


def test_a_default_device(card: Card, store: CheckpointStore) -> None:
    """Host buffers are on the host, whatever the trainer's default."""
    tensor, _ = weights(card.default, 3.0)
    with torch.device("meta"):
        ckpt.save(store, 1, {"model": {"w": tensor}})
        ckpt.save_async(store, 2, {"model": {"w": tensor}}).wait(30)
        dcp.save({"w": tensor, "more": tensor[::2]}, storage_writer=StoreWriter(store, 3), no_dist=True)
    assert saved(store, 1) == saved(store, 2) == [3.0]
    found = {"w": torch.zeros(1000), "more": torch.zeros(1000)[::2]}
    with torch.device("meta"):
        dcp.load(found, storage_reader=StoreReader(store, 3), no_dist=True)
    assert found["w"].tolist() == [3.0] * 1000
    assert found["more"].tolist() == [3.0] * 500


def test_priority(card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = native.write_range

    def write_range(*args: Any) -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        real(*args)

    monkeypatch.setattr(native, "write_range", write_range)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    tensor, _ = weights(card.default, 1.0)
    dcp.save({"w": tensor}, storage_writer=StoreWriter(store, 1, nice=5), no_dist=True)
    assert set(seen) == {max(before, 5)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"w": tensor}, storage_writer=StoreWriter(store, 2, nice=-3), no_dist=True)
    assert "nice is -3" in str(caught.value.failures)
    assert not os.path.exists(os.path.join(store.folder, "step-2"))


def test_archives_of_many_blocks(card: Card, store: CheckpointStore) -> None:
    """CRC-32s of tensors that cross blocks, whose tails are in others: plain torch reads them, and checks."""
    torch.manual_seed(1)
    sizes = [5, blocks.BLOCK_BYTES // 4 * 3 - 100, 7, blocks.BLOCK_BYTES // 4 - 250, 1, 0, 2 * blocks.BLOCK_BYTES // 4]
    state = {f"t{number}": torch.rand(size) for number, size in enumerate(sizes)}
    on_card = {name: tensor.clone().as_subclass(OnCard) for name, tensor in state.items()}
    dcp.save(on_card | {"lr": 0.1, "cpu": torch.arange(5)}, storage_writer=StoreWriter(store, 1), no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()} | {"cpu": torch.zeros(5, dtype=torch.int64)}
    dcp.load(found, checkpoint_id=str(Path(store.folder, "step-1")), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["cpu"].tolist() == list(range(5))
    data = Path(store.folder, "step-1", "__0_0.distcp").read_bytes()
    metadata = dcp.FileSystemReader(str(Path(store.folder, "step-1"))).read_metadata()
    for index, place in metadata.storage_data.items():
        archive = data[place.offset : place.offset + place.length]
        if index.fqn != "lr":
            assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None, index
    assert store.verify(1).ok


def test_no_pinned_memory(card: Card, store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    """A container's limit: slower, and right; the buffers are used again all the same."""
    card.pinnable = False
    for step in (1, 2):
        tensor, _ = weights(card.default, float(step))
        before = card.allocated
        ckpt.save_async(store, step, {"model": {"w": tensor}}).wait(30)
        assert step == 1 or card.allocated == before
        assert saved(store, step) == [float(step)]
    assert caplog.text.count("no pinned host memory") == 1
    kept = background._buffers[os.path.realpath(store.folder)].tensors
    assert memory.pinned(kept[0])


def test_a_graph_that_is_captured(card: Card, store: CheckpointStore) -> None:
    card.capturing = True
    tensor, _ = weights(card.default, 1.0)
    for more in ({}, {"max_host_bytes": 2 * blocks.BLOCK_BYTES}):
        with pytest.raises(UsageError, match="capture"):
            ckpt.save_async(store, 1, {"model": {"w": tensor}}, **more)
    assert not card.default.work[1:], "no copy became a part of the graph"
