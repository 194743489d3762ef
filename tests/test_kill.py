"""kill -9 of `setup` in every phase of the commit: the slot holds the old checkpoint or the new one, whole, every time.

Most kills at random moments would hit the start of Python or the copy; here each phase gets its share. In the copy the
engine's own threads are struck at their system calls (native/faults.c); elsewhere kill_child.py counts operations, and strace
strikes at system calls of an unchanged process.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckptstore import cli
from tests import trees, warm
from tests.crashing import content, without_manifest
from tests.kill_phases import PHASES

CHILD = Path(__file__).parent / "kill_child.py"
BIG_BYTES = 3 << 20
WORDS = ("setup", "--as-is", "--json", "--areal-version", "1.0.0", "--run")


class Campaign:
    """Kills one setup after the other, and judges what each left. `kills` counts them by the phase they hit."""

    def __init__(self, place: Path, faults: Path | None, kind: str) -> None:
        self.place, self.faults = place, faults
        self.kills: collections.Counter[str] = collections.Counter()
        self.finished = 0
        self.states: collections.Counter[str] = collections.Counter()
        self.template = place / "template"
        self.parts = ("default",) if kind == "one" else ("default", "critic")
        run = self.run_below(self.template)
        for number, part in enumerate(self.parts):
            export = trees.write_model(trees.checkpoint(run, 46, part), seed=number)
            (export / "big.txt").write_bytes(random.Random(number).randbytes(BIG_BYTES))
            if kind != "half" or part == "default":
                old = trees.write_dcp_slot(run / part / "recover_checkpoint", seed=number)
                (old / "__0_1.distcp").write_bytes(random.Random(100 + number).randbytes(BIG_BYTES))
        trees.set_age(run, 3600)
        self.new = {part: content(trees.checkpoint(run, 46, part)) for part in self.parts}
        self.old = {part: content(run / part / "recover_checkpoint") for part in self.parts}

    @staticmethod
    def run_below(root: Path) -> Path:
        return root / "checkpoints/alice/exp/trial"

    def fresh(self) -> Path:
        """The same run as at the beginning, times and all."""
        work = self.place / "work"
        shutil.rmtree(work, ignore_errors=True)
        subprocess.run(["cp", "-a", self.template, work], check=True)
        return self.run_below(work)

    def strike(self, *, fallback: bool, fault: str = "", strace: str = "", delay_s: float = -1.0, **spec) -> bool:
        """One setup that is to be killed; False when it came to its end before."""
        run = self.fresh()
        spec |= {"fallback": fallback}
        words = [CHILD, json.dumps(spec), *WORDS, run]
        if fault or strace or delay_s >= 0 or spec["phase"] == "start-up":
            done = self.from_the_start(words, fault=fault, strace=strace, delay_s=delay_s)
        else:
            done = warm.Python(*words).finish()
        phases = [line for line in done.stdout.splitlines() if line in PHASES]
        what = f"{spec} {fault} {strace} in {phases[-1:]}"
        if done.returncode == 0:
            self.finished += 1
            assert self.state(run) == "new", what
            return False
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), f"{what}: {done.stderr[-2000:]}"
        self.kills[phases[-1] if phases else "start-up"] += 1
        self.judge(run, what)
        return True

    def from_the_start(self, words: list, *, fault: str, strace: str, delay_s: float) -> subprocess.CompletedProcess[str]:
        """Of Python, too; with the library of faults, traced, or killed after a while."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHILD.parents[1]), *sys.path])}
        if fault:
            environment |= {"LD_PRELOAD": str(self.faults), "FAULT": f"{fault}:kill", "FAULT_PATH": "/stage-"}
        tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "--seccomp-bpf", "-e", f"inject={strace}"] if strace else []
        command = [*tracer, sys.executable, *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
            timer = threading.Timer(delay_s, process.kill)
            if delay_s >= 0:
                timer.start()
            out, error = process.communicate()
            timer.cancel()
        return subprocess.CompletedProcess(command, process.returncode, out, error)

    def state(self, run: Path) -> str:
        """Old, new, or what it should never be; by the bytes of every file."""
        found = set()
        for part in self.parts:
            slot = run / part / "recover_checkpoint"
            here = without_manifest(content(slot)) if slot.exists() else {}
            found.add("new" if here == self.new[part] else "old" if here == self.old[part] else f"WRONG {part}: {sorted(here)}")
        return found.pop() if len(found) == 1 else f"MIXED {sorted(found)}"

    def judge(self, run: Path, what: str) -> None:
        """After a kill: any command settles it, nothing of ours lies in the trial, nothing is lost, and life goes on."""
        assert quietly("list", "--json", "--run", run) == 0, what
        state = self.state(run)
        assert state in ("old", "new"), f"{what}: {state}"
        self.states[state] += 1
        for path in run.rglob("*"):
            if "ckptstore" in path.name or path.name.startswith(("stage-", "old-", "trash-", "probe-")):
                assert path.name == "ckptstore.manifest.json", f"{what}: {path}"
                assert path.parent.name == "recover_checkpoint", f"{what}: {path}"
        assert quietly(*WORDS, run) == 0, what
        assert self.state(run) == "new", what
        side = run.parent / ".ckptstore" / run.name
        kept = [content(path) for path in side.glob("old-*/*")]
        for part in self.parts:
            assert not self.old[part] or self.old[part] in kept, f"{what}: the old {part} is lost"
        assert not (side / "journal.json").exists(), what


def quietly(*words) -> int:
    """The command line in this process; its words go nowhere unless it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.run([str(word) for word in words])
    if code:
        print(said.getvalue())
    return code


#: The engine's system calls that a kill in the copy strikes: which, and at which of them.
COPY_FAULTS = [f"{call}:{nth}" for nth in (1, 2, 3, 5, 7, 9) for call in ("pwrite64", "fsync", "futimens", "openat64")]


def every_point(campaign: Campaign, phase: str, *, fallback: bool) -> None:
    """Kill after the first operation of a phase, after the next, and so on until one setup survives."""
    for nth in itertools.count(1):
        if not campaign.strike(fallback=fallback, phase=phase, nth=nth, when="after"):
            assert nth > 1, f"there is no operation in phase {phase}"
            return


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "fallback"])
def test_killed_in_every_phase(memory_path, faults, fallback):
    """Twenty kills spread over all phases, for each way of replacing."""
    campaign = Campaign(memory_path, faults, "both")
    for nth in (1, 200, 700):
        campaign.strike(fallback=fallback, phase="start-up", nth=nth, when="before")
    for fault in ("pwrite64:2", "fsync:3", "futimens:4"):
        campaign.strike(fallback=fallback, fault=fault)
    for phase, nths in (
        ("manifest", (4, 16)),
        ("journal", (1, 2, 3)),
        ("exchange", (1, 2, 4, 5, 7)),
        ("set-aside", (1, 2, 3)),
        ("journal removal", (1, 3)),
    ):
        for nth in nths:
            campaign.strike(fallback=fallback, phase=phase, nth=nth, when="after")
    assert set(campaign.kills) == set(PHASES), campaign.kills
    assert sum(campaign.kills.values()) >= 18, campaign.kills
    assert set(campaign.states) == {"old", "new"}


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["one", "both", "half"])
@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "fallback"])
def test_two_hundred_kills(memory_path, faults, fallback, kind, record_property):
    """At least 200, and at least 20 in each phase: every operation of the commit, many of the copy, and random moments."""
    campaign = Campaign(memory_path, faults, kind)
    chance = random.Random(f"{fallback} {kind}")
    for phase in PHASES[2:]:
        # Each operation once; then again with other ones until the phase has had its share.
        every_point(campaign, phase, fallback=fallback)
        nths = itertools.cycle(range(1, max(campaign.kills[phase], 1) + 1))
        while campaign.kills[phase] < 20:
            campaign.strike(fallback=fallback, phase=phase, nth=next(nths), when=chance.choice(["before", "after"]))
    for fault in COPY_FAULTS:
        campaign.strike(fallback=fallback, fault=fault)
    while campaign.kills["copy"] < 20:  # threads share the calls: a number is not always reached
        campaign.strike(fallback=fallback, fault=f"pwrite64:{chance.randrange(1, 12)}")
    while campaign.kills["start-up"] < 20:
        campaign.strike(fallback=fallback, phase="start-up", nth=chance.randrange(1, 900), when="before")
    if shutil.which("strace"):
        for call in ("renameat2", "rename", "fsync", "unlink", "mkdir"):
            for nth in (1, 2, 3, 4):
                campaign.strike(fallback=fallback, strace=f"{call}:signal=SIGKILL:when={nth}")
    while sum(campaign.kills.values()) < 200:
        campaign.strike(fallback=fallback, delay_s=chance.uniform(0.05, 0.6))
    report = dict(campaign.kills) | {"finished before": campaign.finished} | dict(campaign.states)
    record_property("kills", json.dumps(report))
    print(f"\n{'fallback' if fallback else 'exchange'}, {kind}: {report}")
    assert all(campaign.kills[phase] >= 20 for phase in PHASES), campaign.kills
    assert set(campaign.states) == {"old", "new"}
