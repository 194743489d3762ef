"""`ckptstore clean`: remove what dead writers left, and old slots when told to."""

from __future__ import annotations

import os
import re
import time

import click

from ckptstore import leftovers, steps
from ckptstore import side as side_folders
from ckptstore.backends import Backend
from ckptstore.cli.common import JSON, OVERRIDES, Verb, location_options, open_run
from ckptstore.cli.render import done, echo, item, note, print_json, safe, size
from ckptstore.errors import UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.locate import Where
from ckptstore.lock import RunLock

OLDER_THAN = "1d"
_DURATION = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _age(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Seconds of a duration like 90s, 30m, 12h or 7d."""
    if value is None:
        return None
    match = _DURATION.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no duration: say 90s, 30m, 12h or 7d", context, parameter)
    return int(match[1]) * _SECONDS[match[2]]


@click.command("clean", cls=Verb, short_help="Remove what dead writers left, and old slots when told to.")
@click.option(
    "--old-slots",
    is_flag=True,
    help="Also the slots that setup set aside: --undo cannot bring them back then.",
)
@click.option(
    "--older-than",
    "age_s",
    metavar="DURATION",
    callback=_age,
    help=f"Of a run at a URL: only what nobody has written to for so long (90s, 30m, 12h, 7d; {OLDER_THAN} where not said).",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@JSON
@location_options
@OVERRIDES
def command(where: Where, old_slots: bool, age_s: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove leftovers in the run's side folder, or with --run URL those of pushes. Checkpoints and the slot stay."""
    located, backend = open_run(where, as_json=as_json, read_only=dry_run, remote=True, steps_too=True)
    if not backend.is_folder:
        if old_slots:
            raise UsageError("--old-slots: a run at a URL has no slots that were set aside")
        _clean_url(backend, age_s if age_s is not None else 86400, dry_run=dry_run, as_json=as_json)
        return
    if age_s is not None:
        raise UsageError("--older-than is for a run at a URL: here one sees which writers are dead", hint="Say --run URL.")
    side = side_folders.side_folder(located.run.path, f"{located.run.path}/{layout.MAIN_PART}/{layout.SLOT}")
    found: list[tuple[str, int]] = []
    if os.path.isdir(side):
        if dry_run:
            found = _find(side, old_slots=old_slots)
        else:
            with RunLock(side, "clean"):
                found = _find(side, old_slots=old_slots)
                for name, _count in found:
                    side_folders.discard(side, name)
    if as_json:
        removed = [{"name": name, "bytes": count} for name, count in found]
        print_json({"done": not dry_run, "side": side, "removed": removed})
        return
    echo()
    if not found:
        done(f"nothing to remove in {side}")
    for name, count in found:
        item("-", f"{os.path.join(side, name)}  {size(count)}")
    if found:
        total = size(sum(count for _, count in found))
        echo(f"{len(found)} of these, {total}, would be removed" if dry_run else f"removed {len(found)}: {total} freed")


def _find(side: str, *, old_slots: bool) -> list[tuple[str, int]]:
    names = sorted({*side_folders.leftovers(side), *steps.leftovers(os.path.dirname(side))})
    names += [old.name for old in side_folders.old_slots(side)] if old_slots else []
    return [(name, side_folders.size_of(os.path.join(side, name))) for name in names]


def _clean_url(backend: Backend, age_s: int, *, dry_run: bool, as_json: bool) -> None:
    found = leftovers.look(backend, older_than_ns=time.time_ns() - age_s * 1_000_000_000)
    gone = [leftover for leftover in found if dry_run or leftovers.remove(backend, leftover)]
    if as_json:
        removed = [{"name": one.files_folder, "bytes": one.size_bytes, "keys": len(one.keys), "why": one.why} for one in gone]
        print_json({"done": not dry_run, "url": backend.location, "older_than_seconds": age_s, "removed": removed})
        return
    echo()
    if not found:
        done(f"nothing to remove in {backend.location} that is older than {age_s:,} s")
    for one in gone:
        item("-", f"{safe(one.files_folder)}/  {len(one.keys)} keys, {size(one.size_bytes)}: {one.why}")
    if len(gone) < len(found):
        note(f"{len(found) - len(gone)} more were left: somebody has come back to them")
    if gone:
        total = size(sum(one.size_bytes for one in gone))
        echo(f"{len(gone)} of these, {total}, would be removed" if dry_run else f"removed {len(gone)}: {total} freed")
