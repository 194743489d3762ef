"""Fill a stage: steps 1 to 3 of commit.py. Each byte of the source is read once, its digests checked in that read."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ckptstore
from ckptstore import damage, native
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.errors import CkptStoreError, DigestMismatchError, NotCommitted, SourceChangedError, StorageError, from_os_error
from ckptstore.frameworks.areal import resume_state
from ckptstore.frameworks.areal.layout import RECOVER_INFO
from ckptstore.listing import backend_for
from ckptstore.manifest import FileEntry, Manifest, recorded_time
from ckptstore.model import FRESH_OPTIMIZER, MANIFEST_NAME, Finding, Part, Status
from ckptstore.names import check_names
from ckptstore.parts import find_manifest, folder_of, judged, look_again, read_part
from ckptstore.plan import Options, Plan, world_size
from ckptstore.transfer.receiving import fill
from ckptstore.verify import Notify

BLOCKING = "blocking"


class Staged(NamedTuple):
    """What was put into a stage for one part."""

    manifest: Manifest
    bytes_written: int
    bytes_reused: int
    strategies: Mapping[str, int]


def stage_part(
    backend: Backend, plan: Plan, part: Part, stage: side_folders.Stage, *, options: Options, tell: Notify
) -> Staged:
    """Copy or convert one part into the stage, and write its manifest.

    DigestMismatchError and SourceChangedError mean the source: the next candidate may be better.
    """
    source = backend_for(backend, plan.point.checkpoint)
    recorded = find_manifest(source, folder_of(source, part))
    if recorded is not None and recorded.inspect(part.files).void:
        recorded = None
    if recorded is None and part.status is Status.COMMITTED:
        raise SourceChangedError(f"the manifest of {part.path} went away", path=part.path)
    check_names(file.name for file in part.files)
    expected = {entry.path: entry.chunks for entry in recorded.files} if recorded else {}
    chunk_bytes = recorded.chunk_bytes if recorded else native.CHUNK_BYTES
    way = plan.transfers[part.name]
    target = stage.part(part.name)
    local = part.path if source.is_folder else stage.part(f"fetched-{part.name}") if way.how == "dcp" else target
    before = sum(other.size_bytes for other in plan.point.checkpoint.parts[: plan.point.checkpoint.parts.index(part)])
    doing = f"copying {part.name}" if way.how != "dcp" else f"converting {part.name}"

    def progress(done_bytes: int, _: int) -> None:
        tell(doing, before + done_bytes, plan.point.checkpoint.size_bytes)

    try:
        if way.how == "dcp":
            side_folders.remove_tree(target)  # a conversion starts over: only copies are continued
        os.makedirs(target, mode=0o700, exist_ok=True)
        side_folders.keep_only(target, (file.name for file in part.files))
    except OSError as error:
        raise from_os_error(error, doing="creating", path=target) from error
    try:
        filled = None
        files = part.files
        if not source.is_folder:
            filled = fill(source, part, recorded, local, progress=progress)
            files = tuple(file._replace(inode=os.stat(os.path.join(local, file.name)).st_ino) for file in files)
        if way.how == "dcp":
            from ckptstore.frameworks.areal import adamw, convert

            converted = convert.hf_to_dcp(
                local,
                target,
                files,
                optimizer="zero" if way.optimizer == "zero" else "none",
                settings=adamw.from_config(options.config, part.name, plan.era.name) if way.optimizer == "zero" else None,
                expected=expected,
                chunk_bytes=chunk_bytes,
                progress=progress,
            )
            digests, written, reused = dict(converted.digests), converted.bytes_written, 0
            strategies: Mapping[str, int] = {"converted": written}
            chunk_bytes = native.CHUNK_BYTES
            if filled is not None:
                strategies = {**strategies, "fetched": part.size_bytes - filled.kept_bytes}
                side_folders.remove_tree(local)
        elif filled is not None:
            digests, reused = dict(filled.digests), filled.kept_bytes
            written = part.size_bytes - reused
            strategies = {"fetched": written}
            if options.verify_after_write:
                _read_back(target, part, filled.digests, chunk_bytes)
        else:
            specs = [
                # Without the inode: FUSE file systems make those up, and the engine looks for changes itself.
                native.FileSpec(file.name, file.size_bytes, file.mtime_ns, expected=expected.get(file.name))
                for file in part.files
            ]
            copied = native.copy_files(
                part.path,
                target,
                specs,
                options=native.CopyOptions(
                    chunk_bytes=chunk_bytes, verify_after_write=options.verify_after_write, resume=stage.resumed
                ),
                progress=progress,
            )
            digests, written, reused = dict(copied.digests), copied.bytes_copied, copied.bytes_reused
            strategies = copied.strategies
        if way.how == "era-a":
            from ckptstore.frameworks.areal import adamw, convert

            digests |= convert.era_a_optimizer(
                local,
                target,
                files,
                world_size=world_size(options),
                settings=adamw.from_config(options.config, part.name, plan.era.name),
            )
    except (DigestMismatchError, SourceChangedError) as error:
        if source.is_folder and options.verify_after_write and _source_is_right(part, error.path, expected, chunk_bytes):
            raise StorageError(str(error), operation="reading back", path=target, errno=errno.EIO, hint=error.hint) from error
        if (
            isinstance(error, DigestMismatchError)
            and recorded is not None
            and source.is_folder
            and plan.point.checkpoint.kind == "export"
        ):
            wrong = Finding(
                error.path, f"digest differs from the manifest in the chunk at byte {error.offset_bytes:,}", Status.CORRUPT
            )
            damage.remember(plan.side, {folder_of(source, part): (recorded.commit, wrong)})
        raise
    folder = folder_of(source, part)
    if source.is_folder:
        again = read_part(source, part.name, folder, source.tree(max_depth=5))
    else:
        again = judged(source, look_again(source, part), find_manifest(source, folder))
    if [file._replace(inode=0) for file in again.files] != [file._replace(inode=0) for file in part.files]:
        raise SourceChangedError(f"{part.path} was written while it was copied", path=part.path)
    return Staged(_describe(plan, part, target, digests, chunk_bytes), written, reused, strategies)


def _read_back(target: str, part: Part, digests: Mapping[str, native.Digest], chunk_bytes: int) -> None:
    """Read what was fetched from the disk. StorageError where it gives back other bytes than were written."""
    specs = [native.FileSpec(file.name, file.size_bytes, expected=digests[file.name].chunks) for file in part.files]
    for result in native.digest_files(target, specs, chunk_bytes=chunk_bytes, direct=True).values():
        if isinstance(result, CkptStoreError):
            raise StorageError(str(result), operation="reading back", path=target, errno=errno.EIO, hint=result.hint)


def _source_is_right(part: Part, name: str, expected: Mapping[str, Sequence[int]], chunk_bytes: int) -> bool:
    """Whether a mismatch is the destination's fault: read back, it gave other bytes than were written."""
    file = next((file for file in part.files if file.name == name), None)
    if file is None:
        return False
    spec = native.FileSpec(name, file.size_bytes, file.mtime_ns, expected=expected.get(name))
    return isinstance(native.digest_files(part.path, [spec], chunk_bytes=chunk_bytes)[name], native.Digest)


