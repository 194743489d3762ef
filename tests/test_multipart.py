"""Large files to S3 part by part: what is there of an upload that was cut short is checked, kept, and never sent again."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import pytest

from ckptstore import listing, native, parallel
from ckptstore.backends import connections, open_backend, s3control, s3multipart, stalls, tries
from ckptstore.backends import object as object_backend
from ckptstore.backends.connections import Connections
from ckptstore.backends.s3control import Upload, control
from ckptstore.backends.s3multipart import S3Multipart, multipart
from ckptstore.errors import AccessError, DigestMismatchError, StorageError, TransitError
from ckptstore.model import Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import conditions, leftovers, sending
from ckptstore.transfer import multipart as multiparts
from ckptstore.transfer import push as pushing
from ckptstore.verify import verify
from tests import commands, faults, servers, trees
from tests.test_backend_contract import curl
from tests.test_faults import start
from tests.test_push_pull import EXPORT, add_big_file, keys, send
from tests.test_remote_looking import sealed_run
from tests.test_server_digests import checked, damaging, flipped

KEY = f"{EXPORT}/optim_world_size_1_rank_0.pt"
PART_BYTES = 8 << 20  # half of the usual: the tests shall be quick


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Three whole ones and a short one for the file."""
    monkeypatch.setattr(sending, "PART_BYTES", PART_BYTES)


def make(folder, megabytes=24):
    run = sealed_run(folder, (46,))
    trees.set_age(add_big_file(run, megabytes).parent, 3600)
    CheckpointStore(run).seal(46)
    return run


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sealed"))


@pytest.fixture
def run(sealed, tmp_path):
    """To be read only: its files are the same for all tests."""
    return shutil.copytree(sealed, tmp_path / "checkpoints/alice/gsm8k-grpo/trial0", copy_function=os.link)


@pytest.fixture
def proxy(seaweed, s3, monkeypatch):
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=5))
    yield proxy
    proxy.close()


class Through(NamedTuple):
    """What start() asks of a server."""

    port: int

    def environment(self) -> dict[str, str]:
        return servers.environment(self.port)


def store_of(url: str) -> S3Multipart:
    return multipart(control(open_backend(url)), digests=True)


def pieces(run) -> list[bytes]:
    data = (run / KEY).read_bytes()
    return [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]


def leave(url: str, parts: dict[int, bytes]) -> Upload:
    """An upload with these parts that nobody has ended."""
    store = store_of(url)
    upload = store.begin(KEY)
    for number, data in parts.items():
        store.put(upload, number, connections.whole(data), crc64=native.crc64(data), stop=parallel.Stop())
    return upload


def sent_parts(proxy: faults.Proxy) -> list[int]:
    return sorted(
        int(found[1]) for one in proxy.seen if one.method == "PUT" and (found := re.search(r"partNumber=(\d+)", one.path))
    )


def test_a_fresh_file(proxy, s3, run):
    """Each part once, with the digest that the store checks; nothing is left behind."""
    size = CheckpointStore(run).get(46).size_bytes
    (sent,) = send(run, s3)
    assert (sent.sent_bytes, sent.there_bytes, sent.server_checked_bytes, sent.notes) == (size, 0, size, ())
    assert sent_parts(proxy) == [1, 2, 3, 4]
    assert all(b"x-amz-checksum-crc64nvme: " in one.head for one in proxy.seen if "partNumber" in one.path)
    assert open_backend(s3).get(KEY) == (run / KEY).read_bytes()
    assert list(control(open_backend(s3)).uploads()) == []


@pytest.mark.parametrize("there", [(1,), (2, 3), (1, 2, 3, 4)])
def test_it_goes_on(proxy, s3, run, there):
    parts = pieces(run)
    leave(s3, {number: parts[number - 1] for number in there})
    proxy.seen.clear()
    (sent,) = send(run, s3)
    assert sent_parts(proxy) == [number for number in (1, 2, 3, 4) if number not in there]
    assert sent.there_bytes == sum(len(parts[number - 1]) for number in there)
    assert sent.sent_bytes + sent.there_bytes == CheckpointStore(run).get(46).size_bytes
    assert checked(s3).ok
    assert list(control(open_backend(s3)).uploads()) == []


def test_it_goes_on_whatever_the_key_is_called(proxy, s3, run):
    """What is signed, listed and compared is the same name."""
    url, parts = f"{s3}/ü n+a&b=%41", pieces(run)
    leave(url, {1: parts[0], 3: parts[2]})
    proxy.seen.clear()
    send(run, url)
    assert sent_parts(proxy) == [2, 4]
    assert checked(url).ok
    assert list(control(open_backend(url)).uploads()) == []


@pytest.mark.parametrize("wrong", ["flipped", "shorter"])
def test_a_part_that_is_not_right_is_sent_again(proxy, s3, run, wrong):
    """And the others are not."""
    parts = pieces(run)
    leave(s3, {1: parts[0], 2: flipped(parts[1]) if wrong == "flipped" else parts[1][:-1], 3: parts[2]})
    proxy.seen.clear()
    send(run, s3)
    assert sent_parts(proxy) == [2, 4]
    assert checked(s3).ok


