"""What `setup` leaves behind, judged by AReaL's own rules: it resumes at the next step with that step's weights, or says no.

A silent fresh start, or the weights of one step under the counter of another, must not come out of any of it, crashes
at any instant included.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ckptstore import commit, native, probe, recovery
from ckptstore import side as side_folders
from ckptstore.adopt import adopt
from ckptstore.backends.local import LocalBackend
from ckptstore.choose import Selection
from ckptstore.config import load
from ckptstore.errors import NothingToResumeError, RefusedError
from ckptstore.frameworks.areal.launch import find_installation
from ckptstore.listing import scan
from ckptstore.plan import Options
from tests import areal_rules, trees, warm
from tests.areal_rules import Engine, Fresh, Resumed
from tests.kill_phases import PHASES

KILL_CHILD = Path(__file__).parent / "kill_child.py"
VERSIONS = {"A": "0.3.4", "B": "0.4.1", "C": "1.0.4"}
STEPS_PER_EPOCH = 47
HOUR_S = 3600.0


@dataclass
class Run:
    """A trial whose weights are known at each step that it saved: step → part → tensors."""

    trial: Path
    parts: tuple[str, ...]
    era: str
    world_size: int = 1
    weights: dict[int, dict[str, dict[str, torch.Tensor]]] = field(default_factory=dict)
    moments: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def backend(self) -> LocalBackend:
        return LocalBackend(str(self.trial))

    @property
    def side(self) -> str:
        return side_folders.side_folder(str(self.trial), str(self.trial / "default" / "recover_checkpoint"))

    def export(self, step: int, *, steps_per_epoch: int = STEPS_PER_EPOCH) -> None:
        """What the saver writes after `step`."""
        engines = self._engines(step)
        for part, engine in engines.items():
            areal_rules.save_hf(self.trial / part / trees.folder_name(step, steps_per_epoch), engine)
        self._grow_old()

    def save_slot(self, step: int, *, with_info: bool = True) -> None:
        """What the recover dump writes after `step`, over what it wrote before."""
        engines = self._engines(step)
        areal_rules.save_slot(self.trial, engines, era=self.era, world_size=self.world_size)
        if with_info:
            trees.write_recover_info(self.trial, step, world_size=self.world_size)
        self._grow_old()

    def setup(self, selection: Selection | None = None, **options: Any) -> recovery.Outcome:
        """`ckptstore setup` for the AReaL that trains here."""
        options.setdefault("installation", find_installation(version=VERSIONS[self.era]))
        return recovery.setup(self.backend, selection or Selection(), Options(**options))

    def start(self, *, skip_optimizer: bool = False) -> Resumed | Fresh:
        """AReaL starts with recover.mode=auto."""
        return areal_rules.start(
            self.trial, era=self.era, world_size=self.world_size, parts=self.parts, skip_optimizer=skip_optimizer
        )

    def start_after(self, outcome: recovery.Outcome) -> Resumed | Fresh:
        """AReaL starts with the words that setup says it needs."""
        overrides = outcome.plan.restoration.overrides
        assert outcome.plan.restoration.blockers == ()
        assert set(overrides) <= {"++recover.no_load_optim=true"}  # bare, Hydra refuses it: the YAML has no such key
        assert all(any(word in need for need in outcome.plan.restoration.needs) for word in overrides)  # who starts it by hand
        return self.start(skip_optimizer=bool(overrides))

    def assert_resumes(self, result: Resumed | Fresh, step: int) -> Resumed:
        """All of one step: counter, and the weights of every part."""
        assert isinstance(result, Resumed), result
        assert result.step == step + 1
        for part in self.parts:
            assert same(result.weights[part], self.weights[step][part]), f"{part} holds other weights than step {step}'s"
        assert all(any(frequency for frequency in control) for control in result.frequencies.values()), "it never saves again"
        return result

    def _engines(self, step: int) -> dict[str, Engine]:
        engines = {part: Engine(seed=1000 * number + step) for number, part in enumerate(self.parts)}
        for engine in engines.values():
            engine.train_step()
        self.weights[step] = {part: engine.weights for part, engine in engines.items()}
        self.moments[step] = {part: engine.moments for part, engine in engines.items()}
        return engines

    def _grow_old(self) -> None:
        # The trainer has ended: what was written a moment ago would be a sign that it runs.
        trees.set_age(self.trial.parents[3], HOUR_S)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_run(root: Path, era: str, *, parts: tuple[str, ...] = ("default",), world_size: int = 1, yaml: str = "") -> Run:
    """A trial with nothing saved yet, and the YAML that AReaL keeps with its logs."""
    trial = trees.make_run(root, steps=[], experiment="resume-rules")
    if yaml:
        (root / "run.yaml").write_text(yaml)
    return Run(trial, parts, era, world_size)


YAML = """
saver: {freq_epochs: 1, freq_steps: null, freq_secs: null}
recover: {mode: auto, freq_epochs: null, freq_steps: 20, freq_secs: null}
evaluator: {freq_epochs: 1}
train_dataset: {batch_size: 8, num_workers: 0}
actor: {optimizer: {type: adam, lr: 2e-6}}
critic: {optimizer: {type: adam, lr: 3e-6}}
allocation_mode: sglang:d1p1t1+d1p1t1
"""


@pytest.fixture(params=["A", "B", "C"])
def era(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the rules themselves -----------------------------------------------------------------------------------------


def test_rules_no_recover_info_starts_fresh(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era)
    run.save_slot(93, with_info=False)
    assert isinstance(run.start(), Fresh)


def test_rules_the_launchers_check_proves_nothing_about_the_slot(tmp_path: Path) -> None:
    run = make_run(tmp_path, "B")
    trees.write_recover_info(run.trial, 93)
    assert areal_rules.auto_recover_passes(run.trial)
    assert list((run.trial / "recover_info" / "recover_checkpoint").iterdir()) == []
    with pytest.raises(BaseException, match="metadata") as caught:
        run.start()
    assert not isinstance(caught.value, Exception), "AReaL would have caught it"


def test_rules_weights_alone_start_fresh_with_them_in_era_a(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A")
    run.save_slot(93)
    (run.trial / "default/recover_checkpoint/optim_world_size_1_rank_0.pt").unlink()
    result = run.start()
    assert isinstance(result, Fresh)
    assert same(result.weights["default"], run.weights[93]["default"]), "the worst case: it looks resumed"


def test_rules_another_number_of_ranks_starts_fresh(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era)
    run.save_slot(93)
    trees.write_recover_info(run.trial, 93, world_size=2)
    assert isinstance(run.start(), Fresh)


def test_rules_a_control_without_its_keys_is_loud(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era)
    run.save_slot(93)
    (run.trial / "recover_info/saver_info.json").write_text("{}")
    assert areal_rules.auto_recover_passes(run.trial)
    with pytest.raises(KeyError):
        run.start()


@pytest.mark.parametrize(
    "text", ['{"epoch": 1', '{"epoch": 1, "epoch_step": 0, "global_step": 47, "steps_per_epoch": 47, "x": 1}']
)
def test_rules_a_step_info_that_is_not_exact_starts_fresh(tmp_path: Path, era: str, text: str) -> None:
    run = make_run(tmp_path, era)
    run.save_slot(93)
    (run.trial / "recover_info/step_info.json").write_text(text)
    assert isinstance(run.start(), Fresh)


def test_rules_a_missing_key_is_loud_with_dcp(tmp_path: Path) -> None:
    run = make_run(tmp_path, "C")
    areal_rules.save_slot(run.trial, {"default": Engine(with_optimizer=False)}, era="C")
    trees.write_recover_info(run.trial, 93)
    with pytest.raises(BaseException, match="Missing key"):
        run.start()
    assert isinstance(run.start(skip_optimizer=True), Resumed)


# --- a slot that is right -----------------------------------------------------------------------------------------


def test_a_whole_slot_is_left_alone_with_its_recover_info(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era)
    run.export(93)
    run.save_slot(140)
    before = contents(run.trial)
    outcome = run.setup()
    assert outcome.plan.nothing_to_do
    assert contents(run.trial) == before
    result = run.assert_resumes(run.start_after(outcome), 140)
    assert result.optimizer["default"].keys() == run.moments[140]["default"].keys()
    assert result.data == [data_state(140)]


def test_the_slot_beats_slightly_newer_weights(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era)
    run.save_slot(80)
    run.export(93)
    outcome = run.setup()
    run.assert_resumes(run.start_after(outcome), 80)


def test_an_adopted_step_comes_back_whole(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, parts=("default", "critic"), world_size=2)
    run.save_slot(100)
    info = {path.name: path.read_bytes() for path in (run.trial / "recover_info").iterdir()}
    adopt(run.backend)
    run.save_slot(140)
    outcome = run.setup(Selection(step=100))
    result = run.assert_resumes(run.start_after(outcome), 100)
    for part in run.parts:
        for name, state in run.moments[100][part].items():
            assert torch.equal(result.optimizer[part][name]["exp_avg"], state["exp_avg"]), (part, name)
    kept = {name: data for name, data in contents(run.trial / "recover_info").items() if name in info}
    assert kept == info
    assert result.data == [data_state(100)] * 2
    recovery.undo(run.backend)
    run.assert_resumes(run.start(), 140)


def test_a_slot_cut_short_is_not_resumed_from(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era)
    run.save_slot(100)
    adopt(run.backend)
    run.save_slot(140, with_info=False)  # weights of 140 under the counter of 100: the crash came in between
    now = time.time()
    for path in (run.trial / "default/recover_checkpoint").iterdir():
        os.utime(path, (now - 1800, now - 1800))
    mixed = run.start()
    assert isinstance(mixed, Resumed)
    assert mixed.step == 101
    assert same(mixed.weights["default"], run.weights[140]["default"]), "AReaL would not notice"
    outcome = run.setup()
    run.assert_resumes(run.start_after(outcome), 100)


@pytest.mark.parametrize("written", range(1, 6))
def test_a_recover_info_cut_short_is_made_anew(tmp_path: Path, era: str, written: int) -> None:
    """The trainer died between its files: the counter is the new save's, and the data order still that of the old."""
    run = make_run(tmp_path, era, yaml=YAML)
    run.save_slot(100)
    old = {path.name: path.read_bytes() for path in (run.trial / "recover_info").iterdir()}
    run.save_slot(130)
    order = ("step_info.json", "saver_info.json", "evaluator_info.json", "stats_logger_info.json", "checkpoint_info.json")
    for name in [*order, "dataloader_info.pkl"][written:]:
        path = run.trial / "recover_info" / name
        path.write_bytes(old[name])
        os.utime(path, (time.time() - 2 * HOUR_S,) * 2)
    mixed = run.start()
    assert isinstance(mixed, Resumed)
    assert (mixed.step, mixed.data) == (131, [data_state(100)]), "AReaL would not notice"
    with pytest.raises(RefusedError, match="cut short"):
        adopt(run.backend)
    outcome = run.setup(config=load(str(tmp_path / "run.yaml")))
    assert outcome.plan.transfers == {}, "the slot was whole, and stays"
    result = run.assert_resumes(run.start_after(outcome), 130)
    assert result.data == [{} if era == "A" else data_state(130)]
    assert result.last_commit_step == 130
    assert result.optimizer["default"].keys() == run.moments[130]["default"].keys()
    assert run.setup(config=load(str(tmp_path / "run.yaml"))).plan.nothing_to_do


