"""LocalBackend keeps the contract of Backend: exact ranges, typed errors, nothing outside of its folder, no links."""

from __future__ import annotations

import os

import pytest

from ckptstore.backends import LocalBackend, open_backend
from ckptstore.errors import AccessError, CkptStoreError, NotFoundError, StorageError, UsageError
from tests.users import as_nobody, open_way_to


@pytest.fixture
def backend(tmp_path):
    (tmp_path / "root/deep").mkdir(parents=True)
    (tmp_path / "root/file").write_bytes(b"0123456789")
    (tmp_path / "root/deep/inner").write_bytes(b"inner")
    (tmp_path / "outside").write_bytes(b"secret")
    return LocalBackend(tmp_path / "root")


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, None, b"0123456789"), (3, None, b"3456789"), (3, 4, b"3456"), (8, 5, b"89"), (10, 5, b""), (99, 5, b""), (0, 0, b"")],
)
def test_ranges(backend, offset, length, expected):
    """Shorter only where the file ends."""
    assert backend.get("file", offset_bytes=offset, length_bytes=length) == expected


def test_nested(backend):
    assert backend.get("deep/inner") == b"inner"


@pytest.mark.parametrize("key", ["none", "none/inner", "file/inner", "deep/none"])
def test_missing(backend, key):
    with pytest.raises(NotFoundError, match=key):
        backend.get(key)


@pytest.mark.parametrize(
    "key", ["../outside", "deep/../../outside", "/etc/passwd", "..", ".", "", "deep//inner", "./file", "a\0b"]
)
def test_nothing_outside(backend, key):
    """Names come from files that others wrote."""
    with pytest.raises(CkptStoreError):
        backend.get(key)


def test_links_are_not_followed(backend, tmp_path):
    """Neither as the file nor as a folder on the way to it."""
    (tmp_path / "root/link").symlink_to(tmp_path / "outside")
    (tmp_path / "root/folder-link").symlink_to(tmp_path / "root/deep")
    for key in ("link", "folder-link/inner"):
        with pytest.raises(CkptStoreError):
            backend.get(key)
    assert "folder-link" not in backend.tree()


def test_a_pipe_or_a_folder_is_no_file(backend, tmp_path):
    """Opening a pipe must not wait for a writer."""
    os.mkfifo(tmp_path / "root/pipe")
    for key in ("pipe", "deep"):
        with pytest.raises(StorageError, match="not a regular file"):
            backend.get(key)


def test_no_descriptor_is_lost(backend, tmp_path):
    (tmp_path / "root/link").symlink_to("file")
    before = sorted(os.listdir("/proc/self/fd"))
    for key in ("file", "deep/inner", "none/x", "deep/none", "link", "..", "deep"):
        try:
            backend.get(key)
        except CkptStoreError:
            continue
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_tree(backend):
    """Every folder down to the depth, with its entries; a missing prefix is an error."""
    found = backend.tree()
    assert set(found) == {"", "deep"}
    assert {entry.name: entry.size_bytes for entry in found["deep"].entries} == {"inner": 5}
    assert set(backend.tree("deep")) == {""}
    assert set(backend.tree(max_depth=0)) == {""}
    with pytest.raises(NotFoundError):
        backend.tree("none")


@pytest.mark.root
def test_denied(backend, tmp_path):
    open_way_to(tmp_path / "root")
    (tmp_path / "root").chmod(0o755)
    (tmp_path / "root/file").chmod(0o600)
    (tmp_path / "root/deep").chmod(0o700)
    for key in ("file", "deep/inner"):
        assert isinstance(as_nobody(lambda key=key: backend.get(key)), AccessError)
    assert as_nobody(backend.tree)["deep"].error


def test_open_backend(tmp_path):
    assert open_backend(tmp_path).location == str(tmp_path)
    assert open_backend(f"file://{tmp_path}").location == str(tmp_path)


@pytest.mark.parametrize(("place", "error"), [("", UsageError), (None, TypeError)])
def test_a_place_that_was_never_set(place, error):
    """Of an empty variable: neither this folder, nor one of the name None, is meant."""
    with pytest.raises(error):
        open_backend(place)