@pytest.mark.parametrize("whose", ["content", "parts", "more"])
def test_an_upload_of_others_is_left_alone(proxy, s3, run, whose):
    """Of another content under the same key; of the same in parts of another size; of a file that goes on behind ours."""
    parts = pieces(run)
    theirs = {
        "content": {1: os.urandom(PART_BYTES), 2: os.urandom(PART_BYTES)},
        "parts": {1: parts[0][: 5 << 20], 2: parts[0][5 << 20 :] + parts[1]},
        "more": {1: parts[0], 5: b"more"},
    }[whose]
    upload = leave(s3, theirs)
    proxy.seen.clear()
    send(run, s3)
    assert sent_parts(proxy) == [1, 2, 3, 4]
    assert [one.upload_id for one in control(open_backend(s3)).uploads()] == [upload.upload_id]
    assert {part.number: part.size_bytes for part in store_of(s3).parts(upload)} == {n: len(d) for n, d in theirs.items()}
    assert open_backend(s3).get(KEY) == b"".join(parts)


def test_a_newer_upload_of_others_does_not_hide_ours(proxy, s3, run):
    parts = pieces(run)
    leave(s3, {1: parts[0], 2: parts[1]})
    time.sleep(1.1)
    leave(s3, {1: os.urandom(PART_BYTES)})
    proxy.seen.clear()
    send(run, s3)
    assert sent_parts(proxy) == [3, 4]


def test_a_part_that_the_store_flips(proxy, seaweed, s3, run):
    """The store refuses to make the whole of it; that part alone goes again."""
    once = iter([True])
    meant = lambda request: "partNumber=2" in request.path and next(once, False)  # noqa: E731
    proxy.instead, proxy.choose = damaging(seaweed, lambda request: "instead" if meant(request) else "")
    assert send(run, s3)[0].server_checked_bytes == CheckpointStore(run).get(46).size_bytes
    assert sent_parts(proxy) == [1, 2, 2, 3, 4]


def test_a_part_that_is_flipped_on_its_way(proxy, s3, run):
    """Many times more often than a file may be begun anew: each is refused, and sent again by itself."""
    flips = iter(range(6))
    proxy.choose = lambda request: "flip_up" if "partNumber" in request.path and next(flips, None) is not None else ""
    send(run, s3)
    assert (len(proxy.hit), len(sent_parts(proxy))) == (6, 10)
    assert checked(s3).ok


def test_a_source_differs_from_its_manifest(proxy, s3, tmp_path):
    """A bit of it rotted since: it is never sent whole, whatever of the file was there before."""
    run = make(tmp_path)
    upload = leave(s3, {1: pieces(run)[0]})
    proxy.seen.clear()
    status = (run / KEY).stat()
    with open(run / KEY, "r+b") as file:
        file.seek(PART_BYTES + 5)
        file.write(b"rot")
    os.utime(run / KEY, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DigestMismatchError, match="rank_0"):
        send(run, s3)
    assert 2 not in sent_parts(proxy)
    assert 2 not in [part.number for part in store_of(s3).parts(upload)]
    assert KEY not in keys(s3)


@pytest.mark.parametrize("digests", [True, False])
def test_a_body_that_ends_in_an_error_is_no_part(proxy, s3, digests):
    """What reading it raises is raised as it is, the request is not repeated, and the store keeps nothing of it."""
    store = multipart(control(open_backend(s3)), digests=digests)
    upload = store.begin("some/key")

    def some() -> Iterator[bytes]:
        made.append(1)
        yield bytes(5 << 20)
        raise StorageError("reading it failed")

    made: list[int] = []
    with pytest.raises(StorageError, match=r"^reading it failed$"):
        store.put(upload, 1, connections.Body(8 << 20, some), crc64=0, stop=parallel.Stop())
    assert (len(made), store.parts(upload), sent_parts(proxy)) == (1, [], [])
    store.abort(upload)


# --- digests that the store tells of parts -------------------------------------------------------------------------


def telling(seaweed, told: dict[int, bytes]):
    """As S3 does and this server does not: a list of parts with the CRC-64/NVME of each, here of the bytes that are given."""

    def instead(request: faults.Request) -> bytes:
        path, _, query = request.path.partition("?")
        words = [word for pair in sorted(query.split("&")) for word in ("--url-query", pair)]  # curl signs them as they come
        answer = curl(seaweed, f"s3:/{path}", *words)
        for number, data in told.items():
            crc = base64.b64encode(native.crc64(data).to_bytes(8, "big"))
            name = b"<PartNumber>%d</PartNumber>" % number
            answer = answer.replace(name, name + b"<ChecksumCRC64NVME>" + crc + b"</ChecksumCRC64NVME>")
        return faults.response(b"200 OK", answer)

    return (
        instead,
        lambda request: "instead" if request.method == "GET" and re.search("rank_0.*uploadId=", request.path) else "",
    )


