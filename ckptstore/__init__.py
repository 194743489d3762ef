"""ckptstore: from a crash to resumed training in one command, and never onto a bad checkpoint.

>>> from ckptstore import CheckpointStore
>>> store = CheckpointStore("…/checkpoints/root/gsm8k-grpo/trial0")     # doctest: +SKIP
>>> store.setup()                                                       # doctest: +SKIP

The names below are imported when they are first used: `import ckptstore` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CheckpointStore": "ckptstore.store",
    "Keep": "ckptstore.retention",
    "SaveHandle": "ckptstore.saves.background",
    "wait_all": "ckptstore.saves.background",
    "Selection": "ckptstore.choose",
    "ResumePoint": "ckptstore.choose",
    "Options": "ckptstore.plan",
    "Plan": "ckptstore.plan",
    "Outcome": "ckptstore.recovery",
    "setup": "ckptstore.recovery",
    "undo": "ckptstore.recovery",
    "CircuitBreaker": "ckptstore.breaker",
    "SaveSchedule": "ckptstore.schedule",
    "open_backend": "ckptstore.backends",
    "Checkpoint": "ckptstore.model",
    "Part": "ckptstore.model",
    "Finding": "ckptstore.model",
    "Status": "ckptstore.model",
    "Level": "ckptstore.model",
    "Listing": "ckptstore.listing",
    "Report": "ckptstore.verify",
    "Manifest": "ckptstore.manifest",
    "CkptStoreError": "ckptstore.errors",
    "UsageError": "ckptstore.errors",
    "NotFoundError": "ckptstore.errors",
    "AlreadyExistsError": "ckptstore.errors",
    "AccessError": "ckptstore.errors",
    "StorageError": "ckptstore.errors",
    "NoSpaceError": "ckptstore.errors",
    "BusyError": "ckptstore.errors",
    "RankError": "ckptstore.errors",
    "RefusedError": "ckptstore.errors",
    "NothingToResumeError": "ckptstore.errors",
    "TrainingHalted": "ckptstore.errors",
    "IntegrityError": "ckptstore.errors",
    "ManifestError": "ckptstore.errors",
    "NotWholeError": "ckptstore.errors",
    "DigestMismatchError": "ckptstore.errors",
    "SourceChangedError": "ckptstore.errors",
    "CommitError": "ckptstore.errors",
    "NotCommitted": "ckptstore.errors",
    "CommitUncertain": "ckptstore.errors",
}

if TYPE_CHECKING:
    from ckptstore.backends import open_backend as open_backend
    from ckptstore.breaker import CircuitBreaker as CircuitBreaker
    from ckptstore.choose import ResumePoint as ResumePoint
    from ckptstore.choose import Selection as Selection
    from ckptstore.errors import AccessError as AccessError
    from ckptstore.errors import AlreadyExistsError as AlreadyExistsError
    from ckptstore.errors import BusyError as BusyError
    from ckptstore.errors import CkptStoreError as CkptStoreError
    from ckptstore.errors import CommitError as CommitError
    from ckptstore.errors import CommitUncertain as CommitUncertain
    from ckptstore.errors import DigestMismatchError as DigestMismatchError
    from ckptstore.errors import IntegrityError as IntegrityError
    from ckptstore.errors import ManifestError as ManifestError
    from ckptstore.errors import NoSpaceError as NoSpaceError
    from ckptstore.errors import NotCommitted as NotCommitted
    from ckptstore.errors import NotFoundError as NotFoundError
    from ckptstore.errors import NothingToResumeError as NothingToResumeError
    from ckptstore.errors import NotWholeError as NotWholeError
    from ckptstore.errors import RankError as RankError
    from ckptstore.errors import RefusedError as RefusedError
    from ckptstore.errors import SourceChangedError as SourceChangedError
    from ckptstore.errors import StorageError as StorageError
    from ckptstore.errors import TrainingHalted as TrainingHalted
    from ckptstore.errors import UsageError as UsageError
    from ckptstore.listing import Listing as Listing
    from ckptstore.manifest import Manifest as Manifest
    from ckptstore.model import Checkpoint as Checkpoint
    from ckptstore.model import Finding as Finding
    from ckptstore.model import Level as Level
    from ckptstore.model import Part as Part
    from ckptstore.model import Status as Status
    from ckptstore.plan import Options as Options
    from ckptstore.plan import Plan as Plan
    from ckptstore.recovery import Outcome as Outcome
    from ckptstore.recovery import setup as setup
    from ckptstore.recovery import undo as undo
    from ckptstore.retention import Keep as Keep
    from ckptstore.saves.background import SaveHandle as SaveHandle
    from ckptstore.saves.background import wait_all as wait_all
    from ckptstore.schedule import SaveSchedule as SaveSchedule
    from ckptstore.store import CheckpointStore as CheckpointStore
    from ckptstore.verify import Report as Report

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckptstore' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
