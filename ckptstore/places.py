"""Where the breaker's and the ledger's files of a run lie: known without importing what reads them, which takes time."""

from __future__ import annotations

import os

from ckptstore import side as side_folders
from ckptstore.frameworks.areal import layout

#: What a breaker and those who ask after it keep in a side folder.
OF_BREAKER = {"metrics.jsonl", "TRIPPED.json", "pins.json", "quarantine"}


def side_of(run: str) -> str:
    """The side folder of a run given by its own folder, which may be missing yet."""
    if not os.path.isdir(os.path.dirname(run)):
        return os.path.join(os.path.dirname(run), layout.SIDE, os.path.basename(run))
    return side_folders.side_folder(run, os.path.join(run, layout.MAIN_PART, layout.SLOT))


def is_store(run: str) -> bool:
    """Whether a run's folder is a store of steps, with its side folder inside: no AReaL run has one there."""
    return os.path.isdir(os.path.join(run, layout.SIDE))


def ledger_in(side: str) -> str:
    """The ledger in a run's side folder."""
    return os.path.join(side, "metrics.jsonl")


def trip_in(side: str) -> str:
    """The TRIPPED record in a run's side folder."""
    return os.path.join(side, "TRIPPED.json")


def has_metrics(run: str) -> bool:
    """Whether a run may have metrics: a ledger, or the trainer's log. What cannot be looked at counts: reading will say why."""
    if "://" in run:  # in an object store: ledger and log stay beside the trainer
        return False
    logs = layout.run_ref(run).logs
    return os.path.lexists(ledger_in(side_of(run))) or (bool(logs) and os.path.isfile(os.path.join(logs, layout.MAIN_LOG)))
