"""Exports become slots that torch's own loader takes, and slots exports: tensor for tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
safetensors = pytest.importorskip("safetensors.torch")

from ckptstore import native  # noqa: E402
from ckptstore.errors import DigestMismatchError, IntegrityError, RefusedError, SourceChangedError, StorageError, UsageError  # noqa: E402
from ckptstore.formats import dcp as reader  # noqa: E402
from ckptstore.frameworks.areal import convert  # noqa: E402
from tests import areal_model, trees, warm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ROOT = Path(__file__).parent.parent


def specs(folder: Path) -> list[native.FileSpec]:
    return [native.FileSpec(*info[:4]) for info in areal_model.infos(folder)]


def digests(folder: Path) -> dict[str, native.Digest]:
    return native.digest_files(folder, specs(folder))


def to_dcp(source: Path, target: Path, *, files=None, optimizer="none", **options) -> convert.ConvertResult:
    target.mkdir()
    return convert.hf_to_dcp(source, target, files or areal_model.infos(source), optimizer=optimizer, **options)


def to_hf(source: Path, target: Path, **options) -> convert.ConvertResult:
    target.mkdir()
    return convert.dcp_to_hf(source, target, areal_model.infos(source), **options)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) and value.dtype == b[key].dtype for key, value in a.items())


def ranks(what: str, world_size: int, slot: Path, answer: Path, *, tied=False, optimizer=False) -> dict:
    arguments = (what, world_size, slot, answer, "tied" if tied else "-", "optimizer" if optimizer else "-")
    children = [warm.Python("-m", "tests.areal_ranks", rank, *arguments) for rank in range(world_size)]
    for child in children:
        done = child.finish(180)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(answer, weights_only=True)


class TestIntoOneProcess:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_weights(self, tmp_path, dtype, shards):
        model = areal_model.make(1, dtype)
        files = areal_model.export(tmp_path / "hf", model, shards=shards)
        expected = {name: digest.chunks for name, digest in digests(tmp_path / "hf").items()}
        result = to_dcp(tmp_path / "hf", tmp_path / "slot", files=files, expected=expected)
        assert result.digests == digests(tmp_path / "slot")
        assert result.bytes_written == sum(path.stat().st_size for path in (tmp_path / "slot").iterdir())
        loaded = areal_model.make(2, dtype)
        dcp.load({"dcp": areal_model.State(loaded)}, checkpoint_id=str(tmp_path / "slot"))
        assert equal(loaded.state_dict(), model.state_dict())

    @pytest.mark.parametrize("tied", [True, False])
    def test_metadata_equals_torch_s(self, tmp_path, tied):
        model = areal_model.make(1, tied=tied)
        optimizer = areal_model.adamw(model)
        areal_model.export(tmp_path / "hf", model, tied=tied, drop_head=tied)
        dcp.save({"dcp": areal_model.State(model, optimizer)}, checkpoint_id=str(tmp_path / "torch"))
        to_dcp(tmp_path / "hf", tmp_path / "slot", optimizer="zero")
        mine, theirs = (dcp.FileSystemReader(str(tmp_path / name)).read_metadata() for name in ("slot", "torch"))
        newer = {"dcp.optim.param_groups.0.decoupled_weight_decay"} - theirs.state_dict_metadata.keys()  # none today
        for ours, other in ((mine.state_dict_metadata, theirs.state_dict_metadata), (mine.planner_data, theirs.planner_data)):
            assert {key: value for key, value in ours.items() if key not in newer} == other
        assert {index for index in mine.storage_data if index.fqn not in newer} == theirs.storage_data.keys()

    @pytest.mark.parametrize(("tied", "drop_head"), [(True, True), (True, False), (False, False)])
    def test_zero_optimizer(self, tmp_path, tied, drop_head):
        model = areal_model.make(1, tied=tied)
        areal_model.export(tmp_path / "hf", model, tied=tied, drop_head=drop_head)
        settings = convert.AdamW(lr=0.25, weight_decay=0.125, betas=(0.5, 0.75), eps=1e-4, initial_lr=0.5)
        plain = to_dcp(tmp_path / "hf", tmp_path / "plain")
        result = to_dcp(tmp_path / "hf", tmp_path / "slot", optimizer="zero", settings=settings)
        assert result.bytes_written - plain.bytes_written < 100_000  # zeros cost no space
        loaded = areal_model.make(2, tied=tied)
        optimizer = areal_model.adamw(loaded)
        dcp.load({"dcp": areal_model.State(loaded, optimizer)}, checkpoint_id=str(tmp_path / "slot"))
        assert equal(loaded.state_dict(), model.state_dict())
        (group,) = optimizer.param_groups
        assert {key: group[key] for key in ("lr", "weight_decay", "betas", "eps", "initial_lr", "fused")} == {
            "lr": 0.25,
            "weight_decay": 0.125,
            "betas": (0.5, 0.75),
            "eps": 1e-4,
            "initial_lr": 0.5,
            "fused": True,
        }
        assert len(optimizer.state) == len(list(loaded.parameters()))
        for state in optimizer.state.values():
            assert float(state["step"]) == 0
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
        before = loaded.lm_head.weight.clone()
        areal_model.train_step(loaded, optimizer)
        assert not torch.equal(before, loaded.lm_head.weight)

    def test_what_torch_starts_with_is_what_the_settings_say(self):
        model = areal_model.make()
        (group,) = areal_model.adamw(model).state_dict()["param_groups"]
        settings = convert.AdamW(1e-2, (0.9, 0.95), 1e-5, 0.05)
        mine = settings.group(range(len(group["params"])))
        assert {key: mine[key] for key in group} == group  # a newer torch that has more keys fails here

    def test_a_tied_head_costs_nothing(self, tmp_path):
        areal_model.export(tmp_path / "hf", areal_model.make(1, tied=True), tied=True, drop_head=True)
        to_dcp(tmp_path / "hf", tmp_path / "slot")
        metadata = reader.read_metadata((tmp_path / "slot" / ".metadata").read_bytes())
        places = {item.key: item[1:] for item in metadata.items}
        assert places["dcp.model.lm_head.weight"] == places["dcp.model.model.embed_tokens.weight"]

    def test_without_a_word_on_tying_the_missing_head_is_tied(self, tmp_path):
        model = areal_model.make(1, tied=True)
        areal_model.export(tmp_path / "hf", model, tied=None, drop_head=True)
        to_dcp(tmp_path / "hf", tmp_path / "slot", optimizer="zero")
        loaded = areal_model.make(2, tied=True)
        dcp.load({"dcp": areal_model.State(loaded, areal_model.adamw(loaded))}, checkpoint_id=str(tmp_path / "slot"))
        assert equal(loaded.state_dict(), model.state_dict())

    def test_what_the_index_leaves_out_is_left_out(self, tmp_path):
        model = areal_model.make(1)
        areal_model.export(tmp_path / "hf", model, shards=2)
        safetensors.save_file({"stray.weight": torch.ones(2)}, tmp_path / "hf" / "stray.safetensors")
        to_dcp(tmp_path / "hf", tmp_path / "slot")
        metadata = reader.read_metadata((tmp_path / "slot" / ".metadata").read_bytes())
        assert {key.removeprefix("dcp.model.") for key in metadata.tensors} == set(model.state_dict())


class TestIntoFsdp2:
    @pytest.mark.parametrize(
        ("tied", "optimizer"), [(False, False), pytest.param(False, True, marks=pytest.mark.soak), (True, True)]
    )
    def test_loads_on_two_ranks(self, tmp_path, tied, optimizer):
        model = areal_model.make(1, tied=tied)
        areal_model.export(tmp_path / "hf", model, tied=tied, drop_head=tied, shards=2)
        to_dcp(tmp_path / "hf", tmp_path / "slot", optimizer="zero" if optimizer else "none", settings=convert.AdamW(lr=0.25))
        found = ranks("load", 2, tmp_path / "slot", tmp_path / "answer.pt", tied=tied, optimizer=optimizer)
        assert equal(found["weights"], model.state_dict())
        if optimizer:
            assert found["state"] == len(list(model.parameters()))
            assert (found["lr"], found["moments"], found["steps"]) == (0.25, 0.0, {0.0})
            if areal_model.TRAINS_SHARDED:
                assert found["moved"]
                assert found["steps_after"] == {2.0}

    def test_is_not_loaded_with_an_optimizer_that_it_lacks(self, tmp_path):
        areal_model.export(tmp_path / "hf", areal_model.make(1))
        to_dcp(tmp_path / "hf", tmp_path / "slot")
        loaded = areal_model.make(2)
        with pytest.raises(BaseException, match="Missing key"):
            dcp.load({"dcp": areal_model.State(loaded, areal_model.adamw(loaded))}, checkpoint_id=str(tmp_path / "slot"))


class TestBack:
    @pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.soak)])
    def test_what_fsdp2_saved_on_two_ranks(self, tmp_path, tied):
        found = ranks("save", 2, tmp_path / "slot", tmp_path / "answer.pt", tied=tied, optimizer=True)
        areal_model.export(tmp_path / "hf", areal_model.make(1, tied=tied), tied=tied)
        for target, shard_bytes in (("one", convert.SHARD_BYTES), ("many", 3000)):
            out = tmp_path / target
            result = to_hf(tmp_path / "slot", out, configuration=tmp_path / "hf", shard_bytes=shard_bytes)
            assert result.digests == digests(out)
            loaded = {}
            for path in out.glob("*.safetensors"):
                loaded |= safetensors.load_file(path)
            assert equal(loaded, found["weights"])
            assert (out / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
            index = out / "model.safetensors.index.json"
            assert index.exists() == (target == "many")
            if index.exists():
                assert json.loads(index.read_text())["weight_map"].keys() == loaded.keys()

    @pytest.mark.soak
    def test_tensors_sharded_along_other_dimensions(self, tmp_path):
        found = ranks("grid", 4, tmp_path / "slot", tmp_path / "answer.pt")
        result = to_hf(tmp_path / "slot", tmp_path / "out")
        assert equal(safetensors.load_file(tmp_path / "out" / "model.safetensors"), found["weights"])
        assert any("config.json" in note for note in result.notes)

    @pytest.mark.parametrize("shards", [1, 3])
    def test_of_our_own(self, tmp_path, shards):
        model = areal_model.make(1)
        areal_model.export(tmp_path / "hf", model, shards=shards)
        to_dcp(tmp_path / "hf", tmp_path / "slot", optimizer="zero")
        to_hf(tmp_path / "slot", tmp_path / "out", configuration=tmp_path / "hf")
        assert equal(safetensors.load_file(tmp_path / "out" / "model.safetensors"), dict(model.state_dict()))

    def test_torch_s_single_file(self, tmp_path):
        model = areal_model.make(1, torch.float32)
        dcp.save({"dcp": areal_model.State(model)}, checkpoint_id=str(tmp_path / "slot"))
        to_hf(tmp_path / "slot", tmp_path / "out")
        assert equal(safetensors.load_file(tmp_path / "out" / "model.safetensors"), dict(model.state_dict()))

    def test_a_flipped_bit_is_found_by_its_own_crc(self, tmp_path):
        dcp.save({"dcp": areal_model.State(areal_model.make(1))}, checkpoint_id=str(tmp_path / "slot"))
        metadata = reader.read_metadata((tmp_path / "slot" / ".metadata").read_bytes())
        item = next(item for item in metadata.items if item.key.endswith("layers.1.mlp.down_proj.weight"))
        trees.bitflip(tmp_path / "slot" / item.file, item.offset + item.length // 2 - 100)
        with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.down_proj\.weight"):
            to_hf(tmp_path / "slot", tmp_path / "out")

    def test_saved_without_crcs_it_says_so(self, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            dcp.save({"dcp": areal_model.State(areal_model.make(1))}, checkpoint_id=str(tmp_path / "slot"))
        finally:
            torch.serialization.set_crc32_options(True)
        assert any("CRC" in note for note in to_hf(tmp_path / "slot", tmp_path / "out").notes)

    def test_a_truncated_shard(self, tmp_path):
        dcp.save({"dcp": areal_model.State(areal_model.make(1))}, checkpoint_id=str(tmp_path / "slot"))
        trees.truncate(tmp_path / "slot" / "__0_0.distcp", 5000)
        with pytest.raises(IntegrityError, match="truncated"):
            to_hf(tmp_path / "slot", tmp_path / "out")

    def test_a_missing_shard(self, tmp_path):
        dcp.save({"dcp": areal_model.State(areal_model.make(1))}, checkpoint_id=str(tmp_path / "slot"))
        (tmp_path / "slot" / "__0_0.distcp").unlink()
        with pytest.raises(IntegrityError, match="missing shard"):
            to_hf(tmp_path / "slot", tmp_path / "out")

    def test_another_model_s_configuration(self, tmp_path):
        dcp.save({"dcp": areal_model.State(areal_model.make(1))}, checkpoint_id=str(tmp_path / "slot"))
        trees.write_model(tmp_path / "hf")
        with pytest.raises(RefusedError, match="not the same model"):
            to_hf(tmp_path / "slot", tmp_path / "out", configuration=tmp_path / "hf")

    @pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
    def test_megatron(self, tmp_path, name):
        dcp.save({"dcp": areal_model.State(areal_model.make(1))}, checkpoint_id=str(tmp_path / "slot"))
        (tmp_path / "slot" / name).write_text("{}")
        with pytest.raises(RefusedError, match="Megatron"):
            to_hf(tmp_path / "slot", tmp_path / "out")

    @pytest.mark.parametrize(
        ("state", "why"),
        [
            ({"model": {"a.weight": torch.ones(2)}}, "FSDP"),
            ({"dcp": {"model": {"tok_embeddings.weight": torch.ones(2)}}}, "Archon"),
            ({"dcp": {"model": {"a": torch.ones(2)}, "optim": {"param_groups.a.lr": 0.1}}}, "Archon"),
            ({"dcp": {"model": {"base_model.model.x.lora_A.weight": torch.ones(2)}}}, "LoRA"),
            ({"dcp": {"model": {"model.visual.patch.weight": torch.ones(2)}}}, "vision"),
            ({"dcp": {"model": {"a": torch.ones(2).to(torch.float8_e4m3fn)}}}, "quantised"),
        ],
    )
    def test_other_engines_and_models(self, tmp_path, state, why):
        dcp.save(state, checkpoint_id=str(tmp_path / "slot"))
        with pytest.raises(RefusedError, match=why):
            to_hf(tmp_path / "slot", tmp_path / "out")


class TestRefused:
    def config(self, folder: Path, **changes: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"vision_config": {}}, "vision"),
            ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "vision"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ],
    )
    def test_configurations(self, tmp_path, changes, why):
        trees.write_model(tmp_path / "hf")
        self.config(tmp_path / "hf", **changes)
        with pytest.raises(RefusedError, match=why):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_lora(self, tmp_path):
        trees.write_lora(tmp_path / "hf")
        (tmp_path / "hf" / "config.json").write_text("{}")
        with pytest.raises(RefusedError, match="LoRA"):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_quantised_dtype(self, tmp_path):
        trees.write_model(tmp_path / "hf", tensors={"lm_head.weight": ("U8", (4, 4))})
        with pytest.raises(RefusedError, match="quantised"):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_pytorch_bin(self, tmp_path):
        trees.write_bin_model(tmp_path / "hf")
        with pytest.raises(RefusedError, match=r"model\.safetensors"):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_a_lost_head(self, tmp_path):
        areal_model.export(tmp_path / "hf", areal_model.make(1), tied=False, drop_head=True)
        with pytest.raises(RefusedError, match="lm_head"):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_a_lost_shard(self, tmp_path):
        trees.write_model(tmp_path / "hf", shards=3)
        trees.remove_shard(tmp_path / "hf")
        with pytest.raises(RefusedError, match="model-00002"):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_a_truncated_export(self, tmp_path):
        trees.write_model(tmp_path / "hf")
        trees.truncate(tmp_path / "hf" / "model.safetensors")
        with pytest.raises(IntegrityError, match="truncated"):
            to_dcp(tmp_path / "hf", tmp_path / "slot")

    def test_a_link(self, tmp_path):
        trees.write_model(tmp_path / "hf")
        files = areal_model.infos(tmp_path / "hf")
        trees.symlink_file(tmp_path / "hf" / "model.safetensors", tmp_path / "elsewhere")
        with pytest.raises(StorageError, match=r"model\.safetensors"):
            to_dcp(tmp_path / "hf", tmp_path / "slot", files=files)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("at", [10, -1])
def test_a_flipped_bit_of_the_source_is_found(tmp_path, name, at):
    trees.write_model(tmp_path / "hf", shards=3)
    expected = {file: digest.chunks for file, digest in digests(tmp_path / "hf").items()}
    trees.bitflip(tmp_path / "hf" / name, at)
    with pytest.raises(IntegrityError) as caught:
        to_dcp(tmp_path / "hf", tmp_path / "slot", expected=expected)
    if name.endswith(".safetensors") and at == -1:
        assert isinstance(caught.value, DigestMismatchError)
        assert (caught.value.path, caught.value.offset_bytes) == (name, 0)
    assert not (tmp_path / "slot" / ".metadata").exists()


def test_an_export_saved_since_is_refused(tmp_path):
    trees.write_model(tmp_path / "hf")
    files = areal_model.infos(tmp_path / "hf")
    os.utime(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(SourceChangedError):
        to_dcp(tmp_path / "hf", tmp_path / "slot", files=files)


def test_interrupted_it_leaves_nothing_but_the_stage(tmp_path):
    trees.write_model(tmp_path / "hf")
    before = sorted(path.name for path in tmp_path.iterdir())

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_dcp(tmp_path / "hf", tmp_path / "slot", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*before, "slot"]
    assert not (tmp_path / "slot" / ".metadata").exists()


class TestEraA:
    @pytest.mark.parametrize("tied", [True, False])
    def test_the_optimizer_takes_each_rank_s_file(self, tmp_path, tied):
        model = areal_model.make(1, tied=tied)
        files = areal_model.export(tmp_path / "hf", model, tied=tied)
        (tmp_path / "slot").mkdir()
        made = convert.era_a_optimizer(tmp_path / "hf", tmp_path / "slot", files, world_size=3)
        assert made == digests(tmp_path / "slot")
        assert sorted(made) == [f"optim_world_size_3_rank_{rank}.pt" for rank in range(3)]
        for name in made:
            optimizer = areal_model.adamw(model)
            optimizer.load_state_dict(torch.load(tmp_path / "slot" / name, weights_only=True))
            before = model.lm_head.weight.detach().clone()
            areal_model.train_step(model, optimizer)
            assert not torch.equal(before, model.lm_head.weight)

    def test_no_ranks(self, tmp_path):
        with pytest.raises(UsageError):
            convert.era_a_optimizer(tmp_path, tmp_path, [], world_size=0)


# Not ru_maxrss: a child starts with that of the process that forked it.
MEASURE = """
import sys
from pathlib import Path
from ckptstore.frameworks.areal import convert
from ckptstore.model import FileInfo
folder, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir()
files = [FileInfo(p.name, (s := p.stat()).st_size, s.st_mtime_ns, s.st_ino) for p in folder.iterdir()]
if sys.argv[3] == "dcp":
    convert.hf_to_dcp(folder, target, files, optimizer="zero")
else:
    convert.dcp_to_hf(folder, target, files)
assert "torch" not in sys.modules
print(int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))))
"""


def test_a_large_model_needs_little_memory_and_no_torch(tmp_path):
    """256 MiB of weights, and twice as much for the optimizer."""
    trees.write_model(tmp_path / "hf", tensors={})
    tensors = {
        f"layers.{n}.weight": {"dtype": "F32", "shape": [1 << 24], "data_offsets": [n << 26, n + 1 << 26]} for n in range(4)
    }
    text = json.dumps(tensors).encode()
    with (tmp_path / "hf" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 28))
    (tmp_path / "hf" / "config.json").write_text("{}")
    for source, target in (("hf", "dcp"), ("dcp", "out")):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / source), str(tmp_path / target), target]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) < 160 << 10  # KiB
        shutil.rmtree(tmp_path / source)
