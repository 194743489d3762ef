"""The health of a checkpoint, from the metrics recorded around its step.

A checkpoint of step N is written after N's update and before N's metrics can be seen. Its own step's metrics tell what it
was updated with; the next step's, what its weights then did. So:

bad      its own step lies in a stretch of bad steps that used up a rule's patience, or after one that the run ended in
suspect  its own step is bad, but the stretch was short, or the run ended in it; or a long one ended only just before it; or
         the next step is NaN, or went bad while the inference server was alive: then its weights are the likeliest cause; or
         its own step is not recorded, and a bad stretch begins with the next one that is
good     its own step is good, or those around it where metrics are recorded only now and then
unknown  nothing tells: no metrics, none at or after its step, or none that was ever good (a cold start); or it is 0 where 0 is
         usual in this run, and nobody has chosen a rule (a sparse reward)
"""

from __future__ import annotations

import functools
import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ckptstore import importing
from ckptstore import ledger as ledgers
from ckptstore.ledger import Judges, Ledger, Line, Record
from ckptstore.metric_names import match
from ckptstore.model import Checkpoint
from ckptstore.rules import Collapse, Rule, Sign, Zero, server_rule
from ckptstore.streak import Watch

#: Metrics so many steps away say nothing about a step.
NEAR_STEPS = 20
#: Where more of the steps between good ones are bad, and so many stretches ended by themselves, a rule that nobody chose does
#: not fit the run: a sparse reward.
SPARSE = 0.25
SPARSE_STRETCHES = 4
#: But a stretch so many times as long as any that the run came out of is none of the usual ones.
UNUSUAL = 3
#: A fall that is said, and changes no health: data that turns harder looks the same. Where somebody chose a `collapse`, or
#: watches something else than a reward, nothing is said. (docs/circuit-breaker.md has the figures.)
FALL, FALL_HALFLIFE_STEPS = 0.5, 200.0


class Health(StrEnum):
    """Best first."""

    GOOD = "good"
    UNKNOWN = "unknown"
    SUSPECT = "suspect"
    BAD = "bad"

    @property
    def resumable(self) -> bool:
        """Whether one resumes from it without being told to."""
        return self in (Health.GOOD, Health.UNKNOWN)


_WORST_LAST = tuple(Health)


class Verdict(NamedTuple):
    """A checkpoint's health and why. `value` is the first rule's metric at its own step, None where it is not recorded.

    `fallen`, which `why` ends with: that the reward of a good one is far below what it was.
    """

    health: Health
    why: str
    value: float | None = None
    metric: str = ""
    fallen: str = ""


class Stretch(NamedTuple):
    """Bad steps in a row, by one rule. `last_step` is the last bad one; `over`: a good step followed."""

    rule: Rule
    key: str  #: of the metric, as it was recorded
    said: str
    first_step: int
    last_step: int
    steps: int
    over: bool
    confirmed: bool  #: whether it used up the rule's patience

    def __str__(self) -> str:
        if self.steps == 1:
            return f"{self.key} {self.said} at step {self.first_step}"
        return f"{self.key} {self.said} at {self.steps} steps in a row, from step {self.first_step} on"


class _Seen(NamedTuple):
    step: int
    sign: Sign
    armed: bool
    value: float | None


@dataclass(frozen=True)
class Track:
    """One rule's view of a line of history: the steps that were not silent, and the bad stretches."""

    rule: Rule
    key: str  #: of its metric, as it was recorded last
    seen: tuple[_Seen, ...]
    stretches: tuple[Stretch, ...]

    @functools.cached_property
    def bad_between(self) -> float:
        """The share of bad steps (not of NaN) between the first good one and the last."""
        good = [at for at, item in enumerate(self.seen) if item.sign is Sign.GOOD]
        between = self.seen[good[0] : good[-1]] if good else ()
        bad = sum(item.sign is Sign.BAD and (item.value is None or math.isfinite(item.value)) for item in between)
        return bad / len(between) if between else 0.0

    def is_usual(self, step: int) -> bool:
        """Whether a bad step, or one beside it, is what this run is used to."""
        usual = [stretch.steps for stretch in self.stretches if stretch.over]
        if len(usual) < SPARSE_STRETCHES or self.bad_between <= SPARSE:
            return False
        unusual = (stretch for stretch in self.stretches if not stretch.over and stretch.steps > UNUSUAL * max(usual))
        return not any(stretch.first_step <= step for stretch in unusual)


