"""Verify a checkpoint at four levels. Damage is reported, never raised; only the medium's own failures raise.

quick      names and sizes: what `list` shows
structure  what the file formats prove: headers, offsets, shards against their index, DCP metadata against its shards
full       every byte read; its digests compared where a manifest records them. Without a manifest `full` proves the
           structure and that all bytes can be read, not that they are the bytes that were written; the report says so.
server     the CRC-64/NVME that an S3 store computed of each object when it arrived, against the manifest's, by HEADs alone.
           Files of which there is no manifest or no such digest are counted as unchecked, and the report is not ok.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckptstore import damage, native
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.errors import (
    AccessError,
    CkptStoreError,
    DigestMismatchError,
    NotFoundError,
    SourceChangedError,
    StorageError,
)
from ckptstore.formats import archives, check_structure, dcp
from ckptstore.frameworks.areal import layout
from ckptstore.listing import backend_for
from ckptstore.manifest import Manifest
from ckptstore.model import MANIFEST_NAME, Checkpoint, Finding, Level, Part, Status, worst
from ckptstore.parts import files_folder_of, folder_of, judged, read_manifest, reader, vouching
from ckptstore.sizes import size
from ckptstore.transfer.fetching import Wanted, fetch
from ckptstore.transfer.server_digests import Said, ask_all

UNSEALED = "no manifest: full proves the structure and that every byte can be read, not which bytes were written (seal it)"
OWN_SUMS = "the CRC-32s that torch.save left in its files match"


#: Called with what is being done, bytes done and bytes in all.
Notify = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What verification found. `checkpoint` carries the findings and the status that they lead to."""

    checkpoint: Checkpoint
    level: Level
    bytes_read: int
    seconds: float
    manifest_sha256: tuple[str, ...] = ()  #: one per part that a manifest vouches for: pin these out of band
    verdicts: Mapping[str, tuple[str, Finding | None]] = field(default_factory=dict)  #: for damage.remember
    unchecked: tuple[str, ...] = ()  #: level server: files of which this level can say nothing

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as this level sees, and it has seen all."""
        return self.checkpoint.status.usable and not self.unchecked

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that is wrong."""
        return self.checkpoint.findings

    @property
    def notes(self) -> tuple[str, ...]:
        """Worth knowing, harmless."""
        return (*self.checkpoint.notes, *(note for part in self.checkpoint.parts for note in part.notes))


def verify(
    backend: Backend,
    checkpoint: Checkpoint,
    level: Level = Level.STRUCTURE,
    *,
    progress: native.Progress | None = None,
) -> Report:
    """Verify one checkpoint of the run that `backend` is rooted at. Thread-safe; reads only.

    UnavailableError for level server where the store tells no digests, or the extra `[s3]` is not installed.
    """
    started = time.monotonic()
    bytes_read = 0
    parts = []
    pins = []
    verdicts: dict[str, tuple[str, Finding | None]] = {}
    unchecked: list[str] = []
    before = 0

    def onward(done_bytes: int, _: int) -> None:
        if progress is not None:
            progress(before + done_bytes, checkpoint.size_bytes)

    for part in checkpoint.parts:
        manifest = vouching(backend, part)
        part = judged(backend, part, manifest)
        if level is not Level.QUICK or not backend.is_folder:  # a listing of a store has not read it
            part = _check_manifest(backend, checkpoint, part, manifest)
        if level in (Level.STRUCTURE, Level.FULL):
            told = {(finding.path, finding.status) for finding in part.findings}
            found = check_part_structure(backend, part, manifest)
            part = _worsen(part, [finding for finding in found if (finding.path, finding.status) not in told])
        if level is Level.SERVER:
            part, unknown = _ask_server(backend, part, manifest, onward)
            unchecked += unknown
        if level is Level.FULL:
            part = check_digests(backend, damage.forget_for_now(part), manifest, progress=onward)
            bytes_read += part.size_bytes
            if manifest is not None and checkpoint.kind != "adopted" and not manifest.inspect(part.files).void:
                wrong = next((finding for finding in part.findings if finding.status is Status.CORRUPT), None)
                verdicts[folder_of(backend, part)] = (manifest.commit, wrong)
        if manifest is not None and part.status is Status.COMMITTED:
            pins.append(manifest.sha256)
        before += part.size_bytes
        parts.append(part)
    checked = dataclasses.replace(checkpoint, parts=tuple(parts))
    return Report(checked, level, bytes_read, time.monotonic() - started, tuple(pins), verdicts, tuple(unchecked))


