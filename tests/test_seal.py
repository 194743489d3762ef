"""Sealing vouches for bytes: only for whole ones, only for those that were read, and without touching the files."""

from __future__ import annotations

import os
import shutil

import awscrt.checksums
import pytest

from ckptstore import native
from ckptstore.backends import LocalBackend
from ckptstore.errors import IntegrityError, ManifestError, NoSpaceError, RefusedError, SourceChangedError, StorageError
from ckptstore.listing import scan
from ckptstore.manifest import parse
from ckptstore.model import MANIFEST_NAME, Status
from ckptstore.seal import seal
from ckptstore.store import CheckpointStore
from tests import trees

STEP = 46


@pytest.fixture
def run(tmp_path):
    return trees.make_run(tmp_path, steps=(STEP,), parts=("default", "critic"))


def seal_run(run, **options):
    backend = LocalBackend(run)
    (checkpoint,) = scan(backend).checkpoints
    return seal(backend, checkpoint, **options)


def manifests(run):
    return [trees.checkpoint(run, STEP, part) / MANIFEST_NAME for part in ("default", "critic")]


def status(run):
    return scan(LocalBackend(run)).checkpoints[0].status


def test_digests_are_those_of_the_files(run):
    """Against somebody else's CRC-64/NVME: sizes, times and digests of every file, and no other file."""
    seal_run(run)
    for path in manifests(run):
        manifest = parse(path.read_bytes())
        recorded = {file.path: file for file in manifest.files}
        assert set(recorded) == {file.name for file in path.parent.iterdir()} - {MANIFEST_NAME}
        for name, file in recorded.items():
            info = (path.parent / name).stat()
            data = (path.parent / name).read_bytes()
            assert (file.size_bytes, file.mtime_ns, file.inode) == (info.st_size, info.st_mtime_ns, info.st_ino)
            assert file.crc == awscrt.checksums.crc64nvme(data)
        assert (manifest.step, manifest.epoch, manifest.epoch_step) == (STEP, 0, STEP)
        assert (manifest.part, manifest.origin) == (path.parent.parent.name, "seal")
        assert manifest.chunk_bytes == native.CHUNK_BYTES
    assert status(run) is Status.COMMITTED


def test_the_files_are_not_touched(run):
    def look():
        return {
            path: (path.lstat().st_mtime_ns, path.lstat().st_ino, path.read_bytes())
            for path in run.rglob("*")
            if path.is_file() and path.name != MANIFEST_NAME
        }

    before = look()
    seal_run(run)
    assert look() == before


def test_no_draft_is_left(run):
    seal_run(run)
    assert not [path for path in run.rglob("*") if path.name.startswith(".ckptstore")]


def test_sealing_again_keeps_the_manifest(run):
    """It names the act of sealing: pinned digests stay valid."""
    first = seal_run(run)
    inodes = [path.stat().st_ino for path in manifests(run)]
    assert seal_run(run) == first
    assert [path.stat().st_ino for path in manifests(run)] == inodes


def test_a_voided_manifest_is_renewed(run):
    before = seal_run(run)
    trees.write_model(trees.checkpoint(run, STEP), seed=3)
    after = seal_run(run)
    assert before[0] != after[0]
    assert before[1] == after[1], "the critic's is still valid"
    assert status(run) is Status.COMMITTED


@pytest.mark.parametrize("damage", [trees.zero_length, lambda path: path.unlink()])
def test_what_is_not_whole_is_not_sealed(run, damage):
    """At a look: a manifest would vouch for the damage."""
    damage(trees.checkpoint(run, STEP, "critic") / "config.json")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        seal_run(run)
    assert not any(path.exists() for path in manifests(run))


def test_a_torn_file_is_not_sealed(run):
    """Only the structure shows it, and only in the second part: the first is not sealed either."""
    trees.truncate(trees.checkpoint(run, STEP, "critic") / "model.safetensors", 10)
    with pytest.raises(IntegrityError, match="truncated"):
        seal_run(run)
    assert not any(path.exists() for path in manifests(run))


def test_damage_is_not_sealed_over(run):
    """A checkpoint that lost a sealed file is not made right by sealing again."""
    seal_run(run)
    (trees.checkpoint(run, STEP) / "merges.txt").unlink()
    with pytest.raises(IntegrityError, match=r"merges\.txt"):
        seal_run(run)


@pytest.mark.parametrize("change", ["write", "remove", "replace"])
def test_changed_while_it_is_sealed(run, monkeypatch, change):
    """Between the digest and the manifest the trainer writes: nothing is sealed, in neither part."""
    path = trees.checkpoint(run, STEP) / "merges.txt"
    digest_files = native.digest_files

    def digest_then_change(root, files, **options):
        result = digest_files(root, files, **options)
        if root.endswith(f"critic/{trees.folder_name(STEP)}"):
            if change == "write":
                path.write_bytes(path.read_bytes() + b"x")
            elif change == "remove":
                path.unlink()
            else:
                new = path.with_name("new")
                shutil.copy2(path, new)
                new.rename(path)
        return result

    monkeypatch.setattr(native, "digest_files", digest_then_change)
    with pytest.raises(SourceChangedError, match=r"merges\.txt"):
        seal_run(run)
    assert not any(path.exists() for path in manifests(run))


@pytest.mark.parametrize("name", ["a\nb.txt", "back\\slash", "\udcff", "Config.json"])
def test_names_that_no_manifest_can_hold(run, name):
    """A manifest that could not be read back would be worse than none."""
    (trees.checkpoint(run, STEP) / name).write_bytes(b"x")
    with pytest.raises(ManifestError):
        seal_run(run)
    assert not any(path.exists() for path in manifests(run))


def test_owner_and_mode_are_those_of_the_files(run):
    """The user who trains must be able to read and remove it, whoever sealed."""
    for path in trees.checkpoint(run, STEP).iterdir():
        path.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
    seal_run(run)
    info = manifests(run)[0].stat()
    assert info.st_mode & 0o7777 == 0o640
    if os.geteuid() == 0:
        assert (info.st_uid, info.st_gid) == (12345, 12345)


@pytest.mark.parametrize(("code", "kind"), [(28, NoSpaceError), (5, StorageError)])
def test_a_failing_disk_leaves_no_half_manifest(run, monkeypatch, code, kind):
    """An fsync error is final: the old manifest, or none, stays; no draft."""

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind):
        seal_run(run)
    assert not [path for path in run.rglob("*") if "ckptstore" in path.name]
    assert status(run) is Status.COMPLETE


def test_interrupting_seals_nothing(run):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal_run(run, progress=stop)
    assert not any(path.exists() for path in manifests(run))


def test_a_time_before_1970_is_said_instead_of_a_manifest_that_does_not_count(tmp_path):
    """A clock that was never set."""
    run = trees.make_run(tmp_path, steps=(46,))
    os.utime(trees.checkpoint(run, 46) / "config.json", (-10, -10))
    with pytest.raises(RefusedError, match=r"config\.json was written before 1970"):
        CheckpointStore(run).seal(46)
    os.utime(trees.checkpoint(run, 46) / "config.json", (10, 10))
    CheckpointStore(run).seal(46)
    assert CheckpointStore(run).get(46).status is Status.COMMITTED
