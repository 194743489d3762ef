"""The verbs list, show, verify, seal, setup and clean, as people and programs see them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import ckptstore
from ckptstore import CircuitBreaker, commit, probe
from ckptstore import cli as cli_module
from ckptstore.cli import render
from ckptstore.errors import StorageError, TrainingHalted
from ckptstore.frameworks.areal import launch
from ckptstore.journal import Journal
from ckptstore.lock import RunLock
from ckptstore.manifest import parse
from ckptstore.model import MANIFEST_NAME, Status
from ckptstore.sizes import size
from tests import commands, trees
from tests.commands import Result, flat
from tests.native.conftest import mounted

Cli = Callable[..., Result]
EXPERIMENT = "cli-grpo"  # of its own: a trainer of this name that another test starts would be ours


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("CKPTSTORE_FILEROOT", str(tmp_path))
    monkeypatch.setattr(probe, "file_system", lambda path: "ext4")  # whatever this machine is made of
    monkeypatch.setattr(launch, "_package_of_python_on_path", lambda: "")  # and whatever is installed on it


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return functools.partial(commands.invoke, capfd)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four exports, the last torn, and a slot of AReaL v0.3 after step 140."""
    path = trees.make_run(
        tmp_path, experiment=EXPERIMENT, steps=[46, 93, 140, 187], sharded=True, slot="era_a", slot_step=140, recover_info=140
    )
    trees.remove_shard(trees.checkpoint(path, 187))
    trees.set_age(trees.checkpoint(path, 187), 3600)
    trees.set_age(tmp_path / "logs", 3600)
    return path


def rows(result: Result) -> list[list[str]]:
    """The table's lines, as words."""
    lines = result.out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:2] == ["step", "log"])
    table = lines[first + 1 :]
    return [line.split() for line in table[: table.index("")]]


# --- list ---------------------------------------------------------------------------------------------------------


def test_list_shows_every_checkpoint_with_both_numbers(cli: Cli, run: Path) -> None:
    result = cli("list")
    assert result.code == 0
    table = rows(result)
    assert [row[:3] for row in table] == [
        ["46", "47", "0:46"],
        ["93", "94", "1:46"],
        ["140", "141", "2:46"],
        ["187", "188", "3:46"],
    ]
    assert [row[-1] for row in table] == ["COMPLETE", "COMPLETE", "COMPLETE", "PARTIAL"]
    assert "weights tok cfg" in result.out
    assert "hf-sharded" in result.out
    assert "model-00002-of-00003.safetensors: shard missing" in result.out
    assert "global step 140 (the log says: Train step 141) is the newest whole one" in result.out


def test_list_shows_slot_settings_and_where_it_looked(cli: Cli, run: Path) -> None:
    text = cli("list").out
    assert f"{run}  (fileroot from $CKPTSTORE_FILEROOT)" in text
    assert "slot     step 140, hf+optim: weights, optimizer" in text
    assert "after global step 140, so training would go on at 141" in text
    assert "saver    every 1 epoch\n" in text
    assert "recover  mode disabled, every 1 epoch: nothing resumes by itself" in text


@pytest.mark.parametrize(
    ("words", "steps", "says"),
    [
        (["--max-step", 93], [46, 93], "checkpoints up to step 93, 93 included"),
        (["--before-step", 93], [46], "checkpoints before step 93"),
        (["--log-step", 94], [93], "checkpoints of step 93, the log's 94"),
        (["--latest"], [140], ""),
        (["--latest", "--before-step", 140], [93], ""),
    ],
)
def test_list_within_bounds(cli: Cli, run: Path, words: list[object], steps: list[int], says: str) -> None:
    result = cli("list", *words)
    assert [int(row[0]) for row in rows(result)] == steps
    assert says in result.out
    assert [one["step"] for one in cli("list", "--json", *words).json["checkpoints"]] == steps


def test_list_has_no_whole_one_within_the_bound(cli: Cli, run: Path) -> None:
    result = cli("list", "--latest", "--before-step", 46)
    assert (result.code, result.out.count("\n")) == (4, 1)
    assert "no whole checkpoint before step 46" in result.err
    assert "first saved is step 46" in flat(result.err)


def test_list_says_which_setting_would_have_saved_one(cli: Cli, run: Path) -> None:
    result = cli("list", "--before-step", 20)
    assert result.code == 0
    assert "With saver: every 1 epoch, the first saved is step 46." in result.out
    assert "saver.freq_steps=20 (or less)" in result.out


def test_list_of_a_run_without_checkpoints_says_what_it_looked_for(cli: Cli, tmp_path: Path) -> None:
    trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[])
    result = cli("list")
    assert result.code == 0
    assert "epoch{E}epochstep{S}globalstep{G}" in result.out
    assert "slot     empty" in result.out
    assert "AReaL starts from step 0" in result.out


def test_recover_info_alone(cli: Cli, run: Path) -> None:
    result = cli("list", "--recover-info")
    assert "after global step 140, so training would go on at 141" in result.out
    assert "epoch 2, epoch step 46; 47 steps per epoch" in result.out
    assert "holds    step, saver, evaluator, checkpoint, stats_logger, dataloader" in result.out
    assert "never opened" in result.out
    assert "COMPLETE\n" in result.out
    assert "hf-sharded" not in result.out


