"""The part of `verify --weights` that people and programs see."""

from __future__ import annotations

import functools
from typing import Any

from ckptstore import weights
from ckptstore.backends import Backend
from ckptstore.cli.condition import health
from ckptstore.cli.render import echo, item
from ckptstore.listing import Listing
from ckptstore.sizes import counted, size
from ckptstore.verify import Notify, Report
from ckptstore.weights import Sanity, Scan

_SHOWN = 6


def weigh(backend: Backend, listing: Listing, reports: list[Report], notify: Notify) -> list[Sanity]:
    """Scan the numbers of the checkpoints that are whole; none is read twice."""
    known: dict[str, Scan] = {}
    found = []
    for report in reports:
        if report.ok:
            progress = functools.partial(notify, f"scanning the weights of step {report.checkpoint.step}")
            found.append(weights.check(backend, listing, report.checkpoint, known=known, progress=progress))
    return found


def print_sanity(found: list[Sanity]) -> None:
    """A line a checkpoint, and what is wrong with it."""
    if found:
        echo()
    for sanity in found:
        scan = sanity.scan
        count = sum(len(tensors) for tensors in scan.parts.values())
        rate = f", {scan.bytes_read / scan.seconds / 1e9:.2f} GB/s" if scan.seconds > 0 else ""
        against = f", against step {sanity.compared_with}" if sanity.compared_with >= 0 else ""
        step = f"step {scan.step}" if scan.step >= 0 else "unknown step"
        echo(f"weights, {step:<9} {health(sanity.health)}  {counted(count, 'tensor')}, {size(scan.bytes_read)}{rate}{against}")
        for problem in sanity.problems[:_SHOWN]:
            item("✗", str(problem), fg="red")
        if len(sanity.problems) > _SHOWN:
            item(" ", f"and {len(sanity.problems) - _SHOWN} more (--json has all)")
        for text in sanity.notes[:_SHOWN]:
            item("·", f"not scanned: {text}" if text in scan.not_scanned else text)


def sanity_json(sanity: Sanity) -> dict[str, Any]:
    """The documented fields of a verdict on weights."""
    scan = sanity.scan
    return {
        "step": scan.step,
        "health": str(sanity.health),
        "compared_with": sanity.compared_with if sanity.compared_with >= 0 else None,
        "tensors": sum(len(tensors) for tensors in scan.parts.values()),
        "bytes_read": scan.bytes_read,
        "seconds": round(scan.seconds, 6),
        "problems": [
            {"health": str(found.health), "part": found.part, "tensor": found.tensor, "problem": found.what}
            for found in sanity.problems
        ],
        "not_scanned": list(scan.not_scanned),
    }
