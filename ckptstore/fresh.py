"""May training start from nothing? Only where every place that was named could be read, and was empty.

A volume that is not mounted looks just like an empty one, and a trainer that starts fresh there trains for nothing, or
writes over the run once the volume is back.
"""

from __future__ import annotations

import errno
import os

from ckptstore import probe
from ckptstore.errors import RefusedError, from_os_error

#: File systems that are gone with the container or the machine: where a volume should be mounted, they show that none is.
_FLEETING = frozenset({"overlay", "aufs", "tmpfs", "ramfs"})


def is_fresh(fileroot: str, user: str, experiment: str, trial: str) -> bool:
    """Whether there is no trace of the run: True, its folder is missing or holds no file; False, it holds some.

    Errors: AccessError or StorageError for a place that cannot be read; RefusedError for one that cannot be told from a
    volume that is not mounted.
    """
    trial_folder = os.path.join(fileroot, "checkpoints", user, experiment, trial)
    if not _exists(fileroot):
        ancestor = fileroot
        while not _exists(ancestor):
            ancestor = os.path.dirname(ancestor)
        _refuse_fleeting(fileroot, ancestor)
        return True
    if not _names(fileroot):
        _refuse_fleeting(fileroot, fileroot)
    path = fileroot
    for name in ("checkpoints", user, experiment, trial):
        if name not in _names(path):
            return True
        path = os.path.join(path, name)
    return not _holds_files(trial_folder)


def _refuse_fleeting(fileroot: str, place: str) -> None:
    kind = probe.file_system(place)
    if kind in _FLEETING:
        raise RefusedError(
            f"{fileroot} is empty, and {place} is on {kind}, which is gone with the container: "
            "a volume that is not mounted looks just so",
            hint="Mount the volume, or create the fileroot on a persistent disk first.",
        )


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise from_os_error(error, doing="looking at", path=path) from error
    return True


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise from_os_error(error, doing="listing", path=path) from error


def _holds_files(path: str) -> bool:
    def unreadable(error: OSError) -> None:
        raise from_os_error(error, doing="listing", path=error.filename or path) from error

    return any(files for _, _, files in os.walk(path, onerror=unreadable))
