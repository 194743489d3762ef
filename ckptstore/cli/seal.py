"""`ckptstore seal`: write a manifest for what the trainer wrote, so that later damage is found."""

from __future__ import annotations

import dataclasses

import click

from ckptstore.cli.common import JSON, location_options, open_run, split_words
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import echo, print_json, safe, size
from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.listing import scan
from ckptstore.locate import Where
from ckptstore.model import Status
from ckptstore.seal import seal


@click.command("seal", short_help="Write a manifest for what the trainer wrote.")
@location_options
@click.option("--all", "everything", is_flag=True, help="Every checkpoint that is whole and not sealed yet.")
@click.option("--dry-run", is_flag=True, help="Only say what would be sealed.")
@JSON
@click.argument("words", nargs=-1, metavar="[STEP]... [KEY=VALUE]...")
def command(where: Where, everything: bool, dry_run: bool, as_json: bool, words: tuple[str, ...]) -> int:
    """Digest every file of a checkpoint and record it in a manifest beside them. The files are not touched."""
    steps, overrides = split_words(words)
    if bool(steps) == everything:
        raise UsageError("name the steps to seal, or say --all")
    _, backend = open_run(dataclasses.replace(where, overrides=overrides), quiet=as_json)
    listing = scan(backend)
    missing = sorted(set(steps) - {checkpoint.step for checkpoint in listing.checkpoints})
    if missing:
        raise UsageError(
            f"no checkpoint of step {missing[0]} in {listing.run.path}",
            hint="`ckptstore list` shows which there are.",
        )
    chosen = [c for c in listing.checkpoints if everything or c.step in steps]
    total = sum(checkpoint.size_bytes for checkpoint in chosen)
    results: list[dict[str, object]] = []
    done = 0
    with Progress(quiet=as_json) as progress:
        for checkpoint in chosen:
            base = done

            def tell(now: int, _: int, base: int = base, step: int = checkpoint.step) -> None:
                progress.notify(f"sealing step {step}", base + now, total)

            outcome: dict[str, object] = {"step": checkpoint.step, "bytes": checkpoint.size_bytes}
            if checkpoint.status is Status.COMMITTED:
                outcome["result"] = "already sealed"
            elif dry_run and checkpoint.status.usable:
                outcome["result"] = "would be sealed"
            else:
                try:
                    pins = [manifest.sha256 for manifest in seal(backend, checkpoint, progress=tell)]
                    outcome |= {"result": "sealed", "manifest_sha256": pins}
                except CkptStoreError as error:
                    outcome |= {"result": "not sealed", "reason": safe(str(error))}
            results.append(outcome)
            done += checkpoint.size_bytes
    if as_json:
        print_json({"checkpoints": results})
    else:
        for item in results:
            reason = f": {item['reason']}" if "reason" in item else f"  {size(float(str(item['bytes'])))}"
            echo(f"step {item['step']}: {item['result']}{reason}")
    return 3 if any(item["result"] == "not sealed" for item in results) else 0
