"""Saves of a state that is larger than the host memory for its copy: staged and written block by block, in waves.

The first blocks fill the buffers; each buffer that has been written, or sent, takes the next block. The state may change when
the last block has been copied (`staged`); at a URL when the last file has arrived: one that has to be sent again is copied
again. In-place changes that torch counts are found before that: such a save fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckptstore.errors import SourceChangedError, UsageError
from ckptstore.manifest import Manifest
from ckptstore.retention import Keep
from ckptstore.saves import saving
from ckptstore.saves.uploading import Written
from ckptstore.store import CheckpointStore
from ckptstore.torch import blocks, simple
from ckptstore.torch import state as states
from ckptstore.torch.blocks import BLOCK_BYTES
from ckptstore.torch.filling import Streams


class Waves:
    """One save of a state in waves: made by the thread that trains, then `write`, once, on any."""

    def __init__(
        self, store: CheckpointStore, state_dict: Mapping[str, Any], config: Mapping[str, Any] | None, *, max_host_bytes: int
    ) -> None:
        encoded = states.Encoder(state_dict, torch.Tensor.detach)
        self._store = store
        self._files = simple.blocks_of(encoded)
        least_bytes = max(2 * BLOCK_BYTES, blocks.block_bytes(store.backend, self._files))
        if max_host_bytes < least_bytes:
            raise UsageError(f"max_host_bytes is {max_host_bytes:,}, and {least_bytes:,} are the least for this state")
        self._rest = simple.documents(encoded, config)
        self._versions = [
            (f"{file}: {name}", tensor, _version(tensor))
            for file, tensors in encoded.tensors.items()
            for name, tensor in tensors.items()
        ]
        self._ring_bytes = max_host_bytes
        self.fits = sum(file.size_bytes for file in self._files.values()) <= max_host_bytes
        self._streams = Streams([] if self.fits else [tensor for _, tensor, _ in self._versions])

    def write(
        self,
        step: int,
        buffers: list[torch.Tensor],
        *,
        staged: Callable[[], None],
        metrics: Mapping[str, float] | None = None,
        keep: Keep | None = None,
        nice: int = 0,
    ) -> Manifest:
        """Stage, write and commit. `buffers` are used, and kept for the next save. Errors as `save`; SourceChangedError.

        `staged` is called when the state is not needed any more (blocks.write).
        """

        def unchanged() -> None:
            self._compare()
            staged()

        backend = self._store.backend

        def put(place: str) -> dict[str, Written]:
            more: dict[str, Any] = {"ring_bytes": self._ring_bytes, "staged": unchanged, "nice": nice}
            written = blocks.write(backend, place, self._files, buffers, streams=self._streams, **more)
            return written | saving.write_buffers(backend, place, self._rest)

        return simple.commit(self._store, step, put, metrics=metrics, keep=keep)

    def _compare(self) -> None:
        for name, tensor, version in self._versions:
            if version != _version(tensor):
                raise SourceChangedError(
                    f"{name} was changed before it was staged: nothing is saved",
                    path=name,
                    hint="Call handle.wait_staged() before the optimizer's step.",
                )


def _version(tensor: torch.Tensor) -> int:
    """How often it was changed in place; torch does not count that of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version
