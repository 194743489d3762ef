"""The TRIPPED record: as long as it lies in a run's side folder, training there does not start.

Launchers start a dead trainer again, whatever its exit code. So the record comes first on a trip, durable, before the
post-mortem save; whichever rank is first writes it. It is cleared by a successful `setup`, or by `ckptstore status --reset`.
A record that cannot be read still halts: it was written for a reason.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ckptstore import places
from ckptstore import side as side_folders
from ckptstore.errors import TrainingHalted, from_os_error
from ckptstore.places import ledger_in
from ckptstore.places import trip_in as path_in
from ckptstore.untrusted import OUT_OF_RANGE, open_regular

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Trip:
    """Why training was stopped. Steps are global steps, -1 where unknown; times Unix seconds."""

    run: str = ""
    step: int = -1
    since_step: int = -1
    saw: str = ""  #: what was seen, as a sentence without its full stop
    diagnosis: str = ""  #: server dead or policy bad, as far as anything tells
    rule: Mapping[str, Any] | None = None
    last_good_step: int = -1
    last_good_path: str = ""
    command: str = ""  #: what recovers
    quarantine: str = ""  #: folder of the post-mortem save
    post_mortem: str = "none"  #: none, saving, saved, or "failed: …"
    at_s: float = 0.0
    host: str = ""
    pid: int = 0

    def error(self, *, again: bool = False) -> TrainingHalted:
        """The error that stops training; `again`: a later start runs into the record."""
        lines = [f"{self.saw}." if self.saw else "The record of it cannot be read."]
        if self.diagnosis:
            lines.append(f"{self.diagnosis}.")
        if self.last_good_step >= 0:
            lines.append(f"Last good checkpoint: {both(self.last_good_step, self.run)}, {self.last_good_path} (pinned).")
        elif self.run:
            lines.append("No good checkpoint is left: `ckptstore list` shows what there is.")
        if self.quarantine:
            lines.append(f"Post-mortem save: {self.quarantine} ({self.post_mortem}).")
        when = f"at {both(self.step, self.run)}" if self.step >= 0 else "at an unknown step"
        if again:
            lines.append(
                "Nothing was trained now: a TRIPPED record keeps the run from starting until it is recovered or reset."
            )
        head = f"training was halted {when} before this start" if again else f"training is halted {when}"
        reset = reset_command(self.run) if self.run else ""
        if self.command == reset and reset:  # a store of steps: what was saved is loaded by the training itself
            lines.append(f"To recover:  {reset}")
            there = f"go on from step {self.last_good_step}" if self.last_good_step >= 0 else "start anew"
            lines.append(f"and {there}: `ckptstore.torch.load(store)` and `store.resume_point()` skip bad steps.")
        else:
            lines.append(f"To recover:  {self.command}")
            lines += [f"To train on as it is:  {reset}"] * bool(reset)
        return TrainingHalted(
            "\n  ".join([f"{head}:", *lines]),
            hint=self.command + f"   (or `{reset}` to train on as it is)" * (reset not in ("", self.command)),
            step=self.step,
            since_step=self.since_step,
            last_good_step=self.last_good_step,
            command=self.command,
        )


def both(step: int, run: str = "") -> str:
    """A step by both of its numbers: the checkpoint's, and the trainer's log's. How a store's trainer counts is not known."""
    return f"step {step}" if run and places.is_store(run) else f"global step {step} (Train step {step + 1} of the log)"


def recovery_command(run: str, last_good_step: int) -> str:
    """What to type to recover a halted run."""
    if places.is_store(run):
        return reset_command(run)
    if last_good_step < 0:
        return f"python -m ckptstore.recover list --run {shlex.quote(run)}"
    return f"python -m ckptstore.recover resume --run {shlex.quote(run)} --max-step {last_good_step}"


def reset_command(run: str) -> str:
    """What to type to have training start again although it was halted."""
    return f"python -m ckptstore.recover status --reset --run {shlex.quote(run)}"


def read(side: str) -> Trip | None:
    """The record of a run, None where it is not halted. AccessError or StorageError where that cannot be told."""
    try:
        with open_regular(path_in(side)) as file:
            data = file.read(MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, doing="reading", path=path_in(side)) from error
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        return Trip(saw=f"{path_in(side)} is damaged", command="ckptstore status")
    blank = Trip()
    known: dict[str, Any] = {}
    for item in fields(Trip):
        value, usual = document.get(item.name), getattr(blank, item.name)
        kinds = (dict,) if usual is None else (int, float) if isinstance(usual, float) else (type(usual),)
        if type(value) in kinds and not (isinstance(value, (int, float)) and not abs(value) < OUT_OF_RANGE):
            known[item.name] = value
    return Trip(**known)


def write_first(side: str, trip: Trip) -> bool:
    """Write the record, durable, unless there is one already; whether it was this one. OSError as it comes."""
    draft = _draft(side, trip)
    try:
        try:
            os.link(draft, path_in(side))  # fails where a record is there: two ranks trip at once
        except FileExistsError:
            return False
        except OSError:  # no hard links on this file system
            if os.path.lexists(path_in(side)):
                return False
            os.rename(draft, path_in(side))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
    side_folders.sync_folder(side)
    return True


def rewrite(side: str, trip: Trip) -> None:
    """Replace the record, durable. OSError as it comes."""
    os.replace(_draft(side, trip), path_in(side))
    side_folders.sync_folder(side)


def _draft(side: str, trip: Trip) -> str:
    draft = os.path.join(side, f"{os.path.basename(path_in(side))}.{secrets.token_hex(4)}")
    side_folders.write_durably(draft, json.dumps(asdict(trip), indent=2).encode() + b"\n")
    side_folders.like(draft, os.stat(side), mode=0o644)
    return draft


def clear(side: str) -> Trip | None:
    """Remove the record: training may start. What it said, None where there was none."""
    trip = read(side)
    if trip is None:
        return None
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path_in(side))
        side_folders.sync_folder(side)
    except OSError as error:
        raise from_os_error(error, doing="removing", path=path_in(side)) from error
    return trip


def reset(side: str) -> Trip | None:
    """Let training start again: remove the record, and note in the ledger that what went before is forgiven."""
    trip = clear(side)
    if trip is not None:
        from ckptstore.ledger import RESET, Writer  # only now: all verbs look for the record, and hardly any finds one

        writer = Writer(ledger_in(side))
        writer.event(RESET, trip.step, time.time(), since_step=trip.since_step)
        writer.sync()
        writer.close()
        if writer.lost is not None:
            log.warning("%s: the reset cannot be noted (%s), and bad steps go on counting", writer.path, writer.lost)
    return trip


def with_post_mortem(trip: Trip, quarantine: str, how: str) -> Trip:
    """The same trip, with what became of its post-mortem save."""
    return replace(trip, quarantine=quarantine, post_mortem=how)
