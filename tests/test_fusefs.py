"""The file system of fusefs.py refuses and lies as told, seen through raw system calls."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time

import pytest

from tests.fusefs import fuse_mount

NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100
libc = ctypes.CDLL(None, use_errno=True)
pytestmark = pytest.mark.root


def renameat2(source, target, flags):
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def two_folders(parent):
    for name in "ab":
        (parent / name).mkdir()
        (parent / name / "content").write_text(name)
    return parent / "a", parent / "b"


def fsync_folder(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def test_honest(tmp_path):
    with fuse_mount(tmp_path) as mount:
        a, b = two_folders(mount.path)
        renameat2(a, b, EXCHANGE)
        assert ((a / "content").read_text(), (b / "content").read_text()) == ("b", "a")
        with pytest.raises(FileExistsError):
            renameat2(a, b, NOREPLACE)
        renameat2(a, mount.path / "c", NOREPLACE)
        assert sorted(os.listdir(mount.path)) == ["b", "c"]
        fsync_folder(mount.path)
        os.close(os.open(b / "content", os.O_RDONLY | os.O_DIRECT))
        with (b / "big").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
            file.write(os.urandom(300_000))
            os.fsync(file.fileno())
        os.utime(b / "big", ns=(1, 10**18 + 1))
        (b / "link").symlink_to("big")
        os.chmod(b / "big", 0o640)
        assert (b / "link").stat().st_mtime_ns == 10**18 + 1
        assert (b / "big").read_bytes() == (mount.backing / "b/big").read_bytes()
        assert (b / "big").stat().st_ino == (mount.backing / "b/big").stat().st_ino
    assert not (tmp_path / "mount").is_mount()


@pytest.mark.parametrize("flags", [EXCHANGE, NOREPLACE])
def test_refuse(tmp_path, flags):
    with fuse_mount(tmp_path, "refuse") as mount:
        a, b = two_folders(mount.path)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            renameat2(a, b if flags == EXCHANGE else mount.path / "c", flags)
        assert caught.value.errno == errno.EINVAL
        assert (a / "content").read_text() == "a"
        os.rename(a, mount.path / "c")
        assert sorted(os.listdir(mount.path)) == ["b", "c"]


def test_lie(tmp_path):
    with fuse_mount(tmp_path, "lie") as mount:
        a, b = two_folders(mount.path)
        renameat2(a, b, EXCHANGE)
        assert os.listdir(mount.path) == ["b"]
        assert (b / "content").read_text() == "a"
        assert not a.exists()
        assert [(path / "content").read_text() for path in mount.lost] == ["b"]


@pytest.mark.parametrize("mode", [(), ("noreplace-lie",)])
def test_noreplace_lie_shows_where_another_node_is_faster(tmp_path, mode):
    with fuse_mount(tmp_path, *mode, delay_ms=600) as mount:
        two_folders(mount.backing)
        source, target = mount.path / "a", mount.path / "new"

        def other_node():
            (mount.backing / "new").mkdir()
            (mount.backing / "new/content").write_text("another node's")

        during_the_rename = threading.Timer(0.2, other_node)
        during_the_rename.start()
        if mode:
            renameat2(source, target, NOREPLACE)
            assert (mount.backing / "new/content").read_text() == "a"
            assert [(path / "content").read_text() for path in mount.lost] == ["another node's"]
        else:
            with pytest.raises(FileExistsError):
                renameat2(source, target, NOREPLACE)
            assert (mount.backing / "new/content").read_text() == "another node's"
        during_the_rename.join()


def test_nodirect_nofallocate_nofsyncdir(tmp_path):
    with fuse_mount(tmp_path, "nodirect", "nofallocate", "nofsyncdir") as mount:
        file = mount.path / "file"
        file.write_bytes(b"x" * 4096)
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_CREAT):
            with pytest.raises(OSError, match="Invalid argument"):
                os.open(file, flags | os.O_DIRECT)
        with file.open("r+b") as opened:
            # Not posix_fallocate: glibc would write zeros instead.
            assert libc.fallocate(opened.fileno(), 0, ctypes.c_long(0), ctypes.c_long(1 << 20)) == -1
            assert ctypes.get_errno() == errno.EOPNOTSUPP
            os.fsync(opened.fileno())
        with pytest.raises(OSError, match="Invalid argument"):
            fsync_folder(mount.path)


@pytest.mark.parametrize("mode", [(), ("noflock",)])
def test_noflock(tmp_path, mode):
    with fuse_mount(tmp_path, *mode) as mount, (mount.path / "file").open("wb") as file:
        if mode:
            with pytest.raises(OSError, match="Function not implemented"):
                fcntl.flock(file, fcntl.LOCK_EX)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
            with (mount.path / "file").open("rb") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_delay(tmp_path):
    with fuse_mount(tmp_path, delay_ms=50) as mount:
        begin = time.monotonic()
        (mount.path / "file").write_bytes(b"x")
        os.rename(mount.path / "file", mount.path / "other")
        assert time.monotonic() - begin >= 0.1
