"""The same on servers of other kinds: an old S3, Azure's blobs, Google's by gcsfs. Run by ./run soak."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptstore import parallel
from ckptstore.backends import connections, open_backend
from ckptstore.backends.s3control import control
from ckptstore.backends.s3multipart import GoneError, multipart
from ckptstore.errors import AlreadyExistsError
from ckptstore.model import MANIFEST_NAME
from ckptstore.store import CheckpointStore
from tests import commands, faults, other_servers, servers, trees
from tests.other_servers import Running
from tests.test_push_pull import EXPORT, add_big_file, same
from tests.test_remote_looking import sealed_run
from tests.test_wire import OVERHEAD_BYTES, transfer

pytestmark = pytest.mark.soak


@dataclass
class Place:
    """A URL of its own on one server, and what a process needs to use it."""

    server: Running
    url: str
    env: dict[str, str]

    def run(self, *words: object) -> commands.Result:
        done = commands.spawn(*words, env=self.env)
        assert done.code == 0, (words, done.out, done.err)
        return done


@pytest.fixture(scope="module", params=sorted(other_servers.START))
def server(request, tmp_path_factory):
    with other_servers.started(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture(scope="module")
def ceph(tmp_path_factory):
    with other_servers.started("ceph", tmp_path_factory.mktemp("ceph-too")) as running:
        yield running


@pytest.fixture
def place(server, tmp_path):
    return Place(server, f"{server.url}/{tmp_path.name}/run", commands.environment(**server.env))


@pytest.fixture
def run(tmp_path) -> Path:
    """A sealed export with a file of several parts, and a younger one that is not sealed."""
    path = sealed_run(tmp_path)
    trees.set_age(add_big_file(path).parent, 3600)
    CheckpointStore(path).seal(46)
    return path


def test_there_and_back(place, run, tmp_path):
    """push, list, verify, pull, and setup from there on a machine that has lost its disk; nothing is sent twice."""
    sent = place.run("push", "46", "--run", run, "--to", place.url, "--json").json
    assert sent["parts"][0]["sent_bytes"] == CheckpointStore(run).get(46).size_bytes
    again = place.run("push", "46", "--run", run, "--to", place.url, "--json").json
    assert (again["parts"][0]["sent_bytes"], again["parts"][0]["committed_before"]) == (0, True)
    (found,) = place.run("list", "--run", place.url, "--json").json["checkpoints"]
    assert (found["step"], found["status"]) == (46, "COMMITTED")
    for level in ("quick", "structure", "full"):
        assert place.run("verify", "46", "--run", place.url, "--level", level, "--json").json["ok"] is True
    there = tmp_path / "there/trial0"
    fetched = place.run("pull", "46", "--from", place.url, "--to", there, "--json").json
    assert fetched["parts"][0]["manifest_sha256"] == sent["parts"][0]["manifest_sha256"]
    assert same(run / EXPORT, there / EXPORT)
    shutil.rmtree(run)
    words = ("--as-is", "--force", "--json")
    done = place.run("setup", "--run", run, "--from", place.url, *words).json
    assert (done["done"], done["checkpoint"]["step"]) == (True, 46)
    slot = CheckpointStore(run).scan().slot
    assert slot is not None
    assert slot.step == 46
    assert (run / "default/recover_checkpoint/model.safetensors").read_bytes() == (
        there / EXPORT / "model.safetensors"
    ).read_bytes()


def test_a_flipped_bit_there_is_found(place, run, tmp_path):
    place.run("push", "46", "--run", run, "--to", place.url)
    program = (
        "import sys\nfrom ckptstore import open_backend\nb = open_backend(sys.argv[1])\n"
        "data = bytearray(b.get(sys.argv[2]))\ndata[-5] ^= 1\nb.put(sys.argv[2], data)\nb.put(sys.argv[3], b.get(sys.argv[3]))"
    )
    key = f"{EXPORT}/optim_world_size_1_rank_0.pt"
    subprocess.run([sys.executable, "-c", program, place.url, key, f"{EXPORT}/{MANIFEST_NAME}"], env=place.env, check=True)
    assert commands.spawn("verify", "46", "--run", place.url, env=place.env).code == 3
    done = commands.spawn("pull", "46", "--from", place.url, "--to", tmp_path / "there/trial0", env=place.env)
    assert done.code == 3
    assert not (tmp_path / "there/trial0" / EXPORT).exists()


def test_many_keys(place):
    """More than one page of a listing."""
    program = (
        "import sys\nfrom concurrent.futures import ThreadPoolExecutor\nfrom ckptstore import open_backend\n"
        "b = open_backend(sys.argv[1])\nnames = [f'many/k{n:05}' for n in range(2300)]\n"
        "list(ThreadPoolExecutor(16).map(lambda n: b.put(n, b'x'), names))\n"
        "assert sorted(blob.key for blob in b.list('many')) == names\nassert list(b.list('man')) == []"
    )
    subprocess.run([sys.executable, "-c", program, place.url], env=place.env, check=True, timeout=200)


def test_one_creator_wins(server, tmp_path, monkeypatch):
    """What the backend says of its store: sixteen at once, one is told that it created."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    backend = open_backend(f"{server.url}/{tmp_path.name}/race")
    if not backend.creates_atomically:
        pytest.skip("it promises nothing, and push says so")
    for number in range(5):
        won: list[int] = []
        go = threading.Barrier(16)

        def create(me: int, number: int = number, won: list[int] = won, go: threading.Barrier = go) -> None:
            go.wait()
            try:
                backend.put(f"key-{number}", str(me).encode(), if_absent=True)
            except AlreadyExistsError:
                return
            won.append(me)

        threads = [threading.Thread(target=create, args=(me,)) for me in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert backend.get(f"key-{number}") == str(won[0]).encode()


def test_an_old_s3_takes_what_was_damaged_on_its_way(ceph, run, tmp_path):
    """It ignores the checksum that travels with each part: only reading finds it, and that it does."""
    proxy = faults.Proxy(ceph.port, faults.always("flip_up", "PUT", "optim"))
    url = f"{ceph.url}/{tmp_path.name}/damaged"
    env = commands.environment(**servers.environment(proxy.port))
    try:
        pushed = commands.spawn("push", "46", "--run", run, "--to", url, env=env)
    finally:
        proxy.close()
    assert "flip_up" in proxy.hit
    assert pushed.code == 0, pushed.err
    assert commands.spawn("verify", "46", "--run", url, env=commands.environment(**ceph.env)).code == 3


def test_an_old_s3_goes_on_by_etags(ceph, tmp_path, monkeypatch):
    """It keeps no digest: a part counts by the MD5 of our bytes. What kill -9 leaves of one file is not sent again."""
    run = sealed_run(tmp_path, (46,))
    trees.set_age(add_big_file(run, 320).parent, 3600)
    CheckpointStore(run).seal(46)
    total = CheckpointStore(run).get(46).size_bytes
    for name, value in ceph.env.items():
        monkeypatch.setenv(name, value)
    meter = faults.Meter(ceph.port)
    url = f"{ceph.url}/{tmp_path.name}/etags"
    words = ["push", "46", "--run", run, "--to", url]
    try:
        assert transfer(meter, words, kill_when=lambda: meter.up_bytes > total * 0.7) == -signal.SIGKILL
        first = meter.up_bytes
        backend = open_backend(url)
        uploads = multipart(control(backend), digests=False)
        (upload,) = control(backend).uploads()
        parts = uploads.parts(upload)
        assert len(parts) > 2
        wrong = bytes(parts[0].size_bytes)
        uploads.put(upload, 1, connections.whole(wrong), crc64=0, stop=parallel.Stop())
        there = sum(part.size_bytes for part in parts[1:])
        small = total - (run / EXPORT / "optim_world_size_1_rank_0.pt").stat().st_size
        env = commands.environment(**ceph.env)
        (would,) = commands.spawn(*words, "--dry-run", "--json", env=env).json["parts"]
        assert there <= would["there_bytes"] <= there + small
        assert would["sent_bytes"] + would["there_bytes"] == total
        assert sorted(uploads.parts(upload))[1:] == parts[1:]
        assert transfer(meter, words) == 0
    finally:
        meter.close()
    assert meter.up_bytes - first <= total - there + OVERHEAD_BYTES
    done = commands.spawn("verify", "46", "--run", url, env=commands.environment(**ceph.env))
    assert done.code == 0, done.out
    assert list(control(backend).uploads()) == []
    begun = uploads.begin("gone")
    part = uploads.put(begun, 1, connections.whole(wrong), crc64=0, stop=parallel.Stop())
    assert uploads.complete(begun, {1: part}, crc64=0, stop=parallel.Stop()) == ""
    assert uploads.holds("gone", len(wrong), {1: part}, crc64=0)
    assert not uploads.holds("gone", len(wrong), {1: part._replace(etag="0" * 32)}, crc64=0)
    with pytest.raises(GoneError):
        uploads.put(begun, 2, connections.whole(b"late"), crc64=0, stop=parallel.Stop())
