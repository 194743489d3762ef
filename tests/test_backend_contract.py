"""One contract, every backend: a folder, an fsspec file system, a real S3 server, and the one that the documentation shows.

What a test puts there and looks at goes around the backend under test.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ckptstore.backends import Backend, open_backend, tries
from ckptstore.backends.below import Below
from ckptstore.backends.s3control import control
from ckptstore.errors import AccessError, AlreadyExistsError, CkptStoreError, NotFoundError, StorageError, UsageError
from tests import servers

MIB = 1 << 20


@dataclass
class Medium:
    """A backend, and ways to the same bytes that are not its own."""

    backend: Backend
    put: Callable[[str, bytes], None]
    get: Callable[[str], bytes]


def folder_medium(folder: Path) -> Medium:
    def put(key: str, data: bytes) -> None:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)

    return Medium(open_backend(folder), put, lambda key: (folder / key).read_bytes())


def memory_medium(url: str) -> Medium:
    import fsspec

    files = fsspec.filesystem("memory")
    root = url.removeprefix("memory:/")
    return Medium(
        open_backend(url),
        lambda key, data: files.pipe_file(f"{root}/{key}", data),
        lambda key: files.cat_file(f"{root}/{key}"),
    )


def documented_medium() -> Medium:
    """The backend that docs/writing-a-backend.md shows."""
    page = Path(__file__).parent.parent / "docs/writing-a-backend.md"
    names: dict[str, Any] = {}
    exec(compile(page.read_text().partition("```python\n")[2].partition("```")[0], str(page), "exec"), names)
    backend = names["DictBackend"]("test")
    return Medium(
        backend,
        lambda key, data: backend._blobs.update({key: (data, time.time_ns())}),
        lambda key: backend._blobs[key][0],
    )


def curl(server: servers.Server, url: str, *words: str, data: bytes | None = None) -> bytes:
    path = urllib.parse.quote(url.removeprefix("s3://"))
    command = [
        "curl", "-sf", "--noproxy", "*", "--user", f"{servers.KEY}:{servers.SECRET}", "--aws-sigv4", "aws:amz:us-east-1:s3",
        "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", *words, f"http://127.0.0.1:{server.port}/{path}",
    ]  # fmt: skip
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def s3_medium(server: servers.Server, url: str) -> Medium:
    return Medium(
        open_backend(url),
        lambda key, data: void(curl(server, f"{url}/{key}", "-X", "PUT", "--data-binary", "@-", data=data)),
        lambda key: curl(server, f"{url}/{key}"),
    )


def void(_: object) -> None:
    return None


def medium_below() -> Medium:
    """A folder of another backend, beside which others lie."""
    above = documented_medium()
    above.put("a/foldery/file", b"another's")
    return Medium(
        Below(above.backend, "a/folder"),
        lambda key, data: above.put(f"a/folder/{key}", data),
        lambda key: above.get(f"a/folder/{key}"),
    )


@pytest.fixture(params=["local", "memory", "documented", "below", "s3"])
def medium(request: Any, tmp_path: Path) -> Medium:
    if request.param == "below":
        return medium_below()
    if request.param == "local":
        (tmp_path / "root").mkdir()
        return folder_medium(tmp_path / "root")
    if request.param == "documented":
        return documented_medium()
    if request.param == "memory":
        return memory_medium(f"memory://{tmp_path.name}-{os.getpid()}/{request.node.name.partition('[')[0]}")
    return s3_medium(request.getfixturevalue("seaweed"), request.getfixturevalue("s3"))


def fill(backend: Backend, key: str, offset: int, memory: bytearray) -> int:
    with backend.reader(key) as read:
        return read(offset, memoryview(memory))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, None, b"0123456789"), (3, None, b"3456789"), (3, 4, b"3456"), (8, 5, b"89"), (10, 5, b""), (99, 5, b""), (0, 0, b"")],
)
def test_ranges(medium, offset, length, expected):
    """Shorter only where the file ends."""
    medium.put("deep/file", b"0123456789")
    assert medium.backend.get("deep/file", offset_bytes=offset, length_bytes=length) == expected
    memory = bytearray(b"-" * (12 if length is None else length))
    assert fill(medium.backend, "deep/file", offset, memory) == len(expected)
    assert memory == expected + b"-" * (len(memory) - len(expected))


def test_views_are_exact(medium):
    """A view is of bytes that are known to be there: fewer are an error, never a short answer."""
    medium.put("file", b"0123456789")
    assert bytes(medium.backend.view("file", 2, 5)) == b"23456"
    assert bytes(medium.backend.view("file", 0, 10)) == b"0123456789"
    with pytest.raises(StorageError):
        medium.backend.view("file", 8, 5)


@pytest.mark.parametrize("key", ["none", "none/inner", "deep/none"])
def test_missing(medium, key):
    medium.put("deep/file", b"1")
    for ask in (
        medium.backend.get,
        lambda key: medium.backend.view(key, 0, 1),
        lambda key: fill(medium.backend, key, 0, bytearray(1)),
    ):
        with pytest.raises(NotFoundError, match=key):
            ask(key)
    medium.backend.delete(key)


@pytest.mark.parametrize("key", ["../outside", "deep/../../outside", "..", ".", "", "deep//inner", "./file"])
def test_nothing_outside(medium, key):
    """Names come from files that others wrote."""
    for ask in (
        medium.backend.get,
        lambda key: fill(medium.backend, key, 0, bytearray(1)),
        lambda key: medium.backend.put(key, b"x"),
        lambda key: medium.backend.put_parts(key, [b"x"], part_bytes=MIB),
        medium.backend.delete,
    ):
        with pytest.raises(CkptStoreError):
            ask(key)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 999])
def test_put(medium, data):
    """What is put is what is there, also over what was there before."""
    for _ in range(2):
        medium.backend.put("some/where/file", memoryview(bytearray(data)))
        assert medium.get("some/where/file") == data
        assert medium.backend.get("some/where/file") == data


def test_put_if_absent(medium):
    medium.backend.put("new", b"first", if_absent=True)
    for data in (b"first", b"second"):
        with pytest.raises(AlreadyExistsError, match="new"):
            medium.backend.put("new", data, if_absent=True)
    assert medium.get("new") == b"first"


def test_one_creator_wins(medium, request):
    """Of many that create one key at once, one is told that it did; the content is its own."""
    if "memory" in request.node.name:
        pytest.skip("an exclusive create of fsspec's is no more than a look before")
    for number in range(5):
        winners: list[int] = []

        def create(me: int, key: str = f"race-{number}", winners: list[int] = winners) -> None:
            try:
                medium.backend.put(key, b"%d" % me, if_absent=True)
            except AlreadyExistsError:
                return
            winners.append(me)

        threads = [threading.Thread(target=create, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert medium.get(f"race-{number}") == b"%d" % winners[0]


def test_replace_what_was_seen(medium):
    """Over what the caller has seen, and nothing else."""
    medium.backend.put("key", b"one")
    medium.backend.replace("key", b"two", expected=b"one")
    assert medium.get("key") == b"two"
    with pytest.raises(AlreadyExistsError, match="key"):
        medium.backend.replace("key", b"three", expected=b"one")
    assert medium.get("key") == b"two"
    with pytest.raises(NotFoundError):
        medium.backend.replace("nothing", b"x", expected=b"")
    assert [blob.key for blob in medium.backend.list()] == ["key"]


def test_put_parts(medium):
    parts = [os.urandom(8 * MIB), os.urandom(8 * MIB), os.urandom(123)]
    medium.backend.put_parts("deep/big", (memoryview(part) for part in parts), part_bytes=8 * MIB, parallel=2)
    assert medium.get("deep/big") == b"".join(parts)
    medium.backend.put_parts("none", [], part_bytes=8 * MIB)
    assert medium.get("none") == b""


def test_parts_are_let_go(medium):
    """One buffer is enough for any number of parts: each is held until it has arrived, and not for the next one to come."""
    buffer, freed, late = bytearray(8 * MIB), threading.Event(), []

    def parts():
        for number in range(4):
            part = (ctypes.c_ubyte * len(buffer)).from_buffer(buffer)
            ctypes.memset(part, number, len(buffer))
            freed.clear()
            weakref.finalize(part, freed.set)
            yield memoryview(part).cast("B")
            del part
            if not freed.wait(10):
                late.append(number)

    medium.backend.put_parts("big", parts(), part_bytes=8 * MIB, parallel=2)
    assert late == []
    assert medium.get("big") == b"".join(bytes([number]) * (8 * MIB) for number in range(4))


@pytest.mark.parametrize("error", [RuntimeError("planted"), OSError("planted"), KeyboardInterrupt(), StorageError("planted")])
def test_parts_that_fail_leave_nothing(medium, error):
    """What was there is there still, and the error is the caller's own."""
    medium.put("old", b"old")

    def parts():
        yield os.urandom(8 * MIB)
        raise error

    for key in ("old", "new"):
        with pytest.raises(type(error)) as caught:
            medium.backend.put_parts(key, parts(), part_bytes=8 * MIB, parallel=2)
        assert caught.value is error
    assert medium.get("old") == b"old"
    assert [blob.key for blob in medium.backend.list()] == ["old"]