def test_nothing_to_resume_from_is_said(tmp_path: Path, era: str) -> None:
    with pytest.raises(NothingToResumeError):
        make_run(tmp_path, era).setup()


# --- an export becomes a slot -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("default",), ("default", "critic")])
def test_an_older_export_replaces_a_later_slot(tmp_path: Path, era: str, parts: tuple[str, ...]) -> None:
    run = make_run(tmp_path, era, parts=parts, yaml=YAML)
    run.export(46)
    run.export(93)
    run.save_slot(140)
    outcome = run.setup(Selection(max_step=100), config=load(str(tmp_path / "run.yaml")), world_size=1)
    result = run.assert_resumes(run.start_after(outcome), 93)
    if era == "A":
        assert result.optimizer["default"] == {}
    for name, state in result.optimizer["default"].items():
        assert not state["exp_avg"].any(), name
        assert not state["exp_avg_sq"].any(), name
        assert state["step"] == 0, name
    assert result.frequencies["checkpoint_info.json"] == (None, 20, None)
    recovery.undo(run.backend)
    run.assert_resumes(run.start(), 140)


def test_undo_takes_away_what_a_conversion_added(tmp_path: Path, era: str) -> None:
    """A part that had no slot before must not stay at the other step: AReaL would train a mixture of two."""
    run = make_run(tmp_path, era, parts=("default", "critic"), yaml=YAML)
    run.export(46)
    run.export(93)
    run.save_slot(140)
    critic = run.trial / "critic/recover_checkpoint"
    shutil.rmtree(critic)
    run.setup(Selection(max_step=100), config=load(str(tmp_path / "run.yaml")), world_size=1)
    assert any(critic.iterdir())
    recovery.undo(run.backend)
    assert not critic.exists() or not any(critic.iterdir())
    assert scan(run.backend).slot.step == 140


