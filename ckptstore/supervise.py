"""Run the trainer and see for ourselves that it resumed where it should: "resumed at N", or it is stopped.

The proof is the trainer's own output (and its log files): "Train step N" counts from 1, so a run that resumes after global
step G says "Train step G+2" first. A trainer that starts elsewhere has not resumed: every further step would train
the wrong weights, or write over the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from ckptstore.errors import CkptStoreError, NotFoundError
from ckptstore.untrusted import open_regular

_FIRST_STEP = re.compile(rb"Train step (\d{1,9})\b")
_REFUSED = (b"This should not be a resumed experiment",)
STOP_S = 30.0
LAST_WORDS_S = 3.0  #: so long is read on, once the trainer has ended and what it has started still holds its output
POLL_S = 0.2
_TAIL_BYTES = 256


class NotResumed(CkptStoreError):
    """The trainer did not resume where it should, and was stopped."""


_Logs = dict[tuple[int, int], int]
"""Log files, by device and inode, since rotation renames them; how far each is read: at first to where it ended when the
trainer was started."""


@dataclass(slots=True)
class _Sight:
    """What the trainer has said so far."""

    first_step: int = -1  #: global step, from 0
    refusal: str = ""
    rest: dict[str, bytes] = field(default_factory=dict)

    def read(self, source: str, data: bytes) -> None:
        text = self.rest.get(source, b"") + data
        for mark in _REFUSED:
            if mark in text:
                self.refusal = mark.decode()
        if self.first_step < 0 and (match := _FIRST_STEP.search(text)) and match.end() < len(text):
            self.first_step = int(match[1]) - 1
        self.rest[source] = text[-_TAIL_BYTES:]


def run_confirmed(
    words: Sequence[str],
    *,
    expected_step: int,
    logs: str = "",
    environment: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Run `words`, pass its output on, and stop it unless its first training step is global step `expected_step`.

    `logs` is the run's log folder: its files are watched as well. SIGTERM, SIGINT and SIGHUP are passed on. Returns the
    trainer's exit code, 128 + N for a signal, as soon as it has ended: what it has started and left behind (an inference
    server) is not waited for. NotResumed when it was stopped, NotFoundError when it cannot be started.
    """
    watched = {(info.st_dev, info.st_ino): info.st_size for _, info in _log_files(logs)}
    try:
        process = subprocess.Popen(
            list(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        raise NotFoundError(
            f"starting {words[0]}: {error.strerror}", hint="The run is set up; start the trainer by hand."
        ) from error
    restore = _pass_signals_on(process)
    sight = _Sight()
    confirmed = False
    try:
        assert process.stdout is not None
        for data in _output(process, process.stdout, say):
            if data:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            if confirmed:
                continue
            sight.read("output", data)
            _read_logs(logs, watched, sight)
            if sight.refusal or sight.first_step >= 0:
                if sight.refusal or sight.first_step != expected_step:
                    found = sight.refusal or f"its first step is global step {sight.first_step}"
                    _stop(process)
                    raise NotResumed(
                        f"the trainer did not resume at global step {expected_step}: {found}; it was stopped",
                        hint="The checkpoints are as they were. `ckptstore doctor` looks for the cause.",
                    )
                confirmed = True
                say(f"resumed at global step {expected_step} (the log says: Train step {expected_step + 1})")
        code = process.wait()
    finally:
        restore()
        if process.poll() is None:
            _stop(process)
        if process.stdout is not None:
            process.stdout.close()
    return code if code >= 0 else 128 - code


def _output(process: subprocess.Popen[bytes], stream: IO[bytes], say: Callable[[str], None]) -> Iterator[bytes]:
    """What the trainer prints, and b"" now and then while it prints nothing: its log files want a look too."""
    end_s = math.inf
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if end_s == math.inf and process.poll() is not None:
                end_s = time.monotonic() + LAST_WORDS_S
            if time.monotonic() >= end_s:
                say("the trainer has ended; what it has started and left behind is still there")
                return
            if not selector.select(POLL_S):
                yield b""
            elif data := os.read(stream.fileno(), 1 << 16):
                yield data
            else:
                return


def _pass_signals_on(process: subprocess.Popen[bytes]) -> Callable[[], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: then nobody sends us signals
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(number, forward)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the trainer and its children: asked first, then not. Those that outlive it as well."""
    end_s = time.monotonic() + STOP_S
    with contextlib.suppress(ProcessLookupError):  # there is nobody left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < end_s:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(POLL_S / 4)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_S)


def _log_files(logs: str) -> Iterator[tuple[str, os.stat_result]]:
    with contextlib.suppress(OSError), os.scandir(logs or "/nonexistent") as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry.path, entry.stat()


def _read_logs(logs: str, watched: _Logs, sight: _Sight) -> None:
    for path, _ in _log_files(logs):
        with contextlib.suppress(OSError), open_regular(path) as file:
            info = os.fstat(file.fileno())
            key = (info.st_dev, info.st_ino)
            offset = watched.get(key, 0)
            if info.st_size < offset:
                offset = 0  # started anew
            file.seek(offset)
            data = file.read(1 << 20)
            watched[key] = offset + len(data)
            if data:
                sight.read(str(key), data)
