"""Weight sanity: the numbers of every format are found where they are, and what is wrong with them is said."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptstore import tensors, weights
from ckptstore.backends.local import LocalBackend
from ckptstore.health import Health
from ckptstore.listing import Listing, scan
from ckptstore.model import FileInfo
from ckptstore.weights import Sanity
from tests import trees
from tests.commands import Result, invoke, isolate

Tensors = dict[str, torch.Tensor]
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (128, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.q_proj.bias": (64,),
        "model.layers.0.mlp.down_proj.weight": (64, 160),
        "model.norm.weight": (64,),
    }
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


def nudged(state: Tensors, amount: float = 1.01) -> Tensors:
    return {name: (tensor.float() * amount).to(tensor.dtype) for name, tensor in state.items()}


def read_places(folder: Path) -> tensors.Places:
    def read_at(name: str, offset: int, length: int) -> bytes:
        with (folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    infos = {
        path.relative_to(folder).as_posix(): FileInfo(path.relative_to(folder).as_posix(), path.stat().st_size, 0, 1)
        for path in folder.rglob("*")
        if path.is_file()
    }
    return tensors.places(read_at, infos)


def bytes_at(folder: Path, place: tensors.Place) -> bytes:
    return (folder / place.file).read_bytes()[place.offset : place.offset + place.length]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def save_dcp(state: object, folder: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=2), no_dist=True)  # type: ignore[arg-type]


# Where the numbers are


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "pt", "dcp"])
def test_every_format_and_type_is_found_byte_for_byte(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    state = model(dtype=torch.float32)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if kind == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    elif kind == "pt":
        torch.save(state, tmp_path / "model.pt")
    else:
        save_dcp({"dcp": {"model": state}}, tmp_path)
    found = read_places(tmp_path)
    assert found.not_scanned == ()
    assert {place.key: place.dtype for place in found.found} == dict.fromkeys(state, DTYPES[dtype])
    for place in found.found:
        assert bytes_at(tmp_path, place) == raw(state[place.key])
        assert not place.optimizer


def test_optimizer_states_are_told_from_weights(tmp_path: Path) -> None:
    network = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(8)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optim_world_size_1_rank_0.pt")
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "all.pt")
    save_dcp({"dcp": {"model": network.state_dict(), "optim": optimizer.state_dict()}}, tmp_path / "dcp")
    found = read_places(tmp_path)
    assert found.not_scanned == ()
    by_file = collections.Counter((place.file.partition("/")[0], place.optimizer) for place in found.found)
    assert by_file[("optim_world_size_1_rank_0.pt", True)] == 6
    assert by_file[("optim_world_size_1_rank_0.pt", False)] == 0
    assert (by_file[("all.pt", True)], by_file[("all.pt", False)]) == (6, 2)
    assert by_file[("dcp", False)] == 2
    assert by_file[("dcp", True)] == 6
    assert {place.key for place in found.found if place.file == "all.pt" and not place.optimizer} == {
        "model.weight",
        "model.bias",
    }


def test_what_shares_its_bytes_is_read_once(tmp_path: Path) -> None:
    base = torch.randn(100)
    torch.save({"a": base, "tied": base, "view": base[:10]}, tmp_path / "x.pt")
    (place,) = read_places(tmp_path).found
    assert (place.key in ("a", "tied", "view"), place.length) == (True, 400)


def test_integers_and_strange_types(tmp_path: Path) -> None:
    save_file({"i": torch.arange(4), "b": torch.ones(4, dtype=torch.bool)}, tmp_path / "a.safetensors")
    torch.save({"c": torch.ones(4, dtype=torch.complex64), "x": torch.ones(4)}, tmp_path / "b.pt")
    found = read_places(tmp_path)
    assert [place.key for place in found.found] == ["x"]

    assert found.not_scanned == ("b.pt: numbers of type C64",)


def test_files_of_other_kinds_are_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "training_args.bin", "tokenizer.model", "notes.txt"):
        (tmp_path / name).write_bytes(b"anything")
    assert read_places(tmp_path) == tensors.Places((), ())


@pytest.mark.parametrize("kind", ["safetensors", "pt", "dcp"])
def test_damaged_files_are_not_scanned_and_never_executed(tmp_path: Path, kind: str) -> None:
    state = model()
    source = tmp_path / "whole"
    source.mkdir()
    if kind == "safetensors":
        save_file(state, source / "model.safetensors")
    elif kind == "pt":
        torch.save(state, source / "model.pt")
    else:
        save_dcp({"model": state}, source)
    names = [path.name for path in source.iterdir()]
    dice = random.Random(kind)
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        victim = dice.choice(names)
        for name in names:
            data = bytearray((source / name).read_bytes())
            if name == victim:
                if number % 3 == 0:
                    del data[dice.randrange(len(data)) :]
                else:
                    for _ in range(dice.choice((1, 8, 200))):
                        data[dice.randrange(len(data))] = dice.randrange(256)
            (folder / name).write_bytes(data)
        found = read_places(folder)
        for place in found.found:
            assert place.offset >= 0
            assert place.length > 0


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (open, ("/tmp/ckptstore-evil", "w"))  # type: ignore[return-value]


def test_a_pickle_that_would_run_code_is_read_as_data(tmp_path: Path) -> None:
    torch.save({"evil": Evil(), "x": torch.ones(8)}, tmp_path / "x.pt")
    (place,) = read_places(tmp_path).found
    assert place.key == "x"
    assert not Path("/tmp/ckptstore-evil").exists()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["a.safetensors", "a.pt", "a.bin", ".metadata"]))
def test_any_bytes_can_be_looked_at(data: bytes, name: str) -> None:
    found = tensors.places(lambda _, offset, length: data[offset : offset + length], {name: FileInfo(name, len(data), 0, 1)})
    assert not found.found or data


# What is wrong with them


def make_run(root: Path, *states: Tensors) -> Listing:
    run = trees.make_run(root, steps=[46 + 47 * n for n in range(len(states))])
    for number, state in enumerate(states):
        save_file(state, trees.checkpoint(run, 46 + 47 * number) / "model.safetensors")
    return scan(LocalBackend(run))


def check_last(root: Path, *states: Tensors) -> Sanity:
    listing = make_run(root, *states)
    return weights.check(LocalBackend(listing.run.path), listing, listing.checkpoints[-1])


def change(state: Tensors, name: str, function: Callable[[torch.Tensor], None]) -> Tensors:
    changed = {key: tensor.clone() for key, tensor in state.items()}
    function(changed[name].flatten())
    return changed


Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


def zero_a_page(flat: torch.Tensor) -> None:
    flat[2048:4096] = 0  # 4096 bytes of bfloat16


@pytest.mark.parametrize(
    ("states", "health", "text"),
    [
        ([model()], Health.GOOD, ""),
        ([model(), nudged(model())], Health.GOOD, ""),
        ([change(model(), Q, lambda flat: flat.__setitem__(7, math.nan))], Health.BAD, "1 NaN of 4,096 numbers (first: numbe"),
        ([change(model(), Q, lambda flat: flat[:3].fill_(math.inf))], Health.BAD, "3 infinite of"),
        ([change(model(), EMBED, lambda flat: flat.fill_(math.nan))], Health.BAD, "8,192 NaN"),
        ([model(), change(nudged(model()), Q, zero_a_page)], Health.BAD, "1 of 2 blocks of 4096 bytes are all zero; 0 were"),
        ([change(model(), Q, zero_a_page)], Health.SUSPECT, "1 of 2 blocks"),
        ([change(model(), EMBED, zero_a_page)], Health.GOOD, ""),  # rows of padding
        ([change(model(), Q, lambda flat: flat.zero_())], Health.SUSPECT, "all 4,096 numbers are zero"),
        ([change(model(), "model.layers.0.self_attn.q_proj.bias", lambda flat: flat.zero_())], Health.GOOD, ""),
        ([change(model(), Q, zero_a_page), change(nudged(model()), Q, zero_a_page)], Health.GOOD, ""),  # it always had them
        ([model(), model()], Health.SUSPECT, "all 5 weights are identical to those of step 46"),
        ([model(), change(nudged(model()), Q, lambda flat: flat.mul_(5))], Health.SUSPECT, "its norm is"),
        ([model(), change(nudged(model()), Q, lambda flat: flat.mul_(0.3))], Health.SUSPECT, "at step 46"),
        ([model(), change(nudged(model()), Q, lambda flat: flat.mul_(1.5))], Health.GOOD, ""),
    ],
)  # fmt: skip
def test_sanity(tmp_path: Path, states: list[Tensors], health: Health, text: str) -> None:
    sanity = check_last(tmp_path, *states)
    assert sanity.health is health, sanity.problems
    if text:
        assert any(text in str(problem) for problem in sanity.problems), sanity.problems
    else:
        assert not sanity.problems


def test_the_norm_is_torchs(tmp_path: Path) -> None:
    state = model(3)
    sanity = check_last(tmp_path, state)
    exact = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in state.values()))
    assert sanity.scan.norm("default") == pytest.approx(exact, rel=1e-6)


def test_moments_may_be_zero_and_jump_but_not_nan(tmp_path: Path) -> None:
    listing = make_run(tmp_path, model())
    folder = trees.checkpoint(Path(listing.run.path), 46)
    moments = {"state": {0: {"exp_avg": torch.zeros(4096), "exp_avg_sq": torch.zeros(4096)}}}
    torch.save(moments, folder / "optim_world_size_1_rank_0.pt")
    listing = scan(LocalBackend(listing.run.path))
    assert weights.check(LocalBackend(listing.run.path), listing, listing.checkpoints[0]).health is Health.GOOD
    moments["state"][0]["exp_avg"][5] = math.nan
    torch.save(moments, folder / "optim_world_size_1_rank_0.pt")
    listing = scan(LocalBackend(listing.run.path))
    sanity = weights.check(LocalBackend(listing.run.path), listing, listing.checkpoints[0])
    assert sanity.health is Health.BAD
    assert "exp_avg" in sanity.problems[0].tensor


def test_a_dcp_slot_is_compared_with_an_export(tmp_path: Path) -> None:
    state = model()
    listing = make_run(tmp_path, state)
    run = Path(listing.run.path)
    bad = change(nudged(state), Q, zero_a_page)
    save_dcp({"dcp": {"model": bad}}, run / "default/recover_checkpoint")
    trees.write_recover_info(run, 93)
    listing = scan(LocalBackend(run))
    assert listing.slot is not None
    sanity = weights.check(LocalBackend(run), listing, listing.slot)
    assert (sanity.compared_with, sanity.health) == (46, Health.BAD)
    assert sanity.problems[0].tensor == Q


def test_other_number_types_are_compared_by_value(tmp_path: Path) -> None:
    state = change(model(), Q, zero_a_page)
    sanity = check_last(tmp_path, state, {name: tensor.float() * 1.01 for name, tensor in state.items()})
    assert sanity.health is Health.GOOD, sanity.problems


def test_each_checkpoint_is_read_once(tmp_path: Path) -> None:
    listing = make_run(tmp_path, *(nudged(model(), 1 + n / 100) for n in range(4)))
    known: dict[str, weights.Scan] = {}
    for checkpoint in listing.checkpoints:
        weights.check(LocalBackend(listing.run.path), listing, checkpoint, known=known)
    assert len(known) == 4


def test_nothing_to_scan_is_unknown(tmp_path: Path) -> None:
    listing = make_run(tmp_path, model())
    (checkpoint,) = listing.checkpoints
    (part,) = checkpoint.parts
    bare = dataclasses.replace(part, files=tuple(file for file in part.files if not file.name.endswith(".safetensors")))
    empty = dataclasses.replace(checkpoint, parts=(bare,))
    assert weights.check(LocalBackend(listing.run.path), listing, empty).health is Health.UNKNOWN


# verify --weights


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    isolate(monkeypatch, tmp_path)
    return lambda *words: invoke(capfd, *words)


def test_verify_weights_says_it_and_exits_with_3(tmp_path: Path, cli: Callable[..., Result]) -> None:
    bad = change(nudged(model()), Q, lambda flat: flat.__setitem__(7, math.nan))
    listing = make_run(tmp_path, model(), bad)
    result = cli("verify", "--weights", "--level", "structure", "--run", listing.run.path)
    assert result.code == 3
    assert "✗ bad" in result.out
    assert f"{Q}: 1 NaN of 4,096 numbers" in result.out
    assert "2 of 2 whole at level structure" in result.out, "its bytes are whole: it is their content that is bad"
    document = cli("verify", "--weights", "--json", "46", "--run", listing.run.path).json
    assert document["ok"] is True
    (found,) = document["weights"]
    assert (found["step"], found["health"], found["problems"], found["tensors"]) == (46, "good", [], 5)
    state = load_file(trees.checkpoint(Path(listing.run.path), 46) / "model.safetensors")
    assert found["bytes_read"] == sum(tensor.nbytes for tensor in state.values())
    assert "weights" not in cli("verify", "--json", "46", "--run", listing.run.path).json
