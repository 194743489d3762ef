"""Attaching to a training script: what AReaL of both eras calls reaches breaker, ledger and store; nothing else is touched."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import ledger
from ckptstore import side as side_folders
from ckptstore.breaker import CircuitBreaker
from ckptstore.errors import TrainingHalted
from ckptstore.frameworks.areal import attach as attaching
from ckptstore.frameworks.areal import keeping
from ckptstore.frameworks.areal.attach import Attachment, attach, detach
from ckptstore.listing import read_adopted
from tests import areal_rules, trees, warm
from tests.areal_rules import Engine

REWARD = {"A": "grpo_actor/task_reward/avg", "B": "ppo_actor/task_reward/avg"}


class StatsLogger:
    """As both eras have it: called on all ranks, rank 0 logs."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.logged: list[int] = []

    def commit(self, epoch: int, step: int, global_step: int, data: Any) -> str | None:
        if self.rank != 0:
            return None
        self.logged.append(global_step)
        return "logged"


class HandlerA:
    """v0.3: one engine or a dict of them, Hugging Face files and a shard a rank."""

    era = "A"

    def __init__(self, trial: Path, every: int = 10) -> None:
        self.trial, self.every = trial, every

    def dump(
        self, engine: Any, step_info: Any, saver: Any, evaluator: Any, stats_logger: Any, dataloader: Any, tokenizer: Any = None
    ) -> None:
        if (step_info.global_step + 1) % self.every:
            return
        for name, one in (engine if isinstance(engine, dict) else {"default": engine}).items():
            self._save_checkpoint(one, name=name)
        trees.write_recover_info(self.trial, step_info.global_step)

    def _save_checkpoint(self, engine: Engine, name: str = "default", tokenizer: Any = None) -> None:
        engine.train_step()
        areal_rules.save_slot(self.trial, {name: engine}, era=self.era)


class HandlerB(HandlerA):
    """v0.4 and later: DCP; v1 knows more arguments."""

    era = "B"

    def dump(
        self,
        engine: Any,
        step_info: Any,
        saver: Any,
        evaluator: Any,
        stats_logger: Any,
        dataloader: Any,
        *args: Any,
        **more: Any,
    ) -> None:
        super().dump(engine, step_info, saver, evaluator, stats_logger, dataloader)


@pytest.fixture(params=[HandlerA, HandlerB])
def handler_class(request: pytest.FixtureRequest) -> type[HandlerA]:
    return request.param


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints/alice/gsm8k/trial0"
    path.mkdir(parents=True)
    return path


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(keeping, "RETRY_S", ())
    attaching._said.clear()
    yield
    detach()


def step_info(global_step: int) -> areal_rules.StepInfo:
    epoch, step = divmod(global_step, trees.STEPS_PER_EPOCH)
    return areal_rules.StepInfo(epoch, step, global_step, trees.STEPS_PER_EPOCH)


def adopted(trial: Path) -> list[int]:
    side = side_folders.side_folder(str(trial), str(trial / "default/recover_checkpoint"))
    return [checkpoint.step for checkpoint in read_adopted(side)]


def recorded(trial: Path) -> dict[int, dict[str, float]]:
    found = ledger.read(ledger.path_in(ledger.side_of(str(trial))))
    return {record.step: dict(record.metrics) for record in found.line()}


# --- saves --------------------------------------------------------------------------------------------------------


def test_each_save_is_kept_and_no_other_dump(trial: Path, handler_class: type[HandlerA]) -> None:
    handler, saves = handler_class(trial), []
    attachment = attach(StatsLogger(), handler, run=trial, on_save=lambda step, kept: saves.append((step, kept and kept.step)))
    assert attachment.hooked == ("commit", "dump", "_save_checkpoint")
    engine = Engine()
    for step in range(35):
        assert handler.dump({"default": engine}, step_info(step), None, None, None, dataloader=None) is None
    attachment.wait()
    assert saves == [(9, 9), (19, 19), (29, 29)]
    assert adopted(trial) == [19, 29], "the newest two"
    (side,) = (trial.parent / ".ckptstore").iterdir()
    assert not [name for name in side.iterdir() if name.name.startswith("stage-")]


