"""A forward proxy, as companies have them: CONNECT for TLS, whole URLs for plain HTTP. Loopback only."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field

from tests.faults import listen


@dataclass
class ForwardProxy:
    """Listens on `port` and goes wherever it is told. With `user` ("name:password" in base64) it lets in nobody else."""

    user: str = ""
    seen: list[str] = field(default_factory=list)  #: what it was asked for: method and target

    def __post_init__(self) -> None:
        self._socket = listen(self._serve)
        self.port = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := client.recv(1 << 16)):
                    return
                data += more
            head = data.partition(b"\r\n\r\n")[0]
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.seen.append(f"{method} {target}")
            if self.user and f"proxy-authorization: basic {self.user}".encode().lower() not in head.lower():
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if method == "CONNECT":
                where, first, answer = target, b"", b"HTTP/1.1 200 Connection established\r\n\r\n"
            else:
                where, _, path = target.removeprefix("http://").partition("/")
                first, answer = data.replace(target.encode(), b"/" + path.encode(), 1), b""
            host, _, port = where.rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(answer)
                server.sendall(first)
                back = threading.Thread(target=_pass, args=(server, client), daemon=True)
                back.start()
                _pass(client, server)
                back.join()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
