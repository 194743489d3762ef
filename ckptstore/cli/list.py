"""`ckptstore list`: every checkpoint of a run, and what of it is whole."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from ckptstore import halt, places
from ckptstore.backends import is_url
from ckptstore.backends.base import Backend
from ckptstore.cli.common import JSON, OVERRIDES, Verb, WhichOption, from_log_step, location_options
from ckptstore.cli.opening import gap, note_other_at_work, open_run
from ckptstore.cli.render import (
    NO_VERDICT,
    age,
    checkpoint_json,
    columns,
    echo,
    field,
    findings,
    info_json,
    item,
    note,
    print_json,
    run_json,
    safe,
    state,
    status,
    steps,
    width,
)
from ckptstore.errors import NothingToResumeError, StorageError, UsageError
from ckptstore.frameworks.areal.launch import logged_config
from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.frameworks.areal.saving import describe, settings
from ckptstore.listing import Listing, scan
from ckptstore.locate import Located, Where
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.parts import worsen
from ckptstore.sizes import counted, size
from ckptstore.verify import verify

TITLES = ("step", "log", "epoch:step", "parts", "holds", "format", "files", "size", "age", "status")
_LEFT = frozenset({"parts", "holds", "format", "health", "status"})
#: What a narrow terminal does without, in this order; a pipe gets everything.
_DISPENSABLE = ("parts", "files", "format", "epoch:step", "holds", "log")
_AREAL_ONLY = frozenset({"log", "epoch:step", "parts"})
_MANY = 8
_TORN = 3  #: how many of the newest are looked into at most

if TYPE_CHECKING:
    from ckptstore.cli.condition import Shown

    Verdicts = Mapping[int, Shown]


@click.command("list", cls=Verb, short_help="What is there, and what of it is whole.")
@click.option("--before-step", type=int, metavar="N", cls=WhichOption, help="Only global steps < N.")
@click.option("--max-step", type=int, metavar="N", cls=WhichOption, help="Only global steps ≤ N, N included.")
@click.option("--log-step", type=int, metavar="N", cls=WhichOption, help="Only the one that the log calls Train step N.")
@click.option("--latest", is_flag=True, cls=WhichOption, help="Only the newest whole one.")
@click.option(
    "--recover-info",
    is_flag=True,
    help="The slot and recover_info instead: which step training would go on after, with what state.",
)
@JSON
@location_options
@OVERRIDES
def command(
    where: Where,
    before_step: int | None,
    max_step: int | None,
    log_step: int | None,
    latest: bool,
    recover_info: bool,
    as_json: bool,
) -> None:
    """List all checkpoints of a run with step, content, size, age and status, and the recover slot.

    Steps are the folder's globalstep, counted from 0. The trainer's log counts from 1: its "Train step 188" is step 187
    (column log). epoch:step are the two other numbers of the folder's name.
    """
    if before_step is not None and max_step is not None:
        raise UsageError("--before-step and --max-step both bound the step: give one")
    step = from_log_step(log_step) if log_step is not None else None
    located, backend = open_run(where, as_json=as_json, remote=True, steps_too=True)
    listing = _looked_into(backend, scan(backend))
    verdicts = _verdicts(located.run.path, [*listing.checkpoints, *listing.adopted, *([listing.slot] if listing.slot else [])])
    shown = [
        checkpoint
        for checkpoint in sorted([*listing.checkpoints, *listing.adopted], key=lambda one: (one.step, one.kind == "adopted"))
        if (before_step is None or checkpoint.step < before_step)
        and (max_step is None or checkpoint.step <= max_step)
        and (step is None or checkpoint.step == step)
    ]
    bounds = [number for number in (before_step - 1 if before_step is not None else None, max_step, step) if number is not None]
    bound = min(bounds, default=None)
    if latest:
        shown = [checkpoint for checkpoint in shown if checkpoint.status.usable and not checkpoint.left][-1:]
        if not shown:
            raise NothingToResumeError(
                f"no whole checkpoint{_within(before_step, max_step, step)} in {located.run.path}",
                hint=f"`ckptstore list` shows all. {gap(located, listing, bound)}".rstrip(),
            )
    if as_json:
        _print_json(located, listing, shown, verdicts)
        return
    note_other_at_work(located)
    if not recover_info:
        _print_table(located, listing, shown, _within(before_step, max_step, step), bound, verdicts)
    there = is_url(located.run.path) and listing.slot is None and listing.recover_info is None  # where no trainer reads one
    if listing.framework != "steps" and not there:
        echo()
        _print_slot(listing, verdicts)
        _print_info(listing.recover_info, full=recover_info)
    if not is_url(located.run.path) and (trip := halt.read(places.side_of(located.run.path))) is not None:
        if listing.framework == "steps":
            echo()
        field("breaker", f"TRIPPED at step {trip.step}: training does not start (`ckptstore status` says what starts it)")
    if not recover_info:
        _print_config(located)
        for text in listing.notes:
            note(text)
        _print_end(listing, shown, verdicts, (before_step, max_step), typed=where.typed())


def _looked_into(backend: Backend, listing: Listing) -> Listing:
    """The listing, with the newest exports that nobody sealed as their formats show them: a save that a crash tore may have all
    its names, and sizes that only its own headers belie. Those before one that is whole are older than the crash.
    """
    found = list(listing.checkpoints)
    for index in range(len(found) - 1, max(len(found) - 1 - _TORN, -1), -1) if backend.is_folder else ():
        if found[index].status is Status.COMMITTED:
            break
        if found[index].status is Status.COMPLETE:
            try:
                found[index] = verify(backend, found[index], Level.STRUCTURE).checkpoint
            except StorageError as error:  # a failing medium: the rest is listed all the same
                first, *others = found[index].parts
                found[index] = dataclasses.replace(found[index], parts=(worsen(first, str(error)), *others))
            if found[index].status.usable:
                break
    return dataclasses.replace(listing, checkpoints=tuple(found))


def _verdicts(run: str, checkpoints: Sequence[Checkpoint]) -> Verdicts:
    """What is known of each checkpoint's health, by its identity; nothing where there are no metrics."""
    if not places.has_metrics(run):
        return {}
    from ckptstore.cli import condition  # 20 ms, where many runs have none

    return condition.of_all(run, checkpoints)


