"""`ckptstore setup`: make a good checkpoint the one that the trainer resumes from."""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any

import click

from ckptstore import halt, recovery, room
from ckptstore import side as side_folders
from ckptstore.backends import Backend
from ckptstore.choose import Selection
from ckptstore.cli.common import JSON, OVERRIDES, Trainer, Verb, location_options, selection_options, trainer_options
from ckptstore.cli.opening import explaining_gaps, is_interactive, open_run, open_run_for
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import (
    MARKS,
    checkpoint_json,
    done,
    echo,
    finding_json,
    heading,
    item,
    note,
    print_json,
    rate,
    row,
    safe,
    status,
    steps,
)
from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError, UsageError
from ckptstore.frameworks.areal.launch import Installation, find_installation, logged_config
from ckptstore.frameworks.areal.layout import MAIN_LOG
from ckptstore.frameworks.areal.restoration import Restoration
from ckptstore.health import ledger_of
from ckptstore.locate import Where, current_user
from ckptstore.model import Status
from ckptstore.plan import Options, Plan
from ckptstore.plan import plan as make_plan
from ckptstore.recovery import Outcome
from ckptstore.sizes import counted, size

#: What a transfer is called, and what becomes of the files.
_HOW = {"copy": ("copy", ""), "dcp": ("convert", "  (as DCP)"), "era-a": ("copy", "  (with fresh optimizer shards)")}
_INFO = {
    "keep": "recover_info/ stays: it is the trainer's own for this step",
    "write": "recover_info/ is made for this step",
    "leave": "recover_info/ is left as it is",
}


@click.command("setup", cls=Verb, short_help="Put the newest good checkpoint where the trainer resumes.")
@selection_options
@click.option("--dry-run", is_flag=True, help="Print the whole plan, and change nothing.")
@click.option("--undo", is_flag=True, help="Swap the slot that was set aside last back in.")
@click.option("--force", is_flag=True, help="Although the trainer seems to be running.")
@click.option("--as-is", is_flag=True, help="The files as they are, whether AReaL can resume from them or not.")
@click.option("--replace", is_flag=True, help="Where there is no room for both, remove the old slot first.")
@click.option("--yes", is_flag=True, help="Do not ask before --replace removes anything.")
@click.option("--verify-after-write", is_flag=True, help="Read everything back from the disk before the commit.")
@click.option("--recover-dir", metavar="DIR", default="", help="Another slot than the one that AReaL reads.")
@JSON
@trainer_options
@location_options
@OVERRIDES
def command(
    where: Where,
    selection: Selection,
    dry_run: bool,
    undo: bool,
    force: bool,
    as_is: bool,
    replace: bool,
    yes: bool,
    verify_after_write: bool,
    recover_dir: str,
    trainer: Trainer,
    as_json: bool,
) -> int:
    """Copy the newest good checkpoint (or the one named) into the recover slot, digests checked on the way.

    Damaged and unfinished ones are skipped, each with its reason. The old slot is kept aside: --undo swaps it back.
    """
    if undo and selection != Selection():
        raise UsageError("--undo takes no step: it swaps back what the last setup set aside")
    if replace and not yes and not dry_run and (as_json or not is_interactive()):
        raise UsageError("--replace may remove the old slot before the new one is in", hint="Say --yes to mean it.")
    if undo:
        located, backend = open_run(where, as_json=as_json, read_only=dry_run)
    else:
        located, backend, selection = open_run_for(where, selection, as_json=as_json, read_only=dry_run)
    options = setup_options(
        trainer,
        located.config or logged_config(located.run),
        find_installation(trainer.areal_dir, trainer.areal_version),
        recover_dir=recover_dir,
        force=force,
        as_is=as_is,
        replace=replace,
        verify_after_write=verify_after_write,
    )
    if undo:
        _undo(backend, options, dry_run=dry_run, as_json=as_json)
        return 0
    if dry_run:
        with explaining_gaps(located, backend, selection):
            plan = planned(backend, selection, options, quiet=as_json)
        if as_json:
            print_json(plan_json(plan) | {"done": False})
            return 1 if plan.refusals else 0
        echo()
        print_plan(plan)
        print_unjudged(plan, selection)
        refuse(plan)
        if not plan.nothing_to_do:
            echo("\nnothing was changed: without --dry-run it is done")
        return 0
    if replace and not yes:
        click.confirm("The old slot may be removed before the new one is in. Go on?", abort=True)
    with explaining_gaps(located, backend, selection):
        outcome = do_setup(backend, selection, options, quiet=as_json)
    if as_json:
        print_json(outcome_json(outcome))
        return 0
    echo()
    print_outcome(outcome)
    print_restoration(outcome.plan.restoration)
    print_unjudged(outcome.plan, selection)
    return 0


