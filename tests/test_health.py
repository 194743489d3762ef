"""The ledger and what it says of checkpoints: crashes, rollbacks, imports from every format, and any bytes at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore import health, importing, ledger
from ckptstore.errors import NotFoundError, StorageError, UsageError
from ckptstore.health import Health
from ckptstore.ledger import Judges, Ledger, Record, Writer
from ckptstore.model import Checkpoint, Part, Status
from ckptstore.rules import REWARD, Collapse, NonFinite, Rule, Spike, Zero

NAN, INF = math.nan, math.inf
GOOD = 0.75


def ledger_of(
    values: Sequence[float | None],
    *,
    first: int = 0,
    rules: Sequence[Rule] = (),
    alive: Sequence[float] = (),
    at_s: float = 0.0,
) -> Ledger:
    """A ledger of a run that is one second a step, the first at `at_s`."""
    lines = [b'{"ledger":1,"at":0,"rules":' + json.dumps([rule.spec() for rule in rules]).encode() + b"}"] if rules else []
    for number, value in enumerate(values):
        metrics = {} if value is None else {REWARD: value if math.isfinite(value) else str(value)}
        if alive:
            metrics["grpo_actor/seq_len/avg"] = alive[number]
        lines.append(json.dumps({"step": number, "at": number, "m": metrics}).encode())
    return ledger.from_lines(lines)


def of(step: int, found: Ledger, saved_at_s: float = 0.0) -> Health:
    return health.at_step(step, found, saved_at_s=saved_at_s).health


# Health


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([GOOD] * 10, {0: "good", 5: "good", 9: "good", 10: "unknown", 40: "unknown"}),
        ([GOOD] * 5 + [0.0] * 10, {3: "good", 4: "good", 5: "bad", 14: "bad", 15: "bad", 99: "bad"}),
        ([GOOD] * 5 + [0.0] * 3, {4: "good", 5: "suspect", 7: "suspect", 8: "suspect"}),
        ([GOOD] * 5 + [0.0] * 3 + [GOOD] * 3, {4: "good", 5: "suspect", 7: "suspect", 8: "good", 10: "good"}),
        ([GOOD] * 5 + [0.0] * 10 + [GOOD] * 12, {4: "good", 5: "bad", 14: "bad", 15: "suspect", 23: "suspect", 24: "good"}),
        ([0.0] * 10 + [GOOD] * 5, {0: "unknown", 9: "unknown", 10: "good"}),
        ([0.0] * 10, {0: "unknown", 9: "unknown"}),
        ([GOOD] * 5 + [NAN] + [GOOD] * 5, {3: "good", 4: "suspect", 5: "suspect", 6: "good"}),
        ([GOOD] * 5 + [NAN] * 10, {4: "suspect", 5: "bad"}),
        ([NAN] * 20, {5: "unknown", 19: "unknown", 20: "unknown"}),
        ([NAN] * 20 + [GOOD] * 5, {5: "unknown", 19: "unknown", 20: "good", 24: "good"}),
        ([NAN] * 100, {0: "bad", 99: "bad", 120: "bad"}),
        ([NAN] * 100 + [GOOD] * 12, {5: "bad", 101: "suspect", 110: "good"}),
        ([GOOD] * 5 + [None] * 3 + [GOOD] * 3, {5: "good", 6: "good", 7: "good", 8: "good"}),
        ([GOOD] * 5 + [None] * 3, {5: "unknown", 7: "unknown"}),
        ([GOOD] * 3 + [None] * 60 + [GOOD] * 3, {3: "unknown", 30: "unknown", 62: "unknown"}),
        ([GOOD] * 5 + [0.0, None] * 10 + [GOOD], {4: "good", 5: "bad", 6: "bad", 23: "bad"}),
        ([None] * 5, {2: "unknown"}),
    ],
)
def test_health_from_the_metrics_around_a_step(values: list[float | None], expected: dict[int, str]) -> None:
    found = ledger_of(values)
    assert {step: of(step, found).value for step in expected} == expected


def test_no_ledger_and_no_step_are_unknown() -> None:
    assert of(3, Ledger()) is Health.UNKNOWN
    unknown = Checkpoint(-1, -1, -1, "slot", (Part("default", "/x", (), "dcp", (), Status.COMPLETE),))
    assert health.of(unknown, ledger_of([GOOD] * 9)).health is Health.UNKNOWN


def test_weights_that_went_bad_at_once_while_the_server_lived_are_suspect() -> None:
    values = [GOOD] * 20 + [0.0] * 10
    assert of(19, ledger_of(values, alive=[512.0] * 30)) is Health.SUSPECT
    assert of(19, ledger_of(values, alive=[512.0] * 20 + [80.0] * 10)) is Health.GOOD, "the server died: the weights are fine"
    assert of(19, ledger_of(values)) is Health.GOOD


def test_any_rule_can_spoil_it_and_the_first_gives_the_value() -> None:
    lines = [b'{"ledger":1,"at":0,"rules":' + json.dumps([Zero().spec(), Spike(warmup_steps=5).spec()]).encode() + b"}"]
    for step in range(20):
        metrics = {REWARD: GOOD, "grad_norm": 1.0 if step < 15 else 50.0}
        lines.append(json.dumps({"step": step, "at": step, "m": metrics}).encode())
    found = ledger.from_lines(lines)
    assert of(10, found) is Health.GOOD
    verdict = health.at_step(16, found, saved_at_s=0)
    assert (verdict.health, verdict.value) == (Health.BAD, GOOD)
    assert "grad_norm was more than 10 times its average" in verdict.why


def test_rules_with_an_average_are_judged_from_the_beginning() -> None:
    found = ledger_of([0.8] * 30 + [0.05] * 20, rules=[Collapse(patience=5)])
    assert of(29, found) is Health.GOOD
    assert of(35, found) is Health.BAD


def falling(*, rules: Sequence[Rule] = (), to: float = 0.1) -> Ledger:
    """From 0.6 at step 150 to 0.1 at step 450, with noise."""
    noise = random.Random(3)
    return ledger_of(
        [max(0.6 - (0.6 - to) * min(max(step - 150, 0) / 300, 1) + noise.gauss(0, 0.04), 0.01) for step in range(500)],
        rules=rules,
    )


def test_a_fall_begins_and_ends_with_steps_in_a_row() -> None:
    """A step now and then on the other side, as noise has it, neither ends it nor moves where it began."""
    high, low = [0.8] * 50, [0.1, 0.1, 0.8] * 5 + [0.1] * 30
    found = ledger_of([*high, *low, 0.8, *[0.1] * 30, *[0.8] * 30])
    said = {step: health.at_step(step, found, saved_at_s=0).fallen[:13] for step in (49, 50, 52, 95, 126, 144, 145, 150)}
    assert said == {49: "", 50: "since step 50", 52: "since step 50", 95: "since step 50", 126: "since step 50",
                    144: "since step 50", 145: "", 150: ""}  # fmt: skip


def test_nothing_is_said_of_a_fall_of_a_reward_that_is_negative_at_times() -> None:
    """Half of what is below 0, or about 0, says nothing."""
    found = ledger_of([-0.1] * 10 + [0.3] * 100 + [0.05] * 100)
    assert health.at_step(205, found, saved_at_s=0)[::4] == (Health.GOOD, "")
    assert health.at_step(125, ledger_of([-0.1] * 100 + [-0.3] * 100), saved_at_s=0).fallen == ""


def test_a_reward_that_has_fallen_slowly_is_said_and_no_more() -> None:
    verdict = health.at_step(480, falling(), saved_at_s=0)
    assert (verdict.health, verdict.fallen[:11]) == (Health.GOOD, "since step ")
    assert verdict.why.endswith(verdict.fallen)
    assert 300 < int(verdict.fallen.split()[2]) < 450
    assert health.at_step(200, falling(), saved_at_s=0).fallen == ""
    assert health.at_step(480, falling(to=0.4), saved_at_s=0).fallen == "", "a third less is nothing unusual"
    assert health.at_step(480, falling(rules=[Zero()]), saved_at_s=0).fallen, "a breaker with the usual rule knows no more"
    lower_is_better = health.at_step(480, falling(rules=[Spike(metric=REWARD)]), saved_at_s=0)
    assert (lower_is_better.health, lower_is_better.fallen) == (Health.GOOD, "")
    chosen = health.at_step(480, falling(rules=[Collapse(drop=0.5, halflife_steps=200)]), saved_at_s=0)
    assert (chosen.health, chosen.fallen) == (Health.BAD, ""), "who chose the rule has it judged"


def test_metrics_recorded_now_and_then() -> None:
    lines = [
        json.dumps({"step": step, "at": step, "m": {REWARD: GOOD if step < 100 else 0.0}}).encode()
        for step in range(0, 300, 10)
    ]
    found = ledger.from_lines(lines)
    assert of(45, found) is Health.GOOD
    assert of(95, found) is Health.SUSPECT, "between a good and a bad one"
    assert of(105, found) is Health.BAD


# Rollbacks


def branched() -> Ledger:
    """Trained to step 20, bad from 15 on; then again from step 10, at a later time, and good."""
    first = [{"step": s, "at": 100 + s, "m": {REWARD: GOOD if s < 15 else 0.0}} for s in range(27)]
    second = [{"step": s, "at": 1000 + s, "m": {REWARD: 0.5}} for s in range(10, 18)]
    return ledger.from_lines([json.dumps(line).encode() for line in (*first, *second)])


@pytest.mark.parametrize(
    ("step", "saved_at_s", "expected"),
    [
        (9, 108.5, "good"),
        (16, 115.5, "bad"),  # of the first attempt: its poison is still on the disk
        (16, 1015.5, "good"),  # of the second one
        (20, 119.5, "bad"),
        (26, 125.5, "bad"),
        (17, 1016.9, "good"),
        (18, 1017.5, "unknown"),  # saved, and its metrics never seen
        (16, 9999.0, "good"),  # a copy with a new time: the newest attempt that reached it
        (24, 9999.0, "bad"),  # only the first attempt reached it
    ],
)
def test_a_checkpoint_is_judged_by_the_attempt_that_saved_it(step: int, saved_at_s: float, expected: str) -> None:
    assert of(step, branched(), saved_at_s).value == expected


def test_the_line_of_a_branch() -> None:
    found = branched()
    assert [record.step for record in found.line()] == list(range(18))
    assert [record.metrics[REWARD] for record in found.line()] == [GOOD] * 10 + [0.5] * 8
    assert [record.step for record in found.line(0)] == list(range(27))
    assert [record.step for record in found.line(before_step=3)] == [0, 1, 2]


def test_many_rollbacks_stay_fast() -> None:
    lines = [json.dumps({"step": step, "at": 0, "m": {REWARD: GOOD}}).encode() for step in range(20_000, 0, -1)]
    started = time.perf_counter()
    found = ledger.from_lines(lines)
    assert of(1, found) is Health.GOOD
    assert len(found.line()) == 1
    assert time.perf_counter() - started < 5


# The file


def test_a_torn_last_line_is_passed_over_and_closed(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    writer = Writer(path)
    for step in range(5):
        writer.record(step, 100.0 + step, {REWARD: GOOD})
    writer.close()
    whole = Path(path).read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        Path(path).write_bytes(whole[:-cut])
        found = ledger.read(path)
        assert len(found.line()) == (5 if cut == 1 else 4)
        again = Writer(path)
        again.record(7, 107.0, {REWARD: 0.5})
        again.close()
        found = ledger.read(path)
        assert [record.step for record in found.line()][-1] == 7
        assert found.damaged_lines <= 1


def test_a_killed_writer_loses_nothing_that_it_recorded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys\nfrom ckptstore.ledger import Writer\nwriter = Writer(sys.argv[1])\n"
        "for step in range(1000):\n    writer.record(step, 1.0, {'x': 0.5})\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert done.returncode == -9
    assert len(ledger.read(str(path)).line()) == 1000


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    metrics = {REWARD: 0.1 + 0.2, 'ünïcode "quoted"': -1e-300, "nan": NAN, "inf": INF, "-inf": -INF, "big": 1e300, "one": 1.0}
    judges = Judges((NonFinite(patience=2), Zero(metric="a") & Zero(metric="b")), ("tokens",))
    writer = Writer(path)
    writer.judges(judges, 1.0)
    writer.record(3, 1763000000.123, metrics)
    writer.records([Record(4, 5.0, metrics), Record(5, 6.0, metrics)], imported_at_s=8.0)
    writer.event("trip", 9, 7.0, since_step=4)
    writer.sync()
    writer.close()
    found = ledger.read(path)
    assert found.judges == judges
    assert found.damaged_lines == 0
    assert found.events == (ledger.Event("trip", 9, 7.0, 4),)
    read_back = {record.step: record.metrics for record in found.branches[-1]} | {r.step: r.metrics for r in found.branches[0]}
    assert sorted(read_back) == [3, 4, 5]
    for values in read_back.values():
        assert repr(dict(values)) == repr(metrics)
    for line in Path(path).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_full_disk_costs_the_record_and_heals(tmp_path: Path) -> None:
    writer = Writer("/dev/full")
    writer.record(1, 1.0, {"x": 1.0})
    assert writer.lost is not None
    writer.path = str(tmp_path / "m")
    writer.record(2, 2.0, {"x": 1.0})
    assert writer.lost is None
    writer.close()
    assert [record.step for record in ledger.read(writer.path).line()] == [2]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    writer = Writer(str(tmp_path / "metrics.jsonl"))
    writer.record(1, 1.0, {"x": 1.0})
    assert writer.lost is not None
    assert not (tmp_path / "elsewhere").exists()


LINES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\n", b"null", b"[]", b"{}", b'{"step":', b"[" * 2000, b'{"step":1,"m":{"x":1}}']),
    st.fixed_dictionaries(
        {
            "step": st.one_of(st.integers(-5, 60), st.booleans(), st.just(10**30), st.floats(), st.none()),
            "at": st.one_of(st.floats(), st.integers(-5, 2000), st.text(max_size=3)),
            "m": st.dictionaries(
                st.sampled_from([REWARD, "x", "ppo_actor/task_reward/avg"]),
                st.one_of(st.floats(), st.integers(), st.sampled_from(["nan", "inf", "-inf", "x"]), st.none(), st.just([1])),
                max_size=3,
            ),
        }
    ).map(lambda record: json.dumps(record).encode()),
    st.fixed_dictionaries({"event": st.text(max_size=5), "step": st.integers(-3, 60)}).map(lambda e: json.dumps(e).encode()),
    st.fixed_dictionaries(
        {"ledger": st.integers(), "rules": st.sampled_from([[], None, ["zero"], ["no"], [{"zero": []}]])}
    ).map(lambda e: json.dumps(e).encode()),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(LINES, max_size=40))
def test_any_lines_make_a_ledger(lines: list[bytes]) -> None:
    found = ledger.from_lines(lines)
    for branch in found.branches:
        steps = [record.step for record in branch]
        assert steps == sorted(set(steps))
        assert branch
    for number in range(len(found.branches)):
        steps = [record.step for record in found.line(number)]
        assert steps == sorted(set(steps))
    for step in (0, 1, 30, 60):
        for saved_at_s in (0.0, 500.0, 1e9):
            verdict = health.at_step(step, found, saved_at_s=saved_at_s)
            assert verdict.why


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.floats(allow_nan=False, width=32)), min_size=1, max_size=40), st.integers(0, 4000)
)
def test_a_cut_off_file_loses_only_its_end(values: list[tuple[int, float]], cut: int) -> None:
    lines = [json.dumps({"step": step, "at": 1 + n, "m": {"x": x}}).encode() + b"\n" for n, (step, x) in enumerate(values)]
    data = b"".join(lines)
    cut = min(cut, len(data))
    whole = data[: data.rfind(b"\n", 0, cut) + 1]
    torn = ledger.from_lines(io.BytesIO(data[:cut]).readlines())
    assert torn.damaged_lines <= 1
    assert torn.branches == ledger.from_lines(io.BytesIO(whole).readlines()).branches or data[:cut].endswith(b"}")


# Imports


AREAL_LOG = """\
20251112-10:00:00.123 StatsLogger INFO: Epoch 1/10 Step 1/47 Train step 1/470 done.
20251112-10:00:00.124 StatsLogger INFO: Stats (1/2):
20251112-10:00:00.125 StatsLogger INFO:
╒════════════════════════════════╤════════════╤══════════════════════╤════════════╕
│ grpo_actor/task_reward/avg     │ 7.5000e-01 │ grpo_actor/n_seqs    │ 3.2000e+01 │
├────────────────────────────────┼────────────┼──────────────────────┼────────────┤
│ grpo_actor/seq_len/avg         │ 5.1200e+02 │ grad_norm            │ nan        │
╘════════════════════════════════╧════════════╧══════════════════════╧════════════╛
20251112-10:00:00.126 StatsLogger INFO: Stats (2/2):
│ grpo_actor/task_reward/avg     │ 9.9999e-01 │
some other line │ without numbers │ at all
\x1b[32m20251112-10:01:15.000 StatsLogger INFO: Epoch 1/10 Step 2/47 Train step 2/470 done.\x1b[0m
│ grpo_actor/task_reward/avg     │ 0.0000e+00 │
20251112-10:02:30.000 StatsLogger INFO: Epoch 1/10 Step 3/47 Train step 3/470 done.
"""


SCRAPS = ("step,a,b", "1,2,3", "0,nan,", '"1', '{"step": 1, "a": 2}', "\0")


def test_import_of_areals_log(tmp_path: Path) -> None:
    path = tmp_path / "main.log"
    path.write_text("Train step 0 is not done yet\n" + AREAL_LOG, encoding="utf-8")
    found = importing.read(str(path))
    assert (found.kind, found.axis, found.passed_over) == ("log", "log", 1)
    first, second = found.records
    assert (first.step, second.step) == (0, 1), "the log's Train step 1 is global step 0"
    assert first.metrics[REWARD] == 0.75, "the first table of a step counts"
    assert first.metrics["grpo_actor/n_seqs"] == 32
    assert math.isnan(first.metrics["grad_norm"])
    assert second.metrics == {REWARD: 0.0}
    assert second.at_s - first.at_s == pytest.approx(75 - 0.123, abs=1e-3)
    assert time.localtime(first.at_s)[:5] == (2025, 11, 12, 10, 0)


def test_a_log_may_be_gzipped_and_is_refused_where_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "main.log.2.gz"
    path.write_bytes(gzip.compress(AREAL_LOG.encode()))
    assert [record.step for record in importing.read(str(path)).records] == [0, 1]
    for damaged in (path.read_bytes()[:-30], path.read_bytes()[:40] + b"\0" * 9 + path.read_bytes()[49:]):
        path.write_bytes(damaged)
        with pytest.raises((UsageError, StorageError), match=r"main\.log\.2"):
            importing.read(str(path))
        path.write_bytes(gzip.compress(AREAL_LOG.encode()))


@pytest.mark.parametrize(
    ("rows", "axis", "steps"),
    [
        ([{"global_step": 5, "a/b": 1.0}, {"global_step": 6, "a": {"b": 2.0}}], "global", [5, 6]),
        ([{"step": 1, "a/b": 1.0}, {"step": 2, "a/b": 2.0}], "log", [0, 1]),
        ([{"_step": 0, "a/b": 1.0}, {"_step": 1, "a/b": 2.0}], "global", [0, 1]),
        ([{"Step": "1", "a/b": "1.0", "_timestamp": 17.5}], "log", [0]),
        ([{"step": 3.0, "a/b": 1}, {"step": 3.5, "a/b": 1}, {"a/b": 1}, [], "x", {"step": 4}], "log", [2]),
        ([{"step": -1, "a/b": 1}, {"step": True, "a/b": 1}, {"step": 1e300, "a/b": 1}, {"step": 9, "a/b": 1}], "log", [8]),
    ],
)
def test_import_of_jsonl(tmp_path: Path, rows: list[object], axis: str, steps: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "a/b"')
    found = importing.read(str(path))
    assert (found.kind, found.axis) == ("jsonl", axis)
    assert [record.step for record in found.records] == steps
    assert all("a/b" in record.metrics for record in found.records)
    asked = importing.read(str(path), axis="global" if axis == "log" else "log")
    assert [record.step for record in asked.records][-1] == steps[-1] + (1 if axis == "log" else -1)


def test_import_of_a_wandb_export(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    header = ["Step", "trial0 - grpo_actor/task_reward/avg", "trial0 - grpo_actor/task_reward/avg__MIN", "trial0 - _step"]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows(
            [header, ["187", "0.74", "0.7", "187"], ["188", "0", "0", "188"], ["189", "", "", ""], ["190", "NaN", "", ""]]
        )
    found = importing.read(str(path))
    assert (found.kind, found.axis, found.passed_over) == ("csv", "log", 1)
    assert [(record.step, record.metrics[REWARD]) for record in found.records[:2]] == [(186, 0.74), (187, 0.0)]
    assert math.isnan(found.records[2].metrics[REWARD])


def test_import_of_another_runs_ledger(tmp_path: Path) -> None:
    writer = Writer(str(tmp_path / "other.jsonl"))
    writer.judges(ledger.DEFAULT_JUDGES, 1.0)
    for step in range(3, 6):
        writer.record(step, 100.0 + step, {REWARD: GOOD, "x": NAN})
    writer.event("trip", 5, 1.0, since_step=4)
    writer.close()
    found = importing.read(str(tmp_path / "other.jsonl"))
    assert (found.kind, found.axis) == ("ledger", "global")
    assert [(record.step, record.at_s) for record in found.records] == [(3, 103.0), (4, 104.0), (5, 105.0)]
    assert found.records[0].metrics[REWARD] == GOOD


@pytest.mark.parametrize("content", ["", "\n\n", "hello\nworld\n", "a,b\n1,2\n", "{}\n", '{"x": 1}\n', "step,\n1,\n"])
def test_a_file_without_metrics_is_an_error_that_says_what_is_understood(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(UsageError) as refused:
        importing.read(str(path))
    assert "main.log" in refused.value.hint
    with pytest.raises(NotFoundError):
        importing.read(str(tmp_path / "absent"))


def test_importing_twice_changes_nothing_and_mixes_with_what_was_observed(tmp_path: Path) -> None:
    path = str(tmp_path / "metrics.jsonl")
    writer = Writer(path)
    for step in range(3):
        writer.record(step, 1000.0 + step, {REWARD: GOOD})
    imported = [Record(step, 1000.0 + step - 0.25, {"loss": NAN, REWARD: GOOD}) for step in range(6)]
    for _ in range(2):
        writer.records(importing.new_to(ledger.read(path), imported), imported_at_s=time.time())
    writer.close()
    found = ledger.read(path)
    assert len(found.branches) == 1, "times put the imported steps where they belong"
    assert [record.step for record in found.line()] == list(range(6))
    assert all(record.metrics.keys() == {"loss", REWARD} for record in found.line())
    assert len(Path(path).read_text().splitlines()) == 3 + 6


@pytest.mark.parametrize("set_by_s", [-7200.0, 7200.0, 36 * 3600.0])
@pytest.mark.parametrize("until", [110, 500])
def test_a_clock_that_was_set_mixes_no_history(tmp_path: Path, set_by_s: float, until: int) -> None:
    """The clock is wrong from step 100 on, or up to step 110; zeros from step 120 on. An import keeps its file's order."""
    times = {step: 1.7e9 + 75 * step + (set_by_s if 100 <= step < until else 0.0) for step in range(200)}
    records = [Record(step, at_s, {REWARD: 0.0 if step >= 120 else GOOD}) for step, at_s in times.items()]
    observed, imported = Writer(str(tmp_path / "observed")), Writer(str(tmp_path / "imported"))
    for record in records:
        observed.record(record.step, record.at_s, record.metrics)
    imported.records(records, imported_at_s=1.8e9)
    for writer in (observed, imported):
        writer.close()
        found = ledger.read(writer.path)
        assert [record.step for record in found.line()] == list(range(200))
        for step in (95, 105, 115, 121, 150, 187):
            assert of(step, found, times[step] - 10) is (Health.BAD if step >= 120 else Health.GOOD), step


def test_the_rotated_log_may_be_imported_last(tmp_path: Path) -> None:
    writer = Writer(str(tmp_path / "metrics.jsonl"))
    for number, steps in enumerate((range(100, 200), range(100))):
        writer.records((Record(step, 1.7e9 + step, {REWARD: GOOD}) for step in steps), imported_at_s=1.8e9 + number)
    writer.close()
    assert [record.step for record in ledger.read(writer.path).line()] == list(range(200))


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=300),
        st.lists(
            st.sampled_from([*AREAL_LOG.splitlines(), "step,a,b", "1,2,3", "0,nan,", '"1', '{"step": 1, "a": 2}', "\0"])
        ).map("\n".join),
    ),
    st.sampled_from(["auto", "global", "log"]),
)
def test_any_text_can_be_tried_to_import(text: str, axis: str) -> None:
    try:
        found = importing.from_text(io.StringIO(text, newline=""), axis=axis)
    except csv.Error:
        return
    for record in found.records:
        assert record.step >= 0
        assert record.metrics
        assert all(type(value) is float for value in record.metrics.values())
    again = ledger.from_lines([_written(record) for record in found.records])
    assert sum(len(branch) for branch in again.branches) <= len(found.records)
    assert again.damaged_lines == 0


