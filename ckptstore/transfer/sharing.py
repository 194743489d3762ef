"""One pull or push by all ranks of a launch that share a disk: their leader plans and commits, each moves a share of the bytes.

    leader                                          the others
    pull, push as always; in the place of moving    wait for a job
    bytes: tell the job, move its own share    →    move theirs, tell that it is done
    wait until all are done                    ←    wait for the next job
    commit; tell the end                       →    see with their own eyes what is there now, and leave

No byte is asked for twice: a pull is shared by chunks, a push by files, since a store takes an object from one process.
Damage that one finds is the leader's error, of this checkpoint. Whoever fails otherwise ends them all (rendezvous.py); what has
arrived stays staged.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ckptstore import manifest as manifests
from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, IntegrityError, from_os_error
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import Status
from ckptstore.names import check_name, check_names
from ckptstore.parts import find_manifest, read_part
from ckptstore.rendezvous import Rendezvous
from ckptstore.transfer import gathering
from ckptstore.transfer.fetching import Wanted
from ckptstore.transfer.pull import Fetched
from ckptstore.transfer.push import send_share
from ckptstore.transfer.receiving import bring

SEEN_WITHIN_S = 20.0  #: network file systems show another machine's rename some seconds later


class Shared:
    """The leader's side: its `bring` and `send` take the place of a single process's in `pull` and `push`."""

    def __init__(self, group: Rendezvous, *, source: Backend | None = None, target: Backend | None = None) -> None:
        self._group, self._source, self._target = group, source, target
        self._numbers = itertools.count()
        self._holders: Mapping[str, Sequence[int]] | None = None

    def bring(
        self,
        source: Backend,
        wanted: Sequence[Wanted],
        target: str,
        *,
        chunk_bytes: int,
        progress: native.Progress | None,
    ) -> Mapping[str, native.Digest]:
        """See receiving.Bringing. Files without recorded digests have one only where this rank fetched them itself."""
        job = {
            "target": os.path.relpath(target, self._group.side),
            "chunk_bytes": chunk_bytes,
            "files": [
                [file.name, file.key, file.size_bytes, None if file.expected is None else [*file.expected], [*file.have]]
                for file in wanted
            ],
        }
        number = self._begin(job)
        mine = share_of(wanted, self._group.index, self._group.size, chunk_bytes=chunk_bytes)
        others = sum(_missing(file, chunk_bytes) for file in wanted) - sum(_missing(file, chunk_bytes) for file in mine)
        total = sum(file.size_bytes for file in wanted)
        unshared = total - sum(file.size_bytes for file in mine)
        done = unshared + sum(file.size_bytes for file in mine) - sum(_missing(file, chunk_bytes) for file in mine)

        def told(done_bytes: int, _: int) -> None:
            nonlocal done
            done = unshared + done_bytes
            self._look(number, done - others, total, progress)

        digests = bring(source, mine, target, chunk_bytes=chunk_bytes, progress=told, crew=self._group.neighbours)
        _sync(target, mine)
        self._finish(number, lambda: self._look(number, done - others, total, progress))
        return digests

    def gather(self, step: int) -> Manifest:
        """The whole of a step of which each node has a part, for `push`; errors as gathering.whole. Each node sends its own."""
        assert self._source is not None
        number = self._begin({"look": step})
        own = gathering.look(self._source, step)
        self._finish(number, self._group.check)
        ranks = self._group.members
        told = [own if rank == self._group.rank else self._group.wait(f"part-{number}-{rank}") for rank in ranks]
        manifest, self._holders = gathering.whole(step, told)
        return manifest

    def send(
        self,
        folder: str,
        base: str,
        manifest: Manifest,
        missing: Sequence[FileEntry],
        *,
        there_bytes: int,
        progress: native.Progress,
    ) -> None:
        """See push.Sending."""
        assert self._source is not None
        assert self._target is not None
        files = [(file.path, file.size_bytes) for file in missing]
        shares = deal(files, self._group.size, holders=self._holders)
        number = self._begin(
            {"folder": folder, "base": base, "manifest": manifest.to_bytes().decode("ascii"), "shares": shares}
        )
        done = there_bytes
        total = manifest.size_bytes

        def told(done_bytes: int, _: int) -> None:
            nonlocal done
            done = there_bytes + done_bytes
            self._look(number, done, total, progress)

        mine = shares[self._group.index]
        crew = self._group.neighbours
        send_share(self._source, self._target, manifest, mine, folder=folder, base=base, crew=crew, progress=told)
        self._finish(number, lambda: self._look(number, done, total, progress))

    def end(self, results: Sequence[Fetched] = ()) -> None:
        """Everything is committed: the others look at it, and may leave."""
        self._group.tell("end", [[os.path.relpath(one.path, self._group.run), one.manifest_sha256] for one in results])

    def _begin(self, job: dict[str, Any]) -> int:
        number = next(self._numbers)
        self._group.tell(f"job-{number}", job)
        return number

    def _look(self, number: int, own_bytes: int, total_bytes: int, progress: native.Progress | None) -> None:
        self._group.check()
        if progress is not None:
            progress(min(own_bytes + self._group.others_bytes(number), total_bytes), total_bytes)

    def _finish(self, number: int, look: Any) -> None:
        others = [rank for rank in self._group.members if rank != self._group.rank]
        found = [self._group.wait(f"done-{number}-{rank}", tick=look) for rank in others]
        for said in found:
            if said.get("damage"):
                raise IntegrityError(said["damage"], hint=said["hint"])


def help_pull(group: Rendezvous, source: Backend) -> None:
    """Fetch this rank's share of each job until the leader says that all is committed, and see that it is there."""

    def work(job: Mapping[str, Any], told: native.Progress) -> None:
        target = os.path.join(group.side, check_name(job["target"]))
        wanted = [
            Wanted(name, key, size, expected, {number: expected[number] for number in have} if expected else {})
            for name, key, size, expected, have in job["files"]
        ]
        check_names(file.name for file in wanted)
        mine = share_of(wanted, group.index, group.size, chunk_bytes=job["chunk_bytes"])
        there = sum(file.size_bytes - _missing(file, job["chunk_bytes"]) for file in mine)
        bring(
            source,
            mine,
            target,
            chunk_bytes=job["chunk_bytes"],
            progress=lambda done, total: told(done - there, total),
            crew=group.neighbours,
        )
        _sync(target, mine)

    for folder, sha256 in _help(group, work):
        _see(group, check_name(folder), sha256)


