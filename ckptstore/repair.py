"""Repair: make the damaged files of a checkpoint what its manifest records, from another place that has the same one.

Here, from a URL or another folder:

1  find       every byte read; each file's damaged chunks by the manifest's digests
2  fill       a new file in a stage: the right chunks from the old one, the others fetched, all of them checked
3  exchange   durable and read back, it takes the old one's name in one rename. The old one is proven wrong by then
4  verify     the whole checkpoint

At a URL, from a folder here: damaged and missing files are sent anew, each checked on its way and replaced in one act.

A kill leaves each file as it was or whole; the same command goes on. Nothing is written where bytes differ and the times say
that somebody wrote there since, unless `force` says that it was no save.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckptstore import native
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.errors import (
    AccessError,
    CkptStoreError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    StorageError,
    UsageError,
    from_os_error,
)
from ckptstore.frameworks.areal import layout
from ckptstore.listing import scan
from ckptstore.lock import RunLock
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import MANIFEST_NAME, Checkpoint, FileInfo, Level, Part
from ckptstore.parts import as_recorded, files_folder_of, find_manifest, folder_of, look_again, read_manifest
from ckptstore.sizes import counted
from ckptstore.transfer import push
from ckptstore.transfer.fetching import Wanted, fetch
from ckptstore.transfer.receiving import fill
from ckptstore.verify import Notify, Report, verify_all


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with one file, and how much of it must come from elsewhere (at most, where its length changed)."""

    part: str
    entry: FileEntry
    kind: str  #: missing, size, bytes, unreadable, or time: only that changed
    problem: str
    bad_chunks: int
    bad_bytes: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was found, what of it was made right, and what could not be, each with the reason."""

    damages: tuple[Damage, ...]
    repaired: tuple[Damage, ...]
    failed: tuple[tuple[Damage, str], ...]
    moved_bytes: int  #: that came from, or went to, the other place
    report: Report | None  #: of the whole checkpoint afterwards; None where nothing was done

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return not self.damages if self.report is None else not self.failed and self.report.ok


@dataclass(frozen=True, slots=True)
class _Pair:
    """A part here, its manifest, and the same part at the other place."""

    part: Part
    manifest: Manifest
    twin: Part


def repair(
    backend: Backend,
    checkpoint: Checkpoint,
    replica: Backend,
    *,
    force: bool = False,
    dry_run: bool = False,
    notify: Notify | None = None,
) -> Repaired:
    """Repair one checkpoint of the run `backend` from the run `replica`, one of which is a folder. Reads all of it.

    NotFoundError where the replica has no such step; IntegrityError where it has other bytes, or none of both has a manifest
    that counts; RefusedError for files that were written since, BusyError while another ckptstore is at work. What the
    replica has damaged too is in the result, and the rest is repaired.
    """
    if not backend.is_folder and not replica.is_folder:
        raise UsageError("one of the two must be a folder of this machine", hint="Pull it from the good one first.")
    there = scan(replica)
    pairs = [_pair(backend, part, replica, there.at_step(checkpoint.step)) for part in checkpoint.parts]
    found = [(pair, damage) for pair in pairs for damage in find(backend, pair.part, pair.manifest, notify=notify)]
    for pair in pairs:
        _refuse_newer(pair, [damage for other, damage in found if other is pair], force=force)
    damages = tuple(damage for _, damage in found)
    if dry_run or not found:
        return Repaired(damages, (), (), 0, None)
    if backend.is_folder:
        side = side_folders.side_folder(backend.location, f"{backend.location}/{layout.MAIN_PART}/{layout.SLOT}")
        side_folders.make_side(side)
        with RunLock(side, f"repairing step {checkpoint.step}"):
            stage = side_folders.open_stage(side, f"repair {' '.join(pair.manifest.commit for pair in pairs)}")
            done, failed, moved = _each(found, lambda pair, damage: _renew(replica, pair, damage, stage, notify))
            side_folders.discard(side, os.path.basename(stage.path))
    else:
        done, failed, moved = _each(found, lambda pair, damage: _resend(replica, pair, damage, backend, notify))
    now = next(other for other in scan(backend).checkpoints if _same(other, checkpoint))
    # At a URL all that was not sent anew was read just now, and what was sent has been read again.
    (report,) = verify_all(backend, [now], Level.FULL if backend.is_folder else Level.QUICK, notify)
    return Repaired(damages, tuple(done), tuple(failed), moved, report)


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return [part.path for part in one.parts] == [part.path for part in other.parts]


def _pair(backend: Backend, part: Part, replica: Backend, there: Sequence[Checkpoint]) -> _Pair:
    try:
        manifest = read_manifest(backend, folder_of(backend, part))
    except (NotFoundError, IntegrityError) as error:
        raise IntegrityError(
            f"{part.path} has no manifest that counts, so that nobody can tell what its bytes should be: {error}",
            hint="Bring the other one under a name of its own: ckptstore pull --to another folder.",
        ) from None
    twins = [twin for found in there for twin in found.parts if twin.name == part.name]
    for twin in twins:
        theirs = find_manifest(replica, folder_of(replica, twin))
        if theirs is None or theirs.content == manifest.content:
            return _Pair(part, manifest, twin)
    if twins:
        raise IntegrityError(
            f"{twins[0].path} has other bytes than {part.path}: by their manifests both are right",
            hint="They are two histories of the run. Use one of them; repair it from a copy of its own.",
        )
    raise NotFoundError(f"{replica.location} has no copy of {part.path}", hint="`ckptstore list --run URL` shows what it has.")


# --- what is wrong --------------------------------------------------------------------------------------------------


def find(backend: Backend, part: Part, manifest: Manifest, *, only: str = "", notify: Notify | None = None) -> list[Damage]:
    """The damaged files of a part, or whether `only` that file is; every byte is read. Extra files are no damage.

    SourceChangedError for one that is written meanwhile; what a store does not answer is raised, too.
    """
    present = {file.name: file for file in part.files}
    entries = [entry for entry in manifest.files if not only or entry.path == only]
    specs = [present[entry.path] for entry in entries if entry.path in present and present[entry.path].kind == "file"]

    def progress(done_bytes: int, total_bytes: int) -> None:
        if notify is not None:
            notify(f"reading {part.name}", done_bytes, total_bytes)

    digests: Mapping[str, native.Digest | CkptStoreError]
    if backend.is_folder:
        wanted = [native.FileSpec(file.name, file.size_bytes, file.mtime_ns, file.inode) for file in specs]
        digests = native.digest_files(part.path, wanted, chunk_bytes=manifest.chunk_bytes, progress=progress)
    else:
        above = files_folder_of(backend, part)
        keys = [Wanted(file.name, f"{above}/{file.name}", file.size_bytes) for file in specs]
        digests = fetch(backend, keys, chunk_bytes=manifest.chunk_bytes, progress=progress)
    judged = (_judge(part, entry, present.get(entry.path), digests.get(entry.path), manifest.chunk_bytes) for entry in entries)
    return [damage for damage in judged if damage is not None]


def _judge(
    part: Part, entry: FileEntry, file: FileInfo | None, digest: native.Digest | CkptStoreError | None, chunk_bytes: int
) -> Damage | None:
    def damage(kind: str, problem: str, bad: Sequence[int]) -> Damage:
        bad_bytes = sum(_length(entry.size_bytes, number, chunk_bytes) for number in bad)
        return Damage(part.name, entry, kind, problem, len(bad), bad_bytes)

    every = range(len(entry.chunks))
    if file is None:
        return damage("missing", "missing", every)
    if digest is None:
        raise RefusedError(f"{part.path}/{entry.path} is a {file.kind}, not a file: it is not written through or over")
    if isinstance(digest, SourceChangedError):
        raise digest
    if isinstance(digest, CkptStoreError):
        if "://" in part.path and isinstance(digest, (StorageError, AccessError)):
            raise digest  # a store that does not answer says nothing of its bytes
        return damage("unreadable", f"cannot be read: {digest}", every)
    bad = [
        number
        for number, crc in enumerate(entry.chunks)
        if number >= len(digest.chunks)
        or digest.chunks[number] != crc
        or _length(file.size_bytes, number, chunk_bytes) != _length(entry.size_bytes, number, chunk_bytes)
    ]
    if file.size_bytes != entry.size_bytes:
        return damage("size", f"has {file.size_bytes:,} bytes, not {entry.size_bytes:,}", bad)
    if bad:
        return damage("bytes", f"{len(bad)} of {len(every)} chunks are not what the manifest records", bad)
    if "://" not in part.path and file.mtime_ns != entry.mtime_ns:
        return damage("time", "its time changed, its bytes did not", ())
    return None


def _length(size_bytes: int, number: int, chunk_bytes: int) -> int:
    return max(min(chunk_bytes, size_bytes - number * chunk_bytes), 0)


def _refuse_newer(pair: _Pair, damages: Sequence[Damage], *, force: bool) -> None:
    """A file that somebody has written since may be a save of the trainer's, and no damage."""
    files = pair.part.files if "://" not in pair.part.path else as_recorded(pair.part.files, pair.manifest)
    seen = pair.manifest.inspect(files)
    if seen.extra:
        raise RefusedError(
            f"{pair.part.path} has {counted(len(seen.extra), 'file')} that its manifest does not know ({seen.extra[0]})",
            hint="Something was saved there since. Move it away if it was not, then repair.",
        )
    newer = [damage for damage in damages if damage.entry.path in seen.changed and damage.kind != "time"]
    if newer and not force:
        raise RefusedError(
            f"{pair.part.path}/{newer[0].entry.path} was written after its manifest was made: it may be a newer save",
            hint="If nobody saved there, say --force: the file is replaced by the one that the manifest describes.",
        )


