"""What the doctor looks at, one module a subject. A check is a function: Patient → diagnoses; it reads, and changes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from ckptstore import side as side_folders
from ckptstore.config import RunConfig
from ckptstore.frameworks.areal import layout
from ckptstore.frameworks.areal.launch import Installation
from ckptstore.frameworks.areal.layout import RunRef
from ckptstore.frameworks.areal.resume_state import data_parallel_world
from ckptstore.listing import Listing


class Severity(StrEnum):
    """How bad it is, worst last."""

    OK = "ok"
    WARN = "warn"  #: training and recovery work; something will cost time or steps
    BAD = "bad"  #: a save, a crash or the recovery would lose something


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check found."""

    check: str  #: a stable name, for programs
    severity: Severity
    found: str
    remedy: str = ""  #: what to do about it, as a full sentence; empty when nothing need be done
    damage: bool = False  #: bytes are wrong, or missing from what should be whole


@dataclass(frozen=True, slots=True)
class Patient:
    """One run, before its first start or later, and what is known about the trainer."""

    run: RunRef
    config: RunConfig | None
    listing: Listing | None  #: None where the run's folder is not there yet
    installation: Installation
    now_s: float
    saves: int = 3  #: room for so many more must be there
    said_world_size: int = 0

    @property
    def side(self) -> str:
        """The run's side folder; it need not exist."""
        if not os.path.isdir(os.path.dirname(self.run.path)):  # before the first start there is nothing to judge the place by
            return os.path.join(os.path.dirname(self.run.path), layout.SIDE, os.path.basename(self.run.path))
        return side_folders.side_folder(self.run.path, os.path.join(self.run.path, layout.MAIN_PART, layout.SLOT))

    @property
    def of_steps(self) -> bool:
        """Whether it is a store of steps, which has no slot."""
        return self.listing is not None and self.listing.framework == "steps"

    @property
    def world_size(self) -> int:
        """Ranks of the trainer, as said or as the YAML tells; 0 when unknown."""
        if self.said_world_size or self.config is None:
            return self.said_world_size
        return data_parallel_world(self.config.text("allocation_mode"))


def ok(check: str, found: str) -> Diagnosis:
    """Nothing to do."""
    return Diagnosis(check, Severity.OK, found)


def warn(check: str, found: str, remedy: str) -> Diagnosis:
    """Worth doing something about."""
    return Diagnosis(check, Severity.WARN, found, remedy)


def bad(check: str, found: str, remedy: str, *, damage: bool = False) -> Diagnosis:
    """To be done something about first."""
    return Diagnosis(check, Severity.BAD, found, remedy, damage)


def gigabytes(count: float) -> str:
    """Bytes in the unit that disks are sold in."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
