"""What dead pushes leave in a bucket, and what `clean --run URL` makes of it."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckptstore import listing
from ckptstore.backends import open_backend
from ckptstore.backends.s3control import control
from ckptstore.cli import clean as clean_cli
from ckptstore.errors import NotFoundError
from ckptstore.model import CLAIM_NAME, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer import claims, conditions, leftovers, sending
from ckptstore.transfer import push as pushing
from ckptstore.verify import verify
from tests import commands, faults, trees
from tests.test_push_pull import EXPORT, crash, keys, send
from tests.test_remote_looking import sealed_run
from tests.test_server_digests import begin_upload


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://left-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def run(tmp_path):
    return sealed_run(tmp_path)


def die(run, url, monkeypatch, step=46, at=None):
    """A push that is killed before its manifest."""
    with monkeypatch.context() as planted:
        planted.setattr(*((pushing._Push, at) if at else (claims.Place, "publish")), lambda self: crash())
        with pytest.raises(KeyboardInterrupt):
            send(run, url, step)


AT_ONCE = -2.0  #: what is written now is old: stores keep whole seconds


def clean(url, older_than_s=AT_ONCE):
    """All that went, by name."""
    backend = open_backend(url)
    return {one.name: leftovers.remove(backend, one) for one in leftovers.look(backend, older_than_s=older_than_s).leftovers}


def test_a_dead_push_goes_and_a_committed_one_stays(url, run, monkeypatch):
    send(run, url, 93)
    committed = keys(url)
    die(run, url, monkeypatch)
    assert len(keys(url)) > len(committed)
    assert clean(url) == {f"{EXPORT}/": True}
    assert keys(url) == committed
    backend = open_backend(url)
    assert verify(backend, listing.scan(backend).checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED
    assert send(run, url)[0].committed_before is False
    assert clean(url) == {}


def test_half_a_file_of_a_dead_push_goes(run, tmp_path, monkeypatch):
    """Where a file is written under a name of its own first: beside a dead claim, and beside what counts."""

    class Killed(Exception):
        """Nothing is renamed, or tidied up."""

    def killed(*words):
        raise Killed

    url = f"memory://drafts-{tmp_path.name}-{os.getpid()}"
    with monkeypatch.context() as planted:
        planted.setattr(sending, "part_size", lambda size_bytes: 1000)
        rm_file = MemoryFileSystem.rm_file
        planted.setattr(MemoryFileSystem, "mv", killed)
        planted.setattr(MemoryFileSystem, "rm_file", lambda fs, path: rm_file(fs, path) if "probe" in path else killed())
        with pytest.raises(Killed):
            send(run, url)
    drafts = [key for key in keys(url) if re.search(r"/\.ckptstore\.manifest\.[0-9a-f]{16}$", key)]
    assert drafts
    assert clean(url, older_than_s=3600) == {}
    send(run, url, 93)
    other = f"default/{trees.folder_name(93)}/{drafts[0].rpartition('/')[2]}"
    open_backend(url).put(other, b"half")
    (one,) = [one for one in leftovers.look(open_backend(url), older_than_s=AT_ONCE).leftovers if one.folder]
    assert one.others == ()
    assert {*drafts, other} < clean(url).keys()  # and the claim, with what files had arrived
    assert keys(url) == [key for key in keys(url) if ".ckptstore.manifest." not in key and EXPORT not in key]


def test_what_is_young_stays(url, run, monkeypatch):
    die(run, url, monkeypatch)
    before = keys(url)
    assert clean(url, older_than_s=3600) == {}
    assert keys(url) == before


def test_a_claim_beside_a_manifest(url, run):
    """Its push was killed after the commit: the claim goes, and nothing else."""
    send(run, url)
    before = keys(url)
    open_backend(url).put(f"{EXPORT}/{CLAIM_NAME}", json.dumps({"files": ["model.safetensors"]}).encode())
    assert clean(url) == {f"{EXPORT}/{CLAIM_NAME}": True}
    assert keys(url) == before


@pytest.mark.parametrize("claim", [None, b"no json", b"[]", b'{"files": 7}', b"[" * 100_000])
def test_files_of_others_stay(url, run, monkeypatch, claim):
    """In a dead push's prefix; and all files, where nothing says which the push brought."""
    die(run, url, monkeypatch)
    backend = open_backend(url)
    files = set(keys(url)) - {f"{EXPORT}/{CLAIM_NAME}"}
    backend.put(f"{EXPORT}/notes.txt", b"mine")
    if claim is not None:
        backend.put(f"{EXPORT}/{CLAIM_NAME}", claim)
    found = leftovers.look(backend, older_than_s=AT_ONCE)
    assert "notes.txt" in found.notes[-1] or claim is not None
    assert "stay" in found.notes[-1]
    assert all(leftovers.remove(backend, one) for one in found.leftovers)
    assert set(keys(url)) == {f"{EXPORT}/notes.txt"} | (files if claim is not None else set())