def test_the_pickle_is_never_loaded(cli: Cli, run: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch harmed'\ntR."
    (run / "recover_info/dataloader_info.pkl").write_bytes(bomb)
    for words in (["list"], ["list", "--recover-info"], ["show", "--slot"], ["setup", "--dry-run", "--as-is"]):
        cli(*words)
    assert not Path("harmed").exists()


def test_list_in_json(cli: Cli, run: Path) -> None:
    document = cli("list", "--json").json
    assert sorted(document) == ["checkpoints", "config", "notes", "recover_info", "run", "slot"]
    assert document["run"] == {
        "path": str(run), "fileroot": str(run.parents[3]), "user": "alice", "experiment": EXPERIMENT, "trial": "trial0",
        "found_by": "fileroot from $CKPTSTORE_FILEROOT",
    }  # fmt: skip
    first, last = document["checkpoints"][0], document["checkpoints"][-1]
    assert (first["step"], first["log_step"], first["epoch"], first["epoch_step"]) == (46, 47, 0, 46)
    assert (first["status"], first["format"], first["kind"]) == ("COMPLETE", "hf-sharded", "export")
    assert first["holds"] == ["weights", "tokenizer", "config"]
    assert first["file_count"] == len(list(trees.checkpoint(run, 46).iterdir()))
    assert first["bytes"] == sum(path.stat().st_size for path in trees.checkpoint(run, 46).iterdir())
    assert first["parts"][0]["path"] == str(trees.checkpoint(run, 46))
    assert last["parts"][0]["findings"][0] == {
        "path": "model-00002-of-00003.safetensors", "problem": "shard missing", "status": "PARTIAL",
    }  # fmt: skip
    assert document["slot"]["step"] == document["recover_info"]["step"] == 140
    assert document["recover_info"]["resumes_at"] == 141
    assert document["config"]["saver"]["freq_epochs"] == 1


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_the_terminal(run: Path, tmp_path: Path, columns: int) -> None:
    with commands.Terminal([*commands.COMMAND, "list"], columns=columns, env=terminal_environment()) as terminal:
        result = terminal.finish()
    lines = commands.plain(result.out).splitlines()
    assert result.code == 0
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= columns
    titles = next(line for line in lines if line.startswith("step  log")).split()
    assert {"step", "log", "holds", "size", "age", "status"} <= set(titles)
    assert ("files" in titles) == (columns == 100)


def terminal_environment() -> dict[str, str]:
    return commands.environment(TERM="xterm", CKPTSTORE_FILEROOT=os.environ["CKPTSTORE_FILEROOT"])


def test_a_pipe_gets_every_column_in_one_line(cli: Cli, run: Path) -> None:
    titles = next(line for line in cli("list").out.splitlines() if line.startswith("step")).split()
    assert titles == ["step", "log", "epoch:step", "parts", "holds", "format", "files", "size", "age", "status"]


def test_stray_slots_near_names_and_saves_in_progress_are_said(cli: Cli, run: Path) -> None:
    trees.stray_slot(run)
    trees.near_misses(run, names=["epoch0epochstep46globalstep46.bak"])
    trees.tmp_folder(run, 234)
    err = cli("list").err
    assert "recover_checkpoint/ lies directly in the trial" in err
    assert "it reads default/recover_checkpoint/" in err
    assert "default/epoch0epochstep46globalstep46.bak" in err
    assert "a save in progress" in err


def test_critic_and_default_are_parts_of_one_step(cli: Cli, tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46, 93], parts=("default", "critic"))
    trees.critic_only(run, 140)
    result = cli("list")
    assert [row[3:5] for row in rows(result)][:2] == [["default", "critic"]] * 2
    assert "part default is missing at this step" in result.out
    assert [len(one["parts"]) for one in cli("list", "--json").json["checkpoints"]] == [2, 2, 1]


# --- names that would drive a terminal ----------------------------------------------------------------------------

EVIL = "\x1b[31mred\x07\u202egpj\n"


def test_escapes_in_names_are_printed_escaped(cli: Cli, run: Path) -> None:
    (trees.checkpoint(run, 93) / f"x{EVIL}y").write_bytes(b"?")
    trees.near_misses(run, names=[f"epoch1globalstep9{EVIL}"])
    for words in (["list"], ["show", 93], ["verify", 93], ["setup", "--step", 93, "--as-is", "--dry-run"]):
        result = cli(*words)
        for character in ("\x1b", "\x07", "\u202e"):
            assert character not in result.out + result.err
    assert r"x\x1b[31mred\x07\u202egpj\ny" in cli("show", 93).out
    assert f"x{EVIL}y" in [one["path"] for one in cli("show", 93, "--json").json["parts"][0]["files"]]


def test_escapes_in_errors_are_printed_escaped(cli: Cli, run: Path) -> None:
    result = cli("list", "-e", EVIL)
    assert result.code == 1
    assert "\x1b" not in result.err
    assert "\x1b[31m" in cli("list", "-e", EVIL, "--json").json["error"].encode().decode("unicode_escape")


@pytest.mark.parametrize("text", ["plain name-1.safetensors", "Ünïcödé 名前"])
def test_ordinary_names_stay(text: str) -> None:
    assert render.safe(text) == text


# --- show ---------------------------------------------------------------------------------------------------------


def test_show_lists_files_and_digests_once_sealed(cli: Cli, run: Path) -> None:
    assert "CRC-64/NVME" in cli("show", 46).out
    cli("seal", 46)
    manifest = parse((trees.checkpoint(run, 46) / MANIFEST_NAME).read_bytes())
    text = cli("show", 46).out
    assert f"sha256 {manifest.sha256}" in text
    for entry in manifest.files:
        assert f"{entry.crc:016X}" in text
    document = cli("show", 46, "--json").json
    assert document["parts"][0]["manifest_sha256"] == manifest.sha256
    assert {one["path"] for one in document["parts"][0]["files"]} == {entry.path for entry in manifest.files}


def test_show_by_the_logs_number_and_the_slot(cli: Cli, run: Path) -> None:
    assert "global step 46 (the log says: Train step 47)" in cli("show", "--log-step", 47).out
    assert "optim_world_size_2_rank_0.pt" in cli("show", "--slot").out


@pytest.mark.parametrize("words", [[], [46, 93], [46, "--slot"], ["--log-step", 0], ["abc"]])
def test_show_takes_one(cli: Cli, run: Path, words: list[object]) -> None:
    assert cli("show", *words).code == 2


def test_a_step_that_does_not_exist_has_a_nearest(cli: Cli, run: Path) -> None:
    result = cli("show", 100)
    assert result.code == 1
    assert "no checkpoint of global step 100" in result.err
    assert "The nearest is 93" in result.err


# --- seal and verify ----------------------------------------------------------------------------------------------


def test_seal_all_seals_what_is_whole_and_passes_over_the_rest(cli: Cli, run: Path) -> None:
    result = cli("seal", "--all", "--json")
    assert result.code == 0
    assert [one["result"] for one in result.json["checkpoints"]] == ["sealed", "sealed", "sealed", "skipped"]
    assert [one["status"] for one in cli("list", "--json").json["checkpoints"]] == ["COMMITTED"] * 3 + ["PARTIAL"]
    assert [one["result"] for one in cli("seal", "--all", "--json").json["checkpoints"]][:3] == ["already sealed"] * 3


