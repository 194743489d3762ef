"""What training leaves by going back: of a run by a setup that somebody told a step, of a store of steps by a save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptstore.backends import open_backend
from ckptstore.backends.base import Backend
from ckptstore.frameworks import steps
from ckptstore.left import Left, gone_back_to, identity, place_of
from ckptstore.listing import Listing, scan
from ckptstore.model import Checkpoint


def left_by(run: Backend, step: int, folders: Iterable[str]) -> dict[str, Left]:
    """What a store of steps has of a history that ends where `step` is saved next, as a record's entries: what has a higher
    number by now. `folders`: names there; without one of a higher step nothing more is looked at.
    """
    if not any(steps.step_of(folder) > step for folder in folders):
        return {}
    why = gone_back_to(step, by="a save")
    left = (one for one in scan(run).checkpoints if one.step > step and one.status.usable and not one.left)
    return {place_of(run, one): identity(run, one)._replace(why=why) for one in left}


def leaving(
    backend: Backend, listing: Listing, found: Listing, chosen: Checkpoint, *, known: Mapping[str, Left]
) -> Mapping[str, Left]:
    """The record of what training has left, once it goes on from `chosen` because somebody said so: all that has a higher
    number, here and where it was found, and what is `known` to be left.
    """
    leaves = {} if chosen.left else dict(known)  # who returns to what was left leaves nothing before it
    why = gone_back_to(chosen.step, by="setup")
    runs = [(backend, listing)] if found is listing else [(open_backend(found.run.path), found), (backend, listing)]
    for run, there in runs:
        for checkpoint in (*there.checkpoints, *there.adopted):
            if checkpoint.step > chosen.step >= 0 and (chosen.left or not checkpoint.left):
                leaves[place_of(run, checkpoint)] = identity(run, checkpoint)._replace(why=why)
    return leaves


def what_is_left(listing: Listing, leaves: Mapping[str, Left], chosen: Checkpoint) -> list[str]:
    """What there is to say of it."""
    new = sum(entry != listing.left.get(place) for place, entry in leaves.items())
    many = new > 1
    return [
        f"{new} checkpoint{'s' * many} with {'higher numbers' if many else 'a higher number'} than step {chosen.step} "
        f"{'are' if many else 'is'} left: from now on only --step, or undo, leads back there"
    ] * bool(new)
