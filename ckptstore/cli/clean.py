"""`ckptstore clean`: remove what dead writers left, here or in a bucket, and old slots when told to."""

from __future__ import annotations

import os
import re
import time

import click

from ckptstore import side as side_folders
from ckptstore.backends import Backend
from ckptstore.cli.common import JSON, OVERRIDES, Verb, location_options
from ckptstore.cli.opening import is_steps, open_run
from ckptstore.cli.render import done, echo, item, note, print_json
from ckptstore.errors import UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.locate import Where
from ckptstore.lock import RunLock
from ckptstore.saves import owner, prepared, steps
from ckptstore.sizes import size

LONG_DEAD = "7d"
SHORTEST_S = 3600  #: a push that sends one large file shows nothing for long
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}


@click.command("clean", cls=Verb, short_help="Remove what dead writers left, and old slots when told to.")
@click.option(
    "--old-slots",
    is_flag=True,
    help="Also what is kept in case: slots that setup set aside, for --undo; in a store of steps, steps that were replaced and "
    "saves that a crash cut on other nodes.",
)
@click.option(
    "--older-than",
    metavar="DURATION",
    default="",
    help="Only where nothing was written for so long, such as 36h: of a run at a URL, and of a store of steps what is left of "
    f"saves whose process may be alive, where the file system has no flock. [{LONG_DEAD}]",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@JSON
@location_options
@OVERRIDES
def command(where: Where, old_slots: bool, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Remove leftovers in the run's side folder. Checkpoints and the slot are never touched.

    With --run URL: what dead pushes left there, claims and files that never became a checkpoint, and multipart uploads that
    were never finished.
    """
    older_than_s = _seconds(older_than or LONG_DEAD)
    located, backend = open_run(where, as_json=as_json, read_only=dry_run, remote=True, steps_too=True)
    if not backend.is_folder:
        if old_slots:
            raise UsageError("--old-slots is for a run of this machine: a URL has none")
        _clean_remote(backend, older_than_s, dry_run=dry_run, as_json=as_json)
        return
    if older_than and not is_steps(located.run.path):
        raise UsageError(
            "--older-than is for a run at a URL, and for a store of steps",
            hint="Here a dead writer is told from a living one by its lock.",
        )
    side = side_folders.side_folder(located.run.path, f"{located.run.path}/{layout.MAIN_PART}/{layout.SLOT}")
    found: list[tuple[str, int]] = []
    if os.path.isdir(side):
        if dry_run:
            found = _find(side, old_slots=old_slots, older_than_s=older_than_s)
        else:
            with RunLock(side, "clean"):
                found = _find(side, old_slots=old_slots, older_than_s=older_than_s)
                for name, _count in found:
                    side_folders.discard(side, name)
    kept = _kept(side, but={name for name, _count in found}, old_slots=old_slots)
    if as_json:
        removed = [{"name": name, "bytes": count} for name, count in found]
        print_json({"done": not dry_run, "side": side, "removed": removed, "notes": [text for text, _more in kept]})
        return
    echo()
    if not found:
        done(f"nothing to remove in {side}")
    for name, count in found:
        item("-", f"{os.path.join(side, name)}  {size(count)}")
    if found:
        total = size(sum(count for _, count in found))
        echo(f"{len(found)} of these, {total}, would be removed" if dry_run else f"removed {len(found)}: {total} freed")
    for text, more in kept:
        note(f"kept: {text}{more}")


def _find(side: str, *, old_slots: bool, older_than_s: float) -> list[tuple[str, int]]:
    names = sorted({*side_folders.leftovers(side), *steps.leftovers(os.path.dirname(side), long_dead_s=older_than_s)})
    if old_slots:
        names += [old.name for old in side_folders.old_slots(side)]
        names += [one.name for one in prepared.left(side, long_dead_s=older_than_s) if one.name not in names]
    return [(name, side_folders.size_of(os.path.join(side, name))) for name in names]


def _kept(side: str, *, but: set[str], old_slots: bool) -> list[tuple[str, str]]:
    """What stays and might go, each with what else to say about it."""
    kept = {} if old_slots else {one.name: (one.note, ", and so does --old-slots") for one in prepared.waiting(side)}
    for one in owner.unsure(side):
        kept.setdefault(one.name, (one.note, ""))
    return [texts for name, texts in kept.items() if name not in but]


def _clean_remote(backend: Backend, older_than_s: float, *, dry_run: bool, as_json: bool) -> None:
    from ckptstore.transfer import leftovers

    found, notes = leftovers.look(backend, older_than_s=older_than_s)
    freed = leftovers.frees(backend) if found and not dry_run else None
    gone = [one for one in found if dry_run or leftovers.remove(backend, one)]
    notes += tuple(f"{one.name} stays: somebody is at work there" for one in found if one not in gone)
    if as_json:
        removed = [
            {"name": one.name, "bytes": one.size_bytes, "why": one.why, "last_written_at": round(one.newest_ns / 1e9)}
            for one in gone
        ]
        document = {"done": not dry_run, "url": backend.location, "removed": removed, "freed": freed, "notes": list(notes)}
        print_json(document)
        return
    echo()
    if not gone:
        done(f"nothing to remove below {backend.location}")
    for one in gone:
        days = (time.time_ns() - one.newest_ns) / 86400e9
        item("-", f"{backend.location}/{one.name}  {size(one.size_bytes)}, {days:.1f} days old: {one.why}")
    if gone:
        total = size(sum(one.size_bytes for one in gone))
        done_text = f"removed {len(gone)}: {total}{' freed' if freed else ''}"
        echo(f"{len(gone)} of these, {total}, would be removed" if dry_run else done_text)
    if freed is False:
        note("nothing is freed: this bucket keeps old versions of what is removed, until a lifecycle rule expires them")
    for text in notes:
        note(text)


def _seconds(text: str) -> float:
    """`36h` in seconds. UsageError for what is no duration, or is too short to tell the dead from the living."""
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if match is None:
        raise UsageError(f"--older-than {text!r} is no duration", hint="Say 90m, 36h or 7d.")
    seconds = int(match[1]) * _UNITS_S[match[2]]
    if seconds < SHORTEST_S:
        raise UsageError(f"--older-than {text} is less than an hour: a push at work may have shown nothing for so long")
    return seconds