def _within(before_step: int | None, max_step: int | None, step: int | None) -> str:
    if step is not None:
        return f" of step {step}, the log's {step + 1}"
    if before_step is not None:
        return f" before step {before_step}"
    return f" up to step {max_step}, {max_step} included" if max_step is not None else ""


def _print_json(located: Located, listing: Listing, shown: list[Checkpoint], verdicts: Verdicts) -> None:
    def described(checkpoint: Checkpoint) -> dict[str, object]:
        found = verdicts[id(checkpoint)].json if verdicts else NO_VERDICT
        return checkpoint_json(checkpoint) | found

    config = located.config or logged_config(located.run)
    print_json(
        {
            "run": run_json(located),
            "checkpoints": [described(checkpoint) for checkpoint in shown],
            "slot": described(listing.slot) if listing.slot else None,
            "recover_info": info_json(listing.recover_info),
            "config": settings(config) if config else None,
            "notes": list(listing.notes),
        }
    )


def _print_table(
    located: Located, listing: Listing, shown: list[Checkpoint], within: str, bound: int | None, verdicts: Verdicts
) -> None:
    if within and shown:
        echo(f"checkpoints{within}")
    echo()
    if not shown:
        field("none", f"no checkpoint{within} in {listing.run.path}")
        if listing.checkpoints:
            there = [checkpoint.step for checkpoint in listing.checkpoints]
            field("", f"the run has {len(there)}, from step {there[0]} to {there[-1]}")
        else:
            steps_only = "step-{N}/, as CheckpointStore.save names them"
            areal = "PART/epoch{E}epochstep{S}globalstep{G}/, as AReaL's saver names them"
            field("", f"looked for {steps_only if listing.framework == 'steps' else areal}")
        if text := gap(located, listing, bound):
            field("", text)
        return
    now_s = time.time()
    titles: tuple[str, ...] = TITLES
    rows = [_row(checkpoint, now_s) for checkpoint in shown]
    if verdicts:
        titles = (*titles[:-1], "reward", "health", titles[-1])
        cells = [verdicts[id(checkpoint)].cells for checkpoint in shown]
        rows = [(*row[:-1], *more, row[-1]) for row, more in zip(rows, cells, strict=True)]
    if listing.framework == "steps":
        kept = [index for index, title in enumerate(titles) if title not in _AREAL_ONLY]
        titles, rows = tuple(titles[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]
    echo("\n".join(_fitting(titles, rows)))
    _print_damage(shown)
    notes = [
        f"step {checkpoint.step}: {text}" for checkpoint in shown[-200:] for part in checkpoint.parts for text in part.notes
    ]
    if notes:
        echo()
    for text in notes[-_MANY:]:
        note(text)
    if len(notes) > _MANY:
        note(f"and {len(notes) - _MANY} more such notes (--json has all)")
    _print_left(shown)
    _print_prefixes(shown)


def _print_left(shown: list[Checkpoint]) -> None:
    """Which of them are of a history that training has left, a line for each time that it went back."""
    by_reason: dict[str, list[int]] = {}
    for checkpoint in shown:
        if checkpoint.left:
            by_reason.setdefault(checkpoint.left, []).append(checkpoint.step)
    if by_reason:
        echo()
    for why, gone in list(by_reason.items())[-_MANY:]:
        which = f"steps {gone[0]} to {gone[-1]} ({len(gone)})" if len(gone) > 1 else f"step {gone[0]}"
        note(f"{which}: {safe(why)}; only who names it gets it")


def _print_prefixes(shown: list[Checkpoint]) -> None:
    """Where other tools find the files of a part, where that is not the folder of its name: an attempt's."""
    beside = [(checkpoint, part) for checkpoint in shown for part in checkpoint.parts if part.files_path != part.path]
    if beside:
        echo()
    for checkpoint, part in beside[-_MANY:]:
        field("files", f"step {checkpoint.step}, {part.name}: below {part.files_path}/")
    if len(beside) > _MANY:
        note(f"and {len(beside) - _MANY} more that lie below an attempt (--json has all: files_path)")


def _fitting(all_titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The table, without columns that people can spare where the terminal is too narrow for all."""
    titles = list(all_titles)
    available = width()
    for name in ("", *_DISPENSABLE):
        if name in titles and (name != "parts" or len({row[all_titles.index("parts")] for row in rows}) == 1):
            titles.remove(name)
        kept = [all_titles.index(title) for title in titles]
        chosen = [tuple(row[i] for i in kept) for row in rows]
        lines = columns(titles, chosen, left=[i for i, title in enumerate(titles) if title in _LEFT])
        if not available or max(len(click.unstyle(line)) for line in (lines[0], *lines[-50:])) <= available:
            break
    return lines


def _row(checkpoint: Checkpoint, now_s: float) -> tuple[str, ...]:
    epoch = f"{checkpoint.epoch}:{checkpoint.epoch_step}" if checkpoint.epoch >= 0 else "?"
    return (
        str(checkpoint.step) if checkpoint.step >= 0 else "?",
        str(checkpoint.log_step) if checkpoint.step >= 0 else "?",
        epoch,
        safe(" ".join(part.name for part in checkpoint.parts)) + (" (adopted)" if checkpoint.kind == "adopted" else ""),
        state(checkpoint.holds),
        checkpoint.format,
        str(checkpoint.file_count),
        size(checkpoint.size_bytes),
        age(checkpoint.age_s(now_s)) if checkpoint.saved_at_s else "-",
        status(checkpoint.status) + " (left)" * bool(checkpoint.left),
    )


def _print_damage(shown: list[Checkpoint]) -> None:
    damaged = [checkpoint for checkpoint in shown if checkpoint.findings]
    if not damaged:
        return
    from ckptstore.running import RECENT_S  # only then: the listing must start in a blink

    echo()
    if len(damaged) > _MANY:
        echo(f"{len(damaged)} are not whole; the newest of them:")
    for checkpoint in damaged[-_MANY:]:
        young = checkpoint.status is Status.PARTIAL and checkpoint.saved_at_s and abs(checkpoint.age_s()) < RECENT_S
        when = f", written {age(checkpoint.age_s())} ago: it may still be being saved" if young else ""
        echo(f"step {checkpoint.step} is {status(checkpoint.status)}{when}")
        findings(checkpoint.findings, limit=2, more=f" (`ckptstore show {checkpoint.step}`)")


def _print_slot(listing: Listing, verdicts: Verdicts) -> None:
    slot = listing.slot
    if slot is None:
        field("slot", "empty: nothing that AReaL could resume from")
        return
    step = f"step {slot.step}" if slot.step >= 0 else "unknown step"
    field(
        "slot",
        f"{step}, {slot.format}: {', '.join(slot.holds) or 'nothing known'}; {counted(slot.file_count, 'file')}, "
        f"{size(slot.size_bytes)}, {_old(slot.age_s())}, {slot.status}",
    )
    if verdicts and slot.step >= 0:
        field("", verdicts[id(slot)].text)
    findings(slot.findings)
    for text in slot.notes:
        item("·", text)


def _old(age_s: float) -> str:
    said = age(age_s)
    return f"saved {said}" if said.startswith("in ") else f"{said} old"


def _print_info(info: RecoverInfo | None, *, full: bool) -> None:
    if info is None:
        field("resume", "no recover_info/: with recover.mode=auto AReaL starts from step 0")
        return
    if info.step >= 0:
        field("resume", f"recover_info says: after global step {info.step}, so training would go on at {info.resumes_at}")
    else:
        field("resume", "recover_info does not say after which step")
    if full:
        field("", f"epoch {info.epoch}, epoch step {info.epoch_step}; {counted(info.steps_per_epoch, 'step')} per epoch")
        field("holds", ", ".join(info.holds) or "nothing readable")
        field("", f"dataloader state: {info.dataloader_bytes:,} bytes (a pickle: never opened)")
    for text in info.problems:
        item("·", text, fg="yellow")


def _print_config(located: Located) -> None:
    config = located.config or logged_config(located.run)
    if config is None:
        return
    for label, text in describe(config):
        field(label, text)
    field("config", config.path)


def _print_end(
    listing: Listing, shown: list[Checkpoint], verdicts: Verdicts, bounds: tuple[int | None, int | None], *, typed: str
) -> None:
    """The newest whole one, and the commands that look at it next, with what was typed to find the run."""
    before_step, max_step = bounds
    newest = next((checkpoint for checkpoint in reversed(shown) if checkpoint.status.usable and not checkpoint.left), None)
    if newest is None:
        return
    echo()
    left = " that training has not left" * any(checkpoint.left for checkpoint in shown)
    field("newest", f"{steps(newest)} is the newest whole one listed{left}")
    bad = bool(verdicts) and not verdicts[id(newest)].resumable
    if bad:
        ours = listing.framework == "steps"
        who = "a load that names no step passes it over" if ours else "setup passes it over (--include-bad does not)"
        field("", f"{verdicts[id(newest)].text}: {who}")
    elif verdicts and verdicts[id(newest)].fallen:
        field("", f"{verdicts[id(newest)].text} (`ckptstore plot` shows it; data that turned harder looks the same)")
    bound = (
        f" --before-step {before_step}"
        if before_step is not None
        else f" --max-step {max_step}"
        if max_step is not None
        else ""
    )
    place = shlex.quote(listing.run.path)
    at, source = (f" --run {place}", f" --from {place}") if is_url(listing.run.path) else (typed, typed)
    setup = f"ckptstore setup{bound}{source} --dry-run"
    if listing.framework == "steps":
        field("next", f"ckptstore verify {newest.step} --run {place}")
    elif bad:
        field("next", setup)
    else:
        field("next", f"ckptstore verify {newest.step}{at}")
        field("or", setup)
