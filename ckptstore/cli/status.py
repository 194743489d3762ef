"""`ckptstore status`: is the run halted, what is kept, which checkpoint is good, what do its metrics say."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from ckptstore import halt, health, importing, pins
from ckptstore import ledger as ledgers
from ckptstore import side as side_folders
from ckptstore.cli import condition
from ckptstore.cli.common import JSON, OVERRIDES, Verb, WhichOption, location_options
from ckptstore.cli.opening import open_run
from ckptstore.cli.render import age, done, echo, field, item, note, print_json, run_json
from ckptstore.errors import NotFoundError, UsageError
from ckptstore.health import Health
from ckptstore.ledger import Ledger, Writer
from ckptstore.listing import RESUMABLE, Listing, scan
from ckptstore.locate import Located, Where
from ckptstore.metric_names import match
from ckptstore.model import Checkpoint
from ckptstore.sizes import counted
from ckptstore.transfer import mirrored
from ckptstore.transfer.mirrored import Lag

_SHOWN = 6
_PLACES = {"adopted": " (adopted)", "slot": " (the slot)"}


@click.command("status", cls=Verb, short_help="Is it halted, what is pinned, what do the metrics say.")
@click.option("--reset", is_flag=True, help="Let training start again although the breaker tripped, from where it is.")
@click.option("--import", "imports", metavar="FILE", multiple=True, help="Metrics recorded elsewhere: JSONL, CSV, main.log.")
@click.option(
    "--axis",
    type=click.Choice(["auto", "global", "log"]),
    default="auto",
    show_default=True,
    help="What the imported steps count: global steps (from 0), or the log's (from 1).",
)
@click.option(
    "--pin", type=int, multiple=True, metavar="STEP", cls=WhichOption, help="Never prune the checkpoint of this step."
)
@click.option("--unpin", type=int, multiple=True, metavar="STEP", cls=WhichOption, help="It may be pruned again.")
@JSON
@location_options
@OVERRIDES
def command(
    where: Where,
    reset: bool,
    imports: tuple[str, ...],
    axis: str,
    pin: tuple[int, ...],
    unpin: tuple[int, ...],
    as_json: bool,
) -> None:
    """Show the state of a run: whether the circuit breaker halted it, pins, the last good checkpoint, the newest metrics."""
    changes = reset or imports or pin or unpin
    located, backend = open_run(where, as_json=as_json, read_only=not changes, steps_too=True)
    side = ledgers.side_of(located.run.path)
    listing = scan(backend)
    if changes:
        _change(side, listing, reset=reset, imports=imports, axis=axis, pin=pin, unpin=unpin, quiet=as_json)
    ledger = health.ledger_of(located.run.path)
    if as_json:
        print_json(_json(located, listing, side, ledger))
    else:
        _print(listing, side, ledger)


def _change(
    side: str,
    listing: Listing,
    *,
    reset: bool,
    imports: tuple[str, ...],
    axis: str,
    pin: tuple[int, ...],
    unpin: tuple[int, ...],
    quiet: bool,
) -> None:
    def tell(text: str) -> None:
        if not quiet:
            done(text)

    steps = {checkpoint.step for checkpoint in (*listing.checkpoints, *listing.adopted)}
    if strangers := [step for step in pin if step not in steps]:
        raise NotFoundError(f"no checkpoint of step {strangers[0]} to pin", hint="`ckptstore list` shows which there are.")
    side_folders.make_side(side)
    for path in imports:
        tell(_import(side, path, axis))
    for step in pin:
        pins.add(side, step, why="pinned by hand")
        tell(f"step {step} is pinned")
    for step in unpin:
        tell(f"step {step} is no longer pinned" if pins.remove(side, step) else f"step {step} was not pinned")
    if reset:
        trip = halt.reset(side)
        tell("the run was not halted" if trip is None else f"the trip at step {trip.step} is cleared: training may start")


def _import(side: str, path: str, axis: str) -> str:
    found = importing.read(path, axis=axis)
    writer = Writer(ledgers.path_in(side))
    ledger = ledgers.read(writer.path)
    fresh = importing.new_to(ledger, found.records)
    writer.records(fresh, imported_at_s=time.time())
    writer.sync()
    writer.close()
    if writer.lost is not None:
        raise UsageError(f"{writer.path} cannot be written: {writer.lost}")
    judged = [name for rule in ledger.judges.rules for name in rule.metrics]
    if not any(match(name, record.metrics) for record in found.records for name in judged):
        names = ", ".join(dict.fromkeys(judged))
        note(f"{path} holds nothing of what is judged ({names}): it tells nothing of health; `plot --metric` shows it")
    first, last = found.records[0].step, found.records[-1].step
    steps = "its steps are global steps" if found.axis == "global" else "its step N is global step N - 1"
    known = f", {len(found.records) - len(fresh)} of them known already" if len(fresh) < len(found.records) else ""
    passed = f", {found.passed_over} lines passed over" if found.passed_over else ""
    return (
        f"{os.path.basename(path)}: {counted(len(found.records), 'step')}{known}, global steps {first} to {last} "
        f"({found.kind}; {steps}{passed})"
    )


def _print(listing: Listing, side: str, ledger: Ledger) -> None:
    echo()
    trip = halt.read(side)
    if trip is None:
        field("breaker", "not tripped")
    else:
        when = f", {age(time.time() - trip.at_s)} ago" if trip.at_s else ""
        field("breaker", f"TRIPPED at {halt.both(trip.step, listing.run.path)}{when}: training does not start here")
        for text in (trip.saw, trip.diagnosis, f"post-mortem save: {trip.quarantine} ({trip.post_mortem})"):
            if text and (trip.quarantine or text in (trip.saw, trip.diagnosis)):
                item("·", text)
        item("→", trip.command + "   (--reset trains on as it is)" * (trip.command != halt.reset_command(trip.run)))
    good = _last_good(listing, ledger)
    if good is None:
        field("good", "no checkpoint is known to be good" if ledger else "unknown: no metrics are recorded (--import FILE)")
    else:
        field(
            "good", f"global step {good.step}{_PLACES.get(good.kind, '')} is the newest good one: {health.of(good, ledger).why}"
        )
    _print_checkpoints(listing, ledger)
    if (lag := _lag(listing, side)) is not None:
        _print_mirror(lag)
    for pin in pins.read(side):
        field("pinned", f"step {pin.step}: {pin.why}")
    _print_metrics(ledger, listing.run.path)


def _lag(listing: Listing, side: str) -> Lag | None:
    record = mirrored.read(side)
    return None if record is None else mirrored.lag(record, mirrored.finished(listing))


def _print_mirror(lag: Lag) -> None:
    safe = "nothing is safe there yet" if lag.newest_safe_step is None else f"step {lag.newest_safe_step} is safe there"
    behind = "" if lag.behind_steps is None else f", {counted(lag.behind_steps, 'step')}"
    waits = (
        f"; {lag.waiting} here are not, the oldest for {age(lag.behind_s)}{behind}" if lag.waiting else ", and all that is here"
    )
    looked = f" (as of {age(time.time() - lag.looked_at_s)} ago)" if lag.looked_at_s else ""
    field("mirror", f"{lag.url}: {safe}{waits}{looked}")
    if lag.problem:
        item("✗", lag.problem)


def _everything(listing: Listing) -> list[Checkpoint]:
    """All that one could resume from, the slot too where its step is known."""
    slot = [listing.slot] if listing.slot is not None and listing.slot.step >= 0 and listing.slot.format in RESUMABLE else []
    return sorted((*listing.checkpoints, *listing.adopted, *slot), key=lambda checkpoint: checkpoint.step)


def _last_good(listing: Listing, ledger: Ledger) -> Checkpoint | None:
    usable = [checkpoint for checkpoint in _everything(listing) if checkpoint.status.usable and not checkpoint.left]
    healthy = [checkpoint for checkpoint in usable if health.of(checkpoint, ledger).health is Health.GOOD]
    return max(healthy, key=lambda checkpoint: checkpoint.step, default=None)


def _print_checkpoints(listing: Listing, ledger: Ledger) -> None:
    if not ledger:
        return
    verdicts = [(checkpoint, health.of(checkpoint, ledger)) for checkpoint in _everything(listing)]
    wrong = [(checkpoint, verdict) for checkpoint, verdict in verdicts if not verdict.health.resumable]
    for checkpoint, verdict in wrong[:_SHOWN]:
        field(str(verdict.health), f"step {checkpoint.step}{_PLACES.get(checkpoint.kind, '')}: {verdict.why}")
    if len(wrong) > _SHOWN:
        field("", f"and {len(wrong) - _SHOWN} more (`ckptstore list`)")


def _print_metrics(ledger: Ledger, run: str) -> None:
    line = ledger.line()
    if not line:
        return
    newest = line[-1]
    when = f", {age(time.time() - newest.at_s)} ago" if newest.at_s else ""
    told = ", of the trainer's log" if ledger.logged else ""
    field("metrics", f"{counted(len(line), 'step')}{told}, the newest is {halt.both(newest.step, run)}{when}")
    for key in sorted(newest.metrics)[:_SHOWN]:
        history = [condition.metric(record.metrics[key]) for record in line[-5:] if key in record.metrics]
        field("", f"{key}: {' '.join(history)}")
    if len(newest.metrics) > _SHOWN:
        field("", f"and {len(newest.metrics) - _SHOWN} more")
    for rule in ledger.judges.rules:
        subject = rule.said if rule.metric == "-" else f"{rule.metric} {rule.said}"
        field("rule", f"bad is: {subject}; {rule.patience} such steps in a row trip the breaker")
    if ledger.damaged_lines:
        note(f"{ledger.damaged_lines} lines of the ledger cannot be understood, and are passed over")


def _json(located: Located, listing: Listing, side: str, ledger: Ledger) -> dict[str, Any]:
    trip = halt.read(side)
    line = ledger.line()
    good = _last_good(listing, ledger)
    lag = _lag(listing, side)
    return {
        "run": run_json(located),
        "tripped": trip is not None,
        "trip": None
        if trip is None
        else {
            "step": trip.step,
            "since_step": trip.since_step,
            "saw": trip.saw,
            "diagnosis": trip.diagnosis,
            "last_good_step": trip.last_good_step,
            "command": trip.command,
            "quarantine": trip.quarantine,
            "post_mortem": trip.post_mortem,
            "at": trip.at_s,
        },
        "pins": [{"step": pin.step, "path": pin.path, "why": pin.why, "at": pin.at_s} for pin in pins.read(side)],
        "mirror": None if lag is None else _mirror_json(lag),
        "last_good_step": None if good is None else good.step,
        "checkpoints": [
            _checkpoint_json(checkpoint, ledger)
            for checkpoint in sorted(
                (*listing.checkpoints, *listing.adopted), key=lambda one: (one.step, one.kind == "adopted")
            )
        ],
        "slot": None if listing.slot is None else _checkpoint_json(listing.slot, ledger),
        "metrics": {
            "steps": len(line),
            "newest_step": line[-1].step if line else None,
            "newest": {key: value if abs(value) < float("inf") else str(value) for key, value in line[-1].metrics.items()}
            if line
            else {},
            "damaged_lines": ledger.damaged_lines,
        },
    }


def _checkpoint_json(checkpoint: Checkpoint, ledger: Ledger) -> dict[str, Any]:
    told = {"kind": checkpoint.kind, "step": checkpoint.step, "status": str(checkpoint.status)}
    return told | condition.verdict_json(health.of(checkpoint, ledger))


def _mirror_json(lag: Lag) -> dict[str, Any]:
    return {
        "url": lag.url,
        "newest_local_step": lag.newest_local_step,
        "newest_safe_step": lag.newest_safe_step,
        "waiting": lag.waiting,
        "behind_steps": lag.behind_steps,
        "behind_seconds": round(lag.behind_s, 3),
        "looked_at": lag.looked_at_s,
        "problem": lag.problem,
    }