def test_sealing_a_torn_one_by_name_fails(cli: Cli, run: Path) -> None:
    result = cli("seal", 187, 46)
    assert result.code == 3
    assert "step 187: failed (step 187 is PARTIAL" in result.out
    assert (trees.checkpoint(run, 46) / MANIFEST_NAME).exists()
    assert not (trees.checkpoint(run, 187) / MANIFEST_NAME).exists()


def test_seal_finds_damage_that_list_does_not_see(cli: Cli, run: Path) -> None:
    path = trees.checkpoint(run, 93) / "model-00001-of-00003.safetensors"
    trees.truncate(path)
    assert cli("seal", "--all").code == 3
    assert not (path.parent / MANIFEST_NAME).exists()


def test_seal_dry_run_changes_nothing(cli: Cli, run: Path) -> None:
    before = commands.snapshot(run)
    result = cli("seal", "--all", "--dry-run")
    assert result.out.count("would be sealed") == 3
    assert commands.snapshot(run) == before


@pytest.mark.parametrize("words", [[], [46, "--all"]])
def test_seal_wants_steps_or_all(cli: Cli, run: Path, words: list[object]) -> None:
    assert cli("seal", *words).code == 2


def test_a_flipped_bit_is_found_by_its_digest(cli: Cli, run: Path) -> None:
    assert cli("seal", "--all").code == 0
    assert cli("verify", 46, 93, 140).code == 0
    trees.bitflip(trees.checkpoint(run, 140) / "model-00003-of-00003.safetensors")
    assert cli("verify", "--level", "structure", 140).code == 0  # its format is still right
    result = cli("verify", 46, 93, 140)
    assert result.code == 3
    assert "2 of 3 whole at level full" in result.out
    assert "model-00003-of-00003.safetensors: digest differs from the manifest in the chunk at byte 0" in result.out
    document = cli("verify", 140, "--json")
    assert (document.code, document.json["ok"]) == (3, False)
    assert document.json["reports"][0]["status"] == "CORRUPT"


def test_verify_says_once_how_many_have_no_manifest(cli: Cli, run: Path) -> None:
    result = cli("verify", 46, 93)
    assert result.code == 0
    assert result.out.count("without a manifest") == 1
    assert "2 without a manifest" in result.out


def test_verify_of_everything_finds_the_torn_one(cli: Cli, run: Path) -> None:
    for words in ([], ["--all"], ["--all", "--level", "quick"]):
        result = cli("verify", *words)
        assert result.code == 3
        assert "3 of 4 whole" in result.out


def test_verify_by_the_logs_number(cli: Cli, run: Path) -> None:
    assert cli("verify", "--log-step", 47, "--json").json["reports"][0]["step"] == 46


def test_verify_the_slot(cli: Cli, run: Path) -> None:
    document = cli("verify", "--slot", "--json").json
    assert [(one["kind"], one["step"], one["ok"]) for one in document["reports"]] == [("slot", 140, True)]


def test_a_pinned_manifest(cli: Cli, run: Path) -> None:
    cli("seal", 46, 93)
    pins = [cli("show", step, "--json").json["parts"][0]["manifest_sha256"] for step in (46, 93)]
    assert cli("verify", 46, "--expect-digest", pins[0].upper()).code == 0
    result = cli("verify", 46, "--expect-digest", pins[1])
    assert result.code == 3
    assert "not the one with SHA-256" in result.out
    assert cli("verify", 46, 93, "--expect-digest", pins[0]).code == 2


@pytest.mark.parametrize("words", [[46, "--all"], [46, "--slot"], ["--all", "--slot"], ["--level", "deep"], [46, "x"]])
def test_verify_usage(cli: Cli, run: Path, words: list[object]) -> None:
    assert cli("verify", *words).code == 2


# --- setup --------------------------------------------------------------------------------------------------------


def slot_names(run: Path) -> set[str]:
    return {path.name for path in (run / "default/recover_checkpoint").iterdir()}


def test_setup_dry_run_prints_the_whole_plan_and_changes_nothing(cli: Cli, run: Path) -> None:
    before = commands.snapshot(run.parent)
    result = cli("setup", "--dry-run", "--as-is", "--step", 93)
    assert result.code == 0
    text = result.out
    assert text.index("not restored") < text.index("\nrestored")
    for part in (
        "global step 93 (the log says: Train step 94)", "you named it", "default/epoch1epochstep46globalstep93",
        "default/recover_checkpoint", "needed;", "free (ext4)", "old slot  step 140, hf+optim", "nothing was changed",
    ):  # fmt: skip
        assert part in text
    assert commands.snapshot(run.parent) == before
    document = cli("setup", "--dry-run", "--as-is", "--step", 93, "--json").json
    assert document["done"] is False
    assert document["needed_bytes"] == document["checkpoint"]["bytes"]
    assert document["free_bytes"] > 0
    assert commands.snapshot(run.parent) == before


def write_log(path: Path, steps: Iterable[int], *, zero_from: int, day: int = 24) -> None:
    """What AReaL logs of these global steps."""
    path.write_text(
        "".join(
            f"202611{day}-12:{n // 60:02}:{n % 60:02}.000 StatsLogger INFO: Train step {n + 1}/200 done.\n"
            f"│ grpo_actor/task_reward/avg │ {0.7 + n / 1e4 if n < zero_from else 0:.4e} │\n"
            for n in steps
        )
    )
    trees.set_age(path.parent, 3600)


