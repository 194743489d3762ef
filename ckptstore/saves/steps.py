"""Saves into a store of steps, so that a crash at any instant leaves each step as it was, or the new one, whole.

    1  begin       {store}/.ckptstore/save-<random>/step/, 0700; `owner` beside it is held while its writer lives (owner.py)
    2  write       every file, digested on the way, fsynced (the engine; several ranks may write into one draft)
    3  manifest    written and fsynced, then every folder of the draft
    4  publish     where steps of higher numbers were there at the beginning, they are noted as left (left.py). Then one
                   rename to step-N that replaces nothing; a step that is there already is exchanged for the new one, and
                   is untouched until then. Where the file system cannot exchange, the old one is renamed to
                   .ckptstore/aside-<step>-<random> and the new one in; `mend` puts it back after a crash between the two
    5  sync        the store's folder, and the one that was renamed from
    6  discard     the old one, renamed out of the way first

A draft that a node has prepared, and whose writer died, is none of the leftovers: prepared.py.

Steps 4 to 6 hold the store's lock; writing does not, so that saves of different steps may overlap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import ckptstore
from ckptstore import left, native, probe
from ckptstore import side as side_folders
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    BusyError,
    CkptStoreError,
    CommitUncertain,
    NotCommitted,
    NotFoundError,
    RefusedError,
    UsageError,
    from_os_error,
)
from ckptstore.frameworks import steps as layout
from ckptstore.frameworks.areal.layout import SIDE, files_of
from ckptstore.leaving import left_by
from ckptstore.left import Left
from ckptstore.lock import LockFile, RunLock
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import MANIFEST_NAME, NodeSet
from ckptstore.names import check_names
from ckptstore.saves import owner, prepared
from ckptstore.saves.new_store import make_store
from ckptstore.untrusted import open_regular

PART = "default"
LOCK_PATIENCE_S = 60.0
_ASIDE = re.compile(r"aside-([0-9]+)-[0-9a-f]+")


@dataclass(slots=True)
class Draft:
    """A step being written: fill `path` by the engine, then `commit`, else `abandon`. Not thread-safe."""

    root: str  #: the store
    step: int
    home: str  #: the draft's own folder in the side folder
    held: LockFile = field(repr=False)  #: the owner file: locked until it is closed, with the draft's object at the latest
    process: int = field(default_factory=os.getpid, repr=False)
    leaves: Mapping[str, Left] = field(default_factory=dict)  #: what training has left, where it has gone back to save this

    @property
    def name(self) -> str:
        """What `home_of` makes its home of."""
        return os.path.basename(self.home).removeprefix("save-")

    @property
    def path(self) -> str:
        """The folder that becomes the step."""
        return os.path.join(self.home, "step")


def side_of(root: str) -> str:
    """The side folder of a store of steps."""
    return os.path.join(root, SIDE)


def begin(root: str, step: int, *, name: str = "") -> Draft:
    """Make the store where there is none, and a draft in it; `name` (hex digits) says which, else it is random.

    RefusedError for a folder that is something else: AReaL's trainer takes every folder in its run for a model.
    """
    layout.folder_name(step)
    root = os.path.realpath(root)
    side = side_of(root)
    if not os.path.isdir(side):
        make_store(root)
    sweep(root)
    leaves = left_by(LocalBackend(root), step, side_folders.names_in(root))
    name = name or secrets.token_hex(16)
    home, unborn = home_of(root, name), os.path.join(side, f"new-{name}")
    try:
        os.makedirs(os.path.join(unborn, "step"), 0o700)
        held = owner.create(os.path.join(unborn, owner.OWNER))
        os.rename(unborn, home)  # from here on it is somebody's: whoever sweeps finds it locked
    except OSError as error:
        raise from_os_error(error, doing="beginning a save in", path=home) from error
    return Draft(root, step, home, held, leaves=leaves)


def home_of(root: str, name: str) -> str:
    """The own folder of the draft of that name."""
    return os.path.join(side_of(os.path.realpath(root)), f"save-{name}")


def commit(
    draft: Draft,
    digests: Mapping[str, native.Digest],
    *,
    chunk_bytes: int = native.CHUNK_BYTES,
    metrics: Mapping[str, float] | None = None,
    source: str = "",
) -> Manifest:
    """Publish the draft, whose files are durable and have these digests, as its step.

    `metrics` are recorded in the manifest; those that are not finite numbers are left out. Errors: NotCommitted (the store
    is as it was), CommitUncertain (the new one is in, the disk did not confirm it). The draft is gone afterwards.
    """
    try:
        manifest = describe(draft, digests, chunk_bytes=chunk_bytes, metrics=metrics or {}, source=source)
        publish(draft, manifest)
        prepared.discard(side_of(draft.root), up_to=draft.step)
    except (NotCommitted, CommitUncertain):
        raise
    except CkptStoreError as error:
        raise NotCommitted(f"step {draft.step} was not saved: {error}", hint=error.hint) from error
    finally:
        abandon(draft)
    return manifest


def publish(draft: Draft, manifest: Manifest, *, keep_old: bool = False) -> None:
    """Make a draft that was described its step. With `keep_old` what it replaces stays beside: node_sets.discard_old.

    NotCommitted, CommitUncertain; BusyError and others where it was not tried.
    """
    with locked(draft.root, f"save of step {draft.step}"):
        if draft.leaves:  # first: nobody may see this step, and go on from what it leaves
            left.add(side_of(draft.root), draft.leaves)
            left.warn(draft.step, draft.leaves)
        _publish(draft, manifest, keep_old=keep_old)


def abandon(draft: Draft) -> None:
    """Remove what is left of a draft. After a commit that is the step which was replaced, if any.

    In a child that was forked meanwhile it does nothing: the draft is its parent's, and so is the save.
    """
    if draft.held.closed or draft.process != os.getpid():
        return
    with contextlib.suppress(CkptStoreError):  # what stays is swept by a later save
        side_folders.discard(os.path.dirname(draft.home), os.path.basename(draft.home))
    draft.held.close()


def leave(draft: Draft) -> None:
    """Let go of a draft that is prepared: it stays as after a kill (prepared.py)."""
    if not draft.held.closed and draft.process == os.getpid():
        owner.let_go(draft.held)


def files_in(directory: str) -> list[native.FileSpec]:
    """The files of a folder as they are now. RefusedError for links and devices in it, UsageError where there are none."""
    files, findings = files_of(LocalBackend(directory).tree(max_depth=4), "")
    files = [file for file in files if file.name != MANIFEST_NAME]
    odd = [f"{file.name} is a {file.kind}" for file in files if file.kind != "file"]
    if findings or odd:
        raise RefusedError(f"{directory} cannot be saved: {findings[0] if findings else odd[0]}", hint="Save plain files.")
    if not files:
        raise UsageError(f"{directory} holds no files: there is nothing to save")
    check_names(file.name for file in files)
    return [native.FileSpec(file.name, file.size_bytes, file.mtime_ns, file.inode) for file in files]


@contextlib.contextmanager
def locked(root: str, doing: str) -> Iterator[None]:
    """Hold the store's lock, waiting up to LOCK_PATIENCE_S for it: it is only ever held for moments. BusyError after that."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunLock(side_of(root), doing))
            except BusyError:
                if time.monotonic() > deadline:
                    raise
            else:
                mend(root)
                yield
                return
        time.sleep(0.05)


