"""`ckptstore push`: checkpoints of this machine into an object store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from ckptstore.backends import Backend, open_backend
from ckptstore.backends.stalls import StallWatch
from ckptstore.choose import newest_first
from ckptstore.cli.common import JSON, LOG_STEP, Verb, location_options, read_words
from ckptstore.cli.moving import (
    EVERYTHING,
    LATEST,
    MAX_BANDWIDTH,
    Failed,
    bounded,
    chosen,
    exit_code,
    failed_json,
    move_each,
    print_failed,
    url_option,
    url_or_usage,
)
from ckptstore.cli.opening import open_run
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import done, echo, field, item, note, print_json, rate, row
from ckptstore.cli.urls import said_url
from ckptstore.errors import RefusedError, UnavailableError
from ckptstore.listing import scan
from ckptstore.locate import Where
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint
from ckptstore.rendezvous import Launch, Rendezvous, launch
from ckptstore.sizes import size
from ckptstore.transfer import gathering
from ckptstore.transfer.push import Sending, Sent, push


@click.command("push", cls=Verb, short_help="Checkpoints into an object store, verified, committed at the end.")
@LATEST
@EVERYTHING
@LOG_STEP
@url_option("--to", "Where the run shall be: its parts lie directly below")
@click.option("--replace", is_flag=True, help="Take the place of what is committed there with other bytes, in one act.")
@MAX_BANDWIDTH
@click.option("--dry-run", is_flag=True, help="Say what would be sent; nothing is written.")
@JSON
@location_options
@click.argument("words", nargs=-1, metavar="[STEP]... [KEY=VALUE]...")
def command(
    where: Where,
    latest: bool,
    everything: bool,
    log_steps: tuple[int, ...],
    url: str,
    replace: bool,
    bytes_per_s: float | None,
    dry_run: bool,
    as_json: bool,
    words: tuple[str, ...],
) -> int:
    """Push checkpoints to s3://, gs://, az:// or any fsspec URL. STEPs are global steps.

    Every byte is checked against its manifest on the way; the manifest comes last, so that readers see all or nothing. What is
    there already is not sent again: the same command goes on after a crash. One that cannot go does not hold up the others.
    """
    where, steps = read_words(where, words, log_steps)
    told = launch()
    bandwidth = bounded(bytes_per_s, told.local_world_size if told else 1)
    target = open_backend(url_or_usage(said_url(where, url)[0], "--to"), bandwidth=bandwidth)
    first = told is None or not told.rank
    located, backend = open_run(where, as_json=as_json or not first, read_only=dry_run or not first, steps_too=True)
    listing = scan(backend)
    of_nodes = gathering.concerns(backend, listing, steps)
    if dry_run and not first and not of_nodes:
        return 0
    picked = chosen(listing, steps, latest=latest, everything=everything) if first else []
    if everything:  # this machine may be gone before all are there
        picked = newest_first(listing.run.path, picked)
    results: list[Sent] = []
    failed: list[Failed] = []
    started = time.monotonic()
    stalls = StallWatch()

    def send_all(sending: Sending | None = None, gather: Callable[[int], Manifest] | None = None) -> None:
        def send(checkpoint: Checkpoint) -> None:
            if told is None and of_nodes:
                _refuse_part(backend, checkpoint)
            whole = gather(checkpoint.step) if gather and gathering.group_of(backend, checkpoint) else None
            results.extend(
                push(
                    backend,
                    checkpoint,
                    target,
                    replace=replace,
                    dry_run=dry_run,
                    whole=whole,
                    sending=None if gather and whole is None else sending,
                    notify=progress.notify,
                )
            )

        move_each(picked, send, store=target, failed=failed)

    try:
        with Progress(quiet=as_json or not first) as progress, stalls:
            if told is None or (dry_run and not of_nodes):
                send_all()
            else:
                from ckptstore.transfer import sharing

                with _meeting(told) if of_nodes else Rendezvous(located.run.path, told) as group:
                    if not group.leads:
                        sharing.help_push(group, backend, target)
                        return 0
                    shared = sharing.Shared(group, source=backend, target=target)
                    send_all(shared.send, shared.gather if of_nodes else None)
                    shared.end()
                if not first:  # a machine with a disk of its own: what is here, rank 0's machine sends
                    return 0
    except KeyboardInterrupt:
        note("stopped: nothing unfinished is visible there. The same command goes on with what arrived.")
        raise
    finally:
        print_failed(failed, "pushed")
        if stalls.broken:
            note(f"connections on which nothing moved, broken off: {stalls.broken}")
    seconds = time.monotonic() - started
    if as_json:
        print_json(
            {
                "to": target.location,
                "done": not dry_run,
                "seconds": round(seconds, 6),
                "parts": [_json(sent) for sent in results],
                "failed": failed_json(failed),
            }
        )
    else:
        _print(results, target.location, seconds, dry_run=dry_run)
    return exit_code(failed)


def _meeting(told: Launch) -> Rendezvous:
    """All ranks, whatever disks they see."""
    try:
        from ckptstore.torch.meeting import Meeting
    except ImportError as error:
        raise UnavailableError(
            f"the ranks of several nodes meet by torch.distributed, and torch cannot be imported: {error}"
        ) from error
    return Meeting(told)


def _refuse_part(backend: Backend, checkpoint: Checkpoint) -> None:
    """One node's part of a save is no checkpoint for anybody else."""
    if (group := gathering.group_of(backend, checkpoint)) is not None:
        raise RefusedError(
            f"step {checkpoint.step} here is of {group.whose}: without the other nodes' files nobody can load it",
            hint=f"On all {group.nodes} nodes at once: torchrun --nnodes {group.nodes} … -m -- ckptstore.recover push "
            f"{checkpoint.step} --run DIR --to URL. It becomes one checkpoint there.",
        )


