"""Servers that tests share, each started once, on free ports, and only when a test asks for it; and what Ctrl-C means."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers

# Shells start what runs in the background with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C mean the usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As in an activated environment: `python` is what runs the tests, not a shim that takes longer to start than most commands.
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory):
    """A real S3 server: SeaweedFS, stopped and removed at the end."""
    server = servers.start_seaweed(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.stop()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """As tmp_path, but in memory: for hundreds of commits in a test, which would wait for the disk most of the time."""
    folder = tempfile.mkdtemp(prefix="ckptstore-test-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of native/faults.c, to be loaded before libc."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fault library")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).parent / "native/faults.c"
    subprocess.run([compiler, "-O2", "-Wall", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


@pytest.fixture
def s3(seaweed, monkeypatch):
    """The server's address and credentials in the environment, and a fresh place on it: a URL."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    return seaweed.place()
