"""What setup would do, and what it did, for people and for programs."""

from __future__ import annotations

import os
import shlex
from typing import Any

from ckptstore import halt
from ckptstore.choose import Selection
from ckptstore.cli.render import (
    MARKS,
    checkpoint_json,
    done,
    echo,
    finding_json,
    heading,
    item,
    note,
    rate,
    row,
    safe,
    status,
    steps,
)
from ckptstore.frameworks.areal.layout import MAIN_LOG
from ckptstore.frameworks.areal.restoration import Restoration
from ckptstore.health import ledger_of
from ckptstore.model import Status
from ckptstore.plan import Plan
from ckptstore.recovery import Outcome
from ckptstore.sizes import counted, size

#: What a transfer is called, and what becomes of the files.
_HOW = {"copy": ("copy", ""), "dcp": ("convert", "  (as DCP)"), "era-a": ("copy", "  (with fresh optimizer shards)")}
_INFO = {
    "keep": "recover_info/ stays: it is the trainer's own for this step",
    "write": "recover_info/ is made for this step",
    "leave": "recover_info/ is left as it is",
}


def print_plan(plan: Plan) -> None:
    """The whole plan, what will be lost first."""
    checkpoint = plan.point.checkpoint
    heading("chosen")
    echo(f"  {status(checkpoint.status)}  {safe(steps(checkpoint))}" + _epoch(plan))
    row("why", plan.point.why)
    print_skipped(plan)
    print_restoration(plan.restoration)
    heading("plan")
    for part in checkpoint.parts if plan.transfers else ():
        how = plan.transfers[part.name].how
        row(
            _HOW[how][0],
            f"{_short(plan, part.path)}  ({counted(len(part.files), 'file')}, {size(part.size_bytes)}, {part.format})",
        )
        row("  to", _short(plan, plan.slots[part.name]) + _HOW[how][1])
    if not plan.nothing_to_do:
        row("resume", _INFO[plan.info.action])
    if plan.nothing_to_do:
        row("slot", f"nothing to do: {plan.nothing_to_do}")
    else:
        free = "unknown (quota?)" if plan.free_bytes is None else size(plan.free_bytes)
        staged = f", {size(plan.reusable_bytes)} of it already staged" if plan.reusable_bytes else ""
        row("room", f"{size(plan.needed_bytes)} needed{staged}; {free} free ({plan.file_system})")
        old = plan.old_slot
        if old is not None:
            named = f"step {old.step}" if old.step >= 0 else "unknown step"
            row(
                "old slot",
                f"{named}, {old.format}, {size(old.size_bytes)}: kept in {_short(plan, plan.side)}; setup --undo swaps it back",
            )
        else:
            row("old slot", "untouched: the new trial has its own" if plan.new_trial else "none")
    if not plan.new_trial and (trip := halt.read(plan.side)) is not None:
        row("breaker", f"it has halted training at step {trip.step}: that record is cleared at the end, and training may start")
    for refusal in plan.refusals:
        item("✗", f"refused: {refusal}", fg="red")
    print_notes(plan)


def _epoch(plan: Plan) -> str:
    epoch = plan.point.checkpoint.epoch
    return f", epoch {epoch}" if epoch >= 0 else ""


def _short(plan: Plan, path: str) -> str:
    """A path in or beside the run as seen from the run's folder, any other in full."""
    run = plan.listing.run.path
    return os.path.relpath(path, run) if path.startswith(f"{os.path.dirname(run)}/") else path


def print_notes(plan: Plan) -> None:
    """What is in the way in the run: stray slots, links, saves in progress; and what is left aside."""
    for text in plan.notes[-8:]:
        note(text)


def print_unjudged(plan: Plan, selection: Selection) -> None:
    """That nothing tells the health of what was chosen, although the trainer has a log."""
    run = plan.listing.run
    log = os.path.join(run.logs, MAIN_LOG)
    if selection.named or selection.bound is not None or not run.logs or not os.path.isfile(log) or ledger_of(run.path):
        return
    note(
        f"no metrics are recorded, nor are any found in {log}: nothing tells whether the model was healthy at step "
        f"{plan.point.checkpoint.step}. `ckptstore status --run {shlex.quote(run.path)} --import FILE` takes them from a file"
    )


