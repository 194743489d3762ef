"""Where the breaker's and the ledger's files of a run lie: known without importing what reads them, which takes time."""

from __future__ import annotations

import os

from ckptstore import side as side_folders
from ckptstore.frameworks.areal import layout


def side_of(run: str) -> str:
    """The side folder of a run given by its own folder, which may be missing yet."""
    if not os.path.isdir(os.path.dirname(run)):
        return os.path.join(os.path.dirname(run), layout.SIDE, os.path.basename(run))
    return side_folders.side_folder(run, os.path.join(run, layout.MAIN_PART, layout.SLOT))


def ledger_in(side: str) -> str:
    """The ledger in a run's side folder."""
    return os.path.join(side, "metrics.jsonl")


def trip_in(side: str) -> str:
    """The TRIPPED record in a run's side folder."""
    return os.path.join(side, "TRIPPED.json")


def has_ledger(run: str) -> bool:
    """Whether metrics were recorded of a run. One that cannot be looked at counts: reading it will say why."""
    if "://" in run:  # in an object store: the ledger stays beside the trainer
        return False
    return os.path.lexists(ledger_in(side_of(run)))
