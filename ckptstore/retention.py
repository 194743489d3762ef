"""Retention: which steps of a store are kept, and why. The others are deleted so that no half of one is ever seen.

`decide` is a pure function. Rules add up: what any of them keeps, stays. The newest good step is always kept, and so is every
step that is not a committed checkpoint: what it is, a person must say. Only good steps count for a rule: committed, and
not of a time when training had gone bad (health); the newest step of all stays even so, or a save would delete what it has
just saved. Where no step is good, nothing is deleted.

The newest are those with the highest numbers, and those that were saved last. The two differ once training went back and goes
on from an older step: then neither the steps that it left nor its own are deleted for the others' sake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ckptstore import choose, parallel, pins, places, verify
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.config import RunConfig
from ckptstore.errors import CkptStoreError, RefusedError, UsageError, from_os_error
from ckptstore.frameworks.steps import Generation, folder_name, generations_in
from ckptstore.listing import Listing, scan
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.parts import folder_of, manifest_told
from ckptstore.saves import node_sets, steps, uploading
from ckptstore.transfer import mirrored

_NONE: Mapping[int, str] = {}
_AT_ONCE = 16  #: requests to a store: one after the other, a thousand steps take minutes


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep: the `last` N, every step that is a multiple of `every`, the `best` K by a recorded metric, one in
    `every_hours`; any of them.

    The last N are the N highest, and the N that were saved last: others where training went back to an older step. Of the
    time: the oldest, and from each that is kept for it the first that was saved at least `every_hours` later.
    """

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = ""  #: as given to `save(metrics=…)`
    mode: Literal["max", "min"] = "max"  #: whether more of the metric is better, or less
    every_hours: float = 0.0

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(f"{name} is {value!r:.40}, and must be a whole number, 0 or more")
        hours = self.every_hours
        if not isinstance(hours, (int, float)) or isinstance(hours, bool) or not 0 <= hours < math.inf:
            raise UsageError(f"every_hours is {hours!r:.40}, and must be a number, 0 or more")
        if not (self.last or self.every or self.best or self.every_hours):
            raise UsageError(
                "say what to keep: the last N, every N steps, every T hours, or the best K by a metric",
                hint="`--keep-last 3`, say, in Python Keep(last=3); with --dry-run nothing is deleted.",
            )
        if bool(self.best) != bool(self.metric):
            raise UsageError("the best K are the best by a metric: give both")
        if self.mode not in ("max", "min"):
            raise UsageError(f"mode is max or min, not {self.mode!r:.20}")

    @classmethod
    def from_config(cls, config: RunConfig, block: str = "retention") -> Keep | None:
        """What a block of the trainer's YAML says, by the names above; None without one. UsageError for what it cannot mean."""
        found = config.get(block)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise UsageError(f"{block}: is a {type(found).__name__}, not a mapping")
        known = {item.name for item in fields(cls)}
        if strange := [key for key in found if key not in known]:
            raise UsageError(f"{block}: there is no {strange[0]!r:.40}", hint=f"There are: {', '.join(sorted(known))}.")
        given: dict[str, Any] = {key: config.get(f"{block}.{key}") for key in found}
        try:
            return cls(**{key: value for key, value in given.items() if value is not None})
        except UsageError as error:
            raise UsageError(f"{block}: {error.message}", hint=error.hint) from error


