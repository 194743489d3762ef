"""Which names of files a manifest may list: safe to join to a folder on any machine, and none another one's alias."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from ckptstore.errors import ManifestError
from ckptstore.model import MANIFEST_NAME

MAX_NAME_CHARS = 1024

_COMPONENT = r"(?!\.{1,2}(?:/|\Z))[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}"
_SAFE_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")


def check_name(name: str) -> str:
    """`name` if it is safe to join to a folder on any machine, else ManifestError."""
    if len(name) > MAX_NAME_CHARS or not _SAFE_NAME.fullmatch(name):
        raise ManifestError(f"unsafe file name in a manifest: {name[:80]!r}", hint="Do not use this checkpoint.")
    return name


def check_names(names: Iterable[str]) -> None:
    """ManifestError unless a manifest can list files of these names together: each is safe, and none is another one's alias."""
    names = list(names)
    for name in names:
        if name == MANIFEST_NAME:
            raise ManifestError(f"{name} cannot be listed in a manifest")
        check_name(name)
    refuse_aliases(names)


def refuse_aliases(paths: list[str]) -> None:
    """Two names that are one file on some file system (case, Unicode form) would overwrite each other there."""
    keys = {path.lower() if path.isascii() else _folded(path) for path in paths}
    if len(keys) != len(paths):
        raise ManifestError("manifest lists one file twice (names that differ only in case or Unicode form count as one)")
    for key in keys:
        if "/" in key and any(parent in keys for parent in _parents(key)):
            raise ManifestError("manifest lists one name as a file and as a folder")


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _parents(path: str) -> Iterable[str]:
    while path := path.rpartition("/")[0]:
        yield path
