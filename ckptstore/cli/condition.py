"""How a checkpoint's health looks, in tables and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from ckptstore.cli.render import NO_VERDICT, note
from ckptstore.errors import CkptStoreError
from ckptstore.health import Health, Verdict, ledger_of, of
from ckptstore.model import Checkpoint

COLOURS = {Health.GOOD: "green", Health.UNKNOWN: "bright_black", Health.SUSPECT: "yellow", Health.BAD: "red"}
MARKS = {Health.GOOD: "♥", Health.UNKNOWN: "·", Health.SUSPECT: "?", Health.BAD: "✗"}


class Shown(NamedTuple):
    """One verdict in each way of showing it."""

    cells: tuple[str, str]  #: the metric's value, and the health
    text: str
    json: dict[str, Any]
    resumable: bool
    fallen: bool = False  #: whether its reward is far below what it was, although it is good


def of_all(run: str, checkpoints: Sequence[Checkpoint]) -> dict[int, Shown]:
    """The verdicts on checkpoints of a run, by their identity; none where there are no metrics."""
    ledger = ledger_of(run)
    shown = {}
    for checkpoint in checkpoints if ledger else ():
        verdict = of(checkpoint, ledger)
        text = f"health {verdict.health}: {verdict.why}"
        shown[id(checkpoint)] = Shown(
            (metric(verdict.value), health(verdict.health)),
            text,
            verdict_json(verdict),
            verdict.health.resumable,
            bool(verdict.fallen),
        )
    return shown


def of_kept(run: str, checkpoint: Checkpoint) -> Shown:
    """The verdict on what was just kept of a run. One that cannot be told, as where the ledger cannot be read, is no error."""
    try:
        shown = of_all(run, [checkpoint]).get(id(checkpoint))
    except CkptStoreError as error:
        note(f"whether step {checkpoint.step} is healthy cannot be told: {error}")
        shown = None
    return shown or Shown(("-", health(Health.UNKNOWN)), "", NO_VERDICT, True)


def metric(value: float | None) -> str:
    """A metric's value, or a dash where none is recorded."""
    return "-" if value is None else f"{value:.4g}"


def health(value: Health) -> str:
    """The health, marked and coloured."""
    return click.style(f"{MARKS[value]} {value}", fg=COLOURS[value])


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """The documented fields of a verdict; NaN and infinities as text, since JSON has none."""
    value = verdict.value
    return {
        "health": str(verdict.health),
        "health_why": verdict.why,
        "metric": verdict.metric,
        "value": value if value is None or abs(value) < float("inf") else str(value),
    }