def test_a_run_that_others_uploaded_is_not_looked_at(url, run):
    """No claim of ours, no leftover: whatever it looks like."""
    backend = open_backend(url)
    backend.put(f"{EXPORT}/model.safetensors", b"half")
    backend.put(f"{EXPORT}/config.json.tmp", b"half")
    assert clean(url) == {}
    assert len(keys(url)) == 2


def test_scratch_keys(url, run):
    """A push was killed while it tried the store."""
    key = f"{conditions.PROBE}0123456789abcdef"
    open_backend(url).put(key, b"1")
    assert clean(url, older_than_s=3600) == {}
    assert clean(url) == {key: True}
    assert keys(url) == []


def test_somebody_comes_back_meanwhile(url, run, monkeypatch):
    """Between the look and the removal the push goes on: it stays, and commits."""
    die(run, url, monkeypatch)
    backend = open_backend(url)
    found = leftovers.look(backend, older_than_s=AT_ONCE)
    assert len(found.leftovers) == 1
    assert send(run, url)[0].committed_before is False
    assert not leftovers.remove(backend, *found.leftovers)
    assert verify(backend, listing.scan(backend).checkpoints[0], Level.FULL).checkpoint.status is Status.COMMITTED


def test_a_push_that_goes_on_is_young_again(url, run, monkeypatch):
    """From its first step on, before it has sent anything."""
    die(run, url, monkeypatch)
    before = {blob.key: blob.mtime_ns for blob in open_backend(url).list()}
    time.sleep(1.1 if "s3" in url else 0.01)  # this server's times are whole seconds
    die(run, url, monkeypatch, at="_look_again")
    after = {blob.key: blob.mtime_ns for blob in open_backend(url).list()}
    assert [key for key in after if after[key] != before[key]] == [f"{EXPORT}/{CLAIM_NAME}"]


# --- unfinished uploads ------------------------------------------------------------------------------------------


def test_unfinished_uploads_go(seaweed, s3, run):
    """Those below the run's prefix alone; and never anything of a checkpoint."""
    send(run, s3)
    before = keys(s3)
    begun = {f"{EXPORT}/model.safetensors": begin_upload(seaweed, f"{s3}/{EXPORT}/model.safetensors")}
    other = begin_upload(seaweed, f"{s3}x/{EXPORT}/model.safetensors")
    assert clean(s3, older_than_s=3600) == {}
    assert clean(s3) == dict.fromkeys(begun, True)
    assert list(control(open_backend(s3)).uploads()) == []
    assert [one.upload_id for one in control(open_backend(f"{s3}x")).uploads()] == [other]
    assert keys(s3) == before
    assert verify(open_backend(s3), listing.scan(open_backend(s3)).checkpoints[0], Level.SERVER).ok


UPLOADS = "<ListMultipartUploadsResult>{}</ListMultipartUploadsResult>"
UPLOAD = "<Upload><Key>{}</Key>{}<Initiated>2020-01-01T00:00:00Z</Initiated></Upload>"


@pytest.mark.parametrize("names", [False, True])
def test_uploads_that_cannot_be_ended(seaweed, s3, monkeypatch, names):
    """No id: to end one could be to remove the object. A key that no push has: it is not said to be removed."""
    proxy = faults.Proxy(seaweed.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    backend = open_backend(s3)
    backend.put("a/b", b"1")
    above = s3.removeprefix("s3://").partition("/")[2]
    upload = UPLOAD.format(f"{above}/a//b", "<UploadId>1</UploadId>") if names else UPLOAD.format(f"{above}/a/b", "")
    proxy.instead = lambda request: faults.response(b"200 OK", UPLOADS.format(upload).encode())
    proxy.choose = lambda request: "instead" if "max-uploads=1000" in request.path else ""
    try:
        assert clean(s3) == {}
        assert (leftovers.look(backend, older_than_s=1).notes == ()) == names
        assert "DELETE" not in {request.method for request in proxy.seen}
    finally:
        proxy.close()


def test_an_upload_in_progress_shows_that_a_push_lives(seaweed, s3, run, monkeypatch):
    """All its keys are old, since its one large file takes long."""
    die(run, s3, monkeypatch)
    backend = open_backend(s3)
    time.sleep(2.1)
    begin_upload(seaweed, f"{s3}/{EXPORT}/model.safetensors")
    assert leftovers.look(backend, older_than_s=1.5).leftovers == ()


def test_a_killed_upload_is_found(seaweed, s3, run, tmp_path):
    """What kill -9 in the middle of a large file leaves, for real."""
    from tests.test_faults import kill_after, start
    from tests.test_push_pull import add_big_file

    trees.set_age(add_big_file(run, 120).parent, 3600)
    CheckpointStore(run).seal(46)
    backend = open_backend(s3)
    process = start("push", "46", "--run", run, "--to", s3, seaweed=seaweed)
    while process.poll() is None and not any(upload.key.endswith(".pt") for upload in control(backend).uploads()):
        pass
    assert kill_after(process, 0.0)
    names = clean(s3)
    assert any(name.endswith(".pt") for name in names), names
    assert names.keys() & {f"{EXPORT}/", f"{EXPORT}/{CLAIM_NAME}"}, names  # the small files had come, or not yet
    assert keys(s3) == []
    assert list(control(backend).uploads()) == []


def test_a_clock_that_is_ahead(s3, run, monkeypatch):
    """The store's own clock counts: a live push must not look a week old."""
    die(run, s3, monkeypatch)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 30 * 86400 * 10**9)
    assert clean(s3, older_than_s=7 * 86400) == {}


