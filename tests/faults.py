"""A loopback proxy that does to HTTP what networks and overloaded stores do: one request in so many goes wrong."""

from __future__ import annotations

import contextlib
import math
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptstore.backends import stalls

#: What can happen to a request. `lost` and `reset` differ in whether the server ever saw it.
KINDS = ("reset", "lost", "cut", "stall", "slowdown", "internal", "flip", "flip_up", "error_in_200")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


def listen(serve: Callable[[socket.socket], None]) -> socket.socket:
    """A socket on a free port; each connection to it is served on a thread of its own, until it is closed."""
    listening = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            stalls.pass_over(client)  # the watch of a command looks at all of a process, and this side is no command's
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listening


@dataclass
class Request:
    method: str
    path: str
    head: bytes
    body: bytes


#: Says what happens to a request: one of KINDS, or "" for nothing.
Choose = Callable[[Request], str]


@dataclass
class Proxy:
    """Listens on `port` and passes everything to `server_port`, except what `choose` says."""

    server_port: int
    choose: Choose = field(default=lambda request: "")
    #: For kind "instead": what the client gets, and the server never sees the request.
    instead: Callable[[Request], bytes] = field(default=lambda request: response(b"200 OK", b""))
    #: Of the first request whose head has this in it, nothing more is taken.
    stops_taking: bytes = b""
    #: Headers that the server's answers lose, in lower case.
    unsaid: tuple[bytes, ...] = ()
    hit: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._socket = listen(self._serve)
        self.port = self._socket.getsockname()[1]

    def close(self) -> None:
        self._ended.set()
        self._socket.close()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            request = _read_request(client, self._before_body)
            if request is None:
                return
            kind = self.choose(request)
            self.seen.append(request)
            if kind:
                self.hit.append(kind)
            if kind == "stall":
                self._ended.wait(30)
            elif kind == "reset":
                _reset(client)
            elif kind in ("slowdown", "internal"):
                status, body = (b"503 Slow Down", SLOW_DOWN) if kind == "slowdown" else (b"500 Internal Server Error", INTERNAL)
                client.sendall(response(status, body))
            elif kind == "instead":
                client.sendall(self.instead(request))
            elif kind == "error_in_200":
                client.sendall(response(b"200 OK", INTERNAL))
            else:
                body = _flipped(request.body) if kind == "flip_up" else request.body
                answer = self._ask(request.head, body)
                head, _, data = answer.partition(b"\r\n\r\n")
                if kind == "lost":
                    _reset(client)
                elif kind == "cut":
                    client.sendall((head + b"\r\n\r\n" + data)[: len(head) + 4 + len(data) // 2])
                    _reset(client)
                else:
                    client.sendall(head + b"\r\n\r\n" + (_flipped(data) if kind == "flip" else data))

    def _before_body(self, head: bytes) -> None:
        if self.stops_taking and self.stops_taking in head and "takes nothing" not in self.hit:
            self.hit.append("takes nothing")
            self._ended.wait(30)

    def _ask(self, head: bytes, body: bytes) -> bytes:
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        with socket.create_connection(("127.0.0.1", self.server_port)) as server:
            stalls.pass_over(server)
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            parts = []
            while data := server.recv(1 << 20):
                parts.append(data)
        head, _, data = b"".join(parts).partition(b"\r\n\r\n")
        kept = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", *self.unsaid))]
        return b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n" + data


def at_random(kinds: tuple[str, ...], share: float, seed: int) -> Choose:
    """`share` of all requests go wrong, each in one of the ways; the same ones for the same seed, as far as threads allow."""
    dice = random.Random(seed)
    lock = threading.Lock()

    def choose(request: Request) -> str:
        with lock:
            kind = dice.choice(kinds) if dice.random() < share else ""
        return kind if _possible(kind, request) else ""

    return choose


def always(kind: str, method: str = "", ending: str = "") -> Choose:
    """All requests of a method, for a path with this in it."""

    def choose(request: Request) -> str:
        meant = (not method or request.method == method) and ending in request.path
        return kind if meant and _possible(kind, request) else ""

    return choose


def _possible(kind: str, request: Request) -> bool:
    if kind == "error_in_200":  # what S3 does to a Complete that takes long
        return request.method == "POST" and "uploadId" in request.path
    if kind == "flip_up":
        return len(request.body) > 64 and request.method == "PUT"
    if kind == "flip":
        return request.method == "GET" and "list-type" not in request.path
    return True


def _read_request(client: socket.socket, before_body: Callable[[bytes], None] = lambda head: None) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(1 << 16)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    before_body(head)
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    length = next((int(value) for name, value in fields.items() if name.lower() == b"content-length"), 0)
    parts = [body]
    missing = length - len(body)
    while missing > 0:
        more = client.recv(min(missing, 1 << 20))
        if not more:
            return None
        parts.append(more)
        missing -= len(more)
    method, path, _ = head.split(b" ", 2)
    return Request(method.decode(), path.decode(), head, b"".join(parts))


def response(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


def _flipped(data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class Pace:
    """So many bytes a second, and no more."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._due_s = 0.0

    def wait(self, count_bytes: int) -> None:
        with self._lock:
            now_s = time.monotonic()
            self._due_s = max(self._due_s, now_s) + count_bytes / self._bytes_per_s
            left_s = self._due_s - now_s
        if left_s > 0.001:
            time.sleep(left_s)


@dataclass
class Meter:
    """Passes TCP to a port and counts the bytes of each way, headers and all: what really went over the wire.

    As slow as a line that gives each connection so much, or all of them together. From `hold_at_bytes` on nothing goes up:
    who sends is surely in the middle of it.
    """

    server_port: int
    each_bytes_per_s: float = math.inf
    together_bytes_per_s: float = math.inf
    hold_at_bytes: float = math.inf
    up_bytes: int = 0
    down_bytes: int = 0
    ends: list[socket.socket] = field(default_factory=list)  #: of all connections that were made

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._all = Pace(self.together_bytes_per_s)
        self._socket = listen(self._serve)
        self.port = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server_port)) as server:
            self.ends += (client, server)
            back = threading.Thread(target=self._pass, args=(server, client), kwargs={"up": False}, daemon=True)
            back.start()
            self._pass(client, server, up=True)
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket, *, up: bool) -> None:
        mine = Pace(self.each_bytes_per_s)
        slow = math.isfinite(min(self.each_bytes_per_s, self.together_bytes_per_s))
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 15 if slow else 1 << 18):
                with self._lock:
                    if up:
                        self.up_bytes += len(data)
                    else:
                        self.down_bytes += len(data)
                mine.wait(len(data))
                self._all.wait(len(data))
                while up and self.up_bytes >= self.hold_at_bytes:
                    time.sleep(0.002)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
