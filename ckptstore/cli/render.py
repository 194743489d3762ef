"""What people see: columns, sizes, ages, colours. Names are printed escaped: a file name must not drive the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.locate import Located
from ckptstore.model import Checkpoint, Finding, Status

_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOURS = {
    Status.COMMITTED: "green",
    Status.COMPLETE: "cyan",
    Status.PARTIAL: "yellow",
    Status.CORRUPT: "red",
}
MARKS = {Status.COMMITTED: "●", Status.COMPLETE: "○", Status.PARTIAL: "◐", Status.CORRUPT: "✗"}


def safe(text: str) -> str:
    """`text` with control and direction characters escaped."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def echo(text: str = "") -> None:
    """Print a line of ours; colours are dropped where stdout is not a terminal."""
    click.echo(text)


def heading(text: str) -> None:
    """A line that starts a block."""
    click.secho(text, bold=True)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def age(seconds: float) -> str:
    """A duration for people, two digits of sense."""
    if seconds < 0:
        return "in the future"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def status(value: Status) -> str:
    """The status, marked and coloured."""
    return click.style(f"{MARKS[value]} {value}", fg=_COLOURS[value])


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: Iterable[int] = ()) -> list[str]:
    """Aligned lines, the titles first. A plain loop: rich lays out ten thousand rows in many seconds. Last column as it is."""
    lefts = set(left)
    last = len(titles) - 1
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(last)]
    lines = []
    for number, row in enumerate((titles, *rows)):
        cells = [
            cell.ljust(width) if i in lefts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        line = "  ".join([*cells, row[last]])
        lines.append(click.style(line, dim=True) if number == 0 else line)
    return lines


def findings(items: Sequence[Finding], *, indent: str = "  ", limit: int = 6) -> list[str]:
    """One line a finding, the rest counted."""
    lines = [f"{indent}{click.style('·', fg=_COLOURS[item.status])} {safe(str(item))}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"{indent}· and {len(items) - limit} more")
    return lines


def steps(checkpoint: Checkpoint) -> str:
    """Both numbers of a step: the folder's, and the one in the trainer's log."""
    if checkpoint.step < 0:
        return "unknown step"
    return f"global step {checkpoint.step} (the log says: Train step {checkpoint.log_step})"


def print_json(document: Any) -> None:
    """Print a JSON document, for programs."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=True))


def checkpoint_json(checkpoint: Checkpoint, *, with_files: bool = False) -> dict[str, Any]:
    """The documented fields of a checkpoint (docs/cli.md)."""
    return {
        "kind": checkpoint.kind,
        "step": checkpoint.step,
        "log_step": checkpoint.log_step if checkpoint.step >= 0 else -1,
        "epoch": checkpoint.epoch,
        "epoch_step": checkpoint.epoch_step,
        "status": str(checkpoint.status),
        "format": checkpoint.format,
        "holds": list(checkpoint.holds),
        "files": checkpoint.file_count,
        "bytes": checkpoint.size_bytes,
        "saved_at": checkpoint.saved_at_s,
        "parts": [
            {
                "name": part.name,
                "path": safe(part.path),
                "format": part.format,
                "holds": list(part.holds),
                "status": str(part.status),
                "bytes": part.size_bytes,
                "notes": [safe(note) for note in part.notes],
                "findings": [finding_json(finding) for finding in part.findings],
                **(
                    {
                        "files": [
                            {
                                "path": safe(f.name),
                                "bytes": f.size_bytes,
                                "mtime_ns": f.mtime_ns,
                                "kind": f.kind,
                            }
                            for f in part.files
                        ]
                    }
                    if with_files
                    else {"files": len(part.files)}
                ),
            }
            for part in checkpoint.parts
        ],
        "notes": [safe(note) for note in checkpoint.notes],
    }


def finding_json(finding: Finding) -> dict[str, str]:
    """The documented fields of a finding."""
    return {"path": safe(finding.path), "problem": safe(finding.problem), "status": str(finding.status)}


def run_json(located: Located) -> dict[str, str]:
    """The documented fields of a run."""
    run = located.run
    return {
        "path": safe(run.path),
        "fileroot": safe(run.fileroot),
        "user": safe(run.user),
        "experiment": safe(run.experiment),
        "trial": safe(run.trial),
        "found_by": safe(located.how),
    }


def info_json(info: RecoverInfo | None) -> dict[str, Any] | None:
    """The documented fields of a recover_info; null without one."""
    if info is None:
        return None
    return {
        "step": info.step,
        "resumes_at": info.resumes_at if info.step >= 0 else -1,
        "epoch": info.epoch,
        "epoch_step": info.epoch_step,
        "steps_per_epoch": info.steps_per_epoch,
        "holds": list(info.holds),
        "dataloader_bytes": info.dataloader_bytes,
        "problems": [safe(problem) for problem in info.problems],
    }
