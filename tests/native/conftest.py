"""Helpers of the engine's tests: mounts, subprocesses, a library of faults."""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def roots(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.mkdir()
    destination.mkdir()
    return source, destination


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