@dataclass(frozen=True, slots=True)
class Replay:
    """What all rules say of a line of history; `server` is what the aliveness metrics say, by step."""

    tracks: tuple[Track, ...]
    server: dict[int, bool]  #: step → alive
    falls: tuple[tuple[int, int], ...] = ()  #: of the reward, where no rule judges that: from a step on, up to another

    @property
    def stretches(self) -> list[Stretch]:
        """All rules' bad stretches, by first step."""
        return sorted((stretch for track in self.tracks for stretch in track.stretches), key=lambda found: found.first_step)


def replay(line: Line, judges: Judges) -> Replay:
    """Judge a line of history anew, from its first step on."""
    server: dict[int, bool] = {}
    for name in judges.alive:
        for seen in _track(line, server_rule(name)).seen:
            server[seen.step] = server.get(seen.step, True) and seen.sign is Sign.GOOD
    return Replay(tuple(_track(line, rule) for rule in judges.rules), server, _falls(line, judges.rules))


def _falls(line: Line, rules: Sequence[Rule]) -> tuple[tuple[int, int], ...]:
    if not rules or not isinstance(rules[0], Zero) or any(isinstance(rule, Collapse) for rule in rules):
        return ()
    rule = Collapse(metric=rules[0].metric, drop=FALL, halflife_steps=FALL_HALFLIFE_STEPS)
    track = _track(line, rule)
    if any(item.value is not None and item.value < 0 for item in track.seen):
        return ()  # half of what is below 0, or about 0, says nothing
    falls: list[tuple[int, int]] = []
    first, low, high = -1, 0, rule.patience  # steps in a row below and above; a fall ends as it begins, by `patience` of them
    for seen in track.seen:
        if seen.sign is Sign.BAD:
            first = seen.step if not low and high >= rule.patience else first
            low, high = low + 1, 0
            if low == rule.patience and (not falls or falls[-1][1] < first):
                falls.append((first, ledgers.MAX_STEP))
        else:
            low, high = 0, high + 1
            if high == rule.patience and falls and falls[-1][1] == ledgers.MAX_STEP:
                falls[-1] = (falls[-1][0], seen.step)
    return tuple(falls)


class Reader:
    """Gives metrics of one step by name; remembers under which key each was found. Not thread-safe."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.metrics: dict[str, float] = {}

    def __call__(self, name: str) -> float | None:
        """The value of the metric that `name` means, None where this step has none."""
        key = self.keys.get(name)
        value = self.metrics.get(key) if key is not None else None
        if value is None and (found := match(name, self.metrics)) is not None:
            self.keys[name] = found
            value = self.metrics[found]
        return value


def _track(line: Line, rule: Rule) -> Track:
    watch, read = Watch(rule), Reader()
    was_armed = watch.armed
    seen: list[_Seen] = []
    stretches: list[Stretch] = []
    for record in line:
        read.metrics = dict(record.metrics)
        before = _stretch(rule, read, watch, seen[-1].step, over=True) if watch.streak else None
        sign = watch.look(read, record.step)
        if sign is Sign.SILENT:
            continue
        if before is not None and not watch.streak and (was_armed or before.confirmed):
            stretches.append(before)
        was_armed = watch.armed
        seen.append(_Seen(record.step, sign, watch.armed, read(rule.metric)))
    if watch.streak and (watch.armed or watch.tripped):  # NaN from the start, and not for long, tells nothing
        stretches.append(_stretch(rule, read, watch, seen[-1].step, over=False))
    return Track(rule, read.keys.get(rule.metric, rule.metric), tuple(seen), tuple(stretches))


def _stretch(rule: Rule, read: Reader, watch: Watch, last_step: int, *, over: bool) -> Stretch:
    key = read.keys.get(rule.metric, rule.metric)
    named = "" if key == "-" else key
    return Stretch(rule, named, watch.said, watch.since, last_step, watch.streak, over, watch.tripped)


def replay_of(ledger: Ledger, branch: int = -1) -> Replay:
    """The replay of a branch's line, made once for each ledger."""
    branch = branch % len(ledger.branches) if ledger.branches else -1
    if branch not in ledger.replays:
        ledger.replays[branch] = replay(ledger.line(branch), ledger.judges)
    found: Replay = ledger.replays[branch]
    return found


