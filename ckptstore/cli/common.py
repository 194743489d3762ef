"""What the verbs share: the options that say where the run is and which checkpoint is meant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from ckptstore.backends import is_url, normal_url
from ckptstore.choose import STATE_WORTH_STEPS, Selection
from ckptstore.errors import UsageError
from ckptstore.locate import Where

Function = Callable[..., Any]


class WhereOption(click.Option):
    """An option that says where the run is."""

    group = "Where the run is"


class WhichOption(click.Option):
    """An option that says which checkpoint is meant."""

    group = "Which checkpoint"


class TrainerOption(click.Option):
    """An option that says what will train."""

    group = "What will train"


@dataclass(frozen=True, slots=True)
class Trainer:
    """What the user said about the training that is to resume."""

    areal_dir: str
    areal_version: str
    world_size: int
    steps_per_epoch: int
    write_frequencies: bool
    new_trial: str = ""


class Verb(click.Command):
    """A command whose help keeps what belongs together together, and what most people need first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by group; those without one are the verb's own."""
        titles = (WhichOption.group, "Options", TrainerOption.group, WhereOption.group)
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups[getattr(parameter, "group", "Options")].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _compose(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


_where = functools.partial(click.option, cls=WhereOption, default="")
_which = functools.partial(click.option, cls=WhichOption)

_trainer = functools.partial(click.option, cls=TrainerOption)

_LOCATION = _compose(
    _where("-e", "--experiment-name", "experiment", metavar="NAME", help="experiment_name of the YAML."),
    _where("-t", "--trial-name", "trial", metavar="NAME", help="trial_name of the YAML."),
    _where("--user", metavar="NAME", help="Whose run: the folder below checkpoints/."),
    _where("--fileroot", metavar="DIR", help="cluster.fileroot of the YAML, or a URL. [$CKPTSTORE_FILEROOT]"),
    _where(
        "--config", metavar="YAML", help="The trainer's own YAML: names and fileroot are taken from it; KEY=VALUE overrides."
    ),
    _where("--run", metavar="DIR", help="The run's own folder: …/checkpoints/USER/EXPERIMENT/TRIAL; or a URL."),
)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")

_SELECTION = _compose(
    _which("--before-step", type=int, metavar="N", help="The newest good one with global step < N."),
    _which("--max-step", type=int, metavar="N", help="The newest good one with global step ≤ N, N included."),
    _which("--step", type=int, metavar="N", help="The one of exactly this global step."),
    _which("--log-step", type=int, metavar="N", help="The same by the log's number: Train step N is global step N - 1."),
    _which("--checkpoint-path", default="", metavar="DIR", help="A checkpoint's own folder."),
    _which(
        "--prefer",
        type=click.Choice(["state", "newest"]),
        default="state",
        show_default=True,
        help=f"state: optimizer state beats weights alone that are up to {STATE_WORTH_STEPS} steps newer.",
    ),
    _which("--from", "url", default="", metavar="URL", help="From this run in an object store, unless what is here is newer."),
    _which("--include-bad", is_flag=True, help="Although its metrics say that training had gone bad (see status)."),
)

_TRAINER = _compose(
    _trainer("--areal-dir", default="", metavar="DIR", help="The AReaL that will train: a checkout, or the package's folder."),
    _trainer("--areal-version", default="", metavar="V", help="Its version, where it is not on this machine."),
    _trainer(
        "--world-size",
        type=click.IntRange(1),
        default=None,
        metavar="N",
        help="Its trainer processes, where the YAML does not tell.",
    ),
    _trainer("--steps-per-epoch", type=click.IntRange(1), default=None, metavar="N", help="Where the run does not tell."),
    _trainer("--new-trial", default="", metavar="NAME", help="A fresh trial instead of the slot: the old one is untouched."),
    _trainer(
        "--write-frequencies", is_flag=True, help="How often to save: the YAML's, even over the trainer's own recover_info."
    ),
)

LOG_STEP = _which(
    "--log-step",
    "log_steps",
    type=int,
    multiple=True,
    metavar="N",
    help="By the log's number: Train step N is global step N - 1.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="For programs: one JSON document (docs/cli.md).")


def location_options(function: Function) -> Function:
    """Adds the options that say where the run is; the verb gets one `where`. KEY=VALUE words belong to --config."""

    @functools.wraps(function)
    def wrapper(*args: Any, run: str, fileroot: str, user: str, experiment: str, trial: str, config: str, **rest: Any) -> Any:
        overrides = tuple(rest.pop("overrides", ()))
        for word in overrides:
            if "=" not in word:
                raise UsageError(f"{word!r} is not KEY=VALUE", hint=_other_than_a_step(word))
        where = Where(run, fileroot, user, experiment, trial, config, overrides)
        return function(*args, where=where, **rest)

    return _LOCATION(wrapper)


def _other_than_a_step(word: str) -> str:
    """What to say to somebody who gave a step as a word to a verb that takes none."""
    context = click.get_current_context(silent=True)
    verb = context.command if context else None
    known = {name for option in (verb.params if verb else ()) for name in option.opts}
    option = next((name for name in ("--step", "--max-step") if name in known), "")
    if option and word.isascii() and word.isdigit():
        return f"Steps are given by an option here: {option} {word}."
    return f"`{context.command_path} --help`" if context else ""


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
        prefer: str,
        include_bad: bool,
        url: str,
        **rest: Any,
    ) -> Any:
        if log_step is not None:
            if step is not None:
                raise UsageError("--step and --log-step name the same thing: give one")
            step = from_log_step(log_step)
        if url and not is_url(url):
            raise UsageError(f"--from {url} is no URL", hint="A checkpoint's folder is named by --checkpoint-path.")
        url = normal_url(url) if url else ""
        selection = Selection(before_step, max_step, step, checkpoint_path, prefer, include_bad, url)
        return function(*args, selection=selection, **rest)

    return _SELECTION(wrapper)


def trainer_options(function: Function) -> Function:
    """Adds the options that say what will train; the verb gets one `trainer`."""

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        areal_dir: str,
        areal_version: str,
        world_size: int | None,
        steps_per_epoch: int | None,
        write_frequencies: bool,
        new_trial: str,
        **rest: Any,
    ) -> Any:
        trainer = Trainer(areal_dir, areal_version, world_size or 0, steps_per_epoch or 0, write_frequencies, new_trial)
        return function(*args, trainer=trainer, **rest)

    return _TRAINER(wrapper)


def from_log_step(log_step: int) -> int:
    """The global step that the trainer's log calls `log_step`."""
    if log_step < 1:
        raise UsageError(f"--log-step {log_step}: the log counts from 1")
    return log_step - 1


def read_words(where: Where, words: Sequence[str], log_steps: Sequence[int] = ()) -> tuple[Where, list[int]]:
    """Positional words: steps, and KEY=VALUE overrides for --config."""
    steps = [from_log_step(number) for number in log_steps]
    overrides = []
    for word in words:
        if word.isascii() and word.isdigit():
            steps.append(int(word))
        elif "=" in word:
            overrides.append(word)
        else:
            raise UsageError(
                f"{word!r} is neither a step nor KEY=VALUE",
                hint="Steps are global steps: `ckptstore list` shows which there are.",
            )
    return dataclasses.replace(where, overrides=tuple(overrides)), steps
