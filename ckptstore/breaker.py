"""The circuit breaker: stops training that has gone bad, and keeps a launcher from starting it again.

    breaker = CircuitBreaker(run)          # first thing: raises TrainingHalted where the run was halted before
    ...
    breaker.observe(stats, global_step)    # once a training step

On a trip, in this order: the ledger is synced; the TRIPPED record is written, durable; the last good checkpoint is pinned; the
caller's own function saves a post-mortem into quarantine, never over the slot; TrainingHalted is raised. A kill at any
moment in between leaves the record, so nothing resumes into poison.

Its memory survives a restart in the ledger: what led up to the first step that is observed is judged anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any, Literal

from ckptstore import halt, health, pins, tripping
from ckptstore import ledger as ledgers
from ckptstore import side as side_folders
from ckptstore.breaker_config import BreakerConfig, block_of, run_of
from ckptstore.config import RunConfig, load
from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.halt import Trip, both
from ckptstore.ledger import Judges, Ledger, Writer
from ckptstore.metric_names import match
from ckptstore.ranks import Alone, own_rank, together
from ckptstore.rules import LOST, Arm, NonFinite, Rule, Sign, server_rule
from ckptstore.stats import Stats, StatsReader, dicts_of
from ckptstore.streak import Watch

log = logging.getLogger(__name__)

Save = Callable[[str], object]
"""Saves the model into the folder that it is given. Called on every rank that observes."""
Reduce = Literal["same", "any", "mean"]

UNARMED_STEPS = 100  #: so long may a metric be bad from the start before that is said
SILENT_STEPS = 10  #: so long may a metric be missing


class CircuitBreaker:
    """Watches one run. Not thread-safe: one thread observes.

    `run` is the run's own folder; without it nothing is recorded, and no later start is kept from training.
    `save` is called on a trip. `record` names metrics to keep in the ledger beside those of the rules.
    `server_alive` is asked on a trip, to tell a dead inference server from a bad policy.

    `reduce` says what the ranks of a torch.distributed training have to agree on (in `group`, None: all of them):
    None    nothing, no collective ever: this process decides. Right for one process, for rank 0 alone, and wherever all ranks
            see the same numbers (AReaL's are reduced already): then all raise at the same step.
    "same"  all ranks see the same numbers and share rank 0's memory; they meet when constructing, at the first step, and when
            tripping, so that none leaves before the post-mortem save is done everywhere. No collective at any other step.
    "any"   ranks see different numbers, or only some see any: one all-reduce a step, and all stop where one trips.
    "mean"  as "any", but the mean over the ranks that have the metric is judged.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        threshold: int | None = None,
        metric: str | None = None,
        arm: Arm | str | None = None,
        rules: Iterable[Rule] | None = None,
        alive: Iterable[str] | None = None,
        record: Iterable[str] = (),
        enabled: bool | None = None,
        save: Save | None = None,
        server_alive: Callable[[], bool] | None = None,
        reduce: Reduce | None = None,
        group: Any = None,
        settings: BreakerConfig | None = None,
    ) -> None:
        given = BreakerConfig(
            enabled, threshold, metric, arm, None if rules is None else tuple(rules), None if alive is None else tuple(alive)
        )
        settings = BreakerConfig.of_environment().over(given.over(settings or BreakerConfig()))
        if reduce not in (None, "same", "any", "mean"):
            raise UsageError(f"reduce is {reduce!r}, and must be None, 'same', 'any' or 'mean'")
        if run is not None and "://" in os.fspath(run):
            raise UsageError(f"{run} is a URL: a breaker records beside the trainer", hint="Name a folder of this machine.")
        self.run = "" if run is None else os.path.abspath(run)
        self.enabled = settings.is_enabled
        self._judges = Judges(settings.make_rules(), settings.alive_metrics)
        self._watches = [Watch(rule) for rule in self._judges.rules]
        self._server = [Watch(server_rule(name)) for name in self._judges.alive]
        asked = [rule for rule in self._judges.rules if rule is not LOST]
        others = [LOST.metric] * (len(asked) < len(self._judges.rules))
        wanted = (name for rule in asked for name in rule.metrics)
        self._read = StatsReader(wanted, (*others, *self._judges.alive, *record))
        self._save, self._server_alive, self._reduce = save, server_alive, reduce
        self._trip: Trip | None = None
        self._started = False
        self._loaded = False
        self._warned: set[str] = set()
        self._observed = 0
        self._trips_before = 0
        self._writer: Writer | None = None
        if not self.enabled:
            log.warning("the circuit breaker is off: nothing watches %s", self.run or "this training")
            return
        self._ranks = together(group) if reduce else Alone(own_rank(group))
        self._refuse_halted()
        if self._side and self._ranks.rank == 0:
            self._open_ledger()

    @classmethod
    def from_config(
        cls, config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig, *, run: str = "", **options: Any
    ) -> CircuitBreaker:
        """A breaker set by a trainer's configuration (a YAML's path, or what is in it) and its `circuit_breaker:` block.

        The run's folder follows from cluster.fileroot, experiment_name and trial_name, and the current user, unless given.
        """
        if isinstance(config, (str, os.PathLike)):
            config = load(os.fspath(config))
        elif isinstance(config, Mapping):
            config = RunConfig("", config)
        settings = BreakerConfig.of_block(block_of(config))
        return cls(run or run_of(config), settings=settings, **options)

    def observe(self, stats: Stats, step: int) -> None:
        """Take in the metrics of global step `step` (0-based). TrainingHalted once they have been bad for too long.

        Values may be numbers, numpy scalars or tensors of one element. Once halted, every further call raises again.
        """
        if self._trip is not None:
            raise self._trip.error()
        if not self.enabled:
            return
        step = index(step)  # numpy's integers too
        if not self._started:
            self._start(step)
        found = self._read(stats)
        if self._reduce == "mean":
            means = self._ranks.mean([found.get(name) for name in self._read.names])
            found = {name: value for name, value in zip(self._read.names, means, strict=True) if value is not None}
        if self._writer is not None and found:
            self._writer.record(step, time.time(), {self._read.keys.get(name, name): value for name, value in found.items()})
            if self._writer.lost is not None:
                self._not_recorded(self._writer)
        get = found.get
        for watch in self._server:
            watch.look(get, step)
        tripped = None
        for watch in self._watches:
            if watch.look(get, step) is not Sign.GOOD and tripped is None and watch.tripped:
                tripped = watch
        self._observed += 1
        if self._reduce in ("any", "mean"):
            if self._ranks.any(tripped is not None):
                self._halt(tripped, step)
        elif tripped is not None:
            self._halt(tripped, step)
        elif self._observed >= UNARMED_STEPS or self._watches[0].silent or self._watches[0].nonfinite >= SILENT_STEPS:
            self._warn_of_silence(stats, step)

    @property
    def streak(self) -> int:
        """Bad steps in a row at present, by the rule that is closest to its patience."""
        return max(self._watches, key=lambda watch: watch.streak / watch.patience).streak

    @property
    def armed(self) -> bool:
        """Whether bad steps count by now, for every rule."""
        return all(watch.armed for watch in self._watches)

    @property
    def tripped(self) -> bool:
        """Whether it has halted the training."""
        return self._trip is not None

    def state_dict(self) -> dict[str, Any]:
        """Its memory, of JSON types, to be kept in a checkpoint. Not needed where the ledger survives."""
        return {"version": 1, "watches": [watch.state() for watch in (*self._watches, *self._server)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a memory, instead of what the ledger says. States of rules that it has not are ignored."""
        self._loaded = True
        for watch in (*self._watches, *self._server):
            for saved in state.get("watches", ()):
                if watch.load(saved):
                    break

    @property
    def _side(self) -> str:
        # Looked up each time: the first save into a folder makes it a store of steps, and takes what is recorded into it.
        return ledgers.side_of(self.run) if self.run else ""

    # --- starting ------------------------------------------------------------------------------------------------------

    def _refuse_halted(self) -> None:
        trip = halt.read(self._side) if self._side else None
        if self._reduce and self._ranks.any(trip is not None) and trip is None:
            trip = Trip(saw="another rank found the run halted", command=halt.recovery_command(self.run, -1))
        if trip is not None:
            raise trip.error(again=True)

    def _open_ledger(self) -> None:
        try:
            os.makedirs(os.path.dirname(self.run), exist_ok=True)  # the trainer makes it later, and the side folder is in it
            side_folders.make_side(self._side)
        except (CkptStoreError, OSError) as error:
            log.error("the breaker cannot record anything in %s: %s", self._side, error)
            return
        self._writer = Writer(ledgers.path_in(self._side))
        try:  # what was trained before somebody added it, or while it was taken away: from here on nobody looks into the log
            health.keep_log(self.run)
        except (CkptStoreError, OSError) as error:
            log.warning("the metrics of the trainer's log could not be recorded: %s", error)

    def _not_recorded(self, writer: Writer) -> None:
        self._warn(
            "not recorded",
            f"the metrics cannot be recorded in {writer.path}: {writer.lost}. Training goes on; the health of checkpoints from "
            "here on will not be known, until it can be written again",
        )
        writer.path = ledgers.path_in(self._side)

    def _start(self, step: int) -> None:
        """Before the first step: judge anew what led to it."""
        self._started = True
        ledger = self._ledger()
        self._trips_before = sum(event.name == "trip" for event in ledger.events)
        if not self._loaded:
            self._recall(ledger, step)
        if self._reduce:
            self.load_state_dict(json.loads(self._ranks.from_first(json.dumps(self.state_dict()).encode())))
        if self._writer is not None and (ledger.judges is ledgers.DEFAULT_JUDGES or ledger.judges != self._judges):
            self._writer.judges(self._judges, time.time())

    def _recall(self, ledger: Ledger, step: int) -> None:
        watches = (*self._watches, *self._server)
        read, forgiven = health.Reader(), 0

        def forgive(resets: int) -> None:
            nonlocal forgiven
            if resets > forgiven:  # somebody has said to go on
                forgiven = resets
                for watch in watches:
                    watch.forgive()

        for record in ledger.line(before_step=step):
            forgive(record.resets)
            read.metrics = dict(record.metrics)
            for watch in watches:
                watch.look(read, record.step)
        forgive(sum(event.name == ledgers.RESET for event in ledger.events))

    def _ledger(self) -> Ledger:
        if not self._side:
            return Ledger()
        try:
            return ledgers.read(ledgers.path_in(self._side))
        except CkptStoreError as error:
            log.error("the breaker starts without its memory: %s", error)
            return Ledger()

    # --- one step ------------------------------------------------------------------------------------------------------

    def _warn_of_silence(self, stats: Stats, step: int) -> None:
        dicts = dicts_of(stats)
        for watch in self._watches:
            name = watch.rule.metric
            if watch.rule is LOST and not watch.steps:
                continue  # nobody has asked for it
            if watch.steps == 0 and watch.silent >= SILENT_STEPS:
                found = [(key, metrics[key]) for metrics in dicts if (key := match(name, metrics)) is not None]
                seen = sorted({str(key) for metrics in dicts for key in metrics})
                there = f"{found[0][0]} is there, as {found[0][1]!r:.40}, which is no number" if found else ""
                there = there or f"there are {', '.join(seen[:20]) or 'none'}"
                self._warn(f"never {name}", f"no metric {name} in {watch.silent} steps: the breaker watches nothing; {there}")
            elif not watch.armed and watch.nonfinite >= SILENT_STEPS:
                text = f"{name} {NonFinite.saw} from the start, for {watch.nonfinite} steps"
                self._warn(f"never finite {name}", f"{text}: after {watch.patience} training is halted")
            elif not watch.armed and watch.steps >= UNARMED_STEPS:
                value = self._read.value(name, dicts)
                said = watch.rule.said if value is None or math.isfinite(value) else NonFinite.saw
                text = f"{name} {said} from the start, for {watch.steps} steps: a broken dataset or reward looks like "
                self._warn(
                    f"unarmed {name}", text + "that; the breaker counts from the first good step on (arm='always': at once)"
                )
            elif watch.steps and watch.silent == SILENT_STEPS:
                self._warn(
                    f"silent {name} {step}", f"{name} has been missing for {SILENT_STEPS} steps, up to {both(step, self.run)}"
                )

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s", text)

    # --- tripping ------------------------------------------------------------------------------------------------------

    def _halt(self, watch: Watch | None, step: int) -> None:
        diagnosis = tripping.diagnose(self._server, self._read.keys, self._server_alive)
        trip = tripping.describe(step, watch, run=self.run, keys=self._read.keys, diagnosis=diagnosis, ledger=self._ledger())
        self._trip = trip
        if watch is not None:
            self._keep(trip)
        if self._reduce in ("any", "mean"):
            self._ranks.any(False)  # those that know why have written the record by now
            if watch is None:
                self._keep(trip)
        log.critical("%s", trip.error())
        if self._save is None:
            if self._reduce:
                self._ranks.any(False)
            raise trip.error()
        self._post_mortem(self._save, self._quarantine(step), trip)
        raise self._trip.error()

    def _post_mortem(self, save: Save, folder: str, trip: Trip) -> None:
        self._note(folder, "saving")
        how = "interrupted"
        try:
            save(folder)
            how = "saved"
        except Exception as error:
            how = f"failed: {error!r:.200}"
            raise trip.error() from error  # the save was a courtesy: the halt is what matters
        finally:
            if self._reduce and how != "interrupted":
                self._ranks.any(False)  # a rank that left now would have the launcher kill those that still save
            self._note(folder, how)
            self._trip = halt.with_post_mortem(trip, folder, how)

    def _keep(self, trip: Trip) -> None:
        """Make the trip durable, and pin what is needed to recover. Nothing here keeps training from being halted."""
        if not self._side:
            return
        try:
            if self._writer is not None:
                self._writer.event("trip", trip.step, trip.at_s, since_step=trip.since_step)
                self._writer.sync()
            side_folders.make_side(self._side)
            halt.write_first(self._side, trip)
            if trip.last_good_step >= 0:
                why = f"last good before the trip at step {trip.step}"
                pins.add(self._side, trip.last_good_step, path=trip.last_good_path, why=why)
        except (CkptStoreError, OSError) as error:
            log.critical("the TRIPPED record could not be written, so a launcher may start this run again: %s", error)

    def _quarantine(self, step: int) -> str:
        place = self._side or os.path.join(os.getcwd(), "ckptstore-quarantine")
        again = f"-{self._trips_before + 1}" if self._trips_before else ""
        folder = os.path.join(place, "quarantine", f"globalstep{step}{again}")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            log.error("%s cannot be made: %s", folder, error)
        return folder

    def _note(self, folder: str, how: str) -> None:
        """Complete the record with what became of the post-mortem save; who wrote it may have been another rank."""
        if not self._side or self._ranks.rank != 0:
            return
        try:
            trip = halt.read(self._side)
            if trip is not None:
                halt.rewrite(self._side, halt.with_post_mortem(trip, folder, how))
        except (CkptStoreError, OSError) as error:
            log.error("the TRIPPED record could not be completed: %s", error)
