"""What a picture of a run shows: its metric, where it went bad, its checkpoints and their health, where it would resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptstore import halt, health
from ckptstore import ledger as ledgers
from ckptstore.backends.base import Backend
from ckptstore.choose import resume_point
from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.health import Health, Reader, Stretch
from ckptstore.ledger import Ledger, Line
from ckptstore.listing import scan
from ckptstore.model import Status

Points = Sequence[tuple[int, float]]
"""(global step, value) by step; values may be NaN or infinite."""


class Mark(NamedTuple):
    """One checkpoint in the picture."""

    step: int
    health: Health
    status: Status
    kind: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything to be drawn; steps are global steps. -1: none."""

    title: str
    metric: str
    points: Points  #: the history that the run follows now
    abandoned: tuple[Points, ...]  #: what was trained, and then gone back from
    stretches: tuple[Stretch, ...]  #: bad enough for long enough
    marks: tuple[Mark, ...]
    trip_step: int
    halted: bool  #: the trip's record still keeps training from starting
    resume_step: int
    resume_why: str
    of_steps: bool = False  #: of a store of steps: how its trainer counts in its log is not known

    @property
    def first_step(self) -> int:
        """Of everything that has a place on the axis."""
        return min(self._steps(), default=0)

    @property
    def last_step(self) -> int:
        """Of everything that has a place on the axis."""
        return max(self._steps(), default=1)

    def _steps(self) -> list[int]:
        ends = [step for points in (self.points, *self.abandoned) if points for step in (points[0][0], points[-1][0])]
        return [*ends, *(mark.step for mark in self.marks), *(s for s in (self.trip_step, self.resume_step) if s >= 0)]

    @property
    def values(self) -> list[float]:
        """All finite values."""
        return [value for points in (self.points, *self.abandoned) for _, value in points if math.isfinite(value)]


def compose(backend: Backend, *, metric: str = "") -> Picture:
    """Look at a run and put its picture together; `metric` other than what its rules watch. UsageError without metrics."""
    listing = scan(backend)
    side = ledgers.side_of(listing.run.path)
    ledger = health.ledger_of(listing.run.path)
    if not ledger:
        raise UsageError(
            f"no metrics are recorded for {listing.run.path}",
            hint="`ckptstore status --import FILE` takes them from the trainer's main.log, JSONL or CSV.",
        )
    name = metric or next((name for rule in ledger.judges.rules for name in rule.metrics), "")
    read = Reader()
    points = _points(ledger.line(), name, read)
    if not points:
        known = sorted({key for record in ledger.line()[-50:] for key in record.metrics})
        raise UsageError(f"no metric {name} is recorded", hint=f"There are: {', '.join(known[:20])}.")
    checkpoints = [*listing.checkpoints, *listing.adopted]
    if listing.slot is not None and listing.slot.step >= 0:
        checkpoints.append(listing.slot)
    marks = [Mark(c.step, health.of(c, ledger).health, c.status, c.kind) for c in checkpoints]
    try:
        point = resume_point(backend, listing, read_slot=False)
        resume_step, why = point.checkpoint.step, point.why
    except CkptStoreError as error:
        resume_step, why = -1, str(error)
    trip = halt.read(side)
    trips = [event.step for event in ledger.events if event.name == "trip"]
    return Picture(
        title=f"{listing.run.experiment}/{listing.run.trial}",
        metric=read.keys.get(name, name),
        points=points,
        abandoned=tuple(_points(part, name, Reader()) for part in _abandoned(ledger)),
        stretches=tuple(stretch for stretch in health.replay_of(ledger).stretches if stretch.confirmed),
        marks=tuple(sorted(marks)),
        trip_step=trip.step if trip is not None else trips[-1] if trips else -1,
        halted=trip is not None,
        resume_step=resume_step,
        resume_why=why,
        of_steps=listing.framework == "steps",
    )


def _points(line: Line, name: str, read: Reader) -> list[tuple[int, float]]:
    points = []
    for record in line:
        read.metrics = dict(record.metrics)
        if (value := read(name)) is not None:
            points.append((record.step, value))
    return points


def _abandoned(ledger: Ledger) -> list[Line]:
    """Of each branch what a later one does not share: from where the run was gone back to."""
    parts = []
    for number, branch in enumerate(ledger.branches[:-1]):
        start = min(later[0].step for later in ledger.branches[number + 1 :])
        parts.append(tuple(record for record in branch if record.step >= start))
    return [part for part in parts if part]
