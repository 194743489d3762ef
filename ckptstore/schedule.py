"""When to save: by epochs, steps and seconds, as AReaL's `saver:` and `recover:` blocks mean it; and how often it should be.

AReaL keeps three separate counts and saves when any of them is due: a save for one leaves the others counting. Due means that
as many as configured have passed since this count's own last save; unset means never.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.config import RunConfig
from ckptstore.errors import UsageError
from ckptstore.ledger import Ledger
from ckptstore.model import Checkpoint
from ckptstore.ranks import Alone, together

COUNTS = ("epoch", "step", "time")


class SaveSchedule:
    """Says after which steps to save. Not thread-safe.

    None: that count never asks for a save. With `freq_secs` on several ranks their clocks differ: `agree` makes all of them
    save when one would (a collective at each check, and only where freq_secs is set).
    """

    def __init__(
        self,
        freq_epochs: int | None = None,
        freq_steps: int | None = None,
        freq_secs: float | None = None,
        *,
        agree: bool = False,
        group: Any = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        for name, value in (("freq_epochs", freq_epochs), ("freq_steps", freq_steps), ("freq_secs", freq_secs)):
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and (not numeric or not 0 < value < math.inf):
                raise UsageError(f"{name} is {value!r}, and must be a number above 0, or None")
        self.freq_epochs, self.freq_steps, self.freq_secs = freq_epochs, freq_steps, freq_secs
        self._ranks = together(group) if agree else Alone()
        self._now_s = now_s
        self._started_s = self._last_s = now_s()
        self._epochs = self._steps = self._checks = 0
        self._epochs_saved = self._steps_saved = self._checks_saved = 0

    @classmethod
    def from_config(cls, config: RunConfig, block: str = "saver", **options: Any) -> SaveSchedule:
        """The schedule of a block (saver or recover) of the trainer's configuration; null and missing mean never."""
        found = {name: config.get(f"{block}.{name}") for name in ("freq_epochs", "freq_steps", "freq_secs")}
        try:
            return cls(**found, **options)
        except UsageError as error:
            raise UsageError(f"{block}: {error.message}") from error

    def check(self, *, epochs: int = 0, steps: int = 1) -> bool:
        """Count what was done since the last check, and tell whether to save now. `epochs`: 1 after an epoch's last step."""
        self._epochs += epochs
        self._steps += steps
        self._checks += 1
        by_epoch = self.freq_epochs is not None and self._epochs - self._epochs_saved >= self.freq_epochs
        by_step = self.freq_steps is not None and self._steps - self._steps_saved >= self.freq_steps
        by_time = False
        if self.freq_secs is not None:
            by_time = self._ranks.any(self._now_s() - self._last_s >= self.freq_secs)
        if by_epoch:
            self._epochs_saved = self._epochs
        if by_step:
            self._steps_saved = self._steps
        if by_time:
            self._last_s, self._checks_saved = self._now_s(), self._checks
        return by_epoch or by_step or by_time

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The state in the very fields of AReaL's saver_info.json, so that either can go on from the other's."""
        counts = {
            "epoch": (None, self.freq_epochs, self._epochs, self._epochs_saved),
            "step": (None, self.freq_steps, self._steps, self._steps_saved),
            "time": (self.freq_secs, None, self._checks, self._checks_saved),
        }
        return {
            name: {
                "frequence_seconds": seconds,  # AReaL's spelling
                "frequency_steps": frequency,
                "start_time": self._started_s,
                "steps": count,
                "last_time": self._last_s,
                "last_steps": saved,
                "interval_steps": count - saved,
                "interval_seconds": self._now_s() - self._last_s,
                "initial_value": False,
            }
            for name, (seconds, frequency, count, saved) in counts.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Take over the counts of a state, its own or AReaL's. Returns what differs in the frequencies, as sentences.

        The frequencies stay the configured ones. AReaL takes over the stored ones, so that an edited YAML has no effect, and
        a state full of nulls means that the resumed run never saves again. UsageError where a count is missing.
        """
        try:
            epoch, step, timed = (state[name] for name in COUNTS)
            counts = [(int(inner["steps"]), int(inner["last_steps"])) for inner in (epoch, step, timed)]
            started_s, last_s = float(timed["start_time"]), float(timed["last_time"])
            stored = (epoch["frequency_steps"], step["frequency_steps"], timed["frequence_seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not the state of a save schedule: {error!r}") from error
        (self._epochs, self._epochs_saved), (self._steps, self._steps_saved), (self._checks, self._checks_saved) = counts
        self._started_s, self._last_s = started_s, last_s
        configured = (self.freq_epochs, self.freq_steps, self.freq_secs)
        names = ("freq_epochs", "freq_steps", "freq_secs")
        return tuple(
            f"{name} is {now}, and was {before} when the state was saved"
            for name, now, before in zip(names, configured, stored, strict=True)
            if now != before
        )


@dataclass(frozen=True, slots=True)
class Advice:
    """How often to save. Fractions are of all time spent: saving, and doing again what a failure lost."""

    interval_s: float
    cost_fraction: float
    current_interval_s: float | None = None  #: None: nothing is ever saved
    current_cost_fraction: float | None = None
    step_s: float | None = None

    @property
    def interval_steps(self) -> int | None:
        """The same in steps, at least 1; None where a step's duration is not known."""
        return None if self.step_s is None else max(round(self.interval_s / self.step_s), 1)

    @property
    def at_risk_s(self) -> float | None:
        """What a failure at the worst moment costs with the current setting, in seconds of training; None: everything."""
        return self.current_interval_s


def best_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of training between saves that waste the least time, if a save blocks `save_s` and failures are `mtbf_s` apart.

    Daly's higher-order estimate; for short saves it is Young's sqrt(2 · save_s · mtbf_s).
    """
    if not 0 < save_s < math.inf or not 0 < mtbf_s < math.inf:
        raise UsageError("the time of a save and the time between failures must be above 0")
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def cost_fraction(interval_s: float, save_s: float, mtbf_s: float, *, restart_s: float = 0.0) -> float:
    """The share of all time that is lost when saving every `interval_s` seconds of training, with failures at random."""
    # Time to get interval + save done without a failure, memoryless, against the interval itself.
    exponent = (interval_s + save_s) / mtbf_s
    if exponent > 500:
        return 1.0
    total_s = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent)
    return 1.0 - interval_s / total_s


def advise(
    save_s: float,
    mtbf_s: float,
    *,
    step_s: float | None = None,
    current_interval_s: float | None = None,
    restart_s: float = 0.0,
) -> Advice:
    """Advice from measured times, in seconds. `current_interval_s` None: the run is never saved."""
    best_s = best_interval_s(save_s, mtbf_s)
    if step_s is not None:
        best_s = max(best_s, step_s)  # nothing can be saved within a step
    current = None if current_interval_s is None else cost_fraction(current_interval_s, save_s, mtbf_s, restart_s=restart_s)
    return Advice(best_s, cost_fraction(best_s, save_s, mtbf_s, restart_s=restart_s), current_interval_s, current, step_s)


def measured_step_s(ledger: Ledger) -> float | None:
    """Seconds a step takes: the median over the newest branch of the ledger; None where its times tell nothing."""
    records = ledger.branches[-1][-500:] if ledger.branches else ()
    paces = [
        (after.at_s - before.at_s) / (after.step - before.step)
        for before, after in itertools.pairwise(records)
        if after.at_s > before.at_s > 0
    ]
    return statistics.median(paces) if paces else None


def measured_save_s(checkpoints: Sequence[Checkpoint]) -> float | None:
    """Seconds that a save takes at least: the median time from a checkpoint's first file to its last; None without any."""
    spans = []
    for checkpoint in checkpoints:
        times = [file.mtime_ns for part in checkpoint.parts for file in part.files]
        if checkpoint.status.usable and len(times) > 1 and max(times) > min(times):
            spans.append((max(times) - min(times)) / 1e9)
    return statistics.median(spans) if spans else None


def measured_mtbf_s(ledger: Ledger) -> float | None:
    """Seconds between failures: the recorded time over the restarts that went back; None where there was none."""
    times = [record.at_s for branch in ledger.branches for record in (branch[0], branch[-1]) if record.at_s > 0]
    failures = len(ledger.branches) - 1
    return (max(times) - min(times)) / failures if failures > 0 and times and max(times) > min(times) else None


def interval_of(config: RunConfig, *, step_s: float | None, steps_per_epoch: int | None) -> float | None:
    """Seconds between saves by the YAML's `saver:` and `recover:` blocks, the shorter one; None where nothing is ever saved.

    `recover:` counts only while its mode keeps a slot.
    """
    blocks = ["saver"]
    if config.text("recover.mode") not in ("", "disabled", "off", "False"):
        blocks.append("recover")
    found: list[float] = []
    for block in blocks:
        seconds, steps, epochs = (config.get(f"{block}.{name}") for name in ("freq_secs", "freq_steps", "freq_epochs"))
        if _positive(seconds):
            found.append(float(seconds))
        if _positive(steps) and step_s is not None:
            found.append(steps * step_s)
        if _positive(epochs) and step_s is not None and steps_per_epoch:
            found.append(epochs * steps_per_epoch * step_s)
    return min(found, default=None)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