def mend(root: str) -> None:
    """Finish a replacement that a crash cut between its two renames. The caller holds the lock."""
    side = side_of(root)
    for name in side_folders.names_in(side):
        if (match := _ASIDE.fullmatch(name)) is None:
            continue
        target = os.path.join(root, layout.folder_name(int(match[1])))
        if os.path.lexists(target):
            side_folders.discard(side, name)
            continue
        try:
            side_folders.rename_in(os.path.join(side, name), target)
            side_folders.sync_folder(root)
        except OSError as error:
            raise from_os_error(error, doing="putting back", path=target) from error


def needs_mending(root: str) -> bool:
    """Whether a crash left a step aside."""
    return any(_ASIDE.fullmatch(name) for name in side_folders.names_in(side_of(root)))


def leftovers(root: str, *, long_dead_s: float = owner.LONG_DEAD_S) -> list[str]:
    """Names in the side folder that dead writers left: drafts that nobody holds, and trash. The newest prepared one stays.

    `long_dead_s`: after so long without a write the writer of a draft counts as dead where nothing can be told of it.
    """
    side = side_of(root)
    kept = [one.name for one in prepared.left(side, long_dead_s=long_dead_s)[-1:]]
    return [
        name
        for name in side_folders.names_in(side)
        if name.startswith("trash-")
        or (name.startswith(("probe-", "new-")) and owner.is_settled(os.path.join(side, name)))
        or (name.startswith("save-") and name not in kept and owner.is_dead(os.path.join(side, name), long_dead_s=long_dead_s))
    ]


def sweep(root: str) -> None:
    """Remove what dead writers left. Anybody's failure to do so harms nobody."""
    for name in leftovers(root):
        with contextlib.suppress(CkptStoreError):
            side_folders.discard(side_of(root), name)


