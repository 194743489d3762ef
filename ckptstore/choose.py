"""Choose the checkpoint to resume from: the newest one that is whole and healthy, and why newer ones are not."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptstore import native, places
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import AccessError, IntegrityError, NotFoundError, NothingToResumeError, StorageError, UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.listing import RESUMABLE, Listing, backend_for, never_stepped, read_adopted
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint, Level, Status
from ckptstore.parts import diverged, find_manifest, folder_of, manifest_told, read_part, with_dcp_holdings
from ckptstore.verify import OWN_SUMS, Notify, verify

if TYPE_CHECKING:
    from ckptstore.health import Verdict

    Judge = Callable[[Checkpoint], Verdict]

_NONE: Mapping[int, Manifest | None] = {}
#: How many steps of weights a resumable state is worth: Adam's moments need about as many to recover.
STATE_WORTH_STEPS = 20


@dataclass(frozen=True, slots=True)
class Selection:
    """Which checkpoint is wanted. Steps are global steps, 0-based. Empty: the newest good one."""

    before_step: int | None = None  #: < N
    max_step: int | None = None  #: ≤ N
    step: int | None = None
    checkpoint_path: str = ""
    prefer: str = "state"  #: state: optimizer state beats weights up to STATE_WORTH_STEPS newer; newest: it does not
    include_bad: bool = False  #: although its metrics say that it is bad or suspect; one that is named is taken anyway
    url: str = ""  #: a run in an object store to choose from, unless the run itself has a newer one

    def __post_init__(self) -> None:
        if self.step is not None and self.checkpoint_path:
            raise UsageError("give a step or a checkpoint path, not both")
        if self.url and self.checkpoint_path:
            raise UsageError("a checkpoint path is of this machine: without --from")
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
    def explicit(self) -> bool:
        """Whether somebody has said which, or up to where."""
        return self.named or self.bound is not None

    @property
    def bound(self) -> int | None:
        """The highest global step that qualifies, None for any."""
        bounds = [self.before_step - 1] if self.before_step is not None else []
        bounds += [self.max_step] if self.max_step is not None else []
        return min(bounds, default=None)

    def __str__(self) -> str:
        return f"{self._said} in {self.url}" if self.url else self._said

    @property
    def _said(self) -> str:
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
    alternative: Checkpoint | None = None  #: newer, whole, and without the optimizer state that this one has


def resume_point(
    backend: Backend,
    listing: Listing,
    selection: Selection = Selection(),
    *,
    failed: Mapping[str, str] | None = None,
    ledger_of: str = "",
    read_slot: bool = True,
    notify: Notify | None = None,
) -> ResumePoint:
    """The newest checkpoint within `selection` that is healthy and passes level structure, and why newer ones don't. One that
    training has left (left.py) is passed over; so is none that is named.

    `failed` names checkpoints (by the first part's folder) already found bad, with the reason. `ledger_of`: the run whose
    metrics tell the health, where it is not the one that is chosen from. Without `read_slot` the slot, which may be all of a
    model and its optimizer, is not read to compare its digests; `notify` is told of that reading. NothingToResumeError when
    none qualifies; IntegrityError when the one that was named is damaged.
    """
    if not selection.named:
        listing.refuse_doubt()
    skipped: list[Skipped] = []
    newest: Checkpoint | None = None
    lost: Checkpoint | None = None
    verdict_on = _judge(ledger_of or listing.run.path)
    strict = not (selection.include_bad or selection.named)
    for candidate in _candidates(backend, listing, selection):
        if newest is not None and candidate.step < newest.step - STATE_WORTH_STEPS:
            break
        if newest is not None and "optimizer" not in candidate.holds:
            continue
        reading = _reading(candidate, notify) if read_slot and candidate.kind == "slot" else None
        checkpoint, reasons = _examine(
            backend, candidate, failed or {}, verdict_on if strict else None, named=selection.named, reading=reading
        )
        if reasons:
            if newest is None:
                skipped.append(Skipped(checkpoint, reasons))
            continue
        if strict and listing.framework == "steps" and (why := diverged(_manifest_of(backend, checkpoint))):
            skipped.append(Skipped(checkpoint, (why,)))
            lost = lost or checkpoint
            continue
        if newest is not None:
            why = f"its optimizer state is worth more than {newest.step - checkpoint.step} newer steps of weights alone"
            return ResumePoint(checkpoint, tuple(skipped), why, newest)
        newest = checkpoint
        if selection.named or selection.prefer != "state" or "optimizer" in checkpoint.holds:
            break
    if newest is None and lost is not None:  # no loss of any is a number: the metric is broken, or all is lost
        newest, skipped = lost, [skip for skip in skipped if skip.checkpoint.step > lost.step]
    if newest is not None:
        why = _why(newest, skipped, selection, verdict_on and verdict_on(newest), read_slot=read_slot)
        return ResumePoint(newest, tuple(skipped), why)
    if selection.named and skipped:
        bad = skipped[0]
        name = selection.checkpoint_path or f"step {bad.checkpoint.step}"
        raise IntegrityError(
            f"{name} is {bad.checkpoint.status}: {'; '.join(bad.reasons[:3])}",
            hint=f"Without {'--checkpoint-path' if selection.checkpoint_path else '--step'}, the newest good one is chosen.",
        )
    raise _nothing(listing, selection, skipped)


def passed_over(
    run: str, checkpoints: Sequence[Checkpoint], manifests: Mapping[int, Manifest | None] = _NONE
) -> dict[int, str]:
    """The steps that nobody goes on from unasked, and why: training has left them, or had gone bad (gone_bad)."""
    left = {checkpoint.step: checkpoint.left for checkpoint in checkpoints if checkpoint.left}
    return gone_bad(run, [checkpoint for checkpoint in checkpoints if not checkpoint.left], manifests) | left


def gone_bad(run: str, checkpoints: Sequence[Checkpoint], manifests: Mapping[int, Manifest | None] = _NONE) -> dict[int, str]:
    """The steps of which a run's metrics say that training had gone bad, and what they say. None where none were recorded.

    With `manifests`, by step, those too that were saved with a loss that is no number, unless that leaves none.
    """
    verdict_on = _judge(run)
    verdicts = ((checkpoint.step, verdict_on(checkpoint)) for checkpoint in checkpoints) if verdict_on is not None else ()
    bad = {step: f"health {found.health}: {found.why}" for step, found in verdicts if not found.health.resumable}
    lost = {step: why for step, manifest in manifests.items() if (why := diverged(manifest))}
    return bad if all(one.step in bad or one.step in lost for one in checkpoints) else lost | bad


def newest_good(run: str, checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Of checkpoints in the order of their saves the last one that the run's metrics call good; None where they do of none."""
    verdict_on = _judge(run)
    good = [found for found in checkpoints if verdict_on is not None and verdict_on(found).health == "good"]
    return good[-1] if good else None


def newest_first(run: str, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """In the order in which a machine that may be gone soon sends them: the one that was saved last comes first, those of a
    time when training had gone bad come last.

    By time, not by number: after a rollback the steps of the abandoned history have the higher numbers.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: (checkpoint.saved_at_s, checkpoint.step), reverse=True)
    bad: Mapping[int, str] = {}
    with contextlib.suppress(AccessError, StorageError):  # a ledger that cannot be read must not keep them from being sent
        bad = gone_bad(run, ordered) if len(ordered) > 1 else {}
    return sorted(ordered, key=lambda checkpoint: checkpoint.step in bad)


def _manifest_of(backend: Backend, checkpoint: Checkpoint) -> Manifest | None:
    return manifest_told(backend, folder_of(backend, checkpoint.parts[0]))


def _judge(run: str) -> Judge | None:
    """What tells a checkpoint's health; None where there are no metrics."""
    if not places.has_metrics(run):
        return None
    from ckptstore import health  # 20 ms, where many runs have none

    ledger = health.ledger_of(run)
    return functools.partial(health.of, ledger=ledger) if ledger else None


def _reading(slot: Checkpoint, notify: Notify | None) -> native.Progress:
    """What is told while all of the slot is read."""

    def progress(done_bytes: int, _: int) -> None:
        if notify is not None:
            notify(f"verifying step {slot.step} in the slot", done_bytes, slot.size_bytes)

    return progress


def _examine(
    backend: Backend,
    checkpoint: Checkpoint,
    failed: Mapping[str, str],
    verdict_on: Judge | None,
    *,
    named: bool,
    reading: native.Progress | None,
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint as level structure sees it, or with `reading` level full, and what is wrong with it."""
    if checkpoint.parts[0].path in failed:
        return checkpoint, (failed[checkpoint.parts[0].path],)
    if not checkpoint.status.usable:
        return checkpoint, tuple(map(str, checkpoint.findings))
    if checkpoint.left and not named:
        return checkpoint, (checkpoint.left,)
    if verdict_on is not None and not (verdict := verdict_on(checkpoint)).health.resumable:
        return checkpoint, (f"health {verdict.health}: {verdict.why}",)
    # The slot is checked while nothing of ours will read it: all its digests, or where nobody took them torch's own CRC-32s.
    level = Level.STRUCTURE if reading is None else Level.FULL
    report = verify(backend_for(backend, checkpoint), checkpoint, level, progress=reading)
    return report.checkpoint, tuple(map(str, report.findings))


def _candidates(backend: Backend, listing: Listing, selection: Selection) -> list[Checkpoint]:
    if selection.checkpoint_path:
        return [_at_path(backend, listing, os.path.abspath(selection.checkpoint_path))]
    everything = list(listing.checkpoints)
    everything += listing.adopted
    if not backend.is_folder:  # its slot, if it has one, is what some trainer once resumed from: exports alone
        everything = [c if c.store else dataclasses.replace(c, store=backend.location) for c in everything]
    # Equal steps: the slot first, since it holds optimizer state and needs no copy. One that AReaL could not read is none.
    elif listing.slot is not None and listing.slot.step >= 0 and listing.slot.format in RESUMABLE:
        everything.append(listing.slot)
    everything.sort(key=lambda c: (c.step, c.kind == "slot", c.kind == "adopted", c.epoch, c.epoch_step), reverse=True)
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
    above = os.path.dirname(path)
    for checkpoint in read_adopted(os.path.dirname(above)) if os.path.basename(above) == "adopted" else ():
        if checkpoint.store == path:
            return checkpoint
    outside = LocalBackend(path)
    name = os.path.basename(above)
    known = {part.name for checkpoint in listing.checkpoints for part in checkpoint.parts}
    try:
        part = with_dcp_holdings(
            outside, read_part(outside, name if name in known else layout.MAIN_PART, "", outside.tree(max_depth=5))
        )
    except NotFoundError as error:
        raise NotFoundError(
            f"--checkpoint-path {path}: there is no such folder",
            hint="`ckptstore show STEP` prints the folder of a checkpoint of this run.",
        ) from error
    manifest = find_manifest(outside, "")
    if manifest is not None and manifest.origin == "convert" and part.status is Status.COMMITTED:
        part = never_stepped(part)
    numbers = layout.parse_export_name(os.path.basename(path))
    if numbers is not None:
        return Checkpoint(numbers.step, numbers.epoch, numbers.epoch_step, "export", (part,))
    if manifest is not None:
        return Checkpoint(manifest.step, manifest.epoch, manifest.epoch_step, "export", (part,))
    return Checkpoint(-1, -1, -1, "export", (part,), ("neither its name nor a manifest tells its step",))


def _why(
    checkpoint: Checkpoint, skipped: list[Skipped], selection: Selection, verdict: Verdict | None, *, read_slot: bool
) -> str:
    warning = healthy = ""
    if verdict is not None and not verdict.health.resumable:
        warning = f", although its health is {verdict.health} ({verdict.why})"
    elif verdict is not None and verdict.value is not None:
        healthy = f", health {verdict.health} ({verdict.why})"
    if selection.named:
        return f"you named it{warning}"
    vouched = "its files are whole"
    if checkpoint.kind == "slot":
        if read_slot and checkpoint.vouched:
            vouched = "all its digests match"
        elif own_sums(checkpoint):
            vouched = OWN_SUMS
    elif checkpoint.status is Status.COMMITTED:
        vouched = "its manifest is checked while it is copied"
    newer = f", {len(skipped)} newer one{'s' * (len(skipped) > 1)} skipped" if skipped else ""
    return f"{selection}: {vouched}{healthy}{newer}{warning}"


def own_sums(checkpoint: Checkpoint) -> bool:
    """Whether it was read, and compared with what torch left in its files."""
    return all(any(OWN_SUMS in note for note in part.notes) for part in checkpoint.parts)


def _nothing(listing: Listing, selection: Selection, skipped: list[Skipped]) -> NothingToResumeError:
    steps = sorted({checkpoint.step for checkpoint in listing.checkpoints})
    message = f"no checkpoint qualifies as {selection}" + ("" if selection.url else f" in {listing.run.path}")
    looked_at = {skip.checkpoint.parts[0].path: skip.checkpoint for skip in skipped}
    if skipped:
        # A torn save at the end is usual: what became of one that seemed whole says more.
        seemed_whole = {part.path for c in listing.checkpoints if c.status.usable for part in c.parts}
        telling = next((skip for skip in skipped if skip.checkpoint.parts[0].path in seemed_whole), skipped[0])
        message += (
            f": {len(skipped)} looked at, all damaged, unfinished, unreadable, unhealthy or left "
            f"(step {telling.checkpoint.step}: {'; '.join(telling.reasons[:2])})"
        )
    hint = "Nothing has been saved there yet: see `saver:` and `recover:` in the run's configuration."
    if selection.url and not steps:
        hint = "; ".join(listing.notes) or "What is there is no checkpoint, by its names. Is it the URL that was pushed to?"
    if steps:
        seen = [looked_at.get(checkpoint.parts[0].path, checkpoint) for checkpoint in listing.checkpoints]
        usable = [checkpoint.step for checkpoint in seen if checkpoint.status.usable]
        whole = f"whole {'is' if len(usable) == 1 else 'are'} {_some(usable) or 'none'}"
        hint = f"The first saved step is {steps[0]}, the last {steps[-1]}; {whole}."
        if any(skip.checkpoint.status.usable for skip in skipped):
            hint += " --include-bad takes unhealthy ones too."
    return NothingToResumeError(message, hint=hint)


def _some(steps: list[int]) -> str:
    steps = sorted(set(steps))
    return ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "…", *steps[-4:]]))