def stage_info(plan: Plan, stage: side_folders.Stage) -> tuple[str, str]:
    """Write the recover_info that blocks meanwhile, and the one to come, into the stage; their folders. Durable."""
    run = plan.listing.run.path
    blocking = write_info(run, stage.part(BLOCKING), resume_state.blocking())
    real = write_info(run, stage.part(RECOVER_INFO), plan.info.files)
    checkpoint = plan.point.checkpoint
    entries = []
    for name, data in sorted(plan.info.files.items()):
        seen = os.stat(os.path.join(real, name))
        crc = native.crc64(data)
        entries.append(FileEntry(name, seen.st_size, recorded_time(seen.st_mtime_ns), seen.st_ino, crc, (crc,) if data else ()))
    # Beside AReaL's six files, which ignore it: tells our recover_info from one that the trainer has written since.
    manifest = Manifest(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        epoch_step=checkpoint.epoch_step,
        part=RECOVER_INFO,
        origin="setup",
        files=tuple(entries),
        chunk_bytes=max(native.CHUNK_BYTES, *(entry.size_bytes for entry in entries)),
        source="",
        tool=f"ckptstore {ckptstore.__version__}",
    )
    side_folders.write_manifest(real, manifest, model=os.stat(os.path.join(real, entries[0].path)))
    return blocking, real


