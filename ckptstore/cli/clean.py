"""`ckptstore clean`: remove what dead writers left, and old slots when told to."""

from __future__ import annotations

import os

import click

from ckptstore import side as side_folders
from ckptstore.cli.common import JSON, OVERRIDES, location_options, open_run
from ckptstore.cli.render import echo, print_json, safe, size
from ckptstore.frameworks.areal import layout
from ckptstore.locate import Where
from ckptstore.lock import RunLock


@click.command("clean", short_help="Remove stages of interrupted setups, and old slots when told to.")
@location_options
@click.option(
    "--old-slots",
    is_flag=True,
    help="Also the slots that setup set aside: --undo cannot bring them back then.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@JSON
@OVERRIDES
def command(where: Where, old_slots: bool, dry_run: bool, as_json: bool) -> None:
    """Remove leftovers in the run's side folder. Checkpoints and the slot are never touched."""
    located, _ = open_run(where, quiet=as_json)
    side = side_folders.side_folder(located.run.path, f"{located.run.path}/{layout.MAIN_PART}/{layout.SLOT}")
    removed: list[tuple[str, int]] = []
    if os.path.isdir(side):
        with RunLock(side, "clean"):
            names = [*side_folders.leftovers(side)]
            names += [old.name for old in side_folders.old_slots(side)] if old_slots else []
            for name in names:
                removed.append((name, side_folders.size_of(os.path.join(side, name))))
                if not dry_run:
                    side_folders.discard(side, name)
    if as_json:
        print_json(
            {
                "done": not dry_run,
                "side": safe(side),
                "removed": [{"name": safe(n), "bytes": b} for n, b in removed],
            }
        )
        return
    for name, count in removed:
        echo(f"{'would remove' if dry_run else 'removed'} {safe(os.path.join(side, name))}  {size(count)}")
    if not removed:
        echo(f"nothing to remove in {safe(side)}")
