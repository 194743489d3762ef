"""What makes training bad: small rules over one step's metrics. They combine with `&` and `|`, and know nothing of files.

A rule looks at one step and gives a sign; a Watch counts the signs of one rule into a streak. For every rule:
a value that is NaN or infinite is bad, and never ends a streak; a step without the metric is silent, and neither counts nor
ends a streak; nothing counts until the rule is armed, by default by its first good step (a cold start is legitimately zero).
But a run that has been NaN from its start on, for `nan_patience` steps, is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from typing import Any, ClassVar

from ckptstore.errors import UsageError
from ckptstore.metric_names import is_evaluations, is_loss

REWARD = "grpo_actor/task_reward/avg"
#: Metrics that fall when the inference server dies: answers get short, then there are none.
ALIVE = ("seq_len/avg", "n_seqs")
#: Others than losses may be no number at first (a reward before the first episode ends; a gradient norm while fp16's scale is
#: looked for): so many steps of it are no start.
NAN_START_STEPS = 100
Read = Callable[[str], float | None]
"""Gives a metric's value at this step by its name, None where the step has none."""
Memory = dict[str, Any]
"""What one rule remembers between steps; plain numbers, so that it can be saved."""


class Sign(Enum):
    """What one step says to one rule."""

    GOOD = "good"
    BAD = "bad"
    SILENT = "silent"  #: the metric is missing: neither


class Arm(StrEnum):
    """From when on bad steps count."""

    FIRST_GOOD = "first_good"  #: once there was a good step
    ALWAYS = "always"  #: from the first step on


def _arm(value: Any) -> Arm:
    try:
        return Arm(value)
    except ValueError:
        raise UsageError(f"arm is {value!r:.40}, and must be one of {', '.join(Arm)}") from None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules. `patience`: how many bad steps in a row it takes."""

    metric: str = REWARD
    patience: int = 10
    arm: Arm = Arm.FIRST_GOOD

    name: ClassVar[str] = ""
    saw: ClassVar[str] = ""  #: completes the sentence "METRIC …"

    def __post_init__(self) -> None:
        object.__setattr__(self, "arm", _arm(self.arm))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UsageError(f"rule {self.name}: {field.name} is {value!r}, not a number")
            if field.type == "float" and not math.isfinite(value):
                raise UsageError(f"rule {self.name}: {field.name} is {value}")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise UsageError(f"rule {self.name}: patience is {self.patience!r}, and must be a whole number above 0")
        if not isinstance(self.metric, str) or not self.metric:
            raise UsageError(f"rule {self.name}: metric is {self.metric!r}, and must be a metric's name")

    def judge(self, read: Read, memory: Memory) -> Sign:
        """The sign of one step; may change `memory`, which is this rule's alone."""
        value = read(self.metric)
        if value is None:
            return Sign.SILENT
        if not math.isfinite(value):
            return Sign.BAD
        return Sign.BAD if self._bad(value, memory) else Sign.GOOD

    def _bad(self, value: float, memory: Memory) -> bool:
        raise NotImplementedError

    @property
    def nan_patience(self) -> int | None:
        """How many steps of NaN in a row it takes before it is armed: a loss is finite from any run's first step on.

        None where none do: for an evaluation's metric.
        """
        if self.arm is Arm.ALWAYS:
            return self.patience
        if is_evaluations(self.metric):
            return None
        return self.patience if is_loss(self.metric) else max(self.patience, NAN_START_STEPS)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that it reads."""
        return (self.metric,)

    @property
    def said(self) -> str:
        """What it objects to, in words, after the metric's name."""
        return self.saw.format(**{field.name: getattr(self, field.name) for field in fields(self)})

    def spec(self) -> dict[str, Any]:
        """What `parse` makes this rule of."""
        return {self.name: {field.name: _plain(getattr(self, field.name)) for field in fields(self)}}

    def __and__(self, other: Rule) -> AllOf:
        return AllOf(rules=(self, other), patience=max(self.patience, other.patience))

    def __or__(self, other: Rule) -> AnyOf:
        return AnyOf(rules=(self, other), patience=max(self.patience, other.patience))


