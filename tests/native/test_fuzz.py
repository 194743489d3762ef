"""The engine under hostile arguments and files that change under it: its own errors, no crash; `./run sanitize` looks closer.

Each case is made again by its number ($FUZZ_SEED); a soak runs for $FUZZ_SECONDS.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptstore import native
from ckptstore.errors import CkptStoreError
from tests import fuzzed, mutations

#: What Python itself raises for a value that no C type holds, or an object of another kind.
REFUSALS = (CkptStoreError, TypeError, ValueError, OverflowError, BufferError, MemoryError, RuntimeError, OSError, LookupError)
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SOAK_S = float(os.environ.get("FUZZ_SECONDS", "120"))
SIZES = (0, 1, 100, 4095, 4096, 4097, 70_000, 300_000, 2_500_000)
NUMBERS = (
    0,
    1,
    -1,
    4095,
    4096,
    8192,
    1 << 20,
    1 << 31,
    1 << 32,
    (1 << 63) - 4096,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
)
STRANGE = (*NUMBERS, 1.5, "1", None, b"", 10**400)
NAMES = (
    "a",
    "b/c",
    "..",
    "../a",
    "/etc/passwd",
    "",
    ".",
    "a/",
    "a//b",
    "a\0b",
    "x" * 300,
    "\udcff",
    "link",
    "fifo",
    "folder",
    "b",
)


class World:
    """A folder of files with known bytes and of what is no file, and somebody who changes them meanwhile."""

    def __init__(self, home: Path, rng: random.Random) -> None:
        self.root, self.rng = home / "in", rng
        self.out = home / "out"
        for folder in (self.root / "b", self.out):
            folder.mkdir(parents=True)
        self.contents = {name: rng.randbytes(rng.choice(SIZES)) for name in ("a", "b/c", "d")}
        for name, data in self.contents.items():
            (self.root / name).write_bytes(data)
        (self.root / "link").symlink_to("a")
        os.mkfifo(self.root / "fifo")
        (self.root / "folder").mkdir()

    def spec(self) -> native.FileSpec:
        rng = self.rng
        name = rng.choice((*self.contents, *self.contents, rng.choice(NAMES)))
        size: Any = len(self.contents.get(name, b""))
        if rng.random() < 0.3:
            size = rng.choice((size + 1, max(size - 1, 0), *STRANGE))
        spec = native.FileSpec(name, size)
        if rng.random() < 0.3:
            count: Any = -(-size // 4096) if isinstance(size, int) and 0 <= size < 1 << 24 else 3
            spec = native.FileSpec(name, size, expected=[rng.choice((0, 1, (1 << 64) - 1))] * rng.choice((count, count, 1, 0)))
        if rng.random() < 0.15:
            spec = native.FileSpec(name, size, rng.choice(STRANGE), rng.choice(STRANGE))
        return spec

    def memory(self, size: int) -> Any:
        rng = self.rng
        plain = bytearray(min(max(size, 0), 1 << 22))
        kinds: tuple[Callable[[], Any], ...] = (
            lambda: bytes(plain),
            lambda: memoryview(bytes(plain)),
            lambda: memoryview(plain)[::2],
            lambda: memoryview(plain)[1:],
            lambda: mmap.mmap(-1, max(len(plain), 1)),
            lambda: memoryview(plain).cast("B").toreadonly(),
            lambda: "text",
            lambda: None,
            lambda: [plain],
        )
        return plain if rng.random() < 0.7 else rng.choice(kinds)()

    def parts(self, size: Any) -> list[tuple[Any, Any]]:
        rng = self.rng
        size = size if isinstance(size, int) and 0 <= size < 1 << 24 else 10
        found: list[tuple[Any, Any]] = []
        for _ in range(rng.choice((0, 1, 1, 2, 5, 50))):
            offset: Any = rng.randrange(size + 1)
            length = rng.randrange(min(size - offset, 1 << 20) + 1)
            if rng.random() < 0.1:
                offset = rng.choice(STRANGE)
            found.append((offset, self.memory(length)))
        return found

    def disturb(self, stop: threading.Event) -> None:
        """Files shrink, grow, go, and become something else."""
        rng = random.Random(self.rng.random())
        while not stop.is_set():
            path = self.root / rng.choice(list(self.contents))
            with contextlib.suppress(OSError):
                match rng.randrange(6):
                    case 0:
                        os.truncate(path, rng.choice(SIZES))
                    case 1:
                        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)  # it may be a pipe by now
                        with open(descriptor, "ab") as file:
                            file.write(b"x" * 5000)
                    case 2:
                        draft = path.with_name("draft")
                        draft.write_bytes(rng.randbytes(rng.choice(SIZES)))
                        draft.replace(path)
                    case 3:
                        mutations.ENTRIES[rng.choice(("fifo", "gone", "folder", "link to zero"))](path)
                    case 4:
                        mutations.remove(path)
                        path.write_bytes(b"")
                    case _:
                        time.sleep(0.0005)


def _number(rng: random.Random, usual: int) -> Any:
    return usual if rng.random() < 0.8 else rng.choice(STRANGE)


def _options(rng: random.Random) -> native.CopyOptions:
    return native.CopyOptions(
        threads=_number(rng, rng.choice((0, 1, 4))),
        block_bytes=_number(rng, rng.choice((0, 4096, 1 << 16))),
        chunk_bytes=_number(rng, rng.choice((4096, 1 << 16, 8 << 20))),
        strategy=rng.choice(("auto", "clone", "direct", "warm", "buffered", "auto", "none")),  # type: ignore[arg-type]
        durable=rng.random() < 0.3,
        verify_after_write=rng.random() < 0.2,
        nice=_number(rng, 0),
        resume=rng.random() < 0.4,
    )


def act(world: World) -> Any:
    """One call of one entry point."""
    rng, root = world.rng, world.root
    where: Any = (
        root if rng.random() < 0.9 else rng.choice((root / "none", root / "a", f"{root}\0x", "", "/dev/full", root / "fifo"))
    )
    specs = [world.spec() for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    chunk: Any = _number(rng, rng.choice((4096, 1 << 16, 8 << 20)))
    match rng.randrange(12):
        case 0 | 1 | 2:
            return native.digest_files(where, specs, chunk_bytes=chunk, threads=_number(rng, 2), direct=rng.random() < 0.3)
        case 3 | 4 | 5:
            wanted = [(spec, world.parts(spec.size_bytes)) for spec in specs]
            return native.read_files(where, wanted, chunk_bytes=chunk, threads=_number(rng, 2))
        case 6 | 7:
            return native.copy_files(where, world.out if rng.random() < 0.9 else where, specs, options=_options(rng))
        case 8:
            contents = {rng.choice(NAMES): world.memory(rng.choice(SIZES)) for _ in range(2)}
            return native.write_files(world.out, contents, options=_options(rng))
        case 9:
            return native.write_range(where, rng.choice(NAMES), rng.choice(STRANGE), world.memory(rng.choice(SIZES)))  # type: ignore[arg-type]
        case 10:
            kinds = [*native.WEIGHT_DTYPES, "none"]
            regions = [
                native.Region(spec.name, _number(rng, 0), _number(rng, 8 * rng.randrange(1000)), rng.choice(kinds))
                for spec in specs
            ]
            return native.scan_weights(where, regions, threads=_number(rng, 2))
        case _:
            return rng.choice(
                (
                    lambda: native.scan_tree(
                        where, max_depth=rng.choice((-1, 0, 4, 1000)), wanted="a", threads=_number(rng, 2)
                    ),
                    lambda: native.crc64(world.memory(5000), rng.choice(STRANGE)),  # type: ignore[arg-type]
                    lambda: native.crc32(world.memory(5000), rng.choice(STRANGE), implementation=rng.choice(("auto", "x"))),  # type: ignore[arg-type]
                    lambda: native.crc64_combine(*(rng.choice(STRANGE) for _ in range(3))),  # type: ignore[arg-type]
                    lambda: native.crc32_combine(*(rng.choice(STRANGE) for _ in range(3))),  # type: ignore[arg-type]
                    lambda: native.allocate(rng.choice((-1, 10**6, 1 << 40)), rng.choice((0, 100, -1, 1 << 64)), where),
                    lambda: native.rename_exchange(where, root / "none"),
                    lambda: native.rename_noreplace(where, root / "folder"),
                    lambda: native.fsync_path(where),
                    lambda: native.supports_direct(where),
                    lambda: native.be_nice(rng.choice(STRANGE)),  # type: ignore[arg-type]
                )
            )()


def run_case(home: Path, case: int) -> None:
    """Twenty calls, half of the time while somebody changes the files."""
    world = World(home, random.Random(case))
    stop = threading.Event()
    other = threading.Thread(target=world.disturb, args=(stop,)) if world.rng.random() < 0.5 else None
    if other is not None:
        other.start()
    try:
        for call in range(20):
            with fuzzed.bounded(f"case {case}, call {call}"), contextlib.suppress(*REFUSALS):
                act(world)
    finally:
        stop.set()
        if other is not None:
            other.join()


@pytest.fixture
def homes(memory_path: Path) -> Callable[[int], None]:
    def run(case: int) -> None:
        home = memory_path / str(case)
        run_case(home, case)
        mutations.remove(home)

    return run


def test_hostile_calls(homes: Callable[[int], None]) -> None:
    for case in range(30):
        homes(SEED * 1_000_000 + case)


@pytest.mark.soak
def test_hostile_calls_for_long(homes: Callable[[int], None]) -> None:
    end, case = time.monotonic() + SOAK_S, SEED * 1_000_000
    while time.monotonic() < end:
        homes(case)
        case += 1
    print(f"{case - SEED * 1_000_000} cases of 20 calls")


def test_memory_that_is_let_go_meanwhile(tmp_path: Path) -> None:
    """The engine holds what it fills: another thread's attempts to free or resize it fail, or come after."""
    data = os.urandom(8 << 20)
    (tmp_path / "a").write_bytes(data)
    for _ in range(5):
        target = bytearray(len(data))
        freed: list[BaseException] = []

        def free(target: bytearray = target, freed: list[BaseException] = freed) -> None:
            for _ in range(1000):
                try:
                    target.pop()
                    target.append(0)
                except BufferError as error:
                    freed.append(error)

        thread = threading.Thread(target=free)
        thread.start()
        with contextlib.suppress(CkptStoreError, BufferError):
            native.read_files(tmp_path, [(native.FileSpec("a", len(data)), [(0, target)])])
        thread.join()


