"""watch --to URL: a finished save survives the machine, and training resumes from it on another one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ckptstore import adopt
from ckptstore.backends import open_backend
from ckptstore.backends.fsspec import FsspecBackend
from ckptstore.errors import AlreadyExistsError, StorageError
from ckptstore.listing import mirror_of, scan
from ckptstore.mirror import mirror
from ckptstore.model import MANIFEST_NAME, Status
from tests import commands, trees
from tests.crashing import content, without_manifest


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://mirror-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    commands.isolate(monkeypatch, tmp_path)
    return trees.make_run(tmp_path, steps=[46], slot="era_a", slot_step=150, recover_info=150, logs=False)


def test_another_machine_resumes_from_what_was_mirrored(run, url, tmp_path, capfd):
    trees.write_recover_info(run, 150, world_size=2)
    done = commands.invoke(capfd, "watch", "--run", run, "--to", url, "--once")
    assert done.code == 0, done.err
    assert f"step 150 is committed in {url}" in done.err
    (found,) = scan(open_backend(url)).adopted
    assert (found.step, found.kind, found.status) == (150, "adopted", Status.COMMITTED)
    assert "150" in commands.invoke(capfd, "list", "--run", url).out
    assert mirror(open_backend(run), url) == []
    slot, info = content(run / "default/recover_checkpoint"), content(run / "recover_info")
    shutil.rmtree(run.parent)
    run.mkdir(parents=True)
    words = ("--areal-version", "0.3.4", "--world-size", "2", "--json")
    done = commands.invoke(capfd, "setup", "--run", run, "--from", url, *words)
    assert done.code == 0, (done.out, done.err)
    assert without_manifest(content(run / "default/recover_checkpoint")) == without_manifest(slot)
    assert without_manifest(content(run / "recover_info")) == without_manifest(info)


def test_half_of_it_is_nothing(run, url):
    adopt.adopt(open_backend(run))
    assert {sent.part for sent in mirror(open_backend(run), url)} == {"default", "recover_info"}
    there = open_backend(mirror_of(url, 150))
    there.delete(f"default/{MANIFEST_NAME}")
    assert scan(open_backend(url)).adopted == ()
    for blob in list(there.list("default")):
        there.delete(blob.key)
    assert scan(open_backend(url)).adopted == ()
    assert {sent.part for sent in mirror(open_backend(run), url)} == {"default", "recover_info"}
    assert len(scan(open_backend(url)).adopted) == 1


def test_the_same_step_of_another_history_is_told_from_what_is_there(run, url):
    """After a rollback step 150 is trained anew: it neither counts as mirrored nor replaces the other one."""
    backend = open_backend(run)
    adopt.adopt(backend)
    mirror(backend, url)
    trees.bitflip(run / "default/recover_checkpoint/model.safetensors")
    os.utime(run / "default/recover_checkpoint/model.safetensors")
    trees.write_recover_info(run, 150)
    adopt.adopt(backend)
    adopt.prune(backend, keep=1)
    with pytest.raises(AlreadyExistsError, match="other bytes"):
        mirror(backend, url)


def test_nothing_is_removed_here_before_it_is_safe_there(run, tmp_path, monkeypatch, capfd):
    url = f"memory://mirror-down-{tmp_path.name}-{os.getpid()}"
    backend = open_backend(run)
    put = FsspecBackend.put
    monkeypatch.setattr(FsspecBackend, "put", lambda *words, **options: (_ for _ in ()).throw(StorageError("it is down")))
    for step in (150, 160):
        trees.write_recover_info(run, step)
        for path in (run / "default/recover_checkpoint").iterdir():
            os.utime(path)
        done = commands.invoke(capfd, "watch", "--run", run, "--to", url, "--keep", "1", "--once")
        assert "it is down" in done.err
    assert [checkpoint.step for checkpoint in scan(backend).adopted] == [150, 160]
    monkeypatch.setattr(FsspecBackend, "put", put)
    assert {sent.step for sent in mirror(backend, url)} == {150, 160}
    assert [checkpoint.step for checkpoint in scan(open_backend(url)).adopted] == [150, 160]
