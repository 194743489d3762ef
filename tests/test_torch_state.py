"""State dicts saved and loaded without pickle: values, dtypes, ties, and every changed byte found."""

from __future__ import annotations

import json
import math
import os
import pickletools
import random
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ckptstore import CheckpointStore, Keep, native
from ckptstore.backends import LocalBackend
from ckptstore.errors import (
    CkptStoreError,
    DigestMismatchError,
    IntegrityError,
    NotFoundError,
    NothingToResumeError,
    UsageError,
)
from ckptstore.manifest import FileEntry
from ckptstore.saves import loading
from tests import commands, reads, trees

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
ckpt = pytest.importorskip("ckptstore.torch")
from ckptstore.torch import memory, simple  # noqa: E402
from ckptstore.torch import state as states  # noqa: E402


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        raw = [memory.flat(value.detach().resolve_conj().resolve_neg().contiguous()) for value in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def test_everything_comes_back(store: CheckpointStore) -> None:
    state = {
        "model": OrderedDict([("b", torch.ones(3)), ("a", torch.zeros(2, 2))]),
        "numbers": [1, -(2**70), 0.1, 1e300, math.inf, -math.inf, math.nan, True, None, "text ü \x00 \ud7ff", b"\0\xff"],
        "keys": {1: "a", "1": "b", (2, "x"): [], True + 1: {}, 0.5: ()},
        "$odd": {"$tensor": "not one", "plain": {"$": 1}},
        "types": [torch.float8_e5m2, torch.device("cuda:1"), torch.Size([1, 2])],
        "deep": {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "__metadata__": torch.tensor(3)},
        "scalar": torch.tensor(7.5),
        "empty": [torch.empty(0, 3, dtype=torch.int64), {}, [], ()],
        "name with / and \\": {"x": torch.tensor([True])},
        "MODEL": {"case": torch.tensor(1)},
    }
    simple.save(store, 3, state)
    assert same(state, ckpt.load(store, 3))
    assert type(ckpt.load(store)["model"]) is OrderedDict
    assert store.verify(3).ok
    for path in Path(store.folder).rglob("*"):
        assert path.suffix in ("", ".json", ".safetensors"), path


def test_a_learning_rate_of_numpy_is_a_number(store: CheckpointStore) -> None:
    """A LambdaLR that calls np.cos leaves numpy.float64 in the optimizer's state, where nobody can say .item()."""
    numpy = pytest.importorskip("numpy")
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + numpy.cos((step + 1) / 10)))
    rate = optimizer.param_groups[0]["lr"]
    assert type(rate) is numpy.float64
    ckpt.save(store, 1, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "nan": numpy.float64("nan")})
    loaded = ckpt.load(store)
    found = loaded["optimizer"]["param_groups"][0]["lr"]
    assert (type(found), found.hex()) == (float, float(rate).hex())
    assert math.isnan(loaded["nan"])
    with pytest.raises(UsageError, match=r"numpy\.float32, which is saved only as a pickle could"):
        ckpt.save(store, 2, {"a": numpy.float32(1)})


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_drawn_from_a_seed_stays(store: CheckpointStore) -> None:
    """A run that saves draws the same numbers as one that does not: it can be compared with it, and resumed bit for bit."""
    state = {"w": torch.ones(1000), "n": torch.nn.Linear(3, 3).state_dict()}
    before = random.getstate(), torch.get_rng_state()
    ckpt.save(store, 1, state)
    ckpt.save_async(store, 2, state).wait()
    ckpt.load(store)
    dcp.save(state, storage_writer=ckpt.StoreWriter(store, 3))
    dcp.load(state, storage_reader=ckpt.StoreReader(store, 3))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("name", memory.DTYPES)
def test_every_dtype(store: CheckpointStore, name: str) -> None:
    bits = torch.randint(0, 2 if name == "BOOL" else 256, (3, 5, 8 * 3), dtype=torch.uint8)
    value = bits.view(torch.bool) if name == "BOOL" else bits.view(memory.DTYPES[name])
    ckpt.save(store, 1, {"x": value, "y": value.transpose(0, 2)})
    assert same({"x": value, "y": value.transpose(0, 2)}, ckpt.load(store, 1))


