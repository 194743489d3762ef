"""The words of the house as frozen values: what a checkpoint is made of, and what is known about it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

MANIFEST_NAME = "ckptstore.manifest.json"
DRAFT_PREFIX = ".ckptstore.manifest."  #: of a manifest being written; a crash may leave one, it counts as nothing
ATTEMPT_PREFIX = ".ckptstore.attempt-"  #: of a folder in an object store: the files of one writer among several
CLAIM_NAME = f"{DRAFT_PREFIX}claim"  #: of an object that says who writes beside it
REMOVING_PREFIX = f"{DRAFT_PREFIX}removing-"  #: of an object that says that what is beside it is being removed
OURS = (DRAFT_PREFIX, ATTEMPT_PREFIX)  #: names of these are no files of a checkpoint

FRESH_OPTIMIZER = "fresh optimizer"  #: what a slot holds that was made from weights alone: moments of zeros

#: Reads `length` bytes of file `name` (relative to the part) from `offset`; a shorter answer means the file ends there.
ReadAt = Callable[[str, int, int], bytes]


class Status(StrEnum):
    """What the evidence says of a checkpoint, worst last."""

    COMMITTED = "COMMITTED"  #: a valid manifest describes exactly these files
    COMPLETE = "COMPLETE"  #: the framework's own signs hold; no manifest vouches for the bytes
    PARTIAL = "PARTIAL"  #: something is missing, unfinished or unreadable
    CORRUPT = "CORRUPT"  #: bytes are provably wrong

    @property
    def usable(self) -> bool:
        """Whether one may try to resume from it."""
        return self in (Status.COMMITTED, Status.COMPLETE)


_WORST_LAST = tuple(Status)


def worst(statuses: Iterable[Status]) -> Status:
    """The worst of `statuses`; PARTIAL for none, since a checkpoint without parts is unfinished."""
    statuses = list(statuses)
    return statuses[0] if len(statuses) == 1 else max(statuses, key=_WORST_LAST.index, default=Status.PARTIAL)


class Level(StrEnum):
    """How hard `verify` looks; full includes structure, and all include quick."""

    QUICK = "quick"  #: sizes and names
    STRUCTURE = "structure"  #: what the file formats themselves prove
    FULL = "full"  #: every digest
    SERVER = "server"  #: the digests that an S3 store keeps of its objects, by HEADs alone: no byte is read


class FileInfo(NamedTuple):
    """One file of a part as the file system shows it. `name` is relative to the part, with `/` between folders."""

    name: str
    size_bytes: int
    mtime_ns: int
    inode: int
    kind: str = "file"  #: file, symlink or other (fifo, device, socket); folders are not listed


class Finding(NamedTuple):
    """One thing wrong with one file (`path` relative to the part; empty when the part as a whole is meant)."""

    path: str
    problem: str
    status: Status  #: what it makes of the checkpoint: PARTIAL or CORRUPT

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class NodeSet(NamedTuple):
    """A save of several nodes, each of which keeps its own ranks' files on its own disk."""

    id: str  #: names this act of saving: 32 hex digits
    node: int  #: whose files these are, from 0
    nodes: int
    digest: str  #: hex SHA-256 over what the files of all nodes hold, by node

    @property
    def whose(self) -> str:
        """For people."""
        return f"node {self.node + 1} of {self.nodes}"


@dataclass(frozen=True, slots=True)
class Part:
    """One tree of a checkpoint: AReaL keeps one per model (default, critic)."""

    name: str
    path: str  #: the folder, absolute
    files: tuple[FileInfo, ...] = field(repr=False)  # of a checkpoint that is looked at: pages of them
    format: str  #: hf, hf-sharded, hf-bin, lora, hf+optim, dcp, mixed, empty or unknown
    holds: tuple[str, ...]  #: of weights, optimizer or fresh optimizer, scheduler, rng, dataloader, tokenizer, config
    status: Status
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()  #: worth knowing, harmless: "saved since by the trainer"
    mtime_ns: int = 0  #: of the newest file, or of the folder when it is empty
    base: str = ""  #: in an object store: the folder in `path` that the files lie in, by the manifest's word; "": `path` itself
    copy: str = ""  #: a folder or URL with a copy of just this save: its manifest vouches for the bytes where none here does

    @property
    def files_path(self) -> str:
        """The folder that the files lie in."""
        return f"{self.path}/{self.base}" if self.base else self.path

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but our manifest."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One step of one run."""

    step: int  #: AReaL's globalstep, 0-based; its log says "Train step {step + 1}"; -1 when it cannot be known
    epoch: int
    epoch_step: int
    kind: str  #: export (a folder of its own), slot (the one that the trainer overwrites), adopted (a slot that we kept)
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = field(default=())
    store: str = ""  #: adopted: the folder that holds the parts and the trainer's own recover_info; from a URL: its run's
    left: str = ""  #: why it is of a history that training has left (left.py); only who names it gets it

    @property
    def log_step(self) -> int:
        """The number in the trainer's log: "Train step N"."""
        return self.step + 1

    @property
    def status(self) -> Status:
        """The worst of the parts'."""
        return worst(part.status for part in self.parts)

    @property
    def vouched(self) -> bool:
        """Whether digests of all its bytes are at hand: of its own manifests, or of a copy of just this save."""
        return bool(self.parts) and all(part.status is Status.COMMITTED or part.copy for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def file_count(self) -> int:
        """Files of all parts, our manifests not counted."""
        return sum(len(part.files) for part in self.parts)

    @property
    def holds(self) -> tuple[str, ...]:
        """What every part holds, in the order of the first part."""
        if len(self.parts) < 2:
            return self.parts[0].holds if self.parts else ()
        common = set.intersection(*(set(part.holds) for part in self.parts))
        return tuple(item for item in self.parts[0].holds if item in common)

    @property
    def format(self) -> str:
        """The parts' format, or `mixed`."""
        formats = {part.format for part in self.parts}
        return formats.pop() if len(formats) == 1 else "mixed" if formats else "empty"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All parts' findings, each path led by its part's name."""
        return tuple(
            Finding(f"{part.name}/{finding.path}" if finding.path else part.name, finding.problem, finding.status)
            for part in self.parts
            for finding in part.findings
        )

    @property
    def saved_at_s(self) -> float:
        """Unix time of the newest file."""
        return max((part.mtime_ns for part in self.parts), default=0) / 1e9

    @property
    def mark(self) -> str:
        """Another one for other files: by names, sizes and times."""
        lines = [
            f"{part.name}/{file.name} {file.size_bytes} {file.mtime_ns}"
            for part in sorted(self.parts, key=lambda part: part.name)
            for file in sorted(part.files)
        ]
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()

    def age_s(self, now_s: float | None = None) -> float:
        """Seconds since the newest file was written."""
        return (time.time() if now_s is None else now_s) - self.saved_at_s
