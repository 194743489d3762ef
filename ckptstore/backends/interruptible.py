"""Requests of obstore that Ctrl-C does not have to wait for.

Its calls hold the thread that makes them until they end: a minute, with a store that gives no answer. Ctrl-C comes to the main
thread. There each is made by a thread of its own, and an interrupted wait leaves it alone: a daemon, as those of parallel.py,
that begins nothing more. On all other threads they are made directly; who started those does not wait for them for long.

The library's other half, for event loops, could call a request off. But its own threads come back to Python after a request has
ended, and of processes that end in that moment one in twelve was aborted (obstore 0.12, Python 3.11).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from ckptstore import parallel
from ckptstore.backends import waiting

T = TypeVar("T")

TIDY_S = 0.75  #: see briefly()

_limit_s: float | None = None  #: of the main thread's requests


def result(request: Callable[[], T], *, of: str) -> T:
    """What `request` returns or raises. `of`: what it is about, to be named where it gets no answer for long."""
    if not _main():
        return request()
    answer: Future[T] = Future()

    def make() -> None:
        try:
            answer.set_result(request())
        except BaseException as error:
            answer.set_exception(error)
            if not isinstance(error, Exception):
                raise

    parallel.start(threading.Thread(target=make, daemon=True, name="ckptstore-request"))
    begun_s = time.monotonic()
    while True:
        try:
            return answer.result(_limit_s or waiting.NOTICE_S)
        except TimeoutError:
            if answer.done():
                return answer.result()  # it came this moment, or the error is its own
            if _limit_s:
                raise KeyboardInterrupt from None  # that has been waited for long enough
            waiting.notice(of, time.monotonic() - begun_s)


@contextlib.contextmanager
def briefly() -> Iterator[None]:
    """To tidy up after Ctrl-C: a request of the main thread in here may take TIDY_S, then KeyboardInterrupt ends it, too."""
    global _limit_s
    if not _main():
        yield
        return
    _limit_s = TIDY_S
    try:
        yield
    finally:
        _limit_s = None


def in_a_hurry() -> bool:
    """Whether this is the main thread, within briefly()."""
    return _limit_s is not None and _main()


@contextlib.contextmanager
def tidied(tidy: Callable[[], object]) -> Iterator[None]:
    """Calls `tidy` at the end, as a `finally` does; after Ctrl-C briefly."""
    try:
        yield
    except KeyboardInterrupt:
        with briefly():
            tidy()
        raise
    except BaseException:
        tidy()
        raise
    tidy()


def _main() -> bool:
    """Whether this is the thread that Ctrl-C comes to."""
    return threading.current_thread() is threading.main_thread()
