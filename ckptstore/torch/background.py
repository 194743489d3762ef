"""States saved in the background: copied to host memory while the caller waits, and written while it trains.

The host buffers are kept and used again by the next save of the same shapes: memory is one more state.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ckptstore import native
from ckptstore.manifest import Manifest
from ckptstore.retention import Keep, checked_keep
from ckptstore.saves import background, saving
from ckptstore.saves.background import OnBusy, SaveHandle
from ckptstore.saves.saving import Metrics
from ckptstore.store import CheckpointStore, needed
from ckptstore.torch import memory, simple
from ckptstore.torch import state as states
from ckptstore.torch.waves import Waves


@dataclass(slots=True)
class _Buffers:
    """Host memory for one state, used again and again. The n-th tensor finds the n-th buffer.

    What comes from a device is copied on the caller's current stream there, so after all that is in it: `finish` waits for
    these streams alone. Until then the state's owner holds what is copied.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    next: int = 0
    devices: set[torch.device] = field(default_factory=set)
    ring: list[torch.Tensor] = field(default_factory=list)  #: of waves.py

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.detach().resolve_conj().resolve_neg()
        pinned = source.is_cuda
        if pinned and source.device not in self.devices:
            memory.refuse_capture(source.device)
            self.devices.add(source.device)
        at = self.next
        self.next += 1
        kept = self.tensors[at] if at < len(self.tensors) else None
        if kept is None or kept.dtype != source.dtype or kept.shape != source.shape or memory.pinned(kept) != pinned:
            kept = memory.host(source.shape, source.dtype, pinned=pinned)
            self.tensors[at : at + 1] = [kept]
        kept.copy_(source, non_blocking=pinned)
        return kept

    def begin(self) -> None:
        self.next = 0
        self.devices.clear()

    def finish(self) -> None:
        del self.tensors[self.next :]
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()


_buffers: dict[str, _Buffers] = {}  # by the store's folder
_inherited: list[dict[str, _Buffers]] = []


def _forget() -> None:
    """In a forked child: its parent may write from them. They are not freed there: CUDA must not be called in a child."""
    global _buffers
    _inherited.append(_buffers)
    _buffers = {}


os.register_at_fork(after_in_child=_forget)


def save_async(
    store: CheckpointStore,
    step: int,
    state_dict: Mapping[str, Any],
    *,
    metrics: Metrics | None = None,
    config: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
    on_busy: OnBusy = "wait",
    nice: int = 10,
    max_host_bytes: int | None = None,
) -> SaveHandle:
    """Save in the background: returns when the state is copied to host memory, and may change. Otherwise as `save`.

    While an earlier save of the store is in flight: `wait` for it, `skip` this one (the handle says so), or `raise`
    BusyError. A failure of an earlier one that nobody has waited for is raised here, and nothing is saved then. `nice` is the
    priority of the writing threads.

    `max_host_bytes` bounds the host memory for the copy. A state that is larger is copied in waves while it is written: then
    this returns at once, and the state must not change before `handle.wait_staged()` returns: when all is copied, or, at a
    URL, has arrived there. A change before that makes the save fail (SourceChangedError).
    """
    needed(store)
    where, numbers, keep = store.backend.location, saving.numbers_of(metrics), checked_keep(keep)

    def stage(handle: SaveHandle) -> Callable[[], Manifest]:
        buffers = _buffers.setdefault(os.path.realpath(where), _Buffers())
        if max_host_bytes is not None and not (waves := Waves(store, state_dict, config, max_host_bytes=max_host_bytes)).fits:
            buffers.tensors.clear()
            more: dict[str, Any] = {"metrics": numbers, "keep": keep, "nice": nice}
            return functools.partial(waves.write, step, buffers.ring, staged=handle.mark_staged, **more)
        buffers.ring.clear()
        buffers.begin()
        try:
            files = simple.files_of(states.Encoder(state_dict, buffers.take), config)
        finally:
            buffers.finish()  # of a state that cannot be saved too: a late copy would fall into the next save
        handle.mark_staged()
        options = native.CopyOptions(nice=nice)
        return functools.partial(simple.write, store, step, files, metrics=numbers, keep=keep, options=options)

    return background.submit(where, step, stage, on_busy=on_busy)
