"""The picture of a run: what is in it, in a file and in a terminal."""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ckptstore import halt, ledger
from ckptstore.backends.local import LocalBackend
from ckptstore.breaker import CircuitBreaker
from ckptstore.drawing import draw, text_chart
from ckptstore.errors import TrainingHalted, UsageError
from ckptstore.health import Health
from ckptstore.picture import Picture, compose
from ckptstore.rules import REWARD
from tests import trees
from tests.commands import Result, invoke, isolate


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    isolate(monkeypatch, tmp_path)
    return lambda *words: invoke(capfd, *words)


def story(root: Path, *, good_steps: int = 187) -> Path:
    """The run of step 188, halted."""
    run = trees.make_run(root, slot="dcp", recover_info=187, slot_step=187)
    breaker = CircuitBreaker(run)
    try:
        for step in range(300):
            breaker.observe({REWARD: 0.7 + 0.05 * math.sin(step / 9) if step < good_steps else 0.0}, step)
    except TrainingHalted:
        pass
    return run


def picture_of(run: Path, **options: Any) -> Picture:
    return compose(LocalBackend(run), **options)


def test_what_is_in_the_picture(tmp_path: Path) -> None:
    picture = picture_of(story(tmp_path))
    assert picture.metric == REWARD
    assert [step for step, _ in picture.points] == list(range(197))
    assert [(s.first_step, s.last_step, s.steps) for s in picture.stretches] == [(187, 196, 10)]
    assert (picture.trip_step, picture.halted, picture.resume_step) == (196, True, 140)
    marks = {(mark.step, mark.kind): mark.health.value for mark in picture.marks}
    assert marks == {
        (46, "export"): "good",
        (93, "export"): "good",
        (140, "export"): "good",
        (187, "export"): "bad",
        (187, "slot"): "bad",
    }
    assert (picture.first_step, picture.last_step) == (0, 196)


def test_what_was_gone_back_from_is_kept_apart(tmp_path: Path) -> None:
    run = story(tmp_path)
    halt.reset(ledger.side_of(str(run)))
    again = CircuitBreaker(run)
    for step in range(141, 160):
        again.observe({REWARD: 0.5}, step)
    picture = picture_of(run)
    assert [step for step, _ in picture.points] == list(range(160))
    (abandoned,) = picture.abandoned
    assert [step for step, _ in abandoned] == list(range(141, 197))
    assert (picture.trip_step, picture.halted) == (196, False)


def test_without_metrics_it_says_where_to_get_them(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    with pytest.raises(UsageError) as refused:
        picture_of(run)
    assert "--import" in refused.value.hint
    run = story(tmp_path / "other")
    with pytest.raises(UsageError, match="no metric loss") as refused:
        picture_of(run, metric="loss")
    assert REWARD in refused.value.hint


# In a terminal


def test_the_terminal_picture(tmp_path: Path) -> None:
    lines = text_chart(picture_of(story(tmp_path)), width=100)
    assert max(map(len, lines)) <= 100
    assert REWARD in lines[0]
    saved = next(line for line in lines if line.strip().startswith("saved"))
    assert re.sub(r"\s+", "", saved) == "saved♥♥♥✗"
    assert "↑140 resume" in lines[-1]
    assert "trip↑" in lines[-1]
    assert lines[-1].index("140") > saved.index("♥")
    shaded = [line.count("░") for line in lines]
    assert max(shaded) >= 3
    drawn = [line for line in lines if any("⠀" < char <= "⣿" for char in line)]
    assert len(drawn) >= 10, "from the top down to zero"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [3, 12])
@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.5] * 30,
        [math.nan] * 5,
        [0.0, math.inf, 1.0, math.nan, -math.inf, 0.5],
        [1e300, -1e300],
        [float(n) for n in range(500)],
    ],
)
def test_any_curve_fits_any_terminal(width: int, height: int, values: list[float]) -> None:
    picture = Picture("t", "m", list(enumerate(values)), (), (), (), -1, False, -1, "nothing")
    lines = text_chart(picture, width=width, height=height)
    assert max(len(line) for line in lines[1:]) <= max(width, 22)
    assert len(lines) == height + 4


def test_the_verb_in_a_terminal(tmp_path: Path, cli: Callable[..., Result]) -> None:
    run = story(tmp_path / "root")
    result = cli("plot", "--run", run)
    assert result.code == 0
    assert "♥ good  ✗ bad" in result.out
    assert "the breaker tripped at step 196: training does not start until it is recovered" in result.out
    assert "would resume from step 140" in result.out
    assert "\x1b" not in result.out, "no colour into a pipe"


def test_a_step_that_no_checkpoint_survives(tmp_path: Path, cli: Callable[..., Result]) -> None:
    run = story(tmp_path / "root", good_steps=30)
    result = cli("plot", "--run", run)
    assert "nothing to resume from" in result.out


# Into a file


def count_colour(pixels: np.ndarray, red: int, green: int, blue: int) -> int:
    """Pixels of this colour, give or take what blending rounds."""
    return int((np.abs(pixels.astype(int) - (red, green, blue)).max(axis=-1) <= 2).sum())


def test_a_png_with_the_colours_of_what_happened(tmp_path: Path, cli: Callable[..., Result]) -> None:
    run = story(tmp_path / "root")
    result = cli("plot", "--run", run, "--out", tmp_path / "run.png")
    assert result.code == 0, result.err
    pixels = np.asarray(Image.open(tmp_path / "run.png").convert("RGB"))
    assert pixels.shape == (840, 1650, 3)
    assert count_colour(pixels, 0x2A, 0x9D, 0x4A) > 800, "good checkpoints and the line to resume from, green"
    assert count_colour(pixels, 0xD1, 0x35, 0x2B) > 200, "bad ones and the trip, red"
    assert count_colour(pixels, 0x24, 0x57, 0xA6) > 1000, "the curve"
    shaded = (round(255 - (255 - value) * 0.10) for value in (0xD1, 0x35, 0x2B))
    assert count_colour(pixels, *shaded) > 5000, "the streak"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["run.png"], "no draft is left"


def test_an_svg_says_it_in_words(tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(picture_of(story(tmp_path / "root")), str(tmp_path / "run.svg"))
    text = (tmp_path / "run.svg").read_text()
    for wanted in ("gsm8k-grpo/trial0", REWARD, "tripped at 196", "resume from 140", "bad from step 187 on", "recover slot"):
        assert wanted in text
    for health in (Health.GOOD, Health.BAD):
        assert f">{health}<" in text


@pytest.mark.parametrize("values", [[0.5], [math.nan] * 5, [0.0, math.inf, -math.inf], [0.3] * 5])
def test_any_curve_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    draw(Picture("t", "m", list(enumerate(values)), (), (), (), 2, True, 1, ""), str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_what_cannot_be_made_is_said(tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    run = story(tmp_path / "root")
    assert cli("plot", "--run", run, "--out", "run.gif").code == 2
    assert cli("plot", "--run", run, "--out", tmp_path / "absent/run.png").code == 1
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = cli("plot", "--run", run, "--out", "run.png")
    assert result.code == 2
    assert "ckptstore[plot]" in result.err
    assert cli("plot", "--run", run).code == 0, "the terminal needs none of it"
