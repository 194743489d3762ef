"""The side folder: where everything of ours that belongs to a run lies, beside the trial and never inside it.

{experiment}/.ckptstore/{trial}/
lock, journal.json                       one writer at a time; a commit to be finished
stage-<random>/                          being filled; a crash leaves it, the next setup continues it
old-<time>-<random>/{part}/              a slot that was set aside
trash-<random>/, probe-<random>/         on their way out
ranks.json, ranks-<random>/              where the ranks of one launch meet (rendezvous.py)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptstore import native
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, UsageError, from_os_error
from ckptstore.frameworks.areal.layout import SIDE
from ckptstore.manifest import FileEntry, Manifest, recorded_time
from ckptstore.model import DRAFT_PREFIX, MANIFEST_NAME
from ckptstore.names import check_name
from ckptstore.native import Digest
from ckptstore.untrusted import open_regular

STAGE_INFO = "stage.json"
JOURNAL = "journal.json"


def side_folder(run: str, slot: str) -> str:
    """Where our own things of this run go: beside the trial, beside a slot that lies outside of it, or in a store of steps."""
    if os.path.islink(run):  # by whatever name the trial is called, one folder, one lock
        real = os.path.realpath(run)
        slot = real + slot.removeprefix(run) if os.path.commonpath([run, slot]) == run else slot
        run = real
    if os.path.isdir(os.path.join(run, SIDE)):  # no AReaL run has it: a folder in there would be a model
        return os.path.join(run, SIDE)
    parent = os.path.dirname(slot)
    inside = os.path.commonpath([run, slot]) == run
    if inside and _same_device(os.path.dirname(run), existing(parent)):
        return os.path.join(os.path.dirname(run), SIDE, os.path.basename(run))
    if inside:  # the trial is a mount of its own: a part's folder is the only place on its file system that AReaL ignores
        return os.path.join(parent if parent != run else os.path.join(run, "default"), SIDE)
    return os.path.join(parent, SIDE, os.path.basename(slot))


def existing(path: str) -> str:
    """The nearest folder at or above `path` that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _same_device(a: str, b: str) -> bool:
    return os.stat(a).st_dev == os.stat(b).st_dev


def make_side(side: str) -> None:
    """Create the side folder, with the owner of the folder that it is in; never through a link."""
    missing = []
    path = side
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o755)
                like(folder, os.stat(path))
                sync_folder(os.path.dirname(folder))  # an old slot is set aside in here: it must not get lost with the name
        if os.path.islink(side) or os.path.islink(os.path.dirname(side)):
            raise UsageError(f"{side} is a link, and ckptstore writes through none", hint="Remove the link.")
    except OSError as error:
        raise from_os_error(error, doing="creating", path=side) from error


def like(path: str, model: os.stat_result, *, mode: int | None = None) -> None:
    """Give `path` the owner and mode of `model` (no set-id bits); the owner only where we may."""
    with contextlib.suppress(PermissionError):
        os.chown(path, model.st_uid, model.st_gid, follow_symlinks=False)
    os.chmod(path, (model.st_mode if mode is None else mode) & 0o777)


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder being filled. `key` says with what: the same key may be continued after a crash."""

    path: str
    key: str
    resumed: bool

    def part(self, name: str) -> str:
        """The folder that becomes the slot of part `name`."""
        return os.path.join(self.path, check_name(name))


def open_stage(side: str, key: str) -> Stage:
    """The stage for `key`: one that a crash left, or a new one. The caller holds the run's lock, so no other is alive."""
    for name, found in stages(side):
        if found == key:
            return Stage(os.path.join(side, name), key, True)
    path = os.path.join(side, f"stage-{secrets.token_hex(8)}")
    try:
        os.mkdir(path, 0o700)
        with open(os.path.join(path, STAGE_INFO), "x", encoding="ascii") as file:
            json.dump({"key": key}, file)
    except OSError as error:
        raise from_os_error(error, doing="creating the stage", path=path) from error
    return Stage(path, key, False)


def stages(side: str) -> list[tuple[str, str]]:
    """Stages in the side folder: name and key (empty when a crash came before it was written)."""
    found = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(side)):
            if name.startswith("stage-") and not os.path.islink(os.path.join(side, name)):
                key = ""
                with (
                    contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError),
                    open_regular(os.path.join(side, name, STAGE_INFO)) as file,
                ):
                    key = str(json.loads(file.read(65536))["key"])
                found.append((name, key))
    return found


def discard(side: str, name: str) -> None:
    """Remove something of ours in the side folder: renamed out of the way first, so that no half of it is ever used."""
    path, doomed = os.path.join(side, name), os.path.join(side, f"trash-{secrets.token_hex(8)}")
    try:
        os.rename(path, doomed)
        if os.path.isdir(doomed) and not os.path.islink(doomed):
            shutil.rmtree(doomed)
        else:
            os.unlink(doomed)
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, doing="removing", path=path) from error