def _written(record: Record) -> bytes:
    read_end, write_end = os.pipe()
    writer = Writer("-")
    writer._descriptor = write_end
    writer.records([record], imported_at_s=1.5)
    writer.close()
    with os.fdopen(read_end, "rb") as file:
        return file.read()


def test_zeros_tell_nothing_where_they_are_usual_and_nobody_chose_a_rule() -> None:
    """A sparse reward: one step in twelve is not 0, for 20 steps at most. Half of the run would be given up for it."""
    sparse = [GOOD / 500 if step % 25 in (3, 4) else 0.0 for step in range(300)]
    zero = Zero(patience=10)
    for saved in (60, 145, 299):
        assert of(saved, ledger_of(sparse)) is Health.UNKNOWN
        assert of(saved, ledger_of(sparse, rules=[zero])) in (Health.BAD, Health.SUSPECT), "a rule that was chosen holds"
    assert of(53, ledger_of(sparse)) is Health.UNKNOWN
    assert of(60, ledger_of(sparse[:88])) is Health.BAD, "three times is not usual yet"
    longer = ledger_of([*sparse, *[0.0] * 100])
    assert of(390, longer) is Health.BAD, "so many zeros are not usual in this run"
    assert of(145, longer) is Health.UNKNOWN
    assert of(300, ledger_of([*sparse, NAN, NAN])) in (Health.BAD, Health.SUSPECT)
    outage = [GOOD] * 100 + [0.0] * 20 + [GOOD] * 100 + [0.0] * 30
    assert [of(step, ledger_of(outage)) for step in (110, 125, 150, 230)] == ["bad", "suspect", "good", "bad"]


