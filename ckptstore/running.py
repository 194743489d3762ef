"""Is the trainer of a run still at work? Two signs: its files change, or a process names it.

What a trainer wrote that the circuit breaker then halted is no sign: people paste the command from its message at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

from ckptstore import halt, places
from ckptstore.frameworks.areal.layout import RunRef
from ckptstore.listing import Listing

RECENT_S = 120.0
POLL_S = 5.0
LAST_WORDS_S = 20.0  #: a halted trainer's logs end with its traceback, and its ranks end one after the other
_TRAINERS = ("python", "torchrun", "accelerate", "deepspeed", "ray")


def signs_of_life(listing: Listing, *, now_s: float | None = None) -> list[str]:
    """Why the trainer seems to be running; empty when nothing says so."""
    now_s = time.time() if now_s is None else now_s
    quiet = f"; {RECENT_S:.0f} s without a write count as stopped"
    signs = [f"{path} was written {max(now_s - mtime_s, 0):.0f} s ago{quiet}" for path, mtime_s in _recent(listing, now_s)]
    signs.extend(f"process {pid} names this run: {command}" for pid, command in _processes(listing.run))
    return signs


def wait_for_quiet(look: Callable[[], Listing], say: Callable[[str], None]) -> bool:
    """Wait while nothing but the times of files says that the trainer is at work, and nothing is written any more.

    A job that follows the one that has ended, and a pod that is started again, come within seconds of its last write. True
    once it is quiet; False at once where a process names the run, and at the first new write.
    """
    first: set[tuple[str, float]] = set()
    while (recent := _recent(listing := look(), time.time())) and not any(_processes(listing.run)):
        quiet_in_s = max(at_s for _, at_s in recent) + RECENT_S - time.time()
        if not first:
            first = set(recent)
            say(f"{recent[0][0]} was just written: waiting {quiet_in_s:.0f} s, to see that the trainer is no longer at work")
        if not first.issuperset(recent):
            return False
        time.sleep(min(max(quiet_in_s, 0.0) + 0.01, POLL_S))
    return not recent


def _recent(listing: Listing, now_s: float) -> list[tuple[str, float]]:
    """What was written in the run and in its logs so lately that a trainer may have done it."""
    halted_s = _halted_at_s(listing.run)
    newest = ((listing.newest_file, listing.newest_mtime_ns / 1e9), _newest_log(listing.run))
    # A node's clock may be ahead of ours.
    return [(path, at_s) for path, at_s in newest if path and at_s > halted_s and abs(now_s - at_s) < RECENT_S]


def _halted_at_s(run: RunRef) -> float:
    """Until when files belong to a trainer that was halted and has ended; 0 where that cannot be shown."""
    trip = halt.read(places.side_of(run.path))
    if trip is None or trip.host != socket.gethostname() or trip.pid <= 0:
        return 0.0
    try:
        os.kill(trip.pid, 0)
    except ProcessLookupError:
        return trip.at_s + LAST_WORDS_S
    except PermissionError:
        pass  # there is such a process, another user's
    return 0.0


def _newest_log(run: RunRef) -> tuple[str, float]:
    newest: tuple[str, float] = ("", 0.0)
    try:
        with os.scandir(run.logs or "/nonexistent") as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and (mtime_s := entry.stat().st_mtime) > newest[1]:
                    newest = (entry.path, mtime_s)
    except OSError:
        return "", 0.0
    return newest


def _processes(run: RunRef) -> Iterator[tuple[int, str]]:
    """Python processes whose command line names the run, but not ours."""
    names = {f"trial_name={run.trial}", f"experiment_name={run.experiment}"}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) in (os.getpid(), os.getppid()):
            continue
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read(1 << 16).decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended, or it is another user's
        if not os.path.basename(words[0]).startswith(_TRAINERS) or _is_ours(words):
            continue
        if names <= set(words) or any(f"{run.path}/" in f"{word}/" for word in words):  # trial1 is not trial10
            yield int(pid), " ".join(filter(None, words))[:120]


def _is_ours(words: list[str]) -> bool:
    """`python -m ckptstore.recover …` or the console script; the interpreter's path may well name us, and be the trainer's."""
    return any(os.path.basename(word) == "ckptstore" or word.partition(".")[0] == "ckptstore" for word in words[1:4])
