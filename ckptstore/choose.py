"""Choose the checkpoint to resume from: the newest one that is whole, and why newer ones are not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import IntegrityError, NotFoundError, NothingToResumeError, UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.listing import Listing, backend_for, find_manifest, read_part
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.verify import verify


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checkpoint is wanted. Steps are global steps, 0-based. Empty: the newest good one."""

    before_step: int | None = None  #: < N
    max_step: int | None = None  #: ≤ N
    step: int | None = None
    checkpoint_path: str = ""

    def __post_init__(self) -> None:
        if self.step is not None and self.checkpoint_path:
            raise UsageError("give a step or a checkpoint path, not both")
        if (self.step is not None or self.checkpoint_path) and (self.before_step, self.max_step) != (
            None,
            None,
        ):
            raise UsageError("give one checkpoint, or a bound on its step, not both")

    @property
    def named(self) -> bool:
        """Whether exactly one checkpoint is meant."""
        return self.step is not None or bool(self.checkpoint_path)

    @property
    def bound(self) -> int | None:
        """The highest global step that qualifies, None for any."""
        bounds = [self.before_step - 1] if self.before_step is not None else []
        bounds += [self.max_step] if self.max_step is not None else []
        return min(bounds, default=None)

    def __str__(self) -> str:
        if self.step is not None:
            return f"step {self.step}"
        if self.checkpoint_path:
            return self.checkpoint_path
        if self.before_step is not None and self.max_step is None:
            return f"the newest good checkpoint before step {self.before_step}"
        if self.bound is not None:
            return f"the newest good checkpoint up to step {self.bound}, {self.bound} included"
        return "the newest good checkpoint"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A newer checkpoint that was passed over, and why."""

    checkpoint: Checkpoint
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The checkpoint chosen, and what was passed over on the way to it."""

    checkpoint: Checkpoint
    skipped: tuple[Skipped, ...]
    why: str


def resume_point(
    backend: Backend,
    listing: Listing,
    selection: Selection = Selection(),
    *,
    failed: Mapping[str, str] | None = None,
) -> ResumePoint:
    """The newest checkpoint within `selection` that passes level structure, and why newer ones don't.

    `failed` names checkpoints (by the first part's folder) already found bad, with the reason. NothingToResumeError when none
    qualifies; IntegrityError when the one that was named is damaged.
    """
    failed = failed or {}
    skipped: list[Skipped] = []
    for checkpoint in _candidates(backend, listing, selection):
        reasons = tuple(map(str, checkpoint.findings))
        if checkpoint.parts[0].path in failed:
            reasons = (failed[checkpoint.parts[0].path],)
        elif checkpoint.status.usable:
            # A copy of ours in the slot is checked while nothing else will read it: all its digests, here and now.
            ours = checkpoint.kind == "slot" and checkpoint.status is Status.COMMITTED
            report = verify(backend_for(backend, checkpoint), checkpoint, Level.FULL if ours else Level.STRUCTURE)
            reasons = tuple(map(str, report.findings))
            checkpoint = report.checkpoint
        if not reasons:
            return ResumePoint(checkpoint, tuple(skipped), _why(checkpoint, skipped, selection))
        skipped.append(Skipped(checkpoint, reasons))
    if selection.named and skipped:
        bad = skipped[0]
        raise IntegrityError(
            f"step {bad.checkpoint.step} is {bad.checkpoint.status}: {'; '.join(bad.reasons[:3])}",
            hint="Without --step, the newest good one is chosen.",
        )
    raise _nothing(listing, selection, skipped)


def _candidates(backend: Backend, listing: Listing, selection: Selection) -> list[Checkpoint]:
    if selection.checkpoint_path:
        return [_at_path(backend, listing, os.path.abspath(selection.checkpoint_path))]
    everything = list(listing.checkpoints)
    # Equal steps: the slot first, since it holds optimizer state and needs no copy.
    if listing.slot is not None and listing.slot.step >= 0:
        everything.append(listing.slot)
    everything.sort(key=lambda c: (c.step, c.kind == "slot", c.epoch, c.epoch_step), reverse=True)
    if selection.step is not None:
        found = [checkpoint for checkpoint in everything if checkpoint.step == selection.step]
        if not found:
            raise _nothing(listing, selection, [])
        return found
    bound = selection.bound
    return [checkpoint for checkpoint in everything if bound is None or checkpoint.step <= bound]


def _at_path(backend: Backend, listing: Listing, path: str) -> Checkpoint:
    for checkpoint in listing.checkpoints:
        if any(part.path == path for part in checkpoint.parts):
            return checkpoint
    outside = LocalBackend(path)
    name = os.path.basename(os.path.dirname(path))
    known = {part.name for checkpoint in listing.checkpoints for part in checkpoint.parts}
    try:
        part = read_part(outside, name if name in known else layout.MAIN_PART, "", outside.tree(max_depth=5))
    except NotFoundError as error:
        raise NotFoundError(f"--checkpoint-path {path}: there is no such folder", hint=str(error)) from error
    manifest = find_manifest(outside, "")
    numbers = layout.parse_export_name(os.path.basename(path))
    if numbers is not None:
        return Checkpoint(numbers.step, numbers.epoch, numbers.epoch_step, "export", (part,))
    if manifest is not None:
        return Checkpoint(manifest.step, manifest.epoch, manifest.epoch_step, "export", (part,))
    return Checkpoint(-1, -1, -1, "export", (part,), ("neither its name nor a manifest tells its step",))


def _why(checkpoint: Checkpoint, skipped: list[Skipped], selection: Selection) -> str:
    if selection.named:
        return "you named it"
    vouched = "its files are whole"
    if checkpoint.status is Status.COMMITTED:
        vouched = "all its digests match" if checkpoint.kind == "slot" else "its manifest is checked while it is copied"
    newer = f", {len(skipped)} newer one{'s' * (len(skipped) > 1)} skipped" if skipped else ""
    return f"{selection}: {vouched}{newer}"


def _nothing(listing: Listing, selection: Selection, skipped: list[Skipped]) -> NothingToResumeError:
    steps = sorted({checkpoint.step for checkpoint in listing.checkpoints})
    message = f"no checkpoint qualifies as {selection} in {listing.run.path}"
    if skipped:
        message += f": {len(skipped)} looked at, all damaged or unfinished (newest: {'; '.join(skipped[0].reasons[:2])})"
    hint = "Nothing has been saved there yet: see `saver:` and `recover:` in the run's configuration."
    if steps:
        usable = [checkpoint.step for checkpoint in listing.checkpoints if checkpoint.status.usable]
        hint = f"The first saved step is {steps[0]}, the last {steps[-1]}; whole are {_some(usable) or 'none'}."
    return NothingToResumeError(message, hint=hint)


def _some(steps: list[int]) -> str:
    steps = sorted(set(steps))
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "…", *steps[-4:]]))
