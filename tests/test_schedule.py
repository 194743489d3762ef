"""When to save: the trainer's own semantics, its state files, and the advice that follows from measured times."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ckptstore import ledger
from ckptstore.backends.local import LocalBackend
from ckptstore.config import RunConfig
from ckptstore.doctor import examine
from ckptstore.errors import UsageError
from ckptstore.frameworks.areal.layout import run_ref
from ckptstore.frameworks.areal.recover_info import CONTROL_FIELDS
from ckptstore.listing import scan
from ckptstore.schedule import (
    SaveSchedule,
    advise,
    best_interval_s,
    cost_fraction,
    interval_of,
    measured_mtbf_s,
    measured_save_s,
    measured_step_s,
)
from tests import trees


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def saves(
    schedule: SaveSchedule, steps: int, *, per_epoch: int = 10**9, clock: Clock | None = None, step_s: float = 0.0
) -> list[int]:
    """The global steps after which it says save."""
    found = []
    for step in range(steps):
        if clock is not None:
            clock.now_s += step_s
        if schedule.check(epochs=int(step % per_epoch == per_epoch - 1)):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"freq_steps": 1}, list(range(20))),
        ({"freq_steps": 6}, [5, 11, 17]),
        ({"freq_epochs": 1}, [4, 9, 14, 19]),
        ({"freq_epochs": 2}, [9, 19]),
        ({"freq_epochs": 1, "freq_steps": 6}, [4, 5, 9, 11, 14, 17, 19]),  # each count goes on for itself
        ({"freq_secs": 30}, [2, 5, 8, 11, 14, 17]),
        ({"freq_secs": 25}, [2, 5, 8, 11, 14, 17]),  # counted from the last save, not in a raster
        ({"freq_secs": 30, "freq_steps": 4}, [2, 3, 5, 7, 8, 11, 14, 15, 17, 19]),
    ],
)
def test_when_to_save(settings: dict[str, Any], expected: list[int]) -> None:
    clock = Clock()
    schedule = SaveSchedule(**settings, now_s=clock)
    assert saves(schedule, 20, per_epoch=5, clock=clock, step_s=10.0) == expected


def test_after_a_resume_it_goes_on_counting() -> None:
    clock = Clock()
    one = SaveSchedule(1, 7, 33, now_s=clock)
    expected = saves(SaveSchedule(1, 7, 33, now_s=(other := Clock())), 40, per_epoch=6, clock=other, step_s=10.0)
    first = saves(one, 17, per_epoch=6, clock=clock, step_s=10.0)
    two = SaveSchedule(1, 7, 33, now_s=clock)
    assert two.load_state_dict(json.loads(json.dumps(one.state_dict()))) == ()
    second = []
    for step in range(17, 40):
        clock.now_s += 10.0
        if two.check(epochs=int(step % 6 == 5)):
            second.append(step)
    assert first + second == expected


def test_its_state_is_the_trainers_saver_info(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, recover_info=93)
    state = json.loads((run / "recover_info/saver_info.json").read_text())
    schedule = SaveSchedule(1)
    assert schedule.load_state_dict(state) == ()
    assert schedule.check(epochs=1)
    written = schedule.state_dict()
    assert written.keys() == state.keys() == {"epoch", "step", "time"}
    assert all(set(control) == CONTROL_FIELDS for control in written.values())
    assert written["epoch"]["steps"] == state["epoch"]["steps"] + 1
    assert written["epoch"]["frequency_steps"] == 1


def test_a_state_of_nulls_does_not_end_all_saving() -> None:
    state = SaveSchedule().state_dict()
    schedule = SaveSchedule(freq_steps=3)
    (difference,) = schedule.load_state_dict(state)
    assert difference == "freq_steps is 3, and was None when the state was saved"
    assert saves(schedule, 6) == [2, 5]


@pytest.mark.parametrize("state", [{}, {"epoch": 1, "step": 2, "time": 3}, {"epoch": {}, "step": {}, "time": {}}])
def test_what_is_no_state_is_refused(state: dict[str, Any]) -> None:
    schedule = SaveSchedule(freq_steps=2)
    schedule.check()
    with pytest.raises(UsageError, match="not the state"):
        schedule.load_state_dict(state)
    assert schedule.check(), "nothing was changed"


@pytest.mark.parametrize(
    "wrong", [{"freq_steps": 0}, {"freq_epochs": -1}, {"freq_secs": math.nan}, {"freq_steps": True}, {"freq_secs": "1"}]
)
def test_frequencies_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SaveSchedule(**wrong)


def test_from_the_trainers_yaml() -> None:
    config = RunConfig(
        "run.yaml", {"saver": {"freq_epochs": 1, "freq_steps": None}, "recover": {"freq_secs": "${x}"}, "x": "3"}
    )
    assert SaveSchedule.from_config(config).freq_epochs == 1
    assert saves(SaveSchedule.from_config(RunConfig("", {})), 99) == []
    with pytest.raises(UsageError, match=r"recover: freq_secs is '3'"):
        SaveSchedule.from_config(config, "recover")


# Advice


def simulated_cost(interval_s: float, save_s: float, mtbf_s: float, *, seed: int) -> float:
    """The share of lost time in a simulated training with failures at random: what the formula claims, without the formula."""
    dice = random.Random(seed)
    done_s = total_s = 0.0
    failure_s = dice.expovariate(1 / mtbf_s)
    while done_s < 4000 * interval_s:
        if failure_s >= interval_s + save_s:
            failure_s -= interval_s + save_s
            total_s += interval_s + save_s
            done_s += interval_s
        else:
            total_s += failure_s
            failure_s = dice.expovariate(1 / mtbf_s)
    return 1 - done_s / total_s


@pytest.mark.parametrize(("interval_s", "save_s", "mtbf_s"), [(600, 30, 3600), (3000, 30, 3600), (60, 30, 86400)])
def test_the_cost_is_what_a_simulation_gives(interval_s: float, save_s: float, mtbf_s: float) -> None:
    simulated = simulated_cost(interval_s, save_s, mtbf_s, seed=3)
    assert cost_fraction(interval_s, save_s, mtbf_s) == pytest.approx(simulated, rel=0.08)


@pytest.mark.parametrize(("save_s", "mtbf_s"), [(1.0, 86400.0), (30.0, 7200.0), (120.0, 3600.0)])
def test_no_other_interval_is_better(save_s: float, mtbf_s: float) -> None:
    best_s = best_interval_s(save_s, mtbf_s)
    best = cost_fraction(best_s, save_s, mtbf_s)
    others = [cost_fraction(best_s * factor, save_s, mtbf_s) for factor in (0.3, 0.5, 0.8, 1.25, 2, 4)]
    assert best < min(others)
    assert best_s == pytest.approx(math.sqrt(2 * save_s * mtbf_s), rel=0.2), "Young's estimate is near where saves are short"


def test_a_save_longer_than_twice_the_time_between_failures() -> None:
    assert best_interval_s(100.0, 40.0) == 40.0
    assert cost_fraction(1e9, 1.0, 1.0) == 1.0
    for wrong in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(UsageError):
            best_interval_s(*wrong)


def test_advice_in_steps_and_what_is_at_risk() -> None:
    advice = advise(20.0, 6 * 3600, step_s=75.0, current_interval_s=47 * 75.0)
    assert advice.interval_steps == round(advice.interval_s / 75)
    assert advice.at_risk_s == 47 * 75.0
    assert advice.current_cost_fraction is not None
    assert advice.current_cost_fraction > advice.cost_fraction
    assert advise(0.01, 60.0, step_s=75.0).interval_steps == 1, "nothing is saved within a step"
    never = advise(20.0, 3600.0)
    assert (never.at_risk_s, never.current_cost_fraction, never.interval_steps) == (None, None, None)


@pytest.mark.parametrize(
    ("values", "expected_s"),
    [
        ({"saver": {"freq_epochs": 1}, "recover": {"mode": "disabled", "freq_steps": 1}}, 470.0),
        ({"saver": {"freq_epochs": 1}, "recover": {"mode": "auto", "freq_steps": 5}}, 50.0),
        ({"saver": {"freq_secs": 33}, "recover": {"mode": "on"}}, 33.0),
        ({"saver": {"freq_steps": None}, "recover": {"mode": "auto"}}, None),
        ({}, None),
    ],
)
def test_the_present_interval(values: dict[str, Any], expected_s: float | None) -> None:
    assert interval_of(RunConfig("", values), step_s=10.0, steps_per_epoch=47) == expected_s


def test_measuring(tmp_path: Path) -> None:
    lines = [{"step": s, "at": 1000 + 75 * s, "m": {"x": 1}} for s in range(40)]
    lines += [{"step": s, "at": 9000 + 75 * s, "m": {"x": 1}} for s in range(20, 60)]
    found = ledger.from_lines([json.dumps(line).encode() for line in lines])
    assert measured_step_s(found) == 75.0
    assert measured_mtbf_s(found) == 9000 + 75 * 59 - 1000
    assert measured_step_s(ledger.Ledger()) is None
    assert measured_mtbf_s(ledger.from_lines([json.dumps(lines[0]).encode()])) is None
    checkpoints = scan(LocalBackend(trees.make_run(tmp_path, steps=[46, 93]))).checkpoints
    assert measured_save_s(checkpoints) is None, "all files have one time: nothing to learn from"
    (part,) = checkpoints[0].parts
    slow = [file._replace(mtime_ns=file.mtime_ns + n * 500_000_000) for n, file in enumerate(part.files)]
    slower = dataclasses.replace(checkpoints[0], parts=(dataclasses.replace(part, files=tuple(slow)),))
    assert measured_save_s([slower, checkpoints[1]]) == pytest.approx(0.5 * (len(slow) - 1))


@pytest.mark.parametrize(
    ("saver", "save_s", "severity", "text"),
    [
        ({"freq_epochs": 1}, 20.0, "ok", "would waste the least"),
        ({"freq_epochs": 100}, 20.0, "warn", "as it is set now"),
        ({}, 20.0, "ok", "would waste the least"),
        ({"freq_epochs": 1}, None, "", ""),
    ],
)
def test_the_doctor_advises(tmp_path: Path, saver: dict[str, Any], save_s: float | None, severity: str, text: str) -> None:
    run = trees.make_run(tmp_path, steps=[46, 93, 140])
    for step in (46, 93, 140) if save_s is not None else ():
        path = trees.checkpoint(run, step) / "config.json"
        os.utime(path, (path.stat().st_mtime - save_s, path.stat().st_mtime - save_s))
    found = examine(run_ref(str(run)), config=RunConfig("run.yaml", {"saver": saver}))
    (mine,) = [one for one in found if one.check == "interval"] or [None]
    assert (mine.severity.value if mine else "") == severity
    if mine is not None:
        assert text in mine.found
        assert "a save takes 20.0 s or more, failures are 12.0 h apart (assumed)" in mine.found
        assert (mine.severity.value == "warn") == mine.remedy.startswith("Write recover.freq_steps: ")
