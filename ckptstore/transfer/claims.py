"""Claims: who writes where below a step's folder in an object store.

The first writer creates a claim in the folder itself and puts its files under their final keys. Who finds a claim of other
bytes there makes an attempt: a folder of its own inside, with a claim of its own. The manifest always lies in the folder
itself, is created by one of them, and names whose files count. A claim names the content (sizes and digests of all files), so
that an interrupted push finds its place again, and two that send the same bytes share one; and the files, since others may lie
there. Its owner renews it while it lives: one that has not been renewed for long is dead (leftovers.py).

A push may come back in the moment in which `clean` removes its files. Each says first what it does and looks then what the
other one says: who removes puts a mark, and then looks for a manifest; who commits puts the manifest, and then looks for a
mark, and for its files. So one of them sees the other, whatever comes between, and gives way: no manifest stays whose files
were removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from ckptstore.backends.base import Backend
from ckptstore.errors import AccessError, AlreadyExistsError, BusyError, ManifestError, NotFoundError, StorageError
from ckptstore.manifest import Manifest, parse
from ckptstore.model import ATTEMPT_PREFIX, CLAIM_NAME, DRAFT_PREFIX, MANIFEST_NAME, OURS, REMOVING_PREFIX
from ckptstore.parts import read_manifest
from ckptstore.sizes import counted

LOOKS = 5  #: at a place where somebody commits while we look
RENEW_S = 300.0  #: how often a living push renews its claim
MAX_BYTES = 16 << 20  #: of a claim; where the files' names take more, they are left out


class Claim(NamedTuple):
    """What is claimed: bytes, and the files that they are in."""

    content: str
    files: tuple[str, ...]


def of(manifest: Manifest) -> Claim:
    """The claim of who writes what `manifest` records."""
    return Claim(manifest.content, tuple(file.path for file in manifest.files))


def read(target: Backend, folder: str) -> dict[str, object] | None:
    """The claim in `folder`; None without one, {} for one that cannot be understood: it is somebody's."""
    try:
        data = target.get(f"{folder}/{CLAIM_NAME}", length_bytes=MAX_BYTES)
    except NotFoundError:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def files_of(target: Backend, folder: str) -> frozenset[str]:
    """The files that the claim in `folder` names; none where it names none."""
    files = (read(target, folder) or {}).get("files")
    return frozenset(name for name in files if isinstance(name, str)) if isinstance(files, list) else frozenset()


def make(target: Backend, folder: str, claim: Claim) -> bool:
    """Claim `folder`; False where somebody else has it claimed for other bytes."""
    try:
        target.put(f"{folder}/{CLAIM_NAME}", _described(claim), if_absent=True)
        if target.creates_atomically:
            return True
    except AlreadyExistsError:
        pass  # somebody was faster, or our own first try came through after all
    return share(target, folder, claim)


def share(target: Backend, folder: str, claim: Claim) -> bool:
    """Renew the claim in `folder`, where it is one for the same bytes."""
    if not holds(target, folder, claim.content):
        return False
    renew(target, folder, claim)
    return True


def holds(target: Backend, folder: str, content: str) -> bool:
    """Whether the claim in `folder` is one for `content`."""
    return (read(target, folder) or {}).get("content") == content


def renew(target: Backend, folder: str, claim: Claim) -> None:
    """Write the claim anew, whoever has it: its time says that somebody lives."""
    target.put(f"{folder}/{CLAIM_NAME}", _described(claim))


def release(target: Backend, folder: str) -> None:
    """Take the claim away."""
    target.delete(f"{folder}/{CLAIM_NAME}")


def _described(claim: Claim) -> bytes:
    at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    who: dict[str, object] = {"content": claim.content, "host": socket.gethostname(), "pid": os.getpid(), "at": at}
    data = json.dumps(who | {"files": claim.files}).encode()
    return data if len(data) < MAX_BYTES else json.dumps(who).encode()


def mark(target: Backend, folder: str) -> str:
    """Say that all in `folder` is being removed, so that no push goes on there; the mark's key. Each has a mark of its own."""
    key = f"{folder}/{REMOVING_PREFIX}{secrets.token_hex(8)}"
    target.put(key, b"")
    return key


def take_back(target: Backend, key: str, manifest: bytes, *, before: bytes) -> None:
    """Put the manifest that was there before, or none, in the place of `manifest`, whose files are gone."""
    try:
        if target.get(key) != manifest:
            return  # another one has done it, and others may have committed since
        if before:
            target.replace(key, before, expected=manifest)
        else:
            target.delete(key)
    except (NotFoundError, AlreadyExistsError):
        return


