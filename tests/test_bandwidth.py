"""--max-bandwidth: bytes over time, of all streams together."""

from __future__ import annotations

import os
import threading
import time

import click
import pytest

from ckptstore.backends import Bandwidth, open_backend
from ckptstore.cli import moving
from ckptstore.store import CheckpointStore
from ckptstore.transfer.fetching import RANGE_BYTES
from tests import commands, trees
from tests.test_push_pull import EXPORT, add_big_file, same
from tests.test_remote_looking import sealed_run

MB = 1_000_000


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://rate-{tmp_path.name}-{os.getpid()}"


def test_all_streams_together():
    """Eight threads get no more than one, and no less than what was said."""
    bound = Bandwidth(4 * MB)
    began = time.monotonic()

    def work() -> None:
        for _ in range(10):
            bound.take(50_000)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.9 < time.monotonic() - began < 1.6, "4 MB at 4 MB/s"


def test_a_pause_saves_nothing_up():
    waited: list[float] = []
    bound = Bandwidth(MB, sleep=waited.append)
    time.sleep(0.2)
    for _ in range(3):
        bound.take(MB)
    assert len(waited) == 2, "the first at once, the others not"
    assert waited[0] == pytest.approx(1, abs=0.1)
    assert waited[1] == pytest.approx(2, abs=0.1), "it came while the second was under way"


def test_push_and_pull_keep_to_it(s3, tmp_path, capfd):
    """Slower than without, by what was said, and not by much more."""
    run = sealed_run(tmp_path)
    trees.set_age(add_big_file(run).parent, 3600)
    CheckpointStore(run).seal(46)
    size = CheckpointStore(run).get(46).size_bytes
    there = tmp_path / "there/trial0"
    for words in (("push", "46", "--run", run, "--to", s3), ("pull", "46", "--from", s3, "--to", there)):
        done = commands.invoke(capfd, *words, "--max-bandwidth", "40MB/s", "--json")
        assert done.code == 0, done.err
        least = (size - RANGE_BYTES) / (40 * MB)
        assert least * 0.95 < done.json["seconds"] < 4 * least + 2
    assert same(run / EXPORT, there / EXPORT)


def test_every_way_through_a_backend_pays(url):
    """Whatever moves bytes asks first: none can be forgotten."""
    paid: list[int] = []
    bound = Bandwidth(1e12)
    bound.take = paid.append  # type: ignore[method-assign]
    backend = open_backend(url, bandwidth=bound)
    backend.put("a", b"x" * 1000)
    backend.put("b", b"x" * 2000, if_absent=True)
    backend.put_parts("c", iter([b"x" * (6 << 20), b"y" * 4000]), part_bytes=6 << 20)
    assert sum(paid) == 3000 + (6 << 20) + 4000
    paid.clear()
    assert len(backend.get("a", length_bytes=500)) == 500
    assert len(backend.view("c", 1000, 7000)) == 7000
    assert sum(paid) == 7500


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("200MB/s", 200e6), ("1.5 GB/s", 1.5e9), ("2MiB/s", 2 << 20), ("64k", 64e3), ("1000000", 1e6), ("1TiB/s", 1 << 40)],
)
def test_rates(text, bytes_per_s):
    assert moving._rate(None, None, text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "0", "fast", "-1MB/s", "1Mbit/s", "5i", "1e9", "MB/s"])
def test_what_is_no_rate(text):
    with pytest.raises(click.BadParameter):
        moving._rate(None, None, text)


def test_usage(capfd, tmp_path):
    done = commands.invoke(capfd, "pull", "46", "--from", "memory://x", "--to", tmp_path, "--max-bandwidth", "fast")
    assert done.code == 2
    assert "200MB/s" in done.err
