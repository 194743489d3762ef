"""Pull: a checkpoint from an object store into a local run, whole or not at all.

1  stage      in the run's side folder: `setup` and `clean` know it; an interrupted pull left one, whose right chunks stay
2  fetch      parallel ranges, each checked against the manifest's chunk digests before it is written at its offset
3  durable    every file fsynced, with the writer's times; the manifest, byte for byte; the folders
4  publish    each part renamed to its name, which nothing may have; the main model last
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ckptstore import side as side_folders
from ckptstore.backends.base import Backend
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    AlreadyExistsError,
    CommitUncertain,
    IntegrityError,
    NotFoundError,
    from_os_error,
)
from ckptstore.frameworks.areal import layout
from ckptstore.frameworks.steps import plain_name
from ckptstore.lock import RunLock
from ckptstore.manifest import Manifest
from ckptstore.model import Checkpoint, Part, Status
from ckptstore.names import check_name, check_names
from ckptstore.parts import find_manifest, folder_of, judged, read_manifest, read_part
from ckptstore.transfer.receiving import Bringing, bring, fill
from ckptstore.verify import Notify

UNVOUCHED = "no manifest came with it: its structure is whole, and which bytes were written nobody can say (seal it)"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a pull did for one part of a checkpoint, or with `dry_run` would do."""

    step: int
    part: str
    path: str
    fetched_bytes: int
    kept_bytes: int  #: were here already: in the stage that an interrupted pull left, or all of it
    there_before: bool
    manifest_sha256: str  #: empty where no manifest came with it
    notes: tuple[str, ...] = ()


def pull(
    source: Backend,
    checkpoint: Checkpoint,
    run: str,
    *,
    dry_run: bool = False,
    bringing: Bringing = bring,
    notify: Notify | None = None,
) -> list[Fetched]:
    """Bring one checkpoint of the run `source` into the local run's folder, which is made where it is missing.

    IntegrityError for a checkpoint that is not whole there, or whose bytes are not those of its manifest; AlreadyExistsError
    where something else has its name here; BusyError while another ckptstore is at work on the run. Ctrl-C and any kill leave
    nothing but the stage, with which the next pull goes on. `bringing` fetches the bytes (sharing.py: by several ranks).
    """
    parts = [(judged(source, part, manifest), manifest) for part, manifest in _described(source, checkpoint)]
    bad = [f"{part.name}: {finding}" for part, _ in parts for finding in part.findings]
    if bad or not all(part.status.usable for part, _ in parts):
        raise IntegrityError(
            f"step {checkpoint.step} in {source.location} is not whole: {'; '.join(bad[:3])}",
            hint="`ckptstore list --run URL` shows all.",
        )
    parts = [(part, None if manifest is None or manifest.inspect(part.files).void else manifest) for part, manifest in parts]
    for part, _ in parts:
        check_name(folder_of(source, part))
        check_names(file.name for file in part.files)
    run = os.path.abspath(run)
    here = {part.name: _here(run, _home(source, part), part, manifest) for part, manifest in parts}
    ordered = sorted(parts, key=lambda pair: pair[0].name == layout.MAIN_PART)
    if dry_run or all(here.values()):
        if not dry_run:
            _forget(_side(run), _key(source, checkpoint, ordered))
        return [
            _result(source, run, checkpoint, part, manifest=manifest, kept=0, here=here[part.name])
            for part, manifest in ordered
        ]
    try:
        os.makedirs(run, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, doing="creating", path=run) from error
    side = _side(run)
    side_folders.make_side(side)
    with RunLock(side, f"pulling step {checkpoint.step}") as lock:
        stage = side_folders.open_stage(side, _key(source, checkpoint, ordered))
        results = []
        before = 0
        for part, manifest in ordered:

            def progress(done_bytes: int, _: int, before: int = before) -> None:
                lock.update(f"pulling step {checkpoint.step}", before + done_bytes, checkpoint.size_bytes)
                if notify is not None:
                    notify(f"pulling step {checkpoint.step}", before + done_bytes, checkpoint.size_bytes)

            kept = 0
            if not here[part.name]:
                kept = fill(source, part, manifest, stage.part(part.name), bringing=bringing, progress=progress).kept_bytes
                _finish(stage.part(part.name), part, manifest, os.stat(run))
            before += part.size_bytes
            results.append(_result(source, run, checkpoint, part, manifest=manifest, kept=kept, here=here[part.name]))
        for part, _ in ordered:
            if not here[part.name]:
                _publish(stage.part(part.name), os.path.join(run, _home(source, part)), model=os.stat(run))
        side_folders.discard(side, os.path.basename(stage.path))
    return results