def test_what_was_made_of_weights_alone_is_never_taken_for_state(tmp_path: Path, era: str) -> None:
    """Adopted, and set up again: an optimizer that never stepped is worth no step of training."""
    run = make_run(tmp_path, era, yaml=YAML)
    config = load(str(tmp_path / "run.yaml"))
    run.export(46)
    run.export(50)
    run.setup(Selection(step=46), config=config, world_size=1)
    kept = adopt(run.backend)
    assert "optimizer" not in kept.holds
    for place in ("", "/default"):  # as the step that it is, and as a folder that somebody names
        shutil.rmtree(run.trial / "default/recover_checkpoint")
        outcome = run.setup(Selection(checkpoint_path=kept.store + place), config=config, world_size=1)
        assert not any("optimizer" in text for text in outcome.plan.restoration.restored)
        assert "optimizer" not in scan(run.backend).slot.holds
    (run.trial.parent / ".ckptstore" / run.trial.name / "left.json").unlink()  # as if nobody had gone back
    assert run.setup(config=config, world_size=1).plan.point.checkpoint.step == 50


def test_an_export_without_any_recover_info(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, yaml=YAML)
    run.export(93)
    assert isinstance(run.start(), Fresh)
    outcome = run.setup(config=load(str(tmp_path / "run.yaml")))
    result = run.assert_resumes(run.start_after(outcome), 93)
    assert result.data == [{}], "the epoch's end: any loader starts the next one"
    assert result.last_commit_step == 93


