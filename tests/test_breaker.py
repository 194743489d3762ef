"""The circuit breaker: what trips it and what must not, what it leaves behind, and that a launcher cannot get past it."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import ckptstore.torch as ckpt
from ckptstore import CheckpointStore, halt, health, importing, ledger, pins, places, recovery
from ckptstore.backends import open_backend
from ckptstore.breaker import CircuitBreaker
from ckptstore.breaker_config import BreakerConfig
from ckptstore.choose import Selection
from ckptstore.errors import CkptStoreError, NothingToResumeError, TrainingHalted, UsageError
from ckptstore.listing import scan
from ckptstore.metric_names import match
from ckptstore.picture import compose
from ckptstore.plan import Options
from ckptstore.retention import Keep
from ckptstore.rules import (
    REWARD,
    Above,
    AllOf,
    AnyOf,
    Arm,
    Below,
    Collapse,
    Missing,
    NonFinite,
    Rule,
    Sign,
    Spike,
    Unchanged,
    Zero,
    parse,
)
from ckptstore.streak import Watch
from tests import commands, trees, warm

NAN, INF = math.nan, math.inf
GOOD = 0.75


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CIRCUIT_BREAKER_THRESHOLD", "CIRCUIT_BREAKER_ENABLED", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def halted_by(breaker: CircuitBreaker, steps: Iterable[tuple[int, Any]]) -> TrainingHalted | None:
    """Observes (step, stats) until it halts; how it did, if it did."""
    for step, stats in steps:
        try:
            breaker.observe(stats, step)
        except TrainingHalted as error:
            return error
    return None


def trips_at(breaker: CircuitBreaker, values: Iterable[float | None], *, first: int = 0, key: str = REWARD) -> int:
    """The step at which it halts, -1 if it never does."""
    error = halted_by(breaker, ((step, {} if value is None else {key: value}) for step, value in enumerate(values, first)))
    return -1 if error is None else error.step


def streak_trips(rule: Rule, values: Iterable[float | None]) -> int:
    watch = Watch(rule)
    for step, value in enumerate(values):
        watch.look({rule.metric: value}.get, step)
        if watch.tripped:
            return step
    return -1


# The story


def test_step_188_replayed(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, slot="dcp", recover_info=140, slot_step=140)
    slot_before = {path.name: path.read_bytes() for path in (run / "default/recover_checkpoint").iterdir()}
    saved: list[str] = []

    def save(folder: str) -> None:
        saved.append(folder)
        Path(folder, "model.safetensors").write_bytes(b"post mortem")

    breaker = CircuitBreaker(run, save=save)
    error = halted_by(breaker, ((log_step - 1, {REWARD: GOOD if log_step < 188 else 0.0}) for log_step in range(1, 700)))
    assert error is not None
    assert (error.step, error.since_step, error.last_good_step) == (196, 187, 140)
    message = str(error)
    assert "Train step 197 of the log" in message
    assert "was 0 for 10 steps in a row, since global step 187 (Train step 188 of the log)" in message
    assert f"python -m ckptstore.recover resume --run {run} --max-step 140" in message
    side = Path(ledger.side_of(str(run)))
    assert [Path(folder).parent for folder in saved] == [side / "quarantine"]
    assert (Path(saved[0]) / "model.safetensors").read_bytes() == b"post mortem"
    assert {path.name: path.read_bytes() for path in (run / "default/recover_checkpoint").iterdir()} == slot_before
    assert [(pin.step, pin.path) for pin in pins.read(str(side))] == [(140, "default/epoch2epochstep46globalstep140")]
    trip = halt.read(str(side))
    assert trip is not None
    assert (trip.step, trip.post_mortem, trip.rule) == (196, "saved", Zero().spec())
    # The recovery: the checkpoint of 187 was updated with rewards of zero.
    point = recovery.plan(open_backend(run), Selection(), Options(as_is=True)).point
    assert point.checkpoint.step == 140
    assert any("health bad" in skip.reasons[0] for skip in point.skipped if skip.checkpoint.step == 187)
    assert recovery.plan(open_backend(run), Selection(include_bad=True), Options(as_is=True)).point.checkpoint.step == 187
    with pytest.raises(TrainingHalted, match="before this start"):
        CircuitBreaker(run)
    outcome = recovery.setup(open_backend(run), Selection(), Options(as_is=True))
    assert outcome.cleared is not None
    assert outcome.cleared.step == 196
    CircuitBreaker(run).observe({REWARD: GOOD}, 141)
    assert pins.read(str(side)), "the pin outlives the recovery"


def test_it_raises_again_where_the_trainer_swallows_it(tmp_path: Path) -> None:
    breaker = CircuitBreaker(threshold=2)
    assert trips_at(breaker, [GOOD, 0, 0]) == 2
    assert breaker.tripped
    with pytest.raises(TrainingHalted):
        breaker.observe({REWARD: GOOD}, 3)


def test_the_error_survives_pickling() -> None:
    original = halt.Trip(step=7, since_step=3, saw="x", command="y", last_good_step=1, run="/r").error()
    copy = pickle.loads(pickle.dumps(original))  # noqa: S301 - as Ray does with it
    assert (str(copy), copy.step, copy.since_step, copy.last_good_step, copy.command) == (str(original), 7, 3, 1, "y")


# What must not trip, and what must


@pytest.mark.parametrize(
    ("name", "values", "trips"),
    [
        ("good", [GOOD] * 300, -1),
        ("cold start", [0.0] * 99 + [0.1] * 50, -1),
        ("cold start for ever", [0.0] * 300, -1),
        ("one zero", [GOOD] * 5 + [0.0] + [GOOD] * 20, -1),
        ("nine zeros", [GOOD] * 5 + [0.0] * 9 + [GOOD], -1),
        ("nine and nine", [GOOD, *[0.0] * 9, GOOD, *[0.0] * 9, GOOD], -1),
        ("missing once", [GOOD] * 5 + [None] + [GOOD] * 20, -1),
        ("missing for long", [GOOD] * 5 + [None] * 200, -1),
        ("ten zeros", [GOOD] + [0.0] * 10, 10),
        ("minus zero", [GOOD] + [-0.0] * 10, 10),
        ("missing does not end a streak", [GOOD] + [0.0, None] * 10, 19),
        ("NaN does not end a streak", [GOOD] + [0.0] * 5 + [NAN] + [0.0] * 4, 10),
        ("NaN from the start", [NAN] * 99 + [GOOD], -1),
        ("NaN from the start for ever", [NAN] * 100, 99),
        ("NaN from the start, and zeros", [NAN] * 99 + [0.0] + [NAN] * 99, -1),
        ("NaN from the start, not every step", [None, NAN] * 100, 199),
        ("NaN alone", [GOOD] + [NAN] * 10, 10),
        ("infinite alone", [GOOD] + [INF] * 10, 10),
        ("a tiny reward is none of zero", [GOOD] + [1e-12] * 100, -1),
        ("negative rewards", [-1.0] * 50 + [0.0] * 10, 59),
    ],
)
def test_default_rule(name: str, values: list[float | None], trips: int) -> None:
    assert trips_at(CircuitBreaker(), values) == trips


@pytest.mark.parametrize("key", ["ppo_actor/update/actor_loss/avg", "grpo_actor/actor_loss/avg", "actor_loss/avg"])
@pytest.mark.parametrize("first", [0, 20])
def test_a_loss_that_is_no_number_halts_whatever_the_reward_is(key: str, first: int) -> None:
    """The reward of a run whose updates are all left out (AReaL does for a NaN) stays where it was."""
    steps = ((step, {REWARD: GOOD, key: 0.01 if step < first else NAN}) for step in range(100))
    error = halted_by(CircuitBreaker(), steps)
    assert error is not None
    assert error.step == first + 9
    assert f"{key} was NaN or infinite for 10 steps in a row" in str(error)


def test_a_trainer_without_that_loss_is_told_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    assert trips_at(CircuitBreaker(), [GOOD] * 200) == -1
    assert trips_at(CircuitBreaker(metric="reward"), [GOOD] * 200, key="reward") == -1
    assert not messages(caplog)
    rules = [Zero(), NonFinite(metric="actor_loss/avg", patience=10)]
    assert trips_at(CircuitBreaker(rules=rules), [GOOD] * 200) == -1
    assert any("no metric actor_loss/avg" in text for text in messages(caplog)), "who asks for it, is told"


@pytest.mark.parametrize(
    ("said", "metrics"),
    [
        ("task_reward/avg was more than 50% below", lambda step: {REWARD: 0.6 - 0.5 * min(step / 300, 1)}),
        ("actor_loss/avg was NaN", lambda step: {"ppo_actor/update/actor_loss/avg": NAN if step > 50 else 0.0}),
        ("entropy/avg was more than 90% below", lambda step: {"ppo_actor/update/entropy/avg": 0.4 if step < 150 else 0.01}),
        ("approx_kl/avg was above 0.5", lambda step: {"ppo_actor/update/approx_kl/avg": 0.001 * 1.05**step}),
        (
            "grad_norm was more than 10 times its average and",
            lambda step: {"ppo_actor/update/grad_norm": 9.0 if step > 200 else 0.5, REWARD: 0.3 if step > 200 else GOOD},
        ),
        ("", lambda step: {"ppo_actor/update/grad_norm": 9.0 if step > 200 else 0.5, "ppo_actor/update/entropy/avg": 0.3}),
    ],
)
def test_the_rules_of_the_page_see_what_it_says_of_them(said: str, metrics: Callable[[int], dict[str, float]]) -> None:
    page = (
        (Path(__file__).parent.parent / "docs/circuit-breaker.md").read_text().partition("### What the usual rules do not see")
    )
    block = yaml.safe_load(page[2].partition("```yaml")[2].partition("```")[0])["circuit_breaker"]
    breaker = CircuitBreaker(settings=BreakerConfig.of_block(block))
    error = halted_by(breaker, ((step, {REWARD: GOOD} | metrics(step)) for step in range(400)))
    assert (said in str(error)) if said else error is None


def test_evaluation_steps_do_not_count() -> None:
    breaker = CircuitBreaker()
    for step in range(300):
        breaker.observe({"grpo_actor/task_reward/avg": GOOD, "eval-rollout/task_reward/avg": 0.0}, step)
        breaker.observe({"eval-rollout/task_reward/avg": 0.0}, step)


def test_arm_always_is_the_literal_rule_of_old_guides() -> None:
    assert trips_at(CircuitBreaker(arm="always"), [0.0] * 20) == 9
    assert trips_at(CircuitBreaker(arm=Arm.ALWAYS, threshold=50), [0.0] * 60) == 49


R = {"metric": "x"}
A = {"arm": Arm.ALWAYS, "metric": "x"}


@pytest.mark.parametrize(
    ("rule", "values", "trips"),
    [
        (Zero(**R, patience=2), [1, 0, 0], 2),
        (Zero(**R, patience=2), [0, 0, 0], -1),
        (Zero(**A, patience=2), [0, 0, 0], 1),
        (Zero(**R, patience=1), [1, 0], 1),
        (NonFinite(metric="x"), [NAN] * 3, 2),
        (NonFinite(metric="x"), [NAN, 1, NAN, 1, INF, -INF, NAN], 6),
        (NonFinite(metric="x"), [0, 0, 0, 0], -1),
        (NonFinite(metric="x", arm=Arm.FIRST_GOOD), [NAN] * 9, -1),
        (Zero(metric="actor/loss/avg", patience=5), [NAN] * 5, 4),
        (Zero(metric="actor/loss/avg", patience=5), [NAN] * 4 + [0] * 9 + [INF] * 5, 17),
        (Zero(metric="actor/loss/avg", patience=5), [NAN] * 4 + [1] + [NAN] * 4, -1),
        (Above(metric="value_loss", bound=5, patience=5), [NAN] * 5, 4),
        (Above(metric="val_loss", bound=5, patience=5), [NAN] * 300, -1),
        (Above(metric="best/eval/loss", bound=5, patience=5), [NAN] * 300, -1),
        (Above(metric="validation_loss", bound=5, patience=5), [NAN] * 300 + [1] + [NAN] * 5, 305),
        (Spike(), [INF] * 20 + [1.0] * 50, -1),
        (Spike(), [INF] * 100, 99),
        (Missing(**R, patience=3), [1, None, None, None], 3),
        (Missing(**R, patience=3), [1, None, None, 1, None], -1),
        (Missing(**R, patience=3), [None] * 9, -1),
        (Missing(**R, patience=3), [NAN, None, None, None], 3),
        (Missing(**A, patience=3), [None] * 9, 2),
        (Below(**R, bound=0.5, patience=2), [0.6, 0.4, 0.4], 2),
        (Below(**R, bound=0.5, patience=2), [0.6, 0.5, 0.5, 0.4, 0.6], -1),
        (Below(**R, bound=0.5, patience=2), [0.6, NAN, 0.4], 2),
        (Above(**R, bound=5, patience=2), [1, 6, INF], 2),
        (Above(**R, bound=5, patience=2), [1, 5, 5, 6, 5], -1),
        (Collapse(**R, patience=3, warmup_steps=5), [0.8] * 10 + [0.1] * 3, 12),
        (Collapse(**R, patience=3, warmup_steps=5), [0.8] * 10 + [0.2] * 9, -1),
        (Collapse(**R, patience=3, warmup_steps=5), [0.8, 0.0, 0.8, 0.0, 0.8], -1),
        (Collapse(**R, patience=3, warmup_steps=5), [0.8] * 10 + [NAN] * 3, 12),
        (Collapse(**R, patience=3, warmup_steps=5), [-0.1] * 10 + [-1.0] * 3, 12),
        (Collapse(**R, patience=3, warmup_steps=5), [-1.0] * 10 + [-0.1] * 9, -1),
        (Collapse(**R, patience=3, warmup_steps=5, drop=0.5), [0.8] * 10 + [0.39] * 3, 12),
        (Collapse(**R, patience=9, warmup_steps=5, halflife_steps=1), [0.8] * 10 + [0.1] * 9, 18),
        (Spike(**R, warmup_steps=5), [1.0] * 6 + [11.0] * 3, 8),
        (Spike(**R, warmup_steps=5), [1.0] * 6 + [9.0] * 9, -1),
        (Spike(**R, warmup_steps=5), [1.0] * 6 + [11.0, 1.0, 11.0, 1.0], -1),
        (Spike(**R, warmup_steps=5), [1.0] * 6 + [NAN] * 3, 8),
        (Unchanged(**R, patience=3), [1, 2, 2, 2, 2], 4),
        (Unchanged(**R, patience=3), [1, 2, 2, 2, 3, 3, 3], -1),
        (Unchanged(**R, patience=3, tolerance=0.1), [1, 1.05, 0.95, 1.0], 3),
        (Unchanged(**R, patience=3, tolerance=0.1), [1, 1.08, 1.16, 1.24, 1.32, 1.4], -1),
        (Unchanged(**R, patience=3), [1, NAN, NAN, NAN], 3),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else str(value),
)
def test_each_rule(rule: Rule, values: list[float | None], trips: int) -> None:
    assert streak_trips(rule, values) == trips
    (again,) = parse([json.loads(json.dumps(rule.spec()))])
    assert again == rule


@pytest.mark.parametrize(
    ("steps", "both", "either"),
    [
        ([(1, 1), (0, 1), (1, 0), (0, 0)], Sign.BAD, Sign.BAD),
        ([(1, 1), (0, 1)], Sign.GOOD, Sign.BAD),
        ([(1, 1), (1, 1)], Sign.GOOD, Sign.GOOD),
        ([(1, 1), (0, None)], Sign.SILENT, Sign.BAD),
        ([(1, 1), (1, None)], Sign.GOOD, Sign.GOOD),
        ([(1, 1), (None, None)], Sign.SILENT, Sign.SILENT),
    ],
)
def test_combined_rules(steps: list[tuple[float | None, float | None]], both: Sign, either: Sign) -> None:
    for rule, wanted in ((Zero(metric="a") & Zero(metric="b"), both), (Zero(metric="a") | Zero(metric="b"), either)):
        watch = Watch(rule)
        signs = [watch.look({"a": a, "b": b}.get, step) for step, (a, b) in enumerate(steps)]
        assert signs[-1] is wanted
        assert parse([rule.spec()]) == (rule,)
        assert rule.metrics == ("a", "b")


def test_a_combination_names_its_metrics() -> None:
    rule = AllOf(rules=(Zero(metric="reward"), Below(metric="length", bound=10)), patience=2)
    breaker = CircuitBreaker(rules=[rule])
    breaker.observe({"reward": 1.0, "length": 100.0}, 0)
    breaker.observe({"reward": 0.0, "length": 5.0}, 1)
    with pytest.raises(TrainingHalted, match="reward was 0 and length was below 10 for 2 steps"):
        breaker.observe({"reward": 0.0, "length": 5.0}, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Zero(patience=0),
        lambda: Zero(patience=True),
        lambda: Zero(patience=1.5),  # type: ignore[arg-type]
        lambda: Zero(metric=""),
        lambda: Zero(arm="sometimes"),  # type: ignore[arg-type]
        lambda: Below(bound=NAN),
        lambda: Collapse(halflife_steps=0),
        lambda: AnyOf(rules=(Zero(),)),
        lambda: parse("zero"),
        lambda: parse([{"nil": {}}]),
        lambda: parse([{"zero": {"patients": 3}}]),
        lambda: parse([{"zero": 3}]),
        lambda: parse([{"zero": {}, "below": {}}]),
        lambda: parse([{"zero": {"patience": "ten"}}]),
        lambda: parse([{"all": {"rules": ["zero"]}}]),
        lambda: CircuitBreaker(threshold=0),
        lambda: CircuitBreaker(rules=[]),
        lambda: CircuitBreaker(reduce="sum"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused_with_a_reason(wrong: Any) -> None:
    with pytest.raises(UsageError) as refused:
        wrong()
    assert str(refused.value)


# Finding and reading the metric


@pytest.mark.parametrize(
    ("name", "keys", "found"),
    [
        (REWARD, ["grpo_actor/task_reward/avg"], "grpo_actor/task_reward/avg"),
        (REWARD, ["ppo_actor/task_reward/avg"], "ppo_actor/task_reward/avg"),
        (REWARD, ["ppo_actor/task_reward/avg", "grpo_actor/task_reward/avg"], "grpo_actor/task_reward/avg"),
        (REWARD, ["zzz/task_reward/avg", "ppo_actor/task_reward/avg"], "ppo_actor/task_reward/avg"),
        (REWARD, ["task_reward/avg"], "task_reward/avg"),
        (REWARD, ["a/b/task_reward/avg"], "a/b/task_reward/avg"),
        (REWARD, ["grpo_actor/task_reward/max"], None),
        (REWARD, ["grpo_actor/no_task_reward/avg"], None),
        (REWARD, ["eval-rollout/task_reward/avg", "Evaluation/task_reward/avg"], None),
        ("eval-rollout/task_reward/avg", ["eval-rollout/task_reward/avg"], "eval-rollout/task_reward/avg"),
        ("reward", ["rollout/reward"], "rollout/reward"),
        ("rollout/reward", ["eval-rollout/reward", "other/reward"], None),
        ("grad_norm", ["x/grad_norm", "grad_norm"], "grad_norm"),
        ("grad_norm", [3, None, ("grad_norm",)], None),
    ],
)
def test_the_metric_is_found_by_its_end(name: str, keys: list[Any], found: str | None) -> None:
    assert match(name, keys) == found


class Scalar:
    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value


@pytest.mark.parametrize(
    "zero",
    [
        0,
        0.0,
        False,
        np.float32(0),
        np.int64(0),
        np.zeros(()),
        torch.tensor(0.0),
        torch.zeros(1, dtype=torch.bfloat16),
        Scalar(0),
    ],
    ids=repr,
)
def test_numbers_of_all_kinds(zero: Any) -> None:
    breaker = CircuitBreaker(threshold=3)
    breaker.observe({REWARD: torch.tensor(0.7)}, 0)
    error = halted_by(breaker, ((np.int64(step), {REWARD: zero}) for step in range(1, 9)))
    assert error is not None
    assert error.step == 3


@pytest.mark.parametrize(
    "value", [None, "0", [], {}, torch.zeros(2), np.zeros(3), object(), 1j], ids=lambda v: type(v).__name__
)
def test_what_is_no_number_is_missing(value: Any) -> None:
    breaker = CircuitBreaker(threshold=2)
    breaker.observe({REWARD: GOOD}, 0)
    for step in range(1, 9):
        breaker.observe({REWARD: value}, step)
    assert breaker.streak == 0


def test_an_integer_beyond_floats_is_infinite() -> None:
    assert trips_at(CircuitBreaker(rules=[NonFinite(metric="x")]), [10**400] * 3, key="x") == 2


def test_a_list_of_dicts_a_minibatch_each() -> None:
    breaker = CircuitBreaker(threshold=2)
    breaker.observe([{"loss": 1.0}, {REWARD: GOOD}], 0)
    breaker.observe([{REWARD: 0.0}, {REWARD: GOOD}], 1)
    with pytest.raises(TrainingHalted):
        breaker.observe([{REWARD: 0.0}], 2)


def test_nothing_at_all_is_a_step_without_metrics() -> None:
    breaker = CircuitBreaker(threshold=1)
    for stats in (None, {}, [], [{}], iter([{}])):
        breaker.observe(stats, 0)


# Settings


def test_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_THRESHOLD", "3")
    assert trips_at(CircuitBreaker(threshold=10), [GOOD] + [0.0] * 20) == 3
    monkeypatch.setenv("CIRCUIT_BREAKER_ENABLED", "False")
    assert trips_at(CircuitBreaker(enabled=True), [GOOD] + [0.0] * 99) == -1
    monkeypatch.setenv("CIRCUIT_BREAKER_ENABLED", "1")
    assert trips_at(CircuitBreaker(enabled=False), [GOOD] + [0.0] * 20) == 3


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CIRCUIT_BREAKER_THRESHOLD", "ten"), ("CIRCUIT_BREAKER_THRESHOLD", "0"), ("CIRCUIT_BREAKER_THRESHOLD", "-1"),
     ("CIRCUIT_BREAKER_THRESHOLD", "٣"), ("CIRCUIT_BREAKER_ENABLED", "maybe")],
)  # fmt: skip
def test_an_environment_that_makes_no_sense_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=variable):
        CircuitBreaker()


def test_settings_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "alice")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"experiment_name: e\ntrial_name: t\ncluster: {{fileroot: {tmp_path}}}\n"
        "circuit_breaker:\n  threshold: 4\n  metric: my/score/avg\n"
    )
    breaker = CircuitBreaker.from_config(str(path))
    assert breaker.run == f"{tmp_path}/checkpoints/alice/e/t"
    assert trips_at(breaker, [GOOD] + [0.0] * 9, key="other/score/avg") == 4
    path.write_text(path.read_text().replace("trial_name: t", "trial_name: u") + "  rules: [nonfinite: {patience: 2}]\n")
    assert trips_at(CircuitBreaker.from_config(str(path)), [GOOD] + [0.0] * 9 + [NAN] * 9) == 11
    assert trips_at(CircuitBreaker.from_config({"circuit_breaker": {"threshold": 2}}, run=str(tmp_path / "v")), [1, 0, 0]) == 2
    with pytest.raises(UsageError, match="fileroot"):
        CircuitBreaker.from_config({})


def test_a_block_that_is_misspelt_or_of_the_wrong_kind(tmp_path: Path) -> None:
    """It would be as if it were not there; and what is wrong is called as the person has called it."""
    path = tmp_path / "run.yaml"
    path.write_text("circuit_braker: {threshold: 5}\n")
    with pytest.raises(UsageError, match="has circuit_braker:, and no circuit_breaker:"):
        CircuitBreaker.from_config(path, run=str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"circuit_breaker\.threshold is '5'"):
        BreakerConfig.of_block({"threshold": "5"})


@pytest.mark.parametrize(
    "block",
    [3, {"treshold": 3}, {"enabled": "yes"}, {"threshold": 0}, {"rules": "zero"}, {"alive": "seq_len"}, {"arm": "never"}],
)
def test_a_wrong_block_is_refused(block: Any) -> None:
    with pytest.raises(UsageError):
        BreakerConfig.of_block(block).make_rules()


def test_off_means_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trees.make_run(tmp_path)
    assert trips_at(CircuitBreaker(run, threshold=1), [GOOD, 0.0]) == 1
    off = CircuitBreaker(run, enabled=False)
    assert "is off" in caplog.text
    assert trips_at(off, [0.0] * 99) == -1
    assert halt.read(ledger.side_of(str(run))) is not None


# What is said


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_metric_that_is_never_good_is_said_loudly_once(caplog: pytest.LogCaptureFixture) -> None:
    assert trips_at(CircuitBreaker(), [0.0] * 99) == -1
    assert not messages(caplog)
    assert trips_at(CircuitBreaker(), [0.0] * 300) == -1
    (text,) = messages(caplog)
    assert "from the start, for 100 steps" in text


def test_a_metric_that_is_never_there_is_said_with_what_is(caplog: pytest.LogCaptureFixture) -> None:
    breaker = CircuitBreaker()
    for step in range(300):
        breaker.observe({"loss/avg": 1.0}, step)
    (text,) = messages(caplog)
    assert REWARD in text
    assert "loss/avg" in text


def test_it_is_said_soon_and_as_it_is(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Ten steps may be a quarter of an hour; a value of the wrong kind is not "missing", and NaN is not 0."""
    breaker = CircuitBreaker()
    for step in range(10):
        assert not messages(caplog)
        breaker.observe({"ppo_actor/task_reward/avg": "0.7"}, step)
    assert "ppo_actor/task_reward/avg is there, as '0.7', which is no number" in messages(caplog)[0]
    assert trips_at(CircuitBreaker(), [NAN] * 99) == -1
    assert "was NaN or infinite from the start, for 10 steps: after 100 training is halted" in messages(caplog)[1]
    assert trips_at(CircuitBreaker(tmp_path / "e/no-such-run"), [GOOD] + [0.0] * 10) == 10
    assert "cannot be listed" not in caplog.text, "nothing was saved yet: that is no error"


