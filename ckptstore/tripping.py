"""What a trip is about, in words and numbers: what was seen, who is to blame, and what to resume from."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from ckptstore import halt, health
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, NotFoundError
from ckptstore.halt import Trip, both
from ckptstore.ledger import Ledger
from ckptstore.listing import scan
from ckptstore.model import Checkpoint
from ckptstore.streak import Watch

log = logging.getLogger(__name__)

Keys = Mapping[str, str]
"""Under which key each metric was found."""


def describe(step: int, watch: Watch | None, *, run: str, keys: Keys, diagnosis: str, ledger: Ledger) -> Trip:
    """The trip of `watch` at `step`; None: another rank's. Looks at the run's checkpoints; never raises for what it finds."""
    since = step if watch is None else watch.since
    good = _last_good(run, ledger, since) if run else None
    good_step = -1 if good is None else good.step
    if good is not None and (fallen := health.of(good, ledger).fallen):
        low = f"The reward had fallen before, slowly: at the last good checkpoint, {fallen}"
        diagnosis = f"{diagnosis}. {low}" if diagnosis else low
    return Trip(
        run=run,
        step=step,
        since_step=since,
        saw="another rank's metrics went bad" if watch is None else _saw(watch, keys, run),
        diagnosis=diagnosis,
        rule=None if watch is None else watch.rule.spec(),
        last_good_step=good_step,
        last_good_path="" if good is None else os.path.relpath(good.parts[0].path, run),
        command=halt.recovery_command(run, good_step) if run else "resume from your last good checkpoint",
        at_s=round(time.time(), 3),
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def _saw(watch: Watch, keys: Keys, run: str) -> str:
    key = keys.get(watch.rule.metric, watch.rule.metric)
    subject = watch.said if key == "-" else f"{key} {watch.said}"
    before = f" (before, it was {watch.last_good:.4g})" if watch.last_good is not None else ""
    return f"{subject} for {watch.streak} step{'s in a row' * (watch.streak > 1)}, since {both(watch.since, run)}{before}"


def _last_good(run: str, ledger: Ledger, since: int) -> Checkpoint | None:
    try:
        listing = scan(LocalBackend(run))
    except NotFoundError:  # nothing has been saved yet
        return None
    except (CkptStoreError, OSError) as error:
        log.error("the checkpoints of %s cannot be listed: %s", run, error)
        return None
    slot = [listing.slot] if listing.slot is not None else []
    return health.last_good([*listing.checkpoints, *slot, *listing.adopted], ledger, before_step=since)


def diagnose(server: Sequence[Watch], keys: Keys, ask: Callable[[], bool] | None) -> str:
    """Whether the inference server is dead or the policy bad, as far as the aliveness metrics and the caller's probe tell."""
    names = [keys.get(watch.rule.metrics[0], watch.rule.metrics[0]) for watch in server]
    dead = [f"{name} fell at step {watch.since}" for watch, name in zip(server, names, strict=True) if watch.streak]
    alive = [name for watch, name in zip(server, names, strict=True) if watch.steps and not watch.streak and not watch.silent]
    if ask is not None:
        try:
            answer = bool(ask())
            (alive if answer else dead).append("asked just now")
        except Exception as error:  # noqa: BLE001 - whatever a probe fails with is its answer
            dead.append(f"asked just now: {error!r:.100}")
    if dead:
        return f"The inference server looks dead ({'; '.join(dead)}): the weights may be fine"
    if alive:
        return f"The inference server looks alive ({', '.join(alive)}): the policy, the reward or the data went bad"
    return ""
