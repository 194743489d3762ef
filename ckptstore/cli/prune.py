"""`ckptstore prune`: delete the steps of a store that no rule keeps."""

from __future__ import annotations

import click

from ckptstore import retention
from ckptstore.cli.common import JSON, OVERRIDES, Verb, location_options
from ckptstore.cli.opening import open_run
from ckptstore.cli.render import columns, done, echo, print_json, safe
from ckptstore.errors import UsageError
from ckptstore.locate import Where
from ckptstore.sizes import size


@click.command("prune", cls=Verb, short_help="Delete the steps of a store that no rule keeps.")
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="Keep the newest N good ones.")
@click.option("--keep-every", type=click.IntRange(1), metavar="N", help="Keep steps that are multiples of N.")
@click.option(
    "--keep-every-hours", type=click.FloatRange(0, min_open=True), metavar="T", help="Keep one saved in every T hours."
)
@click.option("--keep-best", type=click.IntRange(1), metavar="K", help="Keep the K best by --metric.")
@click.option("--metric", default="", metavar="NAME", help="The metric, as it was given to save.")
@click.option("--mode", type=click.Choice(["max", "min"]), default="max", show_default=True, help="Which end of it is good.")
@click.option("--unmirrored", is_flag=True, help="Also what is not yet safe where the store is mirrored to.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted, and why the others stay.")
@JSON
@location_options
@OVERRIDES
def command(
    where: Where,
    keep_last: int | None,
    keep_every: int | None,
    keep_every_hours: float | None,
    keep_best: int | None,
    metric: str,
    mode: str,
    unmirrored: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete steps of a store (what `CheckpointStore.save` made). What any rule keeps, stays.

    The newest good step is always kept, and pinned ones (`status --pin`), and whatever is not a whole checkpoint. Without a
    --keep option, what the retention: block of --config says.
    """
    keep = None
    if not where.config or any((keep_last, keep_every, keep_every_hours, keep_best, metric)):
        keep = retention.Keep(
            keep_last or 0,
            keep_every or 0,
            keep_best or 0,
            metric,
            "max" if mode == "max" else "min",
            every_hours=keep_every_hours or 0.0,
        )
    located, backend = open_run(where, as_json=as_json, read_only=dry_run, remote=True, steps_too=True)
    if keep is None and located.config is not None:
        keep = retention.Keep.from_config(located.config)
    if keep is None:
        raise UsageError(
            f"--config {where.config} has no retention: block, and no --keep option is given",
            hint="Say what to keep: --keep-last, --keep-every, --keep-every-hours, --keep-best.",
        )
    decide = retention.plan if dry_run else retention.prune
    decisions = decide(backend, keep, unmirrored=unmirrored)
    doomed = [one for one in decisions if not one.keep]
    if as_json:
        shown = [
            {
                "step": one.candidate.step,
                "status": str(one.candidate.status),
                "bytes": one.candidate.size_bytes,
                "keep": one.keep,
                "why": one.why,
            }
            for one in decisions
        ]
        print_json({"done": not dry_run, "steps": shown})
        return
    echo()
    rows = [
        (str(one.candidate.step), size(one.candidate.size_bytes), "keep" if one.keep else "delete", safe(one.why))
        for one in decisions
    ]
    for line in columns(("step", "size", "", "why"), rows, left=(2,)):
        echo(line)
    total = size(sum(one.candidate.size_bytes for one in doomed))
    echo()
    if not doomed:
        done("nothing to delete")
    else:
        echo(f"{len(doomed)} of {len(decisions)} would be deleted: {total}" if dry_run else f"deleted {len(doomed)}: {total}")