@dataclass(frozen=True, slots=True)
class Candidate:
    """What retention knows of a step."""

    step: int
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    healthy: bool = True
    size_bytes: int = 0
    saved_at_s: float = 0.0  #: Unix seconds, by its manifest; 0: not known
    whole: bool = True  #: whether all nodes of its set are known to have it
    folder: str = ""  #: relative to the store

    @property
    def good(self) -> bool:
        """Whether it counts."""
        return self.status is Status.COMMITTED and self.healthy and self.whole


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step stays, and every reason for it."""

    candidate: Candidate
    keep: bool
    why: str


def decide(
    candidates: Iterable[Candidate],
    keep: Keep,
    *,
    pinned: Collection[int] = (),
    unsafe: Mapping[int, str] = _NONE,
    saved: int = -1,
) -> list[Decision]:
    """The decision on each step, by step. `unsafe`: steps that are not yet in the store's mirror, and its URL. `saved`: the
    step that was saved just now, which stays.
    """
    ordered = sorted(candidates, key=lambda one: one.step)
    good = [one for one in ordered if one.good]
    newest = good[-1].step if good else None
    latest = max((one.step for one in ordered if one.status is Status.COMMITTED), default=None)
    by_time = sorted((one for one in good if one.saved_at_s > 0), key=lambda one: (one.saved_at_s, one.step))
    saved_last = by_time[-1].step if by_time else None
    last = {one.step for one in (*good[-keep.last :], *by_time[-keep.last :])} if keep.last else set()
    ranked = [one for one in good if keep.metric in one.metrics and math.isfinite(one.metrics[keep.metric])]
    sign = 1 if keep.mode == "max" else -1
    ranked.sort(key=lambda one: (sign * one.metrics[keep.metric], one.step), reverse=True)
    best = {one.step: place for place, one in enumerate(ranked[: keep.best], 1)}
    timed = _one_in(keep.every_hours * 3600, good) if keep.every_hours else set()
    decisions = []
    for one in ordered:
        reasons = []
        if one.step in pinned:
            reasons.append("pinned")
        if one.status is not Status.COMMITTED:
            reasons.append(f"{one.status}: only committed steps are deleted")
        elif newest is None:
            reasons.append("no step is good")
        elif not one.whole and one.step > newest:
            reasons.append("not known to be on all of its nodes yet")
        if one.step in unsafe:
            reasons.append(f"not yet safe in {unsafe[one.step]}")
        if one.step == newest:
            reasons.append("the newest good one")
        elif one.step == saved:
            reasons.append("saved just now")
        elif one.step == saved_last:
            reasons.append("the good one that was saved last")
        elif one.step == latest and not reasons:
            reasons.append("the newest one")
        if one.step in last:
            reasons.append(f"of the last {keep.last}")
        if keep.every and one.good and one.step % keep.every == 0:
            reasons.append(f"a multiple of {keep.every}")
        if one.step in timed:
            reasons.append(f"one in {keep.every_hours:g} h")
        if one.step in best:
            reasons.append(f"number {best[one.step]} by {keep.metric} ({one.metrics[keep.metric]:g})")
        why = "; ".join(reasons) or _no_reason(one)
        decisions.append(Decision(one, bool(reasons), why))
    return decisions


def _no_reason(one: Candidate) -> str:
    if not one.healthy:
        return "training had gone bad; no rule counts it"
    return "no rule keeps it" if one.whole else "not on all of its nodes; no rule counts it"


def _one_in(span_s: float, good: Iterable[Candidate]) -> set[int]:
    """The oldest, and from each that stays the first that is `span_s` younger. What is dropped has no say in what stays."""
    chosen = set()
    due_s = -math.inf
    for one in sorted(good, key=lambda one: (one.saved_at_s, one.step)):
        if one.saved_at_s > 0 and one.saved_at_s >= due_s:
            chosen.add(one.step)
            due_s = one.saved_at_s + span_s
    return chosen


def plan(backend: Backend, keep: Keep, *, unmirrored: bool = False, saved: int = -1) -> list[Decision]:
    """What `prune` would do now. UsageError for what is no store of steps.

    Of a store that is mirrored, what is not safe there yet stays, unless `unmirrored`.

    Before anything is to be deleted the newest step that stays is verified at level structure; one that fails is not good.
    """
    listing = scan(backend)
    if listing.framework != "steps":
        raise UsageError(
            f"{listing.run.path} is no store of steps",
            hint="AReaL's saver keeps or deletes its own; in an object store, its lifecycle rules do.",
        )
    pinned: set[int] = set()
    unsafe: dict[int, str] = {}
    if backend.is_folder:  # pins, and what is known of a mirror, lie beside the trainer
        side = places.side_of(listing.run.path)
        pinned = {pin.step for pin in pins.read(side)}
        unsafe = {} if unmirrored else mirrored.unsafe(side, listing.checkpoints)
    candidates = _candidates(backend, listing)
    checked: set[int] = set()
    while True:
        decisions = decide(candidates, keep, pinned=pinned, unsafe=unsafe, saved=saved)
        newest = max((one.candidate.step for one in decisions if one.candidate.good), default=None)
        if newest is None or newest in checked or all(one.keep for one in decisions):
            return decisions
        checked.add(newest)
        report = verify.verify(backend, listing.at_step(newest)[-1], Level.STRUCTURE)
        if not report.ok:
            candidates = [
                dataclasses.replace(one, status=report.checkpoint.status) if one.step == newest else one for one in candidates
            ]


def checked_keep(keep: Keep | None) -> Keep | None:
    """`keep`, before anything is saved: what fails after the commit looks like a save that failed. UsageError for no Keep."""
    if keep is not None and not isinstance(keep, Keep):
        raise UsageError(f"keep is {keep!r:.80}, and must be a Keep", hint="Keep(last=3) keeps the newest three, say.")
    return keep


def prune(backend: Backend, keep: Keep, *, unmirrored: bool = False, saved: int = -1) -> list[Decision]:
    """Delete what no rule keeps; the decisions. Interrupted anywhere, every step is there whole, or not there.

    `saved`: the step that was saved just now, which stays.

    In a folder, step one, under the store's lock: each is renamed into the side folder, all of them durably. Step two deletes
    there; what an interruption leaves, the next save or `clean` removes. At a URL each step's manifest goes first: from then
    on it is none. Pins and the mirror's record are those of a store on this machine.
    """
    if not backend.is_folder:
        return _prune_there(backend, keep, saved)
    root = os.path.realpath(backend.location)
    if not os.path.isdir(steps.side_of(root)):
        raise RefusedError(
            f"{root} has no {os.path.basename(steps.side_of(root))}/: nothing was saved there by ckptstore",
            hint="Prune is for stores of steps alone: of an AReaL run, `ckptstore list` shows what you could remove by hand.",
        )
    side = steps.side_of(root)
    trash = []
    with steps.locked(root, "prune"):
        decisions = plan(backend, keep, unmirrored=unmirrored, saved=saved)
        for one in decisions:
            if not one.keep:
                trash.append(f"trash-{secrets.token_hex(8)}")
                target = os.path.join(root, folder_name(one.candidate.step))
                try:
                    os.rename(target, os.path.join(side, trash[-1]))
                except OSError as error:
                    raise from_os_error(error, doing="removing", path=target) from error
        try:
            if trash:
                side_folders.sync_folder(side)
                side_folders.sync_folder(root)
        except OSError as error:
            raise from_os_error(error, doing="syncing", path=root) from error
    for one in decisions:
        if not one.keep:
            node_sets.forget_whole(root, one.candidate.step)
    for name in trash:
        with contextlib.suppress(CkptStoreError):  # swept by the next save
            side_folders.discard(side, name)
    return decisions


def prune_after(backend: Backend, step: int, keep: Keep | None) -> None:
    """`prune`, after a save that asked for it. Its errors say that the step is saved."""
    if keep is None:
        return
    try:
        prune(backend, keep, saved=step)
    except CkptStoreError as error:
        error.message = f"step {step} is saved, and pruning after it failed: {error.message}"
        raise


def _prune_there(backend: Backend, keep: Keep, saved: int) -> list[Decision]:
    """`prune` at a URL: no lock, so that only what the listing showed is removed, and nothing that came since."""
    decisions = plan(backend, keep, saved=saved)
    doomed = {one.candidate.step: one.candidate.folder for one in decisions if not one.keep}
    there: dict[int, list[Generation]] = {}
    for found in sorted(generations_in(backend.tree(max_depth=4))) if doomed else ():
        there.setdefault(found.step, []).append(found)

    def remove(step: int, _: parallel.Stop) -> None:
        counted = next((one.number for one in there.get(step, ()) if one.folder == doomed[step]), -1)
        for one in there.get(step, ()):  # older ones first, or they would count again
            if one.number <= counted and (one.committed or one.folder == doomed[step]):  # what is not is somebody's save
                uploading.remove(backend, one.folder)

    parallel.each(doomed, remove, threads=_AT_ONCE)
    return decisions


def _candidates(backend: Backend, listing: Listing) -> list[Candidate]:
    manifests: dict[int, Manifest | None] = {}

    def read(checkpoint: Checkpoint, _: parallel.Stop) -> None:
        manifests[checkpoint.step] = manifest_told(backend, folder_of(backend, checkpoint.parts[0]))

    parallel.each(listing.checkpoints, read, threads=1 if backend.is_folder else _AT_ONCE)
    bad = choose.gone_bad(listing.run.path, listing.checkpoints, manifests)
    found = []
    for checkpoint in listing.checkpoints:
        manifest = manifests[checkpoint.step]
        metrics = manifest.metrics if manifest is not None else {}
        unknown = manifest is None and checkpoint.status is Status.COMMITTED  # a listing of a store has not read it
        found.append(
            Candidate(
                checkpoint.step,
                Status.COMPLETE if unknown else checkpoint.status,
                metrics,
                checkpoint.step not in bad,
                checkpoint.size_bytes,
                manifest.saved_at_s if manifest is not None else 0.0,
                manifest is None
                or manifest.group is None
                or node_sets.known_whole(listing.run.path, checkpoint.step, manifest.group),
                folder_of(backend, checkpoint.parts[0]),
            )
        )
    return found
