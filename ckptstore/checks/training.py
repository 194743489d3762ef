"""What the trainer's settings and logs say: would a crash be survived, what would it cost, and what happened last."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from ckptstore.backends.local import LocalBackend
from ckptstore.checks import Diagnosis, Patient, bad, ok, warn
from ckptstore.config import RunConfig
from ckptstore.frameworks.areal import recover_info, resume_state, trainer_logs
from ckptstore.frameworks.areal.launch import NEW_LAUNCHER, OLD_LAUNCHER
from ckptstore.frameworks.areal.saving import describe

_OFF = ("disabled", "off")
_SPELLED = {"": "disabled", "true": "on", "false": "off"}  #: YAML takes a bare on and off for booleans
_OLD_MODES = ("disabled", "auto", "fault", "resume")  #: up to v0.5
_NEW_MODES = ("on", "auto", "off", "disabled")  #: from v1.0; it raises for any other
MUCH_H = 2.0  #: of training lost by a crash
MUCH_STEPS = 200


def recover_mode(patient: Patient) -> Iterator[Diagnosis]:
    """`recover:` in the YAML: on, known to this AReaL, and with a frequency."""
    config = patient.config
    if config is None:
        remedy = "Say --config run.yaml, the file that starts the trainer."
        yield warn("recover", "no YAML was found: how the trainer saves and resumes is unknown", remedy)
        return
    mode = _mode(config)
    saver, recover = (text for _, text in describe(config))
    known = {OLD_LAUNCHER: _OLD_MODES, NEW_LAUNCHER: _NEW_MODES}.get(patient.installation.launcher, ())
    if known and mode not in known:
        found = f"recover.mode is {mode}, and this AReaL ({patient.installation}) knows {', '.join(known)}"
        yield bad("recover", found, "Write recover.mode: auto.")
    elif mode in _OFF:
        remedy = "Write recover.mode: auto, and recover.freq_steps: 20 or so: then optimizer state survives as well."
        yield warn("recover", f"recover: {recover}", remedy)
    elif not _interval_known(config, "recover"):
        found = f"recover.mode is {mode}, and no frequency is set under recover: the slot is never written"
        yield bad("recover", found, "Write recover.freq_steps: 20 or so.")
    else:
        yield ok("recover", f"recover: {recover}; saver: {saver}")
    if patient.listing is not None and patient.listing.recover_info is not None:
        stored = recover_info.stored_controls(LocalBackend(patient.run.path))
        for line in resume_state.stored_difference(config, stored):
            remedy = "`ckptstore setup --write-frequencies` writes the YAML's, or accept it."
            yield warn("recover", f"AReaL takes how often to save from recover_info: {line}", remedy)


def loss(patient: Patient) -> Iterator[Diagnosis]:
    """What a crash just before the next save would cost, in steps and, where the saves' times tell, in hours."""
    config = patient.config
    if config is None:
        return
    per_epoch = steps_per_epoch(patient)
    step_s = seconds_per_step(patient)
    on = _mode(config) not in _OFF
    costs = {"saver": _cost(config, "saver", per_epoch, step_s)}
    if on:
        costs["recover"] = _cost(config, "recover", per_epoch, step_s)
    if not any(_interval_known(config, block) for block in costs):
        yield bad("loss", "nothing is ever saved: a crash costs the whole run", "Write saver.freq_steps: 50 or so.")
        return
    known = [cost for cost in costs.values() if cost[0] or cost[1]]
    if not known:
        found = "a crash costs up to an epoch; how many steps that is, nothing tells yet"
        yield warn("loss", found, "Write recover.mode: auto and recover.freq_steps: 20 or so.")
        return
    steps, hours = min(known, key=lambda cost: cost[1] or cost[0] * (step_s or 60.0) / 3600)
    text = "a crash costs up to " + " or ".join(
        filter(None, [f"{steps:.0f} steps" if steps else "", f"{hours:.1f} h of training" if hours else ""])
    )
    if not on:
        text += ", and the optimizer's state (recover.mode is off)"
    if hours > MUCH_H or steps > MUCH_STEPS:
        yield warn("loss", text, "Save more often: recover.mode: auto and recover.freq_steps: 20 or so.")
    else:
        yield ok("loss", text)


def _mode(config: RunConfig) -> str:
    mode = config.text("recover.mode").lower()
    return _SPELLED.get(mode, mode)


def _interval_known(config: RunConfig, block: str) -> bool:
    return any(_number(config, f"{block}.freq_{unit}") for unit in ("epochs", "steps", "secs"))


def _cost(config: RunConfig, block: str, per_epoch: int, step_s: float) -> tuple[float, float]:
    """Steps and hours between two saves of a block, each 0 where unknown. The control that fires first counts."""
    steps = [_number(config, f"{block}.freq_steps"), _number(config, f"{block}.freq_epochs") * per_epoch]
    steps = [count for count in steps if count]
    seconds = _number(config, f"{block}.freq_secs")
    if seconds and step_s:
        steps.append(max(1.0, seconds / step_s))
    fewest = min(steps, default=0.0)
    hours = fewest * step_s / 3600 if fewest and step_s else 0.0
    if seconds and (not hours or seconds / 3600 < hours):
        hours = seconds / 3600
    return fewest, hours


def _number(config: RunConfig, key: str) -> float:
    value = config.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else 0


def steps_per_epoch(patient: Patient) -> int:
    """Steps of an epoch as the run shows; 0 when it does not."""
    if patient.listing is None:
        return 0
    info = patient.listing.recover_info
    triples = [(c.step, c.epoch, c.epoch_step) for c in patient.listing.checkpoints]
    return resume_state.steps_per_epoch((-1, -1, -1), triples, max(info.steps_per_epoch, 0) if info else 0)


def seconds_per_step(patient: Patient) -> float:
    """Seconds a step takes, from the times of the saves; 0 when they do not tell. The median: a pause is no matter."""
    if patient.listing is None:
        return 0.0
    saves = [(c.step, c.saved_at_s) for c in patient.listing.checkpoints if c.status.usable]
    rates = [(t2 - t1) / (s2 - s1) for (s1, t1), (s2, t2) in itertools.pairwise(saves) if s2 > s1 and t2 > t1]
    return statistics.median(rates) if rates else 0.0


def logs(patient: Patient) -> Iterator[Diagnosis]:
    """Where the logs are, their last error, and lines that are known."""
    folder = patient.run.logs
    if not folder:
        return
    found = trainer_logs.read(folder)
    if not found.files:
        yield ok("logs", f"none in {folder}")
        return
    last = f"; the last step done is Train step {found.last_log_step} (global step {found.last_log_step - 1})"
    yield ok("logs", f"{', '.join(file.path for file in found.files[:6])}{last if found.last_log_step else ''}")
    for text in found.unreadable[:3]:
        yield warn("logs", text, "Look as the user that trains.")
    for seen in found.known:
        times = f" ({seen.times} times)" if seen.times > 1 else ""
        since = "; training went on afterwards" if seen.trained_since else ""
        text = f"{seen.path}{times}: {seen.line}: {seen.known.means}{since}"
        harmless = seen.trained_since and not seen.known.final
        yield (warn if harmless else bad)(f"logs:{seen.known.name}", text, seen.known.remedy)
    if found.last_error is not None and not any(seen.line == found.last_error[1] for seen in found.known):
        path, line = found.last_error
        yield warn("logs:error", f"the last error, in {path}: {line}", "Read what stands before it there.")


ALL = (recover_mode, loss, logs)
