"""`ckptstore resume`: setup, guided, and the exact command that goes on training."""

from __future__ import annotations

import dataclasses
import os
import pwd
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ckptstore import running
from ckptstore.backends import normal_url, open_backend
from ckptstore.choose import Selection
from ckptstore.cli.common import JSON, Trainer, Verb, location_options, selection_options, trainer_options
from ckptstore.cli.opening import explaining_gaps, is_interactive, open_run_for
from ckptstore.cli.plans import outcome_json, plan_json, print_outcome, print_plan, print_unjudged
from ckptstore.cli.render import echo, field, heading, item, note, print_json, run_json, safe, width
from ckptstore.cli.setup import do_setup, planned, refuse, setup_options
from ckptstore.cli.urls import said_url
from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError, UsageError
from ckptstore.frameworks.areal.launch import (
    Command,
    Installation,
    find_installation,
    logged_config,
    resume_command,
)
from ckptstore.frameworks.areal.layout import RunRef
from ckptstore.frameworks.areal.saving import describe
from ckptstore.fresh import is_fresh
from ckptstore.listing import scan
from ckptstore.locate import Located, Where, current_user, named_run, relative_fileroot
from ckptstore.supervise import run_confirmed

_ENVIRONMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")


class ElsewhereError(RefusedError):
    """The training would read and write another folder than this run's. `facts` are both paths."""

    def __init__(self, message: str, run: RunRef, theirs: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.facts = (f"the run:      {run.path}", f"AReaL reads:  {theirs}")


@click.command("resume", cls=Verb, short_help="Guided: what is chosen and why, what is lost, and the exact command.")
@selection_options
@click.option("--script", metavar="FILE", default="", help="The training script that started the run.")
@click.option("--plan", "plan_only", is_flag=True, help="Only show it: ask nothing, change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--exec", "execute", is_flag=True, help="Run the command at the end.")
@click.option("--or-start", is_flag=True, help="With --exec: start fresh where the run left no trace.")
@click.option("--force", is_flag=True, help="Although the trainer seems to be running.")
@click.option("--as-is", is_flag=True, help="Although AReaL could not resume from it: another format, no recover_info.")
@JSON
@trainer_options
@location_options
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]... [-- CMD...]")
def command(
    where: Where,
    selection: Selection,
    trainer: Trainer,
    script: str = "",
    plan_only: bool = False,
    yes: bool = False,
    execute: bool = False,
    or_start: bool = False,
    force: bool = False,
    as_is: bool = False,
    as_json: bool = False,
    words: tuple[str, ...] = (),
) -> int:
    """Show the checkpoint chosen and why, what will not be restored, what will, and the command that resumes.

    On a terminal it asks before it replaces the slot; without one it only plans, unless --yes. CMD is your own training
    command: it gets what makes it resume.
    """
    yes = yes or or_start  # a pod's start command has nobody to ask
    asking = is_interactive() and not (as_json or yes or plan_only)
    if execute and plan_only:
        raise UsageError("--exec runs the command, and --plan changes nothing: give one")
    if execute and as_json:
        raise UsageError("--exec hands the terminal to the trainer: without --json")
    if execute and not yes and not asking:
        raise UsageError("--exec replaces the slot, and there is no terminal to ask on", hint="Say --yes to mean it.")
    overrides, own = _split(words)
    if own and own[0].isascii() and own[0].isdigit():  # as `verify 93` has it: no command is called so
        raise UsageError(f"{own[0]!r} is no command", hint=f"Steps are given by an option here: --step {own[0]}.")
    where = dataclasses.replace(where, overrides=overrides)
    if or_start:
        if not execute or not own:
            raise UsageError("--or-start starts a command: say --exec --or-start -- CMD…")
        if _may_start_fresh(where, selection):
            echo("no trace of the run in any place that was named: starting fresh")
            _execute(Command(own))
    looking = not (yes or asking) or plan_only
    located, backend, selection = open_run_for(where, selection, as_json=as_json, read_only=looking)
    config = located.config or logged_config(located.run)
    _refuse_strangers(located, config, own)
    installation = find_installation(trainer.areal_dir, trainer.areal_version)
    options = setup_options(trainer, config, installation, force=force, as_is=as_is)
    with explaining_gaps(located, backend, selection):
        plan = planned(backend, selection, options, quiet=as_json)
        alone = execute and yes and not (force or options.new_trial)  # nobody is there who could say it again
        if alone and len(plan.refusals) == 1 and running.wait_for_quiet(lambda: scan(backend), note):
            plan = planned(backend, selection, options, quiet=as_json)
    blockers, overrides = plan.restoration.blockers, plan.restoration.overrides
    run = located.run
    if options.new_trial:
        run = dataclasses.replace(run, trial=options.new_trial, path=plan.new_trial)
    cmd = resume_command(run, installation, config=config, script=script, command=own, overrides=overrides)
    cmd = _as_this_user(located, cmd)
    if execute:
        _refuse_command(cmd)
    if not as_json:
        _print_head(config, installation)
        print_plan(plan)
        print_unjudged(plan, selection)
        if asking or plan.refusals or plan_only or not yes:
            _print_command(cmd, blocked=bool(blockers))
    elif plan.refusals or not yes:
        print_json(_document(located, plan_json(plan) | {"done": False}, cmd))
        return 1 if plan.refusals else 0
    refuse(plan)
    if execute and blockers and not as_is:
        raise RefusedError(f"not run: {blockers[0]}", hint="`setup` alone places it; --as-is runs the command all the same.")
    if plan_only or not (yes or (asking and (plan.nothing_to_do or _confirm()))):
        if not plan.nothing_to_do:
            echo("\nnothing was changed" + ("" if plan_only or asking else ": --yes sets it up"))
        return 0
    if yes or not plan.nothing_to_do:
        outcome = do_setup(backend, selection, options, quiet=as_json, first=plan)
        if as_json:
            print_json(_document(located, outcome_json(outcome), cmd))
            return 0
        echo()
        print_outcome(outcome)
        _print_command(cmd, blocked=bool(blockers))
    if execute and (yes or not plan.nothing_to_do or _confirm("Run it?")):
        sys.stdout.flush()
        started, environment = _split_environment(cmd.words)
        return run_confirmed(
            started,
            expected_step=plan.point.checkpoint.step + 1,
            logs=run.logs,
            environment=environment,
            say=note,
        )
    return 0


