"""Connections on which nothing moves, found in seconds: for a command that owns its process.

The library that uploads cannot tell a part that has stalled from one on a slow line: it counts the time of sending as waiting.
The kernel can: it knows of each connection how many bytes the other side has taken. One that stands still is shut down, and
the library sends that part again, as after any connection that broke. A slow line moves all the time, and is left alone.

All TCP connections of the process are looked at, but for those that bound their own time (`pass_over`). So it is for our own
commands, not for use inside of a trainer.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import weakref
from dataclasses import dataclass
from types import TracebackType

STALL_S = 10.0  #: bytes wait to be taken, and none is
ANSWER_S = 15.0  #: a part was taken, and nothing comes back. Small requests are not meant: completing an upload takes its time
PART_BYTES = 64 << 10  #: what counts as a part
TICK_S = 0.5

# struct tcp_info of Linux, the fields at fixed places: state, unacked, last_data_sent, last_data_recv, bytes_acked,
# bytes_received, notsent_bytes. Kernels only ever add behind them.
_LAYOUT = struct.Struct("=B23xI16xI4xI64xQQ8xI")
_ESTABLISHED = 1


_passed_over: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_lock = threading.Lock()


def pass_over(connection: socket.socket) -> None:
    """Tell all watches to leave this connection alone: whoever made it knows better what it waits for. Thread-safe."""
    with _lock:
        _passed_over.add(connection)


@dataclass(slots=True)
class _Seen:
    """A connection as it was when something last moved."""

    acked: int
    received: int
    acked_before: int  #: when something last came back
    since: float
    idle: float  #: when nothing last waited to be taken: a request may come long after anything moved


class StallWatch:
    """A context manager. `broken` counts the connections that were shut down. Does nothing where the kernel does not tell."""

    def __init__(self) -> None:
        self.broken = 0
        self._seen: dict[str, _Seen] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ckptstore-stalls")

    def __enter__(self) -> StallWatch:
        if hasattr(socket, "TCP_INFO") and os.path.isdir("/proc/self/fd"):
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(2 * TICK_S)

    def _watch(self) -> None:
        while not self._end.wait(TICK_S):
            there = set()
            for name, connection in _connections():
                with connection:
                    there.add(name)
                    if self._stalled(name, connection):
                        self.broken += 1
                        try:
                            connection.shutdown(socket.SHUT_RDWR)
                        except OSError:
                            self.broken -= 1  # it had just ended by itself
            self._seen = {name: seen for name, seen in self._seen.items() if name in there}

    def _stalled(self, name: str, connection: socket.socket) -> bool:
        try:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            return False
        if len(info) < _LAYOUT.size:
            return False
        state, unacked, sent_ms, received_ms, acked, received, unsent = _LAYOUT.unpack_from(info)
        now = time.monotonic()
        seen = self._seen.get(name)
        if seen is None or received != seen.received:
            self._seen[name] = _Seen(acked, received, 0 if seen is None else acked, now, now)
            return False
        if acked != seen.acked:
            seen.acked, seen.since = acked, now
            return False
        if state != _ESTABLISHED:
            return False
        if unacked or unsent:
            return now - max(seen.since, seen.idle) > STALL_S
        seen.idle = now
        waiting = sent_ms < received_ms or not received
        return waiting and acked - seen.acked_before > PART_BYTES and now - seen.since > ANSWER_S


def _connections() -> list[tuple[str, socket.socket]]:
    """The TCP connections of this process that are looked at, each under a descriptor of its own that the caller closes."""
    with _lock:
        others = {str(connection.fileno()) for connection in _passed_over}
    found = []
    for number in os.listdir("/proc/self/fd"):
        if number in others:
            continue
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
            if not name.startswith("socket:"):
                continue
            copy = os.dup(int(number))
        except OSError:  # closed meanwhile
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # closed, and something else has its number now
            os.close(copy)
            continue
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
            found.append((name, connection))
        else:
            connection.close()
    return found
