"""`ckptstore resume`: setup, guided, and the exact command that goes on training."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import click

from ckptstore.choose import Selection
from ckptstore.cli.common import JSON, explaining_gaps, location_options, open_run, selection_options
from ckptstore.cli.render import echo, heading, print_json, run_json, safe
from ckptstore.cli.setup import do_setup, outcome_json, plan_json, print_outcome, print_plan
from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError, UsageError
from ckptstore.frameworks.areal.launch import Command, find_installation, logged_config, resume_command
from ckptstore.frameworks.areal.saving import describe
from ckptstore.locate import Located, Where, current_user, relative_fileroot
from ckptstore.plan import Options, Plan
from ckptstore.plan import plan as make_plan


@click.command(
    "resume", short_help="Guided: what is chosen and why, what is lost, and the exact command.",
    context_settings={"ignore_unknown_options": False},
)  # fmt: skip
@location_options
@selection_options
@click.option("--script", metavar="FILE", default="", help="The training script that started the run.")
@click.option(
    "--areal-dir",
    metavar="DIR",
    default="",
    help="The AReaL that will train: a checkout, or the folder of the package.",
)
@click.option("--areal-version", metavar="V", default="", help="Its version, where it is not on this machine.")
@click.option("--plan", "plan_only", is_flag=True, help="Only show it; change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--exec", "execute", is_flag=True, help="Run the command at the end.")
@click.option("--force", is_flag=True, help="Although the trainer seems to be running.")
@click.option("--as-is", is_flag=True, help="Although the slot holds resumable state in another format.")
@JSON
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]... [-- CMD...]")
def command(
    where: Where,
    selection: Selection,
    script: str = "",
    areal_dir: str = "",
    areal_version: str = "",
    plan_only: bool = False,
    yes: bool = False,
    execute: bool = False,
    force: bool = False,
    as_is: bool = False,
    as_json: bool = False,
    words: tuple[str, ...] = (),
) -> None:
    """Show the checkpoint chosen and why, what will not be restored, what will, and the command that resumes.

    On a terminal it asks before it replaces the slot; without one it only plans, unless --yes. CMD is your own training
    command: it gets what makes it resume.
    """
    overrides, own = _split(words)
    located, backend = open_run(
        Where(where.run, where.fileroot, where.user, where.experiment, where.trial, where.config, overrides),
        quiet=as_json,
    )
    config = located.config or logged_config(located.run)
    _refuse_strangers(located, config)
    options = Options(force=force, as_is=as_is)
    with explaining_gaps(located, selection):
        plan = make_plan(backend, selection, options)
    cmd = resume_command(located.run, find_installation(areal_dir, areal_version), config=config, script=script, command=own)
    if execute and cmd.placeholders:
        raise UsageError("--exec cannot run a command with gaps: " + "; ".join(cmd.placeholders))
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if not as_json:
        echo(f"{click.style('run', bold=True)}   {safe(located.how)}")
        for text in describe(config) if config else ():
            echo(safe(text))
        echo()
        print_plan(plan)
    go = not plan_only and (yes or (interactive and not plan.refusals and _confirm(plan)))
    outcome = None
    if go or (execute and not plan_only and plan.nothing_to_do):
        if plan.refusals:
            raise RefusedError("; ".join(plan.refusals))
        outcome = do_setup(backend, selection, options, quiet=as_json)
    if as_json:
        document: dict[str, Any] = outcome_json(outcome) if outcome else plan_json(plan) | {"done": False}
        print_json(
            {
                "run": run_json(located),
                **document,
                "command": list(cmd.words),
                "placeholders": list(cmd.placeholders),
                "notes": list(cmd.notes),
            }
        )
    else:
        if outcome:
            echo()
            print_outcome(outcome)
        _print_command(cmd)
        if not go and not plan.nothing_to_do:
            echo("\nnothing was changed" + ("" if plan_only or plan.refusals else ": --yes sets it up"))
    if execute and outcome is not None:
        sys.stdout.flush()
        os.execvp(cmd.words[0], cmd.words)


def _confirm(plan: Plan) -> bool:
    return not plan.nothing_to_do and click.confirm("\nReplace the slot?", default=False)


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """KEY=VALUE words up to the first other one belong to --config; from there on it is the user's own command."""
    for number, word in enumerate(words):
        if "=" not in word or word.startswith("-"):
            return words[:number], words[number:]
    return words, ()


def _refuse_strangers(located: Located, config: RunConfig | None) -> None:
    """AReaL builds the run's path from its own user and fileroot: another one silently starts fresh."""
    run = located.run
    if not run.fileroot:
        return
    if current_user() != run.user:
        theirs = os.path.join(run.fileroot, "checkpoints", current_user(), run.experiment, run.trial)
        raise RefusedError(
            f"the run is user {run.user}'s, and training as {current_user()} would look elsewhere and start fresh:\n"
            f"  the run:     {run.path}\n  AReaL reads: {theirs}",
            hint=f"Train as {run.user}, or set LOGNAME={run.user} (AReaL asks getpass.getuser()) for both commands.",
        )
    fileroot = config.text("cluster.fileroot") if config else ""
    if fileroot and os.path.realpath(fileroot) != os.path.realpath(run.fileroot):
        relative = f", relative to {os.getcwd()}" if relative_fileroot(config) else ""
        raise RefusedError(
            f"{config.path if config else ''} says fileroot {fileroot}{relative}, "
            "and the run is elsewhere; AReaL would start fresh:\n"
            f"  the run:     {run.path}\n"
            f"  AReaL reads: {os.path.join(os.path.abspath(fileroot), 'checkpoints', run.user, run.experiment, run.trial)}",
            hint=f"Give cluster.fileroot={run.fileroot}, or start from the folder that the run was started in.",
        )


def _print_command(cmd: Command) -> None:
    echo()
    heading("then go on training with")
    echo(f"\n  {safe(_quoted(cmd.words))}\n")
    for text in cmd.placeholders:
        echo(f"  {click.style(safe(text.partition(':')[0]), fg='yellow')}:{safe(text.partition(':')[2])}")
    for text in cmd.notes:
        echo(f"  {safe(text)}")


def _quoted(words: tuple[str, ...]) -> str:
    return " ".join(word if word.startswith("<") or "<" in word else shlex.quote(word) for word in words)