def test_digests_that_are_told_need_no_reading(proxy, seaweed, s3, run, monkeypatch):
    """Nothing of what is there is read here; and a digest that is told outweighs what the ETag says."""
    parts = pieces(run)
    leave(s3, {1: parts[0], 2: parts[1], 3: parts[2]})
    proxy.instead, proxy.choose = telling(seaweed, {1: parts[0], 2: flipped(parts[1]), 3: parts[2]})
    read: list[int] = []
    real = pushing._Push._fill

    def counted(self, fill, file, start, view, *, crc):
        if file.path in KEY and start % PART_BYTES == 0:
            read.append(start // PART_BYTES + 1)
        return real(self, fill, file, start, view, crc=crc)

    monkeypatch.setattr(pushing._Push, "_fill", counted)
    proxy.seen.clear()
    send(run, s3)
    assert (sorted(read), sent_parts(proxy)) == ([2, 4], [2, 4])
    assert checked(s3).ok


def test_etags_that_are_no_md5_prove_nothing(proxy, seaweed, s3, run):
    parts = pieces(run)
    upload = leave(s3, {1: parts[0]})
    inner, proxy.choose = telling(seaweed, {})
    proxy.instead = lambda request: re.sub(rb"[0-9a-f]{32}(?=&#34;)", b"Z" * 32, inner(request))
    proxy.seen.clear()
    send(run, s3)
    assert sent_parts(proxy) == [1, 2, 3, 4]
    assert [one.upload_id for one in control(open_backend(s3)).uploads()] == [upload.upload_id]


# --- a dry run -----------------------------------------------------------------------------------------------------


def what_lies_there(url: str):
    """Keys with their sizes and times, unfinished uploads, and what has arrived of each."""
    backend = open_backend(url)
    uploads = sorted(control(backend).uploads())
    return sorted(backend.list()), uploads, [store_of(url).parts(upload) for upload in uploads]


def figures(sent: pushing.Sent) -> tuple[int, int, tuple[str, ...]]:
    return sent.sent_bytes, sent.there_bytes, sent.notes


@pytest.mark.parametrize("there", [(), (1,), (2, 3), (1, 2, 3, 4), "one is wrong", "of others"])
def test_a_dry_run_counts_what_a_push_would_find(proxy, s3, run, there):
    """And only looks."""
    parts = pieces(run)
    if there == "of others":
        leave(s3, {1: os.urandom(PART_BYTES)})
    elif there == "one is wrong":
        leave(s3, {1: parts[0], 2: flipped(parts[1]), 3: parts[2]})
    elif there:
        leave(s3, {number: parts[number - 1] for number in there})
    before = what_lies_there(s3)
    proxy.seen.clear()
    (would,) = send(run, s3, dry_run=True)
    assert {request.method for request in proxy.seen} <= {"GET", "HEAD"}
    assert what_lies_there(s3) == before
    assert figures(would) == figures(send(run, s3)[0])
    expected = {"one is wrong": (1, 3), "of others": ()}.get(there, there)
    assert would.there_bytes == sum(len(parts[number - 1]) for number in expected)


def test_a_dry_run_of_an_attempt_that_was_cut_short(proxy, s3, run, tmp_path):
    """What somebody else committed lies there; ours was to replace it."""
    other = sealed_run(tmp_path / "other", (46,))
    send(other, s3)
    proxy.instead = lambda request: faults.response(b"403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>")

    def choose(request: faults.Request) -> str:
        """The last part is refused once the others are there."""
        if "partNumber=4" not in request.path:
            return ""
        while sum(map(len, what_lies_there(s3)[2])) < 3:
            time.sleep(0.05)
        return "instead"

    proxy.choose = choose
    with pytest.raises(AccessError):
        send(run, s3, replace=True)
    proxy.choose = lambda request: ""
    before = what_lies_there(s3)
    (would,) = send(run, s3, replace=True, dry_run=True)
    assert what_lies_there(s3) == before
    assert would.there_bytes >= 3 * PART_BYTES
    assert figures(would) == figures(send(run, s3, replace=True)[0])


@pytest.mark.parametrize("why", ["denied", "no extra", "encryption"])
def test_a_dry_run_says_too_that_a_file_starts_over(proxy, s3, run, monkeypatch, why):
    leave(s3, {1: pieces(run)[0]})
    if why == "denied":
        proxy.instead = lambda request: faults.response(b"403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>")
        proxy.choose = lambda request: "instead" if request.method == "GET" and "uploads=" in request.path else ""
    elif why == "no extra":
        monkeypatch.setitem(sys.modules, "awscrt.auth", None)
    else:
        monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "AES256")
        proxy.choose = lambda request: "instead" if b"server-side-encryption" in request.head else ""
    (would,) = send(run, s3, dry_run=True)
    assert [note for note in would.notes if "starts over" in note]
    assert (would.sent_bytes, would.there_bytes) == (CheckpointStore(run).get(46).size_bytes, 0)


def test_a_dry_run_in_which_the_upload_ends(proxy, s3, run):
    """Another push completes or aborts it while it is looked at: nothing is there."""
    upload = leave(s3, {1: pieces(run)[0]})
    store = control(open_backend(s3))
    looks = iter([False, True])

    def choose(request: faults.Request) -> str:
        if request.method == "GET" and "uploadId=" in request.path and next(looks, False):
            store.abort(upload)
        return ""

    proxy.choose = choose
    assert send(run, s3, dry_run=True)[0].there_bytes == 0


