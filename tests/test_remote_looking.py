"""list, show and verify of runs that lie in an object store, pushed by anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptstore import listing
from ckptstore.backends import Backend, open_backend
from ckptstore.manifest import parse
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.native import FileSpec, digest_files
from ckptstore.store import CheckpointStore
from ckptstore.verify import verify
from tests import commands, trees


def sealed_run(folder: Path, steps: tuple[int, ...] = (46, 93)) -> Path:
    run = trees.make_run(folder, steps=steps)
    trees.set_age(run / "default", 3600)
    for step in steps:
        CheckpointStore(run).seal(step)
    return run


def upload(run: Path, backend: Backend, *, manifest_last: bool = True, but: tuple[str, ...] = ()) -> None:
    """As a plain copying tool would: every file, times lost."""
    keys = [str(path.relative_to(run)) for path in sorted(run.rglob("*")) if path.is_file()]
    for key in sorted(keys, key=lambda key: (key.endswith(MANIFEST_NAME) == manifest_last, key)):
        if not key.endswith(but or ("\0",)):
            backend.put(key, (run / key).read_bytes())


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"memory://looking-{tmp_path.name}-{os.getpid()}"


class Counting:
    """A backend that counts what is asked of another."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        value = getattr(self.inner, name)
        if callable(value):
            self.asked.append(name)
        return value


def test_list_committed(url, tmp_path):
    """One LIST and no GET for checkpoints whose manifest came last."""
    run = sealed_run(tmp_path)
    upload(run, open_backend(url))
    backend = Counting(open_backend(url))
    found = listing.scan(backend)
    assert [(c.step, c.status) for c in found.checkpoints] == [(46, Status.COMMITTED), (93, Status.COMMITTED)]
    assert backend.asked.count("get") == 0
    assert backend.asked.count("tree") + backend.asked.count("list") == 1
    local = listing.scan(open_backend(run))
    assert [c.size_bytes for c in found.checkpoints] == [c.size_bytes for c in local.checkpoints]
    assert found.checkpoints[0].parts[0].path == f"{url}/default/{trees.folder_name(46)}"


@pytest.mark.parametrize("level", [Level.QUICK, Level.STRUCTURE, Level.FULL])
def test_verify_committed(url, tmp_path, level):
    run = sealed_run(tmp_path)
    upload(run, open_backend(url))
    backend = open_backend(url)
    for checkpoint in listing.scan(backend).checkpoints:
        report = verify(backend, checkpoint, level)
        assert report.checkpoint.status is Status.COMMITTED, report.findings
        assert report.manifest_sha256 == verify(open_backend(run), CheckpointStore(run).get(checkpoint.step)).manifest_sha256


def test_without_manifest(url, tmp_path):
    """What rclone and `aws s3 sync` upload: COMPLETE, and every byte read."""
    run = trees.make_run(tmp_path, steps=(46, 93), slot="dcp", recover_info=93, slot_step=93)
    upload(run, open_backend(url))
    backend = open_backend(url)
    found = listing.scan(backend)
    assert [c.status for c in found.checkpoints] == [Status.COMPLETE] * 2
    assert found.slot is not None
    assert (found.slot.step, found.slot.status) == (93, Status.COMPLETE)
    report = verify(backend, found.checkpoints[0], Level.FULL)
    assert report.ok
    assert report.bytes_read == found.checkpoints[0].size_bytes
    assert any("no manifest" in note for note in report.notes)


def test_manifest_before_its_files(tmp_path):
    """A tool that copies in any order: until all is there it is not COMMITTED, whatever the manifest says."""
    url = f"memory://early-{tmp_path.name}-{os.getpid()}"
    run = sealed_run(tmp_path, (46,))
    upload(run, open_backend(url), manifest_last=False, but=("tokenizer.json",))
    backend = open_backend(url)
    assert listing.scan(backend).checkpoints[0].status is Status.PARTIAL
    key = f"default/{trees.folder_name(46)}/tokenizer.json"
    backend.put(key, (run / key).read_bytes())
    checkpoint = listing.scan(backend).checkpoints[0]
    assert checkpoint.status is Status.COMMITTED
    assert verify(backend, checkpoint, Level.FULL).checkpoint.status is Status.COMMITTED


def test_a_missing_file_is_found(url, tmp_path):
    """One that no other sign needs: quick verification reads the manifest, a listing does not."""
    run = sealed_run(tmp_path, (46,))
    upload(run, open_backend(url), but=("generation_config.json",))
    backend = open_backend(url)
    report = verify(backend, listing.scan(backend).checkpoints[0], Level.QUICK)
    assert report.checkpoint.status is Status.PARTIAL
    assert "generation_config.json" in str(report.findings[0])


def test_a_torn_file_is_found(url, tmp_path):
    run = sealed_run(tmp_path, (46,))
    upload(run, open_backend(url))
    backend = open_backend(url)
    key = f"default/{trees.folder_name(46)}"
    backend.put(f"{key}/merges.txt", b"#")
    backend.put(f"{key}/{MANIFEST_NAME}", backend.get(f"{key}/{MANIFEST_NAME}"))
    report = verify(backend, listing.scan(backend).checkpoints[0], Level.QUICK)
    assert report.checkpoint.status is Status.CORRUPT