def _print(results: list[Sent], url: str, seconds: float, *, dry_run: bool) -> None:
    field("to", url)
    echo()
    for sent in results:
        name = f"step {sent.step}, {sent.part}"
        kept = f"; {size(sent.there_bytes)} were there already" if sent.there_bytes else ""
        if dry_run:
            item("·", f"{name}: {size(sent.sent_bytes)} would be sent{kept}")
        elif sent.committed_before and not sent.sent_bytes:
            item("·", f"{name}: there already, committed")
        else:
            done(f"{name} is committed: {size(sent.sent_bytes)} sent{rate(sent.sent_bytes, seconds)}{kept}")
        row("at", f"{sent.url}/")
        if not dry_run:  # one that is yet to be made would be another one each time
            row("", f"manifest sha256 {sent.manifest_sha256}")
            row("", _checked(sent))
    for text in sorted({text for sent in results for text in sent.notes}):
        note(text)


def _checked(sent: Sent) -> str:
    """What the store itself said of the files, and no more than that."""
    whole = sent.sent_bytes + sent.there_bytes
    if sent.server_checked_bytes == whole:
        return (
            f"the store's own {sent.server_check} of every file is the manifest's" if whole else "there is nothing to compare"
        )
    if sent.server_checked_bytes:
        return f"the store's own {sent.server_check} of {size(sent.server_checked_bytes)} of {size(whole)} is the manifest's"
    return f"not compared with the store's own digests: {sent.server_check or 'it keeps none of these files'}"


def _json(sent: Sent) -> dict[str, Any]:
    return {
        "step": sent.step,
        "part": sent.part,
        "url": sent.url,
        "sent_bytes": sent.sent_bytes,
        "there_bytes": sent.there_bytes,
        "committed_before": sent.committed_before,
        "manifest_sha256": sent.manifest_sha256,
        "server_checked_bytes": sent.server_checked_bytes,
        "server_check": sent.server_check,
        "notes": list(sent.notes),
    }
