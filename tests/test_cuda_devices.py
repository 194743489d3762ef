"""Two devices, memory that is given back, and errors that stay: on the fake devices of fake_card.py.

Each bug that this is about is planted once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore
from ckptstore.errors import UsageError
from tests.fake_card import CARD, OTHER, Card, OnCard, OnOther, Stream

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from ckptstore.torch import StoreReader, StoreWriter, background, blocks, filling, memory  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]
BLOCK = blocks.BLOCK_BYTES
WAYS = ["save", "async", "waves", "dcp"]
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


def begin(store: CheckpointStore, step: int, state: dict[str, Any], how: str) -> None:
    """Save in that way."""
    if how == "save":
        ckpt.save(store, step, {"model": state})
    elif how == "dcp":
        dcp.save(state, storage_writer=StoreWriter(store, step), no_dist=True)
    else:
        more = {"max_host_bytes": 2 * BLOCK} if how == "waves" else {}
        ckpt.save_async(store, step, {"model": state}, **more).wait(60)


def found(store: CheckpointStore, step: int, like: dict[str, Any], how: str) -> dict[str, Any]:
    if how != "dcp":
        return dict(ckpt.load(store, step)["model"])
    target = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    dcp.load(target, storage_reader=StoreReader(store, step), no_dist=True)
    return target


def late(stream: Stream, values: Any, kind: Any) -> Any:
    """A tensor on a device whose values a kernel in `stream` has still to write."""
    under = torch.zeros_like(values)
    stream.add(lambda: under.data.copy_(values))
    return under.as_subclass(kind)


def on_both(one: Stream, other: Stream) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state on two devices, of whole blocks and of what is not contiguous, and its values."""
    torch.manual_seed(3)
    values = {
        "a": torch.rand(5 * BLOCK // 8),
        "b": torch.rand(3 * BLOCK // 8),
        "turned": torch.rand(70, 50),
        "c": torch.rand(BLOCK // 4, dtype=torch.float64),
        "conj": torch.rand(30, dtype=torch.complex64),
    }
    state = {
        name: late(one if number % 2 else other, tensor, OnCard if number % 2 else OnOther)
        for number, (name, tensor) in enumerate(values.items())
    }
    state["turned"], values["turned"] = state["turned"].t(), values["turned"].t()
    state["conj"], values["conj"] = state["conj"].conj(), values["conj"].conj()
    return state, values


def saved_right(card: Card, store: CheckpointStore, how: str) -> bool:
    one, other = Stream(CARD), Stream(OTHER)
    with card.stream(one), card.stream(other), card.on_device(CARD):
        state, values = on_both(one, other)
        begin(store, 1, state, how)
    loaded = found(store, 1, values, how)
    return all(torch.equal(loaded[name], tensor) for name, tensor in values.items()) and not card.faults


@pytest.mark.parametrize("how", WAYS)
def test_a_state_on_two_devices(card: Card, store: CheckpointStore, how: str) -> None:
    assert saved_right(card, store, how), card.faults


def only_the_first(self: Any) -> None:
    for stream in list(self._of.values())[:1]:
        stream.synchronize()


def beside_the_stream(part: Any, streams: Any) -> Any:
    stream = streams.of(part) if isinstance(part, torch.Tensor) else None
    with memory.on(None):
        return (memory.flat(part.resolve_conj().resolve_neg().contiguous()), stream, None) if stream else REAL(part, streams)


def without_its_device(stream: Any) -> Any:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


REAL = filling._source
PLANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a copy on the device beside our stream": lambda patch: patch.setattr(filling, "_source", beside_the_stream),
    "the stream of another device": lambda patch: patch.setattr(
        filling.Streams, "of", lambda self, tensor: next(iter(self._of.values())) if tensor.is_cuda else None
    ),
    "a stream without its device": lambda patch: patch.setattr(memory, "on", without_its_device),
    "an event on a thread without a device": lambda patch: patch.setattr(
        memory, "await_event", lambda stream, event: event.synchronize()
    ),
    "pageable buffers": lambda patch: patch.setattr(
        memory, "buffers", lambda count, size, pinned: [memory._pages(size) for _ in range(count)]
    ),
}


@pytest.mark.parametrize("planted", PLANTS)
def test_planted(card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    PLANTS[planted](monkeypatch)
    assert not saved_right(card, store, "waves")


def test_planted_memory_that_is_given_back(card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made on the trainer's stream for the copy, waited for, and gone before it was copied on ours."""

    def source(part: Any, streams: Any) -> Any:
        if not isinstance(part, torch.Tensor) or not part.is_cuda:
            return REAL(part, streams)
        flat = memory.flat(part.contiguous())
        torch.cuda.current_stream(part.device).synchronize()
        return flat, streams.of(part), None

    monkeypatch.setattr(filling, "_source", source)
    state = {name: torch.rand(900, 2).t().as_subclass(OnCard) for name in "abc"}
    ckpt.save(store, 1, {"model": state})
    assert set(card.faults) == {"memory was given back before it was copied"}


@pytest.fixture
def two_steps(store: CheckpointStore) -> CheckpointStore:
    values = torch.arange(5 * BLOCK // 8)
    ckpt.save(store, 1, {"model": {"w": values}})
    dcp.save({"w": values}, storage_writer=StoreWriter(store, 2), no_dist=True)
    return store


def breaks_after(card: Card, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Another's kernel has gone wrong by the n-th time that a stream works."""
    seen = iter(range(calls))
    real = Stream.run

    def run(self: Stream, until: int) -> None:
        if next(seen, None) is None:
            card.broken = ILLEGAL
        real(self, until)

    monkeypatch.setattr(Stream, "run", run)


@contextlib.contextmanager
def broken() -> Iterator[None]:
    """The device's error comes out, by itself or in torch's."""
    with pytest.raises((RuntimeError, CheckpointException)) as caught:
        yield
    assert ILLEGAL in str(getattr(caught.value, "failures", caught.value))


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("how", [*WAYS, "url"])
def test_an_error_that_stays_fails_the_save(
    card: Card, two_steps: CheckpointStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, calls: int
) -> None:
    """It is raised, in time, and nothing is committed or left behind; the next save, of what is on the host, works."""
    store = CheckpointStore(f"memory://devices-{tmp_path.name}-{os.getpid()}") if how == "url" else two_steps
    before = [one.step for one in store.list()] if how != "url" else []
    state = {"a": late(card.default, torch.ones(5 * BLOCK // 4), OnCard), "b": torch.ones(40, 2).t().as_subclass(OnCard)}
    breaks_after(card, monkeypatch, calls)
    began = time.monotonic()
    if how == "async" and calls:
        calls = 0  # it waits once
        begin(store, 3, {"a": torch.ones(3)}, how)
        before.append(3)
        card.broken = ILLEGAL
    with broken():
        begin(store, 4, state, "save" if how == "url" else how)
    assert time.monotonic() - began < 20
    assert ([one.step for one in store.list()] if before else []) == before
    if how != "url":
        assert not [name for name in os.listdir(Path(store.folder, ".ckptstore")) if name.startswith("draft")]
    begin(store, 5, {"a": torch.ones(7)}, "save")
    assert ckpt.load(store, 5)["model"]["a"].tolist() == [1.0] * 7


@pytest.mark.parametrize("how", ["load", "dcp.load"])
def test_an_error_that_stays_fails_the_load(
    card: Card, two_steps: CheckpointStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    breaks_after(card, monkeypatch, 2)
    with broken():
        if how == "load":
            ckpt.load(two_steps, 1, map_location="cuda:1")
        else:
            target = {"w": torch.zeros(5 * BLOCK // 8, dtype=torch.int64).as_subclass(OnCard)}
            dcp.load(target, storage_reader=StoreReader(two_steps, 2), no_dist=True)


def test_a_save_that_fails_while_it_is_staged_leaves_no_copy_under_way(card: Card, store: CheckpointStore) -> None:
    """The next one uses the same buffers, perhaps on another stream."""
    one, two = Stream(), Stream()
    with card.stream(one):
        first = late(one, torch.full((1000,), 1.0), OnCard)
        with pytest.raises(UsageError, match="only as a pickle"):
            ckpt.save_async(store, 1, {"model": {"w": first}, "no": object()})
    with card.stream(two):
        handle = ckpt.save_async(store, 2, {"model": {"w": late(two, torch.full((1000,), 2.0), OnCard)}})
    one.synchronize()  # the trainer's
    kept = background._buffers[os.path.realpath(store.folder)].tensors[0]
    assert kept.unique().tolist() == [2.0]
    handle.wait(30)
    assert ckpt.load(store, 2)["model"]["w"].unique().tolist() == [2.0]


def test_the_driver_is_not_asked_of_states_on_the_host(
    card: Card, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.6 makes a context on device 0 for that, in a process that has never used a GPU."""

    def asked(tensor: Any) -> bool:
        raise AssertionError("asks the driver")

    monkeypatch.setattr(torch.Tensor, "is_pinned", asked)
    small = {"w": torch.ones(100), "none": torch.ones(0)}
    waves: dict[str, Any] = {"max_host_bytes": 2 * BLOCK}
    allocated = []
    for step in (1, 2):
        before = card.allocated
        ckpt.save_async(store, step, {"model": small}).wait(30)
        allocated.append(card.allocated - before)
    for step in (3, 4):
        ckpt.save_async(store, step, {"model": {"w": torch.ones(BLOCK)}}, **waves).wait(30)
    assert allocated == [2, 0]
