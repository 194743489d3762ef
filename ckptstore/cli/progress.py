"""Progress for people: a bar with rate and time left on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

from ckptstore.cli.render import age, echo, safe
from ckptstore.sizes import size

LINE_EVERY_S = 10.0
STILL_S = 10.0  #: without a byte, before that is said


class Progress:
    """A context manager whose `notify` can be handed to the library. Written to stderr; silent after a hang-up.

    A dropped ssh connection (SIGHUP) must not stop a copy: while this is active it only silences the display.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._terminal = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._doing = ""
        self._started_s = self._line_s = self._moved_s = time.monotonic()
        self._base_bytes = self._done_bytes = 0
        self._before: Any = None
        # Found out now: one that has gone is no terminal any more.
        self._terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def __enter__(self) -> Progress:
        with contextlib.suppress(ValueError):  # not the main thread
            self._before = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
        if self._before is not None:
            signal.signal(signal.SIGHUP, self._before)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self._silence()

    def _silence(self) -> None:
        """The terminal has gone: what would be shown on it goes nowhere. A stream that is a file goes on."""
        self._quiet = self._quiet or self._terminal
        self._terminal = False
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(null, descriptor)  # below every buffer: none of them may fail when it is flushed at exit
        os.close(null)
        self._terminals = []

    def notify(self, doing: str, done_bytes: int, total_bytes: int) -> None:
        """Show that `doing` has come to `done_bytes` of `total_bytes`. Never raises for a terminal that is gone."""
        if self._quiet:
            return
        doing = safe(doing)
        if not self._doing:
            self._line_s = time.monotonic()
        if doing != self._doing or done_bytes < self._done_bytes:  # something else, or again from an earlier place
            self._started_s = self._moved_s = time.monotonic()
            self._base_bytes = self._done_bytes = done_bytes  # staged by an earlier try: not copied at any rate
        elif done_bytes != self._done_bytes:
            self._done_bytes, self._moved_s = done_bytes, time.monotonic()
        self._doing = doing
        try:
            if self._terminal:
                self._draw(doing, done_bytes, total_bytes)
            elif time.monotonic() - self._line_s >= LINE_EVERY_S:
                self._line_s = time.monotonic()
                self._print_line(doing, done_bytes, total_bytes)
        except OSError:  # EIO: the terminal went away before its SIGHUP came
            self._silence()
            self._quiet = True

    def _print_line(self, doing: str, done_bytes: int, total_bytes: int) -> None:
        rate = (done_bytes - self._base_bytes) / max(self._line_s - self._started_s, 1e-9)
        left = f", {age((total_bytes - done_bytes) / rate)} left" if rate > 0 else ""
        how = self._still() or f"{size(rate)}/s{left}"
        echo(f"{doing}: {size(done_bytes)} of {size(total_bytes)}, {how}", err=True)

    def _still(self) -> str:
        """For how long nothing has moved, where that is long: a rate over all the time would hide it."""
        still_s = time.monotonic() - self._moved_s
        return f"nothing moved for {still_s:.0f} s" if still_s >= STILL_S else ""

    def _draw(self, doing: str, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=32),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(doing, total=total_bytes)
        still = self._still()
        doing = f"{doing} ({still})" if still else doing
        self._bar.update(self._task, description=doing, completed=done_bytes, total=total_bytes)