def test_the_trainers_log_tells_what_is_bad_where_nobody_recorded_metrics(cli: Cli, run: Path) -> None:
    """The reward was zero from step 120 on, and nobody watched it. A rotated log is older."""
    log = next((run.parents[3] / "logs").glob("*/*/*")) / "main.log"
    note = f"no metrics are recorded, nor are any found in {log}: nothing tells whether the model was healthy at step 140"
    assert "no metrics" not in cli("setup", "--dry-run", "--as-is").err, "there is no log"
    write_log(log, (), zero_from=0)
    assert note in " ".join(cli("setup", "--dry-run", "--as-is").err.split())
    assert note in " ".join(cli("resume", "--as-is", "--plan").err.split())
    for named in (["--before-step", 140], ["--step", 93]):
        assert "no metrics" not in cli("setup", "--dry-run", "--as-is", *named).err
    assert "reward" not in cli("list").out
    write_log(log, range(100, 150), zero_from=120)
    write_log(log.with_name("main.log.1"), range(100), zero_from=120)
    os.utime(log.with_name("main.log.1"), (1.7e9, 1.7e9))
    for words in (["setup", "--dry-run", "--as-is"], ["resume", "--as-is", "--plan"]):
        result = cli(*words)
        assert "no metrics" not in result.err
        assert "global step 93" in result.out
        assert "health bad: grpo_actor/task_reward/avg was 0 at 30 steps in a row, from step 120 on" in " ".join(
            result.out.split()
        )
    assert "✗ bad" in cli("list").out
    assert "150 steps, of the trainer's log" in " ".join(cli("status").out.split())
    assert not (run.parent / ".ckptstore/trial0/metrics.jsonl").exists(), "looking writes nothing"


def test_what_the_log_told_is_kept_by_setup_and_the_log_is_read_on(cli: Cli, run: Path) -> None:
    """The history that was left stays known when its log is gone; a second collapse is seen in the new one."""
    log = next((run.parents[3] / "logs").glob("*/*/*")) / "main.log"
    write_log(log, range(150), zero_from=120)
    assert cli("setup", "--as-is").code == 0
    write_log(log, range(94, 190), zero_from=170, day=25)
    (good,) = trees.make_run(run.parents[3] / "other", steps=[165], logs=False).glob("default/epoch*")
    shutil.copytree(good, run / "default" / good.name)
    shutil.copytree(good, run / "default" / trees.folder_name(180))
    trees.set_age(run / "default", 3600)
    result = cli("setup", "--as-is", "--dry-run", "--force")
    assert "step 180: health bad" in " ".join(result.out.split())
    assert "global step 165" in result.out
    assert "150 steps" not in (status := " ".join(cli("status").out.split()))
    assert "190 steps, of the trainer's log" in status
    side = run.parent / ".ckptstore/trial0/metrics.jsonl"
    with side.open("a") as file:  # from here on a breaker records
        file.write('{"step":94,"at":1795700000.0,"m":{"grpo_actor/task_reward/avg":0.5}}\n')
    assert "of the trainer's log" not in cli("status").out
    assert "step 140: grpo_actor/task_reward/avg was 0" in " ".join(cli("status").out.split())


def test_a_breaker_that_is_added_later_forgets_nothing(cli: Cli, run: Path) -> None:
    """Of what was trained without it the log tells: all of that was unknown from its first step on, and 140 was set up."""
    write_log(next((run.parents[3] / "logs").glob("*/*/*")) / "main.log", range(150), zero_from=120)
    words = ("setup", "--as-is", "--dry-run", "--force")
    assert "step 140: health bad" in flat(cli(*words).out)
    breaker = CircuitBreaker(run)
    with pytest.raises(TrainingHalted, match="since global step 120") as halted:
        breaker.observe({"grpo_actor/task_reward/avg": 0.0}, 150)
    assert halted.value.last_good_step == 93
    found = cli(*words)
    assert "step 140: health bad" in flat(found.out)
    assert "global step 93" in found.out
    assert (run.parent / ".ckptstore/trial0/metrics.jsonl").read_text().count('"rules":') == 1


@pytest.mark.parametrize(("hours", "seen"), [(0, False), (10, True)])
def test_the_log_is_read_on_where_the_breaker_was_taken_away(cli: Cli, run: Path, hours: int, seen: bool) -> None:
    """It recorded up to step 100; zeros came from step 120 on, with $CIRCUIT_BREAKER_ENABLED=0. A log ends a bit later."""
    log = next((run.parents[3] / "logs").glob("*/*/*")) / "main.log"
    write_log(log, range(150), zero_from=120)
    start_s = time.mktime(time.strptime("20261124-12:00", "%Y%m%d-%H:%M"))
    side = run.parent / ".ckptstore/trial0"
    side.mkdir(parents=True)
    with (side / "metrics.jsonl").open("w") as file:
        file.writelines(
            f'{{"step":{n},"at":{start_s + n + 0.1},"m":{{"grpo_actor/task_reward/avg":0.7}}}}\n' for n in range(100)
        )
    os.utime(log, (start_s + 110 + 3600 * hours,) * 2)
    result = cli("setup", "--as-is", "--dry-run")
    assert ("step 140: health bad" in flat(result.out)) is seen, result.out
    assert cli("status").out.count("150 steps, of the trainer's log") == seen


def test_setup_places_the_checkpoint_and_keeps_the_old_slot(cli: Cli, run: Path) -> None:
    old = slot_names(run)
    result = cli("setup", "--as-is", "--step", 93)
    assert result.code == 0, result.err
    assert "✓ global step 93 (the log says: Train step 94) is in the slot" in result.out
    assert "digested and synced" in result.out
    assert "setup --undo" in result.out
    source = trees.checkpoint(run, 93)
    for path in source.iterdir():
        assert (run / "default/recover_checkpoint" / path.name).read_bytes() == path.read_bytes()
    (kept,) = (run.parent / ".ckptstore/trial0").glob("old-*/default")
    assert {path.name for path in kept.iterdir()} == old
    assert cli("verify", "--slot").code == 0


@pytest.mark.parametrize("words", [["--areal-version", "0.3.4", "--world-size", 2], ["--as-is"]])
def test_setup_undo_brings_the_old_slot_back(cli: Cli, run: Path, words: list[object]) -> None:
    before = commands.snapshot(run)
    assert cli("setup", "--step", 93, *words).code == 0
    assert "would swap back" in cli("setup", "--undo", "--dry-run").out
    result = cli("setup", "--undo")
    assert result.code == 0, result.err
    after = commands.snapshot(run)
    assert {name: one[3] for name, one in after.items()} == {name: one[3] for name, one in before.items()}
    assert cli("setup", "--undo", "--step", 5).code == 2


