"""Replace recover_info file by file, where the file system cannot exchange two folders.

To rename one folder away and the other in leaves a moment without any, in which AReaL starts from step 0 and says nothing.
One file over another is atomic everywhere. So `saver_info.json` is made one that AReaL refuses before anything else is
changed, and is the last that is made right: in between, whatever the mixture, the trainer's load raises KeyError.
"""

from __future__ import annotations

import os
import secrets
import shutil

from ckptstore import side as side_folders
from ckptstore.frameworks.areal import resume_state
from ckptstore.frameworks.areal.recover_info import CONTROLS
from ckptstore.untrusted import open_regular

#: The file that decides: AReaL's trainer reads its keys unconditionally, and has no fallback for one without them.
DECIDING = CONTROLS[0]
#: What commit.identity() says of a folder that AReaL refuses because of us, whatever else is in it.
BLOCKED = "blocked"


def is_blocked(folder: str) -> bool:
    """Whether the deciding file in `folder` is the one that we block with."""
    wanted = resume_state.blocking()[DECIDING]
    try:
        with open_regular(os.path.join(folder, DECIDING)) as file:
            return file.read(len(wanted) + 1) == wanted
    except OSError:
        return False


def keep(side: str, folder: str, target: str) -> None:
    """Copy `folder` to `target`, which must not exist: durable, and there whole or not at all. OSError as it comes."""
    draft = _draft(side)
    _copy(folder, draft)
    side_folders.rename_in(draft, target)
    side_folders.sync_folder(os.path.dirname(target))


def block(side: str, folder: str) -> None:
    """Make AReaL refuse the recover_info in `folder`: one rename. OSError as it comes; the caller syncs the folder."""
    draft = _draft(side)
    side_folders.write_durably(draft, resume_state.blocking()[DECIDING])
    model = os.stat(folder)
    side_folders.like(draft, model, mode=model.st_mode & 0o666)
    os.rename(draft, os.path.join(folder, DECIDING))


def fill(side: str, folder: str, source: str) -> None:
    """Make a blocked `folder` hold what `source` holds, the deciding file last: until then AReaL refuses it.

    May be done again after a crash. OSError as it comes; the caller syncs the folder.
    """
    names = set(os.listdir(source))
    for name in sorted({*os.listdir(folder), *names} - {DECIDING}):
        _remove_folder(os.path.join(folder, name))
        if name in names:
            _put(side, os.path.join(source, name), os.path.join(folder, name))
        elif os.path.lexists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))
    side_folders.sync_folder(folder)
    if DECIDING in names:
        _put(side, os.path.join(source, DECIDING), os.path.join(folder, DECIDING))
    else:  # somebody's, and not whole: that is what the trainer shall find again
        os.unlink(os.path.join(folder, DECIDING))


def _draft(side: str) -> str:
    return os.path.join(side, f"trash-{secrets.token_hex(8)}")  # what a crash leaves, `clean` removes


def _put(side: str, source: str, target: str) -> None:
    draft = _draft(side)
    _copy(source, draft)
    os.rename(draft, target)


def _remove_folder(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)


def _copy(source: str, target: str) -> None:
    seen = os.lstat(source)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target, 0o700)
        for name in sorted(os.listdir(source)):
            _copy(os.path.join(source, name), os.path.join(target, name))
        side_folders.sync_folder(target)
    else:
        with open_regular(source) as file:
            side_folders.write_durably(target, file.read())
    side_folders.like(target, seen)
    os.utime(target, ns=(seen.st_mtime_ns, seen.st_mtime_ns))
