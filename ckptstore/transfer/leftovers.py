"""Leftovers of pushes in an object store: what dead writers claimed, attempts that lost, files that a replacement left behind.

`find` is a pure function over one listing. What counts, by the claims' rules (claims.py):

- a folder that is claimed, with no manifest, or one whose files lie in an attempt: the claim, and the files that it names
- an attempt that no manifest names: all of it
- a claim beside files that count: the claim alone
- what somebody who removed them has left of these, and his mark
- scratch keys: with which a push tried what the store can do, and files that fsspec was writing; not beside a claim that is
  renewed
- multipart uploads that were never finished (unfinished.py): no key shows them, and they cost money. Beside a claim that is
  renewed they stay, however old: a push goes on with them

What no claim names and no attempt holds is never among them: another tool may have brought it. Nor is what is younger than the
bound, by its newest key, by an upload below it or by the manifest that made it useless: a living push renews its claim, and a
reader may still read.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ckptstore import parallel
from ckptstore.backends.base import Backend, Blob
from ckptstore.backends.object import ObjectBackend
from ckptstore.backends.s3control import Upload, control
from ckptstore.errors import ManifestError, NotFoundError, UnavailableError
from ckptstore.manifest import parse
from ckptstore.model import ATTEMPT_PREFIX, CLAIM_NAME, DRAFT_PREFIX, MANIFEST_NAME, REMOVING_PREFIX
from ckptstore.parts import read_manifest
from ckptstore.sizes import counted
from ckptstore.transfer import claims, unfinished
from ckptstore.transfer.conditions import PROBE

THREADS = 8
_DRAFT = re.compile(re.escape(DRAFT_PREFIX) + "[0-9a-f]{16}")


class Leftover(NamedTuple):
    """Keys that no reader takes for a checkpoint. `files_folder` is `folder`, or an attempt in it; both "" for a lone key."""

    folder: str
    files_folder: str
    keys: tuple[str, ...]
    size_bytes: int
    newest_ns: int  #: when the store last got something there, by its clock
    why: str
    others: tuple[str, ...] = ()  #: keys there that no claim names: they stay
    upload: Upload | None = None  #: never finished; its bytes are not known

    @property
    def name(self) -> str:
        """Its one key, or a prefix with a `/` at its end."""
        lone = not self.folder or (len(self.keys) == 1 and _is_sign(self.keys[0]))
        return self.keys[0] if lone else f"{self.files_folder}/"


class Found(NamedTuple):
    """What is left over, and what could not be looked for, or is left alone and why."""

    leftovers: tuple[Leftover, ...]
    notes: tuple[str, ...]


def disputed(blobs: Iterable[Blob]) -> dict[str, int]:
    """Folders with a manifest, and a claim or an attempt besides, with the manifest's time: `find` must know their base."""
    blobs = list(blobs)
    manifests = {above: blob.mtime_ns for blob in blobs if (above := _above(blob.key, MANIFEST_NAME)) is not None}
    return {folder: manifests[folder] for folder in {_place(blob.key)[0] for blob in blobs} if folder in manifests}


def claimed(blobs: Iterable[Blob]) -> list[str]:
    """Folders with a claim, attempts left out: `find` must know the files that it names."""
    return [above for blob in blobs if (above := _above(blob.key, CLAIM_NAME)) is not None and not _place(blob.key)[1]]


