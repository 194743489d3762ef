"""The choice where a run is in an object store as well as on this machine.

With a URL to choose from, nobody goes back behind what is here: a pod that is started again on its disk has saved what was
never pushed, and would lose it at each start. Whoever names a step means the URL's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ckptstore.backends import open_backend
from ckptstore.backends.base import Backend
from ckptstore.choose import STATE_WORTH_STEPS, ResumePoint, Selection, resume_point
from ckptstore.errors import NotFoundError, NothingToResumeError
from ckptstore.left import marked
from ckptstore.listing import RESUMABLE, Listing, scan
from ckptstore.model import Checkpoint, Status
from ckptstore.verify import Notify

_Failed = Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What is resumed from, the run that was asked for it (the URL's where one was named), and what there is to say."""

    point: ResumePoint
    found: Listing
    notes: tuple[str, ...] = ()


def choice(
    backend: Backend, listing: Listing, selection: Selection, failed: _Failed, *, notify: Notify | None = None
) -> Choice:
    """The checkpoint of `selection`: from its URL, or a newer one here. `failed`, `notify`, errors: resume_point's."""
    if not selection.url:
        return Choice(resume_point(backend, listing, selection, failed=failed, notify=notify), listing)
    source = open_backend(selection.url)
    found = dataclasses.replace(listing, checkpoints=(), adopted=(), slot=None, recover_info=None, notes=())
    try:
        found = _scan(source, found)
        found = dataclasses.replace(
            found,
            checkpoints=tuple(marked(source, found.checkpoints, listing.left)),
            adopted=tuple(marked(source, found.adopted, listing.left)),
        )
        there = resume_point(source, found, selection, failed=failed, ledger_of=listing.run.path)
    except NothingToResumeError as error:
        here, _ = _here(backend, listing, selection, failed, there=None, notify=notify)
        if here is None or found.notes:  # they say that the URL is not a run's
            raise
        return Choice(here, found, (f"taken from this machine: {error}",))
    here, notes = _here(backend, listing, selection, failed, there=there.checkpoint, notify=notify)
    return Choice(there if here is None else here, found, notes)


def _scan(source: Backend, nothing: Listing) -> Listing:
    """The run there; `nothing` before the first push. NotFoundError for a bucket that is not there."""
    try:
        return scan(source)
    except NotFoundError:
        if next(iter(source.list()), None) is not None:
            raise
        return nothing


def _here(
    backend: Backend,
    listing: Listing,
    selection: Selection,
    failed: _Failed,
    *,
    there: Checkpoint | None,
    notify: Notify | None,
) -> tuple[ResumePoint | None, tuple[str, ...]]:
    """What of this machine comes before `there`, and what there is to say of what does not."""
    if selection.named:
        return None, ()

    bound = selection.bound

    def ahead(checkpoint: Checkpoint) -> bool:
        if not checkpoint.status.usable or (bound is not None and checkpoint.step > bound):
            return False
        return there is None or _worth(checkpoint, selection) > _worth(there, selection)

    def left(checkpoint: Checkpoint) -> bool:
        return there is not None and _was_left(checkpoint, there)

    slot = listing.slot if listing.slot is not None and listing.slot.format in RESUMABLE and ahead(listing.slot) else None
    exports, adopted = list(filter(ahead, listing.checkpoints)), list(filter(ahead, listing.adopted))
    passed = [c.step for c in (*exports, *adopted, slot) if c is not None and left(c)]
    newer = dataclasses.replace(
        listing,
        checkpoints=tuple(itertools.filterfalse(left, exports)),
        adopted=tuple(itertools.filterfalse(left, adopted)),
        slot=None if slot is None or left(slot) else slot,
    )
    notes = []
    if passed:
        notes.append(
            f"step {max(passed)} is here, and was saved before what is in {selection.url}: a history that was "
            "left. Without --from it counts"
        )
    if not (newer.checkpoints or newer.adopted or newer.slot):
        return None, tuple(notes)
    try:
        point = resume_point(backend, newer, dataclasses.replace(selection, url=""), failed=failed, notify=notify)
    except NothingToResumeError as error:
        return None, (*notes, f"what is newer here does not count: {error}")
    if there is not None:
        why = f"{point.why}; {_why(point.checkpoint, there)} in {selection.url} (--step {there.step} takes that one)"
        point = dataclasses.replace(point, why=why)
    return point, tuple(notes)


def _worth(checkpoint: Checkpoint, selection: Selection) -> int:
    stateful = selection.prefer == "state" and "optimizer" in checkpoint.holds
    return checkpoint.step + (STATE_WORTH_STEPS if stateful else 0)


def _was_left(here: Checkpoint, there: Checkpoint) -> bool:
    """Whether the higher number is of a time before a rollback: without a manifest a store does not tell when it was saved."""
    if here.step <= there.step or there.status is not Status.COMMITTED:
        return False
    return _saved_ns(here) < _saved_ns(there)


def _saved_ns(checkpoint: Checkpoint) -> int:
    """By its files: of a store, as the manifest records them."""
    return max((file.mtime_ns for part in checkpoint.parts for file in part.files), default=0)


def _why(here: Checkpoint, there: Checkpoint) -> str:
    if here.step > there.step:
        return f"newer than step {there.step}, the newest good one"
    return f"its optimizer state is worth more than step {there.step}, of weights alone,"
