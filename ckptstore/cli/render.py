"""What people see: columns, sizes, ages, colours. Names are printed escaped: a file name must not drive the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.locate import Located
from ckptstore.model import Checkpoint, FileInfo, Finding, Status

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOURS = {
    Status.COMMITTED: "green",
    Status.COMPLETE: "cyan",
    Status.PARTIAL: "yellow",
    Status.CORRUPT: "red",
}
MARKS = {Status.COMMITTED: "●", Status.COMPLETE: "○", Status.PARTIAL: "◐", Status.CORRUPT: "✗"}
_LABEL_CHARS = 9


def safe(text: str) -> str:
    """`text` with control, line-break and direction characters escaped."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def colour() -> bool | None:
    """Whether to colour: never with $NO_COLOR, always with $FORCE_COLOR, else (None) where the stream is a terminal."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return True if os.environ.get("FORCE_COLOR") else None


def width() -> int:
    """Columns to break lines at. 0 where stdout is no terminal: then every fact stays on one line, for grep."""
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 0


def echo(text: str = "", *, err: bool = False) -> None:
    """Print lines of ours; colours are dropped where the stream is not a terminal."""
    click.echo(text, err=err, color=colour())


def heading(text: str) -> None:
    """A line that starts a block."""
    echo(click.style(text, bold=True))


def field(label: str, text: str, *, err: bool = False) -> None:
    """A labelled line; where it does not fit, the rest stands below its beginning. `text` is escaped here."""
    first = click.style(f"{label:<{_LABEL_CHARS}}", bold=True)
    echo(_filled(first, safe(text), _LABEL_CHARS), err=err)


def item(mark: str, text: str, *, label: str = "", fg: str | None = None, err: bool = False) -> None:
    """An indented line of a block, after a mark and a label; the rest stands below its beginning. `text` is escaped here."""
    indent = 2 + len(mark) + 1 + len(label)
    echo(_filled(f"  {click.style(mark, fg=fg)} {label}", safe(text), indent), err=err)


def row(label: str, text: str) -> None:
    """A labelled line inside of a block. `text` is escaped here."""
    echo(_filled(f"  {label:<{_LABEL_CHARS}} ", safe(text), _LABEL_CHARS + 3))


def _filled(first: str, text: str, indent: int) -> str:
    columns = width()
    if not columns:
        return first + text
    lines = textwrap.wrap(text, max(columns - indent, 30), break_long_words=False, break_on_hyphens=False) or [""]
    return first + f"\n{' ' * indent}".join(lines)


def done(text: str) -> None:
    """The line that says what was achieved."""
    echo(_filled(click.style("✓", fg="green", bold=True) + " ", safe(text), 2))


def note(text: str) -> None:
    """A line for people beside the result: to stderr, so that --json stays clean."""
    echo(_filled(click.style("note:", fg="yellow") + " ", safe(text), 6), err=True)


def problem(message: str, *, facts: Sequence[str] = (), hint: str = "") -> None:
    """An error for people, on stderr: what and where, what is known about it, and what to try."""
    echo(_filled(click.style("error:", fg="red", bold=True) + " ", safe(message), 7), err=True)
    for fact in facts:
        echo(_filled("  ", safe(fact), 4), err=True)
    if hint:
        echo(_filled(click.style("  try:", bold=True) + "  ", safe(hint), 8), err=True)


def rate(count: float, seconds: float) -> str:
    """The words `at … GB/s` after a size, or nothing where too little was moved to tell."""
    return f" at {count / seconds / 1e9:.2f} GB/s" if count >= 256e6 and seconds > 0 else ""


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
    widths = [max(_seen(row[i]) for row in (titles, *rows)) for i in range(last)]
    lines = []
    for number, cells in enumerate((titles, *rows)):
        aligned = []
        for i, (cell, width) in enumerate(zip(cells, widths, strict=False)):
            pad = " " * (width - _seen(cell))
            aligned.append(cell + pad if i in lefts else pad + cell)
        line = "  ".join([*aligned, cells[last]])
        lines.append(click.style(line, dim=True) if number == 0 else line)
    return lines


def _seen(cell: str) -> int:
    """Characters of a cell that are seen: colours are not, and a pipe does not get them."""
    return len(click.unstyle(cell)) if "\x1b" in cell else len(cell)


def findings(items: Sequence[Finding], *, limit: int = 6, more: str = "") -> None:
    """Print one line a finding; the rest is counted."""
    for finding in items[:limit]:
        item("·", str(finding), fg=_COLOURS[finding.status])
    if len(items) > limit:
        item("·", f"and {len(items) - limit} more{more}")


def _is_logged(checkpoint: Checkpoint) -> bool:
    """Whether the log's number is known. How the trainer of a store of steps counts in its log, it is not."""
    return checkpoint.step >= 0 and (checkpoint.epoch >= 0 or checkpoint.kind != "export")