def test_a_file_that_is_not_listed_voids_the_manifest(url, tmp_path):
    run = sealed_run(tmp_path, (46,))
    upload(run, open_backend(url))
    backend = open_backend(url)
    key = f"default/{trees.folder_name(46)}"
    backend.put(f"{key}/extra.txt", b"#")
    backend.put(f"{key}/{MANIFEST_NAME}", backend.get(f"{key}/{MANIFEST_NAME}"))
    assert verify(backend, listing.scan(backend).checkpoints[0], Level.QUICK).checkpoint.status is Status.COMPLETE


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_flipped_bit_is_found(url, tmp_path, position):
    """Stored wrong: only reading finds it, and says where."""
    run = sealed_run(tmp_path, (46, 93))
    backend = open_backend(url)
    key = f"default/{trees.folder_name(46)}/merges.txt"
    upload(run, backend)
    data = bytearray((run / key).read_bytes() * 10)
    (run / key).write_bytes(data)
    trees.set_age(run / "default", 3600)
    CheckpointStore(run).seal(46)
    data[position] ^= 4
    backend.put(key, data)
    manifest = f"default/{trees.folder_name(46)}/{MANIFEST_NAME}"
    backend.put(manifest, (run / manifest).read_bytes())
    first, second = listing.scan(backend).checkpoints
    assert verify(backend, first, Level.STRUCTURE).ok
    report = verify(backend, first, Level.FULL)
    assert report.checkpoint.status is Status.CORRUPT
    assert "merges.txt" in str(report.findings[0])
    assert verify(backend, second, Level.FULL).ok


def test_large_files_in_chunks(url, tmp_path):
    """More than one request and chunk a file; the digests are the engine's own, and a flipped bit in the middle is found."""
    from ckptstore.transfer.fetching import Wanted, fetch

    data = os.urandom((40 << 20) + 12345)
    (tmp_path / "big").write_bytes(data)
    backend = open_backend(url)
    backend.put("x/big", data)
    for chunk_bytes in (4096 * 300, 8 << 20, 24 << 20, 64 << 20):
        wanted = digest_files(tmp_path, [FileSpec("big", len(data))], chunk_bytes=chunk_bytes)["big"]
        seen: list[tuple[int, int]] = []
        files = [Wanted("big", "x/big", len(data), wanted.chunks)]
        assert fetch(
            backend, files, chunk_bytes=chunk_bytes, sink=lambda _, offset, data, seen=seen: seen.append((offset, len(data)))
        ) == {"big": wanted}
        assert sum(length for _, length in seen) == len(data)
        have = dict(list(enumerate(wanted.chunks))[1:2])
        seen.clear()
        files = [Wanted("big", "x/big", len(data), wanted.chunks, have)]
        assert fetch(
            backend, files, chunk_bytes=chunk_bytes, sink=lambda _, offset, data, seen=seen: seen.append((offset, len(data)))
        ) == {"big": wanted}
        assert sum(length for _, length in seen) == len(data) - (min(chunk_bytes, len(data) - chunk_bytes) if have else 0)
        wrong = list(wanted.chunks)
        wrong[-1] ^= 1
        error = fetch(backend, [Wanted("big", "x/big", len(data), wrong)], chunk_bytes=chunk_bytes)["big"]
        assert getattr(error, "offset_bytes", None) == (len(wrong) - 1) * chunk_bytes


def test_command_line(url, tmp_path, capfd, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    if "s3" not in url and not url.startswith("memory"):
        raise AssertionError(url)
    run = sealed_run(tmp_path)
    upload(run, open_backend(url))
    found = commands.invoke(capfd, "list", "--run", url, "--json").json
    assert [c["status"] for c in found["checkpoints"]] == ["COMMITTED", "COMMITTED"]
    assert found["run"]["path"] == url
    table = commands.invoke(capfd, "list", "--run", f"{url}/").out
    assert table.count("COMMITTED") == 2
    assert url in table
    shown = commands.invoke(capfd, "show", "93", "--run", url, "--json").json
    manifest = parse((run / "default" / trees.folder_name(93) / MANIFEST_NAME).read_bytes())
    assert shown["parts"][0]["manifest_sha256"] == manifest.sha256
    done = commands.invoke(capfd, "verify", "--run", url, "--json", "--expect-digest", manifest.sha256, "93")
    assert (done.code, done.json["ok"], done.json["pinned"]) == (0, True, True)
    assert commands.invoke(capfd, "verify", "--run", url).code == 0
    key = f"default/{trees.folder_name(93)}/tokenizer.json"
    open_backend(url).put(key, bytes(len((run / key).read_bytes())))
    assert commands.invoke(capfd, "verify", "93", "--run", url).code == 3
    assert not (tmp_path / "damaged.json").exists()


def test_no_such_place(url, capfd, tmp_path, monkeypatch):
    commands.isolate(monkeypatch, tmp_path)
    done = commands.invoke(capfd, "list", "--run", f"{url}/nowhere")
    assert done.code == 1
    assert "nothing below" in done.err
