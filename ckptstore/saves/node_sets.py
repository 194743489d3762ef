"""What a store on one node's disk knows of the other nodes': its own name, and which steps all nodes of a set have.

In the side folder `id` holds the name, and an empty `whole-STEP-SET` says that all nodes of the set have the step. Until then
what a step replaced is kept, as `old-step-STEP-SET`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets

from ckptstore import side as side_folders
from ckptstore.errors import BusyError, RefusedError, from_os_error
from ckptstore.model import NodeSet
from ckptstore.saves import owner, prepared, steps
from ckptstore.saves.new_store import make_store
from ckptstore.untrusted import open_regular

IDENTITY = "id"
_IDENTITY = re.compile(r"[0-9a-f]{32}")


def identity(root: str) -> str:
    """32 hex digits that name a store: the same for all who see this folder, on whatever machine. Made where there are none."""
    root = os.path.realpath(root)
    if not os.path.isdir(steps.side_of(root)):
        make_store(root)
    path = os.path.join(steps.side_of(root), IDENTITY)
    draft = os.path.join(steps.side_of(root), f"new-{secrets.token_hex(8)}")
    try:
        while True:
            with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
                if not _IDENTITY.fullmatch(found := file.read(64).decode("ascii", "replace")):
                    raise RefusedError(f"{path} does not name a store: {found!r:.40}", hint="Remove this file.")
                return found
            side_folders.write_durably(draft, secrets.token_hex(16).encode())
            side_folders.like(draft, os.stat(root), mode=0o644)
            try:
                side_folders.rename_in(draft, path)
            except FileExistsError:  # another rank's
                os.unlink(draft)
    except OSError as error:
        raise from_os_error(error, doing="naming the store by", path=path) from error


def settle(root: str, step: int, group: NodeSet) -> None:
    """All nodes of the set have the step: note it, and remove what was kept until then. A full disk is a StorageError."""
    note_whole(root, step, group)
    discard_old(root, step)


def discard_old(root: str, step: int) -> None:
    """Remove what was kept of a step that was replaced; not what is prepared, and has that name between two renames."""
    side = steps.side_of(os.path.realpath(root))
    ready = {one.name for one in prepared.found(side)}
    for name in side_folders.names_in(side):
        if name.startswith(f"old-step-{step}-") and name not in ready:
            side_folders.discard(side, name)


def note_whole(root: str, step: int, group: NodeSet) -> None:
    """Remember that all nodes of a set have the step: from then on it counts for retention here."""
    side = steps.side_of(os.path.realpath(root))
    name = f"whole-{step}-{group.id}"
    try:
        with contextlib.suppress(FileExistsError):
            side_folders.write_durably(os.path.join(side, name), b"")
            side_folders.sync_folder(side)
    except OSError as error:
        raise from_os_error(error, doing="noting", path=os.path.join(side, name)) from error
    forget_whole(root, step, but=name)


def known_whole(root: str, step: int, group: NodeSet) -> bool:
    """Whether all nodes of the set are known to have the step."""
    return os.path.lexists(os.path.join(steps.side_of(os.path.realpath(root)), f"whole-{step}-{group.id}"))


def forget_whole(root: str, step: int, *, but: str = "") -> None:
    """Remove what was noted of a step that is gone, or of those before it."""
    side = steps.side_of(os.path.realpath(root))
    for name in side_folders.names_in(side):
        if name.startswith(f"whole-{step}-") and name != but:
            with contextlib.suppress(OSError):  # says nothing of any other step
                os.unlink(os.path.join(side, name))


def take_over(root: str, found: prepared.Prepared) -> steps.Draft:
    """Hold a draft that a dead writer left prepared. BusyError where somebody else has it by now."""
    busy = f"{found.home} is held by another process"
    hint = "Is another launch resuming from this store?"
    try:
        os.makedirs(found.home, 0o700, exist_ok=True)
        draft = steps.Draft(os.path.realpath(root), found.manifest.step, found.home, owner.take_over(found.home))
        try:
            if found.path != draft.path:
                os.rename(found.path, draft.path)
                if draft.path not in [one.path for one in prepared.found(steps.side_of(draft.root))]:
                    os.rename(draft.path, found.path)  # no flock: its writer lived, and has published it since
                    raise BusyError(busy, hint=hint)
        except BaseException:
            steps.leave(draft)
            raise
    except BlockingIOError as error:
        raise BusyError(busy, hint=hint) from error
    except OSError as error:
        raise from_os_error(error, doing="taking over", path=found.path) from error
    return draft
