"""How the circuit breaker is set: arguments, the YAML's `circuit_breaker:` block, and the environment, which has the last word.

The block, each line of which may be missing:

    enabled: true                      # also $CIRCUIT_BREAKER_ENABLED
    threshold: 10                      # also $CIRCUIT_BREAKER_THRESHOLD
    metric: grpo_actor/task_reward/avg
    arm: first_good                    # or always: the literal rule of the old guides
    alive: [seq_len/avg, n_seqs]
    rules: [zero: {patience: 10}, spike: {metric: grad_norm, factor: 20}]     # instead of threshold, metric and arm
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ckptstore.config import RunConfig
from ckptstore.errors import UsageError
from ckptstore.locate import current_user
from ckptstore.rules import ALIVE, REWARD, Arm, Rule, default_rules, parse

BLOCK = "circuit_breaker"
THRESHOLD_VARIABLE = "CIRCUIT_BREAKER_THRESHOLD"
ENABLED_VARIABLE = "CIRCUIT_BREAKER_ENABLED"
_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """Settings of a breaker. None: not said, so the default holds."""

    enabled: bool | None = None
    threshold: int | None = None
    metric: str | None = None
    arm: Arm | str | None = None
    rules: tuple[Rule, ...] | None = None
    alive: tuple[str, ...] | None = None

    @staticmethod
    def of_block(block: Any) -> BreakerConfig:
        """The settings in a `circuit_breaker:` block; UsageError for what does not belong there."""
        if block is None:
            return BreakerConfig()
        if not isinstance(block, Mapping):
            raise UsageError(f"{BLOCK}: is a {type(block).__name__}, not a mapping")
        known = {item.name for item in fields(BreakerConfig)}
        if strange := [key for key in block if key not in known]:
            raise UsageError(f"{BLOCK}: there is no {strange[0]!r:.40}", hint=f"There are: {', '.join(sorted(known))}.")
        given: dict[str, Any] = {key: value for key, value in block.items() if value is not None}
        if "enabled" in given and not isinstance(given["enabled"], bool):
            raise UsageError(f"{BLOCK}.enabled is {given['enabled']!r:.40}, and must be true or false")
        threshold = given.get("threshold", 1)
        if not isinstance(threshold, int) or isinstance(threshold, bool) or threshold < 1:
            raise UsageError(f"{BLOCK}.threshold is {threshold!r:.40}, and must be a whole number above 0")
        if "rules" in given:
            given["rules"] = parse(given["rules"])
        if "alive" in given:
            if not isinstance(given["alive"], list) or not all(isinstance(name, str) for name in given["alive"]):
                raise UsageError(f"{BLOCK}.alive must be a list of metrics")
            given["alive"] = tuple(given["alive"])
        return BreakerConfig(**given)

    def over(self, other: BreakerConfig) -> BreakerConfig:
        """These settings, and those of `other` where these say nothing."""
        mine = {item.name: getattr(self, item.name) for item in fields(self)}
        return BreakerConfig(**{name: getattr(other, name) if value is None else value for name, value in mine.items()})

    @staticmethod
    def of_environment() -> BreakerConfig:
        """What the environment says; UsageError names the variable that makes no sense."""
        enabled, threshold = os.environ.get(ENABLED_VARIABLE, "").strip(), os.environ.get(THRESHOLD_VARIABLE, "").strip()
        if enabled and enabled.lower() not in _WORDS:
            raise UsageError(f"${ENABLED_VARIABLE} is {enabled!r:.40}, and must be one of {', '.join(_WORDS)}")
        if threshold and not (threshold.isascii() and threshold.isdigit() and int(threshold) > 0):
            raise UsageError(f"${THRESHOLD_VARIABLE} is {threshold!r:.40}, and must be a whole number above 0")
        return BreakerConfig(
            enabled=_WORDS[enabled.lower()] if enabled else None, threshold=int(threshold) if threshold else None
        )

    @property
    def is_enabled(self) -> bool:
        """Whether the breaker is on; it is unless something says otherwise."""
        return self.enabled is not False

    @property
    def alive_metrics(self) -> tuple[str, ...]:
        """Metrics that show whether the inference server is alive."""
        return ALIVE if self.alive is None else self.alive

    def make_rules(self) -> tuple[Rule, ...]:
        """The rules; `threshold`, `metric` and `arm` describe the default one, and say nothing beside `rules`."""
        if self.rules is not None:
            if not self.rules:
                raise UsageError("a breaker without rules never trips", hint="enabled=False turns it off.")
            return self.rules
        threshold = 10 if self.threshold is None else self.threshold
        return default_rules(self.metric or REWARD, threshold, Arm.FIRST_GOOD if self.arm is None else self.arm)


def block_of(config: RunConfig) -> Any:
    """The block of a configuration, None without one. UsageError for a name that is nearly it: nobody would read that one."""
    if BLOCK not in config.values and (close := difflib.get_close_matches(BLOCK, map(str, config.values), 1, 0.8)):
        raise UsageError(f"the configuration has {close[0]}:, and no {BLOCK}:", hint=f"Write {BLOCK}:.")
    return config.get(BLOCK)


def run_of(config: RunConfig) -> str:
    """The folder of the run that a trainer's configuration describes, built as AReaL does. UsageError for a missing name."""
    names = {key: config.text(key) for key in ("cluster.fileroot", "experiment_name", "trial_name")}
    if missing := [key for key, value in names.items() if not value]:
        raise UsageError(f"the configuration has no {missing[0]}: the run's folder cannot be known", hint="Say run=….")
    fileroot, experiment, trial = names.values()
    return os.path.join(os.path.abspath(fileroot), "checkpoints", current_user(), experiment, trial)
