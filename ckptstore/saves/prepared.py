"""What a node was ready to publish, and its writer died before it heard whether to: its part of a save by several nodes.

Such a draft is whole, durable and described, and is told by its manifest: the set that it names has the draft's own name.

    save-<set>/step/          ready
    old-step-STEP-<set>/      the same, cut between the two renames of a replacement. After these the name is that of what
                              the set has replaced, and the manifest in it names another set, or none

Only the other nodes know whether the save was committed. So it stays, the newest one of a store at most, until `resume_step`
publishes it, or a save of that step or a later one is committed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from ckptstore import manifest as manifests
from ckptstore import side as side_folders
from ckptstore.errors import CkptStoreError
from ckptstore.manifest import Manifest
from ckptstore.model import MANIFEST_NAME, NodeSet
from ckptstore.saves import owner
from ckptstore.untrusted import open_regular

_PLACE = re.compile(r"(?:save|old-step-[0-9]+)-([0-9a-f]{32})")


class Prepared(NamedTuple):
    """A draft that waits for the word of another node."""

    path: str  #: of the folder that becomes the step
    home: str  #: the draft's, in the side folder; may be gone where a crash came between two renames
    manifest: Manifest
    group: NodeSet
    manifest_mtime_ns: int

    @property
    def name(self) -> str:
        """Under which it lies in the side folder."""
        return os.path.basename(self.home if self.path.startswith(f"{self.home}/") else self.path)

    @property
    def note(self) -> str:
        """What it is, for people."""
        return (
            f"{self.name} is step {self.manifest.step} of {self.group.whose}, whole, and cut before it was published here. "
            "ckptstore.torch.resume_step publishes it if another node has the step; a save of that step, or of a later one, "
            "removes it"
        )


def found(side: str) -> list[Prepared]:
    """Those of the living too, in no order."""
    return [
        one
        for name in side_folders.names_in(side)
        if (match := _PLACE.fullmatch(name)) and (one := _read(side, name, match[1]))
    ]


def left(side: str, *, long_dead_s: float = owner.LONG_DEAD_S) -> list[Prepared]:
    """Those of dead writers (owner.is_dead), the oldest first."""
    return _sorted(one for one in found(side) if _is_free(one) or owner.is_dead(one.home, long_dead_s=long_dead_s))


def waiting(side: str) -> list[Prepared]:
    """Those that no living process is known to hold, the oldest first.

    To publish one whose save is known to be decided, or to remove one that a save has outdated, this is enough: its writer,
    if it lives, finds the step there, or that the draft is gone, and says so.
    """
    return _sorted(one for one in found(side) if _is_free(one) or owner.life(one.home) is not owner.Life.ALIVE)


def discard(side: str, *, up_to: int) -> None:
    """Remove those of steps up to `up_to`, which was saved now: no resume needs them. What cannot be removed stays."""
    for one in waiting(side):
        if one.manifest.step <= up_to:
            with contextlib.suppress(CkptStoreError):
                side_folders.discard(side, one.name)


def _is_free(one: Prepared) -> bool:
    return not os.path.lexists(one.home)  # between two renames


def _sorted(some: Iterable[Prepared]) -> list[Prepared]:
    return sorted(some, key=lambda one: one.manifest_mtime_ns)


def _read(side: str, name: str, set_id: str) -> Prepared | None:
    home = os.path.join(side, f"save-{set_id}")
    path = os.path.join(home, "step") if name.startswith("save-") else os.path.join(side, name)
    try:
        with open_regular(os.path.join(path, MANIFEST_NAME)) as file:
            manifest = manifests.parse(file.read(manifests.MAX_BYTES + 1))
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
    except (OSError, CkptStoreError):  # not described yet, or another user's: then it is no more than a draft
        return None
    if manifest.group is None or manifest.group.id != set_id:
        return None
    return Prepared(path, home, manifest, manifest.group, mtime_ns)
