"""What the verbs share: the options that say where the run is, which checkpoint is meant, and the way in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from ckptstore import commit, native, steps
from ckptstore import journal as journals
from ckptstore import side as side_folders
from ckptstore.backends import Backend, is_url, normal_url, open_backend
from ckptstore.choose import STATE_WORTH_STEPS, Selection
from ckptstore.cli.render import echo, field, note, safe
from ckptstore.cli.urls import HERE, said_url
from ckptstore.errors import BusyError, NotFoundError, NothingToResumeError, UsageError, from_os_error
from ckptstore.frameworks import steps as steps_layout
from ckptstore.frameworks.areal import layout
from ckptstore.frameworks.areal.launch import logged_config
from ckptstore.frameworks.areal.saving import first_saved
from ckptstore.listing import Listing, scan
from ckptstore.locate import Located, NoRunError, RemoteError, Where, locate, named_run
from ckptstore.lock import busy
from ckptstore.model import Checkpoint

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
    _which("--from", "url", default="", metavar="URL", help="From this run in an object store, straight into the slot."),
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


def open_run(
    where: Where, *, as_json: bool = False, read_only: bool = False, remote: bool = False, steps_too: bool = False
) -> tuple[Located, Backend]:
    """Find the run, say which it is, and open it. UsageError for a store of steps, unless `steps_too`.

    What a crash interrupted there is finished first; with `read_only`, for a call that must not change anything,
    BusyError says that it is pending. With `remote` the run may be a URL, where nothing is ever pending.
    """
    located = find_run(where, as_json=as_json, remote=remote)
    if not as_json:
        field("run", f"{located.run.path}  ({located.how})")
    for warning in located.warnings:
        note(warning)
    if is_url(located.run.path):
        return located, open_backend(located.run.path)
    if is_steps(located.run.path):
        if not steps_too:
            raise UsageError(
                f"{located.run.path} is a store of steps: this verb is for AReaL's runs",
                hint="list, show, verify, status, plot, doctor, push, prune and clean know it; training loads it by itself.",
            )
        if not read_only and steps.needs_mending(located.run.path):
            with steps.locked(located.run.path, "mending"):
                note("finished a save that was interrupted")
        return located, open_backend(located.run.path)
    slot = f"{located.run.path}/{layout.MAIN_PART}/{layout.SLOT}"
    side = side_folders.side_folder(located.run.path, slot)
    if read_only:
        journal = journals.pending(side)
        if journal is not None and busy(side) is None:
            raise BusyError(
                f"a {journal.action} of step {journal.step} was interrupted while it replaced the slot",
                hint="`ckptstore list` finishes it: the slot is whole then. Nothing was changed now.",
            )
    elif rolled := commit.roll_forward(side):
        note(rolled)
    return located, open_backend(located.run.path)


def find_run(where: Where, *, as_json: bool = False, remote: bool = False) -> Located:
    """The run that is meant. Where a URL will do (`remote`), and nothing of it is here, the one that is named for it."""
    try:
        return locate(where, ask=_ask if is_interactive() and not as_json else None, remote=remote)
    except RemoteError as error:
        context = click.get_current_context(silent=True)
        error.hint = HERE.get(context.info_name or "" if context else "", error.hint)
        raise
    except NoRunError:
        url, said = said_url(where)
        if not remote or where.run or not url:
            raise
        ref = layout.run_ref(normal_url(url))
        if (where.experiment or ref.experiment, where.trial or ref.trial) != (ref.experiment, ref.trial):
            raise  # another run than the one that was asked for
        return Located(ref, f"it is not here: {said}")


def open_run_for(where: Where, selection: Selection, *, as_json: bool, read_only: bool) -> tuple[Located, Backend, Selection]:
    """The run whose slot is to be filled. On a machine that lost its disk it is made, when what fills it comes from a URL.

    Without --from, $CKPTSTORE_URL or the YAML's is that URL where the run is not here; where it is, its own checkpoints are
    meant.
    """
    try:
        located, backend = open_run(where, as_json=as_json, read_only=read_only)
        url, said = ("", "") if selection.url or selection.checkpoint_path else said_url(where)
        url = normal_url(url) if url else ""
        if url and _holds_nothing(backend):  # a setup that failed made its folder, or AReaL did while it looked
            selection = dataclasses.replace(selection, url=url)
            note(f"the run here is empty: its checkpoints are taken from {said}, {url}")
        elif url:
            note(f"the run is here: nobody looked whether {said} has newer checkpoints; --from {url} takes those")
        return located, backend, selection
    except NoRunError as error:
        url, said = said_url(where, selection.url)
        names = named_run(where)
        known = bool(where.run) or all((names.fileroot, names.experiment, names.trial))
        if url and not known:
            error.hint = (
                "Say which run it shall be on this machine: --config run.yaml (the trainer's own; recover_info needs it, too), "
                f"or --run DIR/checkpoints/USER/EXPERIMENT/TRIAL. Its folder is made, and filled from {normal_url(url)}."
            )
        if not url or not known or os.path.lexists(names.path):
            raise
        if read_only:
            error.hint = f"Without a dry run, {names.path} is made and filled from {normal_url(url)}."
            raise
    if not selection.url:
        if selection.checkpoint_path:
            raise UsageError(f"--checkpoint-path for a run that is not here, and {said} names a URL: give one of them")
        selection = dataclasses.replace(selection, url=normal_url(url))
        note(f"the run is not here: its checkpoints are taken from {said}, {selection.url}")
    try:
        os.makedirs(names.path)
    except OSError as error:
        raise from_os_error(error, doing="creating", path=names.path) from error
    return *open_run(where, as_json=as_json), selection


def _holds_nothing(backend: Backend) -> bool:
    listing = scan(backend)
    return not (listing.checkpoints or listing.adopted or listing.slot or listing.recover_info)


def is_steps(path: str) -> bool:
    """Whether the folder is a store of steps."""
    return steps_layout.is_store(native.scan_tree(path, max_depth=1))


def note_other_at_work(located: Located) -> None:
    """Says so when a setup of this run is in progress."""
    if is_url(located.run.path):
        return
    slot = f"{located.run.path}/{layout.MAIN_PART}/{layout.SLOT}"
    if holder := busy(side_folders.side_folder(located.run.path, slot)):
        note(f"another ckptstore is at work on this run: {holder}")


def is_interactive() -> bool:
    """Whether somebody sits there who can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def pick(listing: Listing, steps: Sequence[int]) -> list[Checkpoint]:
    """The exports of these global steps. NotFoundError for a step that has none."""
    chosen = []
    for step in steps:
        found = listing.at_step(step)
        if not found:
            there = sorted({checkpoint.step for checkpoint in listing.checkpoints})
            near = min(there, key=lambda other: abs(other - step), default=None)
            raise NotFoundError(
                f"no checkpoint of global step {step} in {listing.run.path}",
                hint="There is none at all yet." if near is None else f"The nearest is {near}; `ckptstore list` shows all.",
            )
        chosen += found
    return chosen


