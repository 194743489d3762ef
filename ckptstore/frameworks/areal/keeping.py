"""What the hooks of attach.py do: keep each finished save of the slot, and record each step's metrics. On rank 0 alone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ckptstore.errors import AlreadyExistsError, CkptStoreError, IntegrityError, RefusedError, StorageError
from ckptstore.frameworks.areal import layout, recover_info

if TYPE_CHECKING:
    from ckptstore.backends.local import LocalBackend
    from ckptstore.ledger import Writer
    from ckptstore.model import Checkpoint
    from ckptstore.stats import StatsReader

log = logging.getLogger(__name__)

OnSave = Callable[[int, "Checkpoint | None"], object]
"""Called on rank 0 with the global step of a finished save, and what was adopted of it (None: nothing)."""

#: Other ranks may still write their shards when rank 0's dump returns: so long is a torn slot looked at again.
RETRY_S = (1.0, 2.0, 5.0, 10.0, 20.0)


class Keeper:
    """Adopts the slot after each save, in a thread; the next save waits for it, since that one overwrites the slot.

    `keep` 0 adopts nothing. Whether a dump has saved is told by step_info.json, which every AReaL writes anew: dump returns
    without a word where it was not yet time.
    """

    def __init__(self, run: str, *, keep: int, on_save: OnSave | None) -> None:
        self._run, self._keep, self._on_save = run, keep, on_save
        self._seen: tuple[int, ...] = ()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()

    def note(self) -> None:
        """A dump begins: what is there now is not its."""
        self._seen = self._mark()

    def make_way(self) -> None:
        """The slot is about to be overwritten: end what still reads it."""
        self._hurry.set()  # no more retries; a copy in progress is finished
        self.wait()

    def look(self) -> None:
        """The dump has returned; if it has saved, keep that."""
        from ckptstore.ranks import own_rank

        if own_rank() != 0 or self._mark() in ((), self._seen):
            return
        self.make_way()
        self._hurry.clear()
        self._thread = threading.Thread(target=self._finish, name="ckptstore-adopt")
        self._thread.start()

    def wait(self) -> None:
        """Wait until an adoption in progress has ended."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None

    def _mark(self) -> tuple[int, ...]:
        try:
            seen = os.stat(os.path.join(self._run, layout.RECOVER_INFO, recover_info.STEP_INFO))
        except OSError:
            return ()
        return seen.st_mtime_ns, seen.st_ino, seen.st_size

    def _finish(self) -> None:
        try:
            checkpoint = self._adopt() if self._keep else None
            if self._on_save is not None:
                self._on_save(checkpoint.step if checkpoint else self._step(), checkpoint)
        except Exception:
            log.warning("ckptstore: the save was not kept; training goes on", exc_info=True)

    def _step(self) -> int:
        from ckptstore.backends.local import LocalBackend

        backend = LocalBackend(self._run)
        info = recover_info.read(backend, backend.tree(max_depth=2).get(layout.RECOVER_INFO))
        return info.step if info is not None else -1

    def _adopt(self) -> Checkpoint | None:
        from ckptstore import adopt
        from ckptstore.backends.local import LocalBackend

        backend = LocalBackend(self._run)
        problem: CkptStoreError | None = None
        for delay_s in (0.0, *RETRY_S):
            if delay_s and self._hurry.wait(delay_s):
                break
            try:
                checkpoint = adopt.adopt(backend)
            except AlreadyExistsError as error:
                problem = error
                break
            except (RefusedError, IntegrityError, StorageError) as error:
                problem = error
            else:
                self._kept(backend, checkpoint)
                return checkpoint
        if problem is not None:
            log.warning("ckptstore: the save was not kept (training goes on): %s", problem)
        return None

    def _kept(self, backend: LocalBackend, checkpoint: Checkpoint) -> None:
        """Say what the metrics so far say of it, those of its own step are yet to come; remove older ones."""
        from ckptstore import adopt, choose

        try:
            for step, why in choose.gone_bad(self._run, [checkpoint]).items():
                log.warning("ckptstore: step %d is kept, although training had gone bad: %s", step, why)
            adopt.prune(backend, keep=self._keep)
        except CkptStoreError as error:
            log.warning("ckptstore: step %d is kept; older ones may not be removed: %s", checkpoint.step, error)


class Recorder:
    """Writes the metrics that the usual rules judge into the run's ledger, where no breaker does."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._read: StatsReader | None = None
        self._writer: Writer | None = None

    def observe(self, data: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None, step: int) -> None:
        """Record one step; `data` as AReaL commits it: one dict, or one a minibatch. OSError where it cannot be written."""
        from ckptstore.ranks import own_rank
        from ckptstore.rules import ALIVE, LOST, REWARD
        from ckptstore.stats import StatsReader

        if own_rank() != 0:
            return
        if self._read is None:
            self._read = StatsReader((REWARD,), (LOST.metric, *ALIVE))
        if found := self._read(data):
            writer = self._open()
            writer.record(int(step), time.time(), {self._read.keys[name]: value for name, value in found.items()})
            if writer.lost is not None:
                raise writer.lost

    def _open(self) -> Writer:
        from ckptstore import ledger
        from ckptstore import side as side_folders

        if self._writer is None:
            os.makedirs(os.path.dirname(self._run), exist_ok=True)  # the trainer makes it later, and the side folder is in it
            side = ledger.side_of(self._run)
            side_folders.make_side(side)
            self._writer = ledger.Writer(ledger.path_in(side))
        return self._writer