@pytest.mark.parametrize(("zeros", "expected"), [(0, "good"), (1, "suspect"), (15, "suspect")])
def test_between_the_last_good_record_and_the_first_bad_one(zeros: int, expected: str) -> None:
    """Metrics are recorded every fifth step: the collapse may have begun before the save of step 48."""
    lines = [
        json.dumps({"step": step, "at": step, "m": {REWARD: GOOD if step < 50 else 0.0}}).encode()
        for step in range(0, 50 + 5 * zeros + 5 * (not zeros), 5)
    ]
    if not zeros:
        lines[-1] = json.dumps({"step": 50, "at": 50, "m": {REWARD: GOOD}}).encode()
    found = ledger.from_lines(lines)
    assert of(48, found) == expected
    assert of(43, found) == of(45, found) == "good"


def test_a_realistic_run_end_to_end(tmp_path: Path) -> None:
    """Noise, a cold start, a dip, a collapse: what a person would say of each checkpoint is what health says."""
    noise = random.Random(7)
    values = [0.0] * 12
    values += [min(0.75, 0.02 * n) + noise.uniform(0, 0.02) for n in range(1, 150)]
    values[80] = 0.0
    values += [0.0] * 40
    found = ledger_of(values)
    expected = {5: "unknown", 20: "good", 79: "good", 80: "suspect", 81: "good", 160: "good", 161: "bad", 200: "bad"}
    assert {step: of(step, found).value for step in expected} == expected
