"""`ckptstore repair`: the damaged files of a checkpoint, from another place that has the same one."""

from __future__ import annotations

import os
import time

import click

from ckptstore.backends import is_url, open_backend
from ckptstore.cli.common import JSON, LOG_STEP, Verb, location_options, read_words
from ckptstore.cli.moving import url_option
from ckptstore.cli.opening import open_run, pick
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import done, echo, field, findings, item, note, print_json, safe
from ckptstore.errors import UsageError
from ckptstore.listing import scan
from ckptstore.locate import Where
from ckptstore.repair import Damage, Repaired, repair
from ckptstore.sizes import counted, size


@click.command("repair", cls=Verb, short_help="Fetch only what is damaged of a checkpoint from another place.")
@LOG_STEP
@url_option("--from", "The run at another place, a URL or a folder, that has the same checkpoint")
@click.option("--force", is_flag=True, help="Also files that were written after their manifest was made.")
@click.option("--dry-run", is_flag=True, help="Say what is damaged, and why; nothing is written.")
@JSON
@location_options
@click.argument("words", nargs=-1, metavar="STEP [KEY=VALUE]...")
def command(
    where: Where,
    log_steps: tuple[int, ...],
    url: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
    words: tuple[str, ...],
) -> int:
    """Repair a checkpoint: STEP is a global step. All of it is read; damaged chunks come from the other place.

    With --run URL and --from DIR it goes the other way: damaged and missing files of a checkpoint in an object store are sent
    anew. Each file is replaced in one act by one that was verified. Exit 3 where damage is left, or found by a dry run.
    """
    where, wanted = read_words(where, words, log_steps)
    if len(wanted) != 1:
        raise UsageError("repair takes one step", hint="`ckptstore verify` says which is damaged.")
    if not url:
        raise UsageError("--from is missing", hint="Say --from s3://BUCKET/PREFIX, or another folder of the same run.")
    replica = open_backend(url if is_url(url) else os.path.abspath(url))
    _, backend = open_run(where, as_json=as_json, read_only=dry_run, remote=True, steps_too=True)
    if not as_json:
        field("from", replica.location)
    checkpoint = pick(scan(backend), wanted)[-1]
    started = time.monotonic()
    try:
        with Progress(quiet=as_json) as progress:
            result = repair(backend, checkpoint, replica, force=force, dry_run=dry_run, notify=progress.notify)
    except KeyboardInterrupt:
        note("stopped: each file is as it was, or whole. The same command goes on.")
        raise
    if as_json:
        document = {"run": backend.location, "from": replica.location, "step": checkpoint.step, "done": not dry_run}
        document |= {"ok": result.ok, "seconds": round(time.monotonic() - started, 6), "moved_bytes": result.moved_bytes}
        print_json(document | {"files": [_json(damage, result) for damage in result.damages]})
    else:
        _print(result, checkpoint.step, dry_run=dry_run)
    return 0 if result.ok else 3


def _json(damage: Damage, result: Repaired) -> dict[str, object]:
    return {
        "part": damage.part,
        "path": damage.entry.path,
        "kind": damage.kind,
        "problem": damage.problem,
        "bad_chunks": damage.bad_chunks,
        "bad_bytes": damage.bad_bytes,
        "repaired": damage in result.repaired,
        "reason": next((reason for other, reason in result.failed if other == damage), ""),
    }


def _print(result: Repaired, step: int, *, dry_run: bool) -> None:
    echo()
    for damage in result.damages:
        item("✓" if damage in result.repaired else "✗", f"{safe(damage.part)}/{safe(damage.entry.path)}: {damage.problem}")
    for _, reason in result.failed:
        note(f"not repaired: {reason}")
    if not result.damages:
        done(f"step {step}: nothing is damaged, every byte was read")
    elif dry_run:
        total = size(sum(damage.bad_bytes for damage in result.damages))
        echo(f"{counted(len(result.damages), 'file')} would be repaired, with {total} from there")
    elif result.ok:
        repaired = counted(len(result.repaired), "file")
        done(f"step {step} is whole: {repaired} repaired with {size(result.moved_bytes)}, all of it verified")
    elif result.report is not None:
        findings(result.report.findings)