def verify_all(backend: Backend, checkpoints: list[Checkpoint], level: Level, notify: Notify | None = None) -> list[Report]:
    """verify() for several, with one progress over all of them. Damage of sealed ones is remembered (damage.py)."""
    total = sum(checkpoint.size_bytes for checkpoint in checkpoints)
    done = 0
    results: list[Report] = []
    for checkpoint in checkpoints:
        base = done

        def progress(done_bytes: int, _: int, base: int = base, step: int = checkpoint.step) -> None:
            if notify is not None:
                notify(f"verifying step {step}", base + done_bytes, total)

        results.append(verify(backend_for(backend, checkpoint), checkpoint, level, progress=progress))
        done += checkpoint.size_bytes
    found = {folder: verdict for report in results for folder, verdict in report.verdicts.items()}
    if found and backend.is_folder:
        side = side_folders.side_folder(backend.location, f"{backend.location}/{layout.MAIN_PART}/{layout.SLOT}")
        damage.remember(side, found)
    return results


def check_part_structure(backend: Backend, part: Part, manifest: Manifest | None = None) -> list[Finding]:
    """What the formats of the part's files prove to be wrong. A file that went away meanwhile is a finding.

    Of one node's part of a save, its `manifest` says what is here: `.metadata` names the other nodes' files too.
    """
    files = {file.name: file for file in part.files}
    try:
        findings = check_structure(reader(backend, part), files)
        if manifest is None or manifest.group is None:
            return findings
        here = {entry.path for entry in manifest.files}
        return [finding for finding in findings if finding.problem != dcp.MISSING_SHARD or finding.path in here]
    except NotFoundError as error:
        return [Finding("", f"changed while it was read: {error}", Status.PARTIAL)]
    except CkptStoreError as error:
        _refuse_outage(backend, error)
        return [Finding("", f"cannot be read: {error}", Status.PARTIAL)]


def _refuse_outage(backend: Backend, error: object) -> None:
    """A store that does not answer says nothing of a checkpoint: else an outage would choose an older one."""
    if not backend.is_folder and isinstance(error, (StorageError, AccessError)):
        raise error


def check_digests(backend: Backend, part: Part, manifest: Manifest | None, *, progress: native.Progress | None = None) -> Part:
    """Read all of a part and compare with its manifest, as far as that still counts; else with what torch left in the files."""
    if manifest is None and (compared := _compare_own_sums(backend, part, progress)) is not None:
        return compared
    expected = {entry.path: entry for entry in manifest.files} if manifest else {}
    seen = manifest.inspect(part.files) if manifest else None
    void = seen is not None and seen.void
    holds = seen is None or seen.holds
    specs = [
        native.FileSpec(
            file.name,
            file.size_bytes,
            file.mtime_ns,
            file.inode,
            entry.chunks if (entry := expected.get(file.name)) and entry.size_bytes == file.size_bytes else None,
        )
        for file in part.files
        if file.kind == "file"
    ]
    chunk_bytes = manifest.chunk_bytes if manifest else native.CHUNK_BYTES
    try:
        if backend.is_folder:
            results = native.digest_files(part.path, specs, chunk_bytes=chunk_bytes, progress=progress)
        else:
            above = f"{folder}/" if (folder := files_folder_of(backend, part)) else ""
            files = [Wanted(spec.name, f"{above}{spec.name}", spec.size_bytes, spec.expected) for spec in specs]
            results = fetch(backend, files, chunk_bytes=chunk_bytes, progress=progress)
            for result in results.values():
                _refuse_outage(backend, result)
    except CkptStoreError as error:
        return _worsen(part, [Finding("", f"cannot be read: {error}", Status.PARTIAL)])
    findings = [
        _finding(name, result, whose=f"its copy's, {part.copy}," if part.copy else "the manifest")
        for name, result in results.items()
        if isinstance(result, CkptStoreError) and (holds or not isinstance(result, DigestMismatchError))
    ]
    if void and holds and seen is not None:
        findings += seen.damage
    if not void:  # the chunks say that the file is right: then it is the manifest that is wrong
        findings += [
            Finding(name, "its whole-file digest in the manifest is not that of its chunks", Status.CORRUPT)
            for name, result in results.items()
            if not isinstance(result, CkptStoreError) and name in expected and result.crc != expected[name].crc
        ]
    notes = part.notes
    if part.copy:
        notes = (*notes, f"its bytes are compared with what is recorded of its copy, {part.copy}")
    if manifest is None:
        notes = (*notes, UNSEALED)
    elif void:
        differs = any(isinstance(result, CkptStoreError) for result in results.values())
        if not differs and {spec.name for spec in specs} == expected.keys():
            text = "its times changed, its bytes did not: all digests of the manifest match (seal it again)"
            notes = (*notes, text)
        elif not findings and (compared := _compare_own_sums(backend, part, progress)) is not None:
            return compared
        elif not differs:
            notes = (*notes, UNSEALED)
    return _worsen(dataclasses.replace(part, notes=notes), findings)


