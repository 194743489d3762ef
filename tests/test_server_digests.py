"""The store's own word: stored checksums, what push compares, `verify --level server`. All against a real S3 server."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from ckptstore import listing, native
from ckptstore.backends import object as object_backend
from ckptstore.backends import open_backend, s3control, tries
from ckptstore.backends.s3control import control
from ckptstore.errors import AccessError, NotFoundError, StorageError, TransitError, UnavailableError
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import push as pushing
from ckptstore.verify import verify
from tests import commands, faults, servers, trees
from tests.test_backend_contract import curl
from tests.test_push_pull import EXPORT, add_big_file, keys, send
from tests.test_remote_looking import sealed_run, upload

MIB = 1 << 20
WEIGHTS = f"{EXPORT}/model.safetensors"


@pytest.fixture
def run(tmp_path):
    return sealed_run(tmp_path, (46,))


@pytest.fixture
def proxy(seaweed, s3, monkeypatch):
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr(object_backend, "STALL", timedelta(seconds=1))
    monkeypatch.setattr(tries, "RETRY_FOR", timedelta(seconds=3))
    yield proxy
    proxy.close()


@pytest.fixture
def without_awscrt(monkeypatch):
    for name in ("awscrt", "awscrt.auth", "awscrt.http"):
        monkeypatch.setitem(sys.modules, name, None)


def begin_upload(seaweed, url: str) -> str:
    answer = curl(seaweed, f"{url}", "-X", "POST", "--url-query", "uploads=").decode()
    return re.search(r"<UploadId>(.+?)</UploadId>", answer)[1]


def put_right(seaweed, url: str, data: bytes) -> None:
    """As any tool would: with the CRC of what it sends, so that the server takes and keeps it."""
    crc = base64.b64encode(native.crc64(data).to_bytes(8, "big")).decode()
    curl(seaweed, url, "-X", "PUT", "-H", f"x-amz-checksum-crc64nvme: {crc}", "--data-binary", "@-", data=data)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def checked(url: str):
    backend = open_backend(url)
    return verify(backend, listing.scan(backend).checkpoints[0], Level.SERVER)


# --- the control calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["plain", "a/b c+é&=%41?.bin"])
def test_what_a_head_says(s3, key):
    """Of a single put, of one in parts, of nothing; by a value that the server computed."""
    backend = open_backend(f"{s3}/ü n")
    backend.put(key, b"hello")
    assert control(backend).head(key) == (5, native.crc64(b"hello"))
    backend.put(key, b"")
    assert control(backend).head(key) == (0, 0)
    parts = [os.urandom(5 * MIB), os.urandom(5 * MIB), b"end"]
    backend.put_parts(key, parts, part_bytes=5 * MIB, parallel=2)
    assert control(backend).head(key) == (10 * MIB + 3, native.crc64(b"".join(parts)))
    with pytest.raises(NotFoundError, match="none"):
        control(backend).head("none")
    with pytest.raises(NotFoundError):
        control(backend).head("../out")


def test_a_store_that_checks_refuses_damage(s3):
    backend = open_backend(s3)
    assert control(backend).refuses_damage("scratch") is True
    assert keys(s3) == []


def test_unfinished_uploads(seaweed, s3, monkeypatch):
    """All pages, those below the prefix alone, and an abort frees one."""
    monkeypatch.setattr(s3control, "PAGE", 2)
    begun = {(key, begin_upload(seaweed, f"{s3}/{key}")) for key in ("a", "a", "b/c d+é", "b/c", "z")}
    stranger = begin_upload(seaweed, f"{s3}-other/x")
    store = control(open_backend(s3))
    found = list(store.uploads())
    assert {(one.key, one.upload_id) for one in found} == begun
    assert len(found) == 5
    assert all(abs(one.begun_ns / 1e9 - time.time()) < 60 for one in found)
    store.abort(found[0])
    store.abort(found[0])
    assert set(store.uploads()) == set(found[1:])
    others = control(open_backend(f"{s3}-other"))
    assert [one.upload_id for one in others.uploads()] == [stranger]
    for unfinished in found[1:]:
        store.abort(unfinished)
    others.abort(next(others.uploads()))


def test_wrong_credentials_are_denied_and_not_shown(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    with pytest.raises(AccessError) as caught:
        control(open_backend(s3)).head("x")
    assert "hush" not in f"{caught.value} {caught.value.hint} {caught.value!r}"
    assert caught.value.__cause__ is None


def test_a_profile(s3, tmp_path, monkeypatch):
    """The same one that the backend reads."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = {servers.KEY}\naws_secret_access_key = {servers.SECRET}\n"
        "[default]\naws_access_key_id = another\naws_secret_access_key = another\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    backend = open_backend(s3)
    backend.put("x", b"hello")
    assert control(backend).head("x").crc64 == native.crc64(b"hello")


