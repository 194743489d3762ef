"""`ckptstore setup`: make a good checkpoint the one that the trainer resumes from."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import click

from ckptstore import recovery, room
from ckptstore import side as side_folders
from ckptstore.backends import Backend
from ckptstore.choose import Selection
from ckptstore.cli.common import JSON, OVERRIDES, Trainer, Verb, location_options, selection_options, trainer_options
from ckptstore.cli.opening import explaining_gaps, is_interactive, open_run, open_run_for
from ckptstore.cli.plans import outcome_json, plan_json, print_outcome, print_plan, print_restoration, print_unjudged
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import (
    done,
    echo,
    note,
    print_json,
    row,
    safe,
)
from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError, UsageError
from ckptstore.frameworks.areal.launch import Installation, find_installation, logged_config
from ckptstore.locate import Where, current_user
from ckptstore.plan import Options, Plan
from ckptstore.plan import plan as make_plan
from ckptstore.recovery import Outcome
from ckptstore.sizes import size


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
