"""The doctor: each thing that can be wrong is planted once, found under its name, and nothing else is changed."""

from __future__ import annotations

import json
import os
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckptstore import doctor, halt, probe
from ckptstore import journal as journals
from ckptstore import side as side_folders
from ckptstore.checks import Diagnosis, Severity
from ckptstore.cli import cli
from ckptstore.config import RunConfig, load
from ckptstore.frameworks.areal import resume_state, trainer_logs
from ckptstore.frameworks.areal.launch import Installation, find_installation
from ckptstore.frameworks.areal.layout import run_ref
from ckptstore.locate import current_user
from tests import trees

ME = current_user()
OLD = find_installation(version="0.4.1")
NEW = find_installation(version="1.0.4")
NONE = Installation("", "", "", "not found")
YAML = """
experiment_name: doctor-tests
trial_name: trial0
allocation_mode: sglang:d2p1t1+d2p1t1
cluster: {{fileroot: {fileroot}}}
saver: {{freq_epochs: 1, freq_steps: null, freq_secs: null}}
recover: {{mode: {mode}, freq_epochs: 1, freq_steps: null, freq_secs: null}}
evaluator: {{freq_epochs: 1}}
"""


@pytest.fixture(autouse=True)
def persistent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests run, their folder counts as a disk of its own."""
    monkeypatch.setattr(probe, "file_system", lambda path: "ext4")


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A healthy run of two ranks: exports, a DCP slot with its recover_info, a YAML."""
    trial = trees.make_run(tmp_path, user=ME, experiment="doctor-tests", steps=[46, 93], slot="dcp")
    trees.write_recover_info(trial, 93, world_size=2)
    trees.set_age(trial / "default/recover_checkpoint", 3700)
    trees.set_age(trial / "recover_info", 3650)
    write_yaml(tmp_path)
    log(trial, "Epoch 3/10 Step 1/47 Train step 95/470 done.")
    age(trial)
    return trial


def write_yaml(root: Path, mode: str = "auto", fileroot: str = "", more: str = "") -> Path:
    path = root / "run.yaml"
    path.write_text(YAML.format(fileroot=fileroot or root, mode=mode) + more)
    return path


def age(trial: Path) -> None:
    trees.set_age(trial.parents[3] / "logs", 3600)


def log(trial: Path, *lines: str, name: str = "main.log") -> Path:
    folder = Path(run_ref(str(trial)).logs)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    age(trial)
    return path


def look(trial: Path, *, installation: Installation = OLD, config: RunConfig | None = None, **options: int) -> list[Diagnosis]:
    if config is None:
        config = load(str(trial.parents[3] / "run.yaml"))
    return list(doctor.examine(run_ref(str(trial)), config=config, installation=installation, **options))


def named(diagnoses: list[Diagnosis], check: str) -> list[Diagnosis]:
    return [diagnosis for diagnosis in diagnoses if diagnosis.check == check]


def worst_of(diagnoses: list[Diagnosis], check: str) -> Diagnosis:
    """The worst of one check; a remedy is there whenever something is wrong."""
    found = max(named(diagnoses, check), key=lambda d: list(Severity).index(d.severity))
    assert bool(found.remedy) == (found.severity is not Severity.OK)
    return found


def test_a_healthy_run_has_nothing(trial: Path) -> None:
    before = snapshot(trial.parents[3])
    diagnoses = look(trial)
    assert [d for d in diagnoses if d.severity is not Severity.OK] == []
    assert doctor.exit_code(diagnoses) == 0
    assert {d.check for d in diagnoses} >= {
        "fileroot", "disk", "user", "permissions", "space", "clock", "pending", "running", "checkpoints", "slot", "ranks",
        "strays", "recover", "loss", "logs",
    }  # fmt: skip
    assert snapshot(trial.parents[3]) == before


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(root.rglob("*"))}


# --- disk ---------------------------------------------------------------------------------------------------------


def test_a_relative_fileroot(trial: Path) -> None:
    write_yaml(trial.parents[3], fileroot="./outputs/grpo")
    found = worst_of(look(trial), "fileroot")
    assert found.severity is Severity.BAD
    assert "./outputs/grpo" in found.found
    assert os.path.abspath("./outputs/grpo") in found.remedy


