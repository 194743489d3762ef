"""Digesting a checkpoint: verify at full level, beside the sums that people use, and cat for what reading costs."""

import hashlib
import os
import shutil

import awscrt.checksums
import pytest
import xxhash
from conftest import MIB, measure_child, measure_command, measure_fio, measure_here, record

from ckptstore import native

SPEEDS = {
    "cat >/dev/null": "cat $SRC/* >/dev/null",
    "cksum": "cksum $SRC/*",
    "xxhsum -H3": "xxhsum -q -H3 $SRC/*",
    "b3sum": "b3sum $SRC/*",
    "sha256sum": "sha256sum $SRC/*",
}


def engine(threads):
    return lambda data: measure_child(do="digest", source=data.root, files=data.files, options={"threads": threads})


def by_awscrt(data):
    buffer = memoryview(bytearray(MIB))

    def digest():
        for spec in data.specs:
            crc = 0
            with open(data.root / spec.name, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    crc = awscrt.checksums.crc64nvme(buffer[:count], crc)

    return measure_here(digest)


def tool(command):
    return lambda data: measure_command(command, SRC=data.root)


def fio(data):
    largest = max(data.specs, key=lambda spec: spec.size_bytes)
    path = data.root / "fio"
    os.link(data.root / largest.name, f"{path}.read")
    try:
        return measure_fio(path, data.size_bytes, largest.size_bytes, "read")
    finally:
        os.unlink(f"{path}.read")


RUNS = {
    "fio read": fio,
    "ckptstore": engine(0),
    "ckptstore, 1 thread": engine(1),
    "awscrt crc64nvme, 1 MiB reads": by_awscrt,
    **{name: tool(command) for name, command in SPEEDS.items()},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("heat", ["warm", "cold"])
def test_digest(benchmark, place, data_sets, heat, name, turn):
    tool_name = SPEEDS.get(name, name).split()[0]
    if (name in SPEEDS or name == "fio read") and shutil.which(tool_name) is None:
        pytest.skip("not installed")
    data = data_sets("16 shards")
    record(
        benchmark,
        lambda: RUNS[name](data),
        prepare=data.warm if heat == "warm" else data.cool,
        moved_bytes=data.size_bytes,
        group=f"digest, {heat}",
        contender=name,
        ours=name.startswith("ckptstore"),
        durable=False,
        digested=name not in ("cat >/dev/null", "fio read"),
        turn=turn,
    )


@pytest.mark.parametrize("size", [64 << 10, MIB, 64 * MIB], ids=["64 KiB", "1 MiB", "64 MiB"])
@pytest.mark.parametrize("name", [*native.implementations(), "awscrt crc64nvme", "xxhash xxh3_64", "xxhash xxh3_128", "sha256"])
def test_in_memory(benchmark, name, size):
    """One core, hot: no turns, pytest-benchmark's own rounds."""
    data = bytes(bytearray(range(256)) * (size // 256))
    run = {
        "awscrt crc64nvme": lambda: awscrt.checksums.crc64nvme(data),
        "xxhash xxh3_64": lambda: xxhash.xxh3_64_intdigest(data),
        "xxhash xxh3_128": lambda: xxhash.xxh3_128_intdigest(data),
        "sha256": lambda: hashlib.sha256(data).digest(),
    }.get(name, lambda: native.crc64(data, implementation=name))
    benchmark(run)
    benchmark.extra_info.update(
        moved_bytes=size,
        seconds=benchmark.stats.stats.median,
        cpu_s=benchmark.stats.stats.median,
        peak_bytes=0,
        group=f"digest in memory, {size >> 10} KiB",
        contender=name,
        ours=name in native.implementations(),
        durable=False,
        digested=True,
        turn=-1,
    )
