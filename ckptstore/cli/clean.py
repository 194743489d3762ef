"""`ckptstore clean`: remove what dead writers left, and old slots when told to."""

from __future__ import annotations

import os

import click

from ckptstore import side as side_folders
from ckptstore import steps
from ckptstore.cli.common import JSON, OVERRIDES, Verb, location_options, open_run
from ckptstore.cli.render import done, echo, item, print_json, size
from ckptstore.frameworks.areal import layout
from ckptstore.locate import Where
from ckptstore.lock import RunLock


@click.command("clean", cls=Verb, short_help="Remove stages of interrupted setups, and old slots when told to.")
@click.option(
    "--old-slots",
    is_flag=True,
    help="Also the slots that setup set aside: --undo cannot bring them back then.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@JSON
@location_options
@OVERRIDES
def command(where: Where, old_slots: bool, dry_run: bool, as_json: bool) -> None:
    """Remove leftovers in the run's side folder. Checkpoints and the slot are never touched."""
    located, _ = open_run(where, as_json=as_json, read_only=dry_run, steps_too=True)
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
