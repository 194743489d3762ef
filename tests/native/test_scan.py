"""scan_tree sees what os.lstat sees, follows nothing, and survives what it may not read. And the small calls beside it."""

import errno
import os
import stat
import threading

import pytest

from ckptstore import native
from ckptstore.errors import NotFoundError

from .files import make_tree


def by_python(root, max_depth=99):
    found = {}

    def visit(path, depth):
        entries = {}
        for entry in os.scandir(os.path.join(root, path)):
            s = entry.stat(follow_symlinks=False)
            entries[entry.name] = (entry.name, s.st_size, s.st_mtime_ns, s.st_ino, s.st_mode, s.st_uid)
            if stat.S_ISDIR(s.st_mode) and depth < max_depth:
                visit(os.path.join(path, entry.name) if path else entry.name, depth + 1)
        found[path] = entries

    visit("", 0)
    return found


def by_engine(root, **options):
    return {
        path: {entry.name: tuple(entry) for entry in folder.entries}
        for path, folder in native.scan_tree(root, **options).items()
    }


@pytest.fixture
def tree(tmp_path):
    make_tree(tmp_path, {f"a{i}/b{i % 3}/f{j}": b"x" * j for i in range(20) for j in range(9)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("a1")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a1" / "pipe")
    (tmp_path / os.fsdecode(b"bad-\xff-name")).write_bytes(b"1")
    (tmp_path / "a2" / "new\nline\x1b[2J").write_bytes(b"22")
    return tmp_path


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
def test_sees_what_lstat_sees(tree, threads):
    assert by_engine(tree, threads=threads) == by_python(tree)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth(tree, depth):
    assert by_engine(tree, max_depth=depth) == by_python(tree, depth)


def test_entries_are_what_they_say(tree):
    folder = native.scan_tree(tree)["a1/b1"]
    assert isinstance(folder, native.Folder)
    entry = next(e for e in folder.entries if e.name == "f5")
    assert isinstance(entry, native.Entry)
    assert (entry.size_bytes, entry.uid, stat.S_ISREG(entry.mode)) == (5, os.getuid(), True)
    assert folder.error == 0


def test_a_root_that_is_a_link_is_the_callers_choice(tree, tmp_path):
    (tmp_path / "root-link").symlink_to(tree)
    assert "a1" in native.scan_tree(tmp_path / "root-link")


def test_missing_root(tmp_path):
    with pytest.raises(NotFoundError):
        native.scan_tree(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError):
        native.scan_tree(tmp_path / "file")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_unreadable_folder(tree):
    import ctypes

    (tree / "a3").chmod(0)
    for parent in tree.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    tree.chmod(0o755)
    for i in range(20):
        if i != 3:
            (tree / f"a{i}").chmod(0o755)
    result = {}

    def as_nobody():
        ctypes.CDLL(None).setfsuid(65534)
        result.update(native.scan_tree(tree))

    thread = threading.Thread(target=as_nobody)
    thread.start()
    thread.join()
    assert result["a3"] == native.Folder(errno.EACCES, [])
    assert len(result["a4"].entries) == 1
    assert "a3/b0" not in result


def test_while_names_come_and_go(tree):
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            for i in range(50):
                (tree / "a5" / f"x{i}").mkdir()
            for i in range(50):
                (tree / "a5" / f"x{i}").rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(30):
            found = native.scan_tree(tree)
            assert len(found["a6/b0"].entries) == 9
            assert found["a5"].error == 0
    finally:
        stop.set()
        thread.join()


def test_many_names_in_one_folder(tmp_path):
    for i in range(3000):
        (tmp_path / f"{i:0100d}").touch()
    assert by_engine(tmp_path) == by_python(tmp_path)


# --- the small calls -----------------------------------------------------------------------------------------------


def test_rename_exchange(tmp_path):
    make_tree(tmp_path, {"a/1": b"one", "b/2": b"two"})
    native.rename_exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/2").read_bytes() == b"two"
    assert (tmp_path / "b/1").read_bytes() == b"one"
    with pytest.raises(FileNotFoundError) as caught:
        native.rename_exchange(tmp_path / "a", tmp_path / "c")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "a")


def test_rename_noreplace(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()  # empty: rename(2) would replace it
    with pytest.raises(FileExistsError) as caught:
        native.rename_noreplace(tmp_path / "a", tmp_path / "b")
    assert caught.value.errno == errno.EEXIST
    native.rename_noreplace(tmp_path / "a", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_fsync_path(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    native.fsync_path(tmp_path / "f")
    native.fsync_path(tmp_path)
    with pytest.raises(FileNotFoundError):
        native.fsync_path(tmp_path / "nowhere")


def test_supports_direct(tmp_path):
    assert native.supports_direct(tmp_path) in (True, False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        native.supports_direct(tmp_path / "nowhere")


def test_reads_the_wanted_file_on_the_way(tree):
    """Its content where it is a regular file of that name within the cap; everything else is left to who opens it by path."""
    for name, content in (("a1/note", b"one\0"), ("a2/note", b""), ("a3/note", b"x" * 101), ("a4/b1/note", b"y" * 100)):
        (tree / name).write_bytes(content)
    (tree / "a5" / "note").symlink_to(tree / "a1" / "note")
    (tree / "a6" / "note").mkdir()
    os.mkfifo(tree / "a7" / "note")
    (tree / "a8" / "note2").write_bytes(b"no")
    found = native.scan_tree(tree, wanted="note", wanted_bytes=100)
    assert {path: folder.content for path, folder in found.items() if folder.content is not None} == {
        "a1": b"one\0",
        "a2": b"",
        "a4/b1": b"y" * 100,
    }
    assert all(folder.content is None for folder in native.scan_tree(tree).values())
