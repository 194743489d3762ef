"""The writer of torch.distributed.checkpoint folders against torch's own."""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import struct
import zipfile
import zlib

import pytest

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from ckptstore import native  # noqa: E402
from ckptstore.errors import DigestMismatchError, SourceChangedError  # noqa: E402
from ckptstore.formats import FormatError, check_structure, dcp_writer, inert, pickling, streaming, torchzip  # noqa: E402
from ckptstore.formats import dcp as reader  # noqa: E402
from ckptstore.formats.dcp_writer import ObjectItem, Origin, TensorItem  # noqa: E402
from ckptstore.model import FileInfo  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "bool"),
    *("int8", "uint8", "complex64", "complex128"),
)
#: Those that torch has no storage of their own for.
UNTYPED = [name for name in torchzip.ITEM_BYTES if name not in DTYPES and hasattr(torch, name)]
SHAPES = ((), (1,), (5,), (3, 4), (0, 3), (2, 3, 5))
VALUES = (
    None,
    True,
    0.1,
    -0.0,
    (0.9, 0.999),
    (),
    [],
    {},
    "naïve",
    ["a", "b"],
    {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, 2**62]}]},
)


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def raw(tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def example(dtype: str, shape):
    torch.manual_seed(len(shape))
    return (torch.randn(shape) * 100).abs().to(getattr(torch, dtype))


def within(data: bytes):
    return lambda offset, length: data[offset : offset + length]


class TestArchive:
    @pytest.mark.parametrize("dtype", [*DTYPES, *UNTYPED])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_laid_out_as_torch_does(self, dtype, shape):
        tensor = example(dtype, shape)
        assert tensor.element_size() == torchzip.ITEM_BYTES[dtype]
        layout = torchzip.tensor(dtype, shape)
        mine = layout.head + raw(tensor) + layout.tail(zlib.crc32(raw(tensor)))
        theirs = saved(tensor)
        assert len(mine) == layout.length
        assert len(layout.head) % 64 == 0
        again = torch.load(io.BytesIO(mine), weights_only=True)
        assert (again.dtype, again.shape, raw(again)) == (tensor.dtype, tensor.shape, raw(tensor))
        with zipfile.ZipFile(io.BytesIO(mine)) as archive, zipfile.ZipFile(io.BytesIO(theirs)) as other:
            assert archive.testzip() is None
            assert [
                name for name in archive.namelist() if name in other.namelist()
            ] == other.namelist()  # older ones have fewer
            for a, b in ((archive.getinfo(b.filename), b) for b in other.infolist()):
                # torch leaves the descriptor out where there is no data
                assert a.file_size == 0 or (a.flag_bits, a.compress_type) == (b.flag_bits, b.compress_type)
                assert a.filename == "archive/data.pkl" or a.file_size == b.file_size  # ours refers to no memo
            mine_ops, their_ops = (
                [(op.name, arg) for op, arg, _ in pickletools.genops(z.read("archive/data.pkl")) if "PUT" not in op.name]
                for z in (archive, other)
            )
            assert [arg for name, arg in mine_ops if "TUPLE" not in name and name != "MARK"] == [
                arg for name, arg in their_ops if "TUPLE" not in name and name != "MARK"
            ]

    @pytest.mark.parametrize("value", VALUES, ids=repr)
    def test_of_builtins_loads(self, value):
        archive = torchzip.value(value)
        assert torch.load(io.BytesIO(archive), weights_only=True) == value
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            assert zipped.testzip() is None

    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_zeros_stores_one_element(self, shape):
        layout = torchzip.tensor("bfloat16", shape, expanded=True)
        assert layout.data_bytes == 2
        archive = layout.head + b"\0\0" + layout.tail(zlib.crc32(b"\0\0"))
        assert torch.equal(torch.load(io.BytesIO(archive), weights_only=True), torch.zeros(shape, dtype=torch.bfloat16))

    @pytest.mark.parametrize("size", [(1 << 32) - 2, (1 << 32) - 1, 1 << 32, 5 << 30])
    def test_beyond_4_gib_has_wide_fields(self, size, tmp_path):
        size -= size % 2
        layout = torchzip.tensor("bfloat16", (size // 2,))
        path = tmp_path / "large.pt"  # sparse: its data are zeros
        with path.open("wb") as file:
            file.write(layout.head)
            file.seek(size, os.SEEK_CUR)
            file.write(layout.tail(0x12345678))
        assert path.stat().st_size == layout.length
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("archive/data/0")
            assert (info.file_size, info.CRC) == (size, 0x12345678)
            assert archive.read("archive/version") == b"3\n"
        with path.open("rb") as file:
            found = torchzip.find_data(lambda offset, length: os.pread(file.fileno(), length, offset), layout.length)
        assert found == ("bfloat16", (size // 2,), len(layout.head), size, 0x12345678)
        assert torch.load(path, weights_only=True, mmap=True).shape == (size // 2,)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_reads_torch_s(self, dtype, shape):
        tensor = example(dtype, shape)
        data = saved(tensor)
        found = torchzip.find_data(within(data), len(data))
        assert (found.dtype, found.shape) == (dtype, shape)
        assert data[found.offset : found.offset + found.length] == raw(tensor)
        assert found.crc32 == zlib.crc32(raw(tensor))

    def test_reads_one_saved_without_crcs(self):
        torch.serialization.set_crc32_options(False)
        try:
            data = saved(torch.ones(3))
        finally:
            torch.serialization.set_crc32_options(True)
        assert torchzip.find_data(within(data), len(data)).crc32 is None

    @pytest.mark.parametrize(
        "value",
        [
            torch.ones(4, 4).t()[:, 1:],
            torch.ones(8)[2:],
            torch.ones(1).expand(5),
            {"a": torch.ones(2)},
            [1],
            torch.ones(2).to(torch.float8_e5m2),
        ],
        ids=["strided", "shifted", "expanded", "dict", "list", "untyped"],
    )
    def test_refuses_what_is_no_plain_tensor(self, value):
        data = saved(value)
        with pytest.raises(FormatError):
            torchzip.find_data(within(data), len(data))

    def test_damage_never_raises_anything_else(self):
        data = bytearray(saved(torch.arange(4.0)))
        for at in range(len(data)):
            for bit in (0, 7):
                changed = bytes(data[:at]) + bytes([data[at] ^ 1 << bit]) + bytes(data[at + 1 :])
                with contextlib.suppress(FormatError):
                    torchzip.find_data(within(changed), len(changed))
        for length in range(0, len(data), 7):
            with pytest.raises(FormatError):
                torchzip.find_data(within(bytes(data[:length])), length)


def test_persistent_ids_are_refused_unless_allowed():
    code = b"\x80\x02X\x01\x00\x00\x00aQ."
    with pytest.raises(FormatError, match="persistent"):
        inert.read(code, lambda name: False)


def test_memo_refers_to_more_than_256_values():
    once = pickling.Memo()
    parts = [once(pickling.emit(f"k{n}")) for n in (*range(400), *range(400))]
    import pickle

    assert pickle.loads(b"\x80\x04](" + b"".join(parts) + b"e.") == [f"k{n}" for n in range(400)] * 2  # noqa: S301


# The folder


def source_file(folder, content: bytes, name: str = "data.bin") -> FileInfo:
    path = folder / name
    path.write_bytes(content)
    found = path.stat()
    return FileInfo(name, found.st_size, found.st_mtime_ns, found.st_ino)


def entries_of(state, offset: int = 0):
    """Entries for a flat dict of tensors and builtins, and the bytes that they come from."""
    entries, content = {}, b"\xaa" * offset
    for path, value in state.items():
        if isinstance(value, torch.Tensor):
            entries[path] = TensorItem(str(value.dtype)[6:], tuple(value.shape), Origin(0, len(content)))
            content += raw(value)
        else:
            entries[path] = ObjectItem(value)
    return entries, content


STATE = {
    ("dcp", "model", "a.weight"): example("bfloat16", (6, 4)),
    ("dcp", "model", "b.weight"): example("float32", (3,)),
    ("dcp", "optim", "state", "a.weight", "step"): torch.tensor(3.0),
    ("dcp", "optim", "param_groups", 0, "betas"): (0.9, 0.95),
    ("dcp", "optim", "param_groups", 0, "params"): ["a.weight", "b.weight"],
}


def nested():
    return {
        "dcp": {
            "model": {"a.weight": STATE["dcp", "model", "a.weight"], "b.weight": STATE["dcp", "model", "b.weight"]},
            "optim": {
                "state": {"a.weight": {"step": STATE["dcp", "optim", "state", "a.weight", "step"]}},
                "param_groups": [{"betas": (0.9, 0.95), "params": ["a.weight", "b.weight"]}],
            },
        }
    }


def write(tmp_path, entries, content, **options):
    info = source_file(tmp_path, content)
    target = tmp_path / "dcp"
    target.mkdir()
    return target, dcp_writer.write(tmp_path, target, [info], entries, **options)


def test_metadata_equals_torch_s(tmp_path):
    entries, content = entries_of(STATE, 13)
    target, _ = write(tmp_path, entries, content)
    dcp.save(nested(), checkpoint_id=str(tmp_path / "torch"))
    mine, theirs = (dcp.FileSystemReader(str(folder)).read_metadata() for folder in (target, tmp_path / "torch"))
    assert mine.state_dict_metadata == theirs.state_dict_metadata
    assert mine.planner_data == theirs.planner_data
    assert {(i.fqn, i.offset, i.index) for i in mine.storage_data} == {(i.fqn, i.offset, i.index) for i in theirs.storage_data}
    assert {vars(i)["relative_path"] for i in mine.storage_data.values()} == {dcp_writer.SHARD_NAME}
    assert {type(i) for i in mine.storage_data.values()} == {type(i) for i in theirs.storage_data.values()}
    assert sum(i.length for i in mine.storage_data.values()) == os.path.getsize(target / dcp_writer.SHARD_NAME)
    assert sorted(os.listdir(target)) == sorted(os.listdir(tmp_path / "torch"))
    assert mine.version == getattr(theirs, "version", "1.0.0")


def test_our_reader_accepts_it(tmp_path):
    entries, content = entries_of(STATE)
    target, digests = write(tmp_path, entries, content)
    metadata = reader.read_metadata((target / ".metadata").read_bytes())
    assert set(metadata.tensors) | set(metadata.object_keys) == {".".join(map(str, path)) for path in entries}
    files = {name: FileInfo(name, (target / name).stat().st_size, 0, 0) for name in os.listdir(target)}
    assert set(files) == set(digests)

    def read_at(name, offset, length):
        return (target / name).read_bytes()[offset : offset + length]

    assert check_structure(read_at, files) == []
    for item in metadata.items:  # each is a whole zip whose CRC-32s are right
        with zipfile.ZipFile(io.BytesIO(read_at(item.file, item.offset, item.length))) as archive:
            assert archive.testzip() is None


def test_loads_and_the_digests_are_those_of_the_files(tmp_path):
    entries, content = entries_of(STATE)
    target, digests = write(tmp_path, entries, content)
    wanted = nested()
    loaded = nested()
    loaded["dcp"]["model"] = {key: torch.zeros_like(value) for key, value in wanted["dcp"]["model"].items()}
    dcp.load(loaded, checkpoint_id=str(target))
    for key, value in wanted["dcp"]["model"].items():
        assert torch.equal(loaded["dcp"]["model"][key], value)
    assert loaded["dcp"]["optim"]["param_groups"] == wanted["dcp"]["optim"]["param_groups"]
    specs = [native.FileSpec(name, (target / name).stat().st_size) for name in digests]
    assert native.digest_files(target, specs) == digests


def test_large_tensors_are_cut_at_both_files_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 8192)
    state = {("m", f"t{n}"): torch.randint(0, 100, (n * 1531,), dtype=torch.int16) for n in range(1, 30)}
    entries, content = entries_of(state, 100)
    info = source_file(tmp_path, content)
    chunk_bytes = 4096
    expected = [native.crc64(content[at : at + chunk_bytes]) for at in range(0, len(content), chunk_bytes)]
    (tmp_path / "dcp").mkdir()
    also = [streaming.Range(0, 0, 100)]
    options = {"expected": {"data.bin": expected}, "also_read": also, "chunk_bytes": chunk_bytes}
    digests = dcp_writer.write(tmp_path, tmp_path / "dcp", [info], entries, **options)
    specs = [native.FileSpec(name, (tmp_path / "dcp" / name).stat().st_size) for name in digests]
    assert native.digest_files(tmp_path / "dcp", specs) == digests
    loaded = {"m": {path[1]: torch.zeros_like(value) for path, value in state.items()}}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "dcp"))
    assert all(torch.equal(loaded["m"][path[1]], value) for path, value in state.items())


@pytest.mark.parametrize("at", [0, 99, 100, 5000, -1])
def test_a_flipped_bit_is_found_in_the_one_read(tmp_path, at):
    entries, content = entries_of({("m", "t"): torch.arange(4000, dtype=torch.int16)}, 100)
    expected = [native.crc64(content[n : n + 4096]) for n in range(0, len(content), 4096)]
    damaged = bytearray(content)
    damaged[at] ^= 16
    options = {"expected": {"data.bin": expected}, "also_read": [streaming.Range(0, 0, 100)], "chunk_bytes": 4096}
    with pytest.raises(DigestMismatchError) as caught:
        write(tmp_path, entries, bytes(damaged), **options)
    assert caught.value.offset_bytes == range(len(content))[at] // 4096 * 4096
    assert not (tmp_path / "dcp" / ".metadata").exists()


def test_a_source_that_is_written_meanwhile_is_refused(tmp_path):
    entries, content = entries_of({("m", "t"): torch.arange(4000, dtype=torch.int16)})

    def touch(done, total):
        os.utime(tmp_path / "data.bin", ns=(1, 1))

    with pytest.raises(SourceChangedError):
        write(tmp_path, entries, content, progress=touch)
    assert not (tmp_path / "dcp" / ".metadata").exists()


def test_a_source_that_shrinks_is_refused(tmp_path):
    entries, content = entries_of({("m", "t"): torch.arange(4000, dtype=torch.int16)})
    info = source_file(tmp_path, content)
    os.truncate(tmp_path / "data.bin", 100)
    (tmp_path / "dcp").mkdir()
    with pytest.raises(SourceChangedError):
        dcp_writer.write(tmp_path, tmp_path / "dcp", [info], entries)


def test_interrupted_it_stops_and_writes_no_metadata(tmp_path):
    entries, content = entries_of({("m", f"t{n}"): torch.zeros(1 << 20) for n in range(8)})

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, entries, content, progress=stop)
    assert set(os.listdir(tmp_path / "dcp")) <= {dcp_writer.SHARD_NAME}


def test_equal_items_are_stored_once(tmp_path):
    state = {("m", "a"): torch.arange(9.0), ("m", "b"): torch.arange(9.0)}
    entries, content = entries_of(state)
    entries["m", "b"] = entries["m", "a"]
    target, _ = write(tmp_path, entries, content)
    loaded = {"m": {"a": torch.zeros(9), "b": torch.zeros(9)}}
    dcp.load(loaded, checkpoint_id=str(target))
    assert torch.equal(loaded["m"]["b"], torch.arange(9.0))
    assert (target / dcp_writer.SHARD_NAME).stat().st_size == torchzip.tensor("float32", (9,)).length


def test_the_metadata_of_many_keys_stays_small():
    item = TensorItem("bfloat16", (4096, 4096), None)
    entries = {("dcp", "model", f"model.layers.{n}.mlp.experts.7.gate_proj.weight"): item for n in range(2000)}
    data = dcp_writer.metadata(entries, {item: (1 << 40, 33_555_000)})
    assert len(data) < 2000 * 320
    assert len(reader.read_metadata(data).items) == 2000
    assert struct.unpack("<B", data[1:2]) == (4,)
