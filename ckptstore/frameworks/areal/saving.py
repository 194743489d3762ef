"""How often the run saves, by its own YAML: `saver:` writes exports, `recover:` the slot. A crash costs what lies between."""

from __future__ import annotations

import math
from typing import Any

from ckptstore.config import RunConfig

_CONTROLS = (("freq_epochs", "epoch"), ("freq_steps", "step"), ("freq_secs", "second"))
_OFF = ("", "disabled", "off", "False")


def describe(config: RunConfig) -> list[tuple[str, str]]:
    """What `saver:` and `recover:` say, each with what is wrong with it."""
    recover = f"mode {config.text('recover.mode') or 'disabled'}, {_interval(config, 'recover')}"
    if config.text("recover.mode") in _OFF:
        recover += ": nothing resumes by itself, and no optimizer state is kept"
    return [("saver", _interval(config, "saver")), ("recover", recover)]


def settings(config: RunConfig) -> dict[str, Any]:
    """The two blocks as they are, for programs."""
    return {
        "path": config.path,
        "saver": {key: _plain(config.get(f"saver.{key}")) for key, _ in _CONTROLS},
        "recover": {key: _plain(config.get(f"recover.{key}")) for key in ("mode", *(key for key, _ in _CONTROLS))},
    }


def _plain(value: Any) -> str | int | float | None:
    """What JSON has: YAML also knows dates, bytes, NaN, and lists that hold themselves."""
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return None if isinstance(value, (dict, list, set)) else str(value)


def first_saved(config: RunConfig | None, steps_per_epoch: int, last_step: int) -> str:
    """Which global step the saver saves first, and which setting would have saved one up to `last_step`."""
    text = ""
    if config is not None:
        steps = [_number(config, "saver.freq_steps"), _number(config, "saver.freq_epochs") * steps_per_epoch]
        known = [count for count in steps if count > 0]
        if known:
            text = f"With saver: {_interval(config, 'saver')}, the first saved is step {min(known) - 1}. "
    return f"{text}saver.freq_steps={last_step + 1} (or less) in the trainer's YAML would have saved one by then."


def _number(config: RunConfig, key: str) -> int:
    value = config.get(key)
    return value if type(value) is int else 0


def _interval(config: RunConfig, block: str) -> str:
    found = [
        f"every {value} {unit}{'s' * (value != 1)}"
        for key, unit in _CONTROLS
        if (value := _number(config, f"{block}.{key}")) > 0
    ]
    return " or ".join(found) or "never (no frequency is set)"