# --- making it right ------------------------------------------------------------------------------------------------


def _each(
    found: Sequence[tuple[_Pair, Damage]], work: Callable[[_Pair, Damage], int]
) -> tuple[list[Damage], list[tuple[Damage, str]], int]:
    """What was made right, what could not be since the other place has it damaged too, and the bytes that were moved."""
    done: list[Damage] = []
    failed: list[tuple[Damage, str]] = []
    moved = 0
    for pair, damage in found:
        try:
            moved += work(pair, damage)
        except (IntegrityError, NotFoundError) as error:
            failed.append((damage, str(error)))
        else:
            done.append(damage)
    return done, failed, moved


def _twin_file(pair: _Pair, entry: FileEntry) -> FileInfo:
    """The file at the other place."""
    theirs = next((file for file in pair.twin.files if file.name == entry.path), None)
    if theirs is None:
        raise NotFoundError(f"{pair.twin.files_path}/{entry.path} is missing too")
    if theirs.size_bytes != entry.size_bytes or theirs.kind != "file":
        raise IntegrityError(f"{pair.twin.files_path}/{entry.path} is damaged too: it has {theirs.size_bytes:,} bytes")
    return theirs


def _renew(replica: Backend, pair: _Pair, damage: Damage, stage: side_folders.Stage, notify: Notify | None) -> int:
    """Put a whole file in the place of a damaged one of this machine."""
    entry = damage.entry
    target = os.path.join(pair.part.path, entry.path)
    try:
        before = os.stat(target, follow_symlinks=False) if damage.kind != "missing" else None
        if damage.kind == "time":
            os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
            native.fsync_path(target)
            return 0
        theirs = _twin_file(pair, entry)
        folder = stage.part(f"file-{hashlib.sha256(f'{damage.part}/{entry.path}'.encode()).hexdigest()[:16]}")
        staged = os.path.join(folder, entry.path)
        if before is not None and damage.kind != "unreadable" and not os.path.lexists(staged):
            _copy(pair.part.path, entry, before, folder)
        wanted = theirs._replace(mtime_ns=entry.mtime_ns, inode=0)

        def progress(done_bytes: int, total_bytes: int) -> None:
            if notify is not None:
                notify(f"repairing {entry.path}", done_bytes, total_bytes)

        twin = dataclasses.replace(pair.twin, files=(wanted,))
        kept = fill(replica, twin, pair.manifest, folder, progress=progress).kept_bytes
        _read_back(folder, entry, pair.manifest)
        model = before or os.stat(os.path.join(pair.part.path, MANIFEST_NAME))
        side_folders.like(staged, model, mode=model.st_mode & 0o666)
        parent = os.path.dirname(target)
        os.makedirs(parent, exist_ok=True)
        _refuse_changed(target, before)
        os.rename(staged, target)
        side_folders.sync_folder(parent)
        if parent != pair.part.path:
            side_folders.sync_folder(os.path.dirname(parent))
    except OSError as error:
        raise from_os_error(error, doing="repairing", path=target) from error
    return entry.size_bytes - kept