def test_delete(medium):
    medium.put("a/b", b"1")
    medium.put("a/bc", b"2")
    medium.backend.delete("a/b")
    with pytest.raises(NotFoundError):
        medium.backend.get("a/b")
    assert medium.get("a/bc") == b"2"


def test_list(medium):
    """Every key below a folder in one pass, names that only begin alike not among them."""
    sizes = {"a": 1, "b/c": 2, "b/d/e": 3, "b/d/f": 0, "bc/g": 5, "with space/ü+%=&": 6}
    for key, size in sizes.items():
        medium.put(key, bytes(size))
    found = {blob.key: blob for blob in medium.backend.list()}
    assert {key: blob.size_bytes for key, blob in found.items()} == sizes
    assert {blob.key for blob in medium.backend.list("b")} == {"b/c", "b/d/e", "b/d/f"}
    assert {blob.key for blob in medium.backend.list("b/d")} == {"b/d/e", "b/d/f"}
    assert list(medium.backend.list("none")) == []
    assert min(blob.mtime_ns for blob in found.values()) > 1_600_000_000 * 10**9
    for key, size in sizes.items():
        assert len(medium.backend.get(key)) == size


def test_many_keys(medium):
    """More than one answer of a LIST holds."""
    for number in range(30):
        medium.put(f"many/{number:02}/file", b"")
    assert len(list(medium.backend.list("many"))) == 30


