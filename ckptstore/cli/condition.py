"""How a checkpoint's health looks, in tables and in JSON."""

from __future__ import annotations

from typing import Any

import click

from ckptstore.health import Health, Verdict

COLOURS = {Health.GOOD: "green", Health.UNKNOWN: "bright_black", Health.SUSPECT: "yellow", Health.BAD: "red"}
MARKS = {Health.GOOD: "♥", Health.UNKNOWN: "·", Health.SUSPECT: "?", Health.BAD: "✗"}
TITLES = ("reward", "health")


def cells(verdict: Verdict) -> tuple[str, str]:
    """The cells under TITLES."""
    return metric(verdict.value), health(verdict.health)


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
