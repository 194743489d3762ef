"""read_files: parts of files into memory, each byte compared, from the page cache and past it."""

import ctypes
import errno
import json
import mmap
import os
import random
import threading

import pytest

from ckptstore import native
from ckptstore.errors import DigestMismatchError, NotFoundError, RefusedError, SourceChangedError, UsageError

from ..reads import count_bytes
from .conftest import run_python
from .files import CHUNK, independent_digest, make_tree, random_bytes
from .test_faults import COMMON

GUARD = b"\xa5" * 64


def drop_cache(path):
    """Its pages; the kernel keeps one that somebody holds at the moment."""
    for _ in range(100):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not path.stat().st_size or not cached_bytes(path):
            break


def cached_bytes(path):
    """How much of it lies in the page cache, by mincore: asking by a read would fetch it."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
        pages = (ctypes.c_ubyte * -(-size // 4096))()
        begin = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(size), pages) == 0
        del begin
    return 4096 * sum(page & 1 for page in pages)


def described(tmp_path, contents, chunk=CHUNK):
    """The files, and what is known of them."""
    specs = make_tree(tmp_path, contents)
    digests = {name: independent_digest(data, chunk).chunks for name, data in contents.items()}
    return {spec.name: native.FileSpec(spec.name, spec.size_bytes, expected=digests[spec.name]) for spec in specs}


class Wanted:
    """Parts of a file, in memory with guards around each."""

    def __init__(self, places, shift=0):
        self.places = places
        self.memory = [bytearray(GUARD + bytes(shift) + bytes(length) + GUARD) for _, length in places]
        self.shift = len(GUARD) + shift

    def parts(self):
        return [
            (at, memoryview(memory)[self.shift : self.shift + length])
            for (at, length), memory in zip(self.places, self.memory, strict=True)
        ]

    def check(self, data):
        for (at, length), memory in zip(self.places, self.memory, strict=True):
            assert memory[self.shift : self.shift + length] == data[at : at + length], (at, length)
            assert memory[: len(GUARD)] == memory[-len(GUARD) :] == GUARD, (at, length)


def some_places(size, rng):
    """Parts that do not overlap, of all sizes, some one after the other, some empty, in any order."""
    places, at = [], 0
    while at < size:
        at += rng.choice([0, 0, 1, 4095, rng.randrange(3 * CHUNK)])
        length = min(rng.choice([0, 1, 4096, CHUNK, rng.randrange(1, 4 * CHUNK)]), size - at)
        if length >= 0:
            places.append((at, length))
        at += max(length, 1)
    rng.shuffle(places)
    return places


@pytest.mark.parametrize("heat", ["warm", "cold"])
@pytest.mark.parametrize("chunk", [CHUNK, 2 << 20])  # of one read, of several
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_parts(tmp_path, heat, threads, chunk):
    rng = random.Random(f"{heat}{threads}")
    sizes = [0, 1, 4097, CHUNK, 2 * CHUNK + 1, (5 << 20) + 777]
    contents = {f"d/f{size}": random_bytes(size) for size in sizes}
    specs = described(tmp_path, contents, chunk)
    for shift in (0, 1, 8):
        wanted = {name: Wanted(some_places(len(data), rng), shift) for name, data in contents.items()}
        if heat == "cold":
            for name in contents:
                drop_cache(tmp_path / name)
        files = [(specs[name], one.parts()) for name, one in wanted.items()]
        native.read_files(tmp_path, files, chunk_bytes=chunk, threads=threads)
        for name, one in wanted.items():
            one.check(contents[name])


def test_what_is_cold_leaves_no_pages(tmp_path):
    """And what nobody wants is not read at all."""
    if not native.supports_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    data = random_bytes(4 << 20)
    specs = described(tmp_path, {"f": data})
    drop_cache(tmp_path / "f")
    wanted = Wanted([(0, len(data))])
    native.read_files(tmp_path, [(specs["f"], wanted.parts())], chunk_bytes=CHUNK)
    wanted.check(data)
    assert cached_bytes(tmp_path / "f") == 0
    (tmp_path / "f").read_bytes()
    assert cached_bytes(tmp_path / "f") == len(data)
    before = count_bytes()
    native.read_files(tmp_path, [(specs["f"], Wanted([(CHUNK + 5, 10)]).parts())], chunk_bytes=CHUNK)
    assert CHUNK <= count_bytes() - before < 2 * CHUNK


def test_a_flipped_bit_is_found_where_it_is_wanted(tmp_path):
    data = random_bytes(8 * CHUNK)
    specs = described(tmp_path, {"good": data, "bad": data})
    bad = bytearray(data)
    bad[3 * CHUNK + 1] ^= 4
    (tmp_path / "bad").write_bytes(bad)
    good = (specs["good"], Wanted([(0, len(data))]).parts())
    for heat in ("warm", "cold"):
        if heat == "cold":
            drop_cache(tmp_path / "bad")
        for places in ([(0, 3 * CHUNK)], [(4 * CHUNK, 4 * CHUNK)]):
            native.read_files(tmp_path, [good, (specs["bad"], Wanted(places).parts())], chunk_bytes=CHUNK)
        for places in ([(0, len(data))], [(4 * CHUNK - 1, 1)], [(3 * CHUNK - 1, 2)]):
            with pytest.raises(DigestMismatchError) as caught:
                native.read_files(tmp_path, [good, (specs["bad"], Wanted(places).parts())], chunk_bytes=CHUNK)
            assert (caught.value.path, caught.value.offset_bytes) == ("bad", 3 * CHUNK)


def test_the_first_error_ends_it(tmp_path):
    """A load of a large state says at once that it is damaged."""
    data = random_bytes(8 << 20)
    specs = described(tmp_path, {"a": data, "b": data})
    (tmp_path / "a").write_bytes(bytes(len(data)))
    before = count_bytes()
    files = [(spec, Wanted([(0, len(data))]).parts()) for spec in specs.values()]
    with pytest.raises(DigestMismatchError, match=r"^a: the bytes from 0 on"):
        native.read_files(tmp_path, files, chunk_bytes=CHUNK, threads=2)
    assert count_bytes() - before < len(data)


def test_what_is_no_such_file(tmp_path):
    data = random_bytes(3 * CHUNK)
    specs = described(tmp_path, {"f": data, "short": data, "long": data})
    os.truncate(tmp_path / "short", CHUNK)
    with (tmp_path / "long").open("ab") as file:
        file.write(b"x")
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "pipe")
    wanted = {"short": SourceChangedError, "long": SourceChangedError, "link": RefusedError, "pipe": RefusedError,
              "missing": NotFoundError, "f/under": Exception}  # fmt: skip
    for name, error in wanted.items():
        spec = specs.get(name) or native.FileSpec(name, len(data), expected=specs["f"].expected)
        for places in ([(5, 10)], []):  # also where nothing is wanted of it
            with pytest.raises(error):
                native.read_files(tmp_path, [(specs["f"], []), (spec, Wanted(places).parts())], chunk_bytes=CHUNK)
    with pytest.raises(NotFoundError):
        native.read_files(tmp_path / "nowhere", [(specs["f"], [])], chunk_bytes=CHUNK)
    native.read_files(tmp_path, [])


def test_usage(tmp_path):
    data = random_bytes(3 * CHUNK)
    spec = described(tmp_path, {"f": data})["f"]
    for places in ([(0, 10), (9, 1)], [(len(data), 1)], [(len(data) - 1, 2)], [(-1, 2)]):
        with pytest.raises(UsageError, match="wanted twice, or are not there"):
            native.read_files(tmp_path, [(spec, Wanted(places).parts())], chunk_bytes=CHUNK)
    with pytest.raises(UsageError, match="cannot be written"):
        native.read_files(tmp_path, [(spec, [(0, b"only read")])], chunk_bytes=CHUNK)
    with pytest.raises(UsageError, match="twice"):
        native.read_files(tmp_path, [(spec, []), (spec, [])], chunk_bytes=CHUNK)
    with pytest.raises(UsageError):
        native.read_files(tmp_path, [(spec, [])], chunk_bytes=1000)


def test_a_progress_that_raises_cancels(tmp_path):
    data = random_bytes(1 << 20)
    spec = described(tmp_path, {"f": data})["f"]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        native.read_files(tmp_path, [(spec, Wanted([(0, len(data))]).parts())], chunk_bytes=CHUNK, progress=stop)


def test_many_at_once(tmp_path):
    data = random_bytes(1 << 20)
    spec = described(tmp_path, {"f": data})["f"]
    failures = []

    def read():
        wanted = Wanted([(at, 4096) for at in range(0, len(data), 8192)])
        native.read_files(tmp_path, [(spec, wanted.parts())], chunk_bytes=CHUNK)
        try:
            wanted.check(data)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


SWEEP = (
    COMMON
    + """
