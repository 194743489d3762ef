"""`ckptstore list`: every checkpoint of a run, and what of it is whole."""

from __future__ import annotations

import time

import click

from ckptstore.cli.common import JSON, OVERRIDES, location_options, open_run
from ckptstore.cli.render import (
    age,
    checkpoint_json,
    columns,
    echo,
    findings,
    info_json,
    print_json,
    run_json,
    safe,
    size,
    status,
    steps,
)
from ckptstore.errors import NothingToResumeError, UsageError
from ckptstore.frameworks.areal.launch import logged_config
from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.frameworks.areal.saving import describe
from ckptstore.listing import Listing, scan
from ckptstore.locate import Located, Where
from ckptstore.model import Checkpoint

TITLES = (
    "step",
    "log step",
    "epoch",
    "epoch step",
    "parts",
    "holds",
    "format",
    "files",
    "size",
    "age",
    "status",
)
_LEFT = (4, 5, 6)


@click.command("list", short_help="What is there, and what of it is whole.")
@location_options
@click.option("--before-step", type=int, metavar="N", help="Only global steps < N.")
@click.option("--max-step", type=int, metavar="N", help="Only global steps ≤ N (N included).")
@click.option("--log-step", type=int, metavar="N", help="Only the checkpoint that the log calls Train step N.")
@click.option("--latest", is_flag=True, help="Only the newest whole one.")
@click.option(
    "--recover-info",
    is_flag=True,
    help="What recover_info says: which step it resumes after, what state it holds.",
)
@JSON
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

    Steps are the folder's globalstep, counted from 0; the trainer's log counts from 1 and says "Train step N+1".
    """
    if before_step is not None and max_step is not None:
        raise UsageError("--before-step and --max-step both bound the step: give one")
    located, backend = open_run(where, quiet=as_json)
    listing = scan(backend)
    shown = [
        checkpoint
        for checkpoint in listing.checkpoints
        if (before_step is None or checkpoint.step < before_step)
        and (max_step is None or checkpoint.step <= max_step)
        and (log_step is None or checkpoint.log_step == log_step)
    ]
    if latest:
        shown = [checkpoint for checkpoint in shown if checkpoint.status.usable][-1:]
        if not shown:
            raise NothingToResumeError(f"no whole checkpoint in {located.run.path}", hint="`ckptstore list` shows all of them.")
    if as_json:
        _print_json(located, listing, shown)
        return
    _print_text(located, listing, shown, recover_info=recover_info, max_step=max_step, before_step=before_step)


def _print_json(located: Located, listing: Listing, shown: list[Checkpoint]) -> None:
    print_json(
        {
            "run": run_json(located),
            "checkpoints": [checkpoint_json(checkpoint) for checkpoint in shown],
            "slot": checkpoint_json(listing.slot) if listing.slot else None,
            "recover_info": info_json(listing.recover_info),
            "notes": [safe(note) for note in listing.notes],
        }
    )


def _print_text(
    located: Located,
    listing: Listing,
    shown: list[Checkpoint],
    *,
    recover_info: bool,
    max_step: int | None,
    before_step: int | None,
) -> None:
    now_s = time.time()
    echo(f"{click.style('run', bold=True)}   {safe(located.how)}")
    if max_step is not None:
        echo(f"steps up to {max_step}, {max_step} included")
    if before_step is not None:
        echo(f"steps before {before_step}, {before_step} not included")
    echo()
    rows = [_row(checkpoint, now_s) for checkpoint in shown]
    if rows:
        echo("\n".join(columns(TITLES, rows, left=_LEFT)))
    else:
        echo("no checkpoints" + (f" within the bound; the run has {len(listing.checkpoints)}" if listing.checkpoints else ""))
    damaged = [checkpoint for checkpoint in shown if checkpoint.findings]
    if damaged:
        echo()
        for checkpoint in damaged[-8:]:
            echo(f"step {checkpoint.step} is {checkpoint.status}:")
            echo("\n".join(findings(checkpoint.findings, limit=4)))
        if len(damaged) > 8:
            echo(f"and {len(damaged) - 8} more that are not whole (--json has all)")
    for checkpoint in shown[-200:]:
        for note in (note for part in checkpoint.parts for note in part.notes):
            echo(f"step {checkpoint.step}: {safe(note)}")
    echo()
    _print_slot(listing, now_s)
    _print_info(listing.recover_info, full=recover_info)
    for text in listing.notes:
        echo(f"{click.style('note', fg='yellow')}  {safe(text)}")
    config = located.config or logged_config(located.run)
    for text in describe(config) if config else ():
        echo(f"{safe(text)}  ({safe(config.path)})" if config else "")
    newest = next((checkpoint for checkpoint in reversed(shown) if checkpoint.status.usable), None)
    if newest is not None:
        echo(f"\nnewest whole: {steps(newest)}")


def _row(checkpoint: Checkpoint, now_s: float) -> tuple[str, ...]:
    return (
        str(checkpoint.step) if checkpoint.step >= 0 else "?",
        str(checkpoint.log_step) if checkpoint.step >= 0 else "?",
        str(checkpoint.epoch) if checkpoint.epoch >= 0 else "?",
        str(checkpoint.epoch_step) if checkpoint.epoch_step >= 0 else "?",
        safe(" ".join(part.name for part in checkpoint.parts)),
        " ".join(checkpoint.holds) or "-",
        checkpoint.format,
        str(checkpoint.file_count),
        size(checkpoint.size_bytes),
        age(checkpoint.age_s(now_s)) if checkpoint.saved_at_s else "-",
        status(checkpoint.status),
    )


def _print_slot(listing: Listing, now_s: float) -> None:
    slot = listing.slot
    if slot is None:
        echo("recover slot: empty")
        return
    step = f"step {slot.step}" if slot.step >= 0 else "unknown step"
    echo(
        f"recover slot: {step}, {slot.format} ({' '.join(slot.holds) or 'nothing known'}), "
        f"{slot.file_count} files, {size(slot.size_bytes)}, {age(slot.age_s(now_s))} old  {status(slot.status)}"
    )
    for line in findings(slot.findings):
        echo(line)
    for text in slot.notes:
        echo(f"  {safe(text)}")


def _print_info(info: RecoverInfo | None, *, full: bool) -> None:
    if info is None:
        echo("recover_info: none (with recover.mode=auto AReaL starts from step 0)")
        return
    if info.step >= 0:
        echo(f"recover_info: after global step {info.step}; training would go on at global step {info.resumes_at}")
    else:
        echo("recover_info: its step cannot be read")
    if full:
        echo(f"  holds: {', '.join(info.holds) or 'nothing readable'}")
        echo(f"  epoch {info.epoch}, epoch step {info.epoch_step}, {info.steps_per_epoch} steps per epoch")
        echo(f"  dataloader state: {info.dataloader_bytes:,} bytes (a pickle; not opened)")
    for problem in info.problems:
        echo(f"  {click.style('·', fg='yellow')} {safe(problem)}")
