"""Room for a copy: found out before the first byte, made from our own leftovers, and otherwise explained."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable

from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import IntegrityError, NoSpaceError, from_os_error
from ckptstore.listing import backend_for
from ckptstore.model import Level
from ckptstore.plan import CAREFUL, Options, Plan, stage_key
from ckptstore.sizes import size
from ckptstore.verify import verify

SPARE_BYTES = 16 << 20  #: for manifests, recover_info and the file system's own books


def lacking(current: Plan, options: Options) -> str:
    """Why the copy would not fit, after all that `make_room` may remove; empty where it fits, or only the server knows."""
    if current.free_bytes is None or not current.transfers:
        return ""
    free = _free_bytes(current)
    goes = sum(side_folders.size_of(os.path.join(current.side, name)) for name in _leftovers(current))
    replaced = options.replace and current.old_slot is not None
    if replaced:
        goes += _held_bytes(current.slots.values())
    if _fits(current, free + goes):
        return ""
    return _too_little(current) + (f", {size(free + goes)} without the old slot" if replaced else "")


def make_room(current: Plan, options: Options) -> None:
    """NoSpaceError when the copy would not fit, naming what could go; with `replace` the old slot goes first.

    Nothing is removed where that would not be enough.
    """

    def room() -> bool:
        return current.free_bytes is None or not current.transfers or _fits(current, _free_bytes(current))

    if room():
        return
    if not lacking(current, options):
        for name in _leftovers(current):  # stages of dead writers: whatever they hold lies in the run as well
            side_folders.discard(current.side, name)
        if room():
            return
        if options.replace and current.old_slot is not None:
            replace_old_slot(current)
            if room():
                return
    raise NoSpaceError(
        lacking(current, options) or _too_little(current),
        operation="copying",
        path=current.side,
        hint="; ".join(what_could_go(current, options)) or "Free some space.",
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


def what_could_go(current: Plan, options: Options = CAREFUL) -> list[str]:
    """What a person could remove to make room, with the bytes that it frees."""
    ideas = [
        f"`ckptstore clean --old-slots` frees {size(old.size_bytes)} ({old.name})"
        for old in side_folders.old_slots(current.side)
    ]
    if current.old_slot is not None and not options.replace:
        ideas.append(
            f"`setup --replace` removes the old slot first, {size(current.old_slot.size_bytes)} (no way back to it then)"
        )
    older = [c for c in current.listing.checkpoints if c.step < current.point.checkpoint.step]
    if older:
        which = "1 older checkpoint holds" if len(older) == 1 else f"{len(older)} older checkpoints hold"
        ideas.append(f"{which} {size(sum(c.size_bytes for c in older))} in {current.listing.run.path}")
    return ideas


def _fits(current: Plan, free: int) -> bool:
    return free > current.needed_bytes - current.reusable_bytes + SPARE_BYTES


def _too_little(current: Plan) -> str:
    need = current.needed_bytes - current.reusable_bytes
    return (
        f"copying needs {size(need)} and {size(SPARE_BYTES)} to spare, and {size(_free_bytes(current))} are free on "
        f"{side_folders.existing(current.side)}"
    )


def _free_bytes(current: Plan) -> int:
    return shutil.disk_usage(side_folders.existing(current.side)).free


def _leftovers(current: Plan) -> list[str]:
    """Names of what dead writers left, without the stages that this copy goes on with."""
    key = stage_key(current.point.checkpoint)
    keep = {os.path.basename(path) for path, found in side_folders.stages(current.side) if found == key}
    return [name for name in side_folders.leftovers(current.side) if name not in keep]


def _held_bytes(folders: Iterable[str]) -> int:
    """What the disk gets back when these folders go: what has another name, or was never written, frees nothing."""
    held = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found = os.lstat(os.path.join(where, name))
                    held += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return held
