"""One part of a checkpoint: its status from its files' names, its manifest and its format, and how its files are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from ckptstore import canonical
from ckptstore import manifest as manifests
from ckptstore.backends import open_backend
from ckptstore.backends.base import Backend
from ckptstore.errors import AccessError, CkptStoreError, ManifestError, NotFoundError, StorageError
from ckptstore.formats import FormatError, dcp
from ckptstore.frameworks.areal import layout
from ckptstore.manifest import Manifest
from ckptstore.metric_names import is_loss
from ckptstore.model import ATTEMPT_PREFIX, CLAIM_NAME, MANIFEST_NAME, FileInfo, Finding, Part, ReadAt, Status, worst
from ckptstore.native import Folder


class ReadSigns(Protocol):
    """What a framework reads out of a part's files; `sealed`: there is a manifest of ours among them."""

    def __call__(self, files: Sequence[FileInfo], *, sealed: bool) -> layout.Signs:
        """The signs."""


def _areal_signs(files: Sequence[FileInfo], *, sealed: bool) -> layout.Signs:
    return layout.read_signs(files)


def read_part(
    backend: Backend, name: str, folder: str, folders: dict[str, Folder], *, read_signs: ReadSigns = _areal_signs
) -> Part:
    """Judge one part at level quick. `folders` is Backend.tree(), `folder` a key of it."""
    files, findings = layout.files_of(folders, folder)
    ours = next((file for file in files if file.name == MANIFEST_NAME), None)
    notes: list[str] = []
    base = ""
    if ours is not None:
        files.remove(ours)
        if not backend.is_folder and any(entry.name.startswith(ATTEMPT_PREFIX) for entry in folders[folder].entries):
            base = _base(backend, folder, notes)  # several have written here: the manifest says whose files count
            if base:
                files, findings = layout.files_of(folders, f"{folder}/{base}" if folder else base)
    unread = not files and ours is None and any(not finding.path for finding in findings)
    # What an unreadable folder holds is unknown: it is not "empty".
    signs = layout.Signs("unknown", (), ()) if unread else read_signs(files, sealed=ours is not None)
    findings.extend(signs.findings)
    if ours is None and not backend.is_folder and any(entry.name == CLAIM_NAME for entry in folders[folder].entries):
        findings.append(Finding("", "no manifest yet: a push is at work, or was cut short", Status.PARTIAL))
    status = worst([Status.COMPLETE, *(finding.status for finding in findings)])
    if ours is not None:
        # A store's times are those of arrival: what came before its manifest is what the manifest was written for. Reading
        # ten thousand of them is left to those who look at one (`verify`, `show`, `pull`).
        vouched = not backend.is_folder and not findings and all(file.mtime_ns <= ours.mtime_ns for file in files)
        if vouched:
            status = Status.COMMITTED
        else:
            status = _judge_manifest(backend, folder, folders[folder].content, files, findings, notes)
    return Part(
        name=name,
        path=f"{backend.location}/{folder}" if folder else backend.location,
        files=tuple(files),
        format=signs.format,
        holds=signs.holds,
        status=status,
        findings=tuple(findings),
        notes=tuple(notes),
        mtime_ns=max((file.mtime_ns for file in files), default=0),
        base=base,
    )


def _base(backend: Backend, folder: str, notes: list[str]) -> str:
    """What the manifest in `folder` names as the folder of its files."""
    try:
        return read_manifest(backend, folder).base
    except ManifestError as error:
        notes.append(f"its manifest does not count: {error}")
    except NotFoundError:
        notes.append("its manifest went away while it was looked at")
    return ""


def _judge_manifest(
    backend: Backend, folder: str, data: bytes | None, files: list[FileInfo], findings: list[Finding], notes: list[str]
) -> Status:
    """The status of a part that has a manifest (`data`, if it came with the listing); adds to `findings` and `notes`."""
    try:
        if data is None:
            key = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
            data = backend.get(key, length_bytes=manifests.MAX_BYTES + 1)
        plain = b'"group":' not in data and b'"nonfinite":' not in data
        if plain and not findings and canonical.vouches_for(data, files):
            return Status.COMMITTED
        manifest = _parse(backend, data)
        if manifest.group is not None:
            notes.append(f"{manifest.group.whose}: the files of that node's ranks")
        if why := diverged(manifest):
            notes.append(f"{why}: a load that names no step passes it over where there is another")
        seen = manifest.inspect(files if backend.is_folder else as_recorded(files, manifest))
    except ManifestError as error:
        notes.append(f"its manifest does not count: {error}")
    except CkptStoreError as error:
        notes.append(f"its manifest cannot be read: {error}")
    else:
        findings.extend(seen.findings)
        if seen.note:
            notes.append(seen.note)
        elif not findings and (not backend.is_folder or not plain or manifest.origin == "save"):
            return Status.COMMITTED
    return worst([Status.COMPLETE, *(finding.status for finding in findings)])


def as_recorded(files: Sequence[FileInfo], manifest: Manifest) -> list[FileInfo]:
    """`files` of an object store with the times and inodes that the manifest records: a store keeps none of the writer's."""
    known = {entry.path: entry for entry in manifest.files}
    return [
        file._replace(mtime_ns=entry.mtime_ns, inode=entry.inode) if (entry := known.get(file.name)) else file for file in files
    ]


