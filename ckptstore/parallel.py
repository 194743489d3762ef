"""Work on threads that can be stopped: the first error, Ctrl-C and an exception of `tick` end it all within moments.

Threads of our own, and no ThreadPoolExecutor: that takes nothing any more once the main thread has ended, and a save in flight
is finished then.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from ckptstore.errors import CkptStoreError, UsageError

T = TypeVar("T")

TICK_S = 0.1
#: How long threads that sit in a request are waited for after an error. They are daemons: none outlives the process.
PATIENCE_S = 1.0


class Stopped(CkptStoreError):
    """Raised in a worker that shall end because another one failed; each() raises that one's error."""


class Stop:
    """Tells workers to end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """From now on check() raises."""
        self._event.set()

    def check(self) -> None:
        """Stopped when somebody has asked for the end. Cheap: call it between pieces of work."""
        if self._event.is_set():
            raise Stopped("stopped, since another part failed")

    def wait(self, seconds: float) -> None:
        """Sleep, and wake up early to raise Stopped."""
        self._event.wait(seconds)
        self.check()


def each(
    jobs: Iterable[T],
    work: Callable[[T, Stop], None],
    *,
    threads: int | Callable[[], int],
    tick: Callable[[], None] | None = None,
) -> None:
    """Call `work` for every job on `threads` threads, `tick` about ten times a second in the calling one.

    Where `threads` is a function, it says how many there shall be now; it is called on any thread, often.

    Raises the first error of any of them. When this returns or raises after an error, no thread begins anything new; one
    that sits in a request ends with it (at most PATIENCE_S is waited for it).
    """
    stop = Stop()
    lock = threading.Lock()
    waiting = iter(jobs)
    errors: list[BaseException] = []
    working = 0
    over = False  #: no job is left to begin
    wake = threading.Event()  #: something is to be done before the next tick

    def wanted() -> int:
        return max(threads() if callable(threads) else threads, 1)

    def run() -> None:
        nonlocal working, over
        try:
            while True:
                stop.check()
                with lock:
                    job = _NONE if working > wanted() else next(waiting, _LAST)
                    if job is _NONE or job is _LAST:
                        working -= 1
                        over = over or job is _LAST
                        if not working:
                            wake.set()
                        return
                work(job, stop)  # type: ignore[arg-type]
                if working < wanted() and not over:
                    wake.set()
        except BaseException as error:
            errors.append(error)
            stop.set()
            wake.set()
            if not isinstance(error, Exception):
                raise

    crew: list[threading.Thread] = []

    def fill() -> None:
        """Start those that are missing."""
        nonlocal working
        while not over and working < wanted():
            with lock:
                working += 1
            crew.append(threading.Thread(target=run, daemon=True, name=f"ckptstore-{len(crew)}"))
            start(crew[-1])

    try:
        fill()
        while working and not errors:
            wake.wait(TICK_S)
            wake.clear()
            if errors:
                break
            fill()
            if tick is not None:
                tick()
    finally:
        stop.set()
        deadline = time.monotonic() + PATIENCE_S
        for thread in crew:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
    if errors:
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
    if tick is not None:
        tick()


class Pool:
    """Threads that do what they are given, in order, also while the interpreter ends. Left, it waits for all of it."""

    def __init__(self, threads: int, name: str, *, begin: Callable[[], None] = lambda: None) -> None:
        self._begin = begin  #: on each thread, first
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._crew = [threading.Thread(target=self._work, daemon=True, name=f"{name}-{n}") for n in range(threads)]

    def __enter__(self) -> Pool:
        try:
            for thread in self._crew:
                start(thread)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        for thread in self._crew:
            thread.join()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have it done; its result, or what it raises, is the future's."""
        done: Future[T] = Future()
        self._jobs.put((done, work, arguments))
        return done

    def map(self, work: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
        """As the builtin."""
        return [done.result() for done in [self.submit(work, *some) for some in zip(*arguments, strict=True)]]

    def _work(self) -> None:
        self._begin()
        while (job := self._jobs.get()) is not None:
            done, work, arguments = job
            try:
                done.set_result(work(*arguments))
            except BaseException as error:
                done.set_exception(error)  # for whoever asked for it
                if not isinstance(error, Exception):
                    raise
            del job, done, work, arguments  # nothing is held while it waits

    def _end(self) -> None:
        for _ in self._crew:
            self._jobs.put(None)


def start(thread: threading.Thread) -> None:
    """Let it run. Ctrl-C while it comes up breaks a lock inside of CPython's own: said as what it was."""
    try:
        thread.start()
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if "interpreter shutdown" in str(error):  # Python 3.12.0 and 3.12.1, from when the main thread has ended
            hint = "Wait for saves before the program ends (ckptstore.wait_all), or take Python 3.12.2 or later."
            raise UsageError("no thread can be started any more: the interpreter ends", hint=hint) from error
        raise


_NONE, _LAST = object(), object()