def test_a_hundred_thousand_parts(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "a").write_bytes(data)
    target = bytearray(len(data))
    parts = [(offset, memoryview(target)[offset : offset + 1]) for offset in range(len(data))]
    native.read_files(tmp_path, [(native.FileSpec("a", len(data)), parts)])
    assert target == data


@pytest.mark.parametrize("seconds", [-(1 << 40), -1, 1 << 33, 1 << 40, 1 << 50])
def test_times_that_64_bits_cannot_hold(tmp_path: Path, memory_path: Path, seconds: int) -> None:
    path = memory_path / "a"
    path.write_bytes(b"x")
    try:
        os.utime(path, (seconds, seconds))
    except OverflowError:
        pytest.skip("nor can this file system")
    (entry,) = native.scan_tree(memory_path)[""].entries
    assert entry.mtime_ns == min(max(path.stat().st_mtime_ns, -(1 << 63)), (1 << 63) - 1)
    spec = native.FileSpec("a", 1, entry.mtime_ns, entry.inode)
    assert isinstance(native.digest_files(memory_path, [spec])["a"], native.Digest)
    assert native.copy_files(memory_path, tmp_path, [spec]).bytes_copied == 1


def test_a_path_with_a_nul_is_none(tmp_path: Path) -> None:
    """C would stop reading there, and take another folder for the one that was named."""
    for call in (native.scan_tree, native.fsync_path, native.supports_direct):
        with pytest.raises(ValueError, match="path"):
            call(f"{tmp_path}\0/more")  # type: ignore[operator]


