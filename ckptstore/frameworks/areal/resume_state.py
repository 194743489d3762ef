"""Make a recover_info that AReaL loads, for a step that the trainer saved none for (areal/utils/recover.py, v0.3 to 2026-08).

StepInfo accepts exactly its four fields. The controls' *stored* frequency beats the YAML when they are loaded, so nulls
would mean that the resumed run never saves again: they are written from the YAML, or kept from an older recover_info.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError
from ckptstore.frameworks.areal import pickled
from ckptstore.frameworks.areal.recover_info import CONTROLS, DATALOADER, STATS_LOGGER, STEP_INFO

#: recover_info file → the YAML block that says how often.
_BLOCKS = {"saver_info.json": "saver", "evaluator_info.json": "evaluator", "checkpoint_info.json": "recover"}


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """The finished step, all counted from 0."""

    step: int
    epoch: int
    epoch_step: int
    steps_per_epoch: int


@dataclass(frozen=True, slots=True)
class ResumeState:
    """The files of a recover_info, and what is worth saying about them."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def steps_per_epoch(numbers: tuple[int, int, int], others: list[tuple[int, int, int]], known: int = 0) -> int:
    """Derive the steps of an epoch from (step, epoch, epoch_step) triples; `known` wins; 0 when they don't tell.

    step = epoch · steps_per_epoch + epoch_step, so any checkpoint past the first epoch tells; in the first epoch only its
    last step does, and only the trainer knows whether it was the last.
    """
    if known > 0:
        return known
    for step, epoch, epoch_step in (numbers, *others):
        if epoch >= 1 and (step - epoch_step) % epoch == 0:
            return (step - epoch_step) // epoch
    return 0


def synthesize(
    numbers: StepNumbers,
    *,
    config: RunConfig | None,
    stored: Mapping[str, Mapping[str, Any]],
    now_s: float,
    world_size: int = 0,
    era: str = "",
) -> ResumeState:
    """All six files. `stored` are the controls of an older recover_info of the run: kept where the YAML is unknown.

    `era` is that of the AReaL that will train, empty where it is not known.

    RefusedError where neither tells how often to save.
    """
    notes: list[str] = []
    files: dict[str, bytes] = {
        STEP_INFO: _json(
            {
                "epoch": numbers.epoch,
                "epoch_step": numbers.epoch_step,
                "global_step": numbers.step,
                "steps_per_epoch": numbers.steps_per_epoch,
            }
        ),
        STATS_LOGGER: _json({"last_commit_step": numbers.step}),
    }
    for name in CONTROLS:
        block = _BLOCKS[name]
        frequencies = _frequencies(config, block) if config is not None else None
        old = _stored_frequencies(stored.get(name))
        if frequencies is None:
            if old is None and block == "evaluator":
                old = (None, None, None)  # AReaL's default: no evaluation
            if old is None:
                raise RefusedError(
                    f"nothing tells how often the run saves ({block}: in its YAML, or an older recover_info), and AReaL "
                    "takes the frequency from recover_info: without it the resumed run would never save again",
                    hint="Give the run's YAML with --config."
                    if config is None
                    else f"Set one in the YAML or behind the command: {block}.freq_steps=100, say.",
                )
            frequencies = old
        elif old is not None and old != frequencies:
            notes.append(
                f"{block}: the YAML says {_say(frequencies)}, the older recover_info says {_say(old)}; the YAML's is written"
            )
        files[name] = _json(_controls(frequencies, numbers, now_s))
    state, note = _dataloader(numbers, config, world_size, era)
    files[DATALOADER] = pickled.dumps(state)
    notes.append(note)
    return ResumeState(files, tuple(notes))


def blocking() -> dict[str, bytes]:
    """A recover_info that passes the launcher's look and makes the trainer's load raise KeyError: it can't go unnoticed."""
    return {
        STEP_INFO: _json({"epoch": 0, "epoch_step": 0, "global_step": 0, "steps_per_epoch": 1}),
        STATS_LOGGER: _json({"last_commit_step": 0}),
        # None of the keys that its controls read; for the person who finds it, what to do.
        **{name: _json({"ckptstore": "a setup was interrupted: run any ckptstore command on this run"}) for name in CONTROLS},
        DATALOADER: pickled.dumps({}),
    }