def test_other_readers_agree(store: CheckpointStore) -> None:
    """The reference reader of the format."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = {"model": {"a": torch.randn(5, 7), "b": torch.arange(3, dtype=torch.int16), "c": torch.randn(3).bfloat16()}}
    ckpt.save(store, 1, state)
    assert same(dict(sorted(safetensors.load_file(Path(store.folder) / "step-1/model.safetensors").items())), state["model"])


def test_ties_stay_ties(store: CheckpointStore) -> None:
    weight = torch.nn.Parameter(torch.randn(100, 10))
    state = {"model": {"embed": weight, "head": weight, "view": weight.data}, "optimizer": {0: weight.clone()}}
    ckpt.save(store, 1, state)
    loaded = ckpt.load(store, 1)
    assert loaded["model"]["embed"] is loaded["model"]["head"] is loaded["model"]["view"]
    assert loaded["optimizer"][0].data_ptr() != loaded["model"]["embed"].data_ptr()
    assert os.stat(Path(store.folder) / "step-1/model.safetensors").st_size < 4500, "stored once"


def test_views_and_strides(store: CheckpointStore) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = {
        "x": {"t": base.transpose(0, 2), "s": base[1:, ::2], "e": torch.tensor([1.0, 2.0]).expand(3, 2), "row": base[2],
              "conj": torch.complex(base, -base).conj(), "neg": torch.complex(base, base).conj().imag,
              "grad": (base * 1).requires_grad_() * 2}
    }  # fmt: skip
    ckpt.save(store, 1, state)
    assert same({"x": {k: v.resolve_conj().resolve_neg() for k, v in state["x"].items()}}, ckpt.load(store, 1))


def test_a_loss_that_backward_has_not_left_behind_is_a_metric(store: CheckpointStore) -> None:
    """As a loop has it at hand: torch warns of float() of such, once a process."""
    torch.set_warn_always(True)
    try:
        manifest = ckpt.save(store, 1, {"w": torch.zeros(1)}, metrics={"loss": torch.tensor(0.25, requires_grad=True)})
    finally:
        torch.set_warn_always(False)
    assert manifest.metrics == {"loss": 0.25}


def lost_from(store: CheckpointStore, step: int, steps: range, **more: float) -> None:
    """Weights and loss are NaN from a step on, as a loop would save them."""
    for at in steps:
        weights = torch.full((2,), float(at) if at < step else math.nan)
        ckpt.save(store, at, {"w": weights}, metrics={"train/loss": weights.sum(), **more}, keep=Keep(last=3))


@pytest.mark.parametrize("where", ["a folder", "a URL"])
def test_a_loss_that_is_no_number_spoils_no_store(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Retention had deleted the last healthy steps, and load given the NaNs back."""
    place = tmp_path / "store" if where == "a folder" else f"memory://lost-{tmp_path.name}-{os.getpid()}"
    store = CheckpointStore(place)
    lost_from(store, 5, range(10))
    assert "train/loss = nan" in caplog.text
    assert [one.step for one in store.list()] == [2, 3, 4, 9]
    caplog.clear()
    assert ckpt.load(store)["w"].tolist() == [4.0, 4.0]
    assert "step 4 is loaded, not 9: train/loss was NaN or infinite when it was saved" in caplog.text
    point = store.resume_point()
    assert (point.checkpoint.step, [skip.checkpoint.step for skip in point.skipped]) == (4, [9])
    assert store.resume_point(include_bad=True).checkpoint.step == 9
    assert math.isnan(ckpt.load(store, 9)["w"][0]), "who names it, gets it"
    if where == "a folder":
        commands.invoke(capfd, "list", "--run", place)
        out = " ".join(commands.invoke(capfd, "list", "--run", place).err.split())
        assert "step 9: train/loss was NaN or infinite when it was saved: a load that names no step passes it over" in out


