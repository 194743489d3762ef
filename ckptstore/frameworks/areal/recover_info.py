"""recover_info/: the step counter and states that belong to the recover slot (areal/utils/recover.py).

Six files, five of them JSON. `dataloader_info.pkl` is a pickle: its size is looked at, its content never.
`step_info.json` names the step that was *finished*; the trainer goes on at global_step + 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ckptstore.backends.base import Backend
from ckptstore.errors import CkptStoreError, NotFoundError
from ckptstore.formats import FormatError, inert
from ckptstore.frameworks.areal.layout import CLOCK_SKEW_NS, RECOVER_INFO
from ckptstore.native import Folder
from ckptstore.untrusted import OUT_OF_RANGE

STEP_INFO = "step_info.json"
STEP_FIELDS = ("epoch", "epoch_step", "global_step", "steps_per_epoch")
CONTROLS = ("saver_info.json", "evaluator_info.json", "checkpoint_info.json")
STATS_LOGGER = "stats_logger_info.json"
DATALOADER = "dataloader_info.pkl"
FILES = (STEP_INFO, *CONTROLS, STATS_LOGGER, DATALOADER)
CONTROL_FIELDS = frozenset(
    {
        "frequence_seconds", "frequency_steps", "start_time", "steps", "last_time",
        "last_steps", "interval_steps", "interval_seconds", "initial_value",
    }
)  # fmt: skip
MAX_JSON_BYTES = 1 << 20
MAX_PICKLE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class RecoverInfo:
    """What recover_info/ says. `problems` is empty when AReaL would load it."""

    step: int  #: the finished global step, -1 when it cannot be read
    epoch: int
    epoch_step: int
    steps_per_epoch: int
    holds: tuple[str, ...]  #: of step, saver, evaluator, checkpoint, stats_logger, dataloader
    problems: tuple[str, ...]
    mtime_ns: int  #: of the newest of its files
    dataloader_bytes: int

    @property
    def resumes_at(self) -> int:
        """The global step that the trainer would do first."""
        return self.step + 1


def read(backend: Backend, folder: Folder | None, *, as_dumped: bool = False) -> RecoverInfo | None:
    """Read `recover_info/` of the run that `backend` is rooted at; None when it is missing or empty.

    `as_dumped`: its times are those at which the trainer wrote it. That writes STEP_INFO first, in place: where a file is
    older, the dump was cut short, and AReaL would go on after the new step with the data and the timers of an old one.
    """
    if folder is None:
        return None
    present = {entry.name: entry for entry in folder.entries if entry.name in FILES}
    if not present:
        return None
    problems = [f"{name} is missing" for name in FILES if name not in present]
    documents: dict[str, dict[str, Any]] = {}
    for name in (STEP_INFO, *CONTROLS, STATS_LOGGER):
        if name in present:
            document, problem = _read_json(backend, f"{RECOVER_INFO}/{name}", present[name].size_bytes)
            if problem:
                problems.append(f"{name} {problem}")
            else:
                documents[name] = document
    step = documents.get(STEP_INFO, {})
    numbers = {key: value for key in STEP_FIELDS if type(value := step.get(key)) is int and 0 <= value < OUT_OF_RANGE}
    if STEP_INFO in documents and set(step) != set(STEP_FIELDS):
        problems.append(f"{STEP_INFO} has the fields {sorted(step)}, and AReaL accepts exactly {sorted(STEP_FIELDS)}")
    elif STEP_INFO in documents and len(numbers) != len(STEP_FIELDS):
        problems.append(f"{STEP_INFO} holds something that is not a whole number from 0")
    for name in CONTROLS:
        for control in ("epoch", "step", "time"):
            inner = documents.get(name, {}).get(control)
            if name in documents and not (isinstance(inner, dict) and inner.keys() >= CONTROL_FIELDS):
                problems.append(f"{name} lacks fields of its {control!r} control: AReaL would crash on it")
    if DATALOADER in present and not present[DATALOADER].size_bytes:
        problems.append(f"{DATALOADER} is empty")
    if as_dumped and STEP_INFO in present:
        cut_ns = present[STEP_INFO].mtime_ns - CLOCK_SKEW_NS
        older = [name for name in FILES if name in present and present[name].mtime_ns < cut_ns]
        problems += [f"{name} is older than {STEP_INFO}: its dump was cut short" for name in older]
    holds = [name.removesuffix("_info.json") for name in documents]
    if DATALOADER in present and present[DATALOADER].size_bytes:
        holds.append("dataloader")
    return RecoverInfo(
        step=numbers.get("global_step", -1),
        epoch=numbers.get("epoch", -1),
        epoch_step=numbers.get("epoch_step", -1),
        steps_per_epoch=numbers.get("steps_per_epoch", -1),
        holds=tuple(holds),
        problems=tuple(problems),
        mtime_ns=max(entry.mtime_ns for entry in present.values()),
        dataloader_bytes=present[DATALOADER].size_bytes if DATALOADER in present else 0,
    )


def saved_ranks(pickled: bytes) -> int:
    """For how many ranks `dataloader_info.pkl` was saved; 0 for any number, or where it cannot be told.

    AReaL refuses another number, and then starts from step 0. The pickle is read as data: nothing in it is run or imported.
    """
    try:
        state = inert.read(pickled, lambda name: True)
    except FormatError:
        return 0
    return len(state) if isinstance(state, list) and not isinstance(state, inert.Pairs) else 0


def stored_controls(backend: Backend) -> dict[str, dict[str, Any]]:
    """What each frequency control stored: file name → document; unreadable ones are left out."""
    found = {name: _read_json(backend, f"{RECOVER_INFO}/{name}", 0) for name in CONTROLS}
    return {name: document for name, (document, problem) in found.items() if not problem}


def contents(backend: Backend) -> dict[str, bytes]:
    """All files of recover_info/ that AReaL reads, as bytes; the pickle is copied, never opened."""
    return {name: backend.get(f"{RECOVER_INFO}/{name}", length_bytes=MAX_PICKLE_BYTES) for name in FILES}


def _read_json(backend: Backend, key: str, size_bytes: int) -> tuple[dict[str, Any], str]:
    """The object in a small JSON file and "", or {} and what is wrong with it."""
    if size_bytes > MAX_JSON_BYTES:
        return {}, f"is {size_bytes:,} bytes: not AReaL's"
    try:
        document = json.loads(backend.get(key, length_bytes=MAX_JSON_BYTES))  # it may have grown
    except NotFoundError:
        return {}, "is missing"
    except CkptStoreError as error:
        return {}, f"cannot be read ({error})"
    except (ValueError, RecursionError):
        return {}, f"is not valid JSON ({size_bytes} bytes: cut short?)"
    return (document, "") if isinstance(document, dict) else ({}, "is not a JSON object")
