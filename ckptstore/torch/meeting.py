"""All ranks of a launch meet, whatever disks they see: through the key-value store that the launcher names.

torchrun hosts it (MASTER_ADDR, MASTER_PORT); with any other launcher rank 0 does. What is told there, and who is missed and
when, is as in rendezvous.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore

from ckptstore.errors import CkptStoreError, RankError, UsageError
from ckptstore.rendezvous import MEET_S, POLL_S, Launch, Rendezvous
from ckptstore.torch.nodes import Channel


class Meeting(Rendezvous):
    """A Rendezvous of all ranks; rank 0 leads. It has no folder."""

    def __init__(self, launch: Launch) -> None:
        super().__init__("", launch)
        self._channel: Channel | None = None

    def _meet(self) -> None:
        deadline = time.monotonic() + MEET_S
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdigit():
            raise UsageError("the launch does not say where its ranks meet", hint="torchrun sets MASTER_ADDR and MASTER_PORT.")
        hosts = self.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher does
        try:
            timeout = timedelta(seconds=MEET_S)
            store = TCPStore(address, int(port), None, hosts, timeout, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as error:  # torch's
            raise RankError(
                f"no store of keys for the ranks at {address}:{port} within {MEET_S:.0f} s: {error}", rank=0
            ) from error
        self._channel = Channel(self._launch.name, store)
        self._heart.start()
        self._write(f"alive-{self.rank}", self._state(0))
        self.members = list(range(self._launch.world_size))
        if not self.leads:
            self.wait("roster")
            return
        while missing := [rank for rank in self.members if self._read(f"alive-{rank}") is None]:
            if time.monotonic() > deadline:
                raise RankError(f"rank {missing[0]} did not come within {MEET_S:.0f} s", rank=missing[0])
            time.sleep(POLL_S)
        self._write("roster", self.members)

    def _end(self, error: BaseException | None) -> None:
        self._stop.set()
        if self._heart.ident is not None:
            self._heart.join()
        if error is not None and self._channel is not None:
            with contextlib.suppress(CkptStoreError):  # they miss its beat else
                self._write(f"failed-{self.rank}", {"why": str(error) or type(error).__name__})

    def _has_ended(self) -> bool:
        return False  # its store would be gone

    def _write(self, name: str, document: Any) -> None:
        assert self._channel is not None
        try:
            self._channel.tell(name, document)
        except RuntimeError as error:  # torch's, of the store
            raise _gone(error) from error

    def _read(self, name: str) -> Any:
        assert self._channel is not None
        try:
            return self._channel.told(name)
        except RuntimeError as error:
            raise _gone(error) from error


def _gone(error: RuntimeError) -> RankError:
    return RankError(f"rank 0, or the launcher that hosts the ranks' key-value store, is gone: {str(error)[:200]}", rank=0)
