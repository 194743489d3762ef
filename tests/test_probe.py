"""What a file system really does is found out on scratch folders there; names and promises of mounts count for nothing."""

from __future__ import annotations

import errno
import os

import pytest

from ckptstore import native, probe
from ckptstore.errors import AccessError, NoSpaceError, NotFoundError, StorageError
from ckptstore.probe import file_system, is_network
from tests.fusefs import fuse_mount
from tests.native.conftest import mounted
from tests.users import as_nobody, open_way_to


def test_the_disk_here(tmp_path):
    """Any local Linux file system does all of it; nothing is left behind."""
    medium = probe.probe(str(tmp_path))
    assert (medium.exchange, medium.noreplace, medium.folder_fsync) == (True, True, True)
    assert medium.method == "exchange"
    assert medium.durability.startswith("durable")
    assert not list(tmp_path.iterdir())


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs", "btrfs"])
def test_local_file_systems(tmp_path, kind):
    """Each is recognised by its mount, and does what the kernel says it does."""
    with mounted(kind, tmp_path / "at", size_mib=320 if kind == "xfs" else 128) as at:
        medium = probe.probe(str(at))
        assert medium.file_system == kind
        assert (medium.exchange, medium.noreplace, medium.folder_fsync, medium.fallocate) == (True, True, True, True)
        assert medium.direct == native.supports_direct(at)
        assert (medium.network, medium.overlay) == (False, False)
        assert set(os.listdir(at)) <= {"lost+found"}


@pytest.mark.root
@pytest.mark.parametrize(
    ("modes", "wrong"),
    [
        ((), {}),
        (("refuse",), {"exchange": False, "noreplace": False}),
        (("lie",), {"exchange": False}),
        (("nofsyncdir",), {"folder_fsync": False}),
        (("nodirect",), {"direct": False}),
        (("nofallocate",), {"fallocate": False}),
        (("refuse", "nofsyncdir", "nodirect", "nofallocate"),
         {"exchange": False, "noreplace": False, "folder_fsync": False, "direct": False, "fallocate": False}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_volumes_that_refuse_or_lie(tmp_path, modes, wrong):
    """One fact at a time; a file system that reports an exchange and loses one side is not believed."""
    with fuse_mount(tmp_path, *modes) as mount:
        medium = probe.probe(str(mount.path))
        facts = {name: getattr(medium, name) for name in ("exchange", "noreplace", "direct", "folder_fsync", "fallocate")}
        assert facts == dict.fromkeys(facts, True) | wrong
        assert medium.network, "free space of a FUSE mount is somebody else's word"
        assert medium.method == ("exchange" if medium.exchange else "rename")
        assert medium.durability.startswith("durable") == medium.folder_fsync
        assert not list(mount.backing.iterdir())


def lying(monkeypatch, name, does):
    monkeypatch.setattr(native, name, does)


def test_an_exchange_that_does_nothing_is_seen(tmp_path, monkeypatch):
    lying(monkeypatch, "rename_exchange", lambda a, b: None)
    assert not probe.probe(str(tmp_path)).exchange


def test_an_exchange_that_is_a_rename_is_seen(tmp_path, monkeypatch):
    """One side has the other's content, and the other side is lost."""

    def half(a, b):
        os.rename(os.path.join(a, "mark"), os.path.join(b, "mark"))
        os.rmdir(a)

    lying(monkeypatch, "rename_exchange", half)
    assert not probe.probe(str(tmp_path)).exchange


def test_a_noreplace_that_replaces_is_seen(tmp_path, monkeypatch):
    """A plain rename silently takes the place of an empty folder."""
    lying(monkeypatch, "rename_noreplace", os.rename)
    medium = probe.probe(str(tmp_path))
    assert not medium.noreplace
    assert medium.exchange


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM])
def test_refused_flags(tmp_path, monkeypatch, code):
    def refuse(a, b):
        raise OSError(code, os.strerror(code))

    lying(monkeypatch, "rename_exchange", refuse)
    lying(monkeypatch, "rename_noreplace", refuse)
    medium = probe.probe(str(tmp_path))
    assert (medium.exchange, medium.noreplace, medium.method) == (False, False, "rename")


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, StorageError)])
def test_a_failing_medium_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, code, kind):
    """That fsync fails is no property of the file system."""

    def fail(path):
        raise OSError(code, os.strerror(code))

    lying(monkeypatch, "fsync_path", fail)
    with pytest.raises(kind):
        probe.probe(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_no_folder(tmp_path):
    with pytest.raises(NotFoundError):
        probe.probe(str(tmp_path / "none"))


@pytest.mark.root
def test_a_folder_that_one_may_not_write(tmp_path):
    open_way_to(tmp_path / "x")
    assert isinstance(as_nobody(lambda: probe.probe(str(tmp_path))), AccessError)


@pytest.mark.root
def test_the_innermost_mount_counts(tmp_path):
    """Its name may hold spaces, which the mount table escapes."""
    outer = tmp_path / "outer with space"
    with mounted("tmpfs", outer, size_mib=4):
        (outer / "inside").mkdir()
        assert file_system(str(outer)) == "tmpfs"
        assert file_system(str(outer / "inside/not there yet")) == "tmpfs"
        assert file_system(str(tmp_path)) != "tmpfs" or file_system(str(tmp_path)) == file_system("/tmp")
        (tmp_path / "link").symlink_to(outer)
        assert file_system(str(tmp_path / "link")) == "tmpfs"


def test_network_kinds():
    assert is_network("nfs4")
    assert is_network("fuse.mfs")
    assert not is_network("ext4")
    assert not is_network("unknown")