def stored_difference(config: RunConfig | None, stored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where a kept recover_info will make the trainer save at another rate than its YAML says."""
    lines = []
    for name in CONTROLS:
        old = _stored_frequencies(stored.get(name))
        new = _frequencies(config, _BLOCKS[name]) if config is not None else None
        if old is not None and new is not None and old != new:
            lines.append(
                f"{_BLOCKS[name]}: the kept recover_info says {_say(old)} and beats the YAML's {_say(new)} "
                "(--write-frequencies writes the YAML's)"
            )
    return lines


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


_UNITS = ("epochs", "steps", "secs")

_Frequencies = tuple[int | None, int | None, int | None]  # epochs, steps, seconds


def _frequencies(config: RunConfig, block: str) -> _Frequencies | None:
    values = tuple(config.get(f"{block}.freq_{unit}") for unit in _UNITS)
    if all(value is None for value in values) and (block != "evaluator" or config.get(block) is None):
        return None  # the YAML does not tell; that nothing is evaluated is common, that nothing is saved is not
    epochs, steps, seconds = (_count(value, f"{block}.freq_{unit}") for value, unit in zip(values, _UNITS, strict=True))
    return epochs, steps, seconds


def _count(value: Any, key: str) -> int | None:
    """A frequency as AReaL would convert it: OmegaConf takes 1800.0 and "1800" for a whole number as well."""
    if value is None:
        return None
    try:
        number = float(value)
        if isinstance(value, bool) or not number.is_integer():
            raise ValueError
    except (TypeError, ValueError):
        raise RefusedError(f"{key} is {value!r:.40}, which is no whole number", hint="Correct the YAML.") from None
    return int(number)


def _stored_frequencies(document: Mapping[str, Any] | None) -> _Frequencies | None:
    if not document:
        return None
    try:
        return (
            document["epoch"]["frequency_steps"],
            document["step"]["frequency_steps"],
            document["time"]["frequence_seconds"],  # AReaL's spelling
        )
    except (KeyError, TypeError):
        return None


def _say(frequencies: _Frequencies) -> str:
    units = zip(frequencies, ("epochs", "steps", "seconds"), strict=True)
    return " or ".join(f"every {value} {unit}" for value, unit in units if value) or "never"


def _controls(frequencies: _Frequencies, numbers: StepNumbers, now_s: float) -> dict[str, Any]:
    epochs, steps, seconds = frequencies
    ended = numbers.steps_per_epoch > 0 and numbers.epoch_step == numbers.steps_per_epoch - 1
    done_epochs = numbers.epoch + ended
    return {
        "epoch": _control(now_s, done_epochs, steps=epochs),
        "step": _control(now_s, numbers.step + 1, steps=steps),
        "time": _control(now_s, numbers.step + 1, seconds=seconds),
    }


def _control(now_s: float, count: int, *, steps: int | None = None, seconds: int | None = None) -> dict[str, Any]:
    return {
        "frequence_seconds": seconds,
        "frequency_steps": steps,
        "start_time": now_s,
        "steps": count,
        "last_time": now_s,
        "last_steps": count,
        "interval_steps": 0,
        "interval_seconds": 0.0,
        "initial_value": False,
    }


def _dataloader(numbers: StepNumbers, config: RunConfig | None, world_size: int, era: str) -> tuple[pickled.Value, str]:
    """The dataloader's state, and what it means for the order of the data.

    An empty state is "start of an epoch" to torchdata's StatefulDataLoader, for any world size and any number of workers:
    exact after an epoch's last step. In the middle of an epoch the cursor of a loader without workers is three counters;
    where it shuffles by itself, as up to v0.3, its generator too: without that it begins the epoch again, and counts on.
    """
    if numbers.epoch_step == numbers.steps_per_epoch - 1:
        return {}, "data order: exact (the step ended its epoch)"
    if era == "A" and (config is None or config.get("train_dataset.shuffle", True) is not False):
        return {}, (
            f"data order: starts again at the beginning of epoch {numbers.epoch} "
            "(AReaL up to v0.3 shuffles by a generator whose state is in its recover_info alone)"
        )
    batch = config.get("train_dataset.batch_size") if config else None
    workers = config.get("train_dataset.num_workers") if config else None
    ranks = data_parallel_world(config.text("allocation_mode")) if config else 0
    if world_size and ranks != world_size:
        ranks = 0  # tensor-parallel ranks share a batch: only a trainer that is data-parallel alone is sure
    if type(batch) is int and workers == 0 and ranks > 0 and batch % ranks == 0:
        cursor = _cursor(numbers.epoch_step + 1, batch // ranks)
        on = "1 rank" if ranks == 1 else f"{ranks} ranks"
        note = f"data order: goes on after batch {numbers.epoch_step + 1} of the epoch, on {on}"
        return [cursor for _ in range(ranks)], note
    why = (
        "no YAML tells its batch size"
        if config is None
        else "the YAML has no number as train_dataset.batch_size"
        if type(batch) is not int
        else "the YAML does not say train_dataset.num_workers: 0"
        if workers != 0
        else f"{batch} samples a batch do not divide by the ranks, or the YAML does not tell these"
    )
    return {}, f"data order: starts again at the beginning of epoch {numbers.epoch} ({why})"


def _cursor(batches: int, rank_batch: int) -> dict[str, pickled.Value]:
    """Torchdata's StatefulDataLoader.state_dict() with num_workers=0 after `batches` batches."""
    return {
        "_index_sampler_state": None,
        "_sampler_iter_state": {"samples_yielded": batches * rank_batch},
        "_sampler_iter_yielded": batches,
        "_num_yielded": batches,
        "_IterableDataset_len_called": None,
        "_shared_seed": None,
        "fetcher_state": None,
        "dataset_state": None,
        "_iterator_finished": False,
    }


_TRAINER = re.compile(r"(?:([a-z]+)[.:])?((?:[dptc]\d+)+)")
_INFERENCE = frozenset({"sglang", "vllm"})


def data_parallel_world(allocation_mode: str) -> int:
    """Ranks of a trainer that is data-parallel only, from AReaL's allocation_mode ("sglang.d4p1t1+d4p1t1"); 0: unknown."""
    match = _TRAINER.fullmatch(allocation_mode.strip().rpartition("+")[2])
    if not match or match[1] in _INFERENCE:
        return 0
    sizes = {axis: int(count) for axis, count in re.findall(r"([dptc])(\d+)", match[2])}
    return sizes.get("d", 0) if all(sizes.get(axis, 1) == 1 for axis in "ptc") else 0