def test_undo_without_anything_to_undo(cli: Cli, run: Path) -> None:
    result = cli("setup", "--undo")
    assert result.code == 1
    assert "nothing to undo" in result.err


def test_setup_json_says_what_was_done(cli: Cli, run: Path) -> None:
    document = cli("setup", "--as-is", "--step", 93, "--json").json
    assert document["done"] is True
    assert document["copied_bytes"] == document["checkpoint"]["bytes"]
    assert document["method"] in ("exchange", "rename")
    assert sum(document["strategies"].values()) == document["copied_bytes"]
    manifest = parse((run / "default/recover_checkpoint" / MANIFEST_NAME).read_bytes())
    assert document["manifest_sha256"] == {"default": manifest.sha256}
    assert Path(document["kept_old_slot"]).is_dir()


def test_setup_twice_has_nothing_to_do(cli: Cli, run: Path) -> None:
    cli("setup", "--as-is", "--step", 93)
    before = commands.snapshot(run)
    result = cli("setup", "--as-is", "--step", 93)
    assert result.code == 0
    assert "nothing to do: the slot already holds step 93, every digest verified" in result.out
    assert commands.snapshot(run) == before


def test_setup_skips_damage_with_its_reason(cli: Cli, tmp_path: Path) -> None:
    run = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46, 93, 140, 187], sharded=True)
    trees.set_age(tmp_path / "logs", 3600)
    assert cli("seal", "--all").code == 0
    trees.bitflip(trees.checkpoint(run, 187) / "model-00001-of-00003.safetensors")
    trees.remove_shard(trees.checkpoint(run, 140))
    trees.set_age(run / "default", 3600, deep=False)
    result = cli("setup", "--as-is")
    assert result.code == 0, result.err
    assert "global step 93 (the log says: Train step 94) is in the slot" in result.out
    assert "✗ step 187: " in result.out
    assert "found while copying" in result.out
    assert "◐ step 140: default/model-00002-of-00003.safetensors: " in result.out
    assert "2 newer ones skipped" in result.out


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["--before-step", 140], 93),
        (["--max-step", 140], 140),
        (["--log-step", 47], 46),
        (["--step", 46], 46),
        (["--checkpoint-path", "{93}"], 93),
    ],
)
def test_setup_selection(cli: Cli, run: Path, words: list[object], step: int) -> None:
    words = [str(word).replace("{93}", str(trees.checkpoint(run, 93))) for word in words]
    assert cli("setup", "--dry-run", "--as-is", "--prefer", "newest", *words, "--json").json["checkpoint"]["step"] == step


@pytest.mark.parametrize(
    "words",
    [
        ["--step", 46, "--log-step", 47],
        ["--log-step", 0],
        ["--step", 46, "--before-step", 93],
        ["--step", 46, "--checkpoint-path", "/x"],
        ["46"],
        ["--replace"],
        ["--prefer", "oldest"],
    ],
)
def test_setup_usage(cli: Cli, run: Path, words: list[object]) -> None:
    before = commands.snapshot(run)
    assert cli("setup", *words).code == 2
    assert commands.snapshot(run) == before


def test_setup_with_nothing_before_the_bound(cli: Cli, run: Path) -> None:
    result = cli("setup", "--before-step", 20)
    assert result.code == 4
    assert "before step 20" in result.err
    assert "saver.freq_steps=20 (or less)" in flat(result.err)
    assert cli("setup", "--before-step", 20, "--json").json["exit_code"] == 4


def test_setup_of_a_damaged_one_by_name(cli: Cli, run: Path) -> None:
    result = cli("setup", "--step", 187)
    assert result.code == 3
    assert "step 187 is PARTIAL" in result.err
    assert "Without --step" in result.err


def test_setup_refuses_while_the_trainer_runs(cli: Cli, run: Path) -> None:
    (run / "default/recover_checkpoint/config.json").touch()
    before = commands.snapshot(run)
    result = cli("setup", "--as-is", "--step", 93)
    assert result.code == 1
    assert "the trainer seems to be running" in result.err
    assert "--force" in result.err
    assert commands.snapshot(run) == before
    dry = cli("setup", "--as-is", "--step", 93, "--dry-run")
    assert dry.code == 1
    assert "refused: the trainer seems to be running" in dry.out
    assert cli("setup", "--as-is", "--step", 93, "--dry-run", "--json").json["refusals"]
    assert cli("setup", "--as-is", "--step", 93, "--force").code == 0


def test_another_slot(cli: Cli, run: Path, tmp_path: Path) -> None:
    before = commands.snapshot(run / "default")
    result = cli("setup", "--step", 93, "--recover-dir", tmp_path / "elsewhere")
    assert result.code == 0, result.err
    assert (tmp_path / "elsewhere/config.json").exists()
    assert commands.snapshot(run / "default") == before


