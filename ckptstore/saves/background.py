"""Saves in the background: one save a store is in flight, and no failure is lost.

A save that fails is logged at once, and raised by `wait` or else by the next call. At the interpreter's exit a save in flight
is finished; SIGTERM's default ends the process with the store as it was (ckptstore.torch.install_signal_handlers does
better). A forked child has no saves in flight: its parent's go on in the parent.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Literal

from ckptstore.errors import BusyError, UsageError
from ckptstore.frameworks.steps import folder_name
from ckptstore.manifest import Manifest

_log = logging.getLogger("ckptstore")

OnBusy = Literal["wait", "skip", "raise"]


class SaveHandle:
    """A save in the background. Thread-safe."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._future: Future[Manifest] | None = None
        self._staged = threading.Event()
        self._woken = threading.Event()  # staged, or at its end
        self._told = False
        self._process = os.getpid()

    def __repr__(self) -> str:
        state = "skipped" if self.skipped else "committed" if self.committed else "failed" if self.failed else "in flight"
        return f"SaveHandle(step={self.step}, {state})"

    @property
    def skipped(self) -> bool:
        """Whether nothing is saved, since another save was in flight (`on_busy="skip"`)."""
        return self._future is None

    @property
    def staged(self) -> bool:
        """Whether what is saved may change: all of it is copied. Of a state that is so when save_async returns."""
        return self._staged.is_set()

    @property
    def committed(self) -> bool:
        """Whether the step is in the store, durable."""
        return self._future is not None and self._future.done() and self._future.exception() is None

    @property
    def failed(self) -> bool:
        """Whether it was not saved, or not surely: `wait` raises why."""
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def wait(self, timeout_s: float | None = None) -> Manifest | None:
        """Wait until it is committed; its manifest, None for a skipped one. What went wrong is raised; TimeoutError.

        UsageError in a child that was forked meanwhile: the save is its parent's.
        """
        if self._future is None:
            return None
        if self._process != os.getpid() and not self._future.done():
            raise UsageError(f"the save of step {self.step} is in flight in another process", hint="Wait where it was begun.")
        try:
            return self._future.result(timeout_s)
        except TimeoutError as error:
            if timeout_s is None or self._future.done():  # the save's own
                raise
            raise TimeoutError(f"step {self.step} was not committed within {timeout_s:g} s; the save goes on") from error
        finally:
            self._told = self._future.done()

    def mark_staged(self) -> None:
        """For who saves: all is copied."""
        self._staged.set()
        self._woken.set()

    def wait_staged(self, timeout_s: float | None = None) -> None:
        """Wait until what is saved may change. A save that failed before that raises why. TimeoutError."""
        if self._future is None:
            return
        if not self._woken.wait(timeout_s):
            raise TimeoutError(f"step {self.step} was not staged within {timeout_s:g} s")
        if not self.staged:
            self.wait()

    @property
    def in_flight(self) -> bool:
        """Whether it is neither committed nor failed yet."""
        return self._future is not None and not self._future.done()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for the end, and raise a failure that nobody was told of."""
        if not self._told:
            self.wait(timeout_s)


class _Line:
    """The saves of one store: one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a save is staged
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ckptstore-save")
        self.last: SaveHandle | None = None


_lines: dict[str, _Line] = {}
_lock = threading.Lock()


def _forget() -> None:
    global _lock
    _lines.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def submit(
    folder: str, step: int, stage: Callable[[SaveHandle], Callable[[], Manifest]], *, on_busy: OnBusy = "wait"
) -> SaveHandle:
    """Call `stage` while the caller waits, and what it returns in the background: that saves `step` into the store `folder`.

    What `stage` raises is the caller's. Meanwhile no other save of the store is staged. While an earlier one is in flight:
    `wait` for it, `skip` this one (the handle says so), or `raise` BusyError. A failure of an earlier one that nobody has
    waited for is raised here, and nothing is saved then.
    """
    folder_name(step)  # UsageError for what is none, to the caller
    if on_busy not in ("wait", "skip", "raise"):
        raise UsageError(f"on_busy is wait, skip or raise, not {on_busy!r:.20}")
    with _lock:
        line = _lines.setdefault(os.path.realpath(folder), _Line())
    with line.lock:
        if line.last is not None and line.last.in_flight:
            if on_busy == "skip":
                return SaveHandle(step)
            if on_busy == "raise":
                raise BusyError(f"the save of step {line.last.step} is still in flight", hint="Save less often, or wait.")
        if line.last is not None:
            line.last.settle()
            line.last = None
        line.pool.submit(int).result()  # Ctrl-C may have come before a save that was begun was noted here
        handle = SaveHandle(step)
        handle._future = line.pool.submit(_run, stage(handle), step)
        handle._future.add_done_callback(lambda _: handle._woken.set())
        line.last = handle
        return handle


def wait_all(timeout_s: float | None = None) -> None:
    """Wait for all saves in flight, of all stores; then a failure that nobody was told of is raised. TimeoutError."""
    handles = [line.last for line in list(_lines.values()) if line.last is not None]
    wait([handle._future for handle in handles if handle._future is not None], timeout_s)
    for handle in handles:
        handle.settle(0)


def _run(job: Callable[[], Manifest], step: int) -> Manifest:
    try:
        return job()
    except BaseException as error:
        _log.error("the background save of step %d failed: %s", step, error)
        raise