def gap(located: Located, listing: Listing, bound: int | None) -> str:
    """Which step of the run is saved first, and which setting would have saved one by `bound`; empty where one was saved."""
    config = located.config or logged_config(located.run)
    if bound is None or bound < 0 or any(checkpoint.step <= bound for checkpoint in listing.checkpoints):
        return ""
    later = next((checkpoint for checkpoint in listing.checkpoints if checkpoint.epoch > 0), None)
    per_epoch = (later.step - later.epoch_step) // later.epoch if later else 0
    if not per_epoch and listing.recover_info is not None:
        per_epoch = max(listing.recover_info.steps_per_epoch, 0)
    return first_saved(config, per_epoch, bound)


@contextlib.contextmanager
def explaining_gaps(located: Located, backend: Backend, selection: Selection) -> Iterator[None]:
    """Adds to NothingToResumeError which setting of the run would have saved a checkpoint in time."""
    try:
        yield
    except NothingToResumeError as error:
        bound = selection.step if selection.step is not None else selection.bound
        if text := gap(located, scan(backend), bound):
            error.hint = f"{error.hint} {text}"
        raise


def _ask(question: str, choices: Sequence[str]) -> str:
    for number, choice in enumerate(choices, 1):
        echo(f"  {number}  {safe(choice)}")
    picked: int = click.prompt(question, type=click.IntRange(1, len(choices)), default=1)
    return choices[picked - 1]