@dataclass(frozen=True, kw_only=True)
class Zero(Rule):
    """Exactly zero."""

    name: ClassVar[str] = "zero"
    saw: ClassVar[str] = "was 0"

    def _bad(self, value: float, memory: Memory) -> bool:
        return value == 0.0


@dataclass(frozen=True, kw_only=True)
class NonFinite(Rule):
    """NaN or infinite. There is no harmless start with NaN: always armed."""

    patience: int = 3
    arm: Arm = Arm.ALWAYS

    name: ClassVar[str] = "nonfinite"
    saw: ClassVar[str] = "was NaN or infinite"

    def _bad(self, value: float, memory: Memory) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Missing(Rule):
    """Not among the step's metrics. Evaluation steps lack it now and then: give it patience."""

    name: ClassVar[str] = "missing"
    saw: ClassVar[str] = "was missing"

    def judge(self, read: Read, memory: Memory) -> Sign:
        """See Rule.judge; never silent."""
        return Sign.BAD if read(self.metric) is None else Sign.GOOD


@dataclass(frozen=True, kw_only=True)
class Below(Rule):
    """Below a bound."""

    bound: float = 0.0

    name: ClassVar[str] = "below"
    saw: ClassVar[str] = "was below {bound:g}"

    def _bad(self, value: float, memory: Memory) -> bool:
        return value < self.bound


@dataclass(frozen=True, kw_only=True)
class Above(Rule):
    """Above a bound."""

    bound: float = 0.0

    name: ClassVar[str] = "above"
    saw: ClassVar[str] = "was above {bound:g}"

    def _bad(self, value: float, memory: Memory) -> bool:
        return value > self.bound


@dataclass(frozen=True, kw_only=True)
class _AgainstAverage(Rule):
    """Compares with an exponential average of the good steps. Bad steps don't enter it, else it would follow them down."""

    halflife_steps: float = 20.0
    warmup_steps: int = 20  #: so many good steps before it judges

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.halflife_steps <= 0 or self.warmup_steps < 1:
            raise UsageError(f"rule {self.name}: halflife_steps and warmup_steps must be above 0")

    def _bad(self, value: float, memory: Memory) -> bool:
        seen, average = memory.get("seen", 0), memory.get("average", value)
        if seen >= self.warmup_steps and self._strays(value, average):
            return True
        keep = 0.5 ** (1.0 / self.halflife_steps)
        if seen < self.warmup_steps:
            keep = min(keep, seen / (seen + 1))  # the plain mean until there is enough to weigh
        memory["average"] = keep * average + (1.0 - keep) * value
        memory["seen"] = seen + 1
        return False

    def _strays(self, value: float, average: float) -> bool:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Collapse(_AgainstAverage):
    """Fallen below its own average by more than the fraction `drop` of it (of its size, where it is negative)."""

    patience: int = 20
    drop: float = 0.8

    name: ClassVar[str] = "collapse"
    saw: ClassVar[str] = "was more than {drop:.0%} below its average"

    def _strays(self, value: float, average: float) -> bool:
        return average - value > self.drop * abs(average)


@dataclass(frozen=True, kw_only=True)
class Spike(_AgainstAverage):
    """Above `factor` times its own average: gradient norms before a divergence."""

    metric: str = "grad_norm"
    patience: int = 3
    factor: float = 10.0

    name: ClassVar[str] = "spike"
    saw: ClassVar[str] = "was more than {factor:g} times its average"

    def _strays(self, value: float, average: float) -> bool:
        return value > self.factor * abs(average)


@dataclass(frozen=True, kw_only=True)
class Unchanged(Rule):
    """The same as at the step before, to within `tolerance`: training that does nothing."""

    metric: str = "grad_norm"
    patience: int = 20
    tolerance: float = 0.0

    name: ClassVar[str] = "unchanged"
    saw: ClassVar[str] = "did not change"

    def _bad(self, value: float, memory: Memory) -> bool:
        before = memory.get("before")
        if before is not None and abs(value - before) <= self.tolerance:
            return True  # compared with where the standstill began, so that a slow drift is none
        memory["before"] = value
        return False


