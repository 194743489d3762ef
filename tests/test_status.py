"""`ckptstore status`, and what the ledger adds to `list`, `setup` and `resume`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore import halt, ledger, pins
from ckptstore.breaker import CircuitBreaker
from ckptstore.errors import StorageError, TrainingHalted
from ckptstore.rules import REWARD
from tests import trees
from tests.commands import Result, invoke, isolate

Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    isolate(monkeypatch, tmp_path)
    return lambda *words: invoke(capfd, *words)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return trees.make_run(tmp_path / "root", slot="dcp", recover_info=187, slot_step=187)


def side_of(run: Path) -> str:
    return ledger.side_of(str(run))


def trip(run: Path) -> None:
    breaker = CircuitBreaker(run)
    for step in range(196):
        breaker.observe({REWARD: 0.75 if step < 187 else 0.0}, step)
    with pytest.raises(TrainingHalted):
        breaker.observe({REWARD: 0.0}, 196)


def test_a_run_of_which_nothing_is_known(run: Path, cli: Cli) -> None:
    result = cli("status", "--run", run)
    assert result.code == 0
    assert "breaker  not tripped" in result.out
    assert "no metrics are recorded (--import FILE)" in result.out
    document = cli("status", "--run", run, "--json").json
    assert (document["tripped"], document["trip"], document["pins"], document["last_good_step"]) == (False, None, [], None)
    assert not Path(side_of(run)).exists(), "looking writes nothing"


def test_a_tripped_run(run: Path, cli: Cli) -> None:
    trip(run)
    result = cli("status", "--run", run)
    assert "TRIPPED at global step 196 (Train step 197 of the log)" in result.out
    assert "was 0 for 10 steps in a row" in result.out
    assert f"python -m ckptstore.recover resume --run {run} --max-step 140" in result.out
    assert "pinned   step 140: last good before the trip at step 196" in result.out
    assert "good     global step 140 is the newest good one" in result.out
    assert "bad      step 187:" in result.out
    document = cli("status", "--run", run, "--json").json
    assert document["tripped"] is True
    assert (document["trip"]["step"], document["trip"]["since_step"]) == (196, 187)
    assert [(c["step"], c["health"], c["value"]) for c in document["checkpoints"]] == [
        (46, "good", 0.75), (93, "good", 0.75), (140, "good", 0.75), (187, "bad", 0.0)
    ]  # fmt: skip
    assert document["metrics"]["newest"] == {REWARD: 0.0}
    assert "TRIPPED at step 196" in cli("list", "--run", run).out


def recorded(run: Path, rewards: Callable[[int], float], steps: int) -> None:
    Path(side_of(run)).mkdir(parents=True, exist_ok=True)
    writer = ledger.Writer(ledger.path_in(side_of(run)))
    for step in range(steps):
        writer.record(step, 1000.0 + step, {REWARD: rewards(step)})
    writer.close()


def test_what_is_kept_of_a_bad_time_is_kept_and_said(tmp_path: Path, cli: Cli) -> None:
    run = trees.make_run(tmp_path / "root", slot="era_a", slot_step=150, recover_info=150)
    recorded(run, lambda step: 0.0 if step > 140 else 0.75, 160)
    bad = "health bad: grpo_actor/task_reward/avg was 0 at 19 steps in a row, from step 141 on"
    result = cli("adopt", "--run", run)
    assert (result.code, "kept global step 150" in result.out) == (0, True)
    assert f"{bad}: it is kept all the same, and setup passes it over" in " ".join(result.err.split())
    shown = cli("status", "--run", run)
    assert "good     global step 140 is the newest good one" in shown.out
    assert "bad      step 150 (adopted): " in shown.out
    assert "bad      step 150 (the slot): " in shown.out
    document = cli("status", "--run", run, "--json").json
    found = [(one["kind"], one["step"], one["health"]) for one in (*document["checkpoints"], document["slot"])]
    assert [one for one in found if one[0] != "export"] == [("adopted", 150, "bad"), ("slot", 150, "bad")]
    assert document["last_good_step"] == 140


@pytest.mark.parametrize(("bad_from", "said"), [(141, "bad"), (999, "good"), (None, "unknown")])
def test_watch_and_adopt_give_the_health_of_what_they_keep(tmp_path: Path, cli: Cli, bad_from: int | None, said: str) -> None:
    run = trees.make_run(tmp_path / "root", slot="era_a", slot_step=150, recover_info=150)
    if bad_from is not None:
        recorded(run, lambda step: 0.0 if step >= bad_from else 0.75, 160)
    kept = json.loads(cli("watch", "--once", "--run", run, "--json").out)["checkpoint"]
    assert (kept["step"], kept["health"]) == (150, said)
    shutil.rmtree(f"{side_of(run)}/adopted")
    assert cli("adopt", "--run", run, "--json").json["checkpoint"]["health"] == said
    shutil.rmtree(f"{side_of(run)}/adopted")
    result = cli("watch", "--once", "--run", run)
    assert ("health bad" in result.err) is (said == "bad")


def test_a_ledger_that_cannot_be_read_keeps_nothing_from_being_kept(tmp_path: Path, cli: Cli) -> None:
    run = trees.make_run(tmp_path / "root", slot="era_a", slot_step=150, recover_info=150)
    Path(ledger.path_in(side_of(run))).mkdir(parents=True)
    result = cli("adopt", "--run", run)
    assert (result.code, "kept global step 150" in result.out) == (0, True)
    assert "whether step 150 is healthy cannot be told" in result.err


def test_the_slot_counts_where_nothing_else_is_good(tmp_path: Path, cli: Cli) -> None:
    run = trees.make_run(tmp_path / "root", steps=[], slot="era_a", slot_step=150, recover_info=150)
    recorded(run, lambda step: 0.75, 160)
    assert "global step 150 (the slot) is the newest good one" in cli("status", "--run", run).out
    assert cli("status", "--run", run, "--json").json["last_good_step"] == 150


def test_a_reward_that_has_fallen_slowly_is_said_where_one_chooses(run: Path, cli: Cli) -> None:
    recorded(run, lambda step: 0.6 if step < 100 else max(0.6 - 0.01 * (step - 100), 0.05), 200)
    said = "since step 131 it is less than half of what it was"
    assert (
        f"global step 187 is the newest good one: grpo_actor/task_reward/avg is 0.05; {said}" in cli("status", "--run", run).out
    )
    assert (
        f"health good: grpo_actor/task_reward/avg is 0.05; {said} (`ckptstore plot` shows it" in cli("list", "--run", run).out
    )
    plan = cli("setup", "--run", run, "--dry-run", "--as-is", "--json").json
    assert (plan["checkpoint"]["step"], said in plan["why"]) == (187, True)


def test_reset(run: Path, cli: Cli) -> None:
    trip(run)
    result = cli("status", "--run", run, "--reset")
    assert "the trip at step 196 is cleared: training may start" in result.out
    assert "breaker  not tripped" in result.out
    CircuitBreaker(run)
    assert "was not halted" in cli("status", "--run", run, "--reset").out
    assert [pin.step for pin in pins.read(side_of(run))] == [140]


def test_pins_by_hand(run: Path, cli: Cli) -> None:
    assert cli("status", "--run", run, "--pin", 46, "--pin", 93).code == 0
    assert [pin.step for pin in pins.read(side_of(run))] == [46, 93]
    assert "no longer pinned" in cli("status", "--run", run, "--unpin", 46).out
    assert "was not pinned" in cli("status", "--run", run, "--unpin", 46).out
    assert [pin.step for pin in pins.read(side_of(run))] == [93]
    result = cli("status", "--run", run, "--pin", 47)
    assert result.code == 1
    assert "no checkpoint of step 47" in result.err


@pytest.mark.parametrize("content", [b"", b"{", b'{"pins": [{}]}', b'{"pins": 3}', b"[]"])
def test_pins_that_cannot_be_read_are_an_error_not_none(run: Path, cli: Cli, content: bytes) -> None:
    side = Path(side_of(run))
    side.mkdir(parents=True)
    (side / "pins.json").write_bytes(content)
    with pytest.raises(StorageError):
        pins.read(str(side))
    assert cli("status", "--run", run).code == 1


def test_import_makes_health_of_a_run_that_nobody_watched(run: Path, cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "main.log"
    lines = []
    for log_step in range(1, 241):
        lines += [f"StatsLogger INFO: Epoch 1/10 Step 1/47 Train step {log_step}/470 done.",
                  f"│ ppo_actor/task_reward/avg │ {0.0 if log_step >= 188 else 0.75:.4e} │"]  # fmt: skip
    log.write_text("\n".join(lines))
    result = cli("status", "--run", run, "--import", log)
    assert "main.log: 240 steps, global steps 0 to 239 (log; its step N is global step N - 1)" in result.out
    assert "240 of them known already" in cli("status", "--run", run, "--import", log).out
    chosen = cli("setup", "--run", run, "--dry-run", "--json").json
    assert chosen["checkpoint"]["step"] == 140
    assert "health good" in chosen["why"]
    assert {skipped["step"] for skipped in chosen["skipped"]} == {187}
    assert all("health bad" in skipped["reasons"][0] for skipped in chosen["skipped"])
    anyway = cli("setup", "--run", run, "--dry-run", "--json", "--include-bad").json
    assert anyway["checkpoint"]["step"] == 187
    assert "although its health is bad" in anyway["why"]


def test_import_of_other_metrics_is_told(run: Path, cli: Cli, tmp_path: Path) -> None:
    table = tmp_path / "export.csv"
    table.write_text("global_step,train/reward\n" + "".join(f"{step},0.7\n" for step in range(200)))
    assert "holds nothing of what is judged (grpo_actor/task_reward/avg, " in cli("status", "--run", run, "--import", table).err
    table.write_text(table.read_text().replace("train/reward", "ppo_actor/task_reward/avg"))
    assert "is judged" not in cli("status", "--run", run, "--import", table).err


def test_import_by_the_other_axis(run: Path, cli: Cli, tmp_path: Path) -> None:
    table = tmp_path / "export.csv"
    table.write_text("Step,grpo_actor/task_reward/avg\n" + "".join(f"{s},{0.7 if s < 188 else 0}\n" for s in range(1, 220)))
    assert "its step N is global step N - 1" in cli("status", "--run", run, "--import", table).out
    assert cli("status", "--run", run, "--json").json["last_good_step"] == 140
    Path(ledger.path_in(side_of(run))).unlink()
    assert "its steps are global steps" in cli("status", "--run", run, "--import", table, "--axis", "global").out
    assert cli("status", "--run", run, "--json").json["last_good_step"] == 187


def test_import_of_nothing_is_an_error(run: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("nothing here\n")
    assert cli("status", "--run", run, "--import", tmp_path / "empty").code == 2
    assert cli("status", "--run", run, "--import", tmp_path / "absent").code == 1


def test_list_shows_reward_and_health_where_there_is_a_ledger(run: Path, cli: Cli) -> None:
    before = cli("list", "--run", run)
    assert " health " not in before.out
    assert cli("list", "--run", run, "--json").json["checkpoints"][0]["health"] == "unknown"
    trip(run)
    table = cli("list", "--run", run).out
    header, *rows = [line for line in table.splitlines() if " COMPLETE" in line or line.startswith("step")]
    assert header.split()[-3:] == ["reward", "health", "status"]
    assert [line.split()[-4:-2] for line in rows if "COMPLETE" in line and line.strip()[0].isdigit()] == [
        ["♥", "good"], ["♥", "good"], ["♥", "good"], ["✗", "bad"]
    ]  # fmt: skip
    found = cli("list", "--run", run, "--json").json
    assert [(c["step"], c["health"], c["value"]) for c in found["checkpoints"]][-1] == (187, "bad", 0.0)
    assert found["slot"]["health"] == "bad"
    assert json.dumps(found)


def test_resume_chooses_the_same(run: Path, cli: Cli) -> None:
    trip(run)
    document = cli("resume", "--run", run, "--plan", "--json").json
    assert document["checkpoint"]["step"] == 140
    document = cli("resume", "--run", run, "--plan", "--json", "--include-bad").json
    assert document["checkpoint"]["step"] == 187


def test_setup_says_that_training_may_start(run: Path, cli: Cli) -> None:
    assert "halted training" not in cli("setup", "--run", run, "--as-is", "--dry-run").out
    trip(run)
    assert "halted training at step 196: that record is cleared" in cli("setup", "--run", run, "--as-is", "--dry-run").out
    result = cli("setup", "--run", run, "--as-is", "--force")
    assert result.code == 0, result.err
    assert "the record of its trip at step 196 is cleared" in result.out
    assert halt.read(side_of(run)) is None


def test_suspect_ones_are_passed_over_too(run: Path, cli: Cli) -> None:
    breaker = CircuitBreaker(run)
    for step in range(190):  # the machine went away after three zeros: nothing tripped
        breaker.observe({REWARD: 0.75 if step < 187 else 0.0}, step)
    chosen = cli("setup", "--run", run, "--dry-run", "--json").json
    assert chosen["checkpoint"]["step"] == 140
    assert all("health suspect" in skipped["reasons"][0] for skipped in chosen["skipped"])
    assert "suspect  step 187:" in cli("status", "--run", run).out