def keep_only(folder: str, names: Iterable[str]) -> None:
    """Make a folder of ours writable again, and remove all of it that is not one of the files `names`. OSError as it comes."""
    wanted = set(names)
    above = {parent for name in wanted for parent in _parents(name)}
    pending = [""]
    while pending:
        inside = pending.pop()
        os.chmod(os.path.join(folder, inside), 0o700)
        with os.scandir(os.path.join(folder, inside)) as entries:
            found = list(entries)
        for entry in found:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                if name in above:
                    pending.append(name)
                else:
                    shutil.rmtree(entry.path)
            elif name in wanted and entry.is_file(follow_symlinks=False):
                os.chmod(entry.path, 0o600)
            else:
                os.unlink(entry.path)


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def remove_empty(path: str) -> None:
    """Remove a folder that holds folders at most: what AReaL's helpers leave. OSError where a file has come into it."""
    for folder, _, _ in os.walk(path, topdown=False):
        os.rmdir(folder)


def rename_in(staged: str, target: str) -> None:
    """Rename to a name that nothing has (FileExistsError); where that cannot be asked for, the run's lock has to do."""
    try:
        native.rename_noreplace(staged, target)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), staged, None, target) from error
        os.rename(staged, target)


def remove_tree(path: str) -> None:
    """Remove a folder of ours and all below it, if it is there; what cannot be removed stays, and harms nobody."""
    shutil.rmtree(path, ignore_errors=True)


def settle(folder: str, digests: Mapping[str, Digest], *, model: os.stat_result, file_mode: int) -> tuple[FileEntry, ...]:
    """Give what was written into `folder` the owner of `model`, and modes; sync its folders; the files' manifest entries.

    OSError as it comes.
    """
    entries = []
    for name, digest in sorted(digests.items()):
        path = os.path.join(folder, name)
        like(path, model, mode=file_mode)
        info = os.stat(path, follow_symlinks=False)
        entries.append(FileEntry(name, info.st_size, recorded_time(info.st_mtime_ns), info.st_ino, digest.crc, digest.chunks))
    for inside, _, _ in os.walk(folder, topdown=False):
        like(inside, model)
        sync_folder(inside)
    return tuple(entries)


def write_manifest(folder: str, manifest: Manifest, *, model: os.stat_result) -> None:
    """Write the manifest into `folder`, durable and all-or-nothing, with owner and mode of the file `model`."""
    final = os.path.join(folder, MANIFEST_NAME)
    draft = os.path.join(folder, f"{DRAFT_PREFIX}{secrets.token_hex(4)}")
    try:
        write_durably(draft, manifest.to_bytes())
        like(draft, model, mode=model.st_mode & 0o666)
        os.rename(draft, final)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise from_os_error(error, doing="writing the manifest", path=final) from error


def write_durably(path: str, data: bytes) -> None:
    """Create a file that must not exist, with `data` in it and on the disk. OSError as it comes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(path, "wb", opener=lambda path, _: os.open(path, flags, 0o600)) as file:
        file.write(data)
        file.flush()  # before fsync, or it syncs an empty file
        os.fsync(file.fileno())


def replace_durably(path: str, data: bytes) -> None:
    """Make `data` the content of a file in a side folder, in one act, readable as the folder is. OSError as it comes."""
    folder = os.path.dirname(path)
    draft = f"{path}.{secrets.token_hex(4)}"
    try:
        write_durably(draft, data)
        like(draft, os.stat(folder), mode=0o644)
        os.replace(draft, path)
        sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def sync_folder(path: str) -> None:
    """Fsync a folder. File systems that have no such thing say EINVAL: probe.py has told the user so."""
    try:
        native.fsync_path(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


@dataclass(frozen=True, slots=True)
class OldSlot:
    """A slot that was set aside: one folder a part."""

    name: str
    path: str
    parts: tuple[str, ...]
    size_bytes: int
    set_aside_at_s: float


def old_slots(side: str) -> list[OldSlot]:
    """Set-aside slots, newest first."""
    return sorted(_old_slots(side), key=lambda old: old.name, reverse=True)


def _old_slots(side: str) -> Iterator[OldSlot]:
    with contextlib.suppress(OSError):
        for name in os.listdir(side):
            path = os.path.join(side, name)
            with contextlib.suppress(OSError):  # one that another user keeps to himself hides no other
                if name.startswith("old-") and (parts := tuple(sorted(os.listdir(path)))):
                    yield OldSlot(name, path, parts, size_of(path), os.stat(path).st_ctime)


def names_in(side: str) -> list[str]:
    """What lies in a side folder, in order; nothing where it cannot be told."""
    try:
        return sorted(os.listdir(side))
    except OSError:
        return []


def size_of(path: str) -> int:
    """Bytes of all files below `path`; links not followed."""
    total = 0
    with contextlib.suppress(CkptStoreError):
        for folder in LocalBackend(path).tree(max_depth=8).values():
            total += sum(entry.size_bytes for entry in folder.entries if entry.mode & 0o170000 == 0o100000)
    return total


def leftovers(side: str) -> Sequence[str]:
    """Names of what dead writers left in the side folder: stages, trash, probes. Never an old slot.

    While a journal is there, a stage is none of them: after an exchange it holds the old slot.
    """
    ours = ["trash-", "probe-", "ranks-", "ranks.json", f"{JOURNAL}.", "damaged.json."]
    if not os.path.lexists(os.path.join(side, JOURNAL)):
        ours.append("stage-")
    with contextlib.suppress(OSError):
        names = os.listdir(side)
        empty = [name for name in names if name.startswith("old-") and not any(_entries(os.path.join(side, name)))]
        return sorted([name for name in names if name.startswith(tuple(ours))] + empty)
    return []


def _entries(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return ["unknown"]
