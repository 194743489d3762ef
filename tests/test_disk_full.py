"""A disk that is too small for what is pulled onto it: a real one, found full before a byte is fetched, or in the middle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ckptstore import native
from ckptstore.errors import NoSpaceError
from ckptstore.model import Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import receiving
from tests import trees
from tests.commands import invoke
from tests.native.conftest import mounted
from tests.test_push_pull import EXPORT, add_big_file, bring, same, send
from tests.test_remote_looking import sealed_run


def free_bytes(at: Path) -> int:
    os.sync()
    return shutil.disk_usage(at).free


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("found", ["before", "in the middle"])
def test_a_pull_that_fills_the_disk(kind, found, tmp_path, capfd, monkeypatch):
    """Nothing is to be seen of it, `clean` gives the space back, and a larger disk would have done: the pull goes on there.

    In the middle: where a file system cannot give room beforehand.
    """
    fetched = []
    real = native.write_range
    monkeypatch.setattr(native, "write_range", lambda *args: (fetched.append(args[1]), real(*args)))
    if found == "in the middle":
        monkeypatch.setattr(native, "allocate", lambda fd, size_bytes, path: os.ftruncate(fd, size_bytes))
        monkeypatch.setattr(receiving, "_check_room", lambda target, part: None)
    run = sealed_run(tmp_path)
    trees.set_age(add_big_file(run, 40).parent, 3600)
    CheckpointStore(run).seal(46)
    url = f"memory://full-{tmp_path.name}-{os.getpid()}"
    send(run, url)
    with mounted(kind, tmp_path / "small", size_mib=64) as at:
        if kind == "ext4":
            assert native.supports_direct(at)
        there = at / "box/trial0"
        there.mkdir(parents=True)
        filler = at / "filler"
        filler.write_bytes(bytes(free_bytes(at) - (25 << 20) - 12345))
        free = free_bytes(at)
        with pytest.raises(
            NoSpaceError, match="optim_world_size_1_rank_0" if found == "in the middle" else "needs [0-9.]+ MB more"
        ) as caught:
            bring(url, there)
        assert str(at) in str(caught.value)
        assert bool(fetched) is (found == "in the middle")
        if not fetched:
            assert free_bytes(at) > free - (1 << 20), "it took room that others need"
        else:
            assert free_bytes(at) < 12 << 20  # it was full, or all that its ranges had brought is there
        assert os.listdir(there) == []
        assert not CheckpointStore(there).list()

        assert invoke(capfd, "clean", "--run", there).code == 0
        assert free_bytes(at) > free - (1 << 20)
        with pytest.raises(NoSpaceError):
            bring(url, there)
        filler.unlink()
        assert (bring(url, there)[0].kept_bytes > 0) is (found == "in the middle")  # with what the stage holds
        assert same(run / EXPORT, there / EXPORT)
        assert CheckpointStore(there).get(46).status is Status.COMMITTED
        assert not list((there.parent / ".ckptstore/trial0").glob("stage-*"))