def _may_start_fresh(where: Where, selection: Selection) -> bool:
    """Whether no place that was named holds a trace of the run. Names must be known: a guess could miss the run."""
    names = named_run(where)
    if not names.fileroot or not names.experiment or not names.trial:
        raise UsageError(
            "--or-start must know the run that it would start",
            hint="Say --fileroot, -e and -t, or --config with the trainer's YAML.",
        )
    if not is_fresh(names.fileroot, names.user, names.experiment, names.trial):
        return False
    url, _ = said_url(where, selection.url)
    return not url or next(iter(open_backend(normal_url(url)).list()), None) is None  # a bucket that is not there raises


def _document(located: Located, document: dict[str, Any], cmd: Command) -> dict[str, Any]:
    words, placeholders, notes = list(cmd.words), list(cmd.placeholders), list(cmd.notes)
    return {"run": run_json(located), **document, "command": words, "placeholders": placeholders, "command_notes": notes}


def _print_head(config: RunConfig | None, installation: Installation) -> None:
    for label, text in describe(config) if config else ():
        field(label, text)
    field("trainer", str(installation))
    echo()


def _confirm(question: str = "Replace the slot?") -> bool:
    echo()
    return click.confirm(question, default=False)


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """KEY=VALUE words up to the first other one belong to --config; from there on it is the user's own command.

    NAME=VALUE in capitals is the environment of a command, as for a shell.
    """
    for number, word in enumerate(words):
        if "=" not in word or word.startswith("-") or _ENVIRONMENT.match(word):
            return words[:number], words[number:]
    return words, ()