def _copy(root: str, entry: FileEntry, seen: os.stat_result, folder: str) -> None:
    """The damaged file into the stage, as long as it should be: what is right of it need not come from elsewhere."""
    draft = f"{folder}-copy"
    side_folders.remove_tree(draft)
    os.makedirs(draft, 0o700)
    native.copy_files(root, draft, [native.FileSpec(entry.path, seen.st_size, seen.st_mtime_ns, seen.st_ino)])
    os.chmod(os.path.join(draft, entry.path), 0o600)
    os.truncate(os.path.join(draft, entry.path), entry.size_bytes)
    side_folders.remove_tree(folder)
    os.rename(draft, folder)


def _read_back(folder: str, entry: FileEntry, manifest: Manifest) -> None:
    """StorageError where the disk gives back other bytes than were written."""
    spec = native.FileSpec(entry.path, entry.size_bytes, expected=entry.chunks)
    (result,) = native.digest_files(folder, [spec], chunk_bytes=manifest.chunk_bytes, direct=True).values()
    if isinstance(result, CkptStoreError):
        raise StorageError(str(result), operation="reading back", path=folder, errno=errno.EIO, hint=result.hint)


def _refuse_changed(target: str, before: os.stat_result | None) -> None:
    """What is replaced must be what was found damaged."""
    try:
        now = os.stat(target, follow_symlinks=False)
    except FileNotFoundError:
        now = None
    what = None if now is None else (now.st_size, now.st_mtime_ns, now.st_ino)
    if what != (None if before is None else (before.st_size, before.st_mtime_ns, before.st_ino)):
        raise SourceChangedError(f"{target} was written while it was repaired", path=target, hint="Wait, then repair again.")


def _resend(replica: Backend, pair: _Pair, damage: Damage, target: Backend, notify: Notify | None) -> int:
    """Send a whole file to where a damaged one is."""
    entry = damage.entry
    _twin_file(pair, entry)
    if folder_of(replica, pair.twin) != folder_of(target, pair.part):
        raise UsageError(f"{pair.twin.path} and {pair.part.path} do not lie in their runs under the same name")
    mine = read_manifest(replica, folder_of(replica, pair.twin))
    if mine.content != pair.manifest.content:
        raise SourceChangedError(f"{pair.twin.path} was written meanwhile", path=pair.twin.path)

    def progress(done_bytes: int, total_bytes: int) -> None:
        if notify is not None:
            notify(f"sending {entry.path}", done_bytes, total_bytes)

    push.resend(replica, pair.twin, pair.manifest, target, entry=entry, progress=progress)
    again = look_again(target, pair.part)
    if still := [other for other in find(target, again, pair.manifest, only=entry.path) if other.entry.path == entry.path]:
        raise IntegrityError(f"{again.files_path}/{entry.path}: {still[0].problem}, although it was sent anew")
    return entry.size_bytes