# --- two at once ---------------------------------------------------------------------------------------------------


def test_another_push_completes_the_shared_upload(proxy, seaweed, s3, run, monkeypatch):
    """Between two of our parts: our upload is gone, the object is there, and nothing goes twice."""
    leave(s3, {1: pieces(run)[0]})
    proxy.seen.clear()
    once = iter([True])

    def choose(request: faults.Request) -> str:
        if "partNumber" in request.path and next(once, False):
            with monkeypatch.context() as direct:
                direct.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{seaweed.port}")
                send(run, s3)
        return ""

    proxy.choose = choose
    send(run, s3)
    assert max(sent_parts(proxy).count(number) for number in (2, 3, 4)) == 1
    assert not any(request.method == "POST" and "uploads=" in request.path and KEY in request.path for request in proxy.seen)
    assert checked(s3).ok
    assert list(control(open_backend(s3)).uploads()) == []


def test_somebody_aborts_the_upload(proxy, seaweed, s3, run):
    """A cleaner that knows nothing of us: it is begun anew."""
    upload = leave(s3, {1: pieces(run)[0]})
    store = control(open_backend(s3))
    proxy.seen.clear()
    once = iter([True])

    def choose(request: faults.Request) -> str:
        if "partNumber=3" in request.path and next(once, False):
            store.abort(upload)
        return ""

    proxy.choose = choose
    assert send(run, s3)[0].there_bytes == 0
    assert {1, 2, 3, 4} <= set(sent_parts(proxy))
    assert checked(s3).ok


# --- what Complete answers -----------------------------------------------------------------------------------------

NO_UPLOAD = faults.response(b"404 Not Found", b"<Error><Code>NoSuchUpload</Code></Error>")


@pytest.mark.parametrize(
    "answers", [("error_in_200",), ("lost",), ("lost", "instead"), ("internal", "slowdown"), ("cut",), ("stall",)]
)
def test_complete(proxy, s3, run, monkeypatch, answers):
    """An error in a 200; done, and the answer lost; done, lost, and gone when it is asked for again: no part goes twice."""
    monkeypatch.setattr(object_backend, "REQUEST", timedelta(seconds=2))
    left = iter(answers)
    proxy.instead = lambda request: NO_UPLOAD
    meant = lambda request: request.method == "POST" and "uploadId" in request.path  # noqa: E731
    proxy.choose = lambda request: next(left, "") if meant(request) else ""
    assert send(run, s3)[0].server_checked_bytes == CheckpointStore(run).get(46).size_bytes
    assert (proxy.hit, sent_parts(proxy)) == (list(answers), [1, 2, 3, 4])
    report = checked(s3)
    assert (report.ok, report.checkpoint.status) == (True, Status.COMMITTED)
    assert list(control(open_backend(s3)).uploads()) == []


def test_complete_itself(proxy, s3, run, monkeypatch):
    """Refused with a part's digest, a part or the whole that is another; an error or nothing in a 200 is no success."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    parts = pieces(run)
    upload = leave(s3, {})
    store, stop = store_of(s3), parallel.Stop()
    bodies = {number: connections.whole(data) for number, data in enumerate(parts, 1)}
    crcs = {number: native.crc64(data) for number, data in enumerate(parts, 1)}
    arrived = {number: store.put(upload, number, body, crc64=crcs[number], stop=stop) for number, body in bodies.items()}
    whole = native.crc64(b"".join(parts))
    assert store.complete(upload, arrived, crc64=whole ^ 1, stop=stop) == "BadDigest"
    assert store.complete(upload, arrived | {2: arrived[2]._replace(crc64=7)}, crc64=whole, stop=stop) == "BadDigest"
    assert store.complete(upload, arrived | {2: arrived[2]._replace(etag="0" * 32)}, crc64=whole, stop=stop) == "InvalidPart"
    meant = lambda request: request.method == "POST" and "uploadId" in request.path  # noqa: E731
    proxy.choose = lambda request: "error_in_200" if meant(request) else ""
    with pytest.raises(StorageError, match=r"500 InternalError"):
        store.complete(upload, arrived, crc64=whole, stop=stop)
    proxy.choose = lambda request: "instead" if meant(request) else ""
    assert "without a result" in store.complete(upload, arrived, crc64=whole, stop=stop)
    assert not store.holds(KEY, sum(map(len, parts)), arrived, crc64=whole)
    proxy.choose = lambda request: ""
    assert store.complete(upload, arrived, crc64=whole, stop=stop) == ""
    assert store.holds(KEY, sum(map(len, parts)), arrived, crc64=whole)


def test_an_upload_that_is_gone_and_no_object(proxy, s3, run, monkeypatch):
    """Once: begun anew. Each time: an error, and no checkpoint."""
    monkeypatch.setattr(sending, "FILE_TRIES", 1)
    proxy.instead = lambda request: NO_UPLOAD
    once = iter([True])
    meant = lambda request: request.method == "POST" and "uploadId" in request.path  # noqa: E731
    proxy.choose = lambda request: "instead" if meant(request) and next(once, False) else ""
    send(run, s3)
    assert sent_parts(proxy) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert checked(s3).ok
    proxy.choose = lambda request: "instead" if meant(request) else ""
    with pytest.raises(TransitError, match="NoSuchUpload"):
        send(run, f"{s3}-other")
    assert KEY not in keys(f"{s3}-other")


def test_what_this_push_sent_was_not_there(proxy, s3, run, monkeypatch):
    """One part fails for so long that the file is begun again: the others are its own, not an earlier push's."""
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(0))
    refusals = iter(range(2))
    proxy.choose = lambda request: "internal" if "partNumber=3" in request.path and next(refusals, None) is not None else ""
    told: list[tuple[int, int]] = []
    (sent,) = send(run, s3, notify=lambda doing, done, total: told.append((done, total)))
    assert proxy.hit == ["internal"] * 2
    size = CheckpointStore(run).get(46).size_bytes
    assert (sent.sent_bytes, sent.there_bytes) == (size, 0)
    assert told[-1] == (size, size)
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(told))


