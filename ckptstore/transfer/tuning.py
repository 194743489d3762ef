"""How many requests to have under way at once: as many as still make it faster. Pure logic; callers bring the time.

    one round    as many requests as are under way, made for the most part since the last change; their bytes, and how long
                 each took
    its rate     requests under way × bytes / time that they took together: what came in a second
    faster       by GAIN since there are twice as many: twice as many again, up to the bound
    not faster   back, for HOLD_S: the line, the disk or this machine is what is slow
    slower       than half as many were: back too. So a store that says SlowDown is spared, since requests that it sends
                 away wait, and take longer

What limits each connection (a long way, a store's quota) more of them help against; what limits all of them together (the line,
a disk) they do not. Which of both it is shows only by trying.
"""

from __future__ import annotations

GAIN = 1.25  #: of twice as many requests; noise of one round is below it
WARM_S = 3.0  #: nothing is tried before: connections are being made, and a short transfer gains nothing
HOLD_S = 30.0  #: until it is tried again


class Tuner:
    """`limit` is how many requests may be under way now, from `start` to `most`. Not thread-safe: call it under a lock."""

    def __init__(self, start: int, most: int) -> None:
        self.limit = start
        self._most = most
        self._below: list[tuple[int, float]] = []  #: (limit, bytes a second) of each step that was taken up
        self._trying = self._fell = False
        self._again_s: float | None = None  #: nothing is tried before this moment; None before the first request
        self._begin(float("-inf"))

    def done(self, begun_s: float, ended_s: float, size_bytes: int) -> None:
        """A request brought `size_bytes` between these two moments of a monotonic clock, all waiting for it included."""
        if self._again_s is None:
            self._again_s = begun_s + WARM_S
        if (begun_s if self._fell else (begun_s + ended_s) / 2) < self._since_s:
            return
        self._count += 1
        self._bytes += size_bytes
        self._busy_s += ended_s - begun_s
        if self._count >= self.limit and self._busy_s > 0:
            self._judge(self.limit * self._bytes / self._busy_s, ended_s)

    def _begin(self, since_s: float) -> None:
        self._since_s = since_s
        self._count, self._bytes, self._busy_s = 0, 0, 0.0

    def _judge(self, bytes_per_s: float, now_s: float) -> None:
        if self._below and bytes_per_s < self._below[-1][1] * (GAIN if self._trying else 1):
            self.limit, _ = self._below.pop()
            self._trying, self._fell, self._again_s = False, True, now_s + HOLD_S
        elif self.limit < self._most and self._again_s is not None and now_s >= self._again_s:
            self._below.append((self.limit, bytes_per_s))
            self.limit = min(2 * self.limit, self._most)
            self._trying, self._fell = True, False
        else:
            self._trying = False
        self._begin(now_s)
