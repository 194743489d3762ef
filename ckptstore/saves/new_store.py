"""A store of steps is made: its folder, and our side folder in it."""

from __future__ import annotations

import os

from ckptstore import places
from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import RefusedError, from_os_error
from ckptstore.frameworks import steps as layout
from ckptstore.frameworks.areal.layout import SIDE


def make_store(root: str) -> None:
    """A store in a folder that is empty, or not there yet. RefusedError for one that holds something else."""
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, doing="creating the store", path=root) from error
    tree = LocalBackend(root).tree(max_depth=2)
    before = places.side_of(root)
    ours = os.path.dirname(before)  # in a folder that is a mount of its own, a breaker has made one for its records
    foreign = [
        entry.name
        for entry in tree[""].entries
        if not entry.name.startswith(".") and (os.path.join(root, entry.name) != ours or os.listdir(ours) != [SIDE])
    ]
    if foreign and not layout.is_store(tree):
        raise RefusedError(
            f"{root} holds {foreign[0]} and is no store of steps: nothing is saved into it",
            hint="Name a folder that is empty or not there yet; what AReaL saved is kept by `ckptstore adopt`.",
        )
    _take_in(before, os.path.join(root, SIDE))
    side_folders.make_side(os.path.join(root, SIDE))
    try:
        side_folders.sync_folder(root)
        side_folders.sync_folder(os.path.dirname(root))
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=os.path.dirname(root)) from error


def _take_in(before: str, side: str) -> None:
    """Move what a breaker has recorded before the first save, beside the folder as for AReaL's runs, into the store."""
    try:
        if before == side or not os.path.isdir(before) or set(os.listdir(before)) - places.OF_BREAKER:
            return  # other things: of an AReaL run that had this name
        os.rename(before, side)
        side_folders.sync_folder(os.path.dirname(before))
        if os.path.dirname(os.path.dirname(before)) == os.path.dirname(side):
            os.rmdir(os.path.dirname(before))
    except FileNotFoundError:
        pass  # another rank has done it
    except OSError as error:
        raise from_os_error(error, doing="moving into the store", path=before) from error