def test_credentials_that_end(proxy, s3, run):
    """In the middle of a file: an error of its own kind, at once, without a secret."""
    proxy.instead = lambda request: faults.response(b"400 Bad Request", b"<Error><Code>ExpiredToken</Code></Error>")
    proxy.choose = faults.always("instead", "PUT", "partNumber=3")
    began = time.monotonic()
    with pytest.raises(AccessError, match="ExpiredToken") as caught:
        send(run, s3)
    assert time.monotonic() - began < 10
    assert not any(word in f"{caught.value!r} {caught.value.hint}" for word in (servers.KEY, servers.SECRET, "Signature"))
    proxy.choose = lambda request: ""
    assert send(run, s3)[0].there_bytes > 0


# --- where it cannot be --------------------------------------------------------------------------------------------


def test_without_the_extra(s3, run, monkeypatch):
    """Said, where a file is large enough to matter."""
    monkeypatch.setitem(sys.modules, "awscrt.auth", None)
    (sent,) = send(run, s3)
    assert [note for note in sent.notes if "starts over" in note and "awscrt" in note]
    assert [found.status for found in CheckpointStore(s3)] == [Status.COMMITTED]
    assert open_backend(s3).get(KEY) == (run / KEY).read_bytes()
    monkeypatch.undo()
    other = f"memory://multipart-{os.getpid()}-{time.monotonic_ns()}"
    assert [note for note in send(run, other)[0].notes if "starts over" in note]


def test_small_files_need_no_note(s3, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "awscrt.auth", None)
    assert send(sealed_run(tmp_path, (46,)), s3)[0].notes == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_SERVER_SIDE_ENCRYPTION", "AES256"), ("AWS_UNSIGNED_PAYLOAD", "false"), ("AWS_REQUEST_PAYER", "true")],
)
def test_what_only_the_library_sends(s3, monkeypatch, name, value):
    """An encryption that was asked for must not be forgotten."""
    assert conditions.find_uploads(open_backend(s3))[0] is not None
    monkeypatch.setenv(name, value)
    uploads, why = conditions.find_uploads(open_backend(s3))
    assert (uploads, name in why) == (None, True)


def test_a_store_that_lists_no_uploads(proxy, s3, run):
    """Its credentials may not allow it."""
    proxy.instead = lambda request: faults.response(b"403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>")
    proxy.choose = lambda request: "instead" if request.method == "GET" and "uploads=" in request.path else ""
    (sent,) = send(run, s3)
    assert [note for note in sent.notes if "AccessDenied" in note]
    assert checked(s3).ok


@pytest.mark.parametrize("what", ["no time", "a time of another kind", "no number"])
def test_a_list_that_nobody_understands(proxy, s3, run, what):
    """Is no list, and no error either: the file goes as a whole."""
    upload = leave(s3, {1: pieces(run)[0]})
    times = {"no time": b"", "a time of another kind": b"<Initiated>yesterday</Initiated>"}
    listed = b"<L><Upload><Key>%s</Key><UploadId>%s</UploadId>%s</Upload></L>"
    of_parts = b"<L><Part><PartNumber>one</PartNumber></Part></L>"

    def instead(request: faults.Request) -> bytes:
        if what == "no number":
            return faults.response(b"200 OK", of_parts)
        key = open_backend(s3).key_path(KEY).encode()
        return faults.response(b"200 OK", listed % (key, upload.upload_id.encode(), times[what]))

    asked = "uploadId=" if what == "no number" else "uploads="
    proxy.instead = instead
    proxy.choose = lambda request: "instead" if request.method == "GET" and asked in request.path else ""
    assert [note for note in send(run, s3, dry_run=True)[0].notes if "starts over" in note]
    (sent,) = send(run, s3)
    assert [note for note in sent.notes if "starts over" in note]
    assert checked(s3).ok


