"""`ckptstore setup`: make a good checkpoint the one that the trainer resumes from."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ckptstore import recovery
from ckptstore.backends import Backend
from ckptstore.choose import Selection
from ckptstore.cli.common import JSON, OVERRIDES, explaining_gaps, location_options, note, open_run, selection_options
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import (
    checkpoint_json,
    echo,
    finding_json,
    heading,
    print_json,
    safe,
    size,
    status,
    steps,
)
from ckptstore.errors import RefusedError, UsageError
from ckptstore.frameworks.areal.restoration import Restoration, restoration
from ckptstore.locate import Where
from ckptstore.plan import Options, Plan
from ckptstore.plan import plan as make_plan
from ckptstore.recovery import Outcome


@click.command("setup", short_help="Put the newest good checkpoint where the trainer resumes.")
@location_options
@selection_options
@click.option("--dry-run", is_flag=True, help="Print the whole plan, and change nothing.")
@click.option("--force", is_flag=True, help="Although the trainer seems to be running.")
@click.option("--as-is", is_flag=True, help="Although the slot holds resumable state in another format.")
@click.option("--replace", is_flag=True, help="Where there is no room for both, remove the old slot first.")
@click.option("--yes", is_flag=True, help="Do not ask before --replace removes anything.")
@click.option("--verify-after-write", is_flag=True, help="Read everything back from the disk before the commit.")
@click.option("--recover-dir", metavar="DIR", default="", help="Another slot than the one that AReaL reads.")
@click.option("--undo", is_flag=True, help="Swap the slot that was set aside last back in.")
@JSON
@OVERRIDES
def command(
    where: Where,
    selection: Selection,
    dry_run: bool,
    force: bool,
    as_is: bool,
    replace: bool,
    yes: bool,
    verify_after_write: bool,
    recover_dir: str,
    undo: bool,
    as_json: bool,
) -> None:
    """Copy the newest good checkpoint (or the one named) into the recover slot, digests checked on the way.

    Damaged and unfinished ones are skipped, each with its reason. The old slot is kept aside: --undo swaps it back.
    """
    options = Options(recover_dir, force, as_is, replace, verify_after_write)
    located, backend = open_run(where, quiet=as_json)
    if undo:
        if selection != Selection():
            raise UsageError("--undo takes no step: it swaps back what the last setup set aside")
        _undo(backend, options, dry_run=dry_run, as_json_=as_json)
        return
    if replace and not yes and not dry_run:
        if as_json or not sys.stdin.isatty():
            raise UsageError("--replace may remove the old slot before the new one is in", hint="Say --yes to mean it.")
        click.confirm("The old slot may be removed before the new one is in. Go on?", abort=True)
    if dry_run:
        with explaining_gaps(located, selection):
            plan = make_plan(backend, selection, options)
        if as_json:
            print_json(plan_json(plan) | {"done": False})
        else:
            print_plan(plan)
        if plan.refusals:
            raise RefusedError("setup would not do this: " + "; ".join(plan.refusals))
        return
    with explaining_gaps(located, selection):
        outcome = do_setup(backend, selection, options, quiet=as_json)
    if as_json:
        print_json(outcome_json(outcome))
    else:
        print_outcome(outcome)


def do_setup(backend: Backend, selection: Selection, options: Options, *, quiet: bool) -> Outcome:
    """setup with a progress bar; Ctrl-C says how to go on."""
    try:
        with Progress(quiet=quiet) as progress:
            outcome = recovery.setup(backend, selection, options, notify=progress.notify)
    except KeyboardInterrupt:
        note(
            "stopped; the slot is as it was. "
            "The same command continues where it stopped; `ckptstore clean` removes what is staged."
        )
        raise
    if outcome.rolled:
        note(outcome.rolled)
    return outcome


def _undo(backend: Backend, options: Options, *, dry_run: bool, as_json_: bool) -> None:
    if dry_run:
        kept = recovery.undoable(backend, options)
        if as_json_:
            print_json({"done": False, "undo": safe(kept.path), "bytes": kept.size_bytes})
        else:
            echo(f"would swap back {safe(kept.path)} ({size(kept.size_bytes)}: {', '.join(kept.parts)})")
        return
    step, kept_path = recovery.undo(backend, options)
    if as_json_:
        print_json({"done": True, "step": step, "old_slot": safe(kept_path)})
        return
    echo(f"{click.style('✓', fg='green')} the old slot is back" + (f": step {step}" if step >= 0 else ""))
    echo(f"  what was in its place is kept in {safe(kept_path)} (setup --undo again swaps it back)")


# --- what is printed ----------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    """The whole plan, what will be lost first."""
    what = restoration(plan.point.checkpoint, plan.listing.recover_info)
    checkpoint = plan.point.checkpoint
    heading("chosen")
    echo(f"  {steps(checkpoint)}, epoch {checkpoint.epoch}  {status(checkpoint.status)}")
    echo(f"  why: {plan.point.why}")
    print_skipped(plan)
    print_restoration(what)
    print_notes(plan)
    heading("plan")
    if plan.nothing_to_do:
        echo(f"  nothing to do: {plan.nothing_to_do}")
        return
    for part in checkpoint.parts:
        echo(f"  {safe(part.path)}")
        echo(f"    → {safe(plan.slots[part.name])}  ({len(part.files)} files, {size(part.size_bytes)}, {part.format})")
    free = "unknown (quota?)" if plan.free_bytes is None else size(plan.free_bytes)
    staged = f", {size(plan.reusable_bytes)} of it already staged" if plan.reusable_bytes else ""
    echo(f"  room: {size(plan.needed_bytes)} needed{staged}, {free} free ({plan.file_system})")
    if plan.old_slot is not None:
        old = plan.old_slot
        named = f"step {old.step}" if old.step >= 0 else "unknown step"
        echo(
            f"  the old slot ({named}, {old.format}, {size(old.size_bytes)}) "
            f"is kept in {safe(plan.side)}; setup --undo swaps it back"
        )
    for refusal in plan.refusals:
        echo(f"  {click.style('refused', fg='red')}: {safe(refusal)}")


def print_notes(plan: Plan) -> None:
    """What is in the way in the run: stray slots, links, saves in progress."""
    for text in plan.listing.notes[:8]:
        note(text)


def print_skipped(plan: Plan) -> None:
    """Which newer checkpoints were passed over, and why."""
    for skipped in plan.point.skipped[:6]:
        reasons = "; ".join(skipped.reasons[:2])
        more = f" (and {len(skipped.reasons) - 2} more)" if len(skipped.reasons) > 2 else ""
        echo(f"  skipped step {skipped.checkpoint.step}: {safe(reasons)}{more}")
    if len(plan.point.skipped) > 6:
        echo(f"  and {len(plan.point.skipped) - 6} more skipped")


def print_restoration(what: Restoration) -> None:
    """First what is lost, then what is restored."""
    heading("not restored")
    for text in what.lost:
        echo(f"  {click.style('-', fg='yellow')} {safe(text)}")
    heading("restored")
    for text in what.restored:
        echo(f"  {click.style('+', fg='green')} {safe(text)}")
    if what.blockers:
        heading("still missing for AReaL to resume from it")
        for text in what.blockers:
            echo(f"  {click.style('!', fg='red')} {safe(text)}")


def print_outcome(outcome: Outcome) -> None:
    """What was done, how fast, and how durable it is."""
    plan = outcome.plan
    checkpoint = plan.point.checkpoint
    print_notes(plan)
    print_skipped(plan)
    if plan.nothing_to_do:
        echo(f"{click.style('✓', fg='green')} nothing to do: {safe(plan.nothing_to_do)}")
        return
    rate = outcome.copied_bytes / outcome.seconds / 1e9 if outcome.seconds > 0 else 0.0
    reused = f", {size(outcome.reused_bytes)} were staged already" if outcome.reused_bytes else ""
    echo(
        f"{click.style('✓', fg='green')} {steps(checkpoint)} is in the slot: {size(outcome.copied_bytes)} in "
        f"{outcome.seconds:.2f} s, {rate:.2f} GB/s, digested and synced{reused}"
    )
    echo(f"  why: {plan.point.why}")
    for part, slot in plan.slots.items():
        echo(
            f"  {safe(part)}: {safe(os.path.relpath(slot, plan.listing.run.path))}"
            f"  manifest sha256 {outcome.manifest_sha256[part]}"
        )
    if outcome.medium is not None:
        ways = ", ".join(f"{name} {size(count)}" for name, count in sorted(outcome.strategies.items()))
        echo(
            f"  copied: {ways or 'nothing'}; replaced by {outcome.medium.method} on {outcome.medium.file_system}; "
            f"{outcome.medium.durability}"
        )
    if outcome.old_slot:
        echo(f"  the old slot is kept in {safe(outcome.old_slot)}; `ckptstore setup --undo` swaps it back")
    print_restoration(restoration(checkpoint, plan.listing.recover_info))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The documented fields of a plan."""
    what = restoration(plan.point.checkpoint, plan.listing.recover_info)
    return {
        "checkpoint": checkpoint_json(plan.point.checkpoint),
        "why": safe(plan.point.why),
        "skipped": [
            {
                "step": skipped.checkpoint.step,
                "status": str(skipped.checkpoint.status),
                "reasons": [safe(reason) for reason in skipped.reasons],
                "findings": [finding_json(finding) for finding in skipped.checkpoint.findings],
            }
            for skipped in plan.point.skipped
        ],
        "slots": {safe(part): safe(path) for part, path in plan.slots.items()},
        "side": safe(plan.side),
        "file_system": plan.file_system,
        "needed_bytes": plan.needed_bytes,
        "free_bytes": plan.free_bytes,
        "staged_bytes": plan.reusable_bytes,
        "old_slot": checkpoint_json(plan.old_slot) if plan.old_slot else None,
        "nothing_to_do": safe(plan.nothing_to_do),
        "refusals": [safe(refusal) for refusal in plan.refusals],
        "restored": [safe(text) for text in what.restored],
        "lost": [safe(text) for text in what.lost],
        "blockers": [safe(text) for text in what.blockers],
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
        "kept_old_slot": safe(outcome.old_slot),
        "manifest_sha256": dict(outcome.manifest_sha256),
        "rolled": safe(outcome.rolled),
    }
