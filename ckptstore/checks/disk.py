"""Where the run lies: will it be there tomorrow, may this user write, and is there room."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ckptstore import probe
from ckptstore import side as side_folders
from ckptstore.checks import Diagnosis, Patient, bad, gigabytes, ok, warn
from ckptstore.frameworks.areal import layout
from ckptstore.locate import current_user, relative_fileroot
from ckptstore.model import Checkpoint
from ckptstore.sizes import counted

_CONTAINER = ("overlay", "aufs")
_MEMORY = ("tmpfs", "ramfs")
CLOCK_S = 5.0
_FEW_INODES = 1000


def fileroot(patient: Patient) -> Iterator[Diagnosis]:
    """Absolute, or the run is found from one folder only."""
    if relative := relative_fileroot(patient.config):
        yield bad(
            "fileroot",
            f"cluster.fileroot is {relative}, relative: a trainer started from another folder finds no run and starts fresh",
            f"Write cluster.fileroot: {os.path.abspath(relative)} in the YAML.",
        )
    elif not patient.run.fileroot:
        yield warn(
            "fileroot",
            f"{patient.run.path} does not lie as AReaL lays its runs out: a trainer would look elsewhere",
            "AReaL's layout is FILEROOT/checkpoints/USER/EXPERIMENT/TRIAL.",
        )
    elif not os.path.isdir(patient.run.fileroot):
        yield warn(
            "fileroot",
            f"{patient.run.fileroot} does not exist: right before the very first start only",
            "Mount the volume, or create the folder.",
        )
    else:
        yield ok("fileroot", f"{patient.run.fileroot}, absolute")


def disk(patient: Patient) -> Iterator[Diagnosis]:
    """A disk that outlives the container and the machine."""
    place = side_folders.existing(patient.run.path)
    kind = probe.file_system(place)
    what = "the store" if patient.of_steps else "cluster.fileroot"
    if kind in _CONTAINER:
        found = f"{place} is on the container's own disk ({kind}): all of it is gone with the container"
        yield bad("disk", found, f"Put {what} on a mounted volume (on rented machines often /workspace).")
    elif kind in _MEMORY:
        found = f"{place} is in memory ({kind}): all of it is gone with the machine"
        yield bad("disk", found, f"Put {what} on a mounted volume.")
    else:
        yield ok("disk", f"{place} is on {kind}")


def user(patient: Patient) -> Iterator[Diagnosis]:
    """AReaL puts the user's name in the path: another user's trainer does not see this run."""
    me = current_user()
    if patient.run.user and patient.run.user != me:
        yield bad(
            "user",
            f"the run is {patient.run.user}'s, and you are {me}: a trainer that you start looks below checkpoints/{me}, "
            "and starts fresh",
            f"Run trainer and ckptstore as {patient.run.user}.",
        )
        return
    twins = []
    if patient.run.fileroot:
        twins = [
            run.user
            for run in layout.discover(patient.run.fileroot)
            if (run.experiment, run.trial) == (patient.run.experiment, patient.run.trial) and run.user != patient.run.user
        ]
    if twins:
        found = f"{', '.join(twins)} has a run of the same names: which one is resumed depends on who starts the trainer"
        yield warn("user", found, "Start the trainer as the user whose run it is, or change trial_name.")
    else:
        yield ok("user", f"{me}, whose run it is" if patient.run.user else me)


def permissions(patient: Patient) -> Iterator[Diagnosis]:
    """Everything that the trainer overwrites, and that a setup replaces, must be writable."""
    run = patient.run.path
    must = [side_folders.existing(run), side_folders.existing(patient.side)]
    if patient.listing is not None:
        parts = {part.name for checkpoint in patient.listing.checkpoints for part in checkpoint.parts}
        slot = patient.listing.slot
        must += [os.path.join(run, name) for name in sorted(parts)]
        must += [os.path.join(part.path, file.name) for part in (slot.parts if slot else ()) for file in part.files]
        must += [part.path for part in (slot.parts if slot else ())]
        must += [os.path.join(run, layout.RECOVER_INFO)]
    if patient.run.logs:
        must.append(side_folders.existing(patient.run.logs))
    denied = [path for path in dict.fromkeys(must) if os.path.lexists(path) and not os.access(path, os.W_OK)]
    if denied:
        more = f" and {len(denied) - 1} more" if len(denied) > 1 else ""
        if os.statvfs(denied[0]).f_flag & os.ST_RDONLY:
            found = f"{denied[0]} is mounted read-only: the trainer's next save fails there"
            yield bad(
                "permissions", found, "Mount it for writing. If nobody mounted it so, see `dmesg`: a disk that fails does that."
            )
            return
        yield bad(
            "permissions",
            f"{current_user()} may not write {denied[0]}{more}: the trainer's next save fails there",
            f"Run as the user that trains, or: chown -R {current_user()} {run}",
        )
    else:
        replaces = "a save" if patient.of_steps else "a save or a setup"
        yield ok("permissions", f"{current_user()} may write everything that {replaces} replaces")


def space(patient: Patient) -> Iterator[Diagnosis]:
    """Room for the saves to come, and for the second copy that stands beside a slot while it is replaced."""
    place = side_folders.existing(patient.run.path)
    seen = os.statvfs(place)
    free = seen.f_bavail * seen.f_frsize
    if seen.f_files and seen.f_favail < _FEW_INODES:
        found = f"{seen.f_favail} more files fit on {place} (inodes), whatever the free space"
        yield bad("space", found, "Remove small files there: caches, old logs.")
    export, slot = _sizes(patient)
    if not export and not slot:
        yield ok("space", f"{gigabytes(free)} free on {place}; nothing is saved yet that would tell how much is needed")
        return
    second = 0 if patient.of_steps else max(slot, export)
    needed = patient.saves * export + second
    network = probe.is_network(probe.file_system(place))
    server = " as the server says; quotas are unseen" if network else ""
    fits = int((free - second) // export) if export else 0
    saves = f"{counted(patient.saves, 'more save')} ({gigabytes(export)} each)"
    copy = f" and a second copy of the slot ({gigabytes(second)})" if second else ""
    found = f"{gigabytes(free)} free on {place}{server}; {saves}{copy}: {gigabytes(needed)}"
    fewer = "keep fewer steps (`ckptstore prune`)" if patient.of_steps else "save less often: AReaL removes no save itself"
    remedy = f"Free some space (`ckptstore clean` says what it could remove), or {fewer}."
    if free < second + export:
        yield bad("space", found, remedy)
    elif free < needed:
        yield warn("space", found, remedy)
    else:
        yield ok("space", f"{found}; {fits} would fit" if export else found)


def _sizes(patient: Patient) -> tuple[int, int]:
    """Bytes of one export (the newest whole one) and of the slot; 0 where there is none."""
    if patient.listing is None:
        return 0, 0
    whole: list[Checkpoint] = [checkpoint for checkpoint in patient.listing.checkpoints if checkpoint.status.usable]
    slot = patient.listing.slot
    return whole[-1].size_bytes if whole else 0, slot.size_bytes if slot else 0


def clock(patient: Patient) -> Iterator[Diagnosis]:
    """Files tell by their times what belongs together: a clock that went back confuses trainer and ckptstore alike."""
    if patient.listing is None or not patient.listing.newest_mtime_ns:
        return
    ahead_s = patient.listing.newest_mtime_ns / 1e9 - patient.now_s
    if ahead_s > CLOCK_S:
        found = (
            f"{patient.listing.newest_file} is {ahead_s:.0f} s in the future: the clock here or where it was written is wrong"
        )
        yield warn("clock", found, "Set the clock (timedatectl status); ages and the order of saves cannot be trusted.")
    else:
        yield ok("clock", "no file is from the future")


ALL = (fileroot, disk, user, permissions, space, clock)
OF_STEPS = (disk, permissions, space, clock)