# --- as people use it ----------------------------------------------------------------------------------------------


def test_command_line(seaweed, s3, run, capfd, tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    send(run, s3, 93)
    committed = keys(s3)
    die(run, s3, monkeypatch)
    begin_upload(seaweed, f"{s3}/{EXPORT}/model.safetensors")
    before = keys(s3)
    done = commands.invoke(capfd, "clean", "--run", s3)
    assert (done.code, "nothing to remove" in done.out, keys(s3)) == (0, True, before)
    monkeypatch.setattr(clean_cli, "SHORTEST_S", 0)
    time.sleep(1.1)
    would = commands.invoke(capfd, "clean", "--run", s3, "--older-than", "0m", "--dry-run", "--json").json
    assert (would["done"], keys(s3), len(list(control(open_backend(s3)).uploads()))) == (False, before, 1)
    assert {one["name"] for one in would["removed"]} == {f"{EXPORT}/", f"{EXPORT}/model.safetensors"}
    assert "would be removed" in commands.invoke(capfd, "clean", "--run", s3, "--older-than", "0m", "--dry-run").out
    done = commands.invoke(capfd, "clean", "--run", s3, "--older-than", "0m")
    assert (done.code, keys(s3)) == (0, committed)
    assert "a push cut short" in done.out
    assert list(control(open_backend(s3)).uploads()) == []


def test_without_the_extra(s3, run, capfd, tmp_path, monkeypatch):
    """Keys are cleaned all the same; it says what was not looked for."""
    import sys

    commands.isolate(monkeypatch, tmp_path)
    die(run, s3, monkeypatch)
    monkeypatch.setattr(clean_cli, "SHORTEST_S", 0)
    monkeypatch.setitem(sys.modules, "awscrt.auth", None)
    time.sleep(1.1)
    done = commands.invoke(capfd, "clean", "--run", s3, "--older-than", "0m")
    assert (done.code, keys(s3)) == (0, [])
    assert "ckptstore[s3]" in done.err.replace("\n", " ")


def test_what_is_no_s3_has_no_uploads_to_look_for(run, capfd, tmp_path, monkeypatch):
    """That is said, and no other verb named, which would find none either."""
    commands.isolate(monkeypatch, tmp_path)
    url = f"memory://no-s3-{tmp_path.name}-{os.getpid()}"
    send(run, url)
    done = commands.invoke(capfd, "clean", "--run", url)
    assert done.code == 0
    said = " ".join(done.err.split())
    assert "unfinished uploads were not looked for" in said
    assert "lifecycle" in said
    assert "verify" not in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--older-than", "1y"), "is no duration"),
        (("--older-than", "5m"), "less than an hour"),
        (("--older-than", "-7d"), "is no duration"),
        (("--old-slots",), "--old-slots"),
    ],
)
def test_usage(words, text, capfd, tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    done = commands.invoke(capfd, "clean", "--run", "memory://nowhere/run", *words)
    assert (done.code, text in done.err.replace("\n", " ")) == (2, True), done.err


def test_a_run_here_knows_no_age(run, capfd, tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    assert commands.invoke(capfd, "clean", "--run", run, "--older-than", "7d").code == 2
    assert commands.invoke(capfd, "clean", "--run", run, "--dry-run").code == 0


def test_nothing_there(url):
    with pytest.raises(NotFoundError):
        leftovers.look(open_backend(url), older_than_s=0)
