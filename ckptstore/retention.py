"""Retention: which steps of a store are kept, and why. The others are deleted so that no half of one is ever seen.

`decide` is a pure function. Rules add up: what any of them keeps, stays. The newest good step is always kept, and so is every
step that is not a committed checkpoint: what it is, a person must say. Only good steps count for a rule: committed, and
not of a time when training had gone bad (health). Where no step is good, nothing is deleted.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptstore import mirrored, pins, places, steps, verify
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.errors import CkptStoreError, RefusedError, UsageError, from_os_error
from ckptstore.frameworks.steps import folder_name
from ckptstore.listing import Listing, scan
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.parts import find_manifest, folder_of

_NONE: Mapping[int, str] = {}


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep: the `last` N, every step that is a multiple of `every`, the `best` K by a recorded metric; any of them."""

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = ""  #: as given to `save(metrics=…)`
    mode: Literal["max", "min"] = "max"  #: whether more of the metric is better, or less

    def __post_init__(self) -> None:
        if min(self.last, self.every, self.best) < 0 or not (self.last or self.every or self.best):
            raise UsageError("say what to keep: the last N, every N steps, or the best K by a metric")
        if bool(self.best) != bool(self.metric):
            raise UsageError("the best K are the best by a metric: give both")
        if self.mode not in ("max", "min"):
            raise UsageError(f"mode is max or min, not {self.mode!r:.20}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What retention knows of a step."""

    step: int
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    healthy: bool = True
    size_bytes: int = 0

    @property
    def good(self) -> bool:
        """Whether it counts."""
        return self.status is Status.COMMITTED and self.healthy


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step stays, and every reason for it."""

    candidate: Candidate
    keep: bool
    why: str


def decide(
    candidates: Iterable[Candidate], keep: Keep, *, pinned: Collection[int] = (), unsafe: Mapping[int, str] = _NONE
) -> list[Decision]:
    """The decision on each step, by step. `unsafe`: steps that are not yet in the store's mirror, and its URL."""
    ordered = sorted(candidates, key=lambda one: one.step)
    good = [one for one in ordered if one.good]
    newest = good[-1].step if good else None
    last = {one.step for one in good[-keep.last :]} if keep.last else set()
    ranked = [one for one in good if keep.metric in one.metrics and math.isfinite(one.metrics[keep.metric])]
    sign = 1 if keep.mode == "max" else -1
    ranked.sort(key=lambda one: (sign * one.metrics[keep.metric], one.step), reverse=True)
    best = {one.step: place for place, one in enumerate(ranked[: keep.best], 1)}
    decisions = []
    for one in ordered:
        reasons = []
        if one.step in pinned:
            reasons.append("pinned")
        if one.status is not Status.COMMITTED:
            reasons.append(f"{one.status}: only committed steps are deleted")
        elif newest is None:
            reasons.append("no step is good")
        if one.step in unsafe:
            reasons.append(f"not yet safe in {unsafe[one.step]}")
        if one.step == newest:
            reasons.append("the newest good one")
        if one.step in last:
            reasons.append(f"of the last {keep.last}")
        if keep.every and one.good and one.step % keep.every == 0:
            reasons.append(f"a multiple of {keep.every}")
        if one.step in best:
            reasons.append(f"number {best[one.step]} by {keep.metric} ({one.metrics[keep.metric]:g})")
        why = "; ".join(reasons) or ("no rule keeps it" if one.healthy else "training had gone bad; no rule counts it")
        decisions.append(Decision(one, bool(reasons), why))
    return decisions


def plan(backend: Backend, keep: Keep, *, unmirrored: bool = False) -> list[Decision]:
    """What `prune` would do now. UsageError for what is no store of steps.

    Of a store that is mirrored, what is not safe there yet stays, unless `unmirrored`.

    Before anything is to be deleted the newest step that stays is verified at level structure; one that fails is not good.
    """
    listing = scan(backend)
    if listing.framework != "steps":
        raise UsageError(f"{listing.run.path} is no store of steps", hint="AReaL's saver keeps or deletes its own.")
    side = places.side_of(listing.run.path)
    pinned = {pin.step for pin in pins.read(side)}
    unsafe = {} if unmirrored else mirrored.unsafe(side, listing.checkpoints)
    candidates = _candidates(backend, listing)
    checked: set[int] = set()
    while True:
        decisions = decide(candidates, keep, pinned=pinned, unsafe=unsafe)
        newest = max((one.candidate.step for one in decisions if one.candidate.good), default=None)
        if newest is None or newest in checked or all(one.keep for one in decisions):
            return decisions
        checked.add(newest)
        report = verify.verify(backend, listing.at_step(newest)[-1], Level.STRUCTURE)
        if not report.ok:
            candidates = [
                Candidate(one.step, report.checkpoint.status, one.metrics, one.healthy, one.size_bytes)
                if one.step == newest
                else one
                for one in candidates
            ]


def prune(backend: Backend, keep: Keep, *, unmirrored: bool = False) -> list[Decision]:
    """Delete what no rule keeps; the decisions. Interrupted anywhere, every step is there whole, or not there.

    Step one, under the store's lock: each is renamed into the side folder, all of them durably. Step two deletes there;
    what an interruption leaves, the next save or `clean` removes.
    """
    root = os.path.realpath(backend.location)
    if not os.path.isdir(steps.side_of(root)):
        raise RefusedError(f"{root} has no {os.path.basename(steps.side_of(root))}/: nothing was saved there by ckptstore")
    side = steps.side_of(root)
    trash = []
    with steps.locked(root, "prune"):
        decisions = plan(backend, keep, unmirrored=unmirrored)
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
    for name in trash:
        with contextlib.suppress(CkptStoreError):  # swept by the next save
            side_folders.discard(side, name)
    return decisions


def _candidates(backend: Backend, listing: Listing) -> list[Candidate]:
    healthy = _healthy(listing)
    found = []
    for checkpoint in listing.checkpoints:
        manifest = find_manifest(backend, folder_of(backend, checkpoint.parts[0]))
        metrics = manifest.metrics if manifest is not None else {}
        found.append(Candidate(checkpoint.step, checkpoint.status, metrics, checkpoint.step in healthy, checkpoint.size_bytes))
    return found


def _healthy(listing: Listing) -> set[int]:
    """Steps of which no metrics say that training had gone bad."""
    checkpoints: Sequence[Checkpoint] = listing.checkpoints
    if not places.has_ledger(listing.run.path):
        return {checkpoint.step for checkpoint in checkpoints}
    from ckptstore import health  # 20 ms, and most stores have no ledger

    ledger = health.ledger_of(listing.run.path)
    return {checkpoint.step for checkpoint in checkpoints if health.of(checkpoint, ledger).health.resumable}
