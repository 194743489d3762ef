"""Signals that ask for a save: a spot notice (SIGTERM), or somebody who wants one now (SIGUSR1).

The handler only notes it: in the middle of optimizer.step() there is no state worth saving. The loop asks between two steps,
saves, and is told whether the save was committed before the deadline. What is not committed by then is not in the store, and
what was there is. A second SIGTERM ends the process at once, but not within SAME_NOTICE_S of the first: schedulers signal
every process of a job, and torchrun passes on to its workers what it gets, so that one notice comes twice.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ckptstore.errors import CkptStoreError, UsageError
from ckptstore.ranks import together
from ckptstore.retention import checked_keep, prune_after
from ckptstore.saves.background import wait_all
from ckptstore.store import CheckpointStore
from ckptstore.torch.background import save_async

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_NOTICE_S = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an emergency save."""

    step: int
    committed: bool  #: whether it was in the store, durable, before the deadline
    seconds: float
    problem: str = ""  #: why not; or what went wrong after the commit


class Emergency:
    """Notes signals, and saves by their deadline. Made by `install_signal_handlers`; used by the training thread."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._noted: dict[int, float] = {}  # signal → when, by time.monotonic
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether a save is asked for."""
        return bool(self._noted)

    @property
    def stopping(self) -> bool:
        """Whether the process is to end (SIGTERM). Stays so after the save."""
        return signal.SIGTERM in self._noted

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline of the earliest signal; the whole deadline without one."""
        if not self._noted:
            return self.deadline_s
        return min(self._noted.values()) + self.deadline_s - time.monotonic()

    def agree(self, group: Any = None) -> bool:
        """Whether a save is asked for on any rank of `group` (None: all); the same on all, and so is `stopping` from then on.

        A collective, one small all-reduce: every rank calls it between the same two steps. A signal reaches the ranks in
        different steps, or only one of them. SIGUSR1 is answered by this: whoever saves does so now.
        """
        ranks = together(group)
        asked = ranks.any(self.requested)
        if asked:
            if ranks.any(self.stopping):
                self._noted.setdefault(signal.SIGTERM, time.monotonic())
            for number in self._noted.keys() - {signal.SIGTERM}:
                del self._noted[number]
        return asked

    def save(self, store: CheckpointStore, step: int, state_dict: Mapping[str, Any], **options: Any) -> Outcome:
        """Save by the deadline, a save that is in flight first. Never raises what a save raises: the outcome says it.

        `options` are save_async's; what `keep` does not keep is pruned after the commit, whatever becomes of that. A request
        by SIGUSR1 is answered by this.
        """
        started = time.monotonic()
        problem, committed = "", False
        try:
            _end_others(max(0.0, self.remaining_s))
            keep = options.pop("keep", None)
            save_async(store, step, state_dict, **{"nice": 0, **options}).wait(max(0.0, self.remaining_s))
            committed = True
            prune_after(store.backend, step, checked_keep(keep))
        except TimeoutError:
            problem = f"not committed within {self.deadline_s:g} s"
        except (CkptStoreError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch's, of a device
            problem = str(error)
        self._noted.pop(signal.SIGUSR1, None)
        return Outcome(step, committed, time.monotonic() - started, problem)

    def uninstall(self) -> None:
        """Put the handlers back that were there before."""
        for number in self._previous:
            signal.signal(number, self.before(number))
        self._previous.clear()

    def before(self, number: int) -> Any:
        """The handler that was there before; the default for one that only C knows."""
        return signal.SIG_DFL if (handler := self._previous.get(number)) is None else handler

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. In a forked child, which trains nothing, it gives way to what was there before: a loader's worker
        that is terminated must end.
        """
        if self._process != os.getpid():
            signal.signal(number, self.before(number))
            signal.raise_signal(number)
            return
        if number == signal.SIGTERM and number in self._noted:
            if time.monotonic() - self._noted[number] < SAME_NOTICE_S:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._noted.setdefault(number, time.monotonic())
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)

    def __iter__(self) -> Iterator[str]:
        """The names of the signals that are noted."""
        return iter([signal.Signals(number).name for number in self._noted])


def _end_others(timeout_s: float) -> None:
    """Wait for saves in flight. One that fails was logged, and is no reason not to save this one. TimeoutError."""
    try:
        wait_all(timeout_s)
    except TimeoutError:  # an OSError too
        raise
    except (CkptStoreError, OSError, MemoryError, RuntimeError):
        return


def _handler(number: int) -> Any:
    """The signal's handler, without those that this process inherited from a parent that trains."""
    found: Any = signal.getsignal(number)
    while isinstance(owner := getattr(found, "__self__", None), Emergency) and owner._process != os.getpid():
        found = owner.before(number)
    return found


def install_signal_handlers(deadline_s: float = 30.0, *, signals: Sequence[int] = SIGNALS) -> Emergency:
    """Note these signals instead of dying of them; a handler that was there before is called as well.

    `deadline_s` counts from the signal (spot machines give 30 s to 2 min). UsageError outside of the main thread, where
    Python takes no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("signal handlers are installed in the main thread", hint="Call it before threads are started.")
    if deadline_s <= 0:
        raise UsageError(f"deadline_s must be positive, not {deadline_s:g}")
    emergency = Emergency(deadline_s)
    for number in signals:
        emergency._previous[number] = _handler(number)
        signal.signal(number, emergency.note)
    return emergency
