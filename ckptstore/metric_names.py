"""What the names of metrics mean: which of a step's keys one stands for, and whether it is a loss or an evaluation's."""

from __future__ import annotations

import re
from collections.abc import Collection

#: Where several metrics match: the actor's before anybody else's.
PREFERRED = ("grpo_actor", "ppo_actor", "actor", "rollout")
#: What is evaluated now and then may be logged as NaN until it is.
_NOW_AND_THEN = re.compile(r"(?:^|[^a-z])(?:eval|val|valid|test|dev)(?:[^a-z]|uation|idation|$)", re.IGNORECASE)
_EVALUATION = re.compile(r"(eval|valid|test)", re.IGNORECASE)


def match(name: str, keys: Collection[str]) -> str | None:
    """The key that the metric `name` means: itself, else one that ends like it behind another prefix.

    `grpo_actor/task_reward/avg` is found as `ppo_actor/task_reward/avg` too, but never as `eval-rollout/task_reward/avg`.
    """
    if name in keys:
        return name
    suffix = _suffix(name)
    tail = "/" + suffix
    try:
        found = [key for key in keys if key.endswith(tail)]
    except AttributeError:  # keys that are no text
        found = [key for key in keys if isinstance(key, str) and key.endswith(tail)]
    if suffix in keys:
        found.append(suffix)
    if not _EVALUATION.match(name):
        found = [key for key in found if not _EVALUATION.match(key)]
    return min(found, key=_preference, default=None)


def is_evaluations(metric: str) -> bool:
    """Whether a metric is by its name an evaluation's."""
    return _NOW_AND_THEN.search(metric) is not None


def is_loss(metric: str) -> bool:
    """Whether a metric is by its name a training's loss: a number at every step, unless training has diverged."""
    return "loss" in metric.lower() and not is_evaluations(metric)


def _suffix(name: str) -> str:
    # The first component is a scope that differs between trainers; what is left must still say something.
    _, slash, rest = name.partition("/")
    return rest if slash and "/" in rest else name


def _preference(key: str) -> tuple[int, int, str]:
    scope = key.partition("/")[0]
    return (PREFERRED.index(scope) if scope in PREFERRED else len(PREFERRED), len(key), key)