def find(
    blobs: Iterable[Blob],
    bases: Mapping[str, str],
    named: Mapping[str, frozenset[str]],
    *,
    older_than_ns: int,
    uploads: Sequence[Upload] = (),
) -> list[Leftover]:
    """The leftovers in a listing of which nothing is newer than `older_than_ns` (Unix time).

    `bases`: what the manifest of each `disputed` folder says; of one that is not in it nothing is touched. `named`: the files
    that each claim names; others stay.
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
    found: list[Leftover] = []
    for (folder, attempt), group in sorted(marked.items()):
        if folder in committed and folder not in bases:
            continue
        files_folder = f"{folder}/{attempt}" if attempt else folder
        counts = folder in committed and bases[folder] == attempt
        claim = [blob for blob in group if _is_sign(blob.key) and blob.key.rpartition("/")[0] == files_folder]
        claim.sort(key=lambda blob: blob.key.endswith(CLAIM_NAME))
        files = [blob for blob in group if blob not in claim and not _is_scratch(blob.key)]
        ours = {f"{folder}/{name}" for name in named.get(folder, ())}
        others = [] if attempt or counts else [blob.key for blob in files if blob.key not in ours]
        doomed = claim if counts else [*(blob for blob in files if blob.key not in others), *claim]
        times = [blob.mtime_ns for blob in group]
        times += [upload.begun_ns for upload in uploads if upload.key.startswith(f"{files_folder}/")]
        times += [committed[folder]] if folder in committed else []
        if not doomed or (newest := max(times)) > older_than_ns:
            continue
        why = (
            "a claim that was not taken away" if counts else "replaced, or lost" if folder in committed else "a push cut short"
        )
        size = sum(blob.size_bytes for blob in doomed)
        keys = tuple(blob.key for blob in doomed)
        found.append(Leftover(folder, files_folder, keys, size, newest, why, tuple(others)))
    living = [
        f"{above}/" for blob in blobs if (above := _above(blob.key, CLAIM_NAME)) is not None and blob.mtime_ns > older_than_ns
    ]
    found += (
        Leftover("", "", (blob.key,), blob.size_bytes, blob.mtime_ns, "a scratch key of a push")
        for blob in blobs
        if _is_scratch(blob.key) and blob.mtime_ns <= older_than_ns and not blob.key.startswith(tuple(living))
    )
    found += (
        Leftover("", "", (upload.key,), 0, upload.begun_ns, "an upload that was never finished", upload=upload)
        for upload in uploads
        if upload.begun_ns <= older_than_ns and not upload.key.startswith(tuple(living))
    )
    return found


def look(target: Backend, *, older_than_s: float) -> Found:
    """The leftovers below a run's URL. A manifest that cannot be trusted keeps all beside it. NotFoundError for nothing there.

    Reads only; errors as Backend's. Ages are counted by the store's clock where it can be asked and is behind this machine's.
    """
    uploads, now_ns, note = unfinished.look(target)
    blobs = list(target.list())
    if not blobs and not uploads:
        raise NotFoundError(f"there is nothing below {target.location}")
    bases = {}
    for folder in disputed(blobs):
        try:
            bases[folder] = read_manifest(target, folder).base
        except (ManifestError, NotFoundError):
            continue
    named = {folder: claims.files_of(target, folder) for folder in claimed(blobs)}
    found = find(blobs, bases, named, older_than_ns=now_ns - int(older_than_s * 1e9), uploads=uploads)
    notes = [note] if note else []
    notes += [
        f"{target.location}/{one.files_folder} holds {counted(len(one.others), 'file')} that its claim does not name "
        f"({one.others[0]}): {'they stay' if len(one.others) > 1 else 'it stays'}"
        for one in found
        if one.others
    ]
    return Found(tuple(found), tuple(notes))


def remove(target: Backend, leftover: Leftover) -> bool:
    """Remove one that `look` found, unless somebody has come back to it since; whether it is gone.

    A push that comes now finds the mark of somebody who removes, and keeps out (claims.py). A kill leaves claim and mark, to
    be found again.
    """
    if leftover.upload is not None:
        unfinished.abort(target, leftover.upload)
        return True
    if not leftover.folder:
        target.delete(leftover.keys[0])
        return True
    folder = leftover.files_folder
    signs = [key for key in leftover.keys if _is_sign(key) and key.rpartition("/")[0] == folder]
    files = [key for key in leftover.keys if key not in signs]
    if _newer(target, leftover):
        return False
    if not files and _counts(leftover, _manifest(target, leftover)):
        for key in signs:
            target.delete(key)
        return True
    mark = claims.mark(target, folder)
    before = _manifest(target, leftover)
    if _newer(target, leftover) or _counts(leftover, before):  # somebody came back while we looked
        target.delete(mark)
        return False
    parallel.each(files, lambda key, _: target.delete(key), threads=THREADS)
    now = _manifest(target, leftover)
    if _counts(leftover, now):  # who committed it looks for our mark; here it is done for one that died before
        claims.take_back(target, f"{leftover.folder}/{MANIFEST_NAME}", now, before=before)
    for key in (*signs, mark):
        target.delete(key)
    return True


def frees(target: Backend) -> bool | None:
    """Whether what is removed there frees its bytes: False where the store keeps old versions, None where it does not tell.

    Found out by removing a key that is not there. AccessError where nothing may be removed: better before a mark is put.
    """
    if not isinstance(target, ObjectBackend):  # what a file system says of such a key is up to it
        return None
    key = f"{PROBE}{secrets.token_hex(8)}"
    try:
        return control(target).remove(key)
    except UnavailableError:
        target.delete(key)
        return None


def _newer(target: Backend, leftover: Leftover) -> bool:
    """Whether something came there since it was looked at."""
    found = target.list(leftover.files_folder)
    return any(blob.mtime_ns > leftover.newest_ns and not _is_mark(blob.key) for blob in found)


def _manifest(target: Backend, leftover: Leftover) -> bytes:
    """The manifest of the folder; nothing where there is none."""
    try:
        return target.get(f"{leftover.folder}/{MANIFEST_NAME}")
    except NotFoundError:
        return b""


def _counts(leftover: Leftover, manifest: bytes) -> bool:
    """Whether the manifest names these files."""
    if not manifest:
        return False
    base = parse(manifest).base
    return leftover.files_folder == (f"{leftover.folder}/{base}" if base else leftover.folder)


def _is_sign(key: str) -> bool:
    """A claim, or a mark of somebody who removes."""
    return key.rpartition("/")[2] == CLAIM_NAME or _is_mark(key)


def _is_mark(key: str) -> bool:
    return key.rpartition("/")[2].startswith(REMOVING_PREFIX)


def _is_scratch(key: str) -> bool:
    """Of conditions.py, or a file on its way to its name (backends/fsspec.py)."""
    name = key.rpartition("/")[2]
    return name.startswith(PROBE) or _DRAFT.fullmatch(name) is not None


def _place(key: str) -> tuple[str, str]:
    """Folder and attempt of a key that belongs to a push by its name: a claim, or anything in an attempt; else two times ""."""
    names = key.split("/")
    for depth, name in enumerate(names[:-1]):
        if name.startswith(ATTEMPT_PREFIX):
            return "/".join(names[:depth]), name
    return ("/".join(names[:-1]), "") if _is_sign(key) else ("", "")


def _above(key: str, name: str) -> str | None:
    above, _, last = key.rpartition("/")
    return above if last == name else None


def _parents(key: str) -> Iterable[str]:
    while key := key.rpartition("/")[0]:
        yield key