def test_a_role(s3, tmp_path, monkeypatch):
    """Keys that the machine gets from its surroundings, as a container's."""
    body = {"AccessKeyId": servers.KEY, "SecretAccessKey": servers.SECRET, "Token": "", "Expiration": "2099-01-01T00:00:00Z"}

    class Role(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Role) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        (tmp_path / "token").write_text("token")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/role")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        backend = open_backend(s3)
        backend.put("x", b"hello")
        assert control(backend).head("x").crc64 == native.crc64(b"hello")
        server.shutdown()


@pytest.mark.parametrize("kind", ["reset", "stall", "slowdown", "internal"])
def test_faults_of_control_calls(proxy, s3, kind):
    """Once: asked again. Always: a typed error that names the place, soon."""
    backend = open_backend(s3)
    backend.put("x", b"hello")
    once = iter([True])
    proxy.choose = lambda request: kind if request.method == "HEAD" and next(once, False) else ""
    assert control(backend).head("x").crc64 == native.crc64(b"hello")
    proxy.choose = faults.always(kind)
    began = time.monotonic()
    with pytest.raises(StorageError, match=f"{s3}/x"):
        control(backend).head("x")
    assert time.monotonic() - began < 8
    assert kind in proxy.hit


def test_a_redirect_is_not_followed(proxy, s3):
    """It could carry the signature to a place that is not the store."""
    proxy.instead = lambda request: faults.response(b"307 Temporary Redirect\r\nLocation: http://127.0.0.1:9/x", b"")
    proxy.choose = faults.always("instead")
    with pytest.raises(StorageError, match="307"):
        control(open_backend(s3)).head("x")


@pytest.mark.parametrize("body", [b"no xml", b"<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>", b"<ListMultipartUploadsResult>"])
def test_an_answer_that_is_no_answer(proxy, s3, body):
    proxy.instead = lambda request: faults.response(b"200 OK", body)
    proxy.choose = faults.always("instead")
    with pytest.raises(StorageError, match="no XML"):
        list(control(open_backend(s3)).uploads())


def test_unavailable(s3, tmp_path, without_awscrt):
    """Each time with what to do instead."""
    with pytest.raises(UnavailableError) as caught:
        control(open_backend(s3))
    assert "ckptstore[s3]" in caught.value.hint
    for place in (tmp_path, f"memory://digests-{os.getpid()}"):
        with pytest.raises(UnavailableError) as caught:
            control(open_backend(place))
        assert "--level full" in caught.value.hint


