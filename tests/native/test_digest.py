"""digest_files: one outcome a file, the first damaged chunk named, damage of one never the end of the others."""

import os
import threading

import pytest

from ckptstore import native
from ckptstore.errors import (
    AccessError,
    DigestMismatchError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    UsageError,
)

from .files import CHUNK, independent_digest, make_tree, random_bytes

SIZES = [0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 7 * CHUNK + 5, (2 << 20) + 3]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 16])
def test_agrees_with_awscrt(tmp_path, threads, direct):
    contents = {f"d/f{size}": random_bytes(size) for size in SIZES}
    specs = make_tree(tmp_path, contents)
    digests = native.digest_files(tmp_path, specs, chunk_bytes=CHUNK, threads=threads, direct=direct)
    assert digests == {name: independent_digest(data) for name, data in contents.items()}


def test_default_chunks(tmp_path):
    data = random_bytes((16 << 20) + 1)
    specs = make_tree(tmp_path, {"f": data})
    assert native.digest_files(tmp_path, specs)["f"] == independent_digest(data, 8 << 20)


def test_one_outcome_a_file(tmp_path):
    data = random_bytes(6 * CHUNK)
    contents = dict.fromkeys(("good", "bad", "short", "long", "changed"), data)
    make_tree(tmp_path, contents)
    chunks = independent_digest(data).chunks
    bad = bytearray(data)
    bad[2 * CHUNK] ^= 1
    bad[5 * CHUNK] ^= 1
    (tmp_path / "bad").write_bytes(bad)
    os.truncate(tmp_path / "short", 5 * CHUNK)
    with (tmp_path / "long").open("ab") as file:
        file.write(b"x")
    (tmp_path / "link").symlink_to("good")
    os.mkfifo(tmp_path / "pipe")
    specs = [native.FileSpec(name, len(data), expected=chunks) for name in contents]
    specs += [native.FileSpec(name, 1) for name in ("link", "pipe", "missing")]
    specs.append(native.FileSpec("good/under", 1))
    specs[4] = native.FileSpec("changed", len(data), mtime_ns=1)
    for threads in (1, 4):
        outcome = native.digest_files(tmp_path, specs, chunk_bytes=CHUNK, threads=threads)
        assert outcome["good"] == independent_digest(data)
        assert isinstance(outcome["bad"], DigestMismatchError)
        assert outcome["bad"].offset_bytes == 2 * CHUNK
        for name in ("short", "long", "changed"):
            assert isinstance(outcome[name], SourceChangedError), name
        for name in ("link", "pipe"):
            assert isinstance(outcome[name], RefusedError), name
        for name in ("missing", "good/under"):
            assert isinstance(outcome[name], NotFoundError), name


@pytest.mark.parametrize("chunk", range(8))
def test_first_damaged_chunk_whatever_the_order(tmp_path, chunk):
    data = random_bytes(8 * CHUNK)
    expected = independent_digest(data).chunks
    damaged = bytearray(data)
    for i in range(chunk, 8):
        damaged[i * CHUNK + i] ^= 0x10
    make_tree(tmp_path, {"f": bytes(damaged)})
    for _ in range(5):
        outcome = native.digest_files(
            tmp_path, [native.FileSpec("f", 8 * CHUNK, expected=expected)], chunk_bytes=CHUNK, threads=8
        )
        assert outcome["f"].offset_bytes == chunk * CHUNK


def test_every_single_bit_is_seen(tmp_path):
    data = bytearray(random_bytes(300))
    expected = independent_digest(bytes(data)).chunks
    specs = []
    for bit in range(0, 2400, 7):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / str(bit)).write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        specs.append(native.FileSpec(str(bit), 300, expected=expected))
    outcome = native.digest_files(tmp_path, specs, chunk_bytes=CHUNK)
    assert all(isinstance(found, DigestMismatchError) for found in outcome.values())


def test_missing_root(tmp_path):
    with pytest.raises(NotFoundError):
        native.digest_files(tmp_path / "nowhere", [])


def test_wrong_chunks(tmp_path):
    with pytest.raises(UsageError):
        native.digest_files(tmp_path, [], chunk_bytes=5)


def test_progress_and_cancel(tmp_path):
    specs = make_tree(tmp_path, {"f": random_bytes(4 << 20)})
    seen = []
    native.digest_files(tmp_path, specs, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (4 << 20, 4 << 20)

    def fail(done, total):
        raise LookupError

    with pytest.raises(LookupError):
        native.digest_files(tmp_path, specs, progress=fail)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.root
def test_unreadable_file(tmp_path):
    specs = make_tree(tmp_path, {"f": b"x", "g": b"y"})
    os.chmod(tmp_path / "f", 0)
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            os.chmod(parent, parent.stat().st_mode | 0o011)
    outcome = {}

    def as_nobody():  # setfsuid holds for this thread alone, and workers inherit it
        import ctypes

        libc = ctypes.CDLL(None)
        libc.setfsuid(65534)
        outcome.update(native.digest_files(tmp_path, specs))

    thread = threading.Thread(target=as_nobody)
    thread.start()
    thread.join()
    assert isinstance(outcome["f"], AccessError)
    assert outcome["g"] == independent_digest(b"y")