def help_push(group: Rendezvous, source: Backend, target: Backend) -> None:
    """Send this rank's share of each job until the leader says that all is committed."""

    def work(job: Mapping[str, Any], told: native.Progress) -> None:
        if "look" in job:
            group.tell(f"part-{group.progress[0]}-{group.rank}", gathering.look(source, job["look"]))
            return
        manifest = manifests.parse(job["manifest"].encode("ascii"))
        mine = job["shares"][group.index]
        folder, base = check_name(job["folder"]), check_name(job["base"]) if job["base"] else ""
        send_share(source, target, manifest, mine, folder=folder, base=base, crew=group.neighbours, progress=told)

    _help(group, work)


def _help(group: Rendezvous, work: Any) -> Any:
    """Do each job; what the leader said at the end."""
    for number in itertools.count():
        job = group.wait_any(f"job-{number}", "end")
        if not isinstance(job, dict):
            return job

        def told(done_bytes: int, _: int, number: int = number) -> None:
            group.progress = (number, done_bytes)
            group.check()

        group.progress = (number, 0)
        done = {}
        try:
            work(job, told)
        except IntegrityError as error:  # of this checkpoint: the leader says it, and may have another job
            done = {"damage": f"{error} (found by rank {group.rank})", "hint": error.hint}
        group.tell(f"done-{number}-{group.rank}", done)
    raise AssertionError


def _see(group: Rendezvous, folder: str, sha256: str) -> None:
    """What the leader has committed must be whole for this rank too: on another machine its file system has to show it."""
    backend = LocalBackend(os.path.join(group.run, folder))
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        found = "it is not there"
        try:
            part = read_part(backend, os.path.basename(os.path.dirname(folder)), "", backend.tree(max_depth=5))
            manifest = find_manifest(backend, "")
            found = f"{part.status}: {'; '.join(map(str, part.findings[:2]))}"
            if not sha256 and part.status.usable:
                return
            if part.status is Status.COMMITTED and manifest is not None and manifest.sha256 == sha256:
                return
        except CkptStoreError as error:
            found = str(error)
        if time.monotonic() > deadline:
            raise IntegrityError(
                f"rank {group.rank} does not see {backend.location} as it was committed: {found}",
                hint="Is it the same folder on all machines? `ckptstore verify` reads every byte.",
            )
        time.sleep(0.2)


def share_of(wanted: Sequence[Wanted], index: int, size: int, *, chunk_bytes: int) -> list[Wanted]:
    """The share of rank `index` of `size` in what is missing: one stretch of it, in whole chunks; the rest counts as there.

    Of files without digests each rank gets whole ones.
    """
    total = sum(_missing(file, chunk_bytes) for file in wanted)
    begin, end = total * index // size, total * (index + 1) // size
    mine = []
    position = 0
    for file in wanted:
        if file.expected is None:
            if begin <= position < end or (position == total and index == size - 1):
                mine.append(file)
            position += file.size_bytes
            continue
        have = dict(file.have)
        for number, crc in enumerate(file.expected):
            if number not in file.have:
                if not begin <= position < end:
                    have[number] = crc
                position += min(chunk_bytes, file.size_bytes - number * chunk_bytes)
        mine.append(Wanted(file.name, file.key, file.size_bytes, file.expected, have))
    return mine


def deal(files: Sequence[tuple[str, int]], size: int, *, holders: Mapping[str, Sequence[int]] | None = None) -> list[list[str]]:
    """Names in `size` shares of about the same bytes: the largest first, each to who has least, of those who hold it."""
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name, size_bytes in sorted(files, key=lambda file: (-file[1], file[0])):
        least = min(range(size) if holders is None else holders[name], key=loads.__getitem__)
        shares[least].append(name)
        loads[least] += size_bytes
    return shares


def _missing(file: Wanted, chunk_bytes: int) -> int:
    return file.size_bytes - sum(min(chunk_bytes, file.size_bytes - number * chunk_bytes) for number in file.have)


def _sync(target: str, mine: Sequence[Wanted]) -> None:
    """What this rank wrote must be on the disk before the leader commits it: no other machine can see to that."""
    for file in mine:
        path = os.path.join(target, file.name)
        try:
            native.fsync_path(path)
        except OSError as error:
            raise from_os_error(error, doing="syncing", path=path) from error
