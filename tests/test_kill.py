"""kill -9 of a setup in every phase of the commit: afterwards slot and recover_info are the old ones or the new ones, whole."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ckptstore import cli, recovery
from ckptstore.backends import open_backend
from ckptstore.choose import Selection
from ckptstore.plan import Options
from tests import trees
from tests.crashing import Tree, content, without_manifest

ROOT = Path(__file__).parent.parent
OLD_STEP, NEW_STEP = 93, 46
SLOT = "default/recover_checkpoint"
PHASES = ("start", "copy", "manifest", "journal", "publish", "set aside", "journal away")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose slot holds step 93 with optimizer state, and an export of step 46 with shards of 24 MB in all."""
    root = tmp_path_factory.mktemp("template")
    run = trees.make_run(root, steps=[NEW_STEP], slot="era_a", slot_step=OLD_STEP, recover_info=OLD_STEP, logs=False)
    for number in range(3):
        weights = trees.safetensors_bytes({f"extra.{number}.weight": ("F32", (2048, 1024))}, seed=number)
        (trees.checkpoint(run, NEW_STEP) / f"extra-{number}.safetensors").write_bytes(weights)
    trees.set_age(run, 3600)
    return run


def fresh_copy(template: Path, place: Path) -> Path:
    fileroot = template.parents[3]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(fileroot, place, symlinks=True)
    return place / template.relative_to(fileroot)


def child(run: Path, at: int, when: str, method: str) -> list[str]:
    return [sys.executable, "-m", "tests.kill_child", str(run), str(NEW_STEP), str(at), when, method]


def phase_of(details: list[str]) -> list[str]:
    """The phase of each operation of an uninterrupted setup."""
    copied = next(i for i, text in enumerate(details) if text.startswith("copy_files"))
    journal = next(i for i, text in enumerate(details) if text.startswith("rename") and text.endswith("/journal.json"))
    away = next(i for i, text in enumerate(details) if text.startswith("unlink") and text.endswith("/journal.json"))
    # The old slot is set aside after the last rename that puts something into the run.
    into_run = [
        i
        for i, text in enumerate(details)
        if i > journal and text.startswith("rename") and (f"/{SLOT}" in text or "/trial0/recover_info" in text)
    ]
    published = max(
        i for i in into_run if ".ckptstore" not in details[i].split()[-1] or details[i].startswith("rename_exchange")
    )
    phases = []
    for i in range(len(details)):
        if i < copied:
            phases.append("start")
        elif i == copied:
            phases.append("copy")
        elif i < journal:
            phases.append("manifest")
        elif i <= journal + 1:
            phases.append("journal")
        elif i <= published:
            phases.append("publish")
        elif i < away:
            phases.append("set aside")
        else:
            phases.append("journal away")
    return phases


def places(details: list[str], each: int, rng: random.Random) -> list[tuple[str, int, str]]:
    """(phase, operation, before or after): `each` of every phase, spread over its operations."""
    phases = phase_of(details)
    chosen = []
    for phase in PHASES:
        if phase == "copy":
            continue
        possible = [(phase, i + 1, when) for i, found in enumerate(phases) if found == phase for when in ("before", "after")]
        rng.shuffle(possible)
        chosen += [possible[i % len(possible)] for i in range(each)]
    return chosen


def judge(run: Path, old: Tree, new: Tree, trial_names: set[str]) -> str:
    """What lies there after the next command, found with code of its own: "old" or "new"; anything else fails."""
    assert cli.run(["list", "--run", str(run), "--json"]) == 0
    slot = without_manifest(content(run / SLOT))
    step = json.loads((run / "recover_info/step_info.json").read_text())["global_step"]
    saver = json.loads((run / "recover_info/saver_info.json").read_text())
    assert saver, "recover_info still blocks"
    assert (slot, step) in ((old, OLD_STEP), (new, NEW_STEP)), f"a mixture: step {step}, {len(slot)} files"
    assert {path.name for path in run.iterdir()} == trial_names, "something of ours is in the trial"
    assert not (run.parent / ".ckptstore" / run.name / "journal.json").exists()
    return "old" if slot == old else "new"


def campaign(template: Path, place: Path, method: str, each: int, capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    rng = random.Random(188)
    run = fresh_copy(template, place)
    old, trial_names = without_manifest(content(run / SLOT)), {path.name for path in run.iterdir()}
    started = time.monotonic()
    whole = subprocess.run(child(run, 0, "before", method), capture_output=True, text=True, cwd=ROOT, check=True)
    duration_s = time.monotonic() - started
    new = without_manifest(content(run / SLOT))
    assert new != old
    details = whole.stdout.splitlines()
    kills: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()

    def check(phase: str) -> None:
        kills[phase] += 1
        outcomes[judge(run, old, new, trial_names)] += 1
        recovery.setup(open_backend(run), Selection(step=NEW_STEP), Options(world_size=2))
        assert without_manifest(content(run / SLOT)) == new

    for phase, at, when in places(details, each, rng):
        run = fresh_copy(template, place)
        done = subprocess.run(child(run, at, when, method), capture_output=True, cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL, (phase, at, when, done.stderr[-500:])
        check(phase)
    while kills["copy"] < each:  # at random moments: while the engine's threads are at work
        run = fresh_copy(template, place)
        process = subprocess.Popen(child(run, 0, "before", method), stdout=subprocess.DEVNULL, cwd=ROOT)
        try:
            process.wait(rng.uniform(0.5, 1.0) * duration_s)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() == -signal.SIGKILL:
            check("copy")
    capsys.readouterr()
    with capsys.disabled():
        print(f"\n{method}: kills {dict(kills)}, slot afterwards {dict(outcomes)}")
    assert outcomes["old"]
    assert outcomes["new"]
    return kills


@pytest.mark.parametrize("method", ["exchange", "rename"])
def test_some_kills(template: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    kills = campaign(template, tmp_path / "run", method, 2, capsys)
    assert min(kills[phase] for phase in PHASES) >= 2


@pytest.mark.soak
@pytest.mark.parametrize("method", ["exchange", "rename"])
def test_two_hundred_kills(template: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    kills = campaign(template, tmp_path / "run", method, 29, capsys)
    assert sum(kills.values()) >= 200
    assert min(kills[phase] for phase in PHASES) >= 20
