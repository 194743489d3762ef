"""`ckptstore show STEP`: everything known about one checkpoint."""

from __future__ import annotations

import dataclasses

import click

from ckptstore.cli.common import JSON, LOG_STEP, Verb, WhichOption, location_options, read_words
from ckptstore.cli.opening import open_run, pick
from ckptstore.cli.render import (
    age,
    checkpoint_json,
    columns,
    echo,
    findings,
    heading,
    item,
    print_json,
    row,
    safe,
    status,
    steps,
)
from ckptstore.errors import NotFoundError, UsageError
from ckptstore.listing import backend_for, scan
from ckptstore.locate import Where
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint
from ckptstore.parts import find_manifest, folder_of, judged
from ckptstore.sizes import size


@click.command("show", cls=Verb, short_help="Everything known about one checkpoint.")
@LOG_STEP
@click.option("--slot", is_flag=True, cls=WhichOption, help="The recover slot.")
@JSON
@location_options
@click.argument("words", nargs=-1, metavar="STEP [KEY=VALUE]...")
def command(where: Where, log_steps: tuple[int, ...], slot: bool, as_json: bool, words: tuple[str, ...]) -> None:
    """Show one checkpoint: parts, files, digests, notes. STEP is a global step."""
    where, wanted = read_words(where, words, log_steps)
    if len(wanted) + slot != 1:
        raise UsageError("show takes one step, or --slot", hint="`ckptstore list` shows which there are.")
    _, backend = open_run(where, as_json=as_json, remote=True, steps_too=True)
    listing = scan(backend)
    if slot and listing.slot is None:
        raise NotFoundError("the recover slot is empty", hint="`ckptstore setup` fills it.")
    found = [listing.slot] if slot and listing.slot else pick(listing, wanted, adopted=True)
    checkpoint = next((one for one in reversed(found) if one.kind == "export"), found[-1])
    backend = backend_for(backend, checkpoint)
    manifests = {part.name: find_manifest(backend, folder_of(backend, part)) for part in checkpoint.parts}
    parts = tuple(judged(backend, part, manifests[part.name]) for part in checkpoint.parts)
    checkpoint = dataclasses.replace(checkpoint, parts=parts)
    if as_json:
        document = checkpoint_json(checkpoint, with_files=True)
        for part in document["parts"]:
            manifest = manifests[part["name"]]
            part["manifest_sha256"] = manifest.sha256 if manifest else None
            part["metrics"] = dict(manifest.metrics) if manifest else {}
        print_json(document)
        return
    _print(checkpoint, manifests)


def _print(checkpoint: Checkpoint, manifests: dict[str, Manifest | None]) -> None:
    echo()
    heading(steps(checkpoint))
    if checkpoint.epoch >= 0:
        saved = f"; saved {age(checkpoint.age_s())} ago" if checkpoint.saved_at_s else ""
        echo(f"epoch {checkpoint.epoch}, epoch step {checkpoint.epoch_step}{saved}")
    for text in (*checkpoint.notes, *([checkpoint.left] if checkpoint.left else [])):
        item("·", safe(text))
    for part in checkpoint.parts:
        manifest = manifests[part.name]
        digests = {entry.path: f"{entry.crc:016X}" for entry in manifest.files} if manifest else {}
        echo()
        echo(f"{click.style(safe(part.name), bold=True)}  {status(part.status)}  {part.format}, {size(part.size_bytes)}")
        row("holds", ", ".join(part.holds) or "nothing known")
        row("folder", part.files_path)
        if manifest:
            row("manifest", f"{manifest.origin}ed {manifest.created_at}" if manifest.origin == "seal" else _origin(manifest))
            row("", f"sha256 {manifest.sha256}")
            if manifest.metrics:
                row("metrics", ", ".join(f"{name} {value:.6g}" for name, value in sorted(manifest.metrics.items())))
        findings(part.findings)
        for text in part.notes:
            item("·", text)
        rows = [(safe(file.name), f"{file.size_bytes:,}", digests.get(file.name, "-")) for file in part.files]
        for line in columns(("file", "bytes", "CRC-64/NVME"), rows, left=(0,)):
            echo(f"  {line}")


def _origin(manifest: Manifest) -> str:
    return f"{manifest.origin} {manifest.created_at}" + (f" from {manifest.source}" if manifest.source else "")
