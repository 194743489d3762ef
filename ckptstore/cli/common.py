"""What the verbs share: the options that say where the run is, which checkpoint is meant, and the way in."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ckptstore import commit
from ckptstore import side as side_folders
from ckptstore.backends import Backend, open_backend
from ckptstore.choose import Selection
from ckptstore.cli.render import safe
from ckptstore.errors import NothingToResumeError, UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.frameworks.areal.launch import logged_config
from ckptstore.frameworks.areal.saving import first_saved
from ckptstore.listing import scan
from ckptstore.locate import Located, Where, locate

Function = Callable[..., Any]


def _compose(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


_LOCATION = _compose(
    click.option("--run", metavar="DIR", default="", help="The run's own folder: …/checkpoints/USER/EXPERIMENT/TRIAL."),
    click.option(
        "--fileroot",
        metavar="DIR",
        default="",
        help="What the trainer's YAML calls cluster.fileroot. [$CKPTSTORE_FILEROOT]",
    ),
    click.option("--user", metavar="NAME", default="", help="Whose run: the folder below checkpoints/."),
    click.option(
        "-e",
        "--experiment-name",
        "experiment",
        metavar="NAME",
        default="",
        help="experiment_name of the YAML.",
    ),
    click.option("-t", "--trial-name", "trial", metavar="NAME", default="", help="trial_name of the YAML."),
    click.option(
        "--config",
        metavar="YAML",
        default="",
        help="The trainer's own YAML: names and fileroot are taken from it.",
    ),
)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")

_SELECTION = _compose(
    click.option("--before-step", type=int, metavar="N", help="Newest good one with global step < N."),
    click.option("--max-step", type=int, metavar="N", help="Newest good one with global step ≤ N, N included."),
    click.option("--step", type=int, metavar="N", help="The checkpoint of exactly this global step."),
    click.option(
        "--log-step",
        type=int,
        metavar="N",
        help="The same by the log's number: Train step N is global step N - 1.",
    ),
    click.option("--checkpoint-path", metavar="DIR", default="", help="A checkpoint's own folder."),
)

JSON = click.option("--json", "as_json", is_flag=True, help="For programs: one JSON document (docs/cli.md).")


def location_options(function: Function) -> Function:
    """Adds the options that say where the run is; the verb gets one `where`. KEY=VALUE words belong to --config."""

    @functools.wraps(function)
    def wrapper(*args: Any, run: str, fileroot: str, user: str, experiment: str, trial: str, config: str, **rest: Any) -> Any:
        where = Where(run, fileroot, user, experiment, trial, config, tuple(rest.pop("overrides", ())))
        return function(*args, where=where, **rest)

    return _LOCATION(wrapper)


def selection_options(function: Function) -> Function:
    """Adds the options that say which checkpoint; the verb gets one `selection`."""

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        before_step: int | None,
        max_step: int | None,
        step: int | None,
        log_step: int | None,
        checkpoint_path: str,
        **rest: Any,
    ) -> Any:
        if log_step is not None:
            if step is not None:
                raise UsageError("--step and --log-step name the same thing: give one")
            if log_step < 1:
                raise UsageError(f"--log-step {log_step}: the log counts from 1")
            step = log_step - 1
        selection = Selection(before_step=before_step, max_step=max_step, step=step, checkpoint_path=checkpoint_path)
        return function(*args, selection=selection, **rest)

    return _SELECTION(wrapper)


def split_words(words: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Positional words: steps, and KEY=VALUE overrides for --config."""
    steps, overrides = [], []
    for word in words:
        if word.isdigit():
            steps.append(int(word))
        elif "=" in word:
            overrides.append(word)
        else:
            raise UsageError(
                f"{word!r} is neither a step nor KEY=VALUE",
                hint="Steps are global steps: see `ckptstore list`.",
            )
    return steps, tuple(overrides)


def open_run(where: Where, *, quiet: bool = False) -> tuple[Located, Backend]:
    """Find the run, finish what a crash interrupted there, and open it. What is worth knowing goes to stderr."""
    located = locate(where, ask=_ask if sys.stdin.isatty() and sys.stdout.isatty() and not quiet else None)
    for warning in located.warnings:
        note(warning)
    slot = f"{located.run.path}/{layout.MAIN_PART}/{layout.SLOT}"
    if rolled := commit.roll_forward(side_folders.side_folder(located.run.path, slot)):
        note(rolled)
    return located, open_backend(located.run.path)


@contextlib.contextmanager
def explaining_gaps(located: Located, selection: Selection) -> Iterator[None]:
    """Adds to NothingToResumeError which setting of the run would have saved a checkpoint in time."""
    try:
        yield
    except NothingToResumeError as error:
        config = located.config or logged_config(located.run)
        if config is not None and selection.bound is not None:
            steps = [c for c in scan(open_backend(located.run.path)).checkpoints if c.epoch > 0]
            per_epoch = (steps[0].step - steps[0].epoch_step) // steps[0].epoch if steps else 0
            error.hint = f"{error.hint} {first_saved(config, per_epoch, selection.bound + 1)}"
        raise


def note(text: str) -> None:
    """A line for people beside the result: to stderr, so that --json stays clean."""
    click.echo(f"{click.style('note:', fg='yellow')} {safe(text)}", err=True)


def _ask(question: str, choices: Sequence[str]) -> str:
    for number, choice in enumerate(choices, 1):
        click.echo(f"  {number}  {safe(choice)}")
    picked: int = click.prompt(question, type=click.IntRange(1, len(choices)))
    return choices[picked - 1]