def test_where_no_loss_is_a_number_the_newest_is_loaded(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    """Else a script that takes "nothing to resume" for a first start would begin anew, because a metric is broken."""
    lost_from(store, 0, range(6))
    assert [one.step for one in store.list()] == [3, 4, 5]
    assert math.isnan(ckpt.load(store)["w"][0])
    assert "step 5 is loaded although train/loss was NaN" in caplog.text
    assert (store.resume_point().checkpoint.step, store.resume_point().skipped) == (5, ())


@pytest.mark.parametrize("name", ["eval/loss", "val_loss", "reward", "grad_norm"])
def test_what_may_be_no_number_in_a_healthy_run_spoils_nothing(store: CheckpointStore, name: str) -> None:
    """An evaluation that is not due, a reward before the first episode ends, fp16's search for its scale."""
    lost_from(store, 99, range(6), **{name: math.nan})
    assert [one.step for one in store.list()] == [3, 4, 5]
    assert ckpt.load(store)["w"].tolist() == [5.0, 5.0]
    assert (store.resume_point().checkpoint.step, store.get(5).parts[0].notes) == (5, ())


def test_optimizer_and_scheduler_go_on(store: CheckpointStore) -> None:
    def make() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            scheduler.step()

    one = make()
    train(*one, 3)
    state = {"model": one[0].state_dict(), "optimizer": one[1].state_dict(), "scheduler": one[2].state_dict(),
             "rng": torch.get_rng_state()}  # fmt: skip
    manifest = ckpt.save(store, 3, state, metrics={"loss": torch.tensor(0.25)}, config={"lr": 0.1})
    assert manifest.metrics == {"loss": 0.25}
    assert json.loads((Path(store.folder) / "step-3/config.json").read_text()) == {"lr": 0.1}
    train(*one, 3)
    other = make()
    loaded = ckpt.load(store)
    for part, name in zip(other, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(loaded[name])
    torch.set_rng_state(loaded["rng"])
    train(*other, 3)
    assert same(dict(one[0].state_dict()), dict(other[0].state_dict()))
    assert store.get(3).holds == ("weights", "optimizer")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "a builtins.object"),
        (defaultdict, "a builtins.type"),
        ({1, 2}, "a builtins.set"),
        (torch.randn(3).to_sparse(), "without plain memory"),
        (torch.empty(3, device="meta"), "without plain memory"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        ({frozenset(): 1}, "a key that is a frozenset"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
)
def test_what_needs_a_pickle_is_refused(store: CheckpointStore, value: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        ckpt.save(store, 1, {"a": [1, {"b": value}]})
    assert "state['a']['1']['b']" in str(caught.value)
    assert not Path(store.folder).exists()


def test_a_state_in_itself(store: CheckpointStore) -> None:
    state: dict[str, Any] = {}
    state["me"] = state
    with pytest.raises(UsageError, match="contain itself"):
        ckpt.save(store, 1, state)
    with pytest.raises(UsageError, match="config"):
        ckpt.save(store, 1, {}, config={"x": object()})
    with pytest.raises(UsageError, match="a state dict"):
        ckpt.save(store, 1, [1])


def flip(path: Path, at: int) -> None:
    """One bit, the times as they were."""
    before = os.stat(path)
    trees.bitflip(path, at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_flipped_bit_is_found(store: CheckpointStore) -> None:
    """Any bit of any file: never a state that differs."""
    state = {"model": {"a": torch.randn(50), "b": torch.randn(3)}, "step": 4}
    ckpt.save(store, 1, state)
    for name in ("model.safetensors", "state.json"):
        path = Path(store.folder) / "step-1" / name
        original = path.read_bytes()
        for at in range(0, len(original), 3):
            flip(path, at)
            with pytest.raises((IntegrityError, DigestMismatchError)):
                ckpt.load(store, 1)
            before = os.stat(path)
            path.write_bytes(original)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(ckpt.load(store, 1), state)


def test_the_digests_find_it_and_nothing_else(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a load that does not compare reads the flipped tensor silently."""
    ckpt.save(store, 1, {"model": {"a": torch.zeros(500)}})
    flip(Path(store.folder) / "step-1/model.safetensors", -9)
    with pytest.raises(DigestMismatchError):
        ckpt.load(store, 1)
    reads.compare_nothing(monkeypatch)
    assert not same(ckpt.load(store, 1)["model"]["a"], torch.zeros(500))


def test_load_says_what_is_missing(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises((NothingToResumeError, NotFoundError)):
        ckpt.load(store)
    ckpt.save(store, 1, {"a": torch.ones(2)})
    with pytest.raises(NotFoundError, match="no checkpoint of step 2"):
        ckpt.load(store, 2)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").write_bytes(b"x")
    store.save(2, tmp_path / "files")
    with pytest.raises(UsageError, match="not saved by ckptstore"):
        ckpt.load(store, 2)
    assert same(ckpt.load(store, 1, map_location="cpu"), {"a": torch.ones(2)})
    with pytest.raises(IntegrityError, match="not known"):
        states.decode({"state": {"$new": 1}}, {})
    with pytest.raises(IntegrityError, match="dtype"):
        states.decode({"state": {"$dtype": "save"}}, {})


def test_large_states_over_many_chunks(store: CheckpointStore) -> None:
    """Tensors across chunks, thousands in one chunk, a chunk of one tensor."""
    torch.manual_seed(1)
    state = {"model": {f"small{i}": torch.randn(7) for i in range(3000)}, "optimizer": {"big": torch.randn(9_000_000)}}
    state["model"]["mid"] = torch.randn(3_000_001)
    ckpt.save(store, 1, state)
    loaded = ckpt.load(store, 1)
    assert all(same(value, loaded["model"][key]) for key, value in state["model"].items())
    assert same(state["optimizer"], loaded["optimizer"])


def test_no_pickle_and_one_read(store: CheckpointStore) -> None:
    """The files hold no pickle, and loading asks the disk for each byte of tensors once."""
    ckpt.save(store, 1, {"model": {"a": torch.randn(6_000_000)}})
    for path in (Path(store.folder) / "step-1").iterdir():
        with pytest.raises(ValueError, match=r".*"):
            list(pickletools.genops(path.read_bytes()[:4096]))
    before = reads.count_bytes()
    ckpt.load(store, 1)
    assert 24_000_000 < reads.count_bytes() - before < 24_000_000 + 100_000


def overtaken(patch: pytest.MonkeyPatch, *, by: Callable[[int], object], times: int = 1) -> list[int]:
    """What another process does while a load reads, each of so many times; the loads that began are counted."""
    began: list[int] = []

    def reading(*args: Any, **kwargs: Any) -> None:
        began.append(len(began))
        if len(began) <= times:
            by(len(began))
        loading.read_into(*args, **kwargs)

    patch.setattr(simple, "read_into", reading)
    return began


def test_a_step_that_is_saved_again_while_it_is_read(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(number: float) -> dict[str, Any]:
        return {"model": {"w": torch.full((3_000_000,), number)}}

    for step in (1, None):
        ckpt.save(store, 1, state(1.0))
        began = overtaken(monkeypatch, by=lambda time: ckpt.save(store, 1, state(time + 1.0)))
        assert same(ckpt.load(store, step), state(2.0))
        assert len(began) == 2
    began = overtaken(monkeypatch, by=lambda time: ckpt.save(store, 1, state(time + 9.0)), times=99)
    with pytest.raises(DigestMismatchError):
        ckpt.load(store, 1)
    assert len(began) == 5


def test_the_newest_is_removed_while_it_is_read(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        ckpt.save(store, step, {"w": torch.tensor(float(step))})
    overtaken(monkeypatch, by=lambda _: shutil.rmtree(Path(store.folder) / "step-2"))
    assert ckpt.load(store)["w"] == 1
    ckpt.save(store, 2, {"w": torch.tensor(2.0)})
    overtaken(monkeypatch, by=lambda _: shutil.rmtree(Path(store.folder) / "step-2"))
    with pytest.raises(NotFoundError, match="no checkpoint of step 2"):
        ckpt.load(store, 2)
    listed = type(store).scan
    ckpt.save(store, 2, {"w": torch.tensor(2.0)})

    def then_removed(self: CheckpointStore) -> Any:
        found = listed(self)
        shutil.rmtree(Path(store.folder) / "step-2", ignore_errors=True)
        return found

    monkeypatch.setattr(type(store), "scan", then_removed)
    assert ckpt.load(store)["w"] == 1


def test_resume_step_of_one_process_needs_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is started by `python`, before it is started by torchrun; of several that have not met none goes on alone."""
    store = CheckpointStore(tmp_path / "mine")
    with pytest.raises(NothingToResumeError, match="there is no whole step") as nothing:
        ckpt.resume_step(store)
    assert nothing.value.hint == "Nothing has been saved there yet."
    ckpt.save(store, 7, {"a": 7})
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert ckpt.resume_step(store) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2") as early:
        ckpt.resume_step(store)
    assert early.value.hint == "Call this after torch.distributed.init_process_group()."


def test_damage_is_not_read_again(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt.save(store, 1, {"model": {"w": torch.zeros(500)}})
    flip(Path(store.folder) / "step-1/model.safetensors", -9)
    began = overtaken(monkeypatch, by=lambda _: None)
    for step in (1, None):
        with pytest.raises(DigestMismatchError):
            ckpt.load(store, step)
    assert len(began) == 2


def test_wants_anywhere_in_a_file(tmp_path: Path) -> None:
    """read_into beside slicing, with chunks of a page: whole, in part, at the borders, none."""
    data = os.urandom(4096 * 5 + 99)
    result = native.write_files(tmp_path, {"f": data}, options=native.CopyOptions(chunk_bytes=4096))
    digest = result.digests["f"]
    entry = FileEntry("f", len(data), 0, 0, digest.crc, digest.chunks)
    for places in ([(0, 1)], [(4095, 2)], [(5, 9000), (9005, 1), (20000, 579)], [(0, len(data))], [(len(data) - 1, 1)], []):
        buffers = [bytearray(length) for _, length in places]
        wants = [loading.Want(at, memoryview(buffer)) for (at, _), buffer in zip(places, buffers, strict=True)]
        loading.read_into(LocalBackend(tmp_path), "", [(entry, wants)], chunk_bytes=4096)
        assert [bytes(buffer) for buffer in buffers] == [data[at : at + length] for at, length in places]
    bad = entry._replace(chunks=(*digest.chunks[:3], 1, *digest.chunks[4:]))
    out = bytearray(10)
    loading.read_into(LocalBackend(tmp_path), "", [(bad, [loading.Want(4096 * 3 - 10, memoryview(out))])], chunk_bytes=4096)
    with pytest.raises(DigestMismatchError, match="from 12288"):
        loading.read_into(LocalBackend(tmp_path), "", [(bad, [loading.Want(4096 * 3 - 9, memoryview(out))])], chunk_bytes=4096)
    os.truncate(tmp_path / "f", len(data) - 1)
    with pytest.raises(IntegrityError, match="is not the file that the manifest describes") as caught:
        loading.read_into(LocalBackend(tmp_path), "", [(entry, [])], chunk_bytes=4096)
    assert not caught.value.retryable


def test_the_core_never_imports_torch(store: CheckpointStore) -> None:
    ckpt.save(store, 1, {"a": torch.ones(2)})
    code = f"import sys\nfrom ckptstore import CheckpointStore\ns = CheckpointStore({store.folder!r})\n"
    code += "assert s.verify(1).ok and s.latest()\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_not_shared_with_the_tree(store: CheckpointStore) -> None:
    """Nothing is mapped: what the file becomes later does not change what was loaded."""
    ckpt.save(store, 1, {"a": torch.zeros(100)})
    loaded = ckpt.load(store, 1)["a"]
    (Path(store.folder) / "step-1/tensors.safetensors").write_bytes(b"\xff" * 500)
    assert same(loaded, torch.zeros(100))


def test_errors_are_ours(store: CheckpointStore) -> None:
    ckpt.save(store, 1, {"a": torch.zeros(100)})
    (Path(store.folder) / "step-1/tensors.safetensors").unlink()
    with pytest.raises(CkptStoreError):
        ckpt.load(store, 1)


class Lazy(Mapping[str, Any]):
    """A mapping that makes each tensor when it is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        return iter([str(number) for number in range(self.count)])

    def __getitem__(self, key: str) -> Any:
        return torch.full((1000,), float(key))


@pytest.mark.parametrize("save", ["save", "save_async"])
def test_tensors_that_are_made_as_they_are_read(store: CheckpointStore, save: str) -> None:
    """Each may get the memory of one that was copied and let go: it is another tensor all the same."""
    getattr(ckpt, save)(store, 1, {"model": Lazy(50)})
    ckpt.wait_all()
    assert [value[0].item() for value in ckpt.load(store)["model"].values()] == list(range(50))


def test_a_schedule_that_counts(store: CheckpointStore) -> None:
    """MultiStepLR's milestones are a Counter, and it uses what only a Counter has."""

    def schedule() -> Any:
        parameter = torch.nn.Parameter(torch.zeros(1))
        return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=1.0), [2, 4, 4, 9], gamma=0.1)

    ckpt.save(store, 1, {"schedule": schedule().state_dict(), "words": Counter("abca")})
    state = ckpt.load(store)
    assert type(state["words"]) is Counter
    assert list(state["words"].items()) == [("a", 2), ("b", 1), ("c", 1)]
    again = schedule()
    again.load_state_dict(state["schedule"])
    assert again.milestones == Counter([2, 4, 4, 9])
    assert list(again.milestones.elements()) == [2, 4, 4, 9]


def without_memory() -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    freed = torch.ones(1000)
    freed.untyped_storage().resize_(0)  # as FSDP frees gathered weights
    with FakeTensorMode():
        fake = torch.ones(1000)
    return {
        "freed": freed,
        "fake": fake,
        "made of two": TwoTensor(torch.ones(3), torch.ones(3)),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "lazy": torch.nn.LazyLinear(3).weight,
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.ones(3, device="meta"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", ["save", "save_async"])
@pytest.mark.parametrize("kind", ["freed", "fake", "made of two", "nested", "lazy", "quantized", "meta"])
def test_a_tensor_without_memory_is_refused(store: CheckpointStore, kind: str, save: str) -> None:
    """Reading at address 0 would end the process."""
    with pytest.raises(UsageError, match=r"state\['model'\]\['w'\] is"):
        getattr(ckpt, save)(store, 1, {"model": {"w": without_memory()[kind]}})
    assert not os.path.exists(store.folder)


def test_a_dtype_that_this_torch_lacks(store: CheckpointStore) -> None:
    """Of a state that a newer torch has saved."""
    document = {"format": states.FORMAT, "version": states.VERSION, "state": {"kind": {"$dtype": "float3_e1m1"}}}
    simple.write(store, 1, {"state.json": [json.dumps(document).encode()]})
    with pytest.raises(UsageError, match="has no dtype float3_e1m1"):
        ckpt.load(store)


@pytest.mark.parametrize(
    "state",
    [
        b"\xff",
        b"[" * 100_000,
        b'{"format":"ckptstore.state","version":1}',
        b'{"format":"ckptstore.state","version":1,"state":[]}',
        b'{"format":"ckptstore.state","version":1,"state":{"$tuple":[1]}}',
        b'{"format":"ckptstore.state","version":1,"state":{"a":{"$device":"\\u0000"}}}',
        b'{"format":"ckptstore.state","version":1,"state":{"a":{"$size":[1e999]}}}',
        b'{"format":"ckptstore.state","version":1,"state":{"a":{"$dict":[[[],1]]}}}',
        b'{"format":"ckptstore.state","version":1,"state":{"a":{"$tensor":["../../x","y"]}}}',
        b'{"format":"ckptstore.state","version":1,"state":' + b'{"$tuple":[' * 300 + b"1" + b"]}" * 300 + b"}",
    ],
)
def test_a_hostile_state_is_refused(tmp_path, state):
    """Its digests are right: whoever made it has sealed it."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "state.json").write_bytes(state)
    store = CheckpointStore(tmp_path / "store")
    store.save(1, tmp_path / "made")
    with pytest.raises(IntegrityError):
        ckpt.load(store, 1)


@pytest.mark.parametrize("call", [
    lambda where: ckpt.save(where, 1, {"a": 1}), lambda where: ckpt.save_async(where, 1, {"a": 1}),
    lambda where: ckpt.load(where), lambda where: ckpt.resume_step(where),
    lambda where: ckpt.StoreWriter(where, 1), lambda where: ckpt.StoreReader(where),
])  # fmt: skip
def test_a_path_in_the_place_of_a_store_is_said(call: Callable[[str], Any], tmp_path: Path) -> None:
    """torch.save takes one."""
    with pytest.raises(UsageError, match=r"a CheckpointStore is needed, and this is '.*mine'"):
        call(str(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("save", [
    lambda store, files, keep: ckpt.save(store, 1, {"a": 1}, keep=keep),
    lambda store, files, keep: ckpt.save_async(store, 1, {"a": 1}, keep=keep),
    lambda store, files, keep: store.save(1, files, keep=keep),
    lambda store, files, keep: store.save_async(1, files, keep=keep),
])  # fmt: skip
def test_a_keep_that_is_none_is_said_before_anything_is_saved(
    save: Callable[[CheckpointStore, Path, Any], Any], store: CheckpointStore, tmp_path: Path
) -> None:
    """keep=3: it failed after the commit, and in the background with the save after."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").write_bytes(b"x")
    with pytest.raises(UsageError, match="keep is 3, and must be a Keep") as caught:
        save(store, tmp_path / "files", 3)
    assert "Keep(last=3)" in caught.value.hint
    assert not Path(store.folder).exists()


def test_a_keep_that_is_none_loses_no_emergency_save(store: CheckpointStore) -> None:
    keep: Any = 3
    outcome = ckpt.Emergency(deadline_s=30).save(store, 1, {"a": 1}, keep=keep)
    assert outcome.committed
    assert "must be a Keep" in outcome.problem
    with pytest.raises(UsageError, match="must be a Keep"):
        store.prune(keep)


def test_a_mirror_to_a_folder_is_refused_at_once(store: CheckpointStore, tmp_path: Path) -> None:
    """It was tried for ever in the background, and only logged."""
    ckpt.save(store, 1, {"a": 1})
    with pytest.raises(UsageError, match="a mirror goes to a URL"):
        store.mirror(str(tmp_path / "other"))