def test_a_save_amid_zeros_is_kept_and_said(trial: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = HandlerA(trial)
    logger = StatsLogger()
    attachment = attach(logger, handler, run=trial)
    for step in range(35):
        handler.dump({"default": Engine()}, step_info(step), None, None, None, dataloader=None)
        logger.commit(0, step, step, {"ppo_actor/task_reward/avg": 0.7 if step < 12 else 0.0})
    attachment.wait()
    said = [record.getMessage() for record in caplog.records if "training had gone bad" in record.getMessage()]
    assert [text.split()[2] for text in said] == ["19", "29"]
    assert adopted(trial) == [9, 19, 29], "and the last good one stays"


def test_a_ledger_that_cannot_be_read_is_no_save_that_failed(trial: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = HandlerA(trial)
    attachment = attach(StatsLogger(), handler, run=trial)
    Path(ledger.path_in(ledger.side_of(str(trial)))).mkdir(parents=True)
    for step in range(10):
        handler.dump({"default": Engine()}, step_info(step), None, None, None, dataloader=None)
    attachment.wait()
    assert adopted(trial) == [9]
    assert "step 9 is kept; older ones may not be removed" in caplog.text
    assert "not kept" not in caplog.text


def test_one_engine_or_several(trial: Path, handler_class: type[HandlerA]) -> None:
    handler = handler_class(trial)
    attachment = attach(StatsLogger(), handler, run=str(trial))
    handler.dump({"default": Engine(seed=1), "critic": Engine(seed=2)}, step_info(9), 0, 0, 0, 0, None)
    attachment.wait()
    (kept,) = (checkpoint for checkpoint in read_adopted(side_of(trial)) if checkpoint.step == 9)
    assert [part.name for part in kept.parts] == ["default", "critic"]


def side_of(trial: Path) -> str:
    return side_folders.side_folder(str(trial), str(trial / "default/recover_checkpoint"))


def test_saves_after_a_rollback_are_kept(trial: Path) -> None:
    handler = HandlerA(trial)
    attachment = attach(StatsLogger(), handler, run=trial)
    engine = Engine()
    for step in (29, 39):
        handler.dump(engine, step_info(step), 0, 0, 0, 0)
    attachment.wait()
    saved = {}
    for step in (19, 29):  # training went back to step 9, and saves again
        handler.dump(engine, step_info(step), 0, 0, 0, 0)
        attachment.wait()
        saved[step] = (trial / "default/recover_checkpoint/model.safetensors").read_bytes()
    kept = {c.step: Path(c.parts[0].path, "model.safetensors").read_bytes() for c in read_adopted(side_of(trial))}
    assert {step: kept.get(step) for step in saved} == saved


def test_without_adopting_saves_are_told(trial: Path) -> None:
    saves: list[Any] = []
    handler = HandlerA(trial)
    attachment = attach(StatsLogger(), handler, run=trial, adopt=False, on_save=lambda step, kept: saves.append((step, kept)))
    handler.dump(Engine(), step_info(9), 0, 0, 0, 0)
    attachment.wait()
    assert saves == [(9, None)]
    assert adopted(trial) == []
    assert attach(StatsLogger(), handler, run=trial, adopt=False).hooked == ("commit",)


def test_the_next_save_waits_for_the_copy(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptstore import adopt as adopting

    handler, order = HandlerA(trial, every=1), []
    copying, may_end = threading.Event(), threading.Event()
    adopt = adopting.adopt

    def slow(backend: Any) -> Any:
        copying.set()
        assert may_end.wait(30)
        order.append("copied")
        return adopt(backend)

    monkeypatch.setattr(adopting, "adopt", slow)
    save = HandlerA._save_checkpoint
    monkeypatch.setattr(
        HandlerA, "_save_checkpoint", lambda self, engine, name: (order.append("saved"), save(self, engine, name))
    )
    attachment = attach(StatsLogger(), handler, run=trial)
    handler.dump(Engine(), step_info(0), 0, 0, 0, 0)
    assert copying.wait(30)
    second = threading.Thread(target=handler.dump, args=(Engine(), step_info(1), 0, 0, 0, 0))
    second.start()
    may_end.set()
    second.join()
    attachment.wait()
    assert order == ["saved", "copied", "saved", "copied"]
    assert adopted(trial) == [0, 1]


def test_a_slot_that_is_still_written_is_looked_at_again(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "RETRY_S", (0.01, 0.01))
    from ckptstore import adopt as adopting

    late = trial / "default/recover_checkpoint/optim_world_size_1_rank_0.pt"
    kept = trial.parent / "late"
    tries = []
    adopt = adopting.adopt

    def counted(backend: Any) -> Any:
        tries.append(late.exists())
        if len(tries) == 2:
            kept.rename(late)  # the other rank is ready
        return adopt(backend)

    class Slow(HandlerA):
        def dump(self, *args: Any) -> None:
            super().dump(*args)
            late.rename(kept)

    monkeypatch.setattr(adopting, "adopt", counted)
    handler = Slow(trial)
    attachment = attach(StatsLogger(), handler, run=trial)
    handler.dump(Engine(), step_info(9), 0, 0, 0, 0)
    attachment.wait()
    assert tries[0] is False
    assert adopted(trial) == [9]


def test_rank_one_keeps_and_records_nothing(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logger, handler, steps = StatsLogger(rank=1), HandlerA(trial), []
    attachment = attach(logger, handler, run=trial, on_commit=lambda step, data: steps.append(step))
    handler.dump(Engine(), step_info(9), 0, 0, 0, 0)
    assert logger.commit(0, 9, 9, {REWARD["A"]: 0.7}) is None
    attachment.wait()
    assert steps == [9], "commit is everybody's"
    assert not (trial.parent / ".ckptstore").exists()


def test_a_failed_adoption_never_reaches_training(
    trial: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ckptstore import adopt as adopting

    def fail(backend: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(adopting, "adopt", fail)
    handler = HandlerA(trial)
    attachment = attach(StatsLogger(), handler, run=trial)
    handler.dump(Engine(), step_info(9), 0, 0, 0, 0)
    attachment.wait()
    assert "training goes on" in caplog.text


def test_the_trainers_own_failure_is_its_own(trial: Path) -> None:
    class Broken(HandlerA):
        def _save_checkpoint(self, engine: Engine, name: str = "default", tokenizer: Any = None) -> None:
            raise OSError(28, "No space left on device")

    handler = Broken(trial)
    attach(StatsLogger(), handler, run=trial)
    with pytest.raises(OSError, match="No space"):
        handler.dump(Engine(), step_info(9), 0, 0, 0, 0)


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [{REWARD["B"]: 0.5, "x": 1.0}, [{REWARD["A"]: 0.5}, {"x": 2.0}], [{"x": 1.0}, {REWARD["A"]: 0.5}]],
    ids=["a dict (from v0.4.1)", "one a minibatch (before)", "in the second"],
)
def test_metrics_are_recorded_without_a_breaker(trial: Path, data: Any) -> None:
    logger = StatsLogger()
    attach(logger, HandlerA(trial), run=trial)
    assert logger.commit(0, 3, 3, data) == "logged"
    assert logger.commit(0, 4, global_step=4, data=data) == "logged"
    assert [list(metrics.values()) for metrics in recorded(trial).values()] == [[0.5], [0.5]]
    assert logger.logged == [3, 4]


@pytest.mark.parametrize("loss", [None, "n/a", [0.1, 0.2]])
def test_what_is_no_number_costs_no_other_metric(trial: Path, loss: Any) -> None:
    logger = StatsLogger()
    attach(logger, HandlerA(trial), run=trial)
    logger.commit(0, 3, 3, {REWARD["B"]: 0.5, "ppo_actor/update/actor_loss/avg": loss, "n_seqs": 8})
    assert recorded(trial) == {3: {REWARD["B"]: 0.5, "n_seqs": 8.0}}


def test_metrics_that_cannot_be_recorded_are_said(trial: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = StatsLogger()
    attach(logger, HandlerA(trial), run=trial)
    path = Path(ledger.path_in(ledger.side_of(str(trial))))
    path.mkdir(parents=True)  # the system writes no line into a folder
    for step in range(3):
        logger.commit(0, step, step, {REWARD["B"]: 0.5})
    assert caplog.text.count("Is a directory") == 1
    path.rmdir()
    logger.commit(0, 3, 3, {REWARD["B"]: 0.5})
    assert list(recorded(trial)) == [3]


def test_the_breaker_halts_training_after_the_step_is_logged(trial: Path) -> None:
    logger, steps = StatsLogger(), []
    attach(
        logger,
        HandlerA(trial),
        run=trial,
        breaker=CircuitBreaker(trial, threshold=3),
        on_commit=lambda step, data: steps.append(step),
    )

    def train() -> None:
        for step in range(20):
            logger.commit(0, step, step, {REWARD["B"]: 0.7 if step < 5 else 0.0})

    with pytest.raises(TrainingHalted) as halted:
        train()
    assert halted.value.step == 7
    assert logger.logged[-1] == steps[-1] == 7
    assert recorded(trial)[7] == {REWARD["B"]: 0.0}


def test_a_hook_that_fails_is_said_once(trial: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = StatsLogger()

    def fail(step: int, data: Any) -> None:
        raise ValueError("mine")

    attach(logger, HandlerA(trial), run=trial, on_commit=fail, breaker=CircuitBreaker(trial))
    for step in range(3):
        assert logger.commit(0, step, step, {REWARD["A"]: 0.7}) == "logged"
    assert caplog.text.count("ValueError: mine") == 1
    assert len(recorded(trial)) == 3, "the others still see the step"


@pytest.mark.parametrize("data", [None, [], {}, {"x": 1.0}, {REWARD["A"]: "text"}, {REWARD["A"]: None}, 7])
def test_metrics_of_no_use_do_no_harm(trial: Path, data: Any) -> None:
    logger = StatsLogger()
    attach(logger, HandlerA(trial), run=trial)
    assert logger.commit(0, 0, 0, data) == "logged"


# --- hooking ------------------------------------------------------------------------------------------------------


def test_classes_as_well_as_instances(trial: Path) -> None:
    before = dict(vars(StatsLogger)), dict(vars(HandlerA))
    steps: list[int] = []
    attachment = attach(StatsLogger, HandlerA, run=trial, on_commit=lambda step, data: steps.append(step))
    StatsLogger().commit(0, 1, 1, {})
    handler = HandlerB(trial)  # its dump is its own and calls the hooked one
    handler.dump(Engine(), step_info(9), 0, 0, 0, 0)
    attachment.detach()
    StatsLogger().commit(0, 2, 2, {})
    assert steps == [1]
    assert adopted(trial) == [9]
    assert (dict(vars(StatsLogger)), dict(vars(HandlerA))) == before


def test_twice_is_once(trial: Path) -> None:
    logger, first, second = StatsLogger(), [], []
    attach(logger, HandlerA(trial), run=trial, on_commit=lambda step, data: first.append(step))
    attach(logger, HandlerA(trial), run=trial, on_commit=lambda step, data: second.append(step))
    logger.commit(0, 1, 1, {})
    assert (first, second, logger.logged) == ([], [1], [1])


def test_class_and_instance_is_once(trial: Path) -> None:
    steps: list[int] = []
    logger = StatsLogger()
    attach(StatsLogger, HandlerA, run=trial, on_commit=lambda step, data: steps.append(step))
    attach(logger, HandlerA, run=trial, on_commit=lambda step, data: steps.append(step))
    logger.commit(0, 1, 1, {})
    assert steps == [1]
    assert logger.logged == [1]


def test_detaching_puts_everything_back(trial: Path) -> None:
    logger, handler = StatsLogger(), HandlerA(trial)
    attachment = attach(logger, handler, run=trial)
    assert vars(logger).keys() & {"commit"}
    detach()
    assert "commit" not in vars(logger)
    assert "dump" not in vars(handler)
    assert attachment.hooked == ()
    attachment.detach()
    logger.commit(0, 1, 1, {REWARD["A"]: 0.7})
    assert not (trial.parent / ".ckptstore").exists()


def test_detaching_an_earlier_one_leaves_the_later(trial: Path) -> None:
    logger, steps = StatsLogger(), []
    earlier = attach(logger, HandlerA(trial), run=trial)
    attach(logger, HandlerA(trial), run=trial, on_commit=lambda step, data: steps.append(step))
    earlier.detach()
    logger.commit(0, 1, 1, {})
    assert steps == [1]


def test_areals_own_classes_are_found(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Logger(StatsLogger):
        pass

    for name, members in (
        ("areal", {}),
        ("areal.utils", {}),
        ("areal.utils.stats_logger", {"StatsLogger": Logger}),
        ("areal.utils.recover", {"RecoverHandler": HandlerB}),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    steps: list[int] = []
    attachment = attach(run=trial, on_commit=lambda step, data: steps.append(step))
    assert attachment.hooked == ("commit", "dump", "_save_checkpoint")
    Logger().commit(0, 1, 1, {})
    assert steps == [1]
    detach()
    assert "commit" not in vars(Logger), "it was inherited, and is again"


def test_what_is_missing_is_said_and_left_out(trial: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    attachment = attach(run=trial)
    assert attachment.hooked == ()
    assert "areal.utils.stats_logger" in caplog.text
    caplog.clear()

    class Slots:
        __slots__ = ()

        def commit(self, epoch: int, step: int, global_step: int, data: Any) -> None: ...

    class Later:
        async def dump(self) -> None: ...

    for logger, handler in ((object(), object()), (Slots(), Later())):
        assert attach(logger, handler, run=trial).hooked == ()
    assert caplog.text.count("does without") == 4
    asyncio.run(Later().dump())


def test_a_commit_of_other_parameters_is_left_alone(trial: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Other:
        def commit(self, everything: Any) -> str:
            return "done"

    logger, steps = Other(), []
    attach(logger, HandlerA(trial), run=trial, on_commit=lambda step, data: steps.append(step))
    assert [logger.commit({}) for _ in range(3)] == ["done"] * 3
    assert steps == []
    assert caplog.text.count("no metrics are recorded") == 1


def test_a_handler_without_the_inner_method(trial: Path) -> None:
    class Flat:
        def dump(self, engine: Engine, step_info: Any) -> None:
            engine.train_step()
            areal_rules.save_slot(trial, {"default": engine}, era="A")
            trees.write_recover_info(trial, step_info.global_step)

    handler = Flat()
    attachment = attach(StatsLogger(), handler, run=trial)
    assert isinstance(attachment, Attachment)
    assert attachment.hooked == ("commit", "dump")
    handler.dump(Engine(), step_info(9))
    attachment.wait()
    assert adopted(trial) == [9]


def test_attaching_imports_neither_torch_nor_areal() -> None:
    code = "import sys, ckptstore.frameworks.areal.attach; print([m for m in ('torch', 'areal', 'click') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "areal_attach.py"
    done = warm.Python(example, tmp_path).finish()
    assert done.returncode == 1, done.stderr
    assert "training is halted at global step 38" in done.stdout
    (run,) = (tmp_path / "checkpoints").glob("*/attached/trial0")
    assert adopted(run) == [19, 29]
    assert sorted(recorded(run)) == list(range(39))
