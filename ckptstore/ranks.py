"""The ranks of a training, as far as the breaker and the schedule need them: who is rank 0, and small agreements.

torch is never imported here: a process that trains on several ranks has imported it already.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from ckptstore.errors import UsageError

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


class Ranks(Protocol):
    """Every method but `rank` is a collective: all ranks must call it, in the same order."""

    @property
    def rank(self) -> int:
        """0 for the one that writes."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""

    def mean(self, values: Sequence[float | None]) -> list[float | None]:
        """The mean of each value over the ranks that have it; None where none does. NaN and infinities spread."""

    def from_first(self, data: bytes) -> bytes:
        """Rank 0's `data`."""


class Alone:
    """One process that decides for itself."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def any(self, flag: bool) -> bool:
        """See Ranks.any."""
        return flag

    def mean(self, values: Sequence[float | None]) -> list[float | None]:
        """See Ranks.mean."""
        return list(values)

    def from_first(self, data: bytes) -> bytes:
        """See Ranks.from_first."""
        return data


class Together:
    """The ranks of a torch.distributed group, all of which take part. A rank that dies ends the others' wait by the group's
    timeout, with torch's own error.
    """

    def __init__(self, torch: Any, group: Any) -> None:
        self._torch, self._dist, self._group = torch, torch.distributed, group
        self.rank: int = self._dist.get_rank(group)
        self._size: int = self._dist.get_world_size(group)
        on_gpu = "nccl" in str(self._dist.get_backend(group))
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def any(self, flag: bool) -> bool:
        """See Ranks.any."""
        return bool(self._reduced([float(flag)], self._dist.ReduceOp.MAX)[0])

    def mean(self, values: Sequence[float | None]) -> list[float | None]:
        """See Ranks.mean."""
        sums = [0.0 if value is None else value for value in values]
        counts = [float(value is not None) for value in values]
        reduced = self._reduced([*sums, *counts], self._dist.ReduceOp.SUM)
        half = len(values)
        return [total / count if count else None for total, count in zip(reduced[:half], reduced[half:], strict=True)]

    def from_first(self, data: bytes) -> bytes:
        """See Ranks.from_first."""
        source = 0 if self._group is None else self._dist.get_global_rank(self._group, 0)
        length = self._torch.tensor([len(data)], dtype=self._torch.int64, device=self._device)
        self._dist.broadcast(length, src=source, group=self._group)
        if self.rank == 0:
            content = self._torch.tensor(list(data), dtype=self._torch.uint8, device=self._device)
        else:
            content = self._torch.empty(int(length.item()), dtype=self._torch.uint8, device=self._device)
        self._dist.broadcast(content, src=source, group=self._group)
        return bytes(content.tolist())

    def _reduced(self, values: list[float], operation: Any) -> list[float]:
        tensor = self._torch.tensor(values, dtype=self._torch.float64, device=self._device)
        self._dist.all_reduce(tensor, op=operation, group=self._group)
        reduced: list[float] = tensor.tolist()
        return reduced


def own_rank(group: Any = None) -> int:
    """Rank of this process: torch.distributed's if it is initialised, else the launcher's, else 0."""
    torch = _initialised()
    if torch is not None:
        return int(torch.distributed.get_rank(group))
    for variable in _RANK_VARIABLES:
        text = os.environ.get(variable, "")
        if text.isdigit():
            return int(text)
    return 0


def together(group: Any = None) -> Ranks:
    """All ranks of `group` (None: all there are). UsageError where they have not met yet; alone where there is one."""
    torch = _initialised()
    if torch is not None:
        return Together(torch, group) if torch.distributed.get_world_size(group) > 1 else Alone()
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1:
        raise UsageError(
            f"WORLD_SIZE is {size}, and torch.distributed is not initialised yet",
            hint="Call this after torch.distributed.init_process_group().",
        )
    return Alone()


def _initialised() -> Any:
    """The torch module, if this process has initialised torch.distributed."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "distributed") or not torch.distributed.is_available():
        return None
    return torch if torch.distributed.is_initialized() else None
