"""HTTP(S) connections that are kept between requests, as Python's own client makes them, for bodies that are large.

One request at a time each; as many as there are threads that ask at once. A body is made piece by piece, and each piece is
handed to the kernel as it is; a caller that shall stop ends within moments. No redirect is followed: a signature must not be
carried elsewhere. All stores of a process share them, so that those that are kept are as many as were once used at a time, and
no more. Proxies as the library's requests take (proxies.py); certificates by `$SSL_CERT_FILE`, and those given.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.client
import io
import math
import os
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptstore.backends import proxies, stalls
from ckptstore.parallel import Stop

if TYPE_CHECKING:
    from typing_extensions import Buffer

CONNECT_S = 5.0
LOOK_S = 0.2  #: how long nobody looks whether it shall stop
TLS_BYTES = 64 << 10  #: TLS says nothing of what it has sent before all of it has gone
LONGEST_ANSWER_S = 900.0  #: S3 sends spaces while it completes a large upload, for some minutes
MAX_ANSWER_BYTES = 16 << 20  #: a page of a listing has about one


class Body(NamedTuple):
    """What a request carries. `pieces` makes it anew each time that it is sent; what it raises ends the request."""

    size_bytes: int
    pieces: Callable[[], Iterable[Buffer]]


def whole(data: Buffer) -> Body:
    """A body that is all in memory."""
    return Body(memoryview(data).nbytes, lambda: (data,))


NOTHING = whole(b"")


class Request(NamedTuple):
    """What goes over the wire as it is. `target`: path and query. `headers` lack none but what a proxy needs."""

    scheme: str
    host: str  #: with its port
    method: str
    target: str
    headers: Mapping[str, str]
    body: Body = NOTHING


_Where = tuple[str, str, proxies.Proxy | None]  #: scheme, host and port, and through what


class Answer(NamedTuple):
    """Any status. Names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    waited_s: float = 0.0  #: from the end of the request to the end of the answer


class Connections:
    """Connections to wherever requests go. Thread-safe. Errors as http.client's: OSError and HTTPException; and as proxies'.

    `authorities`: a file of certificates, of those who may vouch for a server beside those that this machine trusts.
    """

    def __init__(self, authorities: str = "") -> None:
        self._authorities = authorities
        self._lock = threading.Lock()
        self._idle: list[tuple[_Where, http.client.HTTPConnection]] = []
        self._tls: ssl.SSLContext | None = None
        self._slowest_s = 0.0  #: of late, until a large body was answered

    def __del__(self) -> None:
        for _, connection in self._idle:
            connection.close()

    def ask(self, request: Request, *, timeout_s: float, stop: Stop, tried: int = 0) -> Answer:
        """Send it once, and read the answer. `timeout_s`: how long nothing may move. Stopped when told to `stop`.

        A large body is given up earlier, by the bounds of stalls.py, in whatever process. Its answer is waited for longer where
        others took long, and twice as long after each time that it was `tried`: a store that is slow is no connection that
        is dead, and to send it all again makes it slower.
        """
        large = _is_large(request)
        where = (request.scheme, request.host, proxies.choose(request.scheme, request.host))
        while True:
            connection, was_idle = self._take(where)
            try:
                answer_s = min(timeout_s, max(stalls.ANSWER_S * 2**tried, 2 * self._slowest_s)) if large else timeout_s
                answer = _exchange(connection, request, where[2], stop, timeout_s=timeout_s, answer_s=answer_s)
            except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                connection.close()
                if not was_idle:
                    raise
                continue  # the other side had closed it meanwhile
            except BaseException:
                connection.close()
                raise
            with self._lock:
                if large:
                    self._slowest_s = max(answer.waited_s, 0.9 * self._slowest_s)
                if connection.sock is not None:
                    self._idle.append((where, connection))
            return answer

    def _take(self, where: _Where) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            for number in reversed(range(len(self._idle))):
                if self._idle[number][0] == where:
                    connection = self._idle.pop(number)[1]
                    if not _has_ended(connection):
                        return connection, True
                    connection.close()
        return self._connect(*where), False

    def _connect(self, scheme: str, host: str, proxy: proxies.Proxy | None) -> http.client.HTTPConnection:
        reached, port = (host, None) if proxy is None else (proxy.host, proxy.port)
        if scheme != "https":
            return http.client.HTTPConnection(reached, port, timeout=CONNECT_S)
        if self._tls is None:
            context = ssl.create_default_context()
            if self._authorities:
                context.load_verify_locations(self._authorities)
            self._tls = context
        connection = http.client.HTTPSConnection(reached, port, timeout=CONNECT_S, context=self._tls)
        if proxy is not None:
            connection.set_tunnel(host, headers=proxy.headers)
        return connection


