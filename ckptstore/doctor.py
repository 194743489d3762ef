"""The doctor: looks at a run before it trains or recovers, and says what would go wrong. Changes nothing.

disk       fileroot, kind of disk, user, permissions, space, clock
run        halted or interrupted, what is whole, the slot against recover_info, ranks, stray folders
training   recover and saver settings, what a crash would cost, the logs
saving     how often to save

Of a store of steps: the disk, what is whole, and what is left of saves that were cut.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from ckptstore.backends.local import LocalBackend
from ckptstore.checks import Diagnosis, Patient, Severity, bad, disk, run, saving, training
from ckptstore.config import RunConfig
from ckptstore.errors import CkptStoreError
from ckptstore.frameworks.areal.launch import Installation, logged_config
from ckptstore.frameworks.areal.layout import RunRef
from ckptstore.listing import scan

CHECKS = (*disk.ALL, *run.ALL, *training.ALL, *saving.ALL)
CHECKS_OF_STEPS = (*disk.OF_STEPS, *run.OF_STEPS)  #: a store of steps has no slot, and no settings that we know
_UNKNOWN = Installation("", "", "", "not looked for")


def examine(
    ref: RunRef,
    *,
    config: RunConfig | None = None,
    installation: Installation = _UNKNOWN,
    saves: int = 3,
    world_size: int = 0,
    now_s: float | None = None,
) -> tuple[Diagnosis, ...]:
    """Every check on the run at `ref`, which need not exist yet. Never raises for what it finds, unreadable places included.

    Without `config` the YAML that the trainer kept with its logs is taken. `saves`: room for so many more must be there.
    """
    found: list[Diagnosis] = []
    listing = None
    if os.path.isdir(ref.path):
        try:
            listing = scan(LocalBackend(ref.path))
        except (CkptStoreError, OSError) as error:
            found.append(_unreadable("run", error))
    patient = Patient(
        run=ref,
        config=config or logged_config(ref),
        listing=listing,
        installation=installation,
        now_s=time.time() if now_s is None else now_s,
        saves=saves,
        said_world_size=world_size,
    )
    for check in CHECKS_OF_STEPS if patient.of_steps else CHECKS:
        try:
            found.extend(check(patient))
        except (CkptStoreError, OSError) as error:
            found.append(_unreadable(check.__name__.replace("_", "-"), error))
    return tuple(found)


def _unreadable(check: str, error: CkptStoreError | OSError) -> Diagnosis:
    hint = error.hint if isinstance(error, CkptStoreError) else ""
    return bad(check, f"could not be looked at: {error}", hint or "Run as the user that trains.")


def worst(diagnoses: Sequence[Diagnosis]) -> Severity:
    """The worst severity among them; OK for none."""
    order = tuple(Severity)
    return max((diagnosis.severity for diagnosis in diagnoses), key=order.index, default=Severity.OK)


def exit_code(diagnoses: Sequence[Diagnosis]) -> int:
    """0 fine, or with warnings only; 1 something is bad; 3 bytes are damaged."""
    if any(diagnosis.damage for diagnosis in diagnoses):
        return 3
    return 1 if worst(diagnoses) is Severity.BAD else 0
