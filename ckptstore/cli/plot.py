"""`ckptstore plot`: a run at a glance: its reward, where it went bad, its checkpoints, where it would resume."""

from __future__ import annotations

import click

from ckptstore.cli import condition
from ckptstore.cli.common import OVERRIDES, Verb, location_options
from ckptstore.cli.opening import open_run
from ckptstore.cli.render import done, echo, item, width
from ckptstore.drawing import MARKS, draw, text_chart
from ckptstore.health import Health
from ckptstore.locate import Where
from ckptstore.picture import Picture, compose
from ckptstore.sizes import counted

_MAX_COLUMNS = 120


@click.command("plot", cls=Verb, short_help="The run at a glance: its metric, and its checkpoints by health.")
@click.option("--out", metavar="FILE", default="", help="Into a .png, .svg or .pdf; else into the terminal.")
@click.option("--metric", metavar="NAME", default="", help="Another one than the breaker's first rule watches.")
@location_options
@OVERRIDES
def command(where: Where, out: str, metric: str) -> None:
    """Show the metric over the global steps, bad stretches, the trip, and each checkpoint by its health."""
    _, backend = open_run(where, read_only=True, steps_too=True)
    picture = compose(backend, metric=metric)
    if out:
        draw(picture, out)
        done(f"{out}: {counted(len(picture.points), 'step')}, {counted(len(picture.marks), 'checkpoint')}")
        return
    echo()
    for line in text_chart(picture, width=min(width() or 100, _MAX_COLUMNS), paint=_paint):
        echo(line)
    echo()
    _print_legend(picture)


def _paint(text: str, health: Health | None) -> str:
    return click.style(text, fg="blue" if health is None else condition.COLOURS[health], bold=health is None)


def _print_legend(picture: Picture) -> None:
    seen = [health for health in Health if any(mark.health is health for mark in picture.marks)]
    if seen:
        echo(
            "  ".join(_paint(f"{MARKS[health]} {health}", health) for health in seen)
            + "   (global steps; the log counts one more)" * (not picture.of_steps)
        )
    for stretch in picture.stretches:
        item("✗", str(stretch), fg="red")
    if picture.trip_step >= 0:
        state = "training does not start until it is recovered" if picture.halted else "cleared since"
        item("!", f"the breaker tripped at step {picture.trip_step}: {state}", fg="red")
    if picture.resume_step >= 0:
        item("→", f"would resume from step {picture.resume_step}: {picture.resume_why}", fg="green")
    else:
        item("→", f"nothing to resume from: {picture.resume_why}", fg="red")
