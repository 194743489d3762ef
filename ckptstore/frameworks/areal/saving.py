"""How often the run saves, by its own YAML: `saver:` writes exports, `recover:` the slot. A crash costs what lies between."""

from __future__ import annotations

from ckptstore.config import RunConfig

_CONTROLS = (("freq_epochs", "epoch"), ("freq_steps", "step"), ("freq_secs", "second"))


def describe(config: RunConfig) -> list[str]:
    """One line for `saver:` and one for `recover:`, with what is wrong with them."""
    recover = f"recover: mode {config.text('recover.mode') or 'disabled'}, {_interval(config, 'recover')}"
    if config.text("recover.mode") in ("", "disabled", "off", "False"):
        recover += " (nothing resumes by itself, and no optimizer state is kept)"
    return [f"saver: {_interval(config, 'saver')}", recover]


def first_saved(config: RunConfig, steps_per_epoch: int, before_step: int) -> str:
    """Which step the saver saves first, and which setting would have saved one before `before_step`."""
    steps = [config.get("saver.freq_steps")]
    if config.get("saver.freq_epochs") and steps_per_epoch > 0:
        steps.append(int(config.get("saver.freq_epochs")) * steps_per_epoch)
    known = [int(step) for step in steps if isinstance(step, int) and step > 0]
    text = f"With {_interval(config, 'saver')} the first saved step is {min(known) - 1}. " if known else ""
    return f"{text}saver.freq_steps={max(before_step, 1)} would have saved one."


def _interval(config: RunConfig, block: str) -> str:
    found = [
        f"every {value} {unit}{'s' * (value != 1)}"
        for key, unit in _CONTROLS
        if isinstance(value := config.get(f"{block}.{key}"), int) and not isinstance(value, bool)
    ]
    return " or ".join(found) or "never (no frequency is set)"
