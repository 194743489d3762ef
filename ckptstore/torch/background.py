"""Saves in the background: the state is copied to host memory while the caller waits, and written while it trains.

One save a store is in flight. The host buffers are kept and used again by the next save of the same shapes: memory is one
more state. A save that fails is logged at once, and raised by `wait` or else by the next call. At the interpreter's exit a
save in flight is finished; SIGTERM's default ends the process with the store as it was (signals.py does better). A forked
child has no saves.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ckptstore import native
from ckptstore.errors import BusyError, UsageError
from ckptstore.manifest import Manifest
from ckptstore.retention import Keep
from ckptstore.store import CheckpointStore
from ckptstore.torch import simple
from ckptstore.torch.waves import Waves

_log = logging.getLogger("ckptstore")


class SaveHandle:
    """A save in the background. Thread-safe."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._future: Future[Manifest] | None = None
        self._staged = False
        self._woken = threading.Event()  # staged, or at its end
        self._told = False

    def __repr__(self) -> str:
        state = "skipped" if self.skipped else "committed" if self.committed else "failed" if self.failed else "in flight"
        return f"SaveHandle(step={self.step}, {state})"

    @property
    def skipped(self) -> bool:
        """Whether nothing is saved, since another save was in flight (`on_busy="skip"`)."""
        return self._future is None

    @property
    def staged(self) -> bool:
        """Whether the state may change: its copy is made. With `max_host_bytes` that may come after save_async's return."""
        return self._staged

    def wait_staged(self, timeout_s: float | None = None) -> None:
        """Wait until the state may change. A save that failed before that raises why. TimeoutError."""
        if self._future is None:
            return
        if not self._woken.wait(timeout_s):
            raise TimeoutError(f"step {self.step} was not staged within {timeout_s:g} s")
        if not self._staged:
            self.wait()

    def mark_staged(self) -> None:
        """For who saves: all is copied."""
        self._staged = True
        self._woken.set()

    @property
    def committed(self) -> bool:
        """Whether the step is in the store, durable."""
        return self._future is not None and self._future.done() and self._future.exception() is None

    @property
    def failed(self) -> bool:
        """Whether it was not saved, or not surely: `wait` raises why."""
        return self._future is not None and self._future.done() and self._future.exception() is not None

    def wait(self, timeout_s: float | None = None) -> Manifest | None:
        """Wait until it is committed; its manifest, None for a skipped one. What went wrong is raised; TimeoutError."""
        if self._future is None:
            return None
        try:
            return self._future.result(timeout_s)
        finally:
            self._told = self._future.done()

    def _settle(self, timeout_s: float | None = None) -> None:
        """Wait for the end, and raise a failure that nobody was told of."""
        if not self._told:
            self.wait(timeout_s)


@dataclass(slots=True)
class _Buffers:
    """Host memory for one state, used again and again. The n-th tensor finds the n-th buffer."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    next: int = 0
    devices: set[torch.device] = field(default_factory=set)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.detach().resolve_conj().resolve_neg()
        pinned = source.is_cuda
        at = self.next
        self.next += 1
        kept = self.tensors[at] if at < len(self.tensors) else None
        if kept is None or kept.dtype != source.dtype or kept.shape != source.shape or kept.is_pinned() != pinned:
            kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            self.tensors[at : at + 1] = [kept]
        kept.copy_(source, non_blocking=pinned)
        if pinned:
            self.devices.add(source.device)
        return kept

    def begin(self) -> None:
        self.next = 0

    def finish(self) -> None:
        del self.tensors[self.next :]
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.devices.clear()


class _Line:
    """The saves of one store: one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a save is staged
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ckptstore-save")
        self.buffers = _Buffers()
        self.pieces: list[torch.Tensor] = []  # buffers of waves.py
        self.last: SaveHandle | None = None

    def follow(self, handle: SaveHandle, future: Future[Manifest]) -> SaveHandle:
        """From here on it is the save in flight."""
        handle._future = future
        future.add_done_callback(lambda done: _report(handle, done))
        self.last = handle
        return handle


_lines: dict[str, _Line] = {}
_lock = threading.Lock()


def _forget() -> None:
    global _lock
    _lines.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _line_of(store: CheckpointStore) -> _Line:
    with _lock:
        where = store.backend.location
        return _lines.setdefault(os.path.realpath(where) if store.backend.is_folder else where, _Line())


def save_async(
    store: CheckpointStore,
    step: int,
    state_dict: Mapping[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
    on_busy: Literal["wait", "skip", "raise"] = "wait",
    nice: int = 10,
    max_host_bytes: int | None = None,
) -> SaveHandle:
    """Save in the background: returns when the state is copied to host memory, and may change. Otherwise as `save`.

    While an earlier save of the store is in flight: `wait` for it, `skip` this one (the handle says so), or `raise`
    BusyError. A failure of an earlier one that nobody has waited for is raised here, and nothing is saved then. `nice` is the
    priority of the writing threads.

    `max_host_bytes` bounds the host memory for the copy. A state that is larger is copied in waves while it is written: then
    this returns at once, and the state must not change before `handle.wait_staged()` returns. A change before that makes
    the save fail (SourceChangedError). Only for a store on a disk.
    """
    if on_busy not in ("wait", "skip", "raise"):
        raise UsageError(f"on_busy is wait, skip or raise, not {on_busy!r:.20}")
    line = _line_of(store)
    with line.lock:
        if line.last is not None and line.last._future is not None and not line.last._future.done():
            if on_busy == "skip":
                return SaveHandle(step)
            if on_busy == "raise":
                raise BusyError(f"the save of step {line.last.step} is still in flight", hint="Save less often, or wait.")
        if line.last is not None:
            line.last._settle()
            line.last = None
        if max_host_bytes is not None and not (waves := Waves(state_dict, config, max_host_bytes=max_host_bytes)).fits:
            _ = store.folder  # UsageError at a URL
            line.buffers.tensors.clear()
            handle = SaveHandle(step)
            staged = handle.mark_staged
            more: dict[str, Any] = {"metrics": metrics, "keep": keep, "nice": nice}
            return line.follow(handle, line.pool.submit(waves.write, store, step, line.pieces, staged=staged, **more))
        line.pieces.clear()
        line.buffers.begin()
        files = simple.files_of(state_dict, config, take=line.buffers.take)
        line.buffers.finish()
        options = native.CopyOptions(nice=nice)
        future = line.pool.submit(simple.write, store, step, files, metrics=metrics, keep=keep, options=options)
        handle = SaveHandle(step)
        handle.mark_staged()
        return line.follow(handle, future)


def wait_all(timeout_s: float | None = None) -> None:
    """Wait for all saves in flight; a failure that nobody was told of is raised. TimeoutError."""
    for line in list(_lines.values()):
        if line.last is not None:
            line.last._settle(timeout_s)


def _report(handle: SaveHandle, done: Future[Manifest]) -> None:
    if (error := done.exception()) is not None:
        _log.error("the background save of step %d failed: %s", handle.step, error)
    handle._woken.set()
