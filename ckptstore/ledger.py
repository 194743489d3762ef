"""The ledger: what the metrics were at each step, one JSON line each, in the run's side folder. Only ever appended to.

A crash can tear the last line: it is passed over when read, and closed with a newline before the next is written. Lines that
cannot be understood are counted and ignored. Steps are global steps, 0-based; times are Unix seconds.

    {"ledger":1,"at":…,"rules":[…],"alive":[…]}                 what judged the steps that follow
    {"step":187,"at":…,"m":{"grpo_actor/task_reward/avg":0.0}}  "nan", "inf", "-inf" stand for what JSON lacks
    {"step":99,"at":…,"m":{…},"imported":…}                     the same, brought later; when it was
    {"event":"trip","step":196,"at":…,"since":187}              also: reset, of what comes before it in the file

A run that went back (resumed from step 140 after step 240) has two lines of history: `Ledger.line` follows one of them, and
a checkpoint is looked up in the one during which it was saved.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckptstore import places
from ckptstore import side as side_folders
from ckptstore.errors import UsageError, from_os_error
from ckptstore.rules import ALIVE, Rule, default_rules, parse
from ckptstore.untrusted import open_regular

side_of = places.side_of
path_in = places.ledger_in
VERSION = 1
RESET = "reset"  #: the event after which what came before it is forgiven
MAX_LINE_BYTES = 1 << 20
MAX_BYTES = 256 << 20  #: of a ledger, from its end: a quarter of a million steps with a kilobyte each
MAX_METRICS = 4096  #: of one line
MAX_STEP = 1 << 53
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Record(NamedTuple):
    """One step's metrics. `at_s` is 0 where the time is unknown. `resets`: as many came before it, in the order of the file,
    whatever the clocks said; 0 for what was imported.
    """

    step: int
    at_s: float
    metrics: Mapping[str, float]
    resets: int = 0


class Judges(NamedTuple):
    """What tells good steps from bad ones: rules, and metrics that show whether the inference server is alive."""

    rules: tuple[Rule, ...]
    alive: tuple[str, ...] = ALIVE


DEFAULT_JUDGES = Judges(default_rules())


class Event(NamedTuple):
    """Something that happened at a step: trip, reset."""

    name: str
    step: int
    at_s: float
    since_step: int


Line = tuple[Record, ...]
"""Records by rising step."""


@dataclass(frozen=True)
class Ledger:
    """All that was recorded of a run, sorted out. Immutable."""

    branches: tuple[Line, ...] = ()  #: in order of time; each but the first begins with a step back
    events: tuple[Event, ...] = ()
    judges: Judges = DEFAULT_JUDGES
    damaged_lines: int = 0
    observed: bool = False  #: whether any of it was recorded while it happened
    logged: bool = False  #: whether the trainer's log tells some of it
    _lines: dict[int, Line] = field(default_factory=dict, repr=False, compare=False)
    replays: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)  #: of health.py alone

    def __bool__(self) -> bool:
        return bool(self.branches)

    def line(self, branch: int = -1, *, before_step: int | None = None) -> Line:
        """The history that ends with a branch (-1: the newest): its records, and those that led to its first step."""
        if not self.branches:
            return ()
        branch %= len(self.branches)
        if branch not in self._lines:
            pieces: list[Line] = []
            start = MAX_STEP
            for records in reversed(self.branches[: branch + 1]):
                if records[0].step < start:
                    pieces.append(records[: bisect_left(records, start, key=_step)])
                    start = records[0].step
            self._lines[branch] = tuple(record for piece in reversed(pieces) for record in piece)
        line = self._lines[branch]
        return line if before_step is None else line[: bisect_left(line, before_step, key=_step)]

    def branch_of(self, step: int, saved_at_s: float) -> int:
        """The branch during which a checkpoint of `step` was saved at `saved_at_s`; -1 (the newest) where there is none.

        A save comes after the metrics of the step before, and before its own. Where the times tell nothing (a copy, an
        import without times), the newest branch that reaches the step.
        """
        reaching = -1
        count = len(self.branches)
        for branch in range(count - 1, max(count - MAX_BRANCHES, 0) - 1, -1):
            line = self.line(branch)
            at = bisect_left(line, step, key=_step)
            after = at == 0 or line[at - 1].at_s <= saved_at_s + CLOCK_SKEW_S
            reaches = at < len(line)
            # A run that died before it recorded the step's metrics ends with the step before.
            before = line[at].at_s + CLOCK_SKEW_S >= saved_at_s if reaches else line[-1].step >= step - 1
            if after and before:
                return branch
            if reaching < 0 and reaches:
                reaching = branch
        return reaching


#: How far the clocks of the trainer and of the file server may be apart.
CLOCK_SKEW_S = 5.0
#: A run does not go back more often; looking further would take quadratic time.
MAX_BRANCHES = 64


def _step(record: Record) -> int:
    return record.step


def read(path: str, *, logged: Iterable[Record] = ()) -> Ledger:
    """Read a ledger; an empty one where there is no file. StorageError or AccessError where it cannot be read.

    `logged`: what the trainer's log tells, in its order, is taken in too.
    """
    try:
        with open_regular(path) as file:
            file.seek(max(os.fstat(file.fileno()).st_size - MAX_BYTES, 0))
            return from_lines(_lines_of(file), logged=logged)
    except FileNotFoundError:
        return from_lines((), logged=logged)
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path) from error


def _lines_of(file: Any) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES):
        yield line


def from_lines(lines: Iterable[bytes], *, logged: Iterable[Record] = ()) -> Ledger:
    """Sort out the lines of a ledger, and what a log tells beside it. Never raises for what they hold."""
    blocks: dict[float, list[Record]] = {0.0: []}  # what was recorded at the time; then each import
    events: list[Event] = []
    judges = DEFAULT_JUDGES
    damaged, newest_s, resets = 0, 0.0, 0

    def placed(record: Record) -> Record:
        nonlocal newest_s
        newest_s = record.at_s or newest_s  # one without a time keeps its place in the file
        return record._replace(at_s=newest_s)

    for line in lines:
        if not line.strip():
            continue
        parsed = _parse(line)
        if isinstance(parsed, _Recorded):
            record = placed(parsed.record)
            blocks.setdefault(parsed.imported_at_s, []).append(
                record if parsed.imported_at_s else record._replace(resets=resets)
            )
        elif isinstance(parsed, Event):
            events.append(parsed)
            resets += parsed.name == RESET
        elif isinstance(parsed, Judges):
            judges = parsed
        else:
            damaged += parsed is None
    # An import brings old steps late: time says where they belong. Within a block the order in the file does: a clock that
    # was set, or another machine's, must not mix what came one after the other.
    told = [placed(record) for record in logged]
    records = list(heapq.merge(*blocks.values(), told, key=lambda record: record.at_s))
    return Ledger(_branches(records), tuple(events), judges, damaged, observed=bool(blocks[0.0]), logged=bool(told))


class _Recorded(NamedTuple):
    record: Record
    imported_at_s: float  #: which import brought it; 0: none


def _parse(line: bytes) -> _Recorded | Event | Judges | bool | None:
    """What a line says; None for damage, True for what a newer version wrote."""
    if not line.lstrip().startswith(b"{"):  # JSON's guess at the encoding of zeros takes long
        return None
    try:
        document = json.loads(line)
        return _understood(document) if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        return None


def _understood(document: dict[str, Any]) -> _Recorded | Event | Judges | bool | None:
    if "ledger" in document:
        with contextlib.suppress(UsageError):
            alive = document.get("alive")
            names = tuple(name for name in alive if isinstance(name, str)) if isinstance(alive, list) else ALIVE
            return Judges(parse(document.get("rules")), names)
        return True
    step, at_s = document.get("step"), _number(document.get("at", 0))
    if type(step) is not int or not 0 <= step < MAX_STEP or at_s is None or not 0 <= at_s < 1e12:
        return None
    if "event" in document:
        since = document.get("since")
        return Event(str(document["event"])[:40], step, at_s, since if type(since) is int and -1 <= since < MAX_STEP else step)
    metrics = document.get("m")
    if not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
        return None
    values = {key: value for key, given in metrics.items() if (value := _number(given)) is not None}
    imported_at_s = _number(document.get("imported", 0))
    return _Recorded(Record(step, at_s, values), imported_at_s if imported_at_s and math.isfinite(imported_at_s) else 0.0)


def _number(value: Any) -> float | None:
    if type(value) is float:
        return value
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return _WORDS.get(value) if isinstance(value, str) else None


def _branches(records: list[Record]) -> tuple[Line, ...]:
    branches: list[Line] = []
    current: list[Record] = []
    for record in records:
        if current and record.step == current[-1].step:
            old = current[-1]
            resets = max(old.resets, record.resets)
            current[-1] = Record(record.step, record.at_s, {**old.metrics, **record.metrics}, resets)
        elif not current or record.step > current[-1].step:
            current.append(record)
        else:
            branches.append(tuple(current))
            current = [record]
    return (*branches, tuple(current)) if current else ()


class Writer:
    """Appends to a ledger. One process at a time writes a run's; a full disk costs the record, never the training.

    Each line reaches the kernel in one write: a crash of the process loses none. `sync` makes them survive a power cut.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.lost: OSError | None = None  #: the last failure, None when the last line was written
        self._descriptor = -1
        self._names: dict[str, str] = {}  #: metrics' names as JSON

    def record(self, step: int, at_s: float, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics."""
        self._write(self._record_line(step, at_s, metrics))

    def records(self, records: Iterable[Record], *, imported_at_s: float) -> None:
        """Append what was recorded elsewhere, in its order, in one write as far as the system allows."""
        mark = f',"imported":{imported_at_s:.6f}}}\n'.encode()
        self._write(b"".join(self._record_line(one.step, one.at_s, one.metrics).removesuffix(b"}\n") + mark for one in records))

    def event(self, name: str, step: int, at_s: float, *, since_step: int) -> None:
        """Append something that happened."""
        self._append({"event": name, "step": max(step, 0), "at": round(at_s, 3), "since": since_step})

    def judges(self, judges: Judges, at_s: float) -> None:
        """Append what judges the steps from here on."""
        rules = [rule.spec() for rule in judges.rules]
        self._append({"ledger": VERSION, "at": round(at_s, 3), "rules": rules, "alive": list(judges.alive)})

    def sync(self) -> None:
        """Have the disk confirm what was written."""
        if self._descriptor >= 0:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self.lost = error

    def close(self) -> None:
        """Close the file; the next line would open it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _record_line(self, step: int, at_s: float, metrics: Mapping[str, float]) -> bytes:
        # By hand, since it is done at every step: three times as fast as json.dumps. The repr of a finite float is JSON.
        shown = []
        for key, value in metrics.items():
            name = self._names.get(key) or self._names.setdefault(key, json.dumps(key))
            shown.append(f"{name}:{value!r}" if math.isfinite(value) else f'{name}:"{_word(value)}"')
        return f'{{"step":{step},"at":{at_s:.3f},"m":{{{",".join(shown)}}}}}\n'.encode()

    def _append(self, document: Mapping[str, Any]) -> None:
        self._write(_line(document))

    def _write(self, data: bytes) -> None:
        try:
            if self._descriptor < 0:
                self._descriptor = self._open()
            while data:
                data = data[os.write(self._descriptor, data) :]
            self.lost = None
        except OSError as error:
            self.lost = error
            self.close()  # what is there may be torn now: _open closes the line

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o644)
        try:
            size_bytes = os.fstat(descriptor).st_size
            if not size_bytes:
                with contextlib.suppress(OSError):
                    side_folders.sync_folder(os.path.dirname(self.path))
            elif os.pread(descriptor, 1, size_bytes - 1) != b"\n" and os.write(descriptor, b"\n") != 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), self.path)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _word(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
