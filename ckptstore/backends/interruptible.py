"""Requests of obstore that Ctrl-C ends at once, and for good.

Its calls hold the thread that makes them until they end: a minute, with a store that gives no answer. Ctrl-C comes to the main
thread. There they are made by the library's other half, on an event loop in a thread of its own: an interrupted wait calls the
request off, its connection is closed, and nothing is sent again behind the caller's back. On all other threads they are made
directly, which costs less; who started those does not wait for them for long (parallel.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from ckptstore import parallel

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

TIDY_S = 0.75  #: see briefly()

_limit_s: float | None = None  #: of the main thread's requests


def needed() -> bool:
    """Whether this is the thread that Ctrl-C comes to."""
    return threading.current_thread() is threading.main_thread()


def result(request: Callable[[], Awaitable[T]]) -> T:
    """What `request`, called on the loop's thread, awaits. Whatever ends the wait, Ctrl-C above all, calls it off."""
    import asyncio

    async def made() -> T:
        return await request()

    future = asyncio.run_coroutine_threadsafe(made(), _loop(os.getpid()))
    try:
        return future.result(_limit_s)
    except TimeoutError:
        if future.done():
            raise  # the request's own
        raise KeyboardInterrupt from None  # that has been waited for long enough
    finally:
        future.cancel()


@contextlib.contextmanager
def briefly() -> Iterator[None]:
    """To tidy up after Ctrl-C: a request of the main thread in here may take TIDY_S, then KeyboardInterrupt ends it, too."""
    global _limit_s
    if not needed():
        yield
        return
    _limit_s = TIDY_S
    try:
        yield
    finally:
        _limit_s = None


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


@functools.lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """That of this process: a forked child has its parent's loop, and not the thread that runs it."""
    import asyncio

    loop = asyncio.new_event_loop()
    parallel.start(threading.Thread(target=loop.run_forever, daemon=True, name="ckptstore-requests"))
    return loop