def test_threads_without_number(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (1 << 20))
    spec = native.FileSpec("a", 1 << 20)
    assert "a" in native.digest_files(tmp_path, [spec], chunk_bytes=4096, threads=1 << 40)
    assert native.scan_tree(tmp_path, threads=1 << 40)[""].entries
    with pytest.raises(ValueError, match="threads"):
        native.digest_files(tmp_path, [spec], threads=-1)


def test_regions_of_exabytes_cost_nothing(tmp_path: Path) -> None:
    """They stood in a damaged header; once, all of their pieces were planned before the first was read."""
    (tmp_path / "a").write_bytes(b"x" * 100)
    lengths = ((1 << 62), (1 << 63) - 8, (1 << 64) - 8)
    regions = [native.Region("a", 0, length, "F64") for length in lengths] + [native.Region("a", (1 << 64) - 8, 8, "F64")]
    regions += [native.Region("a", 0, 96, "F64"), native.Region("none", 0, 1 << 62, "F64")]
    with fuzzed.little_memory(), fuzzed.bounded("regions"):
        found = native.scan_weights(tmp_path, regions)
    assert [type(one).__name__ for one in found] == ["SourceChangedError"] * 4 + ["WeightStats", "NotFoundError"]


def test_a_file_that_would_have_billions_of_chunks(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with fuzzed.little_memory(), fuzzed.bounded("chunks"), pytest.raises(ValueError, match="too many"):
        native.digest_files(tmp_path, [native.FileSpec("a", 1 << 40)], chunk_bytes=4096)
