"""One training step's stats, as a trainer has them, and the numbers among them that are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ckptstore.metric_names import match

Stats = Mapping[str, Any] | Iterable[Mapping[str, Any]] | None
"""One step's metrics: a dict, or a list of dicts (one a minibatch; the first that has a metric counts)."""


def dicts_of(stats: Stats) -> tuple[Mapping[str, Any], ...]:
    """The dicts of a step, in their order."""
    return (stats,) if isinstance(stats, Mapping) else tuple(stats or ())


class StatsReader:
    """Gives the values of the metrics `wanted`, and of `extra` ones that may be missing. Not thread-safe."""

    def __init__(self, wanted: Iterable[str], extra: Iterable[str]) -> None:
        self._wanted = tuple(dict.fromkeys(wanted))
        self._extra = tuple(name for name in dict.fromkeys(extra) if name not in self._wanted)
        self.keys: dict[str, str] = {}  #: under which key each was found
        self._missed: tuple[int, ...] = ()  #: sizes of the dicts in which some of _extra were looked for in vain

    @property
    def names(self) -> tuple[str, ...]:
        """All that is asked for."""
        return (*self._wanted, *self._extra)

    def __call__(self, stats: Stats) -> dict[str, float]:
        """The values of the metrics that matter, by the names that the rules use."""
        dicts = dicts_of(stats)
        found = {}
        for name in self._wanted:
            if (value := self.value(name, dicts)) is not None:
                found[name] = value
        sizes = tuple(map(len, dicts))
        for name in self._extra:
            # What nobody demands is not looked for again in dicts of the same sizes: it costs more than all the rest.
            if sizes == self._missed and name not in self.keys:
                continue
            if (value := self.value(name, dicts)) is not None:
                found[name] = value
        self._missed = sizes
        return found

    def value(self, name: str, dicts: tuple[Mapping[str, Any], ...]) -> float | None:
        """One metric's value, of the first dict that has it."""
        key = self.keys.get(name)
        if key is not None:
            for metrics in dicts:
                if key in metrics and (value := number(metrics[key])) is not None:
                    return value
        for metrics in dicts:
            key = match(name, metrics)
            if key is not None and (value := number(metrics[key])) is not None:
                self.keys[name] = key
                return value
        return None


def number(value: Any) -> float | None:
    """A number of whatever kind as a float; None for what is none."""
    if type(value) is float:
        return value
    try:
        if hasattr(value, "item"):
            value = value.item()  # numpy scalars and tensors; waits for the device
        return None if value is None or isinstance(value, str) else float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None  # several elements, or nothing like a number