def test_what_never_was_finite_is_remembered_over_a_restart(tmp_path: Path) -> None:
    """A launcher starts a run again and again that has never had a number: its steps of all starts count."""
    run = trees.make_run(tmp_path, steps=[46])
    assert trips_at(CircuitBreaker(run), [NAN] * 60) == -1
    again = CircuitBreaker(run)
    for step in range(60, 99):
        again.observe({REWARD: NAN}, step)
    with pytest.raises(TrainingHalted, match="NaN or infinite for 100 steps in a row, since global step 0"):
        again.observe({REWARD: NAN}, 99)
    with pytest.raises(TrainingHalted):
        CircuitBreaker(run)


def test_a_url_is_no_run() -> None:
    with pytest.raises(UsageError, match="beside the trainer"):
        CircuitBreaker("s3://bucket/runs/mine")


def test_a_metric_that_goes_missing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert trips_at(CircuitBreaker(), [GOOD] * 3 + [None] * 30) == -1
    (text,) = messages(caplog)
    assert "missing for 10 steps" in text


@pytest.mark.parametrize(
    ("length", "n_seqs", "wanted"),
    [
        (90.0, 32.0, "looks dead (grpo_actor/seq_len/avg fell at step 20)"),
        (0.0, 0.0, "looks dead"),
        (500.0, 32.0, "looks alive"),
        (None, None, ""),
    ],
)
def test_server_dead_or_policy_bad(length: float | None, n_seqs: float | None, wanted: str) -> None:
    def stats(reward: float, length: float | None, n_seqs: float | None) -> Mapping[str, float]:
        found = {REWARD: reward, "grpo_actor/seq_len/avg": length, "grpo_actor/n_seqs": n_seqs}
        return {key: value for key, value in found.items() if value is not None}

    breaker = CircuitBreaker(threshold=3)
    for step in range(20):
        breaker.observe(stats(GOOD, 512.0, 32.0), step)
    text = str(halted_by(breaker, ((step, stats(0.0, length, n_seqs)) for step in range(20, 30))))
    assert wanted in text
    assert wanted or "inference server" not in text