def judged(backend: Backend, part: Part, manifest: Manifest | None) -> Part:
    """`part` of an object store by its manifest, which the listing has not read; any other as it is."""
    if backend.is_folder or manifest is None:
        return part
    if manifest.base != part.base:
        where = f"its manifest names {manifest.base or 'its own folder'} as the place of its files, and they are not there"
        return worsen(part, f"{where}, or it was replaced meanwhile")
    files = as_recorded(part.files, manifest)
    seen = manifest.inspect(files)
    new = [finding for finding in seen.findings if finding not in part.findings]
    status = worst([Status.COMPLETE if seen.void else Status.COMMITTED, *(f.status for f in (*part.findings, *new))])
    notes = (*part.notes, seen.note) if seen.note and seen.note not in part.notes else part.notes
    return dataclasses.replace(part, files=tuple(files), findings=(*part.findings, *new), status=status, notes=notes)


def read_manifest(backend: Backend, folder: str) -> Manifest:
    """The manifest in `folder`. NotFoundError without one, ManifestError for one that cannot be trusted."""
    key = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    return _parse(backend, backend.get(key, length_bytes=manifests.MAX_BYTES + 1))


def _parse(backend: Backend, data: bytes) -> Manifest:
    manifest = manifests.parse(data)
    if backend.is_folder and manifest.base:
        raise ManifestError(f"it is an object store's, and its files lie in {manifest.base}", hint="Pull it from there.")
    return manifest


def folder_of(backend: Backend, part: Part) -> str:
    """The part's folder relative to `backend`."""
    return "" if part.path == backend.location else part.path.removeprefix(f"{backend.location}/")


def files_folder_of(backend: Backend, part: Part) -> str:
    """The folder of the part's files relative to `backend`: the part's own, but where several wrote to an object store."""
    return "/".join(name for name in (folder_of(backend, part), part.base) if name)


def look_again(backend: Backend, part: Part) -> Part:
    """The part as it lies there now, by a look at nothing but its own folder."""
    folder = folder_of(backend, part)
    above = f"{folder}/" if folder else ""
    inside = backend.tree(folder, max_depth=5)
    return read_part(backend, part.name, folder, {f"{above}{name}" if name else folder: inside[name] for name in inside})


def reader(backend: Backend, part: Part) -> ReadAt:
    """Reads the part's files by their names."""
    folder = files_folder_of(backend, part)

    def read_at(name: str, offset: int, length: int) -> bytes:
        return backend.get(f"{folder}/{name}" if folder else name, offset_bytes=offset, length_bytes=length)

    return read_at


def find_manifest(backend: Backend, folder: str) -> Manifest | None:
    """The manifest in `folder`, None when there is none, or it cannot be read or trusted: `list` says which."""
    try:
        return read_manifest(backend, folder)
    except CkptStoreError:
        return None


def manifest_told(backend: Backend, folder: str) -> Manifest | None:
    """find_manifest() for whoever decides by it: a store that does not answer raises, and is not taken for one without."""
    try:
        return read_manifest(backend, folder)
    except (NotFoundError, ManifestError):
        return None
    except (AccessError, StorageError):
        if not backend.is_folder:
            raise
        return None  # the listing of a folder has read it, and says so


def diverged(manifest: Manifest | None) -> str:
    """What the metrics that a step was saved with say against it, "" where nothing: a loss that was no number."""
    lost = [name for name in (manifest.nonfinite if manifest is not None else ()) if is_loss(name)]
    return f"{', '.join(lost)} was NaN or infinite when it was saved" if lost else ""


def vouching(backend: Backend, part: Part) -> Manifest | None:
    """The manifest that tells what a part's bytes are: its own, or where that does not count its copy's."""
    own = find_manifest(backend, folder_of(backend, part))
    if part.copy and (own is None or own.inspect(part.files).void):
        return find_manifest(open_backend(part.copy), "")
    return own


def worsen(part: Part, problem: str) -> Part:
    """The part with one finding more, PARTIAL at best."""
    finding = Finding("", problem, Status.PARTIAL)
    return dataclasses.replace(part, findings=(*part.findings, finding), status=worst([part.status, Status.PARTIAL]))


def with_dcp_holdings(backend: Backend, part: Part) -> Part:
    """What a DCP part holds stands in its `.metadata`; a shard newer than it shows a save cut short."""
    metadata = next((file for file in part.files if file.name == ".metadata"), None)
    if part.format != "dcp" or metadata is None or not metadata.size_bytes:
        return part
    newer = [f for f in part.files if f.name.endswith(".distcp") and f.mtime_ns > metadata.mtime_ns + layout.CLOCK_SKEW_NS]
    if newer and backend.is_folder:
        part = worsen(part, f"{newer[0].name} is newer than .metadata: an overwrite was cut short")
    try:
        holds = dcp.load_summary(reader(backend, part), metadata).holds
    except FormatError as error:
        finding = error.finding(metadata.name)
    except CkptStoreError as error:
        finding = Finding(metadata.name, f"cannot be read: {error}", Status.PARTIAL)
    else:
        return dataclasses.replace(part, holds=holds)
    return dataclasses.replace(part, findings=(*part.findings, finding), status=worst([part.status, finding.status]))
