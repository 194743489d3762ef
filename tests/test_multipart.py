"""Uploads to S3 that go on: which parts that lie there count, and what of others' uploads is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptstore import conditions, native, sending
from ckptstore.backends import open_backend
from ckptstore.backends.s3control import Upload
from ckptstore.backends.s3multipart import S3Multipart
from ckptstore.model import Level, Status
from ckptstore.parallel import Stop
from ckptstore.store import CheckpointStore
from tests import faults, trees
from tests.test_push_pull import EXPORT, add_big_file, bring, same, send
from tests.test_remote_looking import sealed_run
from tests.test_server_digests import without_awscrt  # noqa: F401

PART = sending.PART_BYTES


@pytest.fixture
def large(tmp_path) -> Path:
    """A file of three parts, in a run that is sealed."""
    run = sealed_run(tmp_path, (46,))
    path = add_big_file(run, 40)
    trees.set_age(path.parent, 3600)
    CheckpointStore(run).seal(46)
    return path


@pytest.fixture
def run(large, tmp_path) -> Path:
    return large.parent.parent.parent


@pytest.fixture
def uploads(s3) -> S3Multipart:
    found, why = conditions.find_uploads(open_backend(s3))
    assert found is not None, why
    return found


def begin(uploads: S3Multipart, path: Path, *parts: bytes) -> Upload:
    """An upload to the file's key that was cut short after these parts."""
    upload = uploads.begin(f"{EXPORT}/{path.name}")
    for number, data in enumerate(parts, start=1):
        uploads.put(upload, number, data, crc64=native.crc64(data), stop=Stop())
    return upload


def parts_of(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[start : start + PART] for start in range(0, len(data), PART)]


def arrived(s3: str, run: Path, there: Path) -> bool:
    """It is committed, the store's digests are right, and it comes back as it was."""
    assert [found.status for found in CheckpointStore(s3)] == [Status.COMMITTED]
    assert CheckpointStore(s3).verify(46, Level.SERVER).ok
    bring(s3, there)
    return same(run / EXPORT, there / EXPORT)


def test_right_parts_are_not_sent_again(uploads, s3, run, large, tmp_path):
    parts = parts_of(large)
    begin(uploads, large, *parts[:2])
    sent = send(run, s3)
    assert sent[0].there_bytes == 2 * PART
    assert arrived(s3, run, tmp_path / "there")
    assert uploads.unfinished(f"{EXPORT}/{large.name}") == []


@pytest.mark.parametrize("wrong", ["flipped", "shorter"])
def test_a_wrong_part_is_sent_again(uploads, s3, run, large, tmp_path, wrong):
    first, second, _ = parts_of(large)
    bad = bytes([second[0] ^ 1]) + second[1:] if wrong == "flipped" else second[: PART // 2]
    begin(uploads, large, first, bad)
    sent = send(run, s3)
    assert sent[0].there_bytes == PART
    assert arrived(s3, run, tmp_path / "there")


def test_an_upload_of_other_content_is_left_alone(uploads, s3, run, large, tmp_path):
    other = begin(uploads, large, os.urandom(PART), os.urandom(PART))
    sent = send(run, s3)
    assert sent[0].there_bytes == 0
    assert arrived(s3, run, tmp_path / "there")
    assert [upload.upload_id for upload in uploads.unfinished(f"{EXPORT}/{large.name}")] == [other.upload_id]
    assert len(uploads.parts(other)) == 2


def test_an_upload_with_more_parts_than_the_file(uploads, s3, run, large, tmp_path):
    begin(uploads, large, *parts_of(large), b"more")
    assert send(run, s3)[0].there_bytes == 0
    assert arrived(s3, run, tmp_path / "there")


def test_a_store_that_tells_no_digests(uploads, s3, run, large, tmp_path):
    """A part counts by its MD5 then."""
    plain = S3Multipart(uploads._control, digests=False)
    first, second, _ = parts_of(large)
    begin(plain, large, first, bytes([second[0] ^ 1]) + second[1:])
    with pytest.MonkeyPatch.context() as planted:
        planted.setattr(conditions, "find_uploads", lambda target: (plain, ""))
        assert send(run, s3)[0].there_bytes == PART
    bring(s3, tmp_path / "there")
    assert same(run / EXPORT, tmp_path / "there" / EXPORT)


@pytest.mark.parametrize("kind", ["error_in_200", "lost", "internal"])
def test_a_complete_that_is_answered_wrongly_once(uploads, seaweed, s3, run, large, tmp_path, monkeypatch, kind):
    """`lost`: the object is made, and the second try finds no such upload."""
    proxy = faults.Proxy(seaweed.port)
    meant = faults.always(kind, "POST", "uploadId=")
    proxy.choose = lambda request: meant(request) if large.name in request.path and not proxy.hit else ""
    try:
        with monkeypatch.context() as through:
            through.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            send(run, s3)
    finally:
        proxy.close()
    assert proxy.hit == [kind]
    assert sum("partNumber=" in request.path for request in proxy.seen) == 3  # none twice
    assert arrived(s3, run, tmp_path / "there")
    assert uploads.unfinished(f"{EXPORT}/{large.name}") == []


def test_without_the_extra_a_file_starts_over_and_push_says_so(s3, run, large, without_awscrt):  # noqa: F811
    sent = send(run, s3)
    assert any("starts over" in note for note in sent[0].notes)
    assert [found.status for found in CheckpointStore(s3)] == [Status.COMMITTED]
