"""Draws the picture of a run: with matplotlib into a file, or with characters into a terminal."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable
from typing import Any

from ckptstore.errors import UsageError, from_os_error
from ckptstore.health import Health
from ckptstore.model import Status
from ckptstore.picture import Mark, Picture, Points

FORMATS = ("png", "svg", "pdf")
COLOURS = {Health.GOOD: "#2a9d4a", Health.UNKNOWN: "#8a8f98", Health.SUSPECT: "#e0a100", Health.BAD: "#d1352b"}
SHAPES = {Status.COMMITTED: "o", Status.COMPLETE: "o", Status.PARTIAL: "X", Status.CORRUPT: "X"}
_LINE, _OLD_LINE, _INK, _BAD = "#2457a6", "#aebdd6", "#30343b", "#d1352b"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


# --- into a file -------------------------------------------------------------------------------------------------------


def draw(picture: Picture, path: str) -> None:
    """Draw into a PNG, SVG or PDF, by the name's ending; replaced at once. UsageError without matplotlib."""
    ending = os.path.splitext(path)[1].lstrip(".").lower()
    if ending not in FORMATS:
        raise UsageError(f"--out {path}: pictures are made as {', '.join(FORMATS)}", hint="Name it run.png, say.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UsageError(
            "matplotlib is not installed", hint="pip install 'ckptstore[plot]'; without --out, plot draws in the terminal."
        ) from error
    figure = Figure(figsize=(11, 5.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.06))
    chart, strip = figure.subplots(2, 1, sharex=True, height_ratios=(5.2, 1))
    _draw_chart(chart, picture)
    _draw_strip(strip, picture)
    figure.suptitle(picture.title, x=0.014, ha="left", fontsize=13, fontweight="bold", color=_INK)
    draft = f"{path}.{secrets.token_hex(4)}"
    try:
        figure.savefig(draft, format=ending)
        os.replace(draft, path)
    except OSError as error:
        raise from_os_error(error, doing="writing", path=path) from error


def _draw_chart(axes: Any, picture: Picture) -> None:
    _frame(axes)
    values = picture.values or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.08
    axes.set_ylim(low - margin, high + 3 * margin)
    span = max(picture.last_step - picture.first_step, 1)
    axes.set_xlim(picture.first_step - span * 0.02, picture.last_step + span * 0.03)
    for stretch in picture.stretches:
        axes.axvspan(stretch.first_step - 0.5, stretch.last_step + 0.5, color=_BAD, alpha=0.10, linewidth=0)
    for points in picture.abandoned:
        _draw_line(axes, points, _OLD_LINE, 1.2)
    _draw_line(axes, picture.points, _LINE, 1.6)
    broken = [step for step, value in picture.points if not math.isfinite(value)]
    axes.scatter(
        broken,
        [0.015] * len(broken),
        transform=axes.get_xaxis_transform(),
        marker="x",
        s=22,
        color=_BAD,
        zorder=4,
        clip_on=False,
    )
    axes.set_ylabel(picture.metric, color=_INK)
    if picture.stretches:
        first = picture.stretches[0]
        text = f"bad from step {first.first_step} on"
        _label(axes, first.first_step - 0.5, 0.03, text, _BAD, ha="right")
    if picture.trip_step >= 0:
        axes.axvline(picture.trip_step, color=_BAD, linewidth=1.4, linestyle=(0, (5, 3)))
        _label(axes, picture.trip_step, 0.90, f"tripped at {picture.trip_step}", _BAD, ha=_side(picture, picture.trip_step))
    if picture.resume_step >= 0:
        axes.axvline(picture.resume_step, color=COLOURS[Health.GOOD], linewidth=1.4)
        text = f"resume from {picture.resume_step}"
        _label(axes, picture.resume_step, 0.97, text, COLOURS[Health.GOOD], ha=_side(picture, picture.resume_step, left=True))


def _side(picture: Picture, step: int, *, left: bool = False) -> str:
    """Which side of a line its label has room on: "left" means that the text begins there."""
    share = (step - picture.first_step) / max(picture.last_step - picture.first_step, 1)
    if left:
        return "right" if share > 0.15 else "left"
    return "left" if share < 0.85 else "right"


def _label(axes: Any, step: float, height: float, text: str, colour: str, *, ha: str) -> None:
    shift = 5 if ha == "left" else -5
    label = axes.annotate(
        text, (step, height), xycoords=axes.get_xaxis_transform(), xytext=(shift, 0), textcoords="offset points",
        ha=ha, va="top" if height > 0.5 else "bottom", color=colour, fontsize=9.5, fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}, zorder=6,
    )  # fmt: skip
    label.set_in_layout(False)  # a label at the edge must not squeeze the chart


def _draw_line(axes: Any, points: Points, colour: str, width: float) -> None:
    steps = [step for step, _ in points]
    values = [value if math.isfinite(value) else math.nan for _, value in points]  # a gap
    axes.plot(steps, values, color=colour, linewidth=width, solid_joinstyle="round", zorder=3)
    if len(points) <= 60:
        axes.plot(steps, values, linestyle="none", marker="o", markersize=2.6, color=colour, zorder=3)


