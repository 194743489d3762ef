"""Bytes on the wire: a transfer that was killed and goes on sends what is missing, and at most one part a stream twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore.backends import open_backend, s3multipart
from ckptstore.backends.s3control import control
from ckptstore.model import Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import fetching, multipart, sending, unfinished
from tests import trees, warm
from tests.faults import Meter
from tests.test_push_pull import EXPORT, same, send
from tests.test_remote_looking import sealed_run

FILES, FILE_BYTES = 16, 15 << 20  # each of one part
OVERHEAD_BYTES = 2 << 20  #: of all requests' headers and the listings


LARGE_BYTES = 250 << 20  #: of one file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """To be read only."""
    return with_files(tmp_path_factory.mktemp("run"), FILES, FILE_BYTES)


def with_files(folder: Path, count: int, size_bytes: int) -> Path:
    """A sealed run with so many more files of that size in its one export."""
    run = sealed_run(folder, (46,))
    folder = run / EXPORT
    for number in range(count):
        (folder / f"optim_world_size_{count}_rank_{number}.pt").write_bytes(os.urandom(size_bytes))
    trees.set_age(folder, 3600)
    (folder / "ckptstore.manifest.json").unlink()
    CheckpointStore(run).seal(46)
    return run


@pytest.fixture
def meter(seaweed, s3):
    meter = Meter(seaweed.port)
    yield meter
    meter.close()


def transfer(meter: Meter, words: list[object], *, kill_when: Callable[[], bool] | None = None) -> int:
    """The command in a process of its own, through the meter, killed when told; its exit code."""
    environment = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{meter.port}"}
    process = warm.Python("-m", "ckptstore.recover", *words, env=environment)
    while kill_when is not None and not kill_when():
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended before: {process.wait(0.002)}")
    if kill_when is not None:
        process.send_signal(signal.SIGKILL)
    code = process.finish(120).returncode
    before = -1
    while before != (before := meter.up_bytes):  # what a dead process had handed to the kernel goes on its way
        time.sleep(0.3)
    return code


def test_a_push_that_goes_on(meter, s3, run):
    total = CheckpointStore(run).get(46).size_bytes
    words = ["push", "46", "--run", run, "--to", s3]
    assert transfer(meter, words, kill_when=lambda: meter.up_bytes > total * 0.75) == -signal.SIGKILL
    first = meter.up_bytes
    assert transfer(meter, words) == 0
    assert meter.up_bytes >= total
    assert meter.up_bytes - first <= (total - first) + sending.FILES_AT_ONCE * sending.PART_BYTES + OVERHEAD_BYTES
    done = meter.up_bytes
    assert transfer(meter, words) == 0
    assert meter.up_bytes - done <= OVERHEAD_BYTES


@pytest.mark.soak  # with parts half as large: tests/test_multipart.py
def test_a_push_of_one_large_file_that_goes_on_part_by_part(meter, s3, tmp_path):
    run = with_files(tmp_path, 1, LARGE_BYTES)
    total = CheckpointStore(run).get(46).size_bytes
    words = ["push", "46", "--run", run, "--to", s3]
    assert transfer(meter, words, kill_when=lambda: meter.up_bytes > total * 0.85) == -signal.SIGKILL
    first = meter.up_bytes
    assert [found.status for found in CheckpointStore(s3)] == [Status.PARTIAL]
    store = control(open_backend(s3))
    (upload,) = store.uploads()
    there = sum(part.size_bytes for part in s3multipart.multipart(store, digests=True).parts(upload))
    assert there > total * 0.85 - (multipart.STREAMS + 1) * sending.PART_BYTES
    assert transfer(meter, words) == 0
    assert meter.up_bytes - first <= total - there + OVERHEAD_BYTES  # no part that the store has goes again
    assert meter.up_bytes >= total
    assert meter.up_bytes - first <= (total - first) + multipart.STREAMS * sending.PART_BYTES + OVERHEAD_BYTES
    assert CheckpointStore(s3).verify(46).ok
    assert not unfinished.look(open_backend(s3)).uploads


def test_a_pull_that_goes_on(meter, s3, run, tmp_path):
    total = CheckpointStore(run).get(46).size_bytes
    send(run, s3)
    there = tmp_path / "there"
    words = ["pull", "46", "--from", s3, "--to", there]
    assert transfer(meter, words, kill_when=lambda: meter.down_bytes > total * 0.75) == -signal.SIGKILL
    first = meter.down_bytes
    assert not Path(there / EXPORT).exists()
    assert transfer(meter, words) == 0
    assert meter.down_bytes >= total
    assert meter.down_bytes - first <= (total - first) + fetching.BUDGET_BYTES + OVERHEAD_BYTES
    assert same(run / EXPORT, there / EXPORT)
    done = meter.down_bytes
    assert transfer(meter, words) == 0
    assert meter.down_bytes - done <= OVERHEAD_BYTES
