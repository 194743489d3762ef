"""A save by several nodes that have a disk each: every node commits the files of its own ranks, or none does.

In two phases. The first rank of each node leads it; the coordinator leads its own. They talk through the key-value store that
the process group met by: no collectives, so that the leaders can answer from a thread while torch waits for the coordinator.

    1  prepare    the coordinator tells each leader its node's `.metadata`, and the digests of its ranks' files
       prepared   the leader has written the manifest, and all of the draft is durable; from now on only the coordinator may
                  give it up, which says `abort`: a leader that hears no more leaves the draft as it is (prepared.py)
    2  commit     once all are prepared. The coordinator has published its own by then; each leader publishes, then says so.
                  A step that was there before stays in `.ckptstore/old-step-…` on every node
    3  settle     once all have committed: the step is known to be whole on all nodes, and what it replaced may go

What ends one ends all that have not committed yet. A crash in phase 2 leaves a step that not all nodes have: StoreReader passes
over it, retention does not count it, and `resume_step` (resuming.py) publishes what the other nodes have prepared.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from ckptstore import native, parallel
from ckptstore import side as side_folders
from ckptstore.errors import CkptStoreError, CommitUncertain, IntegrityError, NotCommitted, RankError, from_os_error
from ckptstore.formats import dcp
from ckptstore.manifest import Manifest, content_of
from ckptstore.model import NodeSet
from ckptstore.native import Digest
from ckptstore.saves import node_sets, prepared, steps
from ckptstore.saves.steps import Draft
from ckptstore.saves.uploading import Written

POLL_S = 0.02
BEGIN_S = 60.0  #: so long a node's ranks wait for the first of them to begin its draft
SETTLE_S = 10.0
_VALUE_BYTES = 4 << 20  # torch's TCPStore takes 8 MiB at once

_log = logging.getLogger("ckptstore")


class _GivenUpError(Exception):
    """The save does not go on."""


class _AbortedError(_GivenUpError):
    """No node has published, and none will: by the coordinator's word."""


