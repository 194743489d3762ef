"""scan_weights against a decoder written from the formats' definitions, number by number."""

from __future__ import annotations

import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore import native
from ckptstore.errors import CkptStoreError, NotFoundError, RefusedError, SourceChangedError, UsageError
from ckptstore.native import Region, WeightStats, scan_weights

BLOCK = 4096
PIECE = 4 << 20  # of one read


def small(exponent_bits: int, mantissa_bits: int, *, infinities: bool = True) -> Callable[[int], float]:
    """The value of a number's bits, by the definition of IEEE 754 (of OCP's E4M3 without infinities)."""
    bias = (1 << (exponent_bits - 1)) - 1

    def value(bits: int) -> float:
        mantissa = bits & ((1 << mantissa_bits) - 1)
        exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
        sign = -1.0 if bits >> (exponent_bits + mantissa_bits) else 1.0
        if exponent == (1 << exponent_bits) - 1:
            if infinities:
                return math.nan if mantissa else sign * math.inf
            if mantissa == (1 << mantissa_bits) - 1:
                return math.nan
        if exponent == 0:
            return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
        return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)

    return value


DECODE = {
    "F64": lambda bits: struct.unpack("<d", bits.to_bytes(8, "little"))[0],
    "F32": small(8, 23),
    "F16": small(5, 10),
    "BF16": small(8, 7),
    "F8_E4M3": small(4, 3, infinities=False),
    "F8_E5M2": small(5, 2),
}


def numbers(data: bytes, dtype: str) -> list[float]:
    width = native.WEIGHT_DTYPES[dtype]
    return [DECODE[dtype](int.from_bytes(data[i : i + width], "little")) for i in range(0, len(data), width)]


def expected(data: bytes, dtype: str) -> WeightStats:
    values = numbers(data, dtype)
    finite = [value for value in values if math.isfinite(value)]
    zero = [at for at in range(0, len(data) - BLOCK + 1, BLOCK) if not any(numbers(data[at : at + BLOCK], dtype))]
    return WeightStats(
        numbers=len(values),
        nan=sum(map(math.isnan, values)),
        infinite=sum(map(math.isinf, values)),
        first_nonfinite=next((i for i, value in enumerate(values) if not math.isfinite(value)), -1),
        zero_blocks=len(zero),
        first_zero_block=zero[0] if zero else -1,
        sum_squares=math.fsum(value * value for value in finite),
        min=min(finite, default=0.0),
        max=max(finite, default=0.0),
        crc=native.crc64(data),
    )


def scan_bytes(folder: Path, data: bytes, dtype: str, *, offset: int = 0, threads: int = 0) -> WeightStats:
    (folder / "data").write_bytes(b"\x7f" * offset + data + b"\x7f" * 3)
    (found,) = scan_weights(folder, [Region("data", offset, len(data), dtype)], threads=threads)
    assert isinstance(found, WeightStats), found
    return found


