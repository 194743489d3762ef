"""StoreWriter and StoreReader under torch.distributed.checkpoint: one process, FSDP2 on gloo ranks, and ranks that die."""

from __future__ import annotations

import itertools
import json
import random
import signal
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, native
from ckptstore.errors import IntegrityError, UsageError
from ckptstore.formats import dcp as dcp_format
from ckptstore.formats import inert
from ckptstore.model import Status
from ckptstore.saves import steps
from tests import reads, trees, warm
from tests.test_torch_state import same

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from ckptstore.torch import StoreReader, StoreWriter, reader  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


def folder(store: CheckpointStore, step: int) -> Path:
    return Path(store.folder) / f"step-{step}"


def make_state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    tied = torch.randn(50, 4)
    return {
        "model": {
            "w": torch.randn(300, 7),
            "h": torch.randn(9).half(),
            "t": torch.randn(6, 5).t(),
            "tied": tied,
            "too": tied,
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3, 4)}}, "lr": 0.1},
        "odd": [torch.tensor([True, False]), torch.arange(5, dtype=torch.uint8), torch.ones(3).to(torch.float8_e5m2)],
        "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "text": "abc",
        "number": 7,
    }


def blank(state: Any) -> Any:
    """The same structure with other values."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return type(state)()


def save(store: CheckpointStore, step: int, state: dict[str, Any]) -> StoreWriter:
    writer = StoreWriter(store, step)
    dcp.save(state, storage_writer=writer, no_dist=True)
    return writer


def load(store: CheckpointStore, step: int | None, state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, storage_reader=StoreReader(store, step), no_dist=True)
    return state


# --- one process ---------------------------------------------------------------------------------------------------


def test_a_metadata_that_names_exabytes(store: CheckpointStore, tmp_path: Path) -> None:
    """Whoever made it has sealed it: the digests are right. No memory is made for what cannot be there."""
    made = tmp_path / "made"
    made.mkdir()
    for length in (1 << 20, 1 << 62):
        (made / "__0_0.distcp").write_bytes(b"x" * 2000)
        (made / ".metadata").write_bytes(trees.dcp_metadata([("a", "__0_0.distcp", 10, length)], {"a": ("float32", (4,))}))
        store.save(1, made)
        with pytest.raises((dcp.CheckpointException, IntegrityError)) as caught:
            load(store, 1, {"a": torch.zeros(4)})
        assert isinstance(caught.value, IntegrityError) or "behind the end" in str(caught.value)


def test_comes_back_and_is_stock(store: CheckpointStore) -> None:
    state = make_state()
    writer = save(store, 4, state)
    assert same(load(store, 4, blank(state)), state)
    assert same(load(store, None, blank(state)), state)
    plain = blank(state)
    dcp.load(plain, checkpoint_id=folder(store, 4), no_dist=True)
    assert same(plain, state), "stock torch reads it too"
    assert {path.name for path in folder(store, 4).iterdir()} == {".metadata", "__0_0.distcp", "ckptstore.manifest.json"}
    assert writer.manifest is not None
    assert {entry.path for entry in writer.manifest.files} == {".metadata", "__0_0.distcp"}
    checkpoint = store.get(4)
    assert (checkpoint.status, checkpoint.format) == (Status.COMMITTED, "dcp")
    assert store.verify(4).ok


def test_archives_are_whole_zips(store: CheckpointStore) -> None:
    """Every item by zipfile, which checks the CRC-32 that torch does not."""
    save(store, 1, make_state())
    data = (folder(store, 1) / "__0_0.distcp").read_bytes()
    found = dcp_format.read_metadata((folder(store, 1) / ".metadata").read_bytes())
    assert len(found.items) > 8
    for item in found.items:
        with zipfile.ZipFile(BytesIO(data[item.offset : item.offset + item.length])) as archive:
            assert archive.testzip() is None
    assert str(store.folder).encode() not in (folder(store, 1) / ".metadata").read_bytes(), "no path in it"


def test_what_stock_torch_saved(store: CheckpointStore, tmp_path: Path) -> None:
    """A folder written by torch, kept by store.save: other archives than ours."""
    state = make_state(1)
    dcp.save(state, checkpoint_id=tmp_path / "plain", no_dist=True)
    store.save(9, tmp_path / "plain")
    assert same(load(store, 9, blank(state)), state)


def test_nested_again_from_the_metadata(store: CheckpointStore, tmp_path: Path) -> None:
    """torch's own way to load without knowing the structure needs planner_data."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state = make_state(2)
    save(store, 1, state)
    found: dict[str, Any] = {}
    stock: dict[str, Any] = {}
    readers = (StoreReader(store, 1), dcp.FileSystemReader(folder(store, 1)))
    for result, storage in zip((found, stock), readers, strict=True):
        _load_state_dict(result, storage_reader=storage, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    assert same(found["model"]["w"], state["model"]["w"])
    assert same(found["optimizer"], stock["optimizer"])
    assert same(found, stock)


def test_into_tensors_whose_memory_is_not_their_values(store: CheckpointStore) -> None:
    state = {"c": torch.randn(4, dtype=torch.complex64), "n": torch.randn(1)}
    save(store, 1, state)
    found = {"c": torch.zeros(4, dtype=torch.complex64).conj(), "n": torch.zeros(1, dtype=torch.complex64).conj().imag}
    assert found["c"].is_conj()
    assert found["n"].is_neg()
    assert found["n"].is_contiguous()
    assert same(load(store, 1, found), state)


def test_async_save(store: CheckpointStore) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state = make_state()
        kept = {key: value.clone() for key, value in state["model"].items()}
        future = dcp.async_save(state, storage_writer=StoreWriter(store, 1))
        for value in state["model"].values():
            value.zero_()
        future.result()
        found = load(store, 1, blank(make_state()))
    finally:
        dist.destroy_process_group()
    assert all(same(kept[key], found["model"][key]) for key in kept)


AS_2_6 = """
import importlib, torch
torch.__version__ = "2.6.0+cu124"
import ckptstore.torch.writer as writer
from ckptstore import CheckpointStore
from torch.distributed.checkpoint.staging import AsyncStager
of_2_6 = importlib.reload(writer).StoreWriter(CheckpointStore("nowhere"), 1)
assert isinstance(of_2_6, AsyncStager) and not of_2_6.should_synchronize_after_execute
state = {"model": {"w": torch.ones(3)}, "step": [1, torch.ones(2)]}
staged = of_2_6.stage(state)
state["model"]["w"].zero_(), state["step"][1].zero_()
assert staged["model"]["w"].sum() == 3 and staged["step"][1].sum() == 2 and staged["step"][0] == 1
of_2_6.synchronize_staging()
"""


def test_torch_2_6_copies_only_for_who_stages(tmp_path: Path) -> None:
    """What is on the CPU, its async_save takes as it is from any other writer (test_async_save fails there without this)."""
    done = warm.Python("-c", AS_2_6).finish()
    assert done.returncode == 0, done.stderr
    of_2_6 = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
    assert hasattr(StoreWriter, "stage") == of_2_6, "others copy by themselves"


def test_a_part_of_the_state_reads_a_part(store: CheckpointStore) -> None:
    big = {f"t{i}": torch.randn(4_000_000) for i in range(5)}
    save(store, 1, big)
    before = reads.count_bytes()
    found = load(store, 1, {"t2": torch.zeros(4_000_000)})
    assert same(found["t2"], big["t2"])
    assert 16_000_000 < reads.count_bytes() - before < 16_000_000 + 3 * native.CHUNK_BYTES


def test_flips_are_found(store: CheckpointStore) -> None:
    state = make_state()
    save(store, 1, state)
    for name in ("__0_0.distcp", ".metadata"):
        path = folder(store, 1) / name
        for at in range(0, path.stat().st_size, 331):
            trees.bitflip(path, at)
            with pytest.raises((dcp.CheckpointException, IntegrityError)) as caught:
                load(store, 1, blank(state))
            assert "digest" in str(caught.value)
            trees.bitflip(path, at)
    assert same(load(store, 1, blank(state)), state)


def test_planted_a_reader_that_does_not_compare(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    save(store, 1, state)
    item = next(i for i in dcp_format.read_metadata((folder(store, 1) / ".metadata").read_bytes()).items if i.key == "model.w")
    trees.bitflip(folder(store, 1) / item.file, item.offset + 2000)
    reads.compare_nothing(monkeypatch)
    assert not same(load(store, 1, blank(state)), state), "silently wrong: what the digests are for"


def test_a_save_that_fails_leaves_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state()
    save(store, 1, state)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "write_files", fail)
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        save(store, 2, state)
    assert [one.step for one in store.list()] == [1]
    assert sorted(path.name for path in Path(steps.side_of(store.folder)).iterdir()) == ["id", "lock"]


@pytest.fixture
def composed() -> Iterator[Any]:
    """A type whose values are in two other tensors, as torchao's are in scales and integers; torch loads it again."""
    from torch.testing._internal.two_tensor import TwoTensor

    with torch.serialization.safe_globals([TwoTensor]):
        yield TwoTensor


def test_tensors_that_are_made_of_others(store: CheckpointStore, composed: Any) -> None:
    """They have no memory: reading it, or into it, ended the process (FSDP's float8 weights of torchtitan)."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    save(store, 1, {"w": composed(torch.arange(6.0), torch.ones(6)), "late": AsyncCollectiveTensor(torch.arange(3.0))})
    assert store.verify(1).ok
    found = {"w": composed(torch.zeros(6), torch.zeros(6)), "late": AsyncCollectiveTensor(torch.zeros(3))}
    load(store, 1, found)
    assert (found["w"].a.tolist(), found["w"].b.tolist()) == (list(range(6)), [1.0] * 6)
    assert found["late"].tolist() == [0.0, 1.0, 2.0]
    save(store, 2, {"w": torch.arange(6.0)})
    load(store, 2, found := {"w": composed(torch.zeros(6), torch.zeros(6))})
    assert found["w"].b.tolist() == list(range(6)), "what plain weights hold goes into it as torch copies"


def test_what_torch_would_not_load_again_is_not_saved(store: CheckpointStore, composed: Any) -> None:
    with torch.serialization.safe_globals([]):
        torch.serialization.clear_safe_globals()
        with pytest.raises(dcp.CheckpointException, match=r"model\.w is a TwoTensor, and torch would not load it again: torch"):
            save(store, 1, {"model": {"w": composed(torch.ones(2), torch.ones(2))}})
    assert list(store) == []


def test_a_tensor_without_memory_is_refused_by_name(store: CheckpointStore) -> None:
    freed = torch.ones(1000)
    freed.untyped_storage().resize_(0)  # as FSDP frees gathered weights
    for value in (freed, torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises(dcp.CheckpointException, match=r"model\.w is a tensor without plain memory"):
            save(store, 1, {"model": {"w": value}})
    assert list(store) == []


def test_the_metadata_of_many_ranks(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of 128 ranks was saved, and never read again: it was counted against what a hostile one may cost."""
    monkeypatch.setattr(inert, "MAX_VALUES", 100)
    state = {"model": {f"layers.{n}.weight": torch.full((2, 3), float(n)) for n in range(200)}}
    save(store, 1, state)
    assert same(load(store, 1, blank(state)), state)
    monkeypatch.setattr(dcp_format, "MAX_METADATA_BYTES", 10_000)
    with pytest.raises(dcp.CheckpointException, match="for 200 shards of tensors, and StoreReader reads 10,000 at most"):
        save(store, 2, state)
    assert not folder(store, 2).exists()


def test_usage(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="checkpoint_id"):
        dcp.save({"a": torch.ones(1)}, checkpoint_id=tmp_path / "x", storage_writer=StoreWriter(store, 1), no_dist=True)
    (tmp_path / "f").mkdir()
    (tmp_path / "f/x").write_bytes(b"x")
    store.save(1, tmp_path / "f")
    with pytest.raises(dcp.CheckpointException, match=r"no checkpoint of torch\.distributed"):
        load(store, 1, {"a": torch.ones(1)})


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4)])
def test_pieces_of_a_tensor(shape: tuple[int, ...]) -> None:
    """Where it says one piece, the bytes there are the part; where not, they are not in one piece."""
    whole = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape)
    ranges = [[(a, b) for a in range(size) for b in range(1, size - a + 1)] for size in shape]
    for places in itertools.product(*ranges):
        part = whole
        for dim, (begin, length) in enumerate(places):
            part = part.narrow(dim, begin, length)

        class Request:
            storage_offsets = torch.Size([place[0] for place in places])
            lengths = torch.Size([place[1] for place in places])

        begin = reader._in_one_piece(Request, shape)  # type: ignore[arg-type]
        flat, wanted = whole.reshape(-1), part.reshape(-1)
        if begin is not None:
            assert torch.equal(flat[begin : begin + len(wanted)], wanted)
        else:
            assert int(wanted[-1] - wanted[0]) != len(wanted) - 1