def test_too_little_room_says_what_could_go(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from ckptstore import room

    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    before = commands.snapshot(run)
    for words in ((), ("--dry-run",)):
        result = cli("setup", "--as-is", "--step", 93, *words)
        assert result.code == 1
        assert "are free on" in result.err
        assert "--replace" in result.err
    would = cli("setup", "--as-is", "--step", 93, "--dry-run", "--json")
    assert would.code == 1
    assert "are free on" in json.loads(would.out)["refusals"][0]
    assert cli("resume", "--as-is", "--step", 93, "--plan").code == 1
    assert commands.snapshot(run) == before


def test_a_second_setup_shows_the_first_ones_progress(cli: Cli, run: Path) -> None:
    side = run.parent / ".ckptstore/trial0"
    side.mkdir(parents=True)
    with RunLock(str(side), "setup of step 140") as lock:
        lock.update("copying default", 3_000_000_000, 6_000_000_000)
        lock._held.write()
        result = cli("setup", "--as-is", "--step", 93)
        assert "copying default, 3.00 of 6.00 GB (50%)" in cli("list").err
    assert result.code == 1
    assert "another ckptstore is at work on this run" in result.err
    assert "copying default, 3.00 of 6.00 GB (50%)" in flat(result.err)


# --- an interrupted commit ----------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A setup that was killed right after its journal was written."""

    class Killed(BaseException):
        pass

    def die(side: str, journal: Journal) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(commit, "_finish", die)
        with pytest.raises(Killed):
            cli("setup", "--as-is", "--step", 93)
    return run


@pytest.mark.parametrize("words", [[], ["setup", "--dry-run"], ["resume", "--plan"], ["seal", "--all", "--dry-run"]])
def test_commands_that_change_nothing_leave_it_and_say_so(cli: Cli, interrupted: Path, words: list[object]) -> None:
    before = commands.snapshot(interrupted.parent)
    result = cli(*words)
    assert result.code == 1
    assert "interrupted while it replaced the slot" in flat(result.err)
    assert "`ckptstore list` finishes it" in flat(result.err)
    assert commands.snapshot(interrupted.parent) == before


@pytest.mark.parametrize("words", [["list"], ["show", 46], ["verify", "--slot"]])
def test_any_other_command_finishes_it(cli: Cli, interrupted: Path, words: list[object]) -> None:
    result = cli(*words)
    assert result.code == 0, result.err
    assert "was finished" in result.err
    assert parse((interrupted / "default/recover_checkpoint" / MANIFEST_NAME).read_bytes()).step == 93


# --- clean --------------------------------------------------------------------------------------------------------


def test_clean_removes_stages_and_old_slots_only_when_told(cli: Cli, run: Path) -> None:
    cli("setup", "--as-is", "--step", 93)
    side = run.parent / ".ckptstore/trial0"
    (side / "stage-dead/default").mkdir(parents=True)
    (side / "stage-dead/default/half").write_bytes(b"x" * 1000)
    before = commands.snapshot(run.parent)
    assert "would be removed" in cli("clean", "--dry-run").out
    assert commands.snapshot(run.parent) == before
    (removed,) = cli("clean", "--json").json["removed"]
    assert removed == {"name": "stage-dead", "bytes": 1000}
    assert len(list(side.glob("old-*"))) == 1
    assert "nothing to remove" in cli("clean").out
    assert "removed 1" in cli("clean", "--old-slots").out
    assert list(side.glob("old-*")) == []
    assert cli("verify", "--slot").code == 0


# --- errors and exit codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list", "-e", "unknown"], 1),
        (["show", 5], 1),
        (["list", "--nonsense"], 2),
        (["nonsense"], 2),
        (["list", "x"], 2),
        (["verify", 187], 3),
        (["setup", "--before-step", 3], 4),
    ],
)
def test_exit_codes_and_errors_as_json(cli: Cli, run: Path, words: list[object], code: int) -> None:
    result = cli(*words)
    assert result.code == code
    if words[0] != "verify":  # damage is its result, not its error
        assert result.err.startswith("error: ")
        assert "  try:  " in result.err
        document = cli(*words, "--json").json
        assert sorted(document) == ["error", "exit_code", "facts", "hint"]
        assert document["exit_code"] == code
        assert flat(document["error"]) in flat(result.err)


def test_several_runs_are_listed_with_exit_2(cli: Cli, run: Path, tmp_path: Path) -> None:
    trees.make_run(tmp_path, experiment=EXPERIMENT, trial="trial1", steps=[46])
    result = cli("list")
    assert result.code == 2
    assert f"  {EXPERIMENT}/trial1  (newest step 46" in result.err
    assert f"  {EXPERIMENT}/trial0  (newest step 187" in result.err
    assert len(cli("list", "--json").json["facts"]) == 2


def test_a_near_verb_is_offered(cli: Cli) -> None:
    assert "did you mean 'setup'?" in cli("stup").err


@pytest.mark.parametrize("verb", ["", *cli_module.VERBS])
def test_every_verb_has_help_with_its_options_in_groups(cli: Cli, verb: str) -> None:
    result = cli(*filter(None, [verb]), "--help")
    assert result.code == 0
    if verb:
        assert result.out.index("Options:") < result.out.index("Where the run is:")
        assert "[KEY=VALUE]..." not in result.out.partition("Options:")[2]
    else:
        assert result.out.index("After a crash:") < result.out.index("Commands:")
        assert [result.out.index(f"ckptstore {name}") for name in ("list", "setup", "resume")]
        assert "3 damage found" in result.out


def test_version(cli: Cli) -> None:
    assert ckptstore.__version__ in cli("--version").out


def test_warnings_do_not_touch_stdout(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "file_system", lambda path: "overlay")
    result = cli("list", "--json")
    assert result.json["checkpoints"]
    assert "container's own disk" in flat(result.err)