def ledger_of(run: str) -> Ledger:
    """The ledger of a run given by its folder, with what the trainer's log tells where nobody recorded while it trained.

    Empty where neither has a metric.
    """
    path = ledgers.path_in(ledgers.side_of(run))
    found = ledgers.read(path)
    logged = _logged(run, found)
    return ledgers.read(path, logged=logged) if logged else found


def keep_log(run: str) -> None:
    """Record what the trainer's log tells, where nobody did: what is trained from now on may be watched, and the log gone.

    The side folder must exist. OSError where it cannot be written.
    """
    writer = ledgers.Writer(ledgers.path_in(ledgers.side_of(run)))
    found = ledgers.read(writer.path)
    if fresh := importing.new_to(found, _logged(run, found)):
        writer.records(fresh, imported_at_s=time.time())
        writer.sync()
        writer.close()
    if writer.lost is not None:
        raise writer.lost


def _logged(run: str, found: Ledger) -> tuple[Record, ...]:
    """What the trainer's log tells beside a ledger: all of it, or where a breaker once recorded what came later."""
    newest_s = max((branch[-1].at_s for branch in found.branches), default=0.0)
    return importing.of_run(run, after_s=newest_s if found.observed else 0.0)


def of(checkpoint: Checkpoint, ledger: Ledger) -> Verdict:
    """The health of a checkpoint, and why. Reads nothing but what it is given."""
    if checkpoint.step < 0:
        return Verdict(Health.UNKNOWN, "its step is unknown")
    return at_step(checkpoint.step, ledger, saved_at_s=checkpoint.saved_at_s)


def at_step(step: int, ledger: Ledger, *, saved_at_s: float) -> Verdict:
    """The health of a checkpoint of `step` that was saved at `saved_at_s` (Unix time)."""
    if not ledger:
        return Verdict(Health.UNKNOWN, "no metrics are recorded")
    found = replay_of(ledger, ledger.branch_of(step, saved_at_s))
    verdicts = [_by_rule(step, track, found.server) for track in found.tracks]
    if ledger.judges is ledgers.DEFAULT_JUDGES:  # nobody has said what is bad in this run
        verdicts = [_or_usual(step, track, verdict) for track, verdict in zip(found.tracks, verdicts, strict=True)]
    if not verdicts:
        return Verdict(Health.UNKNOWN, "nothing judges its metrics")
    # The first rule is what the run is about; of the others only what is wrong counts.
    worst = max(verdicts, key=lambda verdict: _WORST_LAST.index(verdict.health))
    chosen = verdicts[0] if worst.health.resumable else worst
    chosen = chosen._replace(value=verdicts[0].value, metric=verdicts[0].metric)
    return _with_fall(chosen, step, found.falls) if chosen.health is Health.GOOD else chosen


def _with_fall(verdict: Verdict, step: int, falls: Sequence[tuple[int, int]]) -> Verdict:
    for first, end in falls:
        if first <= step < end:
            fallen = f"since step {first} it is less than half of what it was"
            return verdict._replace(why=f"{verdict.why}; {fallen}", fallen=fallen)
    return verdict


