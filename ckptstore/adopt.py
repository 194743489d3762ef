"""Adopt: keep the recover slot as a step of its own. AReaL overwrites the slot in place, so a crash during a save loses both.

An adopted step lies beside the run, in its side folder, never inside the trial:

    {experiment}/.ckptstore/{trial}/adopted/globalstep{N}/
        {part}/          the slot's files, with a manifest
        recover_info/    the trainer's own, with a manifest

or in a folder that the caller names, on another disk than the run's. It appears under its name only when all of it is copied,
digested, synced and the sources are seen not to have changed.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator

import ckptstore
from ckptstore import choose, native, pins, places
from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    AlreadyExistsError,
    CkptStoreError,
    IntegrityError,
    RefusedError,
    SourceChangedError,
    UsageError,
    from_os_error,
)
from ckptstore.frameworks.areal import layout, recover_info
from ckptstore.listing import Listing, adopted_folder, read_adopted, scan
from ckptstore.lock import RunLock
from ckptstore.manifest import FileEntry, Manifest, recorded_time
from ckptstore.model import FRESH_OPTIMIZER, Checkpoint, FileInfo, Status
from ckptstore.parts import find_manifest, folder_of, read_part
from ckptstore.transfer import mirrored
from ckptstore.verify import Notify, check_part_structure

log = logging.getLogger(__name__)

POLL_S = 5.0
RETRY_S = 30.0  #: after a failure: a full disk is not asked every five seconds
PATIENCE_S = 120.0  #: a save in progress looks torn, and lasts


def _log_problem(error: CkptStoreError) -> None:
    log.warning("ckptstore: not kept, and tried again: %s", error)


def adopt(backend: Backend, *, into: str = "", notify: Notify | None = None) -> Checkpoint:
    """Copy the slot of the run that `backend` is rooted at, with its recover_info, into the run's store.

    `into`: a folder, on another disk say, to keep it in instead of beside the run, as
    `{experiment}/{trial}/adopted/globalstep{N}/` below it.
    RefusedError for a slot whose step cannot be known (no recover_info, or one that belongs to another save), IntegrityError
    for one that is torn, SourceChangedError when the trainer writes meanwhile, AlreadyExistsError for a step adopted before.
    Thread-safe; one at a time a run (BusyError).
    """
    listing = scan(backend)
    run = listing.run.path
    side = _place(run, into)
    if (slot := listing.slot) is not None and _is_adopted(slot, target := adopted_folder(side, slot.step)):
        raise AlreadyExistsError(f"step {slot.step} is adopted already: {target}")
    slot = _adoptable(listing)
    target = adopted_folder(side, slot.step)
    for part in slot.parts:
        if findings := check_part_structure(backend, part):
            raise IntegrityError(f"the slot is torn: {part.name}/{findings[0]}", hint="The trainer's next save replaces it.")
    side_folders.make_side(side)
    with RunLock(side, f"adopting step {slot.step}"):
        stage = side_folders.open_stage(side, f"adopt {slot.step}")
        side_folders.remove_tree(stage.part("step"))  # what a crash left may be of another save: start over
        draft = stage.part("step")
        try:
            os.mkdir(draft, 0o700)
            sources = [(part.name, part.path, folder_of(backend, part), part.files) for part in slot.parts]
            sources.append(
                (layout.RECOVER_INFO, os.path.join(run, layout.RECOVER_INFO), layout.RECOVER_INFO, _info_files(backend))
            )
            total = sum(file.size_bytes for _, _, _, files in sources for file in files)
            done = 0
            for name, source, _, files in sources:
                _copy(slot, name, source, os.path.join(draft, name), files, _progress(notify, name, done, total))
                done += sum(file.size_bytes for file in files)
            for name, source, folder, files in sources:
                now = read_part(backend, name, folder, backend.tree(max_depth=5)).files
                if now != tuple(files):
                    raise SourceChangedError(
                        f"{source} was written while it was adopted", path=source, hint="Adopt again after the trainer's save."
                    )
            side_folders.like(draft, os.stat(run))
            side_folders.sync_folder(draft)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.lexists(target):  # the same step of a history that was rolled back
                os.rename(target, os.path.join(side, f"trash-{secrets.token_hex(8)}"))
            native.rename_noreplace(draft, target)
            side_folders.sync_folder(os.path.dirname(target))
            side_folders.sync_folder(side)
        except OSError as error:
            if isinstance(error, CkptStoreError):
                raise
            raise from_os_error(error, doing="adopting into", path=target) from error
        finally:
            side_folders.discard(side, os.path.basename(stage.path))
    return next(checkpoint for checkpoint in read_adopted(side) if checkpoint.step == slot.step)


def watch(
    backend: Backend,
    *,
    keep: int = 2,
    into: str = "",
    kept: Callable[[], object] = lambda: None,
    problem: Callable[[CkptStoreError], object] = _log_problem,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[float], object] = time.sleep,
    notify: Notify | None = None,
) -> Iterator[Checkpoint]:
    """Adopt each save that the trainer finishes, as long as `stop()` is false; yields what was adopted.

    Older adopted steps beyond the newest `keep` are removed, and only after the new one is committed (see prune). A save in
    progress is waited for, never disturbed. `kept` is called after each adoption, before anything is removed; `wait` with the
    seconds until the next look. `problem` is told what keeps a save from being kept, once for each kind: at once where the
    disk is full, say, and after PATIENCE_S where it may be a save in progress. It is tried again all the same.
    """
    told: set[type] = set()
    since_s = time.monotonic()
    while not stop():
        error: CkptStoreError | None = None
        pause_s = POLL_S
        try:
            checkpoint = adopt(backend, into=into, notify=notify)
        except AlreadyExistsError:
            told, since_s = set(), time.monotonic()
        except (RefusedError, IntegrityError) as found:
            error = found if time.monotonic() - since_s >= PATIENCE_S else None
        except UsageError:
            raise
        except CkptStoreError as found:
            error, pause_s = found, RETRY_S
        else:
            told, since_s = set(), time.monotonic()
            kept()
            try:
                prune(backend, keep=keep, into=into)
            except CkptStoreError as found:
                error = found
            yield checkpoint
        if error is not None and type(error) not in told:
            told.add(type(error))
            problem(error)
        wait(pause_s)


def prune(backend: Backend, *, keep: int, into: str = "") -> list[int]:
    """Remove all but the `keep` (at least 1) whole adopted steps that were adopted last; the steps removed.

    By time, not by number: after a rollback the steps of the abandoned history have the higher numbers. The last one that the
    metrics call good stays too: the newest may all be of a time when training has gone bad. So does what is pinned, and of a
    run that is mirrored what is not safe there yet.
    """
    side = _place(backend.location, into)
    whole = sorted(
        (checkpoint for checkpoint in read_adopted(side) if checkpoint.status is Status.COMMITTED),
        key=lambda checkpoint: os.stat(checkpoint.store).st_ctime_ns,
    )
    stays = {*mirrored.unsafe(side, whole), *(pin.step for pin in pins.read(places.side_of(backend.location)))}
    if len(whole) > max(keep, 1) and (good := choose.newest_good(backend.location, whole)) is not None:
        stays.add(good.step)
    doomed = [checkpoint for checkpoint in whole[: -max(keep, 1)] if checkpoint.step not in stays]
    for checkpoint in doomed:
        side_folders.discard(side, os.path.relpath(adopted_folder(side, checkpoint.step), side))
    return [checkpoint.step for checkpoint in doomed]


def _place(run: str, into: str) -> str:
    """The folder that holds `adopted/`. UsageError for one inside of the trial, where AReaL takes it for a model."""
    if not into:
        return side_folders.side_folder(run, os.path.join(run, layout.MAIN_PART, layout.SLOT))
    place = os.path.abspath(into)
    if f"{os.path.realpath(place)}/".startswith(f"{os.path.realpath(run)}/"):
        raise UsageError(f"{place} is inside of the trial, where AReaL takes every folder for a model", hint="Name another.")
    ref = layout.run_ref(run)
    return os.path.join(place, ref.experiment, ref.trial)


def _is_adopted(slot: Checkpoint, target: str) -> bool:
    """Whether `target` holds just these files; a step that was trained anew after a rollback has other times."""
    if not os.path.lexists(target):
        return False
    backend = LocalBackend(target)
    for part in slot.parts:
        manifest = find_manifest(backend, part.name)
        if manifest is None or manifest.inspect(part.files).void:
            return False
    return True


def _adoptable(listing: Listing) -> Checkpoint:
    slot = listing.slot
    if slot is None:
        raise RefusedError("the recover slot is empty: the trainer has not saved yet")
    if not slot.status.usable:
        raise IntegrityError(f"the slot is {slot.status}: {'; '.join(map(str, slot.findings[:2]))}")
    info = listing.recover_info
    if slot.step < 0 or info is None or info.step != slot.step or info.problems:
        reason = "; ".join((*slot.notes, *(info.problems if info else ())))[:300]
        raise RefusedError(f"the slot's step cannot be known: {reason or 'no recover_info'}")
    return slot


def _info_files(backend: Backend) -> tuple[FileInfo, ...]:
    return tuple(
        file
        for file in read_part(backend, layout.RECOVER_INFO, layout.RECOVER_INFO, backend.tree(max_depth=2)).files
        if file.name in recover_info.FILES
    )


def _progress(notify: Notify | None, name: str, before: int, total: int) -> native.Progress | None:
    if notify is None:
        return None
    return lambda done, _: notify(f"adopting {name}", before + done, total)


def _copy(
    slot: Checkpoint, name: str, source: str, target: str, files: tuple[FileInfo, ...], progress: native.Progress | None
) -> None:
    os.mkdir(target, 0o700)
    specs = [native.FileSpec(file.name, file.size_bytes, file.mtime_ns, file.inode) for file in files]
    result = native.copy_files(source, target, specs, progress=progress)
    model = os.stat(source)
    entries = []
    for file in files:
        path = os.path.join(target, file.name)
        side_folders.like(path, os.stat(os.path.join(source, file.name)))
        info = os.stat(path)
        digest = result.digests[file.name]
        entries.append(
            FileEntry(file.name, info.st_size, recorded_time(info.st_mtime_ns), info.st_ino, digest.crc, digest.chunks)
        )
    for folder, _, _ in os.walk(target, topdown=False):
        side_folders.like(folder, model)
        side_folders.sync_folder(folder)
    made = name != layout.RECOVER_INFO and FRESH_OPTIMIZER in slot.holds  # a copy of what setup made was not trained either
    manifest = Manifest(
        step=slot.step,
        epoch=slot.epoch,
        epoch_step=slot.epoch_step,
        part=name,
        origin="convert" if made else "adopt",
        files=tuple(entries),
        chunk_bytes=native.CHUNK_BYTES,
        source=f"{name}/{layout.SLOT}" if name != layout.RECOVER_INFO else name,
        tool=f"ckptstore {ckptstore.__version__}",
    )
    side_folders.write_manifest(target, manifest, model=os.stat(os.path.join(target, files[0].name)))
