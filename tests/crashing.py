"""Stop a setup at any of its operations on the file system: by an error, or as dead as by a power cut of the process.

Every system call that changes what is there is counted, in order. A `Crash` at the k-th is a BaseException: no handler for
errors sees it, so what it leaves is what a kill would leave (test_kill.py kills for real).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptstore import native

CHANGING = ("rename", "mkdir", "rmdir", "unlink", "fsync", "chmod", "replace")
NATIVE = ("rename_exchange", "rename_noreplace", "fsync_path", "copy_files")


class Crash(BaseException):
    """The process is gone."""


class Operations:
    """Counts operations and strikes at one of them. `log` names them all."""

    def __init__(self, *, at: int = 0, when: str = "before", how: BaseException | None = None, sticky: bool = False) -> None:
        self.at, self.when, self.how, self.sticky = at, when, how, sticky
        self.log: list[str] = []
        self.details: list[str] = []
        self.struck = ""

    def places(self, every: int) -> list[int]:
        """Where to strike: each operation of the commit, and each `every`th before it."""
        begin = next(at for at, detail in enumerate(self.details, 1) if "journal.json" in detail)
        return [at for at in range(1, len(self.log) + 1) if at >= begin or at % every == 0]

    def perform(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.log.append(name)
        self.details.append(" ".join([name, *map(str, args[:2])]))
        mine = len(self.log) >= self.at if self.sticky else len(self.log) == self.at
        if mine and self.at and self.how is not None:
            self.struck = self.struck or f"{self.when} {len(self.log)} {self.details[-1]}"
            if self.when == "after":
                with contextlib.suppress(OSError):  # it may fail by itself: some are only tried
                    call(*args, **kwargs)
            raise self.how
        return call(*args, **kwargs)

    @contextlib.contextmanager
    def watched(self, *, exchange: bool = True) -> Iterator[Operations]:
        """Every operation goes through `perform`; `exchange` False: the file system refuses RENAME_EXCHANGE."""
        with pytest.MonkeyPatch.context() as patch:
            for module, names in ((os, CHANGING), (native, NATIVE)):
                for name in names:
                    call = getattr(module, name)
                    if name == "rename_exchange" and not exchange:
                        call = refuse_exchange

                    def wrapped(*args: Any, _name: str = name, _call: Callable[..., Any] = call, **kwargs: Any) -> Any:
                        return self.perform(_name, _call, *args, **kwargs)

                    patch.setattr(module, name, wrapped)
            yield self


def refuse_exchange(a: Any, b: Any) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(a), None, str(b))


Tree = dict[str, Any]


def content(folder: Path) -> Tree:
    """All below a folder: the SHA-256 of every file, and every empty folder; independent of the code under test."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not stat.S_ISDIR(mode):
            found[str(path.relative_to(folder))] = stat.S_IFMT(mode)
    return found


def without_manifest(tree: Tree) -> Tree:
    return {name: digest for name, digest in tree.items() if os.path.basename(name) != "ckptstore.manifest.json"}