def _refuse_strangers(located: Located, config: RunConfig | None, own: tuple[str, ...]) -> None:
    """AReaL builds the run's path from its own user and fileroot: another one silently starts fresh."""
    run = located.run
    if not run.fileroot:
        return
    user = current_user()
    if user != run.user:
        raise ElsewhereError(
            f"the run is user {run.user}'s, and AReaL started by {user} would look elsewhere, find nothing and start fresh",
            run,
            os.path.join(run.fileroot, "checkpoints", user, run.experiment, run.trial),
            hint=f"Train as {run.user}, or set LOGNAME={run.user} for ckptstore and for the training: AReaL believes it.",
        )
    given = [word.partition("=")[2] for word in own if word.lstrip("+").startswith("cluster.fileroot=")]
    fileroot, source = (given[-1], "your command") if given else ("", "")
    if not fileroot and config is not None:
        fileroot, source = config.text("cluster.fileroot"), config.path
    if fileroot and os.path.realpath(fileroot) != os.path.realpath(run.fileroot):
        relative = f" (relative to {os.getcwd()})" if not os.path.isabs(fileroot) else ""
        raise ElsewhereError(
            f"{source} says fileroot {fileroot}{relative}, and the run lies elsewhere: AReaL would start fresh",
            run,
            os.path.join(os.path.abspath(fileroot), "checkpoints", run.user, run.experiment, run.trial),
            hint=f"Give {'your command' if own or config is None else f'--config {shlex.quote(config.path)}'} "
            + shlex.quote(f"cluster.fileroot={run.fileroot}")
            + (", or start from the folder that the run was started in." if relative_fileroot(config) else "."),
        )


def _as_this_user(located: Located, cmd: Command) -> Command:
    """A name that only the environment says must be said to the training too."""
    try:
        account = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        account = ""
    if not located.run.user or account == current_user():
        return cmd
    variable = next((name for name in ("LOGNAME", "USER", "LNAME", "USERNAME") if os.environ.get(name)), "LOGNAME")
    return dataclasses.replace(
        cmd, notes=(*cmd.notes, f"run it with {variable}={located.run.user} set, as here: this account has another name")
    )


def _print_command(cmd: Command, *, blocked: bool) -> None:
    echo()
    heading("when that is solved, go on training with" if blocked else "go on training with")
    echo()
    echo("\n".join(f"  {line}" for line in _lines(cmd.words)))
    echo()
    for text in cmd.placeholders:
        name, _, where = text.partition(": ")
        item(name, where, fg="yellow")
    for text in cmd.notes:
        item("·", text)


def _lines(words: tuple[str, ...]) -> list[str]:
    """The command for a shell; on a terminal broken between words, an option never from its value."""
    units: list[str] = []
    for word in words:
        quoted = safe(word if "<" in word else shlex.quote(word))
        if units and units[-1].startswith("-") and " " not in units[-1]:
            units[-1] += f" {quoted}"
        else:
            units.append(quoted)
    available = (width() or 1 << 30) - 6
    lines = [units[0]]
    for unit in units[1:]:
        if len(lines[-1]) + 1 + len(unit) > available:
            lines.append(f"  {unit}")
        else:
            lines[-1] += f" {unit}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _split_environment(words: Sequence[str]) -> tuple[list[str], dict[str, str] | None]:
    """NAME=VALUE words at the front, as a shell reads them, and the command behind them."""
    count = next((n for n, word in enumerate(words) if not _ENVIRONMENT.match(word)), len(words))
    given = dict(word.split("=", 1) for word in words[:count])
    return list(words[count:]), {**os.environ, **given} if given else None


def _refuse_command(cmd: Command) -> None:
    """UsageError for what cannot be started: known before the slot is replaced."""
    if cmd.placeholders:
        raise UsageError("--exec cannot run a command with gaps", hint="; ".join(cmd.placeholders))
    words, environment = _split_environment(cmd.words)
    if words and shutil.which(words[0], path=(environment or os.environ).get("PATH")) is None:
        raise UsageError(f"--exec: there is no command {words[0]}", hint="Nothing was changed. Is its name right, and on PATH?")


def _execute(cmd: Command) -> NoReturn:
    """Become the training."""
    words, environment = _split_environment(cmd.words)
    sys.stdout.flush()
    try:
        os.execvpe(words[0], words, environment or dict(os.environ))
    except OSError as error:
        raise UsageError(f"--exec: {words[0]}: {error.strerror}", hint="Run the command yourself.") from error
