"""What dead pushes left below a run's URL: found in a listing, removed when nobody can be at work on it any more.

- a claim without a manifest, and the files that it names: a push that was killed. Files that it does not name are others'
- a claim beside a manifest: its push committed, and was killed before it took the claim away. Nothing else is touched there
- scratch keys with which a push tried what the store can do
- multipart uploads that were never finished: no key shows them, and they cost money

All of it must be older than the caller says, and so must everything else below the same prefix: a push shows itself by a claim
written anew when it goes on, by each file that arrives, and by the uploads that it begins. Right before a removal the prefix is
listed again: where anything changed, it stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckptstore.backends.base import Backend, Blob
from ckptstore.backends.s3control import S3Control, Upload, control
from ckptstore.conditions import PROBE
from ckptstore.errors import AccessError, NotFoundError, UnavailableError
from ckptstore.model import MANIFEST_NAME
from ckptstore.push import CLAIM, MAX_CLAIM_BYTES


class Leftover(NamedTuple):
    """One thing to remove. `name` is a key, or a prefix with a `/` at its end."""

    name: str
    why: str
    newest_ns: int  #: when the store last got something there, by its clock
    blobs: tuple[Blob, ...] = ()  #: to delete, in this order
    seen: frozenset[Blob] = frozenset()  #: all that lay below the prefix
    upload: Upload | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the keys; those of an unfinished upload are not known."""
        return sum(blob.size_bytes for blob in self.blobs)


class Found(NamedTuple):
    """What is left over, and what could not be looked for, or is left alone and why."""

    leftovers: tuple[Leftover, ...]
    notes: tuple[str, ...]


def judge(folder: str, blobs: Sequence[Blob], named: frozenset[str], *, cutoff_ns: int) -> Leftover | None:
    """What is left over in `folder`, which has a claim. `blobs` is its listing, `named` the files that its claim names."""
    newest = max(blob.mtime_ns for blob in blobs)
    claim = [blob for blob in blobs if blob.key == f"{folder}/{CLAIM}"]
    if newest > cutoff_ns or not claim:
        return None
    if any(blob.key == f"{folder}/{MANIFEST_NAME}" for blob in blobs):
        why = "a claim that a push left after it had committed; the checkpoint stays"
        return Leftover(claim[0].key, why, newest, tuple(claim), frozenset(blobs))
    files = [blob for blob in blobs if blob.key.removeprefix(f"{folder}/") in named]
    # The claim goes last: until then nobody takes the rest for somebody else's files.
    return Leftover(f"{folder}/", "a push that never committed", newest, (*files, *claim), frozenset(blobs))


def find(backend: Backend, *, older_than_s: float) -> Found:
    """What is left over below a run's URL and older than that. Reads only; errors as Backend's. NotFoundError for nothing."""
    notes: list[str] = []
    uploads: list[Upload] = []
    now_ns = time.time_ns()
    try:
        store = control(backend)
        now_ns = min(now_ns, store.now_ns())  # a clock here that is ahead must not make a live push look dead
        uploads = list(store.uploads())
    except (UnavailableError, AccessError) as error:
        notes.append(f"unfinished uploads were not looked for: {error}. {error.hint}".strip())
    cutoff_ns = now_ns - int(older_than_s * 1e9)
    claimed, found, empty = [], [], True
    for blob in backend.list():
        empty = False
        folder, _, name = blob.key.rpartition("/")
        if name == CLAIM:
            claimed.append(folder)
        elif name.startswith(PROBE) and blob.mtime_ns <= cutoff_ns:
            found.append(Leftover(blob.key, "a scratch key of a push", blob.mtime_ns, (blob,)))
    if empty and not uploads:
        raise NotFoundError(f"there is nothing below {backend.location}")
    for folder in claimed:
        blobs = list(backend.list(folder))
        alive = any(upload.begun_ns > cutoff_ns for upload in uploads if upload.key.startswith(f"{folder}/"))
        named = _named(backend, folder)
        leftover = None if alive or not blobs else judge(folder, blobs, named, cutoff_ns=cutoff_ns)
        if leftover is not None:
            found.append(leftover)
            notes.extend(_others(backend, leftover, folder))
    found += [
        Leftover(upload.key, "an upload that was never finished", upload.begun_ns, upload=upload)
        for upload in uploads
        if upload.begun_ns <= cutoff_ns
    ]
    return Found(tuple(found), tuple(notes))


def remove(backend: Backend, leftovers: Sequence[Leftover]) -> Iterator[tuple[Leftover, bool]]:
    """Remove them one by one, and say of each whether it went; one below whose prefix anything changed since stays."""
    store: S3Control | None = None
    for leftover in leftovers:
        if leftover.upload is not None:
            store = store or control(backend)
            store.abort(leftover.upload)
        elif leftover.seen and frozenset(backend.list(leftover.blobs[-1].key.rpartition("/")[0])) != leftover.seen:
            yield leftover, False
            continue
        for blob in leftover.blobs:
            backend.delete(blob.key)
        yield leftover, True


def _named(backend: Backend, folder: str) -> frozenset[str]:
    """The files that a claim names; none where it cannot be read, so that none is removed."""
    try:
        claim = json.loads(backend.get(f"{folder}/{CLAIM}", length_bytes=MAX_CLAIM_BYTES))
        return frozenset(name for name in claim["files"] if isinstance(name, str))
    except (NotFoundError, ValueError, RecursionError, KeyError, TypeError):
        return frozenset()


def _others(backend: Backend, leftover: Leftover, folder: str) -> Iterator[str]:
    """Says what stays in a dead push's prefix."""
    others = leftover.seen - set(leftover.blobs)
    if leftover.name.endswith("/") and others:
        first = min(blob.key for blob in others)
        yield f"{backend.location}/{folder} holds {len(others)} files that its claim does not name ({first}): they stay"