def test_a_run_that_lies_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "exp" / "trial"
    run.mkdir(parents=True)
    found = list(doctor.examine(run_ref(str(run)), installation=NONE))
    assert worst_of(found, "fileroot").severity is Severity.WARN


@pytest.mark.parametrize("kind", ["overlay", "tmpfs"])
def test_a_disk_that_goes_with_the_container(trial: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(probe, "file_system", lambda path: kind)
    found = worst_of(look(trial), "disk")
    assert found.severity is Severity.BAD
    assert kind in found.found


def test_another_users_run(tmp_path: Path) -> None:
    trial = trees.make_run(tmp_path, user="somebody-else", experiment="doctor-tests", steps=[46])
    write_yaml(tmp_path)
    assert worst_of(look(trial), "user").severity is Severity.BAD


def test_a_twin_of_another_user(trial: Path) -> None:
    trees.make_run(trial.parents[3], user="somebody-else", experiment="doctor-tests", steps=[46])
    found = worst_of(look(trial), "user")
    assert found.severity is Severity.WARN
    assert "somebody-else" in found.found


def test_a_file_that_may_not_be_written(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = str(trial / "default/recover_checkpoint/.metadata")  # root may write all: the answer is planted
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != denied and access(path, mode))
    found = worst_of(look(trial), "permissions")
    assert found.severity is Severity.BAD
    assert denied in found.found


Statvfs = namedtuple("Statvfs", "f_bavail f_frsize f_files f_favail")


@pytest.mark.parametrize(
    ("free_saves", "inodes", "severity"),
    [(100, 10_000, Severity.OK), (3, 10_000, Severity.WARN), (1, 10_000, Severity.BAD), (100, 5, Severity.BAD)],
)
def test_space(trial: Path, monkeypatch: pytest.MonkeyPatch, free_saves: int, inodes: int, severity: Severity) -> None:
    save = sum(path.stat().st_size for path in trees.checkpoint(trial, 93).iterdir())
    slot = sum(path.stat().st_size for path in (trial / "default/recover_checkpoint").iterdir())
    free = max(slot, save) + free_saves * save - 1
    monkeypatch.setattr(os, "statvfs", lambda path: Statvfs(free, 1, 100_000, inodes))
    assert worst_of(look(trial, saves=3), "space").severity is severity


def test_a_file_from_the_future(trial: Path) -> None:
    file = trees.checkpoint(trial, 93) / "config.json"
    os.utime(file, (time.time() + 600, time.time() + 600))
    found = worst_of(look(trial), "clock")
    assert found.severity is Severity.WARN
    assert "config.json" in found.found


# --- the run ------------------------------------------------------------------------------------------------------


def test_a_tripped_breaker(trial: Path) -> None:
    side = side_of(trial)
    halt.write_first(side, halt.Trip(run=str(trial), step=93, saw="reward is 0 for 50 steps", command="ckptstore resume"))
    found = worst_of(look(trial), "halted")
    assert found.severity is Severity.BAD
    assert "reward is 0" in found.found


def side_of(trial: Path) -> str:
    side = side_folders.side_folder(str(trial), str(trial / "default/recover_checkpoint"))
    side_folders.make_side(side)
    return side


def test_an_interrupted_setup(trial: Path) -> None:
    side = side_of(trial)
    journal = {
        "action": "setup",
        "step": 46,
        "method": "exchange",
        "created_at": "",
        "moves": [],
        "format": "ckptstore.journal",
        "version": 1,
    }
    Path(side, "journal.json").write_text(json.dumps(journal))
    assert journals.pending(side) is not None
    found = worst_of(look(trial), "pending")
    assert found.severity is Severity.BAD
    assert Path(side, "journal.json").exists(), "looked at, not finished"


def test_a_journal_that_is_not_one(trial: Path) -> None:
    Path(side_of(trial), "journal.json").write_text("{")
    assert worst_of(look(trial), "pending").severity is Severity.BAD


def test_a_trainer_at_work(trial: Path) -> None:
    (trees.checkpoint(trial, 93) / "config.json").touch()
    assert worst_of(look(trial), "running").severity is Severity.WARN


def test_a_save_cut_short(trial: Path) -> None:
    trees.empty_epoch(trial, 140)
    diagnoses = look(trial)
    found = worst_of(diagnoses, "checkpoints")
    assert found.severity is Severity.WARN
    assert "step 140" in found.found
    assert doctor.exit_code(diagnoses) == 0


def test_damage_is_exit_code_three(trial: Path) -> None:
    file = trees.checkpoint(trial, 93) / "model.safetensors"
    from ckptstore.store import CheckpointStore

    CheckpointStore(trial).seal(93)
    times = file.stat()
    trees.truncate(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    diagnoses = look(trial)
    assert worst_of(diagnoses, "checkpoints").damage
    assert doctor.exit_code(diagnoses) == 3


def test_nothing_whole(trial: Path) -> None:
    for step in (46, 93):
        (trees.checkpoint(trial, step) / "config.json").unlink()
    assert worst_of(look(trial), "checkpoints").severity is Severity.BAD


def no_info(trial: Path) -> None:
    for path in (trial / "recover_info").iterdir():
        path.unlink()


def no_slot(trial: Path) -> None:
    for path in (trial / "default/recover_checkpoint").iterdir():
        path.unlink()


def torn_slot(trial: Path) -> None:
    os.utime(trial / "default/recover_checkpoint/__0_0.distcp", (time.time() - 600, time.time() - 600))


def broken_info(trial: Path) -> None:
    trees.truncate(trial / "recover_info/step_info.json", 5)


def blocked_info(trial: Path) -> None:
    for name, data in resume_state.blocking().items():
        (trial / "recover_info" / name).write_bytes(data)


def no_metadata(trial: Path) -> None:
    (trial / "default/recover_checkpoint/.metadata").unlink()


@pytest.mark.parametrize(
    ("plant", "text"),
    [
        (no_info, "no recover_info"),
        (no_slot, "slot is empty"),
        (torn_slot, "cut short"),
        (broken_info, "step_info.json"),
        (blocked_info, "control"),
        (no_metadata, ".metadata"),
    ],
)
def test_a_slot_that_does_not_resume(trial: Path, plant: Callable[[Path], None], text: str) -> None:
    plant(trial)
    found = worst_of(look(trial), "slot")
    assert found.severity is Severity.BAD
    assert text in found.found


def test_a_slot_of_another_era(trial: Path) -> None:
    found = worst_of(look(trial, installation=find_installation(version="0.3.4")), "slot")
    assert found.severity is Severity.BAD
    assert "starts at step 0" in found.found
    assert worst_of(look(trial, installation=NONE), "slot").severity is Severity.OK


def test_a_slot_without_optimizer_state(trial: Path) -> None:
    no_slot(trial)
    trees.write_dcp_slot(trial / "default/recover_checkpoint", optimizer=False)
    trees.set_age(trial / "default/recover_checkpoint", 3700)
    assert "no optimizer state" in worst_of(look(trial, installation=NEW), "slot").found
    write_yaml(trial.parents[3], more="\n")
    config = load(str(trial.parents[3] / "run.yaml"), ["recover.no_load_optim=true"])
    assert worst_of(look(trial, installation=NEW, config=config), "slot").severity is Severity.OK
    assert worst_of(look(trial, installation=OLD, config=config), "slot").severity is Severity.BAD


def test_another_number_of_ranks(trial: Path) -> None:
    found = worst_of(look(trial, world_size=4), "ranks")
    assert found.severity is Severity.BAD
    assert "of 2 processes" in found.found


def test_optimizer_shards_of_another_number_of_ranks(trial: Path) -> None:
    no_slot(trial)
    trees.write_era_a_slot(trial / "default/recover_checkpoint", world_size=8)
    found = worst_of(look(trial), "ranks")
    assert found.severity is Severity.BAD
    assert "of 8 processes" in found.found


def test_an_unknown_number_of_ranks(trial: Path) -> None:
    config = load(str(trial.parents[3] / "run.yaml"), ["allocation_mode=sglang:d2+megatron:t2p2"])
    assert worst_of(look(trial, config=config), "ranks").severity is Severity.WARN


def test_strays(trial: Path) -> None:
    trees.stray_slot(trial)
    (trial / "backup").mkdir()
    trees.set_age(trial, 3600)
    found = " ".join(d.found for d in named(look(trial), "strays"))
    assert "backup" in found
    assert "recover_checkpoint" in found


def test_leftovers(trial: Path) -> None:
    side = Path(side_of(trial))
    trees.write_model(side / "stage-00ff" / "default")
    trees.write_model(side / "old-20260101T000000Z-00ff" / "default")
    found = named(look(trial), "leftovers")
    assert [d.severity for d in found] == [Severity.WARN, Severity.OK]
    assert "clean" in found[0].remedy


# --- settings and logs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "installation", "severity"),
    [
        ("auto", OLD, Severity.OK),
        ("auto", NEW, Severity.OK),
        ("disabled", OLD, Severity.WARN),
        ("off", NEW, Severity.WARN),
        ('"on"', NEW, Severity.OK),
        ("on", NEW, Severity.OK),
        ("on", OLD, Severity.BAD),
        ("fault", OLD, Severity.OK),
        ("fault", NEW, Severity.BAD),
        ("fault", NONE, Severity.OK),
    ],
)
def test_recover_mode(trial: Path, mode: str, installation: Installation, severity: Severity) -> None:
    write_yaml(trial.parents[3], mode=mode)
    assert worst_of(look(trial, installation=installation), "recover").severity is severity


def test_recover_without_a_frequency(trial: Path) -> None:
    config = load(str(trial.parents[3] / "run.yaml"), ["recover.freq_epochs=null"])
    found = worst_of(look(trial, config=config), "recover")
    assert found.severity is Severity.BAD
    assert "never written" in found.found


def test_no_yaml(trial: Path) -> None:
    (Path(run_ref(str(trial)).logs) / "config.yaml").unlink()
    found = list(doctor.examine(run_ref(str(trial)), installation=OLD))
    assert worst_of(found, "recover").severity is Severity.WARN


def test_the_yaml_of_the_logs_is_taken(trial: Path) -> None:
    found = list(doctor.examine(run_ref(str(trial)), installation=OLD))
    assert "mode disabled" in worst_of(found, "recover").found


def test_a_stored_frequency_beats_the_yaml(trial: Path) -> None:
    config = load(str(trial.parents[3] / "run.yaml"), ["recover.freq_steps=5"])
    found = worst_of(look(trial, config=config), "recover")
    assert found.severity is Severity.WARN
    assert "--write-frequencies" in found.remedy


@pytest.mark.parametrize(
    ("overrides", "severity", "text"),
    [
        ([], Severity.OK, "47 steps or 0.8 h"),  # a minute a step
        (["recover.freq_steps=5"], Severity.OK, "5 steps or 0.1 h"),
        (["recover.mode=disabled"], Severity.OK, "and the optimizer's state"),
        (["recover.freq_epochs=3", "saver.freq_epochs=5"], Severity.WARN, "141 steps or 2.4 h"),
        (["recover.freq_epochs=null", "saver.freq_epochs=null", "saver.freq_secs=900"], Severity.OK, "15 steps or 0.2 h"),
        (["recover.freq_epochs=null", "saver.freq_epochs=null"], Severity.BAD, "the whole run"),
    ],
)
def test_what_a_crash_costs(trial: Path, overrides: list[str], severity: Severity, text: str) -> None:
    found = worst_of(look(trial, config=load(str(trial.parents[3] / "run.yaml"), overrides)), "loss")
    assert found.severity is severity
    assert text in found.found


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("areal WARNING: This should not be a resumed experiment!", "fresh-start"),
        ("torch.distributed.checkpoint.api.CheckpointException: CheckpointException ranks:dict_keys([0])", "slot-unreadable"),
        ("RuntimeError: Missing key in checkpoint state_dict: dcp.optim.state.x.step", "slot-unreadable"),
        ("OSError: [Errno 28] No space left on device", "no-space"),
        ("OSError: [Errno 122] Disk quota exceeded", "no-space"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "gpu-memory"),
        ("launch.sh: line 3: 12345 Killed", "host-memory"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)", "nccl"),
        ("CUDA error: an illegal memory access was encountered", "cuda"),
        ("SGLangEngine WARNING: Request failed: Cannot connect to host 127.0.0.1:30000", "server"),
        ("PermissionError: [Errno 13] Permission denied: '/workspace'", "permission"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("ckptstore.errors.TrainingHalted: training is halted", "halted"),
    ],
)
def test_a_known_line(trial: Path, line: str, name: str) -> None:
    path = log(trial, "Train step 95/470 done.", f"\x1b[31m{line}\x1b[0m", "after")
    found = worst_of(look(trial), f"logs:{name}")
    assert found.severity is Severity.BAD
    assert str(path) in found.found
    assert line in found.found
    log(trial, line, "Train step 96/470 done.")
    later = worst_of(look(trial), f"logs:{name}")
    assert later.severity is (Severity.BAD if name == "fresh-start" else Severity.WARN)


