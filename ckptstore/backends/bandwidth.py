"""A bound on bytes a second over everything that goes to and from one place, however many streams there are."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Sleep(Protocol):
    """time.sleep, or what a test puts in its place."""

    def __call__(self, seconds: float, /) -> object:
        """Wait."""


class Bandwidth:
    """A token bucket without a store: what was not used a moment ago does not make the next burst larger. Thread-safe.

    A request is paid for before it is made, so that over any time at most `bytes_per_s` × that time and the one request that
    began it go through.
    """

    def __init__(self, bytes_per_s: float, *, sleep: Sleep = time.sleep) -> None:
        self._bytes_per_s = bytes_per_s
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_s = time.monotonic()  #: from then on the next request may be made

    def take(self, count_bytes: int) -> None:
        """Wait until `count_bytes` may go. Streams that ask at once are served one after the other."""
        with self._lock:
            now_s = time.monotonic()
            wait_s = max(self._free_s - now_s, 0.0)
            self._free_s = max(self._free_s, now_s) + count_bytes / self._bytes_per_s
        if wait_s > 0:
            self._sleep(wait_s)
