"""Leftovers of pushes in an object store: what dead writers claimed, attempts that lost, files that a replacement left behind.

`find` is a pure function over one listing. What counts, by the claims' rules (claims.py):

- a folder that is claimed, with no manifest, or one whose files lie in an attempt: all files beside the claim
- an attempt that no manifest names: all of it
- a claim beside files that count: the claim alone

What nobody claimed and no attempt holds is never among them: another tool may have brought it. Nor is what is younger than the
bound, by its newest key or by the manifest that made it useless: a living push renews its claim, a reader may still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ckptstore import claims, parallel
from ckptstore.backends.base import Backend, Blob
from ckptstore.errors import ManifestError, NotFoundError
from ckptstore.model import ATTEMPT_PREFIX, CLAIM_NAME, MANIFEST_NAME
from ckptstore.parts import read_manifest

THREADS = 8


class Leftover(NamedTuple):
    """Keys that no reader takes for a checkpoint. `files_folder` is `folder`, or an attempt in it."""

    folder: str
    files_folder: str
    keys: tuple[str, ...]
    size_bytes: int
    newest_ns: int
    why: str


def disputed(blobs: Iterable[Blob]) -> dict[str, int]:
    """Folders with a manifest, and a claim or an attempt besides, with the manifest's time: `find` must know their base."""
    blobs = list(blobs)
    manifests = {above: blob.mtime_ns for blob in blobs if (above := _above(blob.key, MANIFEST_NAME)) is not None}
    return {folder: manifests[folder] for folder in {_place(blob.key)[0] for blob in blobs} if folder in manifests}


def find(blobs: Iterable[Blob], bases: Mapping[str, str], *, older_than_ns: int) -> list[Leftover]:
    """The leftovers in a listing of which nothing is newer than `older_than_ns` (Unix time).

    `bases`: what the manifest of each `disputed` folder says; of one that is not in it nothing is touched.
    """
    blobs = list(blobs)
    committed = disputed(blobs)
    marked: dict[tuple[str, str], list[Blob]] = {place: [] for blob in blobs if (place := _place(blob.key))[0]}
    folders = {folder for folder, _ in marked}
    folders |= {above for blob in blobs if (above := _above(blob.key, MANIFEST_NAME)) is not None}
    for blob in blobs:
        place = _place(blob.key)
        if place not in marked:  # a file beside the claim: of the nearest folder that is somebody's
            place = (next((above for above in _parents(blob.key) if above in folders), ""), "")
        if place in marked and blob.key != f"{place[0]}/{MANIFEST_NAME}":
            marked[place].append(blob)
    found = []
    for (folder, attempt), group in sorted(marked.items()):
        if folder in committed and folder not in bases:
            continue
        files_folder = f"{folder}/{attempt}" if attempt else folder
        counts = folder in committed and bases[folder] == attempt
        claim = [blob for blob in group if blob.key == f"{files_folder}/{CLAIM_NAME}"]
        doomed = claim if counts else [*(blob for blob in group if blob not in claim), *claim]
        newest = max([blob.mtime_ns for blob in group] + ([committed[folder]] if folder in committed else []), default=0)
        if not doomed or newest > older_than_ns:
            continue
        why = (
            "a claim that was not taken away" if counts else "replaced, or lost" if folder in committed else "a push cut short"
        )
        size = sum(blob.size_bytes for blob in doomed)
        found.append(Leftover(folder, files_folder, tuple(blob.key for blob in doomed), size, newest, why))
    return found


def look(target: Backend, *, older_than_ns: int) -> list[Leftover]:
    """The leftovers below a run's URL. A manifest that cannot be trusted keeps all beside it."""
    blobs = list(target.list())
    bases = {}
    for folder in disputed(blobs):
        try:
            bases[folder] = read_manifest(target, folder).base
        except (ManifestError, NotFoundError):
            continue
    return find(blobs, bases, older_than_ns=older_than_ns)


def remove(target: Backend, leftover: Leftover) -> bool:
    """Remove one that `look` found, unless somebody has come back to it since; whether it is gone.

    A push that comes now finds the claim of somebody who removes, and keeps out. A kill leaves the claim, to be found again.
    """
    folder = leftover.files_folder
    if any(blob.mtime_ns > leftover.newest_ns for blob in target.list(folder)):
        return False
    claim = f"{folder}/{CLAIM_NAME}"
    if leftover.keys == (claim,) and _counts(target, leftover):
        target.delete(claim)
        return True
    claims.renew(target, folder, claims.CLEANING)
    if _counts(target, leftover):  # committed while we looked
        target.delete(claim)
        return False
    files: Sequence[str] = [key for key in leftover.keys if key != claim]
    parallel.each(files, lambda key, _: target.delete(key), threads=THREADS)
    target.delete(claim)
    return True


def _counts(target: Backend, leftover: Leftover) -> bool:
    try:
        base = read_manifest(target, leftover.folder).base
    except NotFoundError:
        return False
    return leftover.files_folder == (f"{leftover.folder}/{base}" if base else leftover.folder)


def _place(key: str) -> tuple[str, str]:
    """Folder and attempt of a key that belongs to a push by its name: a claim, or anything in an attempt; else two times ""."""
    names = key.split("/")
    for depth, name in enumerate(names[:-1]):
        if name.startswith(ATTEMPT_PREFIX):
            return "/".join(names[:depth]), name
    return ("/".join(names[:-1]), "") if names[-1] == CLAIM_NAME else ("", "")


def _above(key: str, name: str) -> str | None:
    above, _, last = key.rpartition("/")
    return above if last == name else None


def _parents(key: str) -> Iterable[str]:
    while key := key.rpartition("/")[0]:
        yield key
