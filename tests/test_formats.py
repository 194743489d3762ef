"""Structure checks: planted damage is found with the right status, and nothing ever raises or executes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore.formats import FormatError, check_structure, dcp, inert, safetensors
from ckptstore.formats.reading import check_safe_name, parse_json
from ckptstore.model import FileInfo, Finding, Status
from tests import trees

CORRUPT, PARTIAL = Status.CORRUPT, Status.PARTIAL


def listing(folder: Path) -> dict[str, FileInfo]:
    infos = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        stat = path.lstat()
        kind = "symlink" if path.is_symlink() else "file" if path.is_file() else "other"
        name = path.relative_to(folder).as_posix()
        infos[name] = FileInfo(name, stat.st_size, stat.st_mtime_ns, stat.st_ino, kind)
    return infos


def check(folder: Path) -> list[Finding]:
    def read_at(name: str, offset: int, length: int) -> bytes:
        with (folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    return check_structure(read_at, listing(folder))


def check_contents(contents: dict[str, bytes]) -> list[Finding]:
    infos = {name: FileInfo(name, len(data), 0, 1) for name, data in contents.items()}
    return check_structure(lambda name, offset, length: contents[name][offset : offset + length], infos)


def safetensors_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Whole checkpoints


@pytest.mark.parametrize(
    "make",
    [
        trees.write_model,
        lambda folder: trees.write_model(folder, shards=3),
        trees.write_bin_model,
        trees.write_lora,
        trees.write_era_a_slot,
        trees.write_dcp_slot,
        lambda folder: trees.write_dcp_slot(folder, optimizer=False),
        lambda folder: trees.write_model(folder / "sub", shards=2).parent,
        lambda folder: trees.write_dcp_slot(folder / "sharded").parent,
    ],
)
def test_whole_checkpoint_has_no_finding(tmp_path, make):
    assert check(make(tmp_path / "c")) == []


@pytest.fixture(scope="module")
def saved_by_torch(tmp_path_factory):
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as torch_dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import get_state_dict

    root = tmp_path_factory.mktemp("torch")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state, optim = get_state_dict(model, optimizer)
    (root / "hf").mkdir()
    save_file(state, root / "hf/model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings(action="ignore"):  # that one process saves alone is the point
        torch_dcp.save({"dcp": {"model": state, "optim": optim}}, checkpoint_id=root / "dcp", no_dist=True)
        torch_dcp.save({"model": state, "lr_scheduler": {"last": 1}}, checkpoint_id=root / "plain", no_dist=True)
    return root


def test_files_written_by_torch_and_safetensors_hold(saved_by_torch):
    for folder in saved_by_torch.iterdir():
        assert check(folder) == []


def test_a_metadata_is_parsed_once_and_another_anew(saved_by_torch, monkeypatch):
    """By who lists and by who verifies: that of 277,000 shards takes 10 s."""
    parsed = []
    real = dcp.read_metadata
    monkeypatch.setattr(dcp, "read_metadata", lambda data: parsed.append(data) or real(data))
    monkeypatch.setattr(dcp, "_summaries", {})
    content = (saved_by_torch / "dcp/.metadata").read_bytes()
    info = FileInfo(".metadata", len(content), 0, 0)

    def look(data):
        return dcp.load_summary(
            lambda name, offset, length: data[offset : offset + length], info._replace(size_bytes=len(data))
        )

    first = look(content)
    assert (first.holds, first.shard_bytes) == (real(content).holds, real(content).shard_bytes)
    assert look(content) is first
    assert parsed == [content]
    for damaged in (content[:-9], content.replace(b".distcp", b".distcX")):
        with contextlib.suppress(FormatError):
            assert look(damaged) != first
    assert len(parsed) == 3
    for number in range(2 * dcp._MOST_SUMMARIES):
        look(content + bytes(number))
    assert len(dcp._summaries) <= dcp._MOST_SUMMARIES


def test_dcp_metadata_agrees_with_torchs_own_reader(saved_by_torch):
    import torch.distributed.checkpoint as torch_dcp

    mine = dcp.read_metadata((saved_by_torch / "dcp/.metadata").read_bytes())
    theirs = torch_dcp.FileSystemReader(saved_by_torch / "dcp").read_metadata()
    assert {(i.key, i.file, i.offset, i.length) for i in mine.items} == {
        (index.fqn, info.relative_path, info.offset, info.length) for index, info in theirs.storage_data.items()
    }
    tensors = {k: v for k, v in theirs.state_dict_metadata.items() if hasattr(v, "chunks")}
    assert mine.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert mine.tensors[key].shape == tuple(tensor.size)
        assert f"torch.{mine.tensors[key].dtype}" == str(tensor.properties.dtype)
        assert mine.tensors[key].chunks == tuple((tuple(c.offsets), tuple(c.sizes)) for c in tensor.chunks)
    assert mine.holds == ("weights", "optimizer")
    plain = dcp.read_metadata((saved_by_torch / "plain/.metadata").read_bytes())
    assert plain.holds == ("weights", "scheduler")
    for name, size in mine.shard_bytes.items():
        assert (saved_by_torch / "dcp" / name).stat().st_size == size


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_dcp_metadata_of_every_pickle_protocol(saved_by_torch, protocol):
    import torch.distributed.checkpoint as torch_dcp

    theirs = torch_dcp.FileSystemReader(saved_by_torch / "dcp").read_metadata()
    whole = dcp.read_metadata((saved_by_torch / "dcp/.metadata").read_bytes())
    assert dcp.read_metadata(pickle.dumps(theirs, protocol=protocol)) == whole


def test_megatron_keys_are_told_apart():
    keys = [
        "decoder.layers.mlp.weight",
        "optimizer.state.exp_avg.decoder.layers.mlp.weight",
        "rng_state/shard_0_1",
    ]
    tensors = dict.fromkeys(keys[:2], ("float32", (4,)))
    data = trees.dcp_metadata([(key, "__0_0.distcp", 0, 10) for key in keys], tensors)
    assert dcp.read_metadata(data).holds == ("weights", "optimizer", "rng")


# Planted damage

SHARD = "model-00002-of-00003.safetensors"
DAMAGE = {
    "missing shard": (lambda c: trees.remove_shard(c), SHARD, "missing shard", PARTIAL),
    "truncated shard": (lambda c: trees.truncate(c / SHARD), SHARD, "truncated: ", PARTIAL),
    "shard cut in its header": (lambda c: os.truncate(c / SHARD, 40), SHARD, "truncated: 40 bytes", PARTIAL),
    "shard of 3 bytes": (lambda c: os.truncate(c / SHARD, 3), SHARD, "truncated", PARTIAL),
    "zero-length shard": (lambda c: trees.zero_length(c / SHARD), SHARD, "zero-length", PARTIAL),
    "extended shard": (lambda c: trees.extend(c / SHARD), SHARD, "64 bytes more", CORRUPT),
    "zeroed header": (lambda c: (c / SHARD).write_bytes(bytes(900)), SHARD, "not safetensors", CORRUPT),
    "overwritten header": (
        lambda c: (c / SHARD).write_bytes(b"\x80\2" * 400),
        SHARD,
        "not safetensors",
        CORRUPT,
    ),
    "no index": (
        lambda c: (c / "model.safetensors.index.json").unlink(),
        "model.safetensors.index.json",
        "missing index",
        PARTIAL,
    ),
    "truncated index": (
        lambda c: trees.truncate(c / "model.safetensors.index.json", 9),
        "model.safetensors.index.json",
        "truncated",
        PARTIAL,
    ),
    "shard of another model": (
        lambda c: (c / SHARD).write_bytes(trees.safetensors_bytes({"x": ("F32", (2,))})),
        SHARD,
        "lacks the tensor",
        CORRUPT,
    ),
    "truncated config": (lambda c: trees.truncate(c / "config.json", 5), "config.json", "truncated", PARTIAL),
    "empty config": (lambda c: trees.zero_length(c / "config.json"), "config.json", "zero-length", PARTIAL),
    "NUL config": (lambda c: (c / "config.json").write_bytes(bytes(99)), "config.json", "not JSON", CORRUPT),
    "config cut in a string": (
        lambda c: (c / "config.json").write_text('{"model_ty'),
        "config.json",
        "truncated",
        PARTIAL,
    ),
    "symlinked shard": (
        lambda c: trees.symlink_file(c / SHARD, c.parent / "elsewhere"),
        SHARD,
        "symbolic link",
        PARTIAL,
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_planted_damage_of_an_export_is_found(tmp_path, name):
    damage, path, problem, status = DAMAGE[name]
    folder = trees.write_model(tmp_path / "c", shards=3)
    damage(folder)
    findings = check(folder)
    assert [(f.path, f.status) for f in findings if problem in f.problem] == [(path, status)] * len(findings)
    assert findings


DCP_DAMAGE = {
    "missing shard": (lambda c: (c / "__1_0.distcp").unlink(), "__1_0.distcp", "missing", PARTIAL),
    "truncated shard": (lambda c: trees.truncate(c / "__1_0.distcp"), "__1_0.distcp", "truncated: ", PARTIAL),
    "zero-length shard": (
        lambda c: trees.zero_length(c / "__0_0.distcp"),
        "__0_0.distcp",
        "zero-length",
        PARTIAL,
    ),
    "no metadata": (lambda c: (c / ".metadata").unlink(), ".metadata", "did not end", PARTIAL),
    "zero-length metadata": (
        lambda c: trees.zero_length(c / ".metadata"),
        ".metadata",
        "zero-length",
        PARTIAL,
    ),
    "cut metadata": (lambda c: trees.truncate(c / ".metadata"), ".metadata", "not a whole pickle", CORRUPT),
    "NUL metadata": (lambda c: (c / ".metadata").write_bytes(bytes(99)), ".metadata", "opcode 0x00", CORRUPT),
}


@pytest.mark.parametrize("name", DCP_DAMAGE)
@pytest.mark.parametrize("below", ["", "sharded"])
def test_planted_damage_of_a_dcp_folder_is_found(tmp_path, name, below):
    damage, path, problem, status = DCP_DAMAGE[name]
    folder = trees.write_dcp_slot(tmp_path / "c" / below)
    damage(folder)
    (finding,) = check(tmp_path / "c")
    assert finding.path == f"{below}/{path}".lstrip("/")
    assert problem in finding.problem
    assert finding.status == status


def test_shared_and_oversized_dcp_shards_are_legitimate(tmp_path):
    items = [("a", "__0_0.distcp", 0, 50), ("b", "__0_0.distcp", 0, 50)]
    assert check_contents({".metadata": trees.dcp_metadata(items), "__0_0.distcp": bytes(4096)}) == []


def test_index_and_metadata_never_name_files_outside(tmp_path):
    for name in ("../x.safetensors", "/etc/passwd", "a//b", "a\\b", "x\n", "x\x1b[2J", "", ".", "\ud800"):
        index = {"weight_map": {"w": name}}
        (finding,) = check_contents({"model.safetensors.index.json": json.dumps(index).encode()})
        assert finding.status is CORRUPT
        assert finding.problem.isprintable()
    assert check_contents({".metadata": trees.dcp_metadata([("k", "../../etc/passwd", 0, 1)])})[0].status is CORRUPT
    with pytest.raises(FormatError):
        check_safe_name("x" * 5000)


def test_total_size_is_no_evidence():
    data = trees.safetensors_bytes({"w": ("F32", (2,))})
    for total in (0, 16, 8.0, "8", None):
        index = {"metadata": {"total_size": total}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
        files = {
            "model-00001-of-00001.safetensors": data,
            "model.safetensors.index.json": json.dumps(index).encode(),
        }
        assert check_contents(files) == []


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "does not fill"),
        ({"w": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "unknown dtype"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", "gap"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", "no valid shape"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "no valid shape"),
        ({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}}, b"", "no valid shape"),
        ({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234", "unknown dtype"),
        ({"w": [1]}, b"", "not described"),
        ({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"12", "does not fill"),
        (b'{"w":1,"w":2}', b"", "key twice"),
        (b'{"w":NaN}', b"", "NaN"),
        (b'{"w":' + b"9" * 5000 + b"}", b"", "no number"),
        (b'{"w":' + b"[" * 100_000, b"", "depth"),
        (b'{"w":"\xff"}', b"", "no text"),
        (b'{"w"', b"", "header: "),
        (b'{"w":[' + b"[]," * 1_100_000 + b"[]]}", b"", "more values"),
    ],
)
def test_lying_header_is_corrupt(header, data, problem):
    (finding,) = check_contents({"model.safetensors": safetensors_of(header, data)})
    assert problem in finding.problem
    assert finding.status is CORRUPT


def test_overlapping_tensors_are_corrupt():
    tensor = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    (finding,) = check_contents({"m.safetensors": safetensors_of({"a": tensor, "b": tensor}, b"1234")})
    assert "overlap" in finding.problem


def test_declared_sizes_are_compared_before_anything_is_read():
    asked: list[int] = []

    def read_at(name: str, offset: int, length: int) -> bytes:
        asked.append(length)
        return (struct.pack("<Q", 90_000_000) + b"{" + bytes(91))[offset : offset + length]

    info = FileInfo("model.safetensors", 100, 0, 1)
    assert safetensors.check_file(read_at, info)[0].status is PARTIAL
    assert max(asked) <= 100


def test_a_file_that_shrinks_while_read_is_partial():
    data = trees.safetensors_bytes({"w": ("F32", (2,))})
    (finding,) = check_structure(
        lambda name, offset, length: data[offset : min(offset + length, 20)],
        {"model.safetensors": FileInfo("model.safetensors", len(data), 0, 1)},
    )
    assert finding == Finding("model.safetensors", "became shorter while it was read", PARTIAL)


def test_errors_of_the_medium_propagate():
    def read_at(name: str, offset: int, length: int) -> bytes:
        raise OSError(5, "Input/output error")

    for name in ("model.safetensors", ".metadata", "config.json", "model.safetensors.index.json"):
        with pytest.raises(OSError, match="Input/output"):
            check_structure(read_at, {name: FileInfo(name, 100, 0, 1)})


def test_trainer_state_may_hold_nan():
    assert check_contents({"trainer_state.json": b'{"loss": NaN}'}) == []


def test_large_tokenizer_is_checked_at_its_ends():
    whole = b'{"model": "' + b"x" * (5 << 20) + b'"}\n'
    assert check_contents({"tokenizer.json": whole}) == []
    assert check_contents({"tokenizer.json": whole[:-10]})[0].status is PARTIAL


# Pickles that want to do harm


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_evil_metadata_has_no_side_effect_and_is_reported(tmp_path, protocol):
    proof = tmp_path / "executed"
    data = pickle.dumps(Evil(f"touch {proof}"), protocol=protocol)
    (finding,) = check_contents({".metadata": data})
    assert finding.status is CORRUPT
    assert "without executing it" in finding.problem
    if protocol >= 2:
        assert "names posix.system" in finding.problem
    assert not proof.exists()


def test_names_next_to_the_allowed_ones_are_refused():
    for module, name in [
        ("torch", "load"),
        ("torch", "float32.__class__"),
        ("torch.serialization", "load"),
        ("pathlib", "Path"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("builtins", "eval"),
    ]:
        data = b"\x80\x04" + trees._global(module, name) + b"."
        with pytest.raises(FormatError, match="names"):
            dcp.read_metadata(data)


BOMBS = {
    "huge memo index": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "huge integer": b"\x80\x04\x8b" + struct.pack("<i", 0x7FFFFFFF) + b".",
    "doubling tuples": b"\x80\x04}N\x94"
    + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(200))
    + b"Ns.",
    "deep lists": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "many marks": b"\x80\x04" + b"(" * 1_000_000 + b".",
    "many objects": b"\x80\x04" + b"]\x94" * 1_000_000 + b".",
    "many strings": b"\x80\x04" + b"X\2\0\0\0ab" * 500_000 + b".",
    "shared chunk list": b"",
}


def shared_chunks() -> bytes:
    """20,000 tensors that all refer to one list of 20,000 chunks: 400 million, if they were described."""
    metadata = "torch.distributed.checkpoint.metadata"
    chunk = trees._object(metadata, "ChunkStorageMetadata", offsets=b")", sizes=b")")
    properties = trees._global(metadata, "TensorProperties") + b")\x81(" + trees._global("torch", "half") + b"tb"
    tensor = trees._object(
        metadata,
        "TensorStorageMetadata",
        properties=properties,
        size=b")",
        chunks=b"](" + chunk + b"q\x01" + b"h\x01" * 20_000 + b"e",
    )
    entries = trees._text("k") + tensor + b"q\x03"
    entries += b"".join(trees._text(str(n)) + b"h\x03" for n in range(20_000))
    root = trees._object(metadata, "Metadata", state_dict_metadata=b"}(" + entries + b"u", storage_data=b"}")
    return b"\x80\x04" + root + b"."


BOMBS["shared chunk list"] = shared_chunks()


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs_stay_within_memory_and_time(name, tmp_path):
    (tmp_path / ".metadata").write_bytes(BOMBS[name])
    script = (
        "import sys; from ckptstore.formats import dcp\n"
        "try: dcp.read_metadata(open(sys.argv[1], 'rb').read())\n"
        "except dcp.FormatError as error: print(error)"
    )
    limit = 600 << 20
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / ".metadata"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr[-400:]
    assert "not a DCP metadata" in done.stdout


def test_oversized_metadata_is_not_read():
    def read_at(name: str, offset: int, length: int) -> bytes:
        raise AssertionError("read")

    (finding,) = check_structure(read_at, {".metadata": FileInfo(".metadata", 1 << 40, 0, 1)})
    assert finding.status is CORRUPT


def test_number_of_values_is_bounded():
    with pytest.raises(FormatError, match="more values"):
        inert.read(b"\x80\x04" + b"]" * 2000, lambda name: True, most_values=1000)


# Garbage

NAMES = ["model.safetensors", "model.safetensors.index.json", ".metadata", "config.json"]


@given(st.sampled_from(NAMES), st.binary(max_size=200))
def test_random_bytes_never_raise_and_are_never_whole(name, data):
    findings = check_contents({name: data})
    if name != "config.json":
        assert findings
    assert all(finding.status in (PARTIAL, CORRUPT) for finding in findings)


def _mutate(data: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    result = bytearray(data)
    for at, piece, cut in edits:
        position = at % (len(result) + 1)
        result[position : position + cut] = piece
    return bytes(result)


EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4)


@settings(max_examples=300)
@given(EDITS)
def test_mutated_safetensors_never_raise(edits):
    whole = trees.safetensors_bytes(trees.TENSORS)
    data = _mutate(whole, edits)
    findings = check_contents({"model.safetensors": data})
    if len(data) != len(whole) and data[: len(whole) - 700] == whole[: len(whole) - 700]:
        assert findings


@settings(max_examples=300)
@given(EDITS)
def test_mutated_metadata_never_raises(edits):
    items = [("dcp.model.w", "__0_0.distcp", 0, 50), ("dcp.optim.state.w", "__1_0.distcp", 0, 50)]
    data = _mutate(trees.dcp_metadata(items, {"dcp.model.w": ("bfloat16", (3, 5))}), edits)
    for finding in check_contents({".metadata": data, "__0_0.distcp": bytes(50), "__1_0.distcp": bytes(50)}):
        assert finding.problem.isprintable()


@settings(max_examples=100)
@given(EDITS)
def test_mutated_index_never_raises(edits):
    index = {"metadata": {"total_size": 8}, "weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    data = trees.safetensors_bytes({"w": ("F32", (2,))})
    check_contents({"a.safetensors": data, "model.safetensors.index.json": _mutate(json.dumps(index).encode(), edits)})


@given(st.integers(0, 900))
def test_every_truncation_is_partial(keep):
    whole = trees.safetensors_bytes(trees.TENSORS)
    (finding,) = check_contents({"model.safetensors": whole[: keep % len(whole)]})
    assert finding.status is PARTIAL


def test_strict_json_refuses_what_json_does_not_know():
    for text in (b'{"a": Infinity}', b'{"a": 1, "a": 1}', b"\xef\xbb\xbf{}"):
        with pytest.raises(FormatError):
            parse_json(text, strict=True)