@pytest.mark.parametrize(("answer", "wanted"), [(True, "looks alive"), (False, "looks dead"), (None, "ConnectionError")])
def test_the_server_is_asked_on_a_trip_alone(answer: bool | None, wanted: str) -> None:
    asked = []

    def ask() -> bool:
        asked.append(1)
        if answer is None:
            raise ConnectionError("refused")
        return answer

    breaker = CircuitBreaker(threshold=2, server_alive=ask)
    breaker.observe({REWARD: GOOD}, 0)
    breaker.observe({REWARD: 0.0}, 1)
    assert not asked
    with pytest.raises(TrainingHalted, match=wanted):
        breaker.observe({REWARD: 0.0}, 2)


# On a trip


def test_a_failing_post_mortem_save_halts_all_the_same(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)

    def save(folder: str) -> None:
        raise OSError(28, "No space left on device")

    error = halted_by(CircuitBreaker(run, threshold=1, save=save), [(0, {REWARD: GOOD}), (1, {REWARD: 0.0})])
    assert error is not None
    assert isinstance(error.__cause__, OSError)
    trip = halt.read(ledger.side_of(str(run)))
    assert trip is not None
    assert trip.post_mortem.startswith("failed: OSError(28")


def test_the_record_is_there_before_the_save_begins(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    seen: list[Any] = []

    def save(folder: str) -> None:
        seen.append(halt.read(ledger.side_of(str(run))))
        raise KeyboardInterrupt  # the save takes an hour, and somebody has enough

    breaker = CircuitBreaker(run, threshold=1, save=save)
    breaker.observe({REWARD: GOOD}, 150)
    with pytest.raises(KeyboardInterrupt):
        breaker.observe({REWARD: 0.0}, 151)
    assert (seen[0].step, seen[0].post_mortem) == (151, "saving")
    trip = halt.read(ledger.side_of(str(run)))
    assert trip is not None
    assert trip.post_mortem == "interrupted"
    assert [pin.step for pin in pins.read(ledger.side_of(str(run)))] == [140]
    with pytest.raises(TrainingHalted):
        CircuitBreaker(run)


def test_a_second_trip_has_a_quarantine_of_its_own(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    folders: list[str] = []
    for _ in range(2):
        breaker = CircuitBreaker(run, threshold=1, save=folders.append)
        breaker.observe({REWARD: GOOD}, 150)
        with pytest.raises(TrainingHalted):
            breaker.observe({REWARD: 0.0}, 151)
        assert halt.reset(ledger.side_of(str(run))) is not None
    assert len(set(folders)) == 2


def test_a_last_good_checkpoint_that_is_hardly_good_is_told(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    values = [0.6] * 60 + [0.05] * 120 + [0.0] * 20
    error = halted_by(CircuitBreaker(run), ((step, {REWARD: value}) for step, value in enumerate(values)))
    assert error is not None
    assert error.last_good_step == 140
    assert "at the last good checkpoint, since step 60 it is less than half of what it was." in str(error)


def test_without_checkpoints_it_says_that_none_is_left(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints/alice/e/t"
    error = halted_by(CircuitBreaker(run, threshold=1), [(0, {REWARD: GOOD}), (1, {REWARD: 0.0})])
    assert error is not None
    assert "No good checkpoint is left" in str(error)
    assert error.last_good_step == -1
    assert not run.exists(), "the trainer's own folder is the trainer's to make"


def test_a_record_that_cannot_be_read_still_halts(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    side = Path(ledger.side_of(str(run)))
    side.mkdir(parents=True)
    for damage in (b"", b"{", b"[1]", b'{"step": "x"}', b"\xff" * 99):
        Path(places.trip_in(str(side))).write_bytes(damage)
        with pytest.raises(TrainingHalted):
            CircuitBreaker(run)
        assert halt.reset(str(side)) is not None
    CircuitBreaker(run)


def test_a_ledger_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trees.make_run(tmp_path)
    side = Path(ledger.side_of(str(run)))
    side.parent.mkdir(exist_ok=True)
    side.write_text("a file where the side folder should be")
    assert trips_at(CircuitBreaker(run), [GOOD] + [0.0] * 20) == 10
    assert any("could not be written" in text for text in messages(caplog))


# Memory


def test_the_streak_survives_a_crash_of_the_trainer(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    assert trips_at(CircuitBreaker(run), [GOOD] * 5 + [0.0] * 6) == -1
    assert trips_at(CircuitBreaker(run), [0.0] * 9, first=11) == 14, "six and four make ten"


def test_going_back_takes_back_what_came_after(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    assert trips_at(CircuitBreaker(run), [GOOD] * 5 + [0.0] * 6) == -1
    again = CircuitBreaker(run)
    assert trips_at(again, [0.0] * 4, first=5) == -1, "resumed from step 4: the zeros after it are not counted twice"
    assert again.streak == 4
    assert again.armed


def test_reset_forgives_the_streak(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    side = ledger.side_of(str(run))
    assert trips_at(CircuitBreaker(run), [GOOD] + [0.0] * 10) == 10
    halt.reset(side)
    assert trips_at(CircuitBreaker(run), [0.0] * 30, first=11) == 20, "ten more, not one"
    assert health.at_step(5, ledger.read(ledger.path_in(side)), saved_at_s=0).health is health.Health.BAD, "but bad it was"


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_a_reset_forgives_what_came_before_it_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    run = trees.make_run(tmp_path)
    assert trips_at(CircuitBreaker(run), [GOOD] + [0.0] * 10) == 10
    with monkeypatch.context() as patch:
        patch.setattr(halt.time, "time", lambda now=time.time: now() + ahead_s)
        halt.reset(ledger.side_of(str(run)))
    assert trips_at(CircuitBreaker(run), [0.0] * 6, first=11) == -1, "what went before the reset does not count"
    assert trips_at(CircuitBreaker(run), [0.0] * 30, first=17) == 20, "what came after it does, over a restart too"


def test_a_reset_holds_where_training_goes_on_before_the_trip_or_old_metrics_are_imported(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path)
    side = ledger.side_of(str(run))
    assert trips_at(CircuitBreaker(run), [GOOD] + [0.0] * 10) == 10
    halt.reset(side)
    writer = ledger.Writer(ledger.path_in(side))
    writer.records([ledger.Record(0, time.time() - 3600, {"loss": 1.0})], imported_at_s=time.time())
    writer.close()
    assert trips_at(CircuitBreaker(run), [0.0] * 30, first=8) == 17, "ten from step 8 on"


def test_a_reset_that_cannot_be_noted_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trees.make_run(tmp_path)
    side = ledger.side_of(str(run))
    assert trips_at(CircuitBreaker(run), [GOOD] + [0.0] * 10) == 10
    Path(ledger.path_in(side)).unlink()
    Path(ledger.path_in(side)).mkdir()
    caplog.clear()
    assert halt.reset(side) is not None
    assert any("the reset cannot be noted" in text for text in messages(caplog))


def test_state_dict_takes_the_place_of_the_ledger() -> None:
    rules = [Zero(patience=5), Collapse(patience=5, warmup_steps=3), Zero(metric="a") | Unchanged(metric="b")]
    values = [0.7, 0.8, 0.75, 0.9, 0.8, 0.01, 0.0]
    one, two = CircuitBreaker(rules=rules), CircuitBreaker(rules=rules)
    assert trips_at(one, values) == -1
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    rest = [0.0] * 9
    assert trips_at(two, rest, first=7) == trips_at(one, rest, first=7) == 9
    three = CircuitBreaker(rules=[Below(bound=0.5)])
    three.load_state_dict(one.state_dict())
    assert three.streak == 0, "another rule's memory is not its own"


# Launchers


LAUNCHER = """
import subprocess, sys
for attempt in range(int(sys.argv[1])):
    if subprocess.run([sys.executable, *sys.argv[2:]]).returncode == 0:
        break
"""
TRAINER = """
import json, sys
from pathlib import Path
from ckptstore.breaker import CircuitBreaker
run, log = Path(sys.argv[1]), Path(sys.argv[2])
breaker = CircuitBreaker(run, save=lambda folder: Path(folder, "weights").write_text("x"))
info = run / "recover_info/step_info.json"
first = json.loads(info.read_text())["global_step"] + 1 if info.exists() else 0
bad = Path(log.parent, "server-is-dead").exists()
for step in range(first, 250):
    with log.open("a") as file:
        file.write(f"{step}\\n")
    breaker.observe({"ppo_actor/task_reward/avg": 0.0 if bad and step >= 187 else 0.7}, step)
"""


def test_a_launcher_that_tries_again_does_not_get_past_it(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path / "root", slot="dcp", recover_info=140, slot_step=140)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "server-is-dead").touch()
    log = tmp_path / "trained"
    launch = [sys.executable, str(tmp_path / "launcher.py"), "4", str(tmp_path / "trainer.py"), str(run), str(log)]
    result = subprocess.run(launch, capture_output=True, text=True, timeout=60, check=False)
    steps = [int(line) for line in log.read_text().split()]
    assert steps == list(range(141, 197)), "one attempt trained; three more did not do a step, nor begin at step 0"
    assert result.stderr.count("TrainingHalted") == 4
    assert result.stderr.count("before this start") == 3
    # With recover_info moved aside, AReaL would begin at step 0 over the run; not while it is halted.
    (run / "recover_info").rename(run.with_name("aside"))
    subprocess.run(launch, capture_output=True, timeout=60, check=False)
    assert len(log.read_text().split()) == len(steps)
    run.with_name("aside").rename(run / "recover_info")
    # Recovered, it trains on from the last good step.
    (tmp_path / "server-is-dead").unlink()
    recovery.setup(open_backend(run), Selection(), Options(as_is=True, force=True))
    subprocess.run(launch, capture_output=True, timeout=60, check=True)
    assert [int(line) for line in log.read_text().split()][len(steps) :] == list(range(141, 250))
    assert recovery.plan(open_backend(run), Selection(), Options(as_is=True)).point.checkpoint.step in (140, 187)


# Choosing


def test_nothing_healthy_is_nothing_to_resume_from(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, steps=[46])
    assert trips_at(CircuitBreaker(run), [GOOD] * 40 + [0.0] * 10) == 49
    with pytest.raises(NothingToResumeError) as nothing:
        recovery.plan(open_backend(run), Selection())
    assert "unhealthy" in str(nothing.value)
    assert "--include-bad" in nothing.value.hint
    named = recovery.plan(open_backend(run), Selection(step=46), Options(as_is=True)).point
    assert "although its health is bad" in named.why


def test_the_listing_and_the_breaker_agree_on_the_last_good(tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, every=10, last=99)
    assert trips_at(CircuitBreaker(run, threshold=5), [GOOD] * 55 + [0.0] * 10) == 59
    trip = halt.read(ledger.side_of(str(run)))
    assert trip is not None
    assert trip.last_good_step == 49
    found = scan(open_backend(run))
    judged = health.ledger_of(str(run))
    healths = {checkpoint.step: health.of(checkpoint, judged).health.value for checkpoint in found.checkpoints}
    assert healths == {9: "good", 19: "good", 29: "good", 39: "good", 49: "good"} | dict.fromkeys((59, 69, 79, 89, 99), "bad")
    assert isinstance(trip.error(), CkptStoreError)


def test_the_example_runs_as_its_text_says(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples/breaker_in_a_loop.py"
    done = warm.Python(example, tmp_path).finish(60)
    assert done.returncode == 0, done
    assert "start 1: training is halted at global step 69" in done.stdout
    assert "start 2: training was halted at global step 69 (Train step 70 of the log) before this start" in done.stdout
    assert "passed over: step 69: health bad" in done.stdout
    assert done.stdout.endswith("start 3: resumed after step 59, trained 60 steps, reward is fine\n")


def test_the_sample_run_with_real_files(tmp_path: Path) -> None:
    """The whole story on the run of examples/sample_run.py: 25 MB a checkpoint, a DCP slot, the log that tells it."""
    root = Path(__file__).parent.parent
    make = warm.Python(root / "examples/sample_run.py", tmp_path, "--slot", "dcp")
    assert make.finish(120).returncode == 0
    (run,) = tmp_path.glob("checkpoints/*/*/*")
    (log,) = tmp_path.glob("logs/*/*/*/main.log")
    replayed = {record.step: dict(record.metrics) for record in importing.read(str(log)).records}
    shutil.copytree(run / "default/recover_checkpoint", tmp_path / "before")
    breaker = CircuitBreaker(run, save=lambda folder: Path(folder, "weights").touch())
    error = halted_by(breaker, replayed.items())
    assert error is not None
    assert (error.step + 1, error.since_step + 1, error.last_good_step) == (197, 188, 140), "the log's 197 and 188"
    before = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert {path.name: path.read_bytes() for path in (run / "default/recover_checkpoint").iterdir()} == before
    outcome = recovery.setup(open_backend(run), Selection(), Options(force=True))
    assert outcome.plan.point.checkpoint.step == 140
    passed_over = {skip.checkpoint.step: skip.reasons[0] for skip in outcome.plan.point.skipped}
    assert passed_over.keys() == {187, 234}
    assert "health bad" in passed_over[187]
    picture = compose(open_backend(run))
    assert (picture.trip_step, picture.halted, picture.resume_step) == (196, False, 140)
    assert [(stretch.first_step, stretch.last_step) for stretch in picture.stretches] == [(187, 196)]


# --- stores of steps ------------------------------------------------------------------------------------------------------


def train(folder: Path, *, first: int = 0, zero_from: int = 35, keep: Keep | None = None) -> TrainingHalted | None:
    """A loop over a store of steps that makes its breaker first, before there is a store; saves every tenth step."""
    store = CheckpointStore(folder)
    breaker = CircuitBreaker(folder, metric="reward")
    for step in range(first, 70):
        if step % 10 == 9:
            ckpt.save(store, step, {"step": step, "weights": torch.zeros(4)}, keep=keep)
        try:
            breaker.observe({"reward": 0.0 if step >= zero_from else GOOD}, step)
        except TrainingHalted as error:
            return error
    return None


@pytest.mark.parametrize("mounted", [False, True])
def test_a_breaker_older_than_its_store(tmp_path: Path, mounted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it recorded before the first save goes with the store: no later start gets past the record, and health is known."""
    folder = tmp_path / "mine"
    if mounted:  # the folder is a file system of its own: what it may keep beside an AReaL run it keeps in the main part
        folder.mkdir()
        monkeypatch.setattr("ckptstore.side._same_device", lambda a, b: False)
    error = train(folder)
    assert error is not None
    assert (error.step, error.last_good_step) == (44, 29)
    with pytest.raises(TrainingHalted, match="before this start"):
        train(folder)
    assert {path.name for path in (folder / ".ckptstore").iterdir()} >= {"metrics.jsonl", "TRIPPED.json", "pins.json"}
    assert not (folder / "default").exists()
    assert not (tmp_path / ".ckptstore/mine").exists()
    point = CheckpointStore(folder).resume_point()
    assert (point.checkpoint.step, [skip.checkpoint.step for skip in point.skipped]) == (29, [39])


def test_what_was_no_breakers_stays_where_it_is(tmp_path: Path) -> None:
    """An AReaL run of that name may have left adopted steps there."""
    kept = tmp_path / ".ckptstore/mine/adopted/globalstep3"
    kept.mkdir(parents=True)
    ckpt.save(CheckpointStore(tmp_path / "mine"), 1, {"step": 1})
    assert kept.is_dir()


def test_recovering_a_store_of_steps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The command that is told works there, and what loads without naming a step never takes a bad one."""
    store = CheckpointStore(tmp_path / "mine")
    error = train(tmp_path / "mine")
    assert error is not None
    words = shlex.split(error.command)
    assert words[:3] == ["python", "-m", "ckptstore.recover"]
    assert "go on from step 29" in str(error)
    assert commands.invoke(capfd, *words[3:]).code == 0
    assert ckpt.load(store)["step"] == 29
    assert "step 29 is loaded, not 39: health bad" in caplog.text
    assert ckpt.load(store, 39)["step"] == 39, "one that is named is taken"
    assert train(tmp_path / "mine", first=30, zero_from=1000) is None
    assert ckpt.load(store)["step"] == 69
    assert [one.step for one in store] == [9, 19, 29, 39, 49, 59, 69]


def test_nothing_good_in_a_store_of_steps(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "mine")
    ckpt.save(store, 0, {"step": 0})
    breaker = CircuitBreaker(tmp_path / "mine", metric="reward", arm="always", threshold=3)
    assert trips_at(breaker, [0.0] * 3, key="reward") == 2
    with pytest.raises(NothingToResumeError, match="no good step") as caught:
        ckpt.load(store)
    assert "step 0 has health bad" in caught.value.hint


def test_a_save_in_a_bad_step_is_there_when_it_returns(tmp_path: Path) -> None:
    """Retention counts good steps alone, and would delete what it has just saved."""
    folder = tmp_path / "mine"
    store = CheckpointStore(folder)
    ckpt.save(store, 0, {"step": 0})
    breaker = CircuitBreaker(folder, metric="reward", threshold=50)
    for step in range(50):
        if step % 10 == 9:
            ckpt.save(store, step, {"step": step}, keep=Keep(last=2))
            assert store.get(step).status.usable
        breaker.observe({"reward": 0.0 if step in (28, 29) else GOOD}, step)
    assert [one.step for one in store] == [39, 49]


def test_the_way_around_it_is_told(tmp_path: Path) -> None:
    """Of AReaL's runs as well, with the run that is meant, and also where no good checkpoint is left."""
    run = tmp_path / "checkpoints/me/run/trial0"
    error = halted_by(CircuitBreaker(run), ((step, {REWARD: 0.0 if step else GOOD}) for step in range(30)))
    assert error is not None
    assert f"To train on as it is:  python -m ckptstore.recover status --reset --run {run}" in str(error)


def test_a_ledger_that_cannot_be_written_any_more_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    breaker = CircuitBreaker(tmp_path / "trial0")
    path = Path(ledger.path_in(places.side_of(str(tmp_path / "trial0"))))
    path.mkdir()  # the system writes no line into a folder
    breaker.observe({REWARD: GOOD}, 0)
    assert caplog.text.count("the metrics cannot be recorded") == 1
    path.rmdir()
    breaker.observe({REWARD: GOOD}, 1)
    assert [record.step for record in ledger.read(str(path)).line()] == [1]
    assert caplog.text.count("the metrics cannot be recorded") == 1


def test_ranks_pass_over_bad_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path / "mine")
    assert train(tmp_path / "mine") is not None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert ckpt.resume_step(store) == 29
        assert "step 29 is chosen, not 39: health bad" in caplog.text
        for step in (9, 19, 29):
            shutil.rmtree(tmp_path / "mine" / f"step-{step}")
        with pytest.raises(NothingToResumeError, match="step 39 has health bad"):
            ckpt.resume_step(store)
        other = CheckpointStore(tmp_path / "other")
        for step, loss in enumerate((0.5, 0.25, math.nan)):
            ckpt.save(other, step, {"w": torch.zeros(1)}, metrics={"loss": loss})
        assert ckpt.resume_step(other) == 1
        assert "step 1 is chosen, not 2: loss was NaN or infinite when it was saved" in caplog.text
    finally:
        torch.distributed.destroy_process_group()