# --- several ranks -------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(doing: str, store: CheckpointStore, step: int, world: int, *more: object) -> list[warm.Python]:
    port = free_port()
    words = ("-m", "tests.store_ranks", doing, store.backend.location, step)
    return [warm.Python(*words, rank, world, port, *more) for rank in range(world)]


def finish(children: list[warm.Python], timeout_s: float = 90) -> list[subprocess.CompletedProcess[str]]:
    deadline = time.monotonic() + timeout_s
    try:
        return [child.finish(max(1, deadline - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()


def run(doing: str, store: CheckpointStore, step: int, world: int, *more: object) -> None:
    results = finish(ranks(doing, store, step, world, *more))
    assert all(done.returncode == 0 and "DONE" in done.stdout for done in results), results


@pytest.mark.parametrize("doing", ["save", pytest.param("async", marks=pytest.mark.soak)])
def test_ranks_save_and_other_numbers_of_ranks_load(store: CheckpointStore, tmp_path: Path, doing: str) -> None:
    run(doing, store, 5, 2, tmp_path / "saved.pt")
    assert store.verify(5).ok
    assert {path.name for path in folder(store, 5).iterdir()} >= {"__0_0.distcp", "__1_0.distcp", ".metadata"}
    saved = torch.load(tmp_path / "saved.pt")
    for world in (1, 2, 3) if doing == "save" else (1,):
        run("load", store, 5, world, tmp_path / f"loaded{world}.pt")
        assert same(torch.load(tmp_path / f"loaded{world}.pt"), saved), f"{world} ranks"


@pytest.mark.parametrize(
    ("rank", "where"),
    [
        (1, "hang"),
        *(
            pytest.param(rank, where, marks=pytest.mark.soak)
            for rank, where in ((0, "before"), (0, "after"), (1, "after"), (1, "before"), (1, "error"))
        ),
    ],
)
def test_a_rank_that_dies(store: CheckpointStore, rank: int, where: str) -> None:
    """No commit, an error on the other, no hang beyond the group's timeout (6 s); and the next save goes through."""
    started = time.monotonic()
    children = ranks("die", store, 5, 2, f"{rank}:{where}")
    (done,) = finish([children[1 - rank]])
    assert (done.returncode, "FAILED" in done.stdout) == (7, True), done
    assert time.monotonic() - started < 40
    children[rank].kill()
    assert children[rank].wait() in (-signal.SIGKILL, 7)
    assert not folder(store, 5).exists()
    run("save", store, 5, 2)
    assert store.verify(5).ok
    assert steps.leftovers(store.folder) == []
    assert not list(Path(steps.side_of(store.folder)).glob("save-*"))


@pytest.mark.parametrize(
    ("world", "times"), [(2, 3), pytest.param(2, 50, marks=pytest.mark.soak), pytest.param(4, 50, marks=pytest.mark.soak)]
)
def test_ranks_killed_at_any_moment(store: CheckpointStore, world: int, times: int) -> None:
    """New steps and one that is saved over: each is one whole save, and the other ranks end with an error in time."""
    child = warm.Python("-m", "tests.killed_ranks", store.backend.location, world, times, random.getrandbits(30))
    done = child.finish(60 + 30 * times)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    print(f"\n{world} ranks: {seen}")
    assert sum(seen["kills"].values()) == times
    assert times < 50 or set(seen["kills"]) >= {"planning", "writing", "written"}, seen
    assert store.verify(store.list()[-1].step).ok


def test_planted_a_commit_before_all_have_written(store: CheckpointStore, tmp_path: Path) -> None:
    """What judges the killed ranks sees a mix of two saves."""
    from tests import killed_ranks

    writer = StoreWriter(store, 4)
    dcp.save(killed_ranks.state_of(4), storage_writer=writer, no_dist=True)
    assert killed_ranks.judge(store, 4, 4) == 4
    dcp.save(killed_ranks.state_of(6), checkpoint_id=tmp_path / "six", no_dist=True)
    (folder(store, 4) / "__0_0.distcp").write_bytes((tmp_path / "six/__0_0.distcp").read_bytes())
    with pytest.raises(AssertionError):
        killed_ranks.judge(store, 4, 4)
    state = killed_ranks.state_of(4)
    state["model"]["w1"][5] = 6
    dcp.save(state, storage_writer=StoreWriter(store, 4), no_dist=True)
    with pytest.raises(AssertionError, match="a mix of saves"):
        killed_ranks.judge(store, 4, 4)
