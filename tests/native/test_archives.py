"""find_records against zipfile, which it must agree with wherever it answers; and the CRC-32s of ranges."""

import io
import random
import resource
import zipfile
import zlib

import pytest

from ckptstore import native
from ckptstore.errors import DigestMismatchError, NotFoundError, RefusedError, UsageError
from ckptstore.formats import FormatError, archives, torchzip
from ckptstore.model import FileInfo

from .files import random_bytes

CHUNK = 4096


def reader(folder):
    def read_at(name, offset, length):
        with (folder / name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    return read_at


def by_zipfile(folder, window):
    """What zipfile finds there: in the engine's words, without the archives' own names."""
    try:
        found = list(archives.records(archives.Window(reader(folder), *window)))
    except FormatError:
        return None
    return [(record.name, record.offset, record.length, record.crc32) for record in found]


def by_engine(folder, windows):
    found = native.find_records(folder, windows)
    return [None if one is None else [(name.partition("/")[2], *rest) for name, *rest in one] for one in found]


def tensor(shape, data):
    layout = torchzip.tensor("float32", shape)
    return layout.head + data + layout.tail(zlib.crc32(data))


def stored(records, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def test_many_archives_in_one_file(tmp_path):
    whole = [tensor((n % 9000,), random_bytes(n % 9000 * 4, n)) for n in range(1, 40000, 97)] + [torchzip.value({"lr": 1.0})]
    windows, data = [], b""
    for archive in whole:
        windows.append(("__0_0.distcp", len(data), len(archive)))
        data += archive
    (tmp_path / "__0_0.distcp").write_bytes(data)
    found = by_engine(tmp_path, windows)
    assert found == [by_zipfile(tmp_path, window) for window in windows]
    assert {len(one) for one in found} == {7, 6}  # all of them: none was left to zipfile


def test_torchs_own(tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"layer{n}": torch.full((n,), float(n)) for n in range(200)}  # a directory of more than is read at first
    torch.save(state, tmp_path / "a.pt")
    window = ("a.pt", 0, (tmp_path / "a.pt").stat().st_size)
    (found,) = by_engine(tmp_path, [window])
    assert found == by_zipfile(tmp_path, window)
    assert len(found) > 199


def test_more_than_32_bits(tmp_path):
    layout = torchzip.tensor("uint8", (5 << 30,))
    with (tmp_path / "a").open("wb") as file:
        file.write(layout.head)
        file.seek(layout.data_bytes, 1)
        file.write(layout.tail(0x12345678))
    window = ("a", 0, layout.length)
    (found,) = by_engine(tmp_path, [window])
    assert found == by_zipfile(tmp_path, window)
    assert found[4] == ("data/0", len(layout.head), 5 << 30, 0x12345678)


UNUSUAL = {
    "nothing": b"",
    "no archive": b"x" * 5000,
    "bytes in front": b"x" * 10 + stored({"a/b": b"1"}),
    "bytes behind": stored({"a/b": b"1"}) + b"x",
    "compressed": stored({"a/b": b"1" * 100}, compression=zipfile.ZIP_DEFLATED),
    "other letters": stored({"a/é": b"1"}),
    "cut": torchzip.value(1)[:-1],
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_torch_does_not_write_is_left_to_zipfile(tmp_path, what):
    (tmp_path / "a").write_bytes(UNUSUAL[what])
    assert by_engine(tmp_path, [("a", 0, len(UNUSUAL[what]))]) == [None]


def test_a_window_that_is_not_there(tmp_path):
    (tmp_path / "a").write_bytes(torchzip.value(1))
    assert by_engine(tmp_path, [("a", 5, 1 << 62), ("a", 1 << 62, 100)]) == [None, None]
    with pytest.raises(NotFoundError):
        native.find_records(tmp_path, [("b", 0, 100)])
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(RefusedError):
        native.find_records(tmp_path, [("link", 0, 100)])


def test_mutations(tmp_path):
    """Numbers in the directory, and its marks, replaced at random. Whatever the engine answers, zipfile says as well."""
    chance = random.Random(7)
    seeds = [tensor((5,), bytes(20)), torchzip.value({"a": [1, 2]}), stored({"a/b": b"1234", "a/c": b"x" * 5000})]
    windows, answered = [], 0
    with (tmp_path / "a").open("wb") as file:
        for _ in range(3000):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randint(1, 3)):
                at = chance.randrange(max(0, len(data) - 900), len(data))
                new = chance.choice(
                    [b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"PK\1\2", bytes([chance.randrange(256)])]
                )
                data[at : at + len(new)] = new
            windows.append(("a", file.tell(), len(data)))
            file.write(data)
    for window, found in zip(windows, by_engine(tmp_path, windows), strict=True):
        if found is not None:
            answered += 1
            assert found == by_zipfile(tmp_path, window), window
    assert 100 < answered < 2900


# --- CRC-32s of ranges ------------------------------------------------------------------------------------------------


def sums_of(data, ranges):
    return [native.Sum(begin, length, zlib.crc32(data[begin : begin + length])) for begin, length in ranges]


@pytest.mark.parametrize("direct", [False, True])
def test_sums_of_ranges(tmp_path, direct):
    data = random_bytes(5 * CHUNK + 777)
    (tmp_path / "a").write_bytes(data)
    chance = random.Random(3)
    ranges = [(0, len(data)), (0, 1), (CHUNK - 1, 2), (CHUNK, CHUNK), (len(data) - 1, 1)]  # some share bytes
    ranges += [(begin := chance.randrange(len(data)), chance.randint(1, len(data) - begin)) for _ in range(200)]
    spec, sums = native.FileSpec("a", len(data)), sums_of(data, ranges)
    plain = native.digest_files(tmp_path, [spec], chunk_bytes=CHUNK)
    assert native.digest_files(tmp_path, [spec], chunk_bytes=CHUNK, sums={"a": sums}, direct=direct) == plain
    for wrong in (0, 2, 77):
        bad = [*sums]
        bad[wrong] = bad[wrong]._replace(crc32=bad[wrong].crc32 ^ 1)
        found = native.digest_files(tmp_path, [spec], chunk_bytes=CHUNK, sums={"a": bad}, direct=direct)["a"]
        assert isinstance(found, DigestMismatchError)
        assert (found.path, found.offset_bytes) == ("a", bad[wrong].offset)


def test_the_first_range_that_differs_is_named(tmp_path):
    data = random_bytes(20 * CHUNK)
    (tmp_path / "a").write_bytes(data)
    ranges = sums_of(data, [(at * 100, 100) for at in range(len(data) // 100)])
    data = bytearray(data)
    for at in (700, 333, 512):
        data[at * 100 + 50] ^= 1
    (tmp_path / "a").write_bytes(data)
    found = native.digest_files(tmp_path, [native.FileSpec("a", len(data))], chunk_bytes=CHUNK, sums={"a": ranges})["a"]
    assert found.offset_bytes == 33300


@pytest.mark.parametrize("sum", [(-1, 5, 0), (0, 0, 0), (0, 101, 0), (100, 1, 0)])
def test_sums_of_bytes_that_are_not_there(tmp_path, sum):
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(UsageError):
        native.digest_files(tmp_path, [native.FileSpec("a", 100)], sums={"a": [native.Sum(*sum)]})


def test_more_files_than_descriptors(tmp_path):
    """A checkpoint of a thousand ranks, and 1024 descriptors as everywhere."""
    files = {}
    for n in range(100):
        path = tmp_path / f"rank{n}.pt"
        path.write_bytes(tensor((n,), bytes(4 * n)))
        status = path.stat()
        files[path.name] = FileInfo(path.name, status.st_size, status.st_mtime_ns, status.st_ino)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (90, hard))
    try:
        found = archives.compare(tmp_path, files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.findings == ()
    assert len(found.digests) == 100