def _side(run: str) -> str:
    return side_folders.side_folder(run, os.path.join(run, layout.MAIN_PART, layout.SLOT))


def _forget(side: str, key: str) -> None:
    """Remove the stage of a pull that was killed when all was in its place."""
    for name, found in side_folders.stages(side):
        if found == key:
            with RunLock(side, "removing a stage"):
                side_folders.discard(side, name)


def _home(source: Backend, part: Part) -> str:
    """The part's folder in the local run: a disk needs no generations."""
    return plain_name(folder_of(source, part))


def _described(source: Backend, checkpoint: Checkpoint) -> list[tuple[Part, Manifest | None]]:
    """Each part's manifest, None where there is none. One that cannot be read, or is none, is an error: not "no manifest"."""
    found: list[tuple[Part, Manifest | None]] = []
    for part in checkpoint.parts:
        try:
            found.append((part, read_manifest(source, folder_of(source, part))))
        except NotFoundError:
            found.append((part, None))
    return found


def _key(source: Backend, checkpoint: Checkpoint, parts: list[tuple[Part, Manifest | None]]) -> str:
    """Names what the stage is filled with. Without a manifest nothing tells whether it is still the same: by times then."""
    known = [manifest.content if manifest else str(part.mtime_ns) for part, manifest in parts]
    return f"pull {source.location} {checkpoint.step} {' '.join(known)}"


def _result(
    source: Backend, run: str, checkpoint: Checkpoint, part: Part, *, manifest: Manifest | None, kept: int, here: bool
) -> Fetched:
    return Fetched(
        step=checkpoint.step,
        part=part.name,
        path=os.path.join(run, _home(source, part)),
        fetched_bytes=0 if here else part.size_bytes - kept,
        kept_bytes=part.size_bytes if here else kept,
        there_before=here,
        manifest_sha256=manifest.sha256 if manifest else "",
        notes=() if manifest else (UNVOUCHED,),
    )


def _here(run: str, folder: str, part: Part, manifest: Manifest | None) -> bool:
    """Whether the part is here already, by its manifest. AlreadyExistsError where something else has its name."""
    path = os.path.join(run, folder)
    backend = LocalBackend(path)
    try:
        tree = backend.tree(max_depth=5)
    except NotFoundError:
        return False
    found = read_part(backend, part.name, "", tree)
    if not found.files and all(not entry.name.startswith("ckptstore") for entry in tree[""].entries):
        return False  # AReaL's helpers make folders by looking
    mine = find_manifest(backend, "")
    if found.status is Status.COMMITTED and mine is not None and manifest is not None and mine.content == manifest.content:
        return True
    raise AlreadyExistsError(
        f"{path} is there already, and not the same: {found.status}, {len(found.files)} files",
        hint="Rename it, or pull --to another folder. One without a manifest can be sealed, and is compared then.",
    )


def _finish(target: str, part: Part, manifest: Manifest | None, model: os.stat_result) -> None:
    """Step 3: owner and mode, and the manifest."""
    try:
        for file in part.files:
            side_folders.like(os.path.join(target, file.name), model, mode=model.st_mode & 0o666)
        if manifest is not None:
            side_folders.write_manifest(target, manifest.at_home, model=os.stat(os.path.join(target, part.files[0].name)))
        for folder, _, _ in os.walk(target, topdown=False):
            side_folders.like(folder, model)
            side_folders.sync_folder(folder)
    except OSError as error:
        raise from_os_error(error, doing="preparing", path=target) from error


def _publish(staged: str, target: str, *, model: os.stat_result) -> None:
    """Step 4."""
    parent = os.path.dirname(target)
    try:
        if not os.path.isdir(parent):
            os.mkdir(parent)
            side_folders.like(parent, model)
        if os.path.isdir(target):
            side_folders.remove_empty(target)
        side_folders.rename_in(staged, target)
    except OSError as error:
        raise from_os_error(error, doing="placing", path=target) from error
    try:
        side_folders.sync_folder(parent)
        side_folders.sync_folder(os.path.dirname(parent))
    except OSError as error:
        raise CommitUncertain(f"{target} is there, whole, and the disk has not confirmed it: {error.strerror}") from error