def test_an_export_in_the_first_epoch_needs_the_steps_per_epoch(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, yaml=YAML.replace("freq_steps: null", "freq_steps: 10"))
    run.export(9)
    config = load(str(tmp_path / "run.yaml"))
    with pytest.raises(RefusedError, match="--steps-per-epoch"):
        run.setup(config=config)
    assert isinstance(run.start(), Fresh)
    outcome = run.setup(config=config, steps_per_epoch=STEPS_PER_EPOCH)
    result = run.assert_resumes(run.start_after(outcome), 9)
    assert result.data == [{} if era == "A" else data_state(9)], "up to v0.3 the loader shuffles by itself"
    assert result.frequencies["saver_info.json"] == (1, 10, None)


def test_the_yaml_of_today_beats_an_older_recover_info(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, yaml=YAML)
    run.export(93)
    run.save_slot(140)  # its recover_info saves at each epoch's end
    outcome = run.setup(Selection(step=93), config=load(str(tmp_path / "run.yaml"), ["recover.freq_steps=5"]), world_size=1)
    result = run.assert_resumes(run.start_after(outcome), 93)
    assert result.frequencies["checkpoint_info.json"] == (None, 5, None)
    assert any("the YAML's is written" in need for need in outcome.plan.restoration.needs)


def test_a_kept_recover_info_keeps_its_frequencies_unless_told(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, yaml=YAML)
    run.save_slot(93)
    config = load(str(tmp_path / "run.yaml"))
    outcome = run.setup(config=config)
    assert outcome.plan.nothing_to_do
    assert any("--write-frequencies" in note for note in outcome.plan.info.notes)
    assert run.assert_resumes(run.start_after(outcome), 93).frequencies["checkpoint_info.json"] == (1, None, None)
    outcome = run.setup(config=config, write_frequencies=True)
    result = run.assert_resumes(run.start_after(outcome), 93)
    assert result.frequencies["checkpoint_info.json"] == (None, 20, None)
    assert result.data == [data_state(93)], "the trainer's own cursor is kept"


