"""Room for a copy: found out before the first byte, made from our own leftovers, and otherwise explained."""

from __future__ import annotations

import os
import secrets
import shutil

from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import IntegrityError, NoSpaceError, from_os_error
from ckptstore.listing import backend_for
from ckptstore.model import Level
from ckptstore.plan import Options, Plan, stage_key
from ckptstore.verify import verify


def make_room(current: Plan, options: Options) -> None:
    """NoSpaceError when the copy would not fit, naming what could go; with `replace` the old slot goes first."""
    missing = current.needed_bytes - current.reusable_bytes
    keep = {
        os.path.basename(path) for path, key in side_folders.stages(current.side) if key == stage_key(current.point.checkpoint)
    }

    def room() -> bool:
        return current.free_bytes is None or shutil.disk_usage(current.side).free > missing + (16 << 20)

    if room():
        return
    for name in side_folders.leftovers(current.side):  # stages of dead writers: whatever they hold lies in the run as well
        if name not in keep:
            side_folders.discard(current.side, name)
    if room():
        return
    if options.replace and current.old_slot is not None:
        replace_old_slot(current)
        if room():
            return
    free = shutil.disk_usage(current.side).free
    raise NoSpaceError(
        f"copying needs {missing / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {current.side}",
        operation="copying",
        path=current.side,
        hint="; ".join(what_could_go(current)) or "Free some space.",
    )


def replace_old_slot(current: Plan) -> None:
    """Remove the old slot, once every byte of the chosen checkpoint has been seen to be right."""
    chosen = current.point.checkpoint
    tested = verify(backend_for(LocalBackend(current.listing.run.path), chosen), chosen, Level.FULL)
    if not tested.ok:
        raise IntegrityError(f"step {chosen.step}: {tested.findings[0]}; the old slot was not removed")
    for slot in current.slots.values():
        if os.path.isdir(slot):
            doomed = f"trash-{secrets.token_hex(8)}"
            try:
                os.rename(slot, os.path.join(current.side, doomed))
            except OSError as error:
                raise from_os_error(error, doing="removing", path=slot) from error
            side_folders.discard(current.side, doomed)


def what_could_go(current: Plan) -> list[str]:
    """What a person could remove to make room, with the bytes that it frees."""
    ideas = [
        f"`ckptstore clean --old-slots` frees {old.size_bytes / 1e9:.2f} GB ({old.name})"
        for old in side_folders.old_slots(current.side)
    ]
    if current.old_slot is not None:
        ideas.append(
            f"`--replace` removes the old slot first, {current.old_slot.size_bytes / 1e9:.2f} GB (no way back to it then)"
        )
    older = [c for c in current.listing.checkpoints if c.step < current.point.checkpoint.step]
    if older:
        ideas.append(
            f"{len(older)} older checkpoints hold {sum(c.size_bytes for c in older) / 1e9:.2f} GB in {current.listing.run.path}"
        )
    return ideas
