"""`ckptstore seal`: write a manifest for what the trainer wrote, so that later damage is found."""

from __future__ import annotations

from typing import NamedTuple

import click

from ckptstore.backends import Backend
from ckptstore.cli.common import JSON, LOG_STEP, Verb, WhichOption, location_options, read_words
from ckptstore.cli.opening import open_run, pick
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import echo, item, print_json
from ckptstore.errors import CkptStoreError, NothingToResumeError, UsageError
from ckptstore.listing import scan
from ckptstore.locate import Where
from ckptstore.model import Checkpoint, Status
from ckptstore.native import Progress as Tell
from ckptstore.seal import seal
from ckptstore.sizes import size

_MARKS = {
    "sealed": ("●", "green"),
    "already sealed": ("●", "green"),
    "would be sealed": ("○", "cyan"),
    "skipped": ("◐", "yellow"),
}


class _Result(NamedTuple):
    checkpoint: Checkpoint
    result: str  #: sealed, already sealed, would be sealed, skipped (was not whole anyway) or failed
    reason: str = ""
    manifest_sha256: tuple[str, ...] = ()
    exit_code: int = 0


@click.command("seal", cls=Verb, short_help="Write a manifest for what the trainer wrote.")
@click.option("--all", "everything", is_flag=True, cls=WhichOption, help="Every checkpoint that is whole and not sealed yet.")
@LOG_STEP
@click.option("--dry-run", is_flag=True, help="Only say what would be sealed.")
@JSON
@location_options
@click.argument("words", nargs=-1, metavar="[STEP]... [KEY=VALUE]...")
def command(
    where: Where, everything: bool, log_steps: tuple[int, ...], dry_run: bool, as_json: bool, words: tuple[str, ...]
) -> int:
    """Digest every file of a checkpoint and record it in a manifest beside them. The files are not touched.

    Seal what is still good: from then on `verify` finds every changed bit, and `setup` checks it while it copies.
    """
    where, steps = read_words(where, words, log_steps)
    if bool(steps) == everything:
        raise UsageError("name the steps to seal, or say --all", hint="`ckptstore list` shows which there are.")
    _, backend = open_run(where, as_json=as_json, read_only=dry_run)
    listing = scan(backend)
    if everything and not listing.checkpoints:
        raise NothingToResumeError(f"there is no checkpoint in {listing.run.path}", hint="`ckptstore list` says what is there.")
    chosen = list(listing.checkpoints) if everything else pick(listing, steps)
    total = sum(checkpoint.size_bytes for checkpoint in chosen)
    results: list[_Result] = []
    with Progress(quiet=as_json) as progress:
        base = 0
        for checkpoint in chosen:

            def tell(now: int, _: int, base: int = base, step: int = checkpoint.step) -> None:
                progress.notify(f"sealing step {step}", base + now, total)

            results.append(_seal(backend, checkpoint, tell, dry_run=dry_run, everything=everything))
            base += checkpoint.size_bytes
    if as_json:
        print_json({"checkpoints": [_json(result) for result in results]})
    else:
        _print(results)
    return max((result.exit_code for result in results), default=0)


def _seal(backend: Backend, checkpoint: Checkpoint, tell: Tell, *, dry_run: bool, everything: bool) -> _Result:
    if checkpoint.status is Status.COMMITTED:
        return _Result(checkpoint, "already sealed")
    if everything and not checkpoint.status.usable:
        return _Result(checkpoint, "skipped", f"{checkpoint.status}: {checkpoint.findings[0]}")
    if dry_run and checkpoint.status.usable:
        return _Result(checkpoint, "would be sealed")
    try:
        pins = tuple(manifest.sha256 for manifest in seal(backend, checkpoint, progress=tell))
    except CkptStoreError as error:
        return _Result(checkpoint, "failed", str(error), exit_code=error.exit_code)
    return _Result(checkpoint, "sealed", manifest_sha256=pins)


def _print(results: list[_Result]) -> None:
    echo()
    for result in results:
        mark, fg = _MARKS.get(result.result, ("✗", "red"))
        text = f"step {result.checkpoint.step}: {result.result}"
        text += f" ({result.reason})" if result.reason else f", {size(result.checkpoint.size_bytes)}"
        item(mark, text, fg=fg)


def _json(result: _Result) -> dict[str, object]:
    return {
        "step": result.checkpoint.step,
        "bytes": result.checkpoint.size_bytes,
        "result": result.result,
        "reason": result.reason,
        "manifest_sha256": list(result.manifest_sha256),
    }