def test_era_a_needs_the_world_size_and_gets_a_shard_for_each_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path, "A", world_size=4, yaml=YAML.replace("sglang:d1p1t1+d1p1t1", "sglang:d4p1t1+d4p1t1"))
    run.export(93)
    with pytest.raises(RefusedError, match="--world-size"):
        run.setup(config=load(str(tmp_path / "run.yaml"), ["allocation_mode=sglang:d4+megatron:t2p2"]))
    outcome = run.setup(config=load(str(tmp_path / "run.yaml")))
    run.assert_resumes(run.start_after(outcome), 93)


def test_a_new_trial_resumes_and_the_old_one_stays(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, parts=("default", "critic"), yaml=YAML)
    run.export(93)
    run.save_slot(140)
    before = contents(run.trial)
    outcome = run.setup(Selection(step=93), config=load(str(tmp_path / "run.yaml")), world_size=1, new_trial="again")
    assert contents(run.trial) == before
    skip_optimizer = bool(outcome.plan.restoration.overrides)
    fresh = areal_rules.start(run.trial.with_name("again"), era=era, parts=run.parts, skip_optimizer=skip_optimizer)
    run.assert_resumes(fresh, 93)
    run.assert_resumes(run.start(), 140)


def test_another_number_of_ranks_never_starts_fresh(tmp_path: Path, era: str) -> None:
    run = make_run(tmp_path, era, world_size=2)
    run.save_slot(100)
    adopt(run.backend)
    run.save_slot(140)
    run.world_size = 4
    try:
        outcome = run.setup(Selection(step=100), world_size=4)
    except RefusedError:
        return  # era A: its optimizer shards are of two ranks
    run.assert_resumes(run.start_after(outcome), 100)


def test_what_cannot_resume_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "C", yaml=YAML)
    trees.write_lora(run.trial / "default" / trees.folder_name(93))
    trees.set_age(run.trial, HOUR_S)
    with pytest.raises(RefusedError, match="LoRA"):
        run.setup(config=load(str(tmp_path / "run.yaml")))


@pytest.mark.parametrize(("slot_era", "era"), [("A", "B"), ("A", "C"), ("B", "A")])
def test_a_slot_of_another_era_is_refused(tmp_path: Path, slot_era: str, era: str) -> None:
    run = make_run(tmp_path, slot_era)
    run.save_slot(93)
    adopt(run.backend)
    run.save_slot(140)
    run.era = era
    with pytest.raises(RefusedError, match="AReaL reads"):
        run.setup(Selection(step=93))


# --- crashes ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