def describe(
    draft: Draft,
    digests: Mapping[str, native.Digest],
    *,
    chunk_bytes: int = native.CHUNK_BYTES,
    metrics: Mapping[str, float],
    source: str = "",
    group: NodeSet | None = None,
    created_at: str = "",
) -> Manifest:
    """Give the files the store's mode and owner, and write the manifest that will make them a checkpoint. All is durable then.

    A part of a set was saved when the coordinator says (`created_at`), so that retention decides alike on all nodes.
    """
    check_names(digests)
    try:
        model = os.stat(draft.root)
        entries = side_folders.settle(draft.path, digests, model=model, file_mode=model.st_mode & 0o666)
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename} was written, and is gone", hint="Is somebody cleaning up there?") from error
    except OSError as error:
        raise from_os_error(error, doing="preparing", path=error.filename or draft.path) from error
    manifest = manifest_of(draft.step, entries, metrics=metrics, source=source, chunk_bytes=chunk_bytes)
    if group is not None:
        manifest = dataclasses.replace(manifest, group=group, created_at=created_at)
    side_folders.write_manifest(draft.path, manifest, model=model)
    return manifest


def manifest_of(
    step: int,
    files: tuple[FileEntry, ...],
    *,
    metrics: Mapping[str, float],
    source: str,
    chunk_bytes: int = native.CHUNK_BYTES,
) -> Manifest:
    """The manifest of a step that was saved."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return Manifest(
        step=step,
        epoch=-1,
        epoch_step=-1,
        part=PART,
        origin="save",
        files=files,
        chunk_bytes=chunk_bytes,
        source=source,
        tool=f"ckptstore {ckptstore.__version__}",
        metrics={name: value for name, value in numbers.items() if math.isfinite(value)},
        nonfinite=tuple(sorted(name for name, value in numbers.items() if not math.isfinite(value))),
    )


def _publish(draft: Draft, manifest: Manifest, *, keep_old: bool) -> None:
    target = os.path.join(draft.root, layout.folder_name(draft.step))
    side = side_of(draft.root)
    replaces = os.path.lexists(target)
    old = f"old-step-{draft.step}-{draft.name}" if replaces and keep_old else ""
    try:
        if not replaces:
            side_folders.rename_in(draft.path, target)
        elif probe.probe(side).exchange:
            place = draft.path
            if old:  # nobody sweeps this name, whichever of the two a crash leaves under it
                place = os.path.join(side, old)
                os.rename(draft.path, place)
            try:
                native.rename_exchange(place, target)
            except OSError:
                if old and not _is_in(target, manifest):
                    os.rename(place, draft.path)
                raise
        else:
            aside = _replace_by_two_renames(draft, target)
            if old:
                os.rename(aside, os.path.join(side, old))
    except OSError as error:
        if not _is_in(target, manifest):  # a network file system may report a failure, and have done it
            raise NotCommitted(
                f"step {draft.step} was not saved: publishing {target}: {error.strerror or error}",
                hint="The store is as it was.",
            ) from error
    try:
        side_folders.sync_folder(draft.root)
        side_folders.sync_folder(draft.home)
        side_folders.sync_folder(side)
    except OSError as error:
        if replaces and not old:  # the old one is kept, beside
            with contextlib.suppress(OSError):
                os.rename(draft.path, os.path.join(side, f"old-step-{draft.step}-{secrets.token_hex(4)}"))
        raise CommitUncertain(
            f"step {draft.step} is there, whole, and the disk has not confirmed it: {error.strerror or error}",
            hint="Look at the disk's health: after a power cut the step may be the old one, or missing.",
        ) from error
    with contextlib.suppress(CkptStoreError):
        mend(draft.root)  # the old one, where it was renamed aside: the next save does it otherwise


def _is_in(target: str, manifest: Manifest) -> bool:
    wanted = manifest.to_bytes()
    try:
        with open_regular(os.path.join(target, MANIFEST_NAME)) as file:
            return file.read(len(wanted) + 1) == wanted
    except OSError:
        return False


def _replace_by_two_renames(draft: Draft, target: str) -> str:
    side = side_of(draft.root)
    aside = os.path.join(side, f"aside-{draft.step}-{secrets.token_hex(4)}")
    os.rename(target, aside)
    try:
        side_folders.sync_folder(side)
        side_folders.rename_in(draft.path, target)
    except OSError:
        if not os.path.lexists(target):
            os.rename(aside, target)
        raise
    return aside