def test_unsigned_requests_have_no_control_calls(s3, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(UnavailableError, match="AWS_SKIP_SIGNATURE"):
        control(open_backend(s3))


# --- push --------------------------------------------------------------------------------------------------------


def test_push_compares_all(s3, run):
    add_big_file(run, 20)
    trees.set_age(run / EXPORT, 3600)
    CheckpointStore(run).seal(46)
    size = CheckpointStore(run).get(46).size_bytes
    for sent_bytes in (size, 0):
        sent = send(run, s3)[0]
        assert (sent.sent_bytes, sent.server_checked_bytes, sent.server_check) == (sent_bytes, size, "crc64nvme")
    assert not any("probe" in key for key in keys(s3))


def test_push_without_the_extra_claims_nothing(s3, run, without_awscrt):
    sent = send(run, s3)[0]
    assert (sent.sent_bytes, sent.server_checked_bytes) == (CheckpointStore(run).get(46).size_bytes, 0)
    assert "ckptstore[s3]" in sent.server_check
    assert listing.scan(open_backend(s3)).checkpoints[0].status is Status.COMMITTED


def test_push_to_other_media_claims_nothing(run, tmp_path):
    sent = send(run, f"memory://claims-{tmp_path.name}-{os.getpid()}")[0]
    assert sent.server_checked_bytes == 0
    assert "only S3" in sent.server_check


def test_a_store_that_keeps_no_digest(proxy, s3, run):
    proxy.unsaid = (b"x-amz-checksum-",)
    sent = send(run, s3)[0]
    assert (sent.server_checked_bytes, sent.server_check) == (0, "the store keeps no crc64nvme")


def test_a_store_that_repeats_what_it_is_told(proxy, s3, run):
    """It takes a byte with another's CRC: what it says of its objects proves nothing."""
    wrong = base64.b64encode(b"\0" * 8)
    proxy.choose = lambda request: "instead" if request.method == "PUT" and wrong in request.head else ""
    sent = send(run, s3)[0]
    assert "instead" in proxy.hit
    assert sent.server_checked_bytes == 0
    assert "does not compute" in sent.server_check


def damaging(seaweed, choose):
    """A store that flips a bit in its own memory, before it computes the CRC that it keeps: nothing on the way sees it."""

    def instead(request: faults.Request) -> bytes:
        path, _, query = request.path.partition("?")
        crc = base64.b64encode(native.crc64(flipped(request.body)).to_bytes(8, "big")).decode()
        words = ["-X", "PUT", "-i", "-H", f"x-amz-checksum-crc64nvme: {crc}", "--data-binary", "@-"]
        words += [word for pair in query.split("&") if pair for word in ("--url-query", pair)]
        answer = curl(seaweed, f"s3:/{path}", *words, data=flipped(request.body))
        etag = re.search(rb"(?i)etag: *(\S+)", answer)[1]
        return faults.response(b"200 OK\r\nETag: " + etag, b"")

    return instead, choose


@pytest.mark.parametrize("name", ["model.safetensors", "optim_world_size_1_rank_0.pt"])
@pytest.mark.parametrize("times", [1, 99])
def test_a_flipped_bit_that_the_store_keeps(proxy, seaweed, s3, run, monkeypatch, name, times):
    """In a single put and in a part. Once: sent again, and right. Each time: an error, and nothing is committed."""
    add_big_file(run, 20)
    trees.set_age(run / EXPORT, 3600)
    CheckpointStore(run).seal(46)
    left = iter(range(times))
    meant = lambda request: request.method == "PUT" and name in request.path and next(left, None) is not None  # noqa: E731
    proxy.instead, proxy.choose = damaging(seaweed, lambda request: "instead" if meant(request) else "")
    if times == 1:
        sent = send(run, s3)[0]
        assert proxy.hit == ["instead"]
        assert sent.server_checked_bytes == CheckpointStore(run).get(46).size_bytes
        assert checked(s3).ok
        return
    with pytest.raises(TransitError, match=name):
        send(run, s3)
    assert not any(key.endswith((MANIFEST_NAME, name)) for key in keys(s3))
    proxy.choose = lambda request: ""
    assert send(run, s3)[0].server_checked_bytes == CheckpointStore(run).get(46).size_bytes


def test_what_was_damaged_there_is_sent_again(seaweed, s3, run):
    """Of the same size: without the store's word it would be taken for the file."""
    send(run, s3)
    data = (run / WEIGHTS).read_bytes()
    put_right(seaweed, f"{s3}/{WEIGHTS}", flipped(data))
    assert not checked(s3).ok
    assert send(run, s3, dry_run=True)[0].sent_bytes == len(data)
    assert send(run, s3)[0].sent_bytes == len(data)
    assert checked(s3).ok


# --- verify --level server -----------------------------------------------------------------------------------------


def test_verify_by_heads_alone(proxy, s3, run):
    """A HEAD a file, and no GET but that of the manifest."""
    send(run, s3)
    backend = open_backend(s3)
    checkpoint = listing.scan(backend).checkpoints[0]
    proxy.seen.clear()
    report = verify(backend, checkpoint, Level.SERVER)
    assert (report.ok, report.bytes_read, report.unchecked) == (True, 0, ())
    assert report.checkpoint.status is Status.COMMITTED
    asked = [(request.method, Path(request.path.partition("?")[0]).name) for request in proxy.seen]
    names = [file.name for file in CheckpointStore(run).get(46).parts[0].files]
    assert sorted(name for method, name in asked if method == "HEAD") == sorted(names)
    assert {name for method, name in asked if method == "GET"} == {MANIFEST_NAME}


@pytest.mark.parametrize("how", ["flip", "gone", "longer"])
def test_damage_there_is_found(seaweed, s3, run, capfd, tmp_path, monkeypatch, how):
    commands.isolate(monkeypatch, tmp_path)
    send(run, s3)
    data = (run / WEIGHTS).read_bytes()
    words = ("verify", "46", "--run", s3, "--level", "server")
    assert commands.invoke(capfd, *words).code == 0
    if how == "gone":
        curl(seaweed, f"{s3}/{WEIGHTS}", "-X", "DELETE")
    else:
        put_right(seaweed, f"{s3}/{WEIGHTS}", flipped(data) if how == "flip" else data + b"x")
    done = commands.invoke(capfd, *words)
    assert done.code == 3, done.out
    assert "model.safetensors" in done.out
    if how == "flip":  # a size tells nothing here
        assert commands.invoke(capfd, *words[:-1], "quick").code == 0


def test_what_cannot_be_checked_is_not_called_whole(proxy, s3, run, capfd, tmp_path, monkeypatch):
    """The store keeps no digest, or there is no manifest: exit 1, and no green line."""
    commands.isolate(monkeypatch, tmp_path)
    words = ("verify", "--run", s3, "--level", "server")
    upload(run, open_backend(s3), but=(MANIFEST_NAME,))
    count = CheckpointStore(run).get(46).file_count
    done = commands.invoke(capfd, *words, "--json")
    assert (done.code, done.json["ok"], len(done.json["reports"][0]["unchecked"])) == (1, False, count)
    for key in keys(s3):
        open_backend(s3).delete(key)
    send(run, s3)
    assert commands.invoke(capfd, *words).code == 0
    proxy.unsaid = (b"x-amz-checksum-",)
    done = commands.invoke(capfd, *words)
    assert done.code == 1
    assert "--level full" in done.out
    assert "0 of 1 whole" in done.out


def test_verify_without_the_extra(s3, run, capfd, tmp_path, monkeypatch, without_awscrt):
    commands.isolate(monkeypatch, tmp_path)
    send(run, s3)
    done = commands.invoke(capfd, "verify", "--run", s3, "--level", "server")
    assert (done.code, "ckptstore[s3]" in done.err, "Traceback" in done.err) == (1, True, False)
    done = commands.invoke(capfd, "verify", "--run", run, "--level", "server")
    assert (done.code, "--level full" in done.err) == (1, True)


def test_push_says_it(s3, run, capfd, tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    done = commands.invoke(capfd, "push", "46", "--run", run, "--to", s3)
    assert "own crc64nvme of every file" in done.out.replace("\n", " ")
    part = commands.invoke(capfd, "push", "46", "--run", run, "--to", s3, "--json").json["parts"][0]
    assert part["server_checked_bytes"] == part["there_bytes"] > 0
    assert pushing.Sent.__dataclass_fields__.keys() - part.keys() == set()
