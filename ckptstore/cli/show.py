"""`ckptstore show STEP`: everything known about one checkpoint."""

from __future__ import annotations

import dataclasses
import time

import click

from ckptstore.cli.common import JSON, location_options, open_run, split_words
from ckptstore.cli.render import (
    age,
    checkpoint_json,
    columns,
    echo,
    findings,
    heading,
    print_json,
    safe,
    size,
    status,
    steps,
)
from ckptstore.errors import UsageError
from ckptstore.listing import find_manifest, folder_of
from ckptstore.locate import Where
from ckptstore.store import CheckpointStore


@click.command("show", short_help="Everything known about one checkpoint.")
@location_options
@click.option("--log-step", type=int, metavar="N", help="By the log's number: Train step N is global step N - 1.")
@JSON
@click.argument("words", nargs=-1, metavar="STEP [KEY=VALUE]...")
def command(where: Where, log_step: int | None, as_json: bool, words: tuple[str, ...]) -> None:
    """Show one checkpoint: parts, files, digests, notes. STEP is a global step."""
    wanted, overrides = split_words(words)
    wanted += [log_step - 1] if log_step is not None else []
    if len(wanted) != 1:
        raise UsageError("show takes one step", hint="`ckptstore list` shows which there are.")
    located, backend = open_run(dataclasses.replace(where, overrides=overrides), quiet=as_json)
    checkpoint = CheckpointStore(located.run.path).get(wanted[0])
    manifests = {part.name: find_manifest(backend, folder_of(backend, part)) for part in checkpoint.parts}
    if as_json:
        document = checkpoint_json(checkpoint, with_files=True)
        for part in document["parts"]:
            manifest = manifests[part["name"]]
            part["manifest_sha256"] = manifest.sha256 if manifest else None
        print_json(document)
        return
    heading(steps(checkpoint))
    echo(f"epoch {checkpoint.epoch}, epoch step {checkpoint.epoch_step}; saved {age(checkpoint.age_s(time.time()))} ago")
    for part in checkpoint.parts:
        manifest = manifests[part.name]
        digests = {entry.path: f"{entry.crc:016X}" for entry in manifest.files} if manifest else {}
        echo()
        echo(f"{click.style(safe(part.name), bold=True)}  {part.format}, {size(part.size_bytes)}  {status(part.status)}")
        echo(f"  {safe(part.path)}")
        rows = [(safe(file.name), f"{file.size_bytes:,}", digests.get(file.name, "-")) for file in part.files]
        for line in columns(("file", "bytes", "CRC-64/NVME"), rows, left=(0,)):
            echo(f"  {line}")
        for line in findings(part.findings):
            echo(line)
        for text in part.notes:
            echo(f"  {safe(text)}")
        if manifest:
            echo(f"  manifest {manifest.origin} {manifest.created_at}  sha256 {manifest.sha256}")