class Killer:
    """Ends the process's work before its n-th change to the file system, counted from when the journal is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1  #: changes that still happen; negative: not counting
        self.done: list[str] = []
        publish = commit.publish

        def counted(*args: Any) -> None:
            self.left = self.budget
            try:
                publish(*args)
            finally:
                self.left = -1

        monkeypatch.setattr(commit, "publish", counted)
        for owner, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (os, "rmdir"),
            (os, "mkdir"),
            (native, "rename_exchange"),
            (native, "rename_noreplace"),
        ):
            monkeypatch.setattr(owner, name, self._hook(getattr(owner, name), name))
        self.budget = 1_000_000

    def _hook(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def hooked(*args: Any, **keywords: Any) -> Any:
            counted = keywords.get("dir_fd") is None  # else it is deep in the removal of something renamed away before
            if counted and self.left == 0:
                raise Killed(f"before {name}{args}")
            result = original(*args, **keywords)
            if counted and self.left > 0:
                self.left -= 1
                self.done.append(f"{name} {' '.join(map(str, args))}")
            return result

        return hooked


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch)


@pytest.fixture(params=["exchange", "rename"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How slots are replaced: by what the file system offers, or as on one that has no exchange."""
    if request.param == "rename":
        monkeypatch.setattr(probe, "_exchanges", lambda scratch: False)
    return str(request.param)


def judge(run: Run, old: int | None, new: int) -> str:
    """What AReaL does with what a crash left: "old", "new" or "loud"; all else fails. `old` None: it started fresh before."""
    try:
        result = run.start()
    except (KeyError, CheckpointException):
        return "loud"
    if isinstance(result, Fresh):
        untouched = old is None and not any((run.trial / part / "recover_checkpoint").exists() for part in run.parts)
        assert untouched, f"a silent fresh start: {result.why}"
        return "old"
    step = result.step - 1
    assert step in (old, new), step
    run.assert_resumes(result, step)
    return "old" if step == old else "new"


def crashes(
    killer: Killer, tmp_path: Path, prepare: Callable[[Path], Run], act: Callable[[Run], object]
) -> Iterator[tuple[int, Run]]:
    """Runs on which `act` was killed before its first, second, … change; ends after the one that nothing killed."""
    killer.budget = 1_000_000
    template = prepare(tmp_path / "template")
    for budget in range(1000):
        run = copied(template, tmp_path / "template", tmp_path / str(budget))
        killer.budget = budget
        try:
            act(run)
        except Killed:
            yield budget, run
            shutil.rmtree(tmp_path / str(budget))
        else:
            assert budget > 5, "the hooks saw nothing"
            return


def copied(run: Run, root: Path, to: Path) -> Run:
    """The same run below another folder, times and all."""
    shutil.copytree(root, to, symlinks=True)
    return dataclasses.replace(run, trial=to / run.trial.relative_to(root))


def two_parts(root: Path) -> Run:
    run = make_run(root, "A", parts=("default", "critic"), world_size=2)
    run.save_slot(100)
    adopt(run.backend)
    run.save_slot(140)
    return run


def emptied(root: Path) -> Run:
    """Somebody cleared the trial: slot and recover_info are gone, an adopted step is there."""
    run = two_parts(root)
    shutil.rmtree(run.trial / "recover_info")
    for part in run.parts:
        shutil.rmtree(run.trial / part / "recover_checkpoint")
    trees.set_age(run.trial, HOUR_S)
    return run


def dcp_slot(root: Path) -> Run:
    run = make_run(root, "B")
    run.save_slot(100)
    adopt(run.backend)
    run.save_slot(140)
    return run


@pytest.mark.parametrize(("prepare", "old"), [(two_parts, 140), (emptied, None), (dcp_slot, 140)])
def test_a_crash_during_setup_is_never_silent(
    memory_path: Path, killer: Killer, method: str, prepare: Callable[[Path], Run], old: int | None
) -> None:
    seen = []
    for budget, run in crashes(killer, memory_path, prepare, lambda run: run.setup(Selection(step=100))):
        seen.append(judge(run, old, 100))
        killer.budget = 1_000_000
        commit.roll_forward(run.side)
        after = judge(run, old, 100)
        assert after in ("old", "new"), f"killed before change {budget}, rolled forward: {after}"
        assert run.setup(Selection(step=100)).plan.listing is not None
        run.assert_resumes(run.start(), 100)
    order = [outcome for n, outcome in enumerate(seen) if not n or seen[n - 1] != outcome]
    assert order == ["old", "loud", "new"]


