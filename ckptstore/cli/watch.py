"""`ckptstore watch`: adopt each save that the trainer finishes, as a process beside training."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import threading
import time
from types import FrameType

import click

from ckptstore import adopt
from ckptstore.backends import is_url, normal_url, open_backend
from ckptstore.backends.stalls import StallWatch
from ckptstore.cli import condition
from ckptstore.cli.common import JSON, OVERRIDES, Verb, location_options
from ckptstore.cli.moving import MAX_BANDWIDTH, bounded
from ckptstore.cli.opening import open_run
from ckptstore.cli.progress import Progress
from ckptstore.cli.render import checkpoint_json, done, echo, note, steps
from ckptstore.errors import CkptStoreError
from ckptstore.locate import Where
from ckptstore.model import Checkpoint
from ckptstore.places import side_of
from ckptstore.sizes import size
from ckptstore.transfer import mirrored
from ckptstore.transfer.push import Sent

PUSH_EVERY_S, PUSH_AT_MOST_S = 60.0, 300.0  #: between two looks at what waits to be pushed; after failures in a row


@click.command("watch", cls=Verb, short_help="Adopt each save that the trainer finishes.")
@click.option("--keep", metavar="N", type=click.IntRange(1), default=2, show_default=True, help="So many of the newest.")
@click.option(
    "--to",
    metavar="DIR|URL",
    default="",
    help="Keep them below this folder, on another disk say, instead of beside the run; or push each to this URL too.",
)
@MAX_BANDWIDTH
@click.option("--once", is_flag=True, help="Stop after the first.")
@JSON
@location_options
@OVERRIDES
def command(where: Where, keep: int, to: str, bytes_per_s: float | None, once: bool, as_json: bool) -> None:
    """Keep the newest finished saves of a running trainer. Runs until Ctrl-C or SIGTERM; --json prints a line a save.

    Nothing of the trainer's is touched; a save in progress is waited for. `setup` takes what is kept like any other checkpoint:
    from another disk by --checkpoint-path DIR/EXPERIMENT/TRIAL/adopted/globalstepN, from a bucket by --from URL.

    With --to URL finished exports are pushed too, and what an earlier watch could not push. What fails is tried again within
    minutes, and is not removed here before.
    """
    located, backend = open_run(where, as_json=as_json)
    stop = threading.Event()
    sending = False
    pause_s, due_s = PUSH_EVERY_S, 0.0
    not_pushed: list[CkptStoreError] = []

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()
        if sending:
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.signal(number, end) or signal.SIG_DFL  # None: one that only C knows
        click.get_current_context().call_on_close(functools.partial(signal.signal, number, before))
    if not as_json:
        echo(f"watching {located.run.path}, keeping the newest {keep}{f' in {to}' * bool(to)}", err=True)
    url = normal_url(to) if is_url(to) else ""
    if url:
        open_backend(url)  # what no try will ever open is refused now
    bandwidth = bounded(bytes_per_s)
    record = mirrored.read(side_of(located.run.path))
    if record is not None and not url:
        note(f"this run was mirrored to {record.url}: what is not safe there yet is not removed here (see `ckptstore status`)")
    with Progress(quiet=as_json) as progress:

        def show(checkpoint: Checkpoint) -> None:
            shown = condition.of_kept(located.run.path, checkpoint)
            if as_json:
                click.echo(json.dumps({"checkpoint": checkpoint_json(checkpoint) | shown.json, "store": checkpoint.store}))
                return
            done(f"kept {steps(checkpoint)}, {size(checkpoint.size_bytes)}, in {checkpoint.store}")
            if not shown.resumable:
                note(f"{shown.text}: it is kept all the same, and setup passes it over")

        def look() -> None:
            """What the trainer has saved while something was sent is kept at once, and sent before what is older."""
            with contextlib.suppress(CkptStoreError):  # nothing new as a rule; the watch itself says what is in the way
                show(adopt.adopt(backend, notify=progress.notify))

        def kept() -> None:
            if not url:
                return
            nonlocal sending, pause_s, due_s
            from ckptstore.transfer.mirror import mirror

            sent: list[Sent] = []
            pause_s = min(pause_s * 2, PUSH_AT_MOST_S)
            try:
                sending = True
                with StallWatch():
                    sent = mirror(
                        backend,
                        url,
                        bandwidth=bandwidth,
                        between=(lambda: None) if once else look,
                        notify=progress.notify,
                    )
                pause_s = PUSH_EVERY_S
            except CkptStoreError as error:
                if once:
                    not_pushed.append(error)  # said when it is said what is kept
                else:
                    note(f"not pushed to {url}, tried again in {pause_s:.0f} s: {error}")
            except KeyboardInterrupt:
                note(f"not pushed to {url}: stopped. The next push or watch goes on with what arrived.")
            finally:
                sending = False
                due_s = time.monotonic() + pause_s
            for step in sorted({one.step for one in sent}):
                note(f"step {step} is committed in {url}")

        def problem(error: CkptStoreError) -> None:
            if once:
                raise error
            note(f"not kept, and tried again: {error}{f' ({error.hint})' * bool(error.hint)}")

        def wait(seconds: float) -> None:
            """Until the next look; what waits to be pushed does not wait for a save."""
            nonlocal due_s
            if url and time.monotonic() >= due_s:
                from ckptstore.transfer.mirror import is_safe

                if is_safe(backend, url):
                    due_s = time.monotonic() + PUSH_EVERY_S
                else:
                    kept()
            stop.wait(seconds)

        watching = adopt.watch(
            backend,
            keep=keep,
            into="" if url else to,
            kept=kept,
            problem=problem,
            stop=stop.is_set,
            wait=wait,
            notify=progress.notify,
        )
        for checkpoint in watching:
            show(checkpoint)
            if not_pushed:
                raise not_pushed[-1]
            if once:
                return
