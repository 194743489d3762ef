"""States on a real GPU: saved, staged and loaded while its streams are busy. Without one all of this skips.

test_cuda_order.py checks the same order on a fake device, everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore
from ckptstore.errors import SourceChangedError, UsageError
from ckptstore.saves.background import wait_all
from ckptstore.transfer.sending import PART_BYTES

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from ckptstore.torch import StoreReader, StoreWriter, background, blocks, memory  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore"),
]
CYCLES = 400_000_000  #: of a kernel that only waits: a fifth of a second
ITEMS = 16 << 20


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


@pytest.fixture(params=["default", "side"])
def stream(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The trainer's stream, current in this thread."""
    ours = torch.cuda.default_stream() if request.param == "default" else torch.cuda.Stream()
    with torch.cuda.stream(ours):
        yield ours
    torch.cuda.synchronize()


def late(value: float, items: int = ITEMS) -> Any:
    """A tensor that a kernel has still to write when this returns."""
    tensor = torch.zeros(items, device="cuda")
    torch.cuda.current_stream().synchronize()
    torch.cuda._sleep(CYCLES)
    tensor.fill_(value)
    return tensor


def values(store: CheckpointStore, step: int) -> list[float]:
    found: list[float] = ckpt.load(store, step)["model"]["w"].unique().tolist()
    return found