def same(found: WeightStats, wanted: WeightStats) -> None:
    assert found._replace(sum_squares=0) == wanted._replace(sum_squares=0)
    assert found.sum_squares == pytest.approx(wanted.sum_squares, rel=1e-6)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_bit_pattern(tmp_path: Path, dtype: str) -> None:
    width = native.WEIGHT_DTYPES[dtype]
    patterns = [bits.to_bytes(width, "little") for bits in range(1 << 8 * width)]
    same(scan_bytes(tmp_path, b"".join(patterns), dtype), expected(b"".join(patterns), dtype))
    finite = [pattern for pattern in patterns if math.isfinite(numbers(pattern, dtype)[0])]
    random.Random(1).shuffle(finite)
    for part in (finite, finite[: len(finite) // 3], finite[:1]):
        data = b"".join(part)
        same(scan_bytes(tmp_path, data, dtype, offset=7), expected(data, dtype))


@pytest.mark.parametrize("dtype", list(native.WEIGHT_DTYPES))
@pytest.mark.parametrize("count", [0, 1, 3, 15, 31, 33, 511, 512, 513, 5000])
def test_lengths_and_offsets(tmp_path: Path, dtype: str, count: int) -> None:
    dice = random.Random(count)
    data = dice.randbytes(count * native.WEIGHT_DTYPES[dtype])
    wanted = expected(data, dtype)
    if math.isfinite(wanted.sum_squares):  # random doubles overflow when squared
        same(scan_bytes(tmp_path, data, dtype, offset=count % 13), wanted)


@pytest.mark.parametrize("dtype", list(native.WEIGHT_DTYPES))
@pytest.mark.parametrize("at", [0, 1, 2047, 4096, 6143])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_one_bad_number_among_many_is_found_where_it_is(tmp_path: Path, dtype: str, at: int, kind: str) -> None:
    width = native.WEIGHT_DTYPES[dtype]
    bad = {
        "F64": {"nan": 0x7FF0000000000001, "inf": 0xFFF0000000000000},
        "F32": {"nan": 0xFFC00000, "inf": 0x7F800000},
        "F16": {"nan": 0x7C01, "inf": 0xFC00},
        "BF16": {"nan": 0xFF81, "inf": 0x7F80},
        "F8_E4M3": {"nan": 0xFF, "inf": 0x7F},  # has NaN only
        "F8_E5M2": {"nan": 0x7D, "inf": 0xFC},
    }[dtype][kind]
    data = bytearray(b"\x11" * 6144 * width)
    data[at * width : (at + 1) * width] = bad.to_bytes(width, "little")
    found = scan_bytes(tmp_path, bytes(data), dtype)
    infinite = int(kind == "inf" and dtype != "F8_E4M3")
    assert (found.nan, found.infinite, found.first_nonfinite) == (1 - infinite, infinite, at)
    assert found.min == found.max == numbers(b"\x11" * width, dtype)[0]


def test_values_whose_squares_leave_a_floats_range(tmp_path: Path) -> None:
    for value in (3e38, 1e-30, 1e-45):
        data = struct.pack("<f", value) * 3000
        found = scan_bytes(tmp_path, data, "F32")
        exact = struct.unpack("<f", data[:4])[0]
        assert found.sum_squares == pytest.approx(3000 * exact * exact, rel=1e-9)


def test_zero_blocks_are_whole_ones_from_the_regions_start(tmp_path: Path) -> None:
    data = bytearray(b"\x3f" * (5 * BLOCK + 100))
    data[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    data[3 * BLOCK : 4 * BLOCK - 2] = bytes(BLOCK - 2)
    data[4 * BLOCK : 5 * BLOCK] = b"\x00\x80" * (BLOCK // 2)  # minus zero is zero
    data[5 * BLOCK :] = bytes(100)
    found = scan_bytes(tmp_path, bytes(data), "BF16", offset=3)
    assert (found.zero_blocks, found.first_zero_block) == (3, BLOCK)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_large_regions_do_not_depend_on_the_threads(tmp_path: Path, threads: int) -> None:
    data = random.Random(5).randbytes(64 << 10) * (3 * PIECE // (64 << 10)) + b"\x01\x02"
    one = scan_bytes(tmp_path, data, "BF16", threads=1)
    many = scan_bytes(tmp_path, data, "BF16", offset=11, threads=threads)
    assert many == one
    assert one.crc == native.crc64(data)
    assert one.numbers == len(data) // 2


def test_many_regions_in_many_files(tmp_path: Path) -> None:
    dice = random.Random(2)
    regions, contents = [], []
    for file in range(5):
        (tmp_path / f"d{file}").mkdir()
        pieces = [bytes([dice.randrange(1, 100)]) * dice.randrange(0, 300) * 4 for _ in range(40)]
        (tmp_path / f"d{file}/x").write_bytes(b"".join(pieces))
        at = 0
        for piece in pieces:
            regions.append(Region(f"d{file}/x", at, len(piece), "F32"))
            contents.append(piece)
            at += len(piece)
    order = list(range(len(regions)))
    dice.shuffle(order)
    for number, found in zip(order, scan_weights(tmp_path, [regions[i] for i in order]), strict=True):
        assert isinstance(found, WeightStats)
        assert (found.numbers, found.crc) == (len(contents[number]) // 4, native.crc64(contents[number]))


def test_what_fails_for_one_region_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"\x01" * 64)
    (tmp_path / "short").write_bytes(b"\x01" * 63)
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = ["absent", "good", "short", "link", "folder", "pipe", "good"]
    found = scan_weights(tmp_path, [Region(name, 0, 64, "F32") for name in names])
    kinds = [type(one) for one in found]
    assert kinds == [NotFoundError, WeightStats, SourceChangedError, RefusedError, RefusedError, RefusedError, WeightStats]
    assert all(str(one) for one in found)


@pytest.mark.parametrize(
    "region",
    [Region("x", 0, 3, "F32"), Region("x", 0, 4, "I32"), Region("../x", 0, 4, "F32"), Region("x", -1, 4, "F32"),
     Region("x", 0, -4, "F32"), Region("/x", 0, 4, "F32")],
)  # fmt: skip
def test_nonsense_is_refused(tmp_path: Path, region: Region) -> None:
    with pytest.raises(UsageError):
        scan_weights(tmp_path, [region])
    with pytest.raises(CkptStoreError):
        scan_weights(tmp_path / "absent", [Region("x", 0, 4, "F32")])


def test_progress_cancels(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(20 << 30)  # a hole: nothing on the disk, seconds of work
    calls: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan_weights(tmp_path, [Region("large", 0, 20 << 30, "BF16")], progress=stop)
    assert calls[0][1] == 20 << 30
    assert len(calls) == 1


@pytest.mark.skipif(bool(os.environ.get("CKPTSTORE_SANITIZED")), reason="sanitizers need memory of their own")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
    code = (
        "import resource, sys\nfrom ckptstore import native\n"
        # Not ru_maxrss: a child starts with that of its parent.
        "peak_kib = lambda: int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
        "before = peak_kib()\n"
        "native.scan_weights(sys.argv[1], [native.Region('large', 0, 1 << 30, 'BF16')], threads=4)\n"
        "print(peak_kib() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) * 1024 < 4 * PIECE + (8 << 20)