@dataclass(frozen=True, kw_only=True)
class _Combined(Rule):
    metric: str = "-"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rules) < 2 or not all(isinstance(rule, Rule) for rule in self.rules):
            raise UsageError(f"rule {self.name} combines two rules or more")

    def _signs(self, read: Read, memory: Memory) -> list[Sign]:
        # Every rule looks at every step, or their averages would miss some.
        return [rule.judge(read, memory.setdefault(str(i), {})) for i, rule in enumerate(self.rules)]

    @property
    def metrics(self) -> tuple[str, ...]:
        """See Rule.metrics."""
        return tuple(dict.fromkeys(name for rule in self.rules for name in rule.metrics))

    @property
    def said(self) -> str:
        """See Rule.said; names the metrics itself."""
        texts = [rule.said if isinstance(rule, _Combined) else f"{rule.metric} {rule.said}" for rule in self.rules]
        return f" {self.saw} ".join(texts)

    def spec(self) -> dict[str, Any]:
        """See Rule.spec."""
        return {self.name: {"patience": self.patience, "arm": str(self.arm), "rules": [rule.spec() for rule in self.rules]}}


@dataclass(frozen=True, kw_only=True)
class AllOf(_Combined):
    """Bad where all its rules are; good where one is."""

    name: ClassVar[str] = "all"
    saw: ClassVar[str] = "and"

    def judge(self, read: Read, memory: Memory) -> Sign:
        """See Rule.judge."""
        signs = self._signs(read, memory)
        return Sign.GOOD if Sign.GOOD in signs else Sign.SILENT if Sign.SILENT in signs else Sign.BAD


@dataclass(frozen=True, kw_only=True)
class AnyOf(_Combined):
    """Bad where one of its rules is, whichever: several troubles in turns make one streak."""

    name: ClassVar[str] = "any"
    saw: ClassVar[str] = "or"

    def judge(self, read: Read, memory: Memory) -> Sign:
        """See Rule.judge."""
        signs = self._signs(read, memory)
        return Sign.BAD if Sign.BAD in signs else Sign.GOOD if Sign.GOOD in signs else Sign.SILENT


KNOWN: Mapping[str, type[Rule]] = {
    kind.name: kind for kind in (Zero, NonFinite, Missing, Below, Above, Collapse, Spike, Unchanged, AllOf, AnyOf)
}


#: No healthy run has this, and the reward may be anything meanwhile. Trainers without such a metric are judged without it.
LOST = NonFinite(metric="actor_loss/avg", patience=10)


def default_rules(metric: str = REWARD, threshold: int = 10, arm: Arm | str = Arm.FIRST_GOOD) -> tuple[Rule, ...]:
    """The rule of the old guides: zero (or NaN) for `threshold` steps in a row. And AReaL's loss, where there is one."""
    return (Zero(metric=metric, patience=threshold, arm=_arm(arm)), LOST)


def server_rule(metric: str) -> Rule:
    """Bad where a metric says that the inference server is dead: it is far below what it used to be."""
    return Collapse(metric=metric, drop=0.7, warmup_steps=5)


def parse(specs: Any) -> tuple[Rule, ...]:
    """Rules from YAML or JSON: a list of `name` or `{name: {field: value}}`. UsageError says what is wrong with it."""
    if not isinstance(specs, Sequence) or isinstance(specs, str):
        raise UsageError(f"rules must be a list, not {type(specs).__name__}")
    return tuple(_rule(spec) for spec in specs)


def _rule(spec: Any, depth: int = 0) -> Rule:
    if isinstance(spec, str):
        spec = {spec: {}}
    if not isinstance(spec, Mapping) or len(spec) != 1 or depth > 8:
        raise UsageError(f"not a rule: {spec!r:.80}", hint="A rule is a name, or `name: {field: value}`.")
    name, given = next(iter(spec.items()))
    kind = KNOWN.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(f"there is no rule {name!r:.40}", hint=f"There are: {', '.join(KNOWN)}.")
    given = dict(given or {}) if isinstance(given, Mapping) or given is None else {"": given}
    allowed = [field.name for field in fields(kind)]
    if strange := [key for key in given if key not in allowed]:
        raise UsageError(f"rule {name} has no {strange[0]!r:.40}", hint=f"It has: {', '.join(allowed)}.")
    if issubclass(kind, _Combined):
        inner = given.get("rules")
        given["rules"] = tuple(_rule(item, depth + 1) for item in inner) if isinstance(inner, list) else ()
    return kind(**given)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Arm) else value