def test_save_async_takes_what_the_stream_will_have_written(stream: Any, store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        tensor = late(float(step))
        handle = ckpt.save_async(store, step, {"model": {"w": tensor}})
        assert handle.staged
        tensor.fill_(-1.0)  # the trainer goes on
        handle.wait(60)
        assert values(store, step) == [float(step)]
    kept = background._buffers[os.path.realpath(store.folder)].tensors
    assert [tensor.is_pinned() for tensor in kept] == [True]


def test_planted_nobody_waits_for_the_copies(stream: Any, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background._Buffers, "finish", lambda self: None)
    tensor = late(5.0)
    ckpt.save_async(store, 1, {"model": {"w": tensor}}).wait(60)
    assert values(store, 1) != [5.0]


def test_staging_waits_for_no_other_stream(store: CheckpointStore) -> None:
    """A long kernel elsewhere (the next batch, a generation) does not hold the trainer up."""
    tensor = torch.full((ITEMS,), 2.0, device="cuda")
    ckpt.save_async(store, 1, {"model": {"w": tensor}}).wait(60)
    torch.cuda.synchronize()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        for _ in range(20):
            torch.cuda._sleep(CYCLES)
    ckpt.save_async(store, 2, {"model": {"w": tensor}})
    assert not busy.query(), "it waited for a stream that is not the trainer's"
    torch.cuda.synchronize()


def test_waves(stream: Any, store: CheckpointStore) -> None:
    """With less host memory than the state; changed as soon as it is staged."""
    for step in (1, 2):
        tensor = late(float(step), 5 * blocks.BLOCK_BYTES // 4)
        handle = ckpt.save_async(store, step, {"model": {"w": tensor}}, max_host_bytes=2 * blocks.BLOCK_BYTES)
        handle.wait_staged(60)
        tensor.fill_(-1.0)
        handle.wait(60)
        assert values(store, step) == [float(step)]
    assert all(piece.is_pinned() for piece in background._buffers[os.path.realpath(store.folder)].ring)


def test_waves_find_a_step_that_came_too_early(store: CheckpointStore) -> None:
    tensor = torch.ones(40 * blocks.BLOCK_BYTES // 4, device="cuda")
    handle = ckpt.save_async(store, 1, {"model": {"w": tensor}}, max_host_bytes=2 * blocks.BLOCK_BYTES)
    assert not handle.staged
    tensor.add_(1.0)
    with pytest.raises(SourceChangedError, match="changed before it was staged"):
        handle.wait(60)
    assert not store.list()


@pytest.mark.parametrize("how", ["save", "dcp", "dcp async"])
def test_saves_that_block(stream: Any, store: CheckpointStore, how: str) -> None:
    tensor = late(4.0)
    if how == "save":
        ckpt.save(store, 1, {"model": {"w": tensor}})
        assert values(store, 1) == [4.0]
        return
    if how == "dcp":
        dcp.save({"w": tensor}, storage_writer=StoreWriter(store, 1), no_dist=True)
    else:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            pending = dcp.async_save({"w": tensor}, storage_writer=StoreWriter(store, 1))
            tensor.fill_(-1.0)
            pending.result(60)
        finally:
            torch.distributed.destroy_process_group()
    found = torch.zeros(ITEMS, device="cuda")
    dcp.load({"w": found}, storage_reader=StoreReader(store, 1), no_dist=True)
    assert found.unique().tolist() == [4.0]
    plain = {"w": torch.zeros(ITEMS)}
    dcp.load(plain, checkpoint_id=str(Path(store.folder, "step-1")), no_dist=True)
    assert plain["w"].unique().tolist() == [4.0]


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    name = request.param
    return CheckpointStore(request.getfixturevalue("s3") if name == "s3" else f"memory://cuda-{tmp_path.name}-{os.getpid()}")


def saved_there(store: CheckpointStore, how: str, tensor: Any) -> Any:
    """What is found at the URL, when it was changed as soon as it may be."""
    if how == "dcp":
        dcp.save({"w": tensor}, storage_writer=StoreWriter(store, 1), no_dist=True)
        tensor.fill_(-1.0)
        found = {"w": torch.zeros(ITEMS, device="cuda")}
        dcp.load(found, storage_reader=StoreReader(store, 1), no_dist=True)
        return found["w"]
    if how == "save":
        ckpt.save(store, 1, {"model": {"w": tensor}})
        tensor.fill_(-1.0)
    else:
        handle = ckpt.save_async(store, 1, {"model": {"w": tensor}}, max_host_bytes=PART_BYTES)
        handle.wait_staged(60)
        tensor.fill_(-1.0)
        handle.wait(60)
        (buffer,) = background._buffers[os.path.realpath(store.backend.location)].ring
        assert (buffer.nbytes, buffer.is_pinned()) == (PART_BYTES, True)
    return ckpt.load(store, 1, map_location="cuda")["model"]["w"]


@pytest.mark.parametrize("how", ["save", "dcp", "waves"])
def test_at_a_url(stream: Any, remote: CheckpointStore, how: str) -> None:
    """Part by part through the ring: what the stream will have written."""
    assert saved_there(remote, how, late(4.0)).unique().tolist() == [4.0]
    assert remote.verify(1).ok


@pytest.mark.parametrize("how", ["save", "dcp", "waves"])
def test_planted_parts_that_are_sent_before_they_are_copied(
    stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(memory, "await_event", lambda stream, event: None)
    store = CheckpointStore(f"memory://cuda-{tmp_path.name}-{os.getpid()}")
    assert saved_there(store, how, late(7.0)).unique().tolist() != [7.0]


def test_the_same_files_at_a_url(store: CheckpointStore, remote: CheckpointStore) -> None:
    torch.manual_seed(1)
    state = {f"t{size}": torch.rand(size, device="cuda") for size in (5, PART_BYTES // 4 - 100, 7, PART_BYTES // 2, 0)}
    state |= {"turned": torch.rand(33, 65, device="cuda").t(), "cpu": torch.arange(5)}
    for target in (store, remote):
        ckpt.save(target, 1, {"model": state})
        dcp.save(state, storage_writer=StoreWriter(target, 2), no_dist=True)
    for step, name in ((1, "model.safetensors"), (2, "__0_0.distcp")):
        (key,) = (blob.key for blob in remote.backend.list() if blob.key.endswith(name))
        assert remote.backend.get(key) == Path(store.folder, f"step-{step}", name).read_bytes(), name


def bits(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def test_every_dtype_and_layout(store: CheckpointStore) -> None:
    raw = torch.randint(0, 255, (6, 64), dtype=torch.uint8, device="cuda")
    state = {str(dtype): raw.view(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn)}
    state["transposed"] = torch.rand(33, 65, device="cuda").t()
    state["strided"] = torch.rand(64, 64, device="cuda")[::3, 1::2]
    state["conjugated"] = torch.rand(8, 8, dtype=torch.complex64, device="cuda").conj()
    state["empty"] = torch.empty(0, 4, device="cuda")
    state["scalar"] = torch.tensor(3.5, device="cuda")
    state["on the cpu"] = torch.rand(100)
    state["tied"] = state["on the cpu"]
    ckpt.save(store, 1, {"model": state})
    ckpt.save_async(store, 2, {"model": state}).wait(60)
    for step in (1, 2):
        found = ckpt.load(store, step, map_location="cuda")["model"]
        for name, tensor in state.items():
            assert found[name].device.type == "cuda", name
            assert found[name].shape == tensor.shape, name
            assert torch.equal(bits(found[name]), bits(tensor.resolve_conj())), name
        assert found["tied"].data_ptr() == found["on the cpu"].data_ptr()


def test_no_save_is_recorded_in_a_graph(store: CheckpointStore) -> None:
    tensor = torch.ones(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UsageError, match="capture"), torch.cuda.graph(graph):
        ckpt.save_async(store, 1, {"model": {"w": tensor}})
    ckpt.save_async(store, 2, {"model": {"w": tensor}}).wait(60)
    assert values(store, 2) == [1.0]


def test_an_optimizer_goes_on_as_before(store: CheckpointStore) -> None:
    """Ten steps of AdamW in one go, and with a restart in a new model after five: the same weights, bit for bit."""

    def made() -> tuple[Any, Any]:
        torch.manual_seed(7)
        model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).cuda()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            data = torch.rand(64, 256, device="cuda")
            optimizer.zero_grad()
            (model(data) - data).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(5))
    ckpt.save_async(store, 5, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(5, 10))
    wait_all(60)
    again, its = made()
    state = ckpt.load(store, 5, map_location="cuda")
    again.load_state_dict(state["model"])
    its.load_state_dict(state["optimizer"])
    train(again, its, range(5, 10))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_child_of_a_process_that_uses_the_gpu(store: CheckpointStore) -> None:
    """A forked dataloader worker ends as it would, and the save in flight too."""
    tensor = torch.full((ITEMS,), 6.0, device="cuda")
    handle = ckpt.save_async(store, 1, {"model": {"w": tensor}})
    child = os.fork()
    if child == 0:
        os._exit(0 if not background._buffers else 1)
    handle.wait(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert values(store, 1) == [6.0]


def test_loads_wait_for_nobody_and_are_ready(store: CheckpointStore) -> None:
    """What `load` returns can be used on any stream at once."""
    wanted = torch.rand(ITEMS, device="cuda")
    ckpt.save(store, 1, {"model": {"w": wanted}})
    began = time.monotonic()
    side = torch.cuda.Stream()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = ckpt.load(store, 1, map_location="cuda")["model"]["w"]
    with torch.cuda.stream(side):
        same = torch.equal(found, wanted)
    assert same
    assert time.monotonic() - began < 60
