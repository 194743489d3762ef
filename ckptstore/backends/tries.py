"""How long a request that fails is tried again: one bound for all that goes to an object store, whoever makes it."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from ckptstore.backends import interruptible, waiting

#: From the first failure on: a store that is overloaded or restarts comes back, one that is gone is named.
RETRY_FOR = timedelta(seconds=60)
#: S3's codes for what may fare better the next time, although its status says otherwise: it broke off, or met another one.
PASSING = ("RequestTimeout", "IncompleteBody", "OperationAborted")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  #: each is twice as long as the last one, and of random length from half of that on
_chance = random.Random()  # ours alone: a retry must not change what the trainer draws from the `random` that it has seeded


class _Here(threading.local):
    """What this thread was told."""

    ended: threading.Event | None = None


_here = _Here()


@contextlib.contextmanager
def until(ended: threading.Event) -> Iterator[None]:
    """On this thread no request is tried again once `ended` is set: who ends it does not wait for a store that is gone."""
    before, _here.ended = _here.ended, ended
    try:
        yield
    finally:
        _here.ended = before


class Tries:
    """Whether one request, that has failed, is to be made again: for a while, with growing pauses. Not thread-safe.

    `of`: what is named where it takes long.
    """

    def __init__(self, of: str) -> None:
        self.made = 0  #: failures that were waited for
        self._of = of
        self._failed_s: float | None = None  #: when it first failed

    def again(self, sleep: Callable[[float], object] | None = None) -> bool:
        """Wait a while; False when it is time to give up, where one tidies up after Ctrl-C, and where the thread shall end."""
        now_s = time.monotonic()
        if self._failed_s is None:
            self._failed_s = now_s
        ended = _here.ended
        if interruptible.in_a_hurry() or _is_set(ended) or now_s - self._failed_s >= RETRY_FOR.total_seconds():
            return False
        waiting.notice(self._of, now_s - self._failed_s)
        pause = sleep or (time.sleep if ended is None else ended.wait)
        pause(min(FIRST_PAUSE_S * 2**self.made, LONGEST_PAUSE_S) * _chance.uniform(0.5, 1))
        self.made += 1
        return not _is_set(ended)


def _is_set(event: threading.Event | None) -> bool:
    return event is not None and event.is_set()


def of_the_library() -> dict[str, object]:
    """The same bound, for an upload by parts that the library makes as a whole.

    Its pauses are drawn from all between the first and `base` times the last one: with a base of 2 they do not grow.
    """
    longest = timedelta(seconds=LONGEST_PAUSE_S)
    backoff = {"init_backoff": timedelta(seconds=FIRST_PAUSE_S), "max_backoff": longest, "base": 4}
    return {"max_retries": 1000, "retry_timeout": RETRY_FOR, "backoff": backoff}


#: For requests that are tried again here.
NONE: dict[str, object] = {"max_retries": 0}