def test_status_marks_and_sizes() -> None:
    assert {render.MARKS[status] for status in Status} == {"●", "○", "◐", "✗"}
    assert [size(n) for n in (0, 999, 1000, 15_400_000, 3.1e9, 2e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "15.4 MB",
        "3.1 GB",
        "2.00 TB",
    ]
    assert [render.age(n) for n in (5, 119, 600, 7200, 90_000, 400_000, -5)] == [
        "5 s", "119 s", "10 min", "2 h", "25 h", "5 d", "in the future",
    ]  # fmt: skip


# --- what a bare environment sees ---------------------------------------------------------------------------------


def test_import_is_lazy_and_all_names_are_there() -> None:
    code = (
        "import sys, ckptstore\n"
        "assert not [name for name in sys.modules if name.startswith('ckptstore.')], 'import is not cheap'\n"
        "for name in ckptstore.__all__: getattr(ckptstore, name)\n"
        "assert set(ckptstore.__all__) <= set(dir(ckptstore))\n"
        "try: ckptstore.nonsense\n"
        "except AttributeError: print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_list_imports_neither_torch_nor_clients(run: Path) -> None:
    code = (
        "import sys; from ckptstore.cli import run; code = run(['list'])\n"
        "heavy = {'torch', 'numpy', 'obstore', 'fsspec', 'rich', 'safetensors'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)"
    )
    env = commands.environment(CKPTSTORE_FILEROOT=os.environ["CKPTSTORE_FILEROOT"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.stderr.splitlines()[-1] == "0 []"


def test_as_a_module_without_a_terminal_there_is_no_colour(run: Path) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=os.environ["CKPTSTORE_FILEROOT"], TERM="xterm-256color")
    result = commands.spawn("list", env=env)
    assert result.code == 0
    assert commands.ESCAPE not in result.out + result.err
    assert commands.ESCAPE in commands.spawn("list", env={**env, "FORCE_COLOR": "1"}).out


def test_a_terminal_without_utf8_does_not_end_it(run: Path) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=os.environ["CKPTSTORE_FILEROOT"], PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    result = commands.spawn("list", env=env, encoding="latin-1")
    assert result.code == 0
    assert "? COMPLETE" in result.out


def test_a_reader_that_goes_away_is_no_traceback(run: Path) -> None:
    env = commands.environment(CKPTSTORE_FILEROOT=os.environ["CKPTSTORE_FILEROOT"])
    pipe = f"{sys.executable} -m ckptstore.recover list --json | head -c 1"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False, env=env)
    assert (done.stdout, done.stderr) == ("{", "")


def test_a_pod_user_without_an_account(run: Path, tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody without an account")
    for parent in [tmp_path, *tmp_path.parents]:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    # All imported before, since somebody else may not read this python.
    code = (
        "import os, yaml, ckptstore.cli.list; from ckptstore.cli import main\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321); main()"
    )
    env = {"PATH": os.environ["PATH"], "CKPTSTORE_FILEROOT": str(tmp_path), "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code, "list", "--json"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["user"] == "alice"
    assert "the run is user alice's, and you are 54321" in flat(done.stderr)


@pytest.mark.parametrize(("count", "seconds", "text"), [(300e6, 0.1, " at 3.00 GB/s"), (1000, 0.1, ""), (300e6, 0, "")])
def test_a_rate_is_told_only_where_it_means_something(count: float, seconds: float, text: str) -> None:
    assert render.rate(count, seconds) == text


def test_a_slot_that_only_lacks_its_recover_info(cli: Cli, run: Path) -> None:
    """The weights are there already; what is made is the step counter."""
    trainer = ("--areal-version", "0.3.4", "--world-size", 2)
    assert cli("setup", "--step", 93, *trainer).code == 0
    for path in (run / "recover_info").iterdir():
        path.unlink()
    result = cli("setup", "--step", 93, *trainer)
    assert result.code == 0, result.err
    assert json.loads((run / "recover_info/step_info.json").read_text())["global_step"] == 93
    assert "recover_info/ was made for it" in result.out or "digested and synced" in result.out


# --- what somebody meets on a bad day -----------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_obstacle(run: Path, closed: str) -> None:
    """A supervisor starts it so. No file that we open may become stdin, stdout or stderr of what we start."""
    command = f"{sys.executable} -m ckptstore.recover setup --as-is --force --step 93 --run {run} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=commands.environment())
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert (run / "default/recover_checkpoint/ckptstore.manifest.json").exists()


@pytest.mark.parametrize("words", ["list", "list --json", "show 7", "show 7 --json", "setup --dry-run --step 93"])
def test_output_to_a_full_disk_is_an_error_in_words(run: Path, words: str) -> None:
    env = commands.environment()
    for streams in (">/dev/full", ">/dev/full 2>/dev/full"):
        command = f"{sys.executable} -m ckptstore.recover {words} --run {run} {streams}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        if "2>" not in streams and words.partition(" ")[0] != "show":
            assert "writing the output: No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", 93], "--max-step 93"),
        (["setup", 93], "--step 93"),
        (["doctor", 93], "`ckptstore doctor --help`"),
        (["setup", "x"], "`ckptstore setup --help`"),
        (["setup", "--step"], "`ckptstore setup --help`"),
        (["--step"], "`ckptstore --help`"),
    ],
)
def test_a_usage_error_names_an_option_that_the_verb_has(cli: Cli, run: Path, words: list[object], says: str) -> None:
    result = cli(*words)
    assert (result.code, says in flat(result.err)) == (2, True), result.err


def test_a_setting_is_named_only_where_nothing_was_saved_in_time(cli: Cli, run: Path) -> None:
    result = cli("setup", "--step", 50)
    assert result.code == 4
    assert "whole are 46, 93, 140" in flat(result.err)
    assert "freq_steps" not in result.err