def _draw_strip(axes: Any, picture: Picture) -> None:
    """The checkpoints: colour is health, a cross is what is not whole, a ring round the point to resume from."""
    _frame(axes)
    axes.grid(visible=False)
    axes.set_ylim(-0.9, 0.9)
    rows = {"slot": ("recover slot", -0.45)}
    usual = 0.45 if any(mark.kind == "slot" for mark in picture.marks) else 0.0
    for mark in picture.marks:
        height = rows[mark.kind][1] if mark.kind in rows else usual
        axes.scatter(
            mark.step, height, marker=SHAPES[mark.status], s=64, color=COLOURS[mark.health], zorder=4,
            edgecolor=_INK if mark.status is Status.COMMITTED else "white", linewidth=1.0,
        )  # fmt: skip
    resumable = [mark for mark in picture.marks if mark.step == picture.resume_step]
    for mark in resumable[:1]:
        height = rows[mark.kind][1] if mark.kind in rows else usual
        axes.scatter(mark.step, height, s=190, facecolor="none", edgecolor=COLOURS[Health.GOOD], linewidth=1.8, zorder=5)
    axes.set_yticks([usual, *([-0.45] if usual else [])], ["checkpoints", *(["recover slot"] if usual else [])])
    axes.tick_params(axis="y", length=0)
    logged = "global step   (the trainer's log counts one more: Train step N is global step N - 1)"
    axes.set_xlabel("step" if picture.of_steps else logged, color=_INK)
    axes.legend(
        handles=_legend(picture), loc="upper center", bbox_to_anchor=(0.5, -0.62), ncols=8, frameon=False, fontsize=9,
        handletextpad=0.4, columnspacing=1.8,
    )  # fmt: skip


def _legend(picture: Picture) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen = {mark.health for mark in picture.marks}
    dot: dict[str, Any] = {"linestyle": "none", "markersize": 8}
    handles: list[Any] = [Line2D([], [], marker="o", color=COLOURS[h], label=str(h), **dot) for h in Health if h in seen]
    if any(not mark.status.usable for mark in picture.marks):
        handles.append(Line2D([], [], marker="X", color=COLOURS[Health.UNKNOWN], label="not whole", **dot))
    if picture.stretches:
        handles.append(Patch(facecolor=_BAD, alpha=0.15, label="bad steps"))
    if picture.abandoned:
        handles.append(Line2D([], [], color=_OLD_LINE, label="gone back from"))
    return handles


def _frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa0a8")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


# --- into a terminal ---------------------------------------------------------------------------------------------------

Paint = Callable[[str, Health | None], str]
"""Colours a text by a health; None is for the curve."""
MARKS = {Health.GOOD: "♥", Health.UNKNOWN: "·", Health.SUSPECT: "?", Health.BAD: "✗"}


def text_chart(picture: Picture, *, width: int, height: int = 12, paint: Paint = lambda text, _: text) -> list[str]:
    """The picture in lines of at most `width` characters: the curve in braille dots, below it the checkpoints by health."""
    values = picture.values or [0.0]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    labels = [f"{high:.4g}", f"{(low + high) / 2:.4g}", f"{low:.4g}"]
    gutter = max(len(label) for label in (*labels, "saved")) + 1
    columns = max(width - gutter - 1, 10)
    span = max(picture.last_step - picture.first_step, 1)

    def column(step: int, per: int = 1) -> int:
        return min((step - picture.first_step) * (columns * per - 1) // span, columns * per - 1)

    cells = [[0] * columns for _ in range(height)]
    for points in (*picture.abandoned, picture.points):
        last: tuple[int, int] | None = None
        for step, value in points:
            if not math.isfinite(value):
                last = None
                continue
            at = (column(step, 2), round((high - value) / (high - low) * (height * 4 - 1)))
            for x, y in _between(last or at, at):
                cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            last = at
    bad = {x for stretch in picture.stretches for x in range(column(stretch.first_step), column(stretch.last_step) + 1)}
    lines = [f"{'':{gutter}} {picture.metric}"]
    for number, row in enumerate(cells):
        label = {0: labels[0], height // 2: labels[1], height - 1: labels[2]}.get(number, "")
        drawn = "".join(
            paint(chr(0x2800 + dots), None) if dots else paint("░", Health.BAD) if x in bad else " "
            for x, dots in enumerate(row)
        )
        lines.append(f"{label:>{gutter}}│{drawn.rstrip()}")
    lines.append(f"{'':{gutter}}└{'─' * columns}")
    lines.append(f"{'saved':>{gutter}} {_mark_row(picture, columns, column, paint)}")
    lines.append(f"{'':{gutter}} {_axis_row(picture, columns, column)}")
    return lines


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a line from one to the other."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (start[0] + round((end[0] - start[0]) * i / count), start[1] + round((end[1] - start[1]) * i / count))
        for i in range(count + 1)
    ]


def _mark_row(picture: Picture, columns: int, column: Callable[[int], int], paint: Paint) -> str:
    worst: dict[int, Mark] = {}
    order = list(Health)
    for mark in picture.marks:
        x = column(mark.step)
        if x not in worst or order.index(mark.health) > order.index(worst[x].health):
            worst[x] = mark
    cells = [" "] * columns
    for x, mark in worst.items():
        cells[x] = paint(MARKS[mark.health] if mark.status.usable else "◐", mark.health)
    return "".join(cells).rstrip()


def _axis_row(picture: Picture, columns: int, column: Callable[[int], int]) -> str:
    """Steps under the axis: the point to resume from, the trip, and the ends, as far as there is room."""
    row = [" "] * columns

    def put(at: int, text: str) -> None:
        if 0 <= at <= columns - len(text) and not "".join(row[max(at - 1, 0) : at + len(text) + 1]).strip():
            row[at : at + len(text)] = text

    for step, what in ((picture.resume_step, "resume"), (picture.trip_step, "trip")):
        if step >= 0:
            at, text = column(step), f"↑{step} {what}"
            if at + len(text) > columns:
                text = f"{step} {what}↑"
                at -= len(text) - 1
            put(at, text)
    put(0, str(picture.first_step))
    put(columns - len(str(picture.last_step)), str(picture.last_step))
    return "".join(row).rstrip()
