"""The way to a run that the options name: found, said which it is, mended where a crash interrupted something, and opened."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import click

from ckptstore import commit, native
from ckptstore import journal as journals
from ckptstore import side as side_folders
from ckptstore.backends import Backend, is_url, normal_url, open_backend
from ckptstore.choose import Selection
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
from ckptstore.saves import steps


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
                hint="list, show, verify, status, plot, doctor, push, repair, prune and clean know it; training loads from it.",
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
            note(f"the run is here: nobody looked whether {said} has newer checkpoints; --from {url} takes the newest of both")
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


def pick(listing: Listing, steps: Sequence[int], *, adopted: bool = False) -> list[Checkpoint]:
    """The exports of these global steps, and with `adopted` kept slots too. NotFoundError for a step that has none."""
    chosen = []
    for step in steps:
        kept = [checkpoint for checkpoint in listing.adopted if checkpoint.step == step]
        found = [*listing.at_step(step), *(kept if adopted else ())]
        if kept and not found:
            raise NotFoundError(
                f"global step {step} is no export in {listing.run.path}: it is a slot that was adopted",
                hint="`show`, `verify` and `setup` take it; `ckptstore watch --to URL` sends it, with its recover_info.",
            )
        if not found:
            there = sorted({checkpoint.step for checkpoint in (*listing.checkpoints, *(listing.adopted if adopted else ()))})
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