import json
outcomes = {}
for action in sys.argv[3].split():
    outcomes[action] = []
    for nth in range(1, 100):
        memory = {s.name: bytearray(s.size_bytes) for s in expected}
        for spec in specs:
            fd = os.open(source / spec.name, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED if nth % 2 else os.POSIX_FADV_WILLNEED)
            os.close(fd)
        arm("pread64", nth, action, b"source")
        try:
            files = [(spec, [(0, memory[spec.name])]) for spec in expected]
            native.read_files(source, files, chunk_bytes=CHUNK, threads=2)
            outcome = "ok"
        except errors.CkptStoreError as error:
            outcome = type(error).__name__
        hit = library.fault_hits() > 0
        disarm()
        if not hit:
            break
        if outcome == "ok":
            assert memory == contents, (action, nth)
        outcomes[action].append(outcome)
print(json.dumps(outcomes))
"""
)


def test_every_read_fails_in_turn(faults, tmp_path):
    actions = [errno.EIO, "short", errno.EINTR, errno.EINVAL, "flip"]
    done = run_python(SWEEP, faults, tmp_path, " ".join(map(str, actions)), preload=faults)
    assert done.returncode == 0, done.stdout + done.stderr
    got = {action: set(found) for action, found in json.loads(done.stdout).items()}
    assert got["5"] == {"StorageError"}
    assert got["short"] == got["4"] == {"ok"}
    assert "ok" in got["22"]  # O_DIRECT refused on the way
    assert got["flip"] == {"DigestMismatchError"}
