"""Helpers of the engine's tests: files of known bytes, digests made by somebody else, mounts, subprocesses."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import awscrt.checksums
import pytest

from ckptstore import native

HERE = Path(__file__).parent
CHUNK = 64 << 10  # small, so that small files have many


def random_bytes(size, seed=0):
    return random.Random(f"{size} {seed}").randbytes(size)


def independent_digest(data, chunk=CHUNK):
    crc = awscrt.checksums.crc64nvme
    return native.Digest(crc(data) if data else 0, tuple(crc(data[i : i + chunk]) for i in range(0, len(data), chunk)))


def make_tree(root, contents):
    """Write {name: bytes} below root; return the specs."""
    for name, data in contents.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return [native.FileSpec(name, len(data)) for name, data in contents.items()]


def assert_same(source, destination, specs):
    for spec in specs:
        assert Path(destination, spec.name).read_bytes() == Path(source, spec.name).read_bytes(), spec.name
        a, b = Path(source, spec.name).stat(), Path(destination, spec.name).stat()
        assert (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


@pytest.fixture
def roots(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    destination.mkdir()
    return source, destination


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    """Return the compiled LD_PRELOAD library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fault library")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-O2", "-Wall", "-shared", "-fPIC", HERE / "faults.c", "-o", library, "-ldl"], check=True)
    return library


def state(threads=1):
    """Descriptors and how many threads there are, once these are `threads`: one that was joined is listed for a moment."""
    threads += os.environ.get("CKPTSTORE_SANITIZED") == "thread"  # which has one of its own
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) <= threads:
            break
        time.sleep(0.001)
    return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def run_python(code, *arguments, preload=None, prefix=(), env=(), **options):
    """Run a script in a fresh interpreter that can import the helpers of this folder.

    A sanitizer's runtime, where this interpreter runs under one, stays first in LD_PRELOAD.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]), **dict(env))
    if preload is not None:
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(preload)]))
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


SANITIZED = os.environ.get("CKPTSTORE_SANITIZED", "")  # address, thread, undefined
unsanitized = pytest.mark.skipif(bool(SANITIZED), reason="a sanitizer's runtime needs more than this limit")


@contextlib.contextmanager
def mounted(kind, at, *, size_mib, options=""):
    """Mount a fresh file system of `kind` at a folder; skip where this machine cannot."""
    if os.geteuid() != 0:
        pytest.skip(f"mounting {kind} needs root")
    at.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m{options}", "tmpfs", at]
    else:
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"no mkfs.{kind} here")
        image = at.parent / f"{at.name}.img"
        with image.open("wb") as file:
            file.truncate(size_mib << 20)
        made = subprocess.run([f"mkfs.{kind}", "-q", image], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        command = ["mount", "-o", f"loop{options}", image, at]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount {kind} here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
