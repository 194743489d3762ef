"""Metrics recorded by others, read after the fact: our own ledger, JSONL, CSV (W&B exports among them), AReaL's main.log.

Axis: a checkpoint's number is the global step, 0-based; AReaL's log says "Train step {global step + 1}", and so did its W&B
curves up to v0.5. A column `global_step` is taken as it is; any other step column is taken for the log's unless it holds a 0,
which no log counting from 1 has. `axis` overrules.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from ckptstore import ledger as ledgers
from ckptstore.errors import UsageError, from_os_error
from ckptstore.frameworks.areal import layout
from ckptstore.ledger import MAX_LINE_BYTES, MAX_METRICS, MAX_STEP, Record
from ckptstore.untrusted import open_regular

MAX_COLUMNS = 10_000
_STEP_DONE = "Train step"
_LOG_STEP = re.compile(r"Train step (\d{1,15})(?:/\d+)? done")
_STAMP = re.compile(r"(\d{8})-(\d{2}:\d{2}:\d{2})(?:\.(\d{1,6}))?")
_ISO_STAMP = re.compile(r"(\d{4}-\d{2}-\d{2})[ T](\d{2}:\d{2}:\d{2})")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BARS = re.compile(r"[│|┃]")
_METRIC = re.compile(r"[A-Za-z_][\w./\-:@ ]{0,200}")
_GLOBAL_COLUMNS = ("global_step", "globalstep")
_STEP_COLUMNS = ("step", "_step", "log_step", "train_step", "train step", "train/step", "iteration", "iter")
_GZIP = b"\x1f\x8b"
LAST_WORDS_S = 1800.0  #: a trainer's log may go on for so long behind its last step: a hang, an error, the servers' end
MAX_LOG_BYTES = 64 << 20  #: of the trainer's logs, from the end: a thousand steps and more
_TIME_COLUMNS = ("at", "time", "timestamp", "_timestamp", "wall_time", "ts")


@dataclass(frozen=True, slots=True)
class Import:
    """What a file gave. `axis` says how its steps were understood."""

    records: tuple[Record, ...]
    kind: str  #: ledger, jsonl, csv or log
    axis: str  #: global or log
    passed_over: int  #: lines without a step or without a number


def read(path: str, *, axis: str = "auto") -> Import:
    """Read metrics from a file; what it is shows in its content.

    UsageError where nothing in it is a step with a metric; NotFoundError and other errors of the medium as in errors.py.
    """
    if axis not in ("auto", "global", "log"):
        raise UsageError(f"axis is {axis!r}, and must be auto, global or log")
    try:
        with open(path, "rb") as file:
            plain = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == _GZIP else file  # as logs are rotated
            with io.TextIOWrapper(plain, encoding="utf-8", errors="replace", newline="") as text:
                found = from_text(text, axis=axis)
    except (EOFError, zlib.error) as error:
        raise UsageError(f"{path}: its compressed data is cut short or damaged: {error}") from error
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error
    except csv.Error as error:
        raise UsageError(f"{path}: not CSV: {error}") from error
    if not found.records:
        raise UsageError(
            f"{os.path.basename(path)}: no metrics found in it (read as {found.kind}, {found.passed_over} lines passed over)",
            hint="Understood are JSONL and CSV with a step column, a ledger, and AReaL's main.log.",
        )
    return found


def from_text(file: IO[str], *, axis: str = "auto") -> Import:
    """As `read`, from an open text file; never raises for its content but csv.Error."""
    lines = _lines(file)
    first = next((line for line in lines if line.strip()), "")
    everything = _chain(first, lines)
    if first.lstrip().startswith("{"):
        return _json_lines(everything, axis)
    header = next(csv.reader([first]), [])[:MAX_COLUMNS]
    if any(_plain_name(name) in (*_GLOBAL_COLUMNS, *_STEP_COLUMNS) for name in header) and len(header) > 1:
        return _csv(everything, axis)
    return _log(everything, axis)


def _lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(MAX_LINE_BYTES):
        yield line


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


# --- JSONL -----------------------------------------------------------------------------------------------------------


def _json_lines(lines: Iterator[str], axis: str) -> Import:
    rows: list[tuple[bool, int, float, dict[str, float]]] = []
    passed_over, ours = 0, False
    for line in lines:
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            passed_over += bool(line.strip())
            continue
        if isinstance(document, dict) and ("ledger" in document or "event" in document):
            ours = True
            continue
        row = _row(_flat(document)) if isinstance(document, dict) else None
        if row is None:
            passed_over += 1
        else:
            rows.append(row)
    if ours:
        axis = "global" if axis == "auto" else axis
        rows = [(at, step, time_s, {k.removeprefix("m/"): v for k, v in m.items()}) for at, step, time_s, m in rows]
    return _mapped(rows, "ledger" if ours else "jsonl", axis, passed_over)


def _flat(document: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and depth < 8:
            flat.update(_flat(value, f"{prefix}{key}/", depth + 1))
        elif len(flat) < MAX_METRICS:
            flat[prefix + key] = value
    return flat


def _row(values: Mapping[str, Any]) -> tuple[bool, int, float, dict[str, float]] | None:
    """(step is global, step, time, metrics) of one row."""
    names = {_plain_name(name): name for name in values}
    step_name = next((names[name] for name in (*_GLOBAL_COLUMNS, *_STEP_COLUMNS) if name in names), None)
    step = _whole(values[step_name]) if step_name is not None else None
    if step is None or step_name is None:
        return None
    time_name = next((names[name] for name in _TIME_COLUMNS if name in names), None)
    at_s = _number(values[time_name]) if time_name is not None else None
    numbers = (
        (name, value)
        for name, given in values.items()
        if name not in (step_name, time_name) and (value := _number(given)) is not None
    )
    metrics = dict(itertools.islice(numbers, MAX_METRICS))
    if not metrics:
        return None
    return _plain_name(step_name) in _GLOBAL_COLUMNS, step, at_s if at_s and 0 < at_s < 1e12 else 0.0, metrics


def _plain_name(name: str) -> str:
    return name.strip().strip("\ufeff\"'").lower()


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number < MAX_STEP and number == math.floor(number) else None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = value.strip()
        if not value or len(value) > 64 or "_" in value:
            return None
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv(lines: Iterator[str], axis: str) -> Import:
    # NUL bytes of a torn file would end the parser with an error.
    table = csv.reader(line.replace("\0", "") for line in lines)
    header = [_column(name) for name in next(table)[:MAX_COLUMNS]]
    rows, passed_over = [], 0
    for cells in table:
        row = _row({name: cell for name, cell in zip(header, cells, strict=False) if name})
        if row is None:
            passed_over += bool(cells)
        else:
            rows.append(row)
    return _mapped(rows, "csv", axis, passed_over)


def _column(name: str) -> str:
    """A W&B export calls its columns `run name - metric`, and adds `…__MIN` and `…__MAX`, which are dropped."""
    name = name.strip("\ufeff \"'")
    return "" if name.endswith(("__MIN", "__MAX")) else name.rpartition(" - ")[2]


# --- AReaL's log ------------------------------------------------------------------------------------------------------


def _log(lines: Iterator[str], axis: str) -> Import:
    """Lines "Train step N/M done.", and the tables that follow; of several tables of a step the first one counts."""
    rows: list[tuple[bool, int, float, dict[str, float]]] = []
    at_s = 0.0
    before: deque[str] = deque(maxlen=64)  # nine lines of ten are the inference server's: they are looked at only for a time
    for line in lines:
        step_done = _STEP_DONE in line
        if not step_done and not ("│" in line or "|" in line or "┃" in line):
            before.append(line)
            continue
        line = _COLOUR.sub("", line)
        if step_done and (found := _LOG_STEP.search(line)):
            stamps = (_stamp_s(_COLOUR.sub("", text)) for text in itertools.chain((line,), reversed(before)))
            at_s = next(filter(None, stamps), at_s)
            rows.append((False, int(found[1]), at_s, {}))
        elif rows:
            metrics = rows[-1][3]
            cells = [cell.strip() for cell in _BARS.split(line)][: 2 * (MAX_METRICS - len(metrics))]
            for name, text in itertools.pairwise(cells):
                if text and _METRIC.fullmatch(name) and (value := _number(text)) is not None and _number(name) is None:
                    metrics.setdefault(sys.intern(name), value)
    whole = [row for row in rows if row[3]]
    return _mapped(whole, "log", "log" if axis == "auto" else axis, len(rows) - len(whole))


def _stamp_s(line: str) -> float:
    """The time at a line's start, local as logs have it; 0 without one."""
    head = line[:80]
    try:
        if found := _STAMP.search(head):
            fraction = float(f"0.{found[3]}") if found[3] else 0.0
            return time.mktime(time.strptime(f"{found[1]} {found[2]}", "%Y%m%d %H:%M:%S")) + fraction
        if found := _ISO_STAMP.search(head):
            return time.mktime(time.strptime(f"{found[1]} {found[2]}", "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        pass
    return 0.0


class _State(NamedTuple):
    """A log file as it is now: what was read of it counts as long as this holds."""

    mtime_ns: int
    path: str
    size_bytes: int
    inode: int


def of_run(run: str, *, after_s: float = 0.0) -> tuple[Record, ...]:
    """What the trainer's own log, and those rotated away from it, tell of a run, oldest first; nothing where there is none.

    With `after_s` only what is later, and nothing where the log ends soon after. Files that cannot be read are passed over.
    """
    folder, found = layout.run_ref(run).logs, []
    with contextlib.suppress(OSError), os.scandir(folder or "/nonexistent") as entries:
        for entry in entries:
            if entry.name == layout.MAIN_LOG or entry.name.startswith((f"{layout.MAIN_LOG}.", f"{layout.MAIN_LOG}-")):
                info = entry.stat(follow_symlinks=False)
                found.append(_State(info.st_mtime_ns, entry.path, info.st_size, info.st_ino))
    if not found or (after_s and max(found).mtime_ns / 1e9 < after_s + LAST_WORDS_S):
        return ()
    records = _of_logs(tuple(sorted(found)))
    return tuple(record for record in records if record.at_s > after_s) if after_s else records


@functools.lru_cache(maxsize=1)
def _of_logs(files: tuple[_State, ...]) -> tuple[Record, ...]:
    pieces, left = [], MAX_LOG_BYTES
    for file in reversed(files):
        with contextlib.suppress(OSError), open_regular(file.path) as log:
            if left > 0 and log.read(2) != _GZIP:
                log.seek(max(file.size_bytes - left, 0))
                left -= file.size_bytes
                with io.TextIOWrapper(log, encoding="utf-8", errors="replace", newline="") as text:
                    pieces.append(_log(_lines(text), "auto").records)
    return tuple(itertools.chain.from_iterable(reversed(pieces)))


# --- the axis ---------------------------------------------------------------------------------------------------------


def _mapped(rows: Iterable[tuple[bool, int, float, dict[str, float]]], kind: str, axis: str, passed_over: int) -> Import:
    rows = list(rows)
    if axis == "auto":
        counts_from_0 = any(step == 0 for _, step, _, _ in rows)
        axis = "global" if counts_from_0 or all(is_global for is_global, *_ in rows) else "log"
    shift = axis == "log"
    records = tuple(Record(step - shift, at_s, metrics) for _, step, at_s, metrics in rows if step - shift >= 0)
    return Import(records, kind, axis, passed_over + len(rows) - len(records))


def new_to(ledger: ledgers.Ledger, records: Iterable[Record]) -> list[Record]:
    """Those of `records` that the ledger does not have yet: importing a file twice changes nothing."""
    known: dict[int, list[Record]] = {}
    for branch in ledger.branches:
        for record in branch:
            known.setdefault(record.step, []).append(record)
    return [record for record in records if not any(_within(record, old) for old in known.get(record.step, ()))]


def _within(record: Record, old: Record) -> bool:
    """Whether `old` says all that `record` does, of about the same time (another attempt may give the same numbers)."""
    if record.at_s and abs(record.at_s - old.at_s) > ledgers.CLOCK_SKEW_S:
        return False
    # As text: NaN equals itself.
    return all(name in old.metrics and repr(old.metrics[name]) == repr(value) for name, value in record.metrics.items())