def test_a_crash_during_undo_is_never_silent(memory_path: Path, killer: Killer, method: str) -> None:
    def prepare(root: Path) -> Run:
        run = two_parts(root)
        run.setup(Selection(step=100))
        return run

    seen = []
    for _, run in crashes(killer, memory_path, prepare, lambda run: recovery.undo(run.backend)):
        seen.append(judge(run, 100, 140))
        killer.budget = 1_000_000
        commit.roll_forward(run.side)
        assert judge(run, 100, 140) in ("old", "new")
    order = [outcome for n, outcome in enumerate(seen) if not n or seen[n - 1] != outcome]
    assert order == ["old", "loud", "new"]


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "rename"])
def test_kill_9_at_random_moments_is_never_silent(memory_path: Path, fallback: bool, kills: int) -> None:
    """The command itself, killed from outside once its imports are done; then AReaL, then any command, then AReaL again."""
    chance = random.Random(f"{fallback} {kills}")
    template = two_parts(memory_path / "template")
    seen: collections.Counter[str] = collections.Counter()
    # How long an undisturbed one takes from its first phase on, and how many follow: a machine that is busy makes all times
    # longer, and each phase comes all the same.
    whole_s, phases_after = 0.0, 0
    while sum(seen[how] for how in ("old", "loud", "new")) < kills:
        root = memory_path / "run"
        run = copied(template, memory_path / "template", root)
        words = ["setup", "--step", "100", "--areal-version", VERSIONS["A"], "--world-size", "2", "--force", "--json"]
        process = warm.Python(KILL_CHILD, json.dumps({"fallback": fallback}), *words, "--run", run.trial)
        process.stdout.readline()  # it has come to its first phase
        started = time.monotonic()
        for _ in range(chance.randint(0, phases_after)):
            process.stdout.readline()
        after_s = chance.random() ** 4 * whole_s / (phases_after + 1)  # the last phases are much shorter than the others
        timer = threading.Timer(after_s, process.send_signal, (signal.SIGKILL,))
        if whole_s:
            timer.start()
        done = process.finish()
        timer.cancel()
        ended, phases = done.returncode, [word for word in done.stdout.split() if word in PHASES]
        if ended == 0 and not whole_s:
            whole_s, phases_after = time.monotonic() - started, len(phases)
        assert ended in (0, -signal.SIGKILL), (ended, done.stdout, done.stderr)
        how = judge(run, 140, 100)
        seen["finished" if ended == 0 else how] += 1
        said = commit.roll_forward(run.side)
        assert judge(run, 140, 100) in ("old", "new"), f"killed in {phases}, rolled forward ({said})"
        run.setup(Selection(step=100), force=True)
        run.assert_resumes(run.start(), 100)
        shutil.rmtree(root)
    print(f"\n{'rename' if fallback else 'exchange'}: {dict(seen)}")
    assert kills < 100 or min(seen["old"], seen["loud"], seen["new"]) > 0, seen


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, ours left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("ckptstore.")
    }


def data_state(step: int) -> dict[str, Any]:
    """The dataloader's state after `step`, as torchdata counts it with batches of 8 and no workers."""
    batches = step % STEPS_PER_EPOCH + 1
    return {
        "_index_sampler_state": None,
        "_sampler_iter_state": {"samples_yielded": batches * 8},
        "_sampler_iter_yielded": batches,
        "_num_yielded": batches,
        "_IterableDataset_len_called": None,
        "_shared_seed": None,
        "fetcher_state": None,
        "dataset_state": None,
        "_iterator_finished": False,
    }