def test_lines_that_are_no_trouble(trial: Path) -> None:
    log(trial, "INFO: 0 errors so far", "│ ppo_actor/error │ 0.0 │", "Train step 95/470 done.", "NCCL INFO comm init")
    assert {d.check for d in look(trial) if d.check.startswith("logs")} == {"logs"}


def test_the_last_error(trial: Path) -> None:
    path = log(
        trial, "x", "ValueError: first", "Traceback (most recent call last):", "  File y", "my.own.ModuleError: second", "bye"
    )
    found = worst_of(look(trial), "logs:error")
    assert found.severity is Severity.WARN
    assert str(path) in found.found
    assert "second" in found.found


def test_logs_of_workers_and_paths(trial: Path) -> None:
    log(trial, "Train step 95/470 done.")
    worker = Path(run_ref(str(trial)).logs) / "workers" / "rank0.log"
    worker.parent.mkdir()
    worker.write_text("CUDA out of memory\n")
    age(trial)
    diagnoses = look(trial)
    assert str(worker) in worst_of(diagnoses, "logs:gpu-memory").found
    (main,) = named(diagnoses, "logs")
    assert "Train step 95 (global step 94)" in main.found


def test_only_the_end_of_a_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_logs, "TAIL_BYTES", 100)
    (tmp_path / "main.log").write_text("CUDA out of memory\n" + "x" * 200 + "\nTrain step 7/9 done.\n")
    found = trainer_logs.read(str(tmp_path))
    assert found.known == []
    assert found.last_log_step == 7