def _removing(names: Iterable[str]) -> bool:
    return any(name.startswith(REMOVING_PREFIX) for name in names)


@dataclass(slots=True)
class Place:
    """Where one part of a step is put: its folder in the store, and what has been found and claimed there."""

    target: Backend
    folder: str
    manifest: Manifest  #: of what shall be there
    replace: bool = False
    fixed: bool = False  #: its files must lie in the folder itself
    base: str = ""  #: of our files, in `folder`: empty, or an attempt
    replaced: Manifest | None = None
    replaced_bytes: bytes = b""

    @property
    def files_folder(self) -> str:
        """Where our files go."""
        return f"{self.folder}/{self.base}" if self.base else self.folder

    @property
    def _where(self) -> str:
        return f"{self.target.location}/{self.folder}"

    def find(self, *, dry_run: bool) -> bool:
        """Find our place and claim it; True, without a claim, where this content is committed there already.

        AlreadyExistsError where something lies there that is not ours to replace; BusyError where one must wait.
        """
        for _ in range(LOOKS):
            # In this order: who takes its claim away has written its manifest before, and its files before that.
            names = [blob.key.removeprefix(f"{self.folder}/") for blob in self.target.list(self.folder)]
            claim = read(self.target, self.folder)
            theirs = self._committed()
            if theirs is not None and theirs.content == self.manifest.content:
                self.base = theirs.base
                return True
            self.replaced = theirs
            if theirs is None and claim is None:
                self._refuse_strangers(names)
            if dry_run:
                free = theirs is None and (claim is None or claim.get("content") == self.manifest.content)
                free = free and not _removing(names)
                self.base = "" if free else self._own_attempt(names)
                return False
            if theirs is None and not _removing(names) and self._claim(claim):
                self.base = ""
            else:
                self._claim_attempt(names)
            now = self._committed()
            if now == theirs:
                return False
            self._release(now)  # one that came meanwhile: its keys are not ours to write
        raise BusyError(f"{self._where} changes faster than one can look at it", hint="Do several push this step at once?")

    def keep(self) -> None:
        """Renew our claim. StorageError when it was taken away: our files go with it, unless they are committed by now."""
        if share(self.target, self.files_folder, of(self.manifest)):
            return
        theirs = self._committed()
        if theirs is None or theirs.content != self.manifest.content:
            raise self._cleaned()

    def look_again(self, *, committed: bool) -> None:
        """All files lie at our place, with their sizes, no others do, and nobody removes them. StorageError."""
        above = f"{self.folder}/"
        found = {blob.key.removeprefix(above): blob.size_bytes for blob in self.target.list(self.folder)}
        if committed and MANIFEST_NAME not in found:
            raise self._cleaned()
        inside = f"{self.base}/" if self.base else ""
        there = {name.removeprefix(inside): size for name, size in found.items() if name.startswith(inside)}
        if not self.base:
            there = {name: size for name, size in there.items() if not name.startswith(ATTEMPT_PREFIX)}
        if _removing(there):
            raise self._cleaned()
        wrong = [file.path for file in self.manifest.files if there.get(file.path) != file.size_bytes]
        listed = {file.path for file in self.manifest.files} | {MANIFEST_NAME}
        extra = [name for name in there if name not in listed and not name.rpartition("/")[2].startswith(DRAFT_PREFIX)]
        if wrong or extra:
            name = f"{self.files_folder}/{(wrong or extra)[0]}"
            raise StorageError(
                f"{self.target.location}/{name} is not what was sent there: "
                + ("another size, or missing" if wrong else "nothing of this name was"),
                operation="looking again",
                path=name,
                hint="Does anybody else write there? Nothing was committed.",
            )

    def _cleaned(self) -> StorageError:
        return StorageError(
            f"{self.target.location}/{self.files_folder} was cleaned while it was pushed",
            operation="looking again",
            path=self.files_folder,
            hint="Push again, and clean only what is older than any push takes.",
        )

    def publish(self) -> bool:
        """Commit what lies at our place; whether it was our manifest that came first. AlreadyExistsError for the loser.

        StorageError, and the manifest taken back, where our files were removed in this moment.
        """
        mine = dataclasses.replace(self.manifest, base=self.base)
        key = f"{self.folder}/{MANIFEST_NAME}"
        try:
            if self.replaced is None:
                self.target.put(key, mine.to_bytes(), if_absent=True)
            else:
                self._overwrite(key, mine, self.replaced)
        except AlreadyExistsError:
            theirs = read_manifest(self.target, self.folder)
            if theirs.content != mine.content:
                raise AlreadyExistsError(
                    f"{self._where}: another push of step {mine.step} came first, with other bytes, "
                    f"committed {theirs.created_at}",
                    hint="Ours is no checkpoint; `ckptstore clean --run URL` removes its files. Or push --replace.",
                ) from None
            if theirs.base == mine.base:
                self._see_whole(key, theirs)
            self._release(theirs)
            return theirs == mine  # a first try may have come through after all
        if not self.target.creates_atomically and read_manifest(self.target, self.folder) != mine:  # the last one counts
            raise AlreadyExistsError(f"{self._where}: another push of step {mine.step} came at the same moment")
        self._see_whole(key, mine)
        self._release(mine)
        return True

    def _see_whole(self, key: str, committed: Manifest) -> None:
        """Nobody has begun to remove what the manifest names; else it goes, before anybody relies on it."""
        try:
            self.look_again(committed=True)
        except StorageError:
            take_back(self.target, key, committed.to_bytes(), before=self.replaced_bytes)
            raise

    def _overwrite(self, key: str, mine: Manifest, old: Manifest) -> None:
        if not old.base:  # says that the files beside the manifest are ours, and useless from now on
            renew(self.target, self.folder, of(old))
        seen = self.target.get(key)
        if parse(seen) != old:
            raise AlreadyExistsError(key)
        self.replaced_bytes = seen
        self.target.replace(key, mine.to_bytes(), expected=seen)

    def _release(self, committed: Manifest | None) -> None:
        """Take our claim away where its files count: elsewhere it says whose they are, until they are cleaned."""
        if committed is not None and committed.base == self.base:
            with contextlib.suppress(AccessError):  # conditions.py has found that out, and the push's result says it
                release(self.target, self.files_folder)

    def _committed(self) -> Manifest | None:
        """The manifest that is there. AlreadyExistsError for one that is not ours to replace."""
        try:
            theirs = read_manifest(self.target, self.folder)
        except NotFoundError:
            return None
        except ManifestError as error:
            raise AlreadyExistsError(f"{self._where} has a manifest that does not count: {error}") from None
        if theirs.content != self.manifest.content and not self.replace:
            raise AlreadyExistsError(
                f"{self._where} holds step {theirs.step} with other bytes, committed {theirs.created_at}",
                hint="Nothing was replaced there. Push to another URL, or say --replace.",
            )
        return theirs

    def _refuse_strangers(self, names: Sequence[str]) -> None:
        """What lies there without a claim or a manifest is somebody else's."""
        strangers = [name for name in names if not name.startswith(OURS)]
        if strangers:
            raise AlreadyExistsError(
                f"{self._where} holds {counted(len(strangers), 'file')} that no push of ckptstore brought ({strangers[0]})",
                hint="Push to another URL, or move them away. `ckptstore verify --run URL` says whether they are whole.",
            )

    def _own_attempt(self, names: Sequence[str]) -> str:
        """The attempt that an earlier push of the same content left, else the name of one that nobody writes into."""
        for name in sorted({name.partition("/")[0] for name in names if name.startswith(ATTEMPT_PREFIX)}):
            inside = [other.removeprefix(f"{name}/") for other in names if other.startswith(f"{name}/")]
            if not _removing(inside) and holds(self.target, f"{self.folder}/{name}", self.manifest.content):
                return name
        return f"{ATTEMPT_PREFIX}{secrets.token_hex(8)}"

    def _claim(self, claim: Mapping[str, object] | None) -> bool:
        """Claim the folder itself; False where it is claimed for other bytes."""
        claimed = make if claim is None else share
        return claimed(self.target, self.folder, of(self.manifest))

    def _claim_attempt(self, names: Sequence[str]) -> None:
        if self.fixed:
            raise BusyError(
                f"another push has claimed {self._where} for other bytes, or its files are being removed",
                hint="When that push is dead for certain: ckptstore clean --run URL --older-than 1d. Then push again.",
            )
        self.base = self._own_attempt(names)
        if not make(self.target, self.files_folder, of(self.manifest)):
            raise BusyError(f"{self.target.location}/{self.files_folder} is being removed", hint="Push again.")
