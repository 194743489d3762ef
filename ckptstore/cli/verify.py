"""`ckptstore verify`: is it whole, and are its bytes those that were written?"""

from __future__ import annotations

import dataclasses

import click

from ckptstore.cli.common import JSON, location_options, open_run, split_words
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import echo, finding_json, findings, print_json, safe, size, status
from ckptstore.errors import NotFoundError, NothingToResumeError, UsageError
from ckptstore.listing import Listing, scan
from ckptstore.locate import Where
from ckptstore.model import Checkpoint, Level
from ckptstore.verify import Report, verify_all


@click.command("verify", short_help="Is it whole, and are its bytes those that were written?")
@location_options
@click.option("--level", type=click.Choice([str(level) for level in Level]), default="full", show_default=True,
              help="quick: names and sizes; structure: what the formats prove; full: every digest.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="All checkpoints; what happens when no step is named.")
@click.option("--slot", is_flag=True, help="The recover slot: what `setup` placed, or what the trainer saved.")
@click.option(
    "--expect-digest",
    metavar="SHA256",
    default="",
    help="The manifest must be exactly this one (printed by show and setup).",
)
@JSON
@click.argument("words", nargs=-1, metavar="[STEP]... [KEY=VALUE]...")
def command(
    where: Where,
    level: str,
    everything: bool,
    slot: bool,
    expect_digest: str,
    as_json: bool,
    words: tuple[str, ...],
) -> int:
    """Verify checkpoints; exit 3 when damage is found. STEPs are global steps.

    Without a manifest (see `seal`), full proves the structure and that every byte can be read.
    """
    steps, overrides = split_words(words)
    if (everything or slot) and steps:
        raise UsageError("name steps, or say --all, or --slot")
    _, backend = open_run(dataclasses.replace(where, overrides=overrides), quiet=as_json)
    listing = scan(backend)
    chosen = _choose(listing, steps, slot=slot)
    with Progress(quiet=as_json) as progress:
        reports = verify_all(backend, chosen, Level(level), progress.notify)
    pinned = not expect_digest or any(expect_digest.lower() in report.manifest_sha256 for report in reports)
    if as_json:
        print_json(
            {
                "level": level,
                "ok": pinned and all(report.ok for report in reports),
                "pinned": pinned,
                "reports": [_json(report) for report in reports],
            }
        )
    else:
        _print(reports)
        if not pinned:
            echo(
                f"{click.style('✗', fg='red')} no manifest has the SHA-256 "
                f"{safe(expect_digest)}: it was changed, or is another one"
            )
    return 0 if pinned and all(report.ok for report in reports) else 3


def _choose(listing: Listing, steps: list[int], *, slot: bool) -> list[Checkpoint]:
    if slot:
        if listing.slot is None:
            raise NotFoundError("the recover slot is empty", hint="`ckptstore setup` fills it.")
        return [listing.slot]
    if not steps:
        if not listing.checkpoints:
            raise NothingToResumeError(f"there is no checkpoint in {listing.run.path}")
        return list(listing.checkpoints)
    chosen = []
    for step in steps:
        found = listing.at_step(step)
        if not found:
            raise NotFoundError(
                f"no checkpoint of step {step} in {listing.run.path}",
                hint="`ckptstore list` shows which there are.",
            )
        chosen += found
    return chosen


def _print(reports: list[Report]) -> None:
    for report in reports:
        checkpoint = report.checkpoint
        name = "slot " if checkpoint.kind == "slot" else ""
        step = checkpoint.step if checkpoint.step >= 0 else "of unknown number"
        detail = f"{checkpoint.file_count} files, {size(checkpoint.size_bytes)}"
        if report.bytes_read and report.seconds > 0:
            detail += f", read at {report.bytes_read / report.seconds / 1e9:.2f} GB/s"
        echo(f"{name}step {step}: {status(checkpoint.status)}  {detail}")
        for line in findings(report.findings):
            echo(line)
        for text in report.notes:
            echo(f"  {safe(text)}")
    bad = [report for report in reports if not report.ok]
    echo(f"{len(reports) - len(bad)} of {len(reports)} whole at level {reports[0].level}")


def _json(report: Report) -> dict[str, object]:
    return {
        "kind": report.checkpoint.kind,
        "step": report.checkpoint.step,
        "status": str(report.checkpoint.status),
        "ok": report.ok,
        "bytes_read": report.bytes_read,
        "seconds": round(report.seconds, 6),
        "manifest_sha256": list(report.manifest_sha256),
        "findings": [finding_json(finding) for finding in report.findings],
        "notes": [safe(text) for text in report.notes],
    }
