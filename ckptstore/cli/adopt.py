"""`ckptstore adopt`: keep the recover slot as a step of its own, before the trainer overwrites it."""

from __future__ import annotations

import click

from ckptstore.adopt import adopt
from ckptstore.cli import condition
from ckptstore.cli.common import JSON, OVERRIDES, Verb, location_options
from ckptstore.cli.opening import open_run
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import checkpoint_json, done, echo, note, print_json, state, steps
from ckptstore.locate import Where
from ckptstore.sizes import size


@click.command("adopt", cls=Verb, short_help="Keep the recover slot as a step of its own.")
@JSON
@location_options
@OVERRIDES
def command(where: Where, as_json: bool) -> None:
    """Copy the recover slot and its recover_info beside the run, verified, as a step that setup takes like any other.

    The trainer overwrites its one slot in place: a crash during a save loses both the old state and the new one.
    """
    located, backend = open_run(where, as_json=as_json)
    with Progress(quiet=as_json) as progress:
        checkpoint = adopt(backend, notify=progress.notify)
    shown = condition.of_kept(located.run.path, checkpoint)
    if as_json:
        print_json({"done": True, "checkpoint": checkpoint_json(checkpoint) | shown.json, "store": checkpoint.store})
        return
    echo()
    done(f"kept {steps(checkpoint)}: {size(checkpoint.size_bytes)}, {state(checkpoint.holds)}, in {checkpoint.store}")
    if not shown.resumable:
        note(f"{shown.text}: it is kept all the same, and setup passes it over")