def steps(checkpoint: Checkpoint) -> str:
    """Both numbers of a step: the folder's, and the one in the trainer's log."""
    if checkpoint.step < 0:
        return "unknown step"
    if not _is_logged(checkpoint):
        return f"step {checkpoint.step}"
    return f"global step {checkpoint.step} (the log says: Train step {checkpoint.log_step})"


def state(names: Sequence[str]) -> str:
    """What a checkpoint holds, short enough for a table."""
    short = {"optimizer": "optim", "scheduler": "sched", "dataloader": "data", "tokenizer": "tok", "config": "cfg"}
    return " ".join(short.get(name, name) for name in names) or "-"


# --- for programs -------------------------------------------------------------------------------------------------

#: The documented fields of a health that nothing tells.
NO_VERDICT: dict[str, Any] = {
    "health": "unknown",
    "health_why": "no metrics are recorded",
    "metric": "",
    "value": None,
}


def print_json(document: Any) -> None:
    """Print a JSON document. All of it is ASCII, control characters of names as \\u escapes: safe to look at."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=True))


def checkpoint_json(checkpoint: Checkpoint, *, with_files: bool = False) -> dict[str, Any]:
    """The documented fields of a checkpoint (docs/cli.md)."""
    return {
        "kind": checkpoint.kind,
        "step": checkpoint.step,
        "log_step": checkpoint.log_step if _is_logged(checkpoint) else -1,
        "epoch": checkpoint.epoch,
        "epoch_step": checkpoint.epoch_step,
        "status": str(checkpoint.status),
        "format": checkpoint.format,
        "holds": list(checkpoint.holds),
        "file_count": checkpoint.file_count,
        "bytes": checkpoint.size_bytes,
        "saved_at": checkpoint.saved_at_s,
        "left": checkpoint.left,
        "parts": [
            {
                "name": part.name,
                "path": part.path,
                "files_path": part.files_path,
                "format": part.format,
                "holds": list(part.holds),
                "status": str(part.status),
                "file_count": len(part.files),
                "bytes": part.size_bytes,
                "notes": list(part.notes),
                "findings": [finding_json(finding) for finding in part.findings],
                **({"files": [_file_json(file) for file in part.files]} if with_files else {}),
            }
            for part in checkpoint.parts
        ],
        "notes": list(checkpoint.notes),
    }


def _file_json(file: FileInfo) -> dict[str, Any]:
    return {"path": file.name, "bytes": file.size_bytes, "mtime_ns": file.mtime_ns, "kind": file.kind}


def finding_json(finding: Finding) -> dict[str, str]:
    """The documented fields of a finding."""
    return {"path": finding.path, "problem": finding.problem, "status": str(finding.status)}


def run_json(located: Located) -> dict[str, str]:
    """The documented fields of a run."""
    run = located.run
    return {
        "path": run.path,
        "fileroot": run.fileroot,
        "user": run.user,
        "experiment": run.experiment,
        "trial": run.trial,
        "found_by": located.how,
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
        "problems": list(info.problems),
    }
