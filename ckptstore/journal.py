"""The journal: what a commit has begun and whoever comes next will finish. One JSON file in the side folder."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ckptstore.backends.local import LocalBackend
from ckptstore.errors import ManifestError, NotFoundError
from ckptstore.names import check_name
from ckptstore.side import JOURNAL
from ckptstore.untrusted import whole


@dataclass(frozen=True, slots=True)
class Move:
    """One slot to be replaced. Paths are relative to the side folder, so that a remounted volume still matches."""

    part: str
    slot: str
    staged: str
    aside: str
    new: str  #: identity of what shall be in the slot; empty when nothing shall
    old: str  #: identity of what was in it; empty when there was nothing


@dataclass(frozen=True, slots=True)
class Journal:
    """A commit that will be finished, whoever has to."""

    action: str  #: setup or undo
    step: int
    method: str  #: exchange or rename
    moves: tuple[Move, ...]
    created_at: str = ""


def pending(side: str) -> Journal | None:
    """The commit that a crash interrupted, None when there is none. ManifestError for a journal that can't be trusted."""
    try:
        document = json.loads(LocalBackend(side).get(JOURNAL, length_bytes=1 << 20))
        moves = tuple(Move(**move) for move in document["moves"])
        journal = Journal(document["action"], document["step"], document["method"], moves, document["created_at"])
        if (document["format"], document["version"]) != ("ckptstore.journal", 1):
            raise ValueError(f"format {document['format']!r:.40} version {document['version']!r:.20}")
        _check(journal)
    except NotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(
            f"{side}/{JOURNAL} is not a journal of ours: {error}",
            hint="Move it away; the slots are where they are.",
        ) from error
    return journal


def _check(journal: Journal) -> None:
    """ValueError for a journal that could make us rename what is none of our business."""
    texts = [journal.action, journal.method, journal.created_at]
    for move in journal.moves:
        texts += [move.part, move.slot, move.staged, move.aside, move.new, move.old]
    if not all(isinstance(text, str) for text in texts) or type(journal.step) is not int:
        raise ValueError("a field has the wrong type")
    whole(journal.step)
    if journal.method not in ("exchange", "rename"):
        raise ValueError(f"method {journal.method!r:.20}")
    for move in journal.moves:
        check_name(move.part), check_name(move.staged), check_name(move.aside)
        # The slot lies in the trial beside the side folder, or beside the side folder's own: two levels up at most.
        components = move.slot.split("/")
        inside = components[min(components.count(".."), 2) :]
        if not inside or any(component in ("", ".", "..") for component in inside) or "\0" in move.slot:
            raise ValueError(f"{move.slot!r:.80} cannot be a slot")
