"""CRC-64/NVME and CRC-32: every implementation against the check values, awscrt's, zlib's, and the laws of a CRC."""

import os
import random
import shutil
import signal
import subprocess
import zlib
from pathlib import Path

import awscrt.checksums
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore import native

from .conftest import HERE
from .files import random_bytes

IMPLEMENTATIONS = native.implementations()
OTHERS = {native.crc64: awscrt.checksums.crc64nvme, native.crc32: zlib.crc32}
ROOT = HERE.parent.parent


def test_portable_is_always_there_and_last():
    assert IMPLEMENTATIONS[-1] == "portable"


def test_best_of_this_processor_is_used():
    flags = Path("/proc/cpuinfo").read_text().split()
    if "vpclmulqdq" in flags and "avx512vl" in flags:
        assert IMPLEMENTATIONS[0] == "vpclmulqdq-avx512"
    elif "vpclmulqdq" in flags:
        assert IMPLEMENTATIONS[0] == "vpclmulqdq-avx2"
    elif "pclmulqdq" in flags:
        assert IMPLEMENTATIONS[0] == "pclmulqdq"
    elif "pmull" in flags:
        assert IMPLEMENTATIONS[0] == "pmull"
    else:
        assert IMPLEMENTATIONS == ["portable"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_check_value(name):
    assert native.crc64(b"123456789", implementation=name) == 0xAE8B14860A799888
    assert native.crc32(b"123456789", implementation=name) == 0xCBF43926
    assert native.crc64(b"", implementation=name) == native.crc32(b"", implementation=name) == 0


@pytest.mark.parametrize("crc", OTHERS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_agrees_with_others_at_every_length_and_alignment(crc, name):
    data = random_bytes(6000)
    before = 0
    for size in [*range(1100), 2047, 2048, 2049, 4095, 4096, 4097, 5900]:
        piece = memoryview(data)[size % 67 : size % 67 + size]
        after = crc(piece, before, implementation=name)
        assert after == OTHERS[crc](piece.tobytes(), before), size
        before = after


@pytest.mark.parametrize("crc", OTHERS)
@pytest.mark.parametrize("name", ["auto", *IMPLEMENTATIONS])
def test_agrees_with_others_on_megabytes(crc, name):
    data = random_bytes(3_000_001)
    assert crc(data, implementation=name) == OTHERS[crc](data)


@given(data=st.binary(max_size=3000), cut=st.integers(0, 3000), name=st.sampled_from(IMPLEMENTATIONS))
def test_continues_and_combines(data, cut, name):
    a, b = data[:cut], data[cut:]
    for crc, combine in ((native.crc64, native.crc64_combine), (native.crc32, native.crc32_combine)):
        whole = OTHERS[crc](data)
        assert crc(b, crc(a), implementation=name) == whole
        assert combine(crc(a), crc(b), len(b)) == whole


def test_combines_lengths_that_no_memory_holds():
    rng = random.Random(5)
    for _ in range(50):
        a, b, c = (rng.getrandbits(64) for _ in range(3))
        m, n = rng.getrandbits(62), rng.getrandbits(62)
        together = native.crc64_combine(native.crc64_combine(a, b, m), c, n)
        assert together == native.crc64_combine(a, native.crc64_combine(b, c, n), m + n)  # associative
        assert awscrt.checksums.combine_crc64nvme(a, b, m) == native.crc64_combine(a, b, m)
        a, b, c = a >> 32, b >> 32, c >> 32
        together = native.crc32_combine(native.crc32_combine(a, b, m), c, n)
        assert together == native.crc32_combine(a, native.crc32_combine(b, c, n), m + n)


def test_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="no-such"):
        native.crc64(b"x", implementation="no-such")
    with pytest.raises(ValueError, match="no-such"):
        native.crc32(b"x", implementation="no-such")
    with pytest.raises(TypeError):
        native.crc32(b"x", 1 << 32)
    with pytest.raises(BufferError):
        native.crc64(memoryview(b"abcdef")[::2])
    with pytest.raises(TypeError):
        native.crc64("text")  # type: ignore[arg-type]


def test_self_check():
    native.self_check()


def _selftest(tmp_path_factory, compiler, *command):
    runner = command[0] if command else None
    if shutil.which(compiler) is None or (runner and shutil.which(runner) is None):
        pytest.skip(f"no {compiler} or no {runner} here (Debian: g++-aarch64-linux-gnu, qemu-user)")
    binary = tmp_path_factory.getbasetemp() / f"selftest-{compiler}"
    environment = {"PATH": os.environ["PATH"]}  # without a sanitizer's LD_PRELOAD
    if not binary.exists():
        flags = ["-std=c++20", "-O2", "-static", "-I", ROOT / "csrc"]
        subprocess.run([compiler, *flags, HERE / "crc_selftest.cpp", "-o", binary], check=True, env=environment)
    command = [binary if word == "{}" else word for word in command or ("{}",)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if runner and done.returncode == -signal.SIGILL:
        pytest.skip(f"this {runner} does not know {command[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_stand_alone_selftest(tmp_path_factory):
    _selftest(tmp_path_factory, "g++")


def test_pmull_under_qemu(tmp_path_factory):
    _selftest(tmp_path_factory, "aarch64-linux-gnu-g++", "qemu-aarch64", "{}", "pmull")


def test_vpclmulqdq_avx2_under_qemu(tmp_path_factory):
    _selftest(tmp_path_factory, "g++", "qemu-x86_64", "-cpu", "max", "{}", "vpclmulqdq-avx2")