def shared(authorities: str = "") -> Connections:
    """Those of this process: a forked child has its own, since two on one connection would read each other's answers."""
    return _shared(os.getpid(), authorities, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _shared(process: int, authorities: str, *trusted: str | None) -> Connections:
    return Connections(authorities)


def _has_ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the other side has closed it, or said what nobody asked: then nothing more can be sent."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


def _exchange(
    connection: http.client.HTTPConnection,
    request: Request,
    proxy: proxies.Proxy | None,
    stop: Stop,
    *,
    timeout_s: float,
    answer_s: float,
) -> Answer:
    proxy = proxy if request.scheme == "http" else None  # of the other scheme's, nothing is told but where to
    target = request.target if proxy is None else f"http://{request.host}{request.target}"
    if connection.sock is not None:
        connection.sock.settimeout(timeout_s)
    connection.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in {**request.headers, **(proxy.headers if proxy else {})}.items():
        connection.putheader(name, value)
    connection.endheaders()
    sock, body = connection.sock, request.body
    stalls.pass_over(sock)
    try:
        _send_all(sock, body, _Patience(sock, min(timeout_s, stalls.STALL_S) if _is_large(request) else timeout_s, stop))
    except ConnectionError:  # refused before it was all there: why, is often said
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = _answer(connection, _Patience(sock, LOOK_S, stop))
            connection.close()
            return answer
        raise
    begun_s = time.monotonic()
    answer = _answer(connection, _Patience(sock, answer_s, stop, longest_s=LONGEST_ANSWER_S))
    return answer._replace(waited_s=time.monotonic() - begun_s)


def _is_large(request: Request) -> bool:
    """That of completing many parts has a large body too, and takes its time."""
    return request.method == "PUT" and request.body.size_bytes >= stalls.PART_BYTES


class _Patience:
    """How long nothing may move on a connection; the kernel knows what the other side takes, a caller only of whole pieces."""

    def __init__(self, sock: socket.socket, timeout_s: float, stop: Stop, *, longest_s: float = math.inf) -> None:
        sock.settimeout(LOOK_S)
        self._deadline = time.monotonic() + longest_s
        self._sock, self._timeout_s, self._stop = sock, timeout_s, stop
        self._waiting, self._moved = _queued(sock), time.monotonic()

    def moved(self) -> None:
        """Something did. TimeoutError when that has gone on for too long."""
        self._moved = time.monotonic()
        if self._moved > self._deadline:
            raise TimeoutError("it does not end")

    def look(self) -> None:
        """When LOOK_S have brought nothing: TimeoutError when it takes too long, Stopped when told to."""
        self._stop.check()
        if (now := _queued(self._sock)) != self._waiting:
            self._waiting = now
            self.moved()
        elif time.monotonic() > self._moved + self._timeout_s:
            raise TimeoutError("nothing moves")

    def check(self) -> None:
        """Stopped when told to."""
        self._stop.check()


def _send_all(sock: socket.socket, body: Body, patience: _Patience) -> None:
    for piece in body.pieces():
        _send(sock, memoryview(piece).cast("B"), patience)


def _send(sock: socket.socket, piece: memoryview, patience: _Patience) -> None:
    most = TLS_BYTES if isinstance(sock, ssl.SSLSocket) else len(piece)
    sent = 0
    while sent < len(piece):
        patience.check()
        try:
            sent += sock.send(piece[sent : sent + most])
        except TimeoutError:  # of TLS, a part of the piece may have gone: it must be sent again as it was
            patience.look()
        else:
            patience.moved()


class _Incoming(io.RawIOBase):
    """What comes back, for http.client. That a socket can be read says little: with TLS 1.3, tickets come before any answer."""

    def __init__(self, sock: socket.socket, kept: io.BufferedIOBase, patience: _Patience) -> None:
        self._sock, self._kept, self._patience = sock, kept, patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                count = self._sock.recv_into(buffer)
            except TimeoutError:
                self._patience.look()
            else:
                self._patience.moved()
                return count

    def close(self) -> None:
        if not self.closed:
            self._kept.close()
        super().close()


def _queued(sock: socket.socket) -> int:
    """Bytes that the kernel still holds, since the other side has not taken them (Linux's SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])


def _answer(connection: http.client.HTTPConnection, patience: _Patience) -> Answer:
    def responding(sock: socket.socket, method: str | None = None) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, method=method)
        response.fp = io.BufferedReader(_Incoming(sock, response.fp, patience))
        return response

    connection.response_class = responding  # type: ignore[assignment]
    with connection.getresponse() as response:
        body = response.read(MAX_ANSWER_BYTES)
        if response.length or (response.chunked and not response.isclosed()):  # read(most) does not say it
            raise http.client.IncompleteRead(body, response.length)
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)