class Channel:
    """What the leaders of one save tell each other, by the group's key-value store, or another one.

    Any failure of the store itself is a RuntimeError of torch's.
    """

    def __init__(self, name: str, store: Any = None) -> None:
        store = _get_default_store() if store is None else store
        self._store = PrefixStore(f"ckptstore/{name}", store)
        self.timeout_s: float = store.timeout.total_seconds()

    def tell(self, key: str, document: Mapping[str, Any]) -> None:
        """Once a key, but for what is small."""
        data = json.dumps(document)
        count = -(-len(data) // _VALUE_BYTES)
        for number in range(count):
            self._store.set(f"{key}/{number}", data[number * _VALUE_BYTES : (number + 1) * _VALUE_BYTES])
        self._store.set(key, str(count))

    def told(self, key: str) -> Any:
        """What was told under the key; None where nothing was, yet."""
        if not self._store.check([key]):
            return None
        return json.loads(b"".join(self._store.get(f"{key}/{number}") for number in range(int(self._store.get(key)))))

    def forget(self, key: str) -> None:
        """Free what a key takes on the store's host."""
        if self._store.check([key]):
            for number in range(int(self._store.get(key))):
                self._store.delete_key(f"{key}/{number}")
            self._store.delete_key(key)


@dataclass(frozen=True, slots=True)
class Share:
    """A node's part of a save: `.metadata` and what its ranks have written, `.metadata` not among it."""

    metadata: bytes
    written: Mapping[str, Written]

    def content(self, step: int) -> str:
        """As Manifest.content."""
        files = [(name, file.size_bytes, file.digest.crc) for name, file in self.written.items()]
        return content_of(step, steps.PART, [*files, (dcp.METADATA_NAME, len(self.metadata), native.crc64(self.metadata))])


class Follower:
    """Leads a node that is not the coordinator's: does what the coordinator says, in a thread. `stop` gives up what it may."""

    def __init__(self, channel: Channel, node: int, draft: Draft) -> None:
        self._stop = threading.Event()
        arguments = (channel, node, draft, self._stop)
        self._thread = threading.Thread(target=_follow, args=arguments, name="ckptstore-node", daemon=True)
        parallel.start(self._thread)

    def stop(self) -> None:
        """Give up, unless it has been told to commit; the draft is gone then, or left where it is prepared. Waits for that."""
        self._stop.set()
        self._thread.join(SETTLE_S)


def _follow(channel: Channel, node: int, draft: Draft, stop: threading.Event) -> None:
    undecided = False
    try:
        order = _wait(channel, "prepare", node, stop)
        share = Share(base64.b64decode(order["metadata"]), {name: _read(file) for name, file in order["written"].items()})
        group = NodeSet(order["id"], node, order["nodes"], order["digest"])
        manifest = _stage(draft, share, group, order["metrics"], order["created_at"])
        undecided = True
        channel.tell(f"prepared/{node}", {})
        _wait(channel, "commit", None, stop)
        steps.publish(draft, manifest, keep_old=True)
        undecided = False
        channel.tell(f"committed/{node}", {})
        _wait(channel, "settle", None, threading.Event())
        _settle(draft, group)
        channel.tell(f"settled/{node}", {})
    except _GivenUpError as error:
        undecided = undecided and not isinstance(error, _AbortedError)
        what = "leaves its part prepared" if undecided else "gives up"
        _log.info("step %d: this node %s: %s", draft.step, what, error)
    except (CkptStoreError, OSError, RuntimeError) as error:  # RuntimeError: torch's, of the key-value store
        _log.error("step %d: this node's part of the save failed: %s", draft.step, error)
        with contextlib.suppress(RuntimeError):  # nobody is there to be told
            channel.tell(f"failed/{node}", {"why": str(error)})
    finally:
        (steps.leave if undecided else steps.abandon)(draft)


def _wait(channel: Channel, key: str, node: int | None, stop: threading.Event) -> Any:
    deadline = time.monotonic() + channel.timeout_s
    key = key if node is None else f"{key}/{node}"
    while (found := channel.told(key)) is None:
        stopped = stop.wait(POLL_S)
        if channel.told("abort") is not None:
            raise _AbortedError("the coordinator says so")
        if time.monotonic() > deadline:
            raise _GivenUpError(f"no word from the coordinator for {channel.timeout_s:.0f} s")
        if stopped:
            raise _GivenUpError("the save has failed here")
    return found


def commit(channel: Channel, draft: Draft, shares: Sequence[Share], metrics: Mapping[str, float]) -> Manifest:
    """All three phases, by the coordinator, whose own node is the first. Its manifest.

    NotCommitted where no node has the step, CommitUncertain where not all of them may have it.
    """
    nodes = len(shares)
    whole = "\n".join(share.content(draft.step) for share in shares)
    group = NodeSet(draft.name, 0, nodes, hashlib.sha256(whole.encode()).hexdigest())
    others = range(1, nodes)
    deadline = time.monotonic() + channel.timeout_s
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    publishing = False
    try:
        try:
            for node in others:
                channel.tell(f"prepare/{node}", _order(shares[node], group, metrics, now))
            manifest = _stage(draft, shares[0], group, metrics, now)
            _await(channel, "prepared", others, deadline)
            publishing = True
            steps.publish(draft, manifest, keep_old=True)
        except BaseException as error:
            if not publishing or (isinstance(error, CkptStoreError) and not isinstance(error, CommitUncertain)):
                with contextlib.suppress(RuntimeError):  # the store is gone: then they hear nothing more
                    channel.tell("abort", {})
            raise
        try:
            channel.tell("commit", {})
            _await(channel, "committed", others, deadline)
        except (CkptStoreError, RuntimeError) as error:
            raise CommitUncertain(
                f"step {draft.step} is on this node, and not surely on all {nodes}: {error}",
                hint="ckptstore.torch.resume_step brings it to all nodes that have prepared it, and says which step all have; "
                "one that this replaced is in .ckptstore/old-step-…",
            ) from error
        try:
            channel.tell("settle", {})
            _settle(draft, group)
            _await(channel, "settled", others, time.monotonic() + SETTLE_S)
            for key in [f"{word}/{node}" for node in others for word in ("prepare", "prepared", "committed", "settled")]:
                channel.forget(key)
            channel.forget("commit")
        except (CkptStoreError, RuntimeError) as error:  # all nodes have it; what retention knows waits for resume_step
            _log.warning("step %d is whole on all nodes, and a node may not know: %s", draft.step, error)
    except (NotCommitted, CommitUncertain):
        raise
    except (CkptStoreError, RuntimeError) as error:
        hint = error.hint if isinstance(error, CkptStoreError) else "Is the host of torch's key-value store still there?"
        raise NotCommitted(f"step {draft.step} was not saved on any node: {error}", hint=hint) from error
    finally:
        steps.abandon(draft)
    return manifest


def _settle(draft: Draft, group: NodeSet) -> None:
    node_sets.settle(draft.root, draft.step, group)
    prepared.discard(steps.side_of(draft.root), up_to=draft.step)


def _await(channel: Channel, word: str, nodes: Sequence[int], deadline: float) -> None:
    for node in nodes:
        while channel.told(f"{word}/{node}") is None:
            if (failed := channel.told(f"failed/{node}")) is not None:
                raise RankError(f"node {node} failed: {failed['why']}", rank=node)
            if time.monotonic() > deadline:
                raise RankError(f"no word from node {node} in time", rank=node)
            time.sleep(POLL_S)


def _order(share: Share, group: NodeSet, metrics: Mapping[str, float], now: str) -> dict[str, Any]:
    return {
        "id": group.id,
        "nodes": group.nodes,
        "digest": group.digest,
        "metadata": base64.b64encode(share.metadata).decode(),
        "written": {name: [*file.digest, file.size_bytes, file.mtime_ns] for name, file in share.written.items()},
        "metrics": dict(metrics),
        "created_at": now,
    }


def _read(file: Sequence[Any]) -> Written:
    crc, chunks, size_bytes, mtime_ns = file
    return Written(Digest(crc, tuple(chunks)), size_bytes, mtime_ns)


def _stage(draft: Draft, share: Share, group: NodeSet, metrics: Mapping[str, float], now: str) -> Manifest:
    """Write what the ranks have not, and check what they have: all is durable then."""
    digests = {name: file.digest for name, file in share.written.items()}
    digests |= native.write_files(draft.path, {dcp.METADATA_NAME: [share.metadata]}).digests
    manifest = steps.describe(draft, digests, metrics=metrics, group=group, created_at=now)
    for entry in manifest.files:
        file = share.written.get(entry.path)
        if file is not None and file.size_bytes != entry.size_bytes:
            raise IntegrityError(f"{entry.path} has {entry.size_bytes:,} bytes, and {file.size_bytes:,} were written")
    try:  # a draft that is prepared must be found after a power cut
        side_folders.sync_folder(draft.home)
        side_folders.sync_folder(os.path.dirname(draft.home))
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=draft.home) from error
    return manifest


def await_draft(folder: str, timeout_s: float) -> None:
    """Wait for the folder of a draft that another rank of this node begins; for so long at most."""
    deadline = time.monotonic() + timeout_s
    while not os.path.isdir(folder) and time.monotonic() < deadline:
        time.sleep(POLL_S)