def test_a_folder_that_is_no_checkpoint_is_called_by_its_name(cli: Cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("hello")
    result = cli("setup", "--checkpoint-path", tmp_path / "notes")
    assert result.code == 3
    assert f"error: {tmp_path}/notes is PARTIAL" in flat(result.err)
    assert "step -1" not in result.err
    assert "Without --checkpoint-path" in result.err
    assert "ckptstore show STEP" in cli("setup", "--checkpoint-path", tmp_path / "gone").err


def test_what_cannot_be_resumed_from_is_not_called_whole(cli: Cli, tmp_path: Path) -> None:
    """A torn save at the end is usual: the one that looks whole in a listing is the one to hear about."""
    run = trees.make_run(tmp_path, experiment=EXPERIMENT, steps=[46, 93])
    trees.empty_epoch(run, 140)
    for step in (46, 93):
        path = trees.checkpoint(run, step) / "model.safetensors"
        path.write_bytes(b"\xff" * path.stat().st_size)
    trees.set_age(run, 3600)
    result = cli("setup")
    assert result.code == 4
    assert "(step 93: default/model.safetensors" in flat(result.err)
    assert "whole are none" in flat(result.err)
    assert "ago" not in cli("show", 140).out, "it holds no file that could tell when"


def test_verify_says_each_thing_once(cli: Cli, run: Path) -> None:
    (trees.checkpoint(run, 187) / "model.safetensors.index.json").unlink()
    result = cli("verify", 187)
    lines = [line for line in result.out.splitlines() if line.startswith("  ·")]
    assert sum("index.json" in line for line in lines) == 1, lines
    assert "every byte can be read" not in flat(result.out), "of the one that is not whole"
    assert "every byte can be read" in flat(cli("verify", 140).out)
    (trees.empty_epoch(run, 281) / "config.json").write_text("{}")
    assert "1 file, 2 B" in cli("verify", 281).out


def test_a_save_in_progress_is_told_from_a_torn_one(cli: Cli, run: Path) -> None:
    assert "may still be being saved" not in cli("list").out
    (trees.empty_epoch(run, 281) / "config.json").write_text("{}")
    assert flat(cli("list").out).count("may still be being saved") == 1


def test_yaml_errors_and_gaps_name_the_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPTSTORE_FILEROOT")
    monkeypatch.chdir(tmp_path)
    broken, empty = tmp_path / "broken.yaml", tmp_path / "empty.yaml"
    broken.write_text("a: [b")
    empty.write_text("experiment_name: x\n")
    error = flat(cli("list", "--config", broken).err)
    assert "line 1, column 4" in error
    assert "byte string" not in error
    assert f"{empty} has no cluster.fileroot" in flat(cli("list", "--config", empty).err)


def test_a_table_fits_a_common_terminal(run: Path) -> None:
    """A step's lines must not be broken, also with what health adds."""
    log = run.parent / "m.jsonl"
    log.write_text("".join(json.dumps({"step": n, "ppo_actor/task_reward/avg": 0.7}) + "\n" for n in range(200)))
    words = [sys.executable, "-m", "ckptstore.recover"]
    assert commands.spawn("status", "--run", run, "--import", log, "--axis", "global").code == 0
    with commands.Terminal([*words, "list", "--run", run], columns=80) as terminal:
        terminal.finish()
    table = [line for line in commands.plain(terminal.shown).splitlines() if "COMPLETE" in line and "good" in line]
    assert len(table) == 3
    assert max(map(len, table)) <= 80


def test_what_the_doctor_finds_stands_below_itself(run: Path) -> None:
    words = [sys.executable, "-m", "ckptstore.recover", "doctor", "--run", run]
    with commands.Terminal(words, columns=80) as terminal:
        terminal.finish()
    lines = commands.plain(terminal.shown).splitlines()
    found = [line for line in lines[lines.index("") : -1] if line]
    assert any(line.startswith(" " * 17) for line in found), "some finding is longer than a line"
    for line in found:
        assert line[2] in "✓!✗" or line.startswith(" " * 17), line


def test_sizes_stand_below_each_other_whatever_the_status(cli: Cli, run: Path) -> None:
    trees.remove_shard(trees.checkpoint(run, 93))
    assert cli("seal", "46").code == 0
    lines = [line for line in cli("verify", "46", "93").out.splitlines() if " files, " in line]
    assert len({line.index(" files, ") for line in lines}) == 1, lines


def test_an_adopted_step_that_is_passed_over_is_told_from_an_export(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert cli("adopt").code == 0
    log = tmp_path / "m.jsonl"
    log.write_text("".join(json.dumps({"step": n, "ppo_actor/task_reward/avg": 0.7 * (n < 120)}) + "\n" for n in range(200)))
    assert cli("status", "--import", log, "--axis", "global").code == 0
    out = cli("setup", "--dry-run").out
    assert "step 140: health bad" in out
    assert "step 140 (adopted): health bad" in out
    assert "step 140 in the slot: health bad" in out


@pytest.mark.root
def test_a_dry_run_says_that_nothing_can_be_written(cli: Cli, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "small", size_mib=16) as at:
        run = trees.make_run(at, experiment=EXPERIMENT, steps=[46])
        trees.set_age(at, 3600)
        subprocess.run(["mount", "-o", "remount,ro", str(at)], check=True)
        result = cli("setup", "--run", run, "--as-is", "--dry-run")
        assert result.code == 1
        assert "is mounted read-only" in flat(result.err)
        assert "mount it for writing" in flat(cli("setup", "--run", run, "--as-is").err)
        assert "mount it for writing" in flat(cli("status", "--run", run, "--pin", 46).err)
        assert "trial0 is mounted read-only: the trainer's next save fails there" in flat(cli("doctor", "--run", run).out)


def test_a_linked_trial_is_one_run_by_all_its_names(cli: Cli, run: Path, tmp_path: Path) -> None:
    """One lock, one journal, one undo, whatever it is called; and links are named, since they are not followed to find it."""
    real = tmp_path / "nvme/elsewhere"
    real.parent.mkdir()
    run.rename(real)
    run.symlink_to(real)
    assert cli("setup", "--as-is", "--step", 93, "--run", run).code == 0
    assert (real.parent / ".ckptstore/elsewhere/lock").exists()
    assert not (run.parent / ".ckptstore").exists()
    assert cli("setup", "--undo", "--force", "--run", real).code == 0
    missing = cli("list")
    assert missing.code == 1
    assert f"{run} is a link" in flat(missing.err)


def test_a_slot_from_the_future_reads_well(cli: Cli, run: Path) -> None:
    trees.set_age(run, -7200)
    assert "saved in the future, COMPLETE" in flat(cli("list").out)


def test_list_sees_that_the_newest_export_is_torn_within_its_files(tmp_path, monkeypatch, capfd):
    """All names are there, and no size is 0: what a crash leaves of a save. Only the newest are looked into."""
    commands.isolate(monkeypatch, tmp_path)
    run = trees.make_run(tmp_path, steps=(46, 93, 140, 187), logs=False)
    for step in (46, 140, 187):
        trees.truncate(trees.checkpoint(run, step) / "model.safetensors")
    said = commands.invoke(capfd, "list", "--run", run, "--json").json
    assert [one["status"] for one in said["checkpoints"]] == ["COMPLETE", "COMPLETE", "PARTIAL", "PARTIAL"]
    said = commands.invoke(capfd, "list", "--run", run)
    assert "step 187 is" in said.out
    assert "(the log says: Train step 94) is the newest whole one listed" in said.out
    latest = commands.invoke(capfd, "list", "--run", run, "--latest", "--json").json
    assert [one["step"] for one in latest["checkpoints"]] == [93]


def test_list_on_a_medium_that_fails(tmp_path, monkeypatch, capfd):
    """What cannot be looked into is named, and the rest is listed."""
    commands.isolate(monkeypatch, tmp_path)
    run = trees.make_run(tmp_path, steps=(46, 93), logs=False)

    def failing(*_: object) -> None:
        raise StorageError("Input/output error", operation="read", path="x")

    monkeypatch.setattr("ckptstore.cli.list.verify", failing)
    said = commands.invoke(capfd, "list", "--run", run, "--json")
    assert said.code == 0
    assert [one["status"] for one in said.json["checkpoints"]] == ["PARTIAL", "PARTIAL"]
    assert "Input/output error" in said.json["checkpoints"][1]["parts"][0]["findings"][0]["problem"]
