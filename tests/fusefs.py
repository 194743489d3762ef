"""Mounts `fuse/passthrough.c`: a file system that refuses or lies as rented volumes do. Needs root and
libfuse3's headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parent / "fuse/passthrough.c"
READY_S = 10


class Mount(NamedTuple):
    """`path` is the file system; `backing` the folder that it shows, as another node of a cluster would see
    it.
    """

    path: Path
    backing: Path

    @property
    def lost(self) -> list[Path]:
        """What the file system made disappear."""
        folder = self.backing.with_name(self.backing.name + ".lost")
        return sorted(folder.iterdir()) if folder.exists() else []


def why_not() -> str:
    """Why no such file system can be mounted here; empty if one can."""
    if os.geteuid() != 0:
        return "mounting FUSE in tests needs root"
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    missing = [tool for tool in ("gcc", "pkg-config", "fusermount3") if shutil.which(tool) is None]
    if missing:
        return f"missing {', '.join(missing)} (apt-get install gcc pkg-config fuse3)"
    if subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode != 0:
        return "no libfuse3 headers (apt-get install libfuse3-dev)"
    return ""


def build() -> Path:
    """The compiled program; compiled once for each version of the source."""
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckptstore-tests"
    program = cache / f"passthrough-{version}"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fuse = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / "passthrough"
            subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-o", made, SOURCE, *fuse.stdout.split()], check=True)
            made.rename(program)  # in one step: several test processes may build at once
    return program


@contextlib.contextmanager
def fuse_mount(folder: Path, *modes: str, delay_ms: int = 0) -> Iterator[Mount]:
    """A mount below `folder`, which must exist; skips the test where that is impossible.

    Modes: refuse, lie, noreplace-lie, nodirect, nofallocate, nofsyncdir, noflock; none of them is an honest file
    system.
    """
    if reason := why_not():
        pytest.skip(reason)
    backing, path = folder / "backing", folder / "mount"
    backing.mkdir()
    path.mkdir()
    options = [f"--{mode}" for mode in modes] + [f"--delay-ms={delay_ms}"] * bool(delay_ms)
    command = [build(), f"--root={backing}", path, "-f", "-o", "allow_other,default_permissions,subtype=passthrough", *options]
    log = folder / "fuse.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_mounted(path, daemon, log)
        yield Mount(path, backing)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", path], capture_output=True, check=False)
        try:
            daemon.wait(READY_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _wait_until_mounted(path: Path, daemon: subprocess.Popen[bytes], log: Path) -> None:
    # The mount table announces a change as an exceptional condition; nothing has to be polled in a loop of
    # sleeps.
    end = time.monotonic() + READY_S
    with open("/proc/self/mountinfo", "rb") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI | select.POLLERR)
        while not path.is_mount():
            if daemon.poll() is not None:
                pytest.skip(f"FUSE cannot mount here: {log.read_text().strip()[-200:]}")
            if time.monotonic() > end:
                raise TimeoutError(f"{path} was not mounted within {READY_S} s")
            poll.poll(100)