# --- ends ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_the_store_takes_its_time(proxy, s3, run, monkeypatch):
    """It waits for an answer: it ends at once, and the same push goes on."""
    monkeypatch.setattr(sending, "PART_BYTES", 16 << 20)  # as the command has it
    proxy.choose = lambda request: "stall" if "partNumber=2" in request.path else ""
    process = start("push", "46", "--run", run, "--to", s3, seaweed=Through(proxy.port))
    deadline = time.monotonic() + 30
    store = store_of(s3)
    while "stall" not in proxy.hit or not any(store.parts(upload) for upload in store.unfinished(KEY)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    error = process.communicate(timeout=20)[1].decode()
    assert (process.returncode, time.monotonic() - began < 2) == (130, True), error
    proxy.choose = lambda request: ""
    proxy.seen.clear()
    assert send(run, s3)[0].there_bytes >= 16 << 20
    assert sent_parts(proxy) == [2]


@pytest.mark.parametrize("kind", ["stall", "takes nothing"])
def test_a_part_that_stalls_is_sent_again_in_whatever_process(proxy, s3, run, monkeypatch, kind):
    """The store takes it all and does not answer, or stops taking it."""
    monkeypatch.setattr(stalls, "ANSWER_S" if kind == "stall" else "STALL_S", 1.0)
    if kind == "stall":
        proxy.choose = lambda request: kind if "partNumber=2" in request.path and not proxy.hit else ""
    else:
        proxy.stops_taking = b"partNumber=2"
    began = time.monotonic()
    assert send(run, s3)[0].sent_bytes >= 24 << 20
    assert len(proxy.hit) == 1
    assert time.monotonic() - began < 9


def test_a_store_that_is_slow_is_waited_for(proxy, s3, monkeypatch):
    """One that answers each part after three times what counts as a stall: it is found out once, not with each part."""
    monkeypatch.setattr(stalls, "ANSWER_S", 0.1)
    monkeypatch.setattr(connections, "LOOK_S", 0.02)
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=0.9))
    fresh = Connections()
    monkeypatch.setattr(connections, "shared", lambda authorities: fresh)
    proxy.choose = lambda request: ("partNumber" in request.path and time.sleep(0.3)) or ""
    leave(s3, {1: bytes(100_000), 2: bytes(100_000)})
    assert sent_parts(proxy) == [1, 1, 1, 2]


def test_clean_spares_what_a_living_push_goes_on_with(s3, run):
    """The upload is old; the claim beside it was renewed."""
    upload = leave(s3, {1: pieces(run)[0]})
    time.sleep(2.1)
    backend = open_backend(s3)
    backend.put(f"{EXPORT}/.ckptstore.manifest.claim", b"{}")
    assert leftovers.look(backend, older_than_s=1.0).leftovers == ()
    backend.delete(f"{EXPORT}/.ckptstore.manifest.claim")
    assert [one.upload.upload_id for one in leftovers.look(backend, older_than_s=1.0).leftovers] == [upload.upload_id]


# --- kill -9 -------------------------------------------------------------------------------------------------------

PUSHING = """
import sys
from ckptstore.transfer import sending
from ckptstore.cli import run

sending.PART_BYTES = int(sys.argv[1])
sys.exit(run(sys.argv[2:]))
"""