def place_trial(plan: Plan, stage: side_folders.Stage, target: str) -> None:
    """Make the staged parts and recover_info one new trial: a single rename, so that it is there whole or not at all.

    NotCommitted where it could not be placed; the old trial is untouched in any case.
    """
    run_like = os.stat(plan.listing.run.path)
    trial = stage.part("trial")
    try:
        side_folders.remove_tree(trial)
        os.mkdir(trial, 0o700)
        for part in plan.point.checkpoint.parts:
            os.mkdir(os.path.join(trial, part.name), 0o700)
            os.rename(stage.part(part.name), os.path.join(trial, part.name, os.path.basename(plan.slots[part.name])))
        if plan.info.action != "leave":
            os.rename(stage.part(RECOVER_INFO), os.path.join(trial, RECOVER_INFO))
        for part in plan.point.checkpoint.parts:
            side_folders.like(os.path.join(trial, part.name), run_like)
            side_folders.sync_folder(os.path.join(trial, part.name))
        side_folders.like(trial, run_like)
        side_folders.sync_folder(trial)
        native.rename_noreplace(trial, target)
        side_folders.sync_folder(os.path.dirname(target))
    except OSError as error:
        raise NotCommitted(f"placing the trial {target}: {error.strerror or error}; nothing else was changed") from error
    side_folders.discard(plan.side, os.path.basename(stage.path))


def write_info(run: str, folder: str, files: Mapping[str, bytes]) -> str:
    """Write a recover_info into `folder`, durable, with owner and mode of the run's present one. Returns `folder`."""
    present = os.path.join(run, RECOVER_INFO)
    try:
        model = os.stat(present if os.path.isdir(present) else run)
        side_folders.remove_tree(folder)
        os.mkdir(folder, 0o700)
        for file, data in files.items():
            path = os.path.join(folder, file)
            side_folders.write_durably(path, data)
            side_folders.like(path, model, mode=model.st_mode & 0o666)
        side_folders.like(folder, model)
        side_folders.sync_folder(folder)
    except OSError as error:
        raise from_os_error(error, doing="writing", path=folder) from error
    return folder


def _describe(plan: Plan, part: Part, target: str, digests: Mapping[str, native.Digest], chunk_bytes: int) -> Manifest:
    """Give the staged files the owner and mode that belong there, and write their manifest."""
    slot = plan.slots[part.name]
    model = os.stat(slot if os.path.isdir(slot) else side_folders.existing(os.path.dirname(slot)))
    old_file = _any_file(slot)
    file_mode = (os.stat(old_file).st_mode if old_file else model.st_mode) & 0o666
    try:
        entries = side_folders.settle(target, digests, model=model, file_mode=file_mode)
        first = os.stat(os.path.join(target, entries[0].path))
    except OSError as error:
        raise from_os_error(error, doing="preparing", path=error.filename or target) from error
    run = plan.listing.run.path
    checkpoint = plan.point.checkpoint
    manifest = Manifest(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        epoch_step=checkpoint.epoch_step,
        part=part.name,
        origin="setup" if plan.transfers[part.name].how == "copy" and FRESH_OPTIMIZER not in part.holds else "convert",
        files=entries,
        chunk_bytes=chunk_bytes,
        source=os.path.relpath(part.path, run) if part.path.startswith(f"{run}/") else part.path,
        tool=f"ckptstore {ckptstore.__version__}",
    )
    side_folders.write_manifest(target, manifest, model=first)
    return manifest


def _any_file(folder: str) -> str:
    try:
        with os.scandir(folder) as entries:
            return next((e.path for e in entries if e.is_file(follow_symlinks=False) and e.name != MANIFEST_NAME), "")
    except OSError:
        return ""