def _compare_own_sums(backend: Backend, part: Part, progress: native.Progress | None) -> Part | None:
    """The part after all of it was read and compared with the CRC-32s in its files; None where that cannot be done."""
    if not backend.is_folder:
        return None
    files = {file.name: file for file in part.files}
    try:
        compared = archives.compare(part.path, files, progress=progress)
    except CkptStoreError:
        return None  # of which file, and why, is said where they are read one by one
    if compared is None:
        return None
    if not compared.findings:
        said = f"no manifest counts: {OWN_SUMS}, {size(compared.compared_bytes)} of {size(compared.total_bytes)}"
        part = dataclasses.replace(part, notes=(*part.notes, f"{said}; the rest can be read"))
    return _worsen(part, list(compared.findings))


def _ask_server(
    backend: Backend, part: Part, manifest: Manifest | None, progress: native.Progress | None
) -> tuple[Part, list[str]]:
    """The part with what the store's own digests prove, and the files of which they prove nothing."""
    from ckptstore.backends.s3control import control  # it takes a while, and few ask for it

    store = control(backend)
    counts = manifest is not None and not manifest.inspect(part.files).void
    listed = {entry.path: entry for entry in manifest.files} if manifest is not None and counts else {}
    files = [listed[file.name] for file in part.files if file.name in listed]
    tick = None if progress is None else lambda done: progress(done, part.size_bytes)
    said = ask_all(store, files_folder_of(backend, part), files, tick=tick)
    unknown = [f"{part.name}/{f.name}" for f in part.files if said.get(f.name, Said.NOTHING) is Said.NOTHING]
    findings = [
        Finding(name, f"the store's own digest: {what.value}", Status.CORRUPT if what is Said.OTHER else Status.PARTIAL)
        for name, what in sorted(said.items())
        if what in (Said.OTHER, Said.MISSING)
    ]
    if not counts and part.files:
        part = dataclasses.replace(part, notes=(*part.notes, "no manifest that counts: there is nothing to compare with"))
    return _worsen(part, findings), unknown


def _check_manifest(backend: Backend, checkpoint: Checkpoint, part: Part, manifest: Manifest | None) -> Part:
    """`list` believes a manifest by its inventory; here all of it is read, and it must be this checkpoint's."""
    if part.status is not Status.COMMITTED:
        return part
    if manifest is None:
        try:
            read_manifest(backend, folder_of(backend, part))
            why = "it was just being written"
        except CkptStoreError as error:
            why = str(error)
        notes = (*part.notes, f"its manifest does not count: {why}")
        return dataclasses.replace(part, status=Status.COMPLETE, notes=notes)
    if checkpoint.kind == "export" and manifest.step != checkpoint.step >= 0:
        problem = f"is step {manifest.step}'s, and the folder's name says {checkpoint.step}: one of them is wrong"
        return _worsen(part, [Finding(MANIFEST_NAME, problem, Status.CORRUPT)])
    return part


def _finding(name: str, error: CkptStoreError, *, whose: str) -> Finding:
    if isinstance(error, DigestMismatchError):
        return Finding(
            name,
            f"digest differs from {whose} in the chunk at byte {error.offset_bytes:,}",
            Status.CORRUPT,
        )
    if isinstance(error, SourceChangedError):
        return Finding(name, "was written while it was read", Status.PARTIAL)
    return Finding(name, f"cannot be read: {error}", Status.PARTIAL)


def _worsen(part: Part, findings: list[Finding]) -> Part:
    known = set(part.findings)
    new = tuple(finding for finding in findings if finding not in known)
    return dataclasses.replace(
        part, findings=part.findings + new, status=worst([part.status, *(finding.status for finding in new)])
    )