def push_through(port: int, run, url: str, *words: str) -> subprocess.Popen[bytes]:
    """The command, with parts as small as here."""
    return subprocess.Popen(
        [sys.executable, "-c", PUSHING, str(PART_BYTES), "push", "46", "--run", str(run), "--to", url, *words],
        env=commands.environment(**servers.environment(port), PYTHONPATH=os.pathsep.join(sys.path)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def told(process: subprocess.Popen[bytes]) -> list[dict[str, object]]:
    """What it says of each part, when it has ended well."""
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    return json.loads(out)["parts"]


def test_kill_9_in_the_middle_of_a_file(seaweed, s3, tmp_path):
    """What is sent again is what was on its way: at most one part a stream, and of what the store tells to have, none."""
    run = make(tmp_path, 128)
    total = CheckpointStore(run).get(46).size_bytes
    meter = faults.Meter(seaweed.port, together_bytes_per_s=150e6, hold_at_bytes=total * 0.75)
    try:
        process = push_through(meter.port, run, s3)
        while meter.up_bytes < meter.hold_at_bytes:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.kill()
        process.communicate()
        meter.hold_at_bytes = math.inf
        before = -1
        while before != (before := meter.up_bytes):  # what the kernel still held
            time.sleep(0.3)
        assert [found.status for found in CheckpointStore(s3)] == [Status.PARTIAL]
        (upload,) = control(open_backend(s3)).uploads()
        there = sum(part.size_bytes for part in store_of(s3).parts(upload))
        assert there > total * 0.75 - (multiparts.STREAMS + 1) * PART_BYTES
        then = what_lies_there(s3)
        would = told(push_through(meter.port, run, s3, "--dry-run", "--json"))
        assert what_lies_there(s3) == then
        looked = meter.up_bytes
        really = told(push_through(meter.port, run, s3, "--json"))
        again = meter.up_bytes - looked
    finally:
        meter.close()
    assert again <= (total - before) + multiparts.STREAMS * PART_BYTES + (2 << 20)
    assert total - there <= again <= total - there + (2 << 20)
    remote = open_backend(s3)
    same = ("step", "part", "url", "sent_bytes", "there_bytes", "committed_before", "manifest_sha256", "notes")
    assert [{name: part[name] for name in same} for part in would] == [{name: part[name] for name in same} for part in really]
    assert there <= would[0]["there_bytes"] < there + PART_BYTES  # and small files
    report = verify(remote, listing.scan(remote).checkpoints[0], Level.FULL)
    assert (report.ok, report.checkpoint.status) == (True, Status.COMMITTED)
    assert list(control(remote).uploads()) == []


def test_ctrl_c_in_the_middle_of_parts(seaweed, s3, run):
    """On a slow line, where each part takes a minute: it ends at once, nothing is visible, and the same push goes on."""
    meter = faults.Meter(seaweed.port, together_bytes_per_s=400e3)
    try:
        process = push_through(meter.port, run, s3)
        while not list(control(open_backend(s3)).uploads()) or meter.up_bytes < 200_000:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        error = process.communicate(timeout=20)[1].decode()
        assert (process.returncode, time.monotonic() - began < 2) == (130, True), error
    finally:
        meter.close()
    assert "Traceback" not in error
    assert [found.status for found in CheckpointStore(s3)] == [Status.PARTIAL]
    assert KEY not in keys(s3)
    send(run, s3)
    assert checked(s3).ok
    assert list(control(open_backend(s3)).uploads()) == []


def test_lists_that_come_in_pages(s3, monkeypatch):
    """Of parts, and of uploads."""
    monkeypatch.setattr(s3multipart, "PAGE", 2)
    monkeypatch.setattr(s3control, "PAGE", 2)
    there = {number: bytes([number]) * 1000 for number in (1, 2, 4, 5, 7)}
    upload = leave(s3, there)
    others = [leave(s3, {}) for _ in range(4)]
    found = store_of(s3).parts(upload)
    assert [(part.number, part.size_bytes) for part in found] == [(number, 1000) for number in there]
    assert {one.upload_id for one in store_of(s3).unfinished(KEY)} == {one.upload_id for one in (upload, *others)}


def test_a_complete_that_takes_its_time(proxy, s3, run, monkeypatch):
    """The list of thousands of parts is as large as a part may be: it is none, and not asked again, nor cut off."""
    monkeypatch.setattr(stalls, "ANSWER_S", 2.0)
    monkeypatch.setattr(stalls, "PART_BYTES", 256)
    asked: list[int] = []

    def choose(request: faults.Request) -> str:
        if request.method == "POST" and "uploadId" in request.path:
            asked.append(len(request.body))
            time.sleep(3)
        return ""

    proxy.choose = choose
    with stalls.StallWatch() as watch:  # as in a command
        send(run, s3)
    assert watch.broken == 0
    assert len(asked) == 1
    assert asked[0] > 256
    assert checked(s3).ok


# --- connections that are kept --------------------------------------------------------------------------------------


def open_to(port: int) -> int:
    """Connections of this process to a port."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            count += one.family == socket.AF_INET and one.getpeername()[1] == port
    return count


def test_checkpoint_after_checkpoint_in_one_process(seaweed, s3, run):
    """As a mirror does in a trainer: what is kept open does not grow with each."""
    send(run, f"{s3}-first")
    first = open_to(seaweed.port)
    for number in range(6):
        send(run, f"{s3}-{number}")
    assert open_to(seaweed.port) <= 3 * first


def test_a_connection_that_the_store_has_closed(seaweed, s3, run):
    """Is not used again: nothing of a request goes into it."""
    meter = faults.Meter(seaweed.port)
    request = control(open_backend(s3))._signed("HEAD", KEY, query={}, headers={}, body=connections.NOTHING)
    request = request._replace(host=f"127.0.0.1:{meter.port}")
    kept = Connections()
    kept.ask(request, timeout_s=5, stop=parallel.Stop())
    (idle,) = [connection for _, connection in kept._idle]
    for end in meter.ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    assert idle.sock.recv(1, socket.MSG_PEEK) == b""
    sent = []
    idle.send = sent.append
    assert kept.ask(request, timeout_s=5, stop=parallel.Stop()).status == 404
    assert sent == []
    meter.close()


def test_a_forked_child_has_connections_of_its_own(s3):
    """A worker that a trainer forks after a push: two processes on one connection would read each other's answers."""
    store = control(open_backend(s3))
    store.backend.put("key", b"1")
    request = store._signed("HEAD", "key", query={}, headers={}, body=connections.NOTHING)

    def ask() -> int:
        return connections.shared().ask(request, timeout_s=5, stop=parallel.Stop()).status

    assert ask() == 200
    before = shared_sockets()
    assert before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, from 3.12 on: threads and fork
        child = os.fork()
    if not child:
        signal.alarm(10)
        with contextlib.suppress(BaseException):
            os._exit(int(ask() != 200 or bool(shared_sockets() & before)))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask() == 200
    assert shared_sockets() == before


def shared_sockets() -> set[int]:
    """The sockets, by inode, that the next request to a store may take."""
    return {os.fstat(connection.sock.fileno()).st_ino for _, connection in connections.shared()._idle}


def test_an_answer_that_never_ends(s3, monkeypatch):
    """Something comes all the time, and it is never all."""
    monkeypatch.setattr(connections, "LONGEST_ANSWER_S", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))

    def trickle() -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                client.sendall(b" ")
                time.sleep(0.05)

    threading.Thread(target=trickle, daemon=True).start()
    request = control(open_backend(s3))._signed("HEAD", KEY, query={}, headers={}, body=connections.NOTHING)
    request = request._replace(method="GET", host=f"127.0.0.1:{listener.getsockname()[1]}")
    began = time.monotonic()
    with listener, pytest.raises(TimeoutError):
        Connections().ask(request, timeout_s=10, stop=parallel.Stop())
    assert time.monotonic() - began < 2


# --- slow lines, and TLS -------------------------------------------------------------------------------------------


class Secure(faults.Proxy):
    """As the proxy, by TLS, and it takes 4 MB a second."""

    def _serve(self, client) -> None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        super()._serve(self.context.wrap_socket(client, server_side=True))


class Slow(ssl.SSLSocket):
    def recv(self, size=1024, flags=0):
        data = super().recv(min(size, 1 << 15), flags)
        time.sleep(len(data) / 4e6)
        return data


@pytest.fixture
def secure(seaweed, s3, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-keyout", tmp_path / "key", "-out", tmp_path / "cert", "-subj", "/CN=test", "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    Secure.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    Secure.context.sslsocket_class = Slow
    Secure.context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    proxy = Secure(seaweed.port)
    yield proxy
    proxy.close()


def a_part(url: str, port: int, data: bytes):
    """The signed request of a part, by TLS: the signature covers the host, not the way there."""
    upload = leave(url, {})
    query = {"partNumber": "1", "uploadId": upload.upload_id}
    request = control(open_backend(url))._signed("PUT", KEY, query=query, headers={}, body=connections.whole(data))
    return upload, request._replace(scheme="https", host=f"127.0.0.1:{port}")


def test_a_slow_line_is_no_stall(secure, s3, monkeypatch):
    """TLS tells of no byte before all of a send has gone: a part that takes longer than a stall may is no stalled one."""
    monkeypatch.setattr(stalls, "STALL_S", 1.0)
    data = os.urandom(12 << 20)
    upload, request = a_part(s3, secure.port, data)
    began = time.monotonic()
    answer = Connections().ask(request, timeout_s=60, stop=parallel.Stop())
    assert (answer.status, time.monotonic() - began > 2) == (200, True)
    assert [(part.number, part.size_bytes) for part in store_of(s3).parts(upload)] == [(1, len(data))]
    assert store_of(s3).parts(upload)[0].etag == hashlib.md5(data).hexdigest()


def test_a_slow_line_without_tls(seaweed, s3, monkeypatch):
    """The kernel takes more only once much of what it holds has gone: longer than a stall may last, here."""
    monkeypatch.setattr(stalls, "STALL_S", 1.0)
    meter = faults.Meter(seaweed.port, together_bytes_per_s=1e6)
    upload = leave(s3, {})
    query = {"partNumber": "1", "uploadId": upload.upload_id}
    request = control(open_backend(s3))._signed("PUT", KEY, query=query, headers={}, body=connections.whole(bytes(5 << 20)))
    try:
        answer = Connections().ask(request._replace(host=f"127.0.0.1:{meter.port}"), timeout_s=60, stop=parallel.Stop())
    finally:
        meter.close()
    assert answer.status == 200


@pytest.mark.parametrize("why", ["stalled", "stopped"])
def test_no_answer_by_tls(secure, s3, monkeypatch, why):
    """Tickets that TLS 1.3 sends first are no answer: it is given up in time, and ends when it shall."""
    secure.choose = lambda request: "stall"
    _, request = a_part(s3, secure.port, bytes(100_000))
    stop = parallel.Stop()
    if why == "stalled":
        monkeypatch.setattr(stalls, "ANSWER_S", 1.0)
    else:
        threading.Timer(1.0, stop.set).start()
    began = time.monotonic()
    with pytest.raises(TimeoutError if why == "stalled" else parallel.Stopped):
        Connections().ask(request, timeout_s=10, stop=stop)
    assert 0.9 < time.monotonic() - began < 3


def test_a_store_that_has_no_word_for_an_upload_that_has_ended(proxy, s3, run):
    """Ceph 16 answers 500 for good: that is seen at once, and the file begun anew."""
    ended: list[str] = []

    def choose(request: faults.Request) -> str:
        name = request.path.rpartition("uploadId=")[2]
        if request.method == "POST" and "uploadId" in request.path and ended in ([], [name]):
            if not ended:
                ended.append(name)
                (upload,) = control(open_backend(s3)).uploads()
                control(open_backend(s3)).abort(upload)
            return "internal"
        return ""

    proxy.choose = choose
    send(run, s3)
    assert proxy.hit == ["internal"]
    assert checked(s3).ok