def test_tree(medium):
    """Every folder down to the depth, with its entries; a missing prefix is an error."""
    medium.put("file", b"0123456789")
    medium.put("deep/inner", b"inner")
    medium.put("deep/deeper/still", b"1")
    found = medium.backend.tree()
    assert set(found) == {"", "deep", "deep/deeper"}
    assert {entry.name: entry.size_bytes for entry in found["deep"].entries if entry.mode & 0o170000 == 0o100000} == {
        "inner": 5
    }
    assert {entry.name for entry in found[""].entries} == {"file", "deep"}
    assert {entry.name for entry in found["deep"].entries} == {"inner", "deeper"}
    assert set(medium.backend.tree("deep")) == {"", "deeper"}
    shallow = medium.backend.tree(max_depth=0)
    assert set(shallow) == {""}
    assert {entry.name for entry in shallow[""].entries} == {"file", "deep"}
    assert {entry.name for entry in medium.backend.tree(max_depth=1)["deep"].entries} == {"inner", "deeper"}
    with pytest.raises(NotFoundError):
        medium.backend.tree("none")


# --- object stores alone ------------------------------------------------------------------------------------------


def test_wrong_credentials(seaweed, s3, monkeypatch):
    """Denied is denied, at once, and the secret is in no message."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret99")
    monkeypatch.setattr(tries.Tries, "again", never)
    backend = open_backend(s3)
    for ask in (lambda: backend.get("key"), lambda: list(backend.list()), lambda: backend.put("key", b"x")):
        with pytest.raises(AccessError, match="answers 403") as caught:
            ask()
        text = f"{caught.value!r} {caught.value} {caught.value.hint}"
        assert "wrongsecret99" not in text


def never(self, sleep=None):
    raise AssertionError("what the store has refused is asked for again")


def test_no_bucket(s3, monkeypatch):
    """Said at once."""
    monkeypatch.setattr(tries.Tries, "again", never)
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        list(open_backend("s3://no-such-bucket/x").list())


def test_profile(seaweed, s3, tmp_path, monkeypatch):
    """Keys from ~/.aws, as the cloud's own tools take them."""
    open_backend(s3).put("key", b"data")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        f"[default]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n"
        f"[lab]\naws_access_key_id = {servers.KEY}\naws_secret_access_key = {servers.SECRET}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert open_backend(s3).get("key") == b"data"
    monkeypatch.setenv("AWS_PROFILE", "default")
    with pytest.raises(AccessError):
        open_backend(s3).get("key")
    monkeypatch.setenv("AWS_PROFILE", "lob")  # as anybody else, the machine's role say, it must not go on
    with pytest.raises(UsageError, match=r"lob.*\$AWS_PROFILE"):
        open_backend(s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
    assert open_backend(s3).get("key") == b"data"


@pytest.mark.parametrize("variable", ["", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_in_a_profile(seaweed, s3, tmp_path, monkeypatch, variable):
    """One without TLS too; what the environment says comes first."""
    open_backend(s3).put("key", b"data")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id={servers.KEY}\naws_secret_access_key={servers.SECRET}\n")
    port = 1 if variable else seaweed.port
    (tmp_path / "config").write_text(f"[profile lab]\nregion=us-east-1\nendpoint_url=http://127.0.0.1:{port}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    if variable:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{seaweed.port}")
    assert open_backend(s3).get("key") == b"data"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hush-hush@bucket/x",
        "s3://hush-hush@bucket/x",
        "sftp://me:hush-hush@host/x",
        "az://container/x?sig=hush-hush",
        "s3:///x",
    ],
)
def test_secrets_in_urls_are_refused(url):
    """And not repeated."""
    with pytest.raises(UsageError) as caught:
        open_backend(url)
    assert "hush" not in f"{caught.value!r}{caught.value.hint}"


@pytest.mark.parametrize("url", ["s3://bucket/a//b", "s3://bucket/a/../b", "gs://bucket/./b", "az://container/.."])
def test_prefixes_that_name_nothing(url):
    with pytest.raises(UsageError, match="between two slashes"):
        open_backend(url)


def test_a_password_in_an_endpoint_is_not_repeated(s3, monkeypatch):
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush-hush@127.0.0.1:1")
    for ask in (lambda backend: backend.get("key"), lambda backend: control(backend).head("key")):
        with pytest.raises(StorageError) as caught:
            ask(open_backend(s3))
        assert "hush" not in f"{caught.value!r}{caught.value.hint}"


def test_unknown_scheme():
    with pytest.raises(UsageError, match="nonsense://"):
        open_backend("nonsense://x/y")