def _or_usual(step: int, track: Track, verdict: Verdict) -> Verdict:
    if verdict.health.resumable or not track.is_usual(step) or not math.isfinite(verdict.value or 0.0):
        return verdict
    why = f"{track.key} {track.rule.said} at {track.bad_between:.0%} of the steps between good ones: usual, which tells nothing"
    return verdict._replace(health=Health.UNKNOWN, why=why)


def _by_rule(step: int, track: Track, server: dict[int, bool]) -> Verdict:
    seen = track.seen
    at = bisect_left(seen, step, key=lambda item: item.step)
    own = seen[at] if at < len(seen) and seen[at].step == step else None
    value = own.value if own else None
    metric = track.key

    def verdict(health: Health, why: str) -> Verdict:
        return Verdict(health, why, value, metric)

    before = at - 1 if at else None
    after = at + 1 if own else at
    for stretch in track.stretches:
        if stretch.first_step <= step and (step <= stretch.last_step or not stretch.over):
            if stretch.confirmed or not stretch.over:
                return verdict(Health.BAD if stretch.confirmed else Health.SUSPECT, str(stretch))
            return verdict(Health.SUSPECT, f"{stretch}, then it was good again")
    for stretch in track.stretches:
        if stretch.confirmed and stretch.over and stretch.last_step < step:
            good = sum(item.sign is Sign.GOOD for item in seen if stretch.last_step < item.step <= step)
            if good < track.rule.patience:
                return verdict(Health.SUSPECT, f"{good} good steps since {stretch}")
    following = seen[after] if after < len(seen) and seen[after].step - step <= NEAR_STEPS else None
    if following is not None and following.sign is Sign.BAD and following.armed:
        if following.value is not None and not math.isfinite(following.value):
            return verdict(Health.SUSPECT, f"{metric} is {following.value} at step {following.step}, right after it")
        begun = next((stretch for stretch in track.stretches if stretch.first_step == following.step), None)
        if own is None and begun is not None and (begun.confirmed or not begun.over):
            return verdict(Health.SUSPECT, f"its own step is not recorded, the next that is, {following.step}, went bad")
        if server.get(following.step, False):
            what = f"{metric} went bad at step {following.step}, right after it, while the inference server was alive"
            return verdict(Health.SUSPECT, what)
    if own is not None:
        if own.sign is Sign.GOOD:
            return verdict(Health.GOOD, f"{metric} is {_shown(own.value)}")
        return verdict(Health.UNKNOWN, f"{metric} {track.rule.said} from the start: it never was good before step {step}")
    if not seen:
        return verdict(Health.UNKNOWN, f"{metric} is not recorded")
    around = [seen[i] for i in (before, after) if i is not None and i < len(seen) and abs(seen[i].step - step) <= NEAR_STEPS]
    if len(around) == 2 and all(item.sign is Sign.GOOD for item in around):
        return verdict(Health.GOOD, f"{metric} is {_shown(around[0].value)} at step {around[0].step}, {around[1].step} is good")
    if after >= len(seen):
        return verdict(Health.UNKNOWN, f"the run's metrics end at step {seen[-1].step}, before it")
    return verdict(Health.UNKNOWN, f"no metrics are recorded near step {step}")


def _shown(value: float | None) -> str:
    return "present" if value is None else f"{value:.4g}"


def last_good(checkpoints: Sequence[Checkpoint], ledger: Ledger, *, before_step: int) -> Checkpoint | None:
    """The newest usable checkpoint before a step whose health is good; else the newest of unknown health; else None. None that
    training has left.
    """
    usable = [c for c in checkpoints if c.status.usable and 0 <= c.step < before_step and not c.left]
    usable.sort(key=lambda checkpoint: checkpoint.step, reverse=True)
    verdicts = [(of(checkpoint, ledger).health, checkpoint) for checkpoint in usable]
    for wanted in (Health.GOOD, Health.UNKNOWN):
        for health, checkpoint in verdicts:
            if health is wanted:
                return checkpoint
    return None
