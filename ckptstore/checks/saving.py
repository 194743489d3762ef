"""How often to save: the interval that wastes the least time, from what saves and steps were measured to take."""

from __future__ import annotations

from collections.abc import Iterator

from ckptstore import health, schedule
from ckptstore.checks import Diagnosis, Patient, ok, warn
from ckptstore.checks.training import seconds_per_step, steps_per_epoch

ASSUMED_MTBF_S = 12 * 3600.0  #: between failures, where the run has shown none: a rented box, a spot market
MUCH = 0.05  #: of all time, wasted beyond what is unavoidable


def interval(patient: Patient) -> Iterator[Diagnosis]:
    """The best interval against the present one; nothing where no save's duration can be measured."""
    if patient.listing is None or patient.config is None:
        return
    save_s = schedule.measured_save_s(patient.listing.checkpoints)
    if save_s is None:
        return
    ledger = health.ledger_of(patient.run.path)
    step_s = schedule.measured_step_s(ledger) or seconds_per_step(patient) or None
    measured_s = schedule.measured_mtbf_s(ledger)
    per_epoch = steps_per_epoch(patient) or None
    current_s = schedule.interval_of(patient.config, step_s=step_s, steps_per_epoch=per_epoch)
    advice = schedule.advise(save_s, measured_s or ASSUMED_MTBF_S, step_s=step_s, current_interval_s=current_s)
    every = f"{advice.interval_steps} steps" if advice.interval_steps else f"{advice.interval_s / 60:.0f} min"
    failures = f"{(measured_s or ASSUMED_MTBF_S) / 3600:.1f} h apart ({'measured' if measured_s else 'assumed'})"
    text = (
        f"a save takes {save_s:.1f} s or more, failures are {failures}: saving every {every} would waste the least, "
        f"{advice.cost_fraction:.1%} of the time"
    )
    if advice.current_cost_fraction is None:
        yield ok("interval", text)  # that nothing is saved, `loss` says
    elif advice.current_cost_fraction > advice.cost_fraction + MUCH:
        remedy = f"Write recover.freq_steps: {advice.interval_steps or 20}."
        yield warn("interval", f"{text}; as it is set now, {advice.current_cost_fraction:.0%}", remedy)
    else:
        yield ok("interval", f"{text}; as it is set now, {advice.current_cost_fraction:.1%}")


ALL = (interval,)