def planned(backend: Backend, selection: Selection, options: Options, *, quiet: bool) -> Plan:
    """The plan, with progress while it reads all of the slot; refused where it could not be carried out."""
    with Progress(quiet=quiet) as progress:
        plan = make_plan(backend, selection, options, notify=progress.notify)
    return doable(plan, options)


def doable(plan: Plan, options: Options) -> Plan:
    """The plan, refused where it may not be written, or there is no room for it."""
    if plan.refusals or plan.nothing_to_do:
        return plan
    for place in map(side_folders.existing, (plan.side, *plan.slots.values())):
        if not os.access(place, os.W_OK):
            what = "is mounted read-only" if os.statvfs(place).f_flag & os.ST_RDONLY else f"is not writable by {current_user()}"
            return dataclasses.replace(plan, refusals=(f"{place} {what}",))
    if not (short := room.lacking(plan, options)):
        return plan
    return dataclasses.replace(plan, refusals=("; ".join([short, *room.what_could_go(plan, options)]),))


def setup_options(trainer: Trainer, config: RunConfig | None, installation: Installation, **flags: Any) -> Options:
    """The library's options for what the command line says."""
    return Options(
        new_trial=trainer.new_trial,
        write_frequencies=trainer.write_frequencies,
        steps_per_epoch=trainer.steps_per_epoch,
        world_size=trainer.world_size,
        config=config,
        installation=installation,
        **flags,
    )


def do_setup(backend: Backend, selection: Selection, options: Options, *, quiet: bool, first: Plan | None = None) -> Outcome:
    """setup with a progress bar; Ctrl-C says how to go on."""
    try:
        with Progress(quiet=quiet) as progress:
            outcome = recovery.setup(backend, selection, options, planned=first, notify=progress.notify)
    except KeyboardInterrupt:
        note(
            "stopped: the slot is as it was. The same command continues where it stopped; "
            "`ckptstore clean` removes what is staged."
        )
        raise
    if outcome.rolled:
        note(outcome.rolled)
    return outcome


def refuse(plan: Plan) -> None:
    """RefusedError for a plan that setup would not carry out."""
    if plan.refusals:
        more = f" (and {len(plan.refusals) - 1} more, above)" if len(plan.refusals) > 1 else ""
        raise RefusedError(f"setup would not do this: {plan.refusals[0]}{more}")


def _undo(backend: Backend, options: Options, *, dry_run: bool, as_json: bool) -> None:
    if dry_run:
        kept = recovery.undoable(backend, options)
        if as_json:
            print_json({"done": False, "undo": kept.path, "bytes": kept.size_bytes})
        else:
            echo(f"\nwould swap back {safe(kept.path)} ({size(kept.size_bytes)}: {safe(', '.join(kept.parts))})")
        return
    step, kept_path = recovery.undo(backend, options)
    if as_json:
        print_json({"done": True, "step": step, "kept_old_slot": kept_path})
        return
    echo()
    done("the slot that was set aside is back" + (f": step {step}" if step >= 0 else ""))
    if os.path.isdir(kept_path):
        row("kept", f"what was in its place: {kept_path}")
        row("", "`ckptstore setup --undo` again swaps it back")


# --- what is printed ----------------------------------------------------------------------------------------------


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
