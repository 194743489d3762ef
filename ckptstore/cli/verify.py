"""`ckptstore verify`: is it whole, and are its bytes those that were written?"""

from __future__ import annotations

import click

from ckptstore.cli.common import JSON, LOG_STEP, Verb, WhichOption, location_options, read_words
from ckptstore.cli.opening import open_run, pick
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import done, echo, finding_json, findings, item, print_json, rate, safe, status
from ckptstore.cli.weights import print_sanity, sanity_json, weigh
from ckptstore.errors import NotFoundError, NothingToResumeError, UsageError
from ckptstore.health import Health
from ckptstore.listing import Listing, scan
from ckptstore.locate import Where
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.sizes import counted, size
from ckptstore.verify import UNSEALED, Report, verify_all


@click.command("verify", cls=Verb, short_help="Is it whole, and are its bytes those that were written?")
@click.option("--all", "everything", is_flag=True, cls=WhichOption, help="All checkpoints (so too when no step is named).")
@click.option("--slot", is_flag=True, cls=WhichOption, help="The recover slot: what `setup` placed, or the trainer saved.")
@LOG_STEP
@click.option(
    "--level",
    metavar="LEVEL",
    type=click.Choice([str(level) for level in Level]),
    default="full",
    show_default=True,
    help="quick: names and sizes; structure: what the formats prove; full: every byte against its digest; "
    "server: the digests that an S3 store keeps itself, nothing is read.",
)
@click.option(
    "--expect-digest",
    "expected",
    metavar="SHA256",
    multiple=True,
    help="Its manifest must be exactly this one (show and setup print it); once a part.",
)
@click.option("--weights", "with_weights", is_flag=True, help="Are the numbers sane: NaN, zeroed blocks, jumps, a standstill.")
@JSON
@location_options
@click.argument("words", nargs=-1, metavar="[STEP]... [KEY=VALUE]...")
def command(
    where: Where,
    everything: bool,
    slot: bool,
    log_steps: tuple[int, ...],
    level: str,
    expected: tuple[str, ...],
    with_weights: bool,
    as_json: bool,
    words: tuple[str, ...],
) -> int:
    """Verify checkpoints; exit 3 when damage is found. STEPs are global steps.

    Without a manifest (see `seal`), full proves the structure and that every byte can be read. Level server is for runs in S3,
    and needs the extra [s3]; exit 1 where it cannot see all.
    """
    where, steps = read_words(where, words, log_steps)
    if bool(steps) + everything + slot > 1:
        raise UsageError("name steps, or say --all, or --slot")
    _, backend = open_run(where, as_json=as_json, remote=True, steps_too=True)
    if with_weights and not backend.is_folder:
        raise UsageError("--weights looks at files of this machine", hint="Bring them first: ckptstore pull.")
    listing = scan(backend)
    chosen = _choose(listing, steps, slot=slot)
    if expected and len(chosen) != 1:
        raise UsageError("--expect-digest pins one checkpoint", hint="Name its step, or say --slot.")
    with Progress(quiet=as_json) as progress:
        reports = verify_all(backend, chosen, Level(level), progress.notify)
        sanity = weigh(backend, listing, reports, progress.notify) if with_weights else []
    strangers = [digest for digest in expected if digest.lower() not in reports[0].manifest_sha256]
    damaged = bool(strangers) or not all(report.checkpoint.status.usable for report in reports)
    damaged = damaged or any(found.health is Health.BAD for found in sanity)
    ok = not damaged and all(report.ok for report in reports)
    code = 0 if ok else 3 if damaged else 1
    if as_json:
        document: dict[str, object] = {"level": level, "ok": ok, "pinned": not strangers}
        document |= {"weights": [sanity_json(found) for found in sanity]} if with_weights else {}
        print_json(document | {"reports": [_json(report) for report in reports]})
        return code
    echo()
    _print(reports)
    print_sanity(sanity)
    for digest in strangers:
        item("✗", f"its manifest is not the one with SHA-256 {digest}: it was changed, or is another one", fg="red")
    return code


def _choose(listing: Listing, steps: list[int], *, slot: bool) -> list[Checkpoint]:
    if slot:
        if listing.slot is None:
            raise NotFoundError("the recover slot is empty", hint="`ckptstore setup` fills it.")
        return [listing.slot]
    if steps:
        return pick(listing, steps, adopted=True)
    if not (listing.checkpoints or listing.adopted):
        raise NothingToResumeError(f"there is no checkpoint in {listing.run.path}", hint="`ckptstore list` says what is there.")
    return sorted([*listing.checkpoints, *listing.adopted], key=lambda checkpoint: checkpoint.step)


def _print(reports: list[Report]) -> None:
    for report in reports:
        checkpoint = report.checkpoint
        name = "" if checkpoint.kind == "export" else f"{checkpoint.kind}, "
        step = f"step {checkpoint.step}" if checkpoint.step >= 0 else "unknown step"
        detail = f"{counted(checkpoint.file_count, 'file')}, {size(checkpoint.size_bytes)}"
        detail += f", read{at}" if (at := rate(report.bytes_read, report.seconds)) else ""
        pad = " " * (len(Status.COMMITTED) - len(checkpoint.status))
        echo(f"{name}{step:<9} {status(checkpoint.status)}{pad}  {safe(detail)}")
        findings(report.findings)
        for text in report.notes:
            if text != UNSEALED:
                item("·", text)
        if report.unchecked:
            count = len(report.unchecked)
            item(
                "✗", f"{count} of {checkpoint.file_count} files cannot be checked so: {safe(report.unchecked[0])}, …", fg="red"
            )
    unsealed = [report for report in reports if report.ok and UNSEALED in report.notes]
    bad = [report for report in reports if not report.ok]
    summary = f"{len(reports) - len(bad)} of {len(reports)} whole at level {reports[0].level}"
    echo()
    if bad:
        echo(f"{click.style('✗', fg='red', bold=True)} {summary}")
    else:
        done(summary)
    if any(report.unchecked for report in reports):
        item("·", "the store keeps no digest of them, or no manifest says what they are: --level full reads them")
    if unsealed:
        item(
            "·",
            f"{len(unsealed)} without a manifest: full proved their structure and that every byte can be read, not which bytes "
            "were written; `ckptstore seal --all` records that from now on",
        )


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
        "unchecked": list(report.unchecked),
        "notes": list(report.notes),
    }
