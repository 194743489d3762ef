"""`ckptstore pull`: checkpoints from an object store to this machine."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import click

from ckptstore.backends import is_url, open_backend
from ckptstore.cli.common import JSON, LOG_STEP, Verb, read_words
from ckptstore.cli.moving import (
    EVERYTHING,
    LATEST,
    MAX_BANDWIDTH,
    Failed,
    bounded,
    chosen,
    exit_code,
    failed_json,
    move_each,
    print_failed,
    url_option,
    url_or_usage,
)
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import done, echo, field, item, note, print_json, rate, row
from ckptstore.errors import UsageError
from ckptstore.listing import scan
from ckptstore.locate import Where
from ckptstore.model import Checkpoint
from ckptstore.rendezvous import Rendezvous, launch
from ckptstore.sizes import size
from ckptstore.transfer.pull import Fetched, pull
from ckptstore.transfer.receiving import Bringing, bring


@click.command("pull", cls=Verb, short_help="Checkpoints from an object store, every range verified.")
@LATEST
@EVERYTHING
@LOG_STEP
@url_option("--from", "Where the run is: its parts lie directly below")
@click.option("--to", "run", metavar="DIR", required=True, help="The run's own folder here; made where it is missing.")
@MAX_BANDWIDTH
@click.option("--dry-run", is_flag=True, help="Say what would be fetched; nothing is written.")
@JSON
@click.argument("words", nargs=-1, metavar="[STEP]...")
def command(
    latest: bool,
    everything: bool,
    log_steps: tuple[int, ...],
    url: str,
    bytes_per_s: float | None,
    run: str,
    dry_run: bool,
    as_json: bool,
    words: tuple[str, ...],
) -> int:
    """Pull checkpoints of a run at a URL into a local run. STEPs are global steps.

    Every range is checked against the manifest before it is written; the checkpoint appears under its name when all of it is
    on the disk. The same command goes on after a crash, with the chunks that are here. One that cannot come does not hold up
    the others.
    """
    where, steps = read_words(Where(), words, log_steps)
    if where.overrides:
        raise UsageError(f"{where.overrides[0]!r} is no step")
    if is_url(run):
        raise UsageError("--to is a folder of this machine", hint="`ckptstore push --to URL` goes the other way.")
    told = launch()
    bandwidth = bounded(bytes_per_s, told.local_world_size if told else 1)
    source = open_backend(url_or_usage(url, "--from"), bandwidth=bandwidth)
    if told is not None and told.local_rank and dry_run:
        return 0
    if not as_json and (told is None or not told.local_rank):
        field("from", source.location)
        field("to", run)
    picked = chosen(scan(source), steps, latest=latest, everything=everything) if told is None or not told.local_rank else []
    results: list[Fetched] = []
    failed: list[Failed] = []
    started = time.monotonic()

    def bring_all(bringing: Bringing) -> None:
        def fetch(checkpoint: Checkpoint) -> None:
            results.extend(pull(source, checkpoint, run, dry_run=dry_run, bringing=bringing, notify=progress.notify))

        move_each(picked, fetch, store=source, failed=failed)

    try:
        with Progress(quiet=as_json or bool(told and told.local_rank)) as progress:
            if told is None or dry_run:
                bring_all(bring)
            else:
                from ckptstore.transfer import sharing

                with Rendezvous(run, told) as group:
                    if not group.leads:
                        sharing.help_pull(group, source)
                        return 0
                    shared = sharing.Shared(group)
                    bring_all(shared.bring)
                    shared.end(results)
    except KeyboardInterrupt:
        note("stopped: nothing unfinished is visible. The same command goes on with the chunks that are here.")
        raise
    finally:
        print_failed(failed, "pulled")
    seconds = time.monotonic() - started
    if as_json:
        document = {"from": source.location, "to": run, "done": not dry_run, "seconds": round(seconds, 6)}
        print_json(document | {"parts": [_json(fetched) for fetched in results], "failed": failed_json(failed)})
        return exit_code(failed)
    echo()
    for fetched in results:
        _print(fetched, seconds, dry_run=dry_run)
    return exit_code(failed)


def _print(fetched: Fetched, seconds: float, *, dry_run: bool) -> None:
    name = f"step {fetched.step}, {fetched.part}"
    kept = f"; {size(fetched.kept_bytes)} were here already" if fetched.kept_bytes else ""
    if fetched.there_before:
        item("·", f"{name}: here already, the same")
    elif dry_run:
        item("·", f"{name}: {size(fetched.fetched_bytes)} would be fetched")
    else:
        done(f"{name} is here: {size(fetched.fetched_bytes)} fetched{rate(fetched.fetched_bytes, seconds)}{kept}")
    row("at", fetched.path)
    if fetched.manifest_sha256:
        row("", f"manifest sha256 {fetched.manifest_sha256}")
    for text in fetched.notes:
        note(text)


def _json(fetched: Fetched) -> dict[str, Any]:
    return dataclasses.asdict(fetched) | {"notes": list(fetched.notes)}