def print_skipped(plan: Plan) -> None:
    """Which newer checkpoints were passed over, and why."""
    skipped = plan.point.skipped
    if skipped:
        heading("skipped")
    for one in skipped[:6]:
        # Found while copying: the listing's own status is still that of before.
        state = one.checkpoint.status if not one.checkpoint.status.usable else Status.CORRUPT
        more = f" (and {len(one.reasons) - 1} more)" if len(one.reasons) > 1 else ""
        name = f"step {one.checkpoint.step}" if one.checkpoint.step >= 0 else "unknown step"
        where = {"slot": " in the slot", "adopted": " (adopted)"}.get(one.checkpoint.kind, "")
        item(MARKS[state], f"{name}{where}: {one.reasons[0]}{more}", fg="red" if state is Status.CORRUPT else "yellow")
    if len(skipped) > 6:
        item("·", f"and {len(skipped) - 6} more")


def print_restoration(what: Restoration) -> None:
    """First what is lost, then what is restored."""
    heading("not restored")
    for text in what.lost:
        item("-", text, fg="yellow")
    heading("restored")
    for text in what.restored:
        item("+", text, fg="green")
    if what.needs:
        heading("needs")
        for text in what.needs:
            item("·", text)
    if what.blockers:
        heading("still missing for AReaL to resume from it")
        for text in what.blockers:
            item("!", text, fg="red")


def print_outcome(outcome: Outcome) -> None:
    """What was done, how fast, and how durable it is."""
    plan = outcome.plan
    print_notes(plan)
    if plan.nothing_to_do:
        print_skipped(plan)
        done(f"nothing to do: {plan.nothing_to_do}")
        _print_cleared(outcome)
        return
    where = f"the new trial {os.path.basename(plan.new_trial)}" if plan.new_trial else "the slot"
    done(f"{steps(plan.point.checkpoint)} is in {where}")
    row("why", plan.point.why)
    if plan.transfers:
        reused = f"; {size(outcome.reused_bytes)} were staged already" if outcome.reused_bytes else ""
        ways = ", ".join(f"{name} {size(count)}" for name, count in sorted(outcome.strategies.items()))
        at = rate(outcome.copied_bytes, outcome.seconds)
        row("copied", f"{size(outcome.copied_bytes)} in {outcome.seconds:.2f} s{at}, digested and synced ({ways}){reused}")
        for part in plan.point.checkpoint.parts:
            row("from", _short(plan, part.path))
            row("to", _short(plan, plan.slots[part.name]))
            row("", f"manifest sha256 {outcome.manifest_sha256[part.name]}")
    else:
        row("slot", "held it already, every digest verified; recover_info/ was made for it")
    if outcome.medium is not None:
        row("commit", f"by {outcome.medium.method} on {outcome.medium.file_system}; {outcome.medium.durability}")
    if outcome.old_slot:
        row("old slot", f"kept in {_short(plan, outcome.old_slot)}; `ckptstore setup --undo` swaps it back")
    _print_cleared(outcome)
    print_skipped(plan)


def _print_cleared(outcome: Outcome) -> None:
    if outcome.cleared is not None:
        row("breaker", f"the record of its trip at step {outcome.cleared.step} is cleared: training may start")


def plan_json(plan: Plan) -> dict[str, Any]:
    """The documented fields of a plan."""
    what = plan.restoration
    return {
        "checkpoint": checkpoint_json(plan.point.checkpoint),
        "why": plan.point.why,
        "skipped": [
            {
                "step": skipped.checkpoint.step,
                "status": str(skipped.checkpoint.status),
                "reasons": list(skipped.reasons),
                "findings": [finding_json(finding) for finding in skipped.checkpoint.findings],
            }
            for skipped in plan.point.skipped
        ],
        "slots": dict(plan.slots),
        "side": plan.side,
        "file_system": plan.file_system,
        "needed_bytes": plan.needed_bytes,
        "free_bytes": plan.free_bytes,
        "staged_bytes": plan.reusable_bytes,
        "old_slot": checkpoint_json(plan.old_slot) if plan.old_slot else None,
        "nothing_to_do": plan.nothing_to_do,
        "refusals": list(plan.refusals),
        "restored": list(what.restored),
        "lost": list(what.lost),
        "blockers": list(what.blockers),
        "needs": list(what.needs),
        "notes": list(plan.notes),
    }


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """The documented fields of what setup did."""
    medium = outcome.medium
    return plan_json(outcome.plan) | {
        "done": not outcome.plan.nothing_to_do,
        "copied_bytes": outcome.copied_bytes,
        "reused_bytes": outcome.reused_bytes,
        "seconds": round(outcome.seconds, 6),
        "strategies": dict(outcome.strategies),
        "method": medium.method if medium else None,
        "durability": medium.durability if medium else None,
        "kept_old_slot": outcome.old_slot,
        "manifest_sha256": dict(outcome.manifest_sha256),
        "cleared_trip": outcome.cleared.step if outcome.cleared else None,
        "rolled": outcome.rolled,
    }
