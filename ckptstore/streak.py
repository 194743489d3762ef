"""A rule over the steps of a run: its streak, whether it is armed, and whether its patience has run out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptstore.rules import Arm, Memory, NonFinite, Read, Rule, Sign


class Watch:
    """One rule and how its streak stands. Not thread-safe."""

    __slots__ = ("armed", "last_good", "memory", "nonfinite", "rule", "silent", "since", "steps", "streak")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.memory: Memory = {}
        self.armed = rule.arm is Arm.ALWAYS
        self.streak = 0  #: bad steps in a row
        self.since = -1  #: the step of the first of them
        self.nonfinite = 0  #: of the streak
        self.silent = 0  #: steps in a row without the metric
        self.steps = 0  #: steps seen that were not silent
        self.last_good: float | None = None

    def look(self, read: Read, step: int) -> Sign:
        """Take in one step. A bad step before the rule is armed is reported as bad, and counts only where it is NaN."""
        rule = self.rule
        sign = rule.judge(read, self.memory)
        if sign is Sign.SILENT:
            self.silent += 1
            return sign
        self.silent = 0
        self.steps += 1
        if sign is Sign.GOOD:
            self.armed = True
            self.last_good = read(rule.metric)
            if self.streak:
                self.forgive()
        else:
            value = read(rule.metric)
            nonfinite = value is not None and not math.isfinite(value)
            if self.armed or (nonfinite and rule.nan_patience is not None):
                if not self.streak:
                    self.since = step
                self.streak += 1
                self.nonfinite += nonfinite
            elif self.streak:
                self.forgive()  # a cold start's zero
        return sign

    def forgive(self) -> None:
        """End the streak, as a good step would."""
        self.streak = self.nonfinite = 0
        self.since = -1

    @property
    def tripped(self) -> bool:
        """Whether patience has run out."""
        return self.streak >= self.patience

    @property
    def patience(self) -> int:
        """How many bad steps in a row it takes now."""
        return self.rule.patience if self.armed else self.rule.nan_patience or self.rule.patience

    @property
    def said(self) -> str:
        """What the streak consists of, in words, after the metric's name."""
        if self.nonfinite and self.nonfinite == self.streak:
            return NonFinite.saw
        return self.rule.said + (f" (NaN or infinite at {self.nonfinite} of them)" if self.nonfinite else "")

    def state(self) -> dict[str, Any]:
        """All that it remembers, of JSON types."""
        return {"rule": self.rule.spec()} | {name: getattr(self, name) for name in self.__slots__ if name != "rule"}

    def load(self, state: Mapping[str, Any]) -> bool:
        """Take over a state; False, and nothing is changed, if it is another rule's."""
        if state.get("rule") != self.rule.spec():
            return False
        for name in self.__slots__:
            if name != "rule" and name in state:
                setattr(self, name, state[name])
        return True