# --- the command --------------------------------------------------------------------------------------------------


def test_an_unreadable_run_is_a_finding(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "statvfs", fail)
    found = worst_of(look(trial), "space")
    assert found.severity is Severity.BAD
    assert "Permission denied" in found.found


def call(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["doctor", *words], standalone_mode=False)
    assert result.exception is None, result.exception
    return result.return_value, result.output


def test_the_command(trial: Path) -> None:
    code, text = call("--run", str(trial), "--areal-version", "0.4.1", "--world-size", "2")
    assert code == 0
    assert "slot" in text
    code, text = call("--run", str(trial), "--areal-version", "0.3.4", "--quiet")
    assert code == 1
    assert "✗ slot" in text
    assert "✓" not in text


def test_the_commands_json(trial: Path) -> None:
    code, text = call("--run", str(trial), "--areal-version", "0.4.1", "--world-size", "4", "--json")
    document = json.loads(text)
    assert code == document["exit_code"] == 1
    assert document["worst"] == "bad"
    (ranks,) = [finding for finding in document["findings"] if finding["check"] == "ranks"]
    assert ranks["severity"] == "bad"
    assert ranks["remedy"]
    assert ranks["damage"] is False


def test_before_the_first_start(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    yaml = write_yaml(root, mode="disabled")
    code, text = call("--config", str(yaml), "--areal-version", "1.0.4", "--json")
    document = json.loads(text)
    assert code == 0
    assert document["run"]["path"] == str(root / "checkpoints" / ME / "doctor-tests" / "trial0")
    assert {finding["check"]: finding["severity"] for finding in document["findings"]}["recover"] == "warn"
    assert list(root.iterdir()) == [yaml], "nothing is created"
