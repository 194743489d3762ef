"""The Python door: the same answers as the command line, and `restore`, which is all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from ckptstore import CheckpointStore, native
from ckptstore import side as side_folders
from ckptstore.backends import open_backend
from ckptstore.choose import Selection
from ckptstore.errors import (
    AccessError,
    AlreadyExistsError,
    CommitUncertain,
    DigestMismatchError,
    IntegrityError,
    NotFoundError,
    NothingToResumeError,
    UsageError,
)
from ckptstore.model import MANIFEST_NAME, Status
from ckptstore.parts import read_manifest
from ckptstore.plan import Options
from ckptstore.transfer.push import push
from tests import trees
from tests.fusefs import fuse_mount
from tests.users import as_nobody, open_way_to

EXPORTS = (46, 93, 140)


@pytest.fixture
def run(tmp_path):
    return trees.make_run(tmp_path, steps=EXPORTS, parts=("default", "critic"), logs=False)


@pytest.fixture
def store(run):
    return CheckpointStore(run)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_list_latest_get(store, run):
    assert [checkpoint.step for checkpoint in store.list()] == list(EXPORTS)
    assert [checkpoint.step for checkpoint in store] == list(EXPORTS)
    assert store.latest().step == 140
    assert store.get(93).step == 93
    trees.zero_length(trees.checkpoint(run, 140) / "model.safetensors")
    assert store.latest().step == 93, "every call looks at the disk anew"
    with pytest.raises(NotFoundError, match="no checkpoint of step 7") as caught:
        store.get(7)
    assert "[46, 93, 140]" in caught.value.hint


def test_locations(run):
    assert CheckpointStore(f"file://{run}").latest().step == 140
    assert str(run) in repr(CheckpointStore(run))
    with pytest.raises(UsageError, match="nonsense://"):
        CheckpointStore("nonsense://bucket/run")
    with pytest.raises(NotFoundError):
        CheckpointStore(run / "none").list()


def test_a_store_at_a_url(run, tmp_path):
    """Looking works as in a folder; what writes says that it needs one."""
    url = f"memory://store-{tmp_path.name}"
    push(CheckpointStore(run).backend, CheckpointStore(run).get(46), open_backend(url))
    store = CheckpointStore(url)
    assert [checkpoint.step for checkpoint in store.list()] == [46]
    assert store.verify(46).ok
    assert store.resume_point().checkpoint.step == 46
    for call in (lambda: store.seal(46), store.setup, lambda: store.restore(46, tmp_path / "x")):
        with pytest.raises(UsageError, match="folder"):
            call()
    here = CheckpointStore(run)
    assert here.setup(Selection(url=url), Options(as_is=True)).plan.point.checkpoint.step == 140, "newer, and on this machine"
    assert here.setup(Selection(url=url, step=46), Options(as_is=True)).plan.point.checkpoint.step == 46


def test_latest_of_nothing(tmp_path):
    run = trees.make_run(tmp_path, steps=())
    assert CheckpointStore(run).latest() is None
    with pytest.raises(NothingToResumeError):
        CheckpointStore(run).resume_point()


def test_seal_verify_resume_point_setup(store, run):
    store.seal(140)
    assert store.verify(140).checkpoint.status is Status.COMMITTED
    trees.bitflip(trees.checkpoint(run, 140) / "model.safetensors")
    assert store.verify(140, "structure").ok
    assert store.resume_point().checkpoint.step == 140
    assert store.resume_point(max_step=139).checkpoint.step == 93
    assert store.resume_point(before_step=93).checkpoint.step == 46
    outcome = store.setup(options=Options(as_is=True))
    assert outcome.plan.point.checkpoint.step == 93, "the flipped bit is found while copying"
    assert not store.verify(140).ok
    assert store.resume_point().checkpoint.step == 93, "damage that was found is remembered"
    with pytest.raises(ValueError, match="deep"):
        store.verify(46, "deep")


def test_restore(store, run, tmp_path):
    """A copy, one folder a part, equal to the source byte by byte, with its times; our manifest is not of it."""
    target = tmp_path / "new/deep/restored"
    results = store.restore(93, target)
    for part in ("default", "critic"):
        assert content(target / part) == content(trees.checkpoint(run, 93, part))
        for path in (target / part).iterdir():
            assert path.stat().st_mtime_ns == (trees.checkpoint(run, 93, part) / path.name).stat().st_mtime_ns
    assert results.keys() == {"default", "critic"}
    assert os.listdir(target.parent) == ["restored"]


@pytest.mark.parametrize("work", ["verify", "restore"])
def test_progress_goes_on_from_part_to_part(store, tmp_path, work):
    store.seal(93)
    told: list[tuple[int, int]] = []
    call = store.verify if work == "verify" else lambda step, progress: store.restore(step, tmp_path / "new", progress=progress)
    call(93, progress=lambda done, total: told.append((done, total)))
    size = store.get(93).size_bytes
    assert len(store.get(93).parts) == 2
    assert told == sorted(told)
    assert told[-1] == (size, size)


def test_resume_point_tells_that_it_reads_the_slot(tmp_path):
    run = trees.make_run(tmp_path, steps=[46], slot="era_a", slot_step=150, recover_info=150, logs=False)
    told = []
    point = CheckpointStore(run).resume_point(notify=lambda doing, done, total: told.append((doing, done)))
    assert ("verifying step 150 in the slot", point.checkpoint.size_bytes) in told


def test_restore_overwrites_nothing(store, tmp_path):
    for make in (lambda path: path.mkdir(), lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere")):
        target = tmp_path / "there"
        make(target)
        with pytest.raises(AlreadyExistsError):
            store.restore(93, target)
        target.rmdir() if target.is_dir() else target.unlink()


def test_restore_of_damage_leaves_nothing(store, run, tmp_path):
    """Found in the middle of the second part: nothing appears under the name."""
    store.seal(93)
    trees.bitflip(trees.checkpoint(run, 93, "critic") / "merges.txt")
    with pytest.raises(DigestMismatchError):
        store.restore(93, tmp_path / "restored")
    trees.zero_length(trees.checkpoint(run, 46) / "config.json")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        store.restore(46, tmp_path / "restored")
    assert not [path for path in tmp_path.iterdir() if "restored" in path.name]


def chunks_of(data, size=4096):
    return tuple(native.crc64(data[at : at + size]) for at in range(0, len(data), size))


def test_restore_checks_digests_in_the_manifests_own_chunks(store, run, tmp_path):
    """A manifest of another version may have used other chunks."""
    for part in ("default", "critic"):
        (trees.checkpoint(run, 93, part) / "big.txt").write_bytes(os.urandom(10_000))
    store.seal(93)
    for part in ("default", "critic"):
        path = trees.checkpoint(run, 93, part) / MANIFEST_NAME
        manifest = read_manifest(store.backend, str(path.parent.relative_to(run)))
        files = tuple(file._replace(chunks=chunks_of((path.parent / file.path).read_bytes())) for file in manifest.files)
        path.write_bytes(dataclasses.replace(manifest, chunk_bytes=4096, files=files).to_bytes())
    assert store.get(93).status is Status.COMMITTED
    store.restore(93, tmp_path / "one")
    trees.bitflip(trees.checkpoint(run, 93) / "merges.txt")
    with pytest.raises(DigestMismatchError):
        store.restore(93, tmp_path / "two")


def test_restore_that_loses_a_race_overwrites_nothing(store, tmp_path, monkeypatch):
    """Somebody makes the destination between our look and our rename."""
    target = tmp_path / "restored"
    rename_in = side_folders.rename_in

    def late(staged, to):
        target.mkdir()
        (target / "foreign").write_text("x")
        rename_in(staged, to)

    monkeypatch.setattr(side_folders, "rename_in", late)
    with pytest.raises(AlreadyExistsError):
        store.restore(93, target)
    assert os.listdir(target) == ["foreign"]
    assert sorted(path.name for path in tmp_path.iterdir() if "restored" in path.name) == ["restored"]


def test_restore_whose_last_sync_fails_is_uncertain(store, tmp_path, monkeypatch):
    """Visible and whole, not confirmed: that is neither success nor failure."""
    sync_folder = side_folders.sync_folder

    def fail(path):
        if path == str(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync_folder(path)

    monkeypatch.setattr(side_folders, "sync_folder", fail)
    with pytest.raises(CommitUncertain):
        store.restore(93, tmp_path / "restored")
    assert (tmp_path / "restored/default/config.json").exists()


@pytest.mark.root
def test_restore_where_renames_take_no_flags(store, tmp_path):
    """Network volumes refuse RENAME_NOREPLACE."""
    with fuse_mount(tmp_path, "refuse") as mount:
        store.restore(93, mount.path / "restored")
        assert (mount.path / "restored/default/config.json").exists()
        with pytest.raises(AlreadyExistsError):
            store.restore(93, mount.path / "restored")


@pytest.mark.root
def test_restore_says_what_it_may_not_read(store, run, tmp_path):
    """Permission denied stays an AccessError, whatever layers it goes through."""
    open_way_to(run)
    (trees.checkpoint(run, 93) / "merges.txt").chmod(0o600)
    target = tmp_path / "nobodys"
    target.mkdir()
    target.chmod(0o777)
    error = as_nobody(lambda: store.restore(93, target / "restored"))
    assert isinstance(error, AccessError)
    assert "merges.txt" in str(error)
    assert not list(target.iterdir())
