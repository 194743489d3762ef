"""The run's log files: which there are, the last error in them, and lines that are known to mean something.

`{fileroot}/logs/{user}/{experiment}/{trial}/` holds main.log, one log a worker, and the inference servers' own. Only the end
of each is read: logs of long runs are large, and what stopped the run stands last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptstore.untrusted import open_regular

TAIL_BYTES = 2 << 20
MAX_FILES = 64
MAX_LINE_CHARS = 300
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_STEP = re.compile(r"Train step (\d{1,9})(?:/\d+)? done")
_ERROR = re.compile(
    r"^(?![│|]).*?(?:\b(?:ERROR|CRITICAL|FATAL)\b|\b(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?::|\s*$)).*$", re.MULTILINE
)


class Known(NamedTuple):
    """A line that says what happened. `final`: training that goes on afterwards does not make it harmless."""

    name: str
    pattern: str
    means: str
    remedy: str
    final: bool = False


KNOWN = (
    Known(
        "fresh-start",
        r"This should not be a resumed experiment",
        "AReaL could not load what it should have resumed from, swallowed the error, and started at step 0",
        "Stop it: it trains from step 0 in the run's folders. `ckptstore resume` sets up what it can load.",
        final=True,
    ),
    Known(
        "slot-unreadable",
        r"CheckpointException|Missing key in checkpoint state_dict",
        "the slot could not be loaded: not DCP, cut short, or without optimizer state",
        "`ckptstore setup` puts one there that can.",
    ),
    Known(
        "no-space",
        r"No space left on device|Disk quota exceeded|\bENOSPC\b|\bEDQUOT\b",
        "the disk, or the quota, was full: the save at that moment is torn",
        "Free some space (`ckptstore clean`), then `ckptstore list` shows which saves are whole.",
    ),
    Known(
        "gpu-memory",
        r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUDA error: out of memory",
        "a GPU ran out of memory",
        "Shorter sequences, smaller micro-batches, or a smaller share for the inference server.",
    ),
    Known(
        "host-memory",
        r"(?i:oom-kill|out of memory: killed process)|\bMemoryError\b|exit(?:ed with)? (?:code )?-9\b|Killed\s*$",
        "the machine ran out of memory, or somebody killed the process (exit code -9, no traceback)",
        "See `dmesg`; fewer dataloader workers, or more memory.",
    ),
    Known(
        "nccl",
        r"Watchdog caught collective operation timeout|NCCL (?:error|WARN.*[Tt]imeout|timeout)|ncclSystemError|"
        r"ncclRemoteError|ncclInternalError",
        "a collective of the GPUs failed or timed out: one rank died or hung before the others",
        "Look for the first error among the ranks' logs: this one is an echo.",
    ),
    Known(
        "cuda",
        r"CUDA error: (?!out of memory)|Xid \(|uncorrectable ECC|device-side assert",
        "a GPU failed",
        "See `nvidia-smi` and `dmesg`; after an Xid or ECC error change the machine.",
    ),
    Known(
        "server",
        r"Cannot connect to host|Connection refused|Server disconnected|ServerDisconnectedError|All connection attempts failed",
        "the inference server did not answer: rewards become 0 while training goes on",
        "Look into the server's log; `ckptstore list` shows which saves are from before.",
    ),
    Known(
        "permission",
        r"PermissionError|Permission denied",
        "something could not be read or written",
        "Run as the user that owns the run; see the check `permissions`.",
    ),
    Known(
        "port",
        r"Address already in use|EADDRINUSE",
        "a port was taken: a process of an earlier start is still alive",
        "End it before the next start.",
    ),
    Known(
        "halted",
        r"TrainingHalted",
        "the circuit breaker stopped training",
        "`ckptstore status` says why.",
    ),
)
_ANY_KNOWN = re.compile("|".join(f"(?P<k{number}>{known.pattern})" for number, known in enumerate(KNOWN)), re.MULTILINE)


class Seen(NamedTuple):
    """A known line: its last occurrence in a file."""

    known: Known
    path: str
    line: str
    times: int
    trained_since: bool  #: a training step was done after it


class LogFile(NamedTuple):
    """One log file."""

    path: str
    size_bytes: int
    mtime_s: float


@dataclass(slots=True)
class Logs:
    """What the logs say; newest file first."""

    folder: str
    files: list[LogFile] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    last_log_step: int = 0  #: "Train step N", counted from 1; 0 when none was seen
    last_error: tuple[str, str] | None = None  #: path and line, of the file that was written last
    known: list[Seen] = field(default_factory=list)


def read(folder: str) -> Logs:
    """Read the ends of all logs in `folder` and one level below. Never raises for what it finds."""
    logs = Logs(folder, sorted(_files(folder), key=lambda file: -file.mtime_s)[:MAX_FILES])
    for file in logs.files:
        try:
            text = _tail(file)
        except OSError as error:
            logs.unreadable.append(f"{file.path}: {error.strerror}")
            continue
        steps = list(_STEP.finditer(text))
        last_step_at = steps[-1].start() if steps else -1
        logs.last_log_step = max([logs.last_log_step, *(int(match[1]) for match in steps)])
        if logs.last_error is None and (errors := list(_ERROR.finditer(text))):
            logs.last_error = (file.path, _shown(errors[-1][0]))
        logs.known += _known(text, file.path, last_step_at)
    return logs


def _known(text: str, path: str, last_step_at: int) -> Iterator[Seen]:
    found: dict[int, list[int]] = {}
    for match in _ANY_KNOWN.finditer(text):
        assert match.lastgroup is not None
        found.setdefault(int(match.lastgroup[1:]), []).append(match.start())
    for number, places in sorted(found.items()):
        start = text.rfind("\n", 0, places[-1]) + 1
        end = text.find("\n", places[-1])
        line = _shown(text[start : end if end >= 0 else len(text)])
        yield Seen(KNOWN[number], path, line, len(places), last_step_at > places[-1])


def _files(folder: str) -> Iterator[LogFile]:
    for path in (folder, *_subfolders(folder)):
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) and entry.name.endswith((".log", ".out", ".err", ".txt")):
                        seen = entry.stat(follow_symlinks=False)
                        yield LogFile(entry.path, seen.st_size, seen.st_mtime)
        except OSError:
            continue


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _tail(file: LogFile) -> str:
    with open_regular(file.path) as stream:
        stream.seek(max(0, file.size_bytes - TAIL_BYTES))
        data = stream.read(TAIL_BYTES)
    return _COLOUR.sub("", data.decode("utf-8", "replace").replace("\r", "\n"))


def _shown(line: str) -> str:
    line = line.strip()
    return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"
