"""Seal: write a manifest for a checkpoint that a trainer wrote without us. The files themselves are not touched."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ckptstore
from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.errors import CkptStoreError, IntegrityError, ManifestError, NotFoundError, RefusedError, SourceChangedError
from ckptstore.formats import archives
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import Checkpoint, Part, Status
from ckptstore.names import check_names
from ckptstore.parts import find_manifest, folder_of, read_manifest
from ckptstore.side import write_manifest
from ckptstore.verify import check_part_structure


def seal(backend: Backend, checkpoint: Checkpoint, *, progress: native.Progress | None = None) -> list[Manifest]:
    """Digest every file and write one manifest a part. Parts that a valid manifest describes keep theirs.

    IntegrityError for a checkpoint that is not whole, also by the CRC-32s that torch left in its files: a manifest would vouch
    for damage.
    SourceChangedError when a file is written meanwhile: nothing is sealed then.
    """
    if not checkpoint.status.usable:
        reasons = "; ".join(map(str, checkpoint.findings[:3]))
        raise IntegrityError(
            f"step {checkpoint.step} is {checkpoint.status}: {reasons}",
            hint="Only whole checkpoints are sealed.",
        )
    manifests = [describe(backend, checkpoint, part, progress) for part in checkpoint.parts]
    for part in checkpoint.parts:
        _refuse_changed(part)
    for part, manifest in zip(checkpoint.parts, manifests, strict=True):
        if find_manifest(backend, folder_of(backend, part)) != manifest:
            write_manifest(part.path, manifest, model=os.stat(os.path.join(part.path, part.files[0].name)))
    return manifests


def describe(backend: Backend, checkpoint: Checkpoint, part: Part, progress: native.Progress | None) -> Manifest:
    """The manifest of a part as it lies there: the one that it has, else a new one, for which every byte is read.

    Writes nothing. IntegrityError for a part whose structure is not whole, SourceChangedError for one that is being written.
    """
    if part.status is Status.COMMITTED and (existing := find_manifest(backend, folder_of(backend, part))):
        return existing
    check_names(file.name for file in part.files)
    if findings := check_part_structure(backend, part):
        raise IntegrityError(
            f"step {checkpoint.step}, {part.name}{'/' if findings[0].path else ': '}{findings[0]}",
            hint="Only whole checkpoints are sealed.",
        )
    if early := next((file.name for file in part.files if file.mtime_ns < 0), ""):
        raise RefusedError(
            f"{part.path}/{early} was written before 1970, by its time, which no manifest can say",
            hint="Was the clock wrong? `touch` sets the file's time.",
        )
    digests = _digests(backend, checkpoint, part, progress)
    _refuse_other_than_saved(backend, checkpoint, part, digests)
    return Manifest(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        epoch_step=checkpoint.epoch_step,
        part=part.name,
        origin="seal",
        files=tuple(
            FileEntry(file.name, file.size_bytes, file.mtime_ns, file.inode, *digests[file.name]) for file in part.files
        ),
        chunk_bytes=native.CHUNK_BYTES,
        tool=f"ckptstore {ckptstore.__version__}",
    )


def _digests(
    backend: Backend, checkpoint: Checkpoint, part: Part, progress: native.Progress | None
) -> Mapping[str, native.Digest]:
    """Of each file; compared in the same read with what torch left in them: no manifest shall vouch for a flipped bit."""
    compared = archives.compare(part.path, {file.name: file for file in part.files}, progress=progress)
    if compared is not None:
        if compared.findings:
            raise IntegrityError(
                f"step {checkpoint.step}, {part.name}/{compared.findings[0]}", hint="Only whole checkpoints are sealed."
            )
        return compared.digests
    specs = [native.FileSpec(file.name, file.size_bytes, file.mtime_ns, file.inode) for file in part.files]
    digests = {}
    for name, result in native.digest_files(part.path, specs, progress=progress).items():
        if isinstance(result, CkptStoreError):
            raise result
        digests[name] = result
    return digests


def _refuse_other_than_saved(
    backend: Backend, checkpoint: Checkpoint, part: Part, digests: Mapping[str, native.Digest]
) -> None:
    """A saved step whose times a copy has lost gets no new manifest for other bytes than were saved."""
    try:
        saved = read_manifest(backend, folder_of(backend, part))
    except NotFoundError:
        return
    except ManifestError as error:
        if checkpoint.epoch >= 0:  # a trainer's export: what lies there is what there is
            return
        raise IntegrityError(
            f"the manifest of {part.path} cannot be trusted, so that nothing tells what was saved: {error}",
            hint="Take another step, or pull this one anew from where it is whole.",
        ) from error
    if saved.origin != "save":
        return
    for entry in saved.files:
        if entry.path not in digests or digests[entry.path].crc != entry.crc:
            raise IntegrityError(f"{part.path}/{entry.path} is not what was saved", hint="`ckptstore verify` says more.")


def _refuse_changed(part: Part) -> None:
    """Between the digest and here the trainer may have begun to write again."""
    for file in part.files:
        try:
            info = os.stat(os.path.join(part.path, file.name), follow_symlinks=False)
            changed = (info.st_size, info.st_mtime_ns, info.st_ino) != (file.size_bytes, file.mtime_ns, file.inode)
        except OSError:
            changed = True
        if changed:
            raise SourceChangedError(
                f"{part.path}/{file.name} was written while it was sealed",
                path=file.name,
                hint="Wait until the trainer has saved, then seal again.",
            )
