"""What a store can do, found by trying, once for each backend: does create-only mean something, and do the store's own digests?

A store may ignore a condition, keep no digest, or repeat the one that it was told. What it cannot do is named in the result.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from typing import TYPE_CHECKING, NamedTuple

from ckptstore import native
from ckptstore.backends import interruptible
from ckptstore.backends.base import Backend
from ckptstore.errors import AccessError, AlreadyExistsError, NotFoundError, UnavailableError
from ckptstore.manifest import ALGORITHM
from ckptstore.model import DRAFT_PREFIX

if TYPE_CHECKING:
    from ckptstore.backends.s3control import S3Control
    from ckptstore.backends.s3multipart import S3Multipart

PROBE = f"{DRAFT_PREFIX}probe-"  #: the scratch keys; a kill leaves one
_DATA = b"1"


class Conditions(NamedTuple):
    """What was found. `control` asks for digests that mean something; `check` is their name, or why there are none."""

    control: S3Control | None
    check: str
    notes: tuple[str, ...] = ()


def look(target: Backend) -> Conditions:
    """What can be known without writing."""
    from ckptstore.backends.s3control import control

    try:
        store = control(target)
        with contextlib.suppress(NotFoundError):
            store.head(PROBE)
    except (UnavailableError, AccessError) as error:
        return Conditions(None, str(error))
    return Conditions(store, "")


@functools.lru_cache(maxsize=4)
def find_out(target: Backend) -> Conditions:
    """Try it with a scratch key, which is removed; once for each backend. Errors as Backend's."""
    key = f"{PROBE}{secrets.token_hex(8)}"
    atomic = target.creates_atomically
    if atomic:
        target.put(key, _DATA, if_absent=True)  # a store that does not answer is not asked to remove it, either
    refused: list[str] = []

    def tidy() -> None:
        try:
            target.delete(key)
        except AccessError as error:  # a policy that lets nobody remove anything: what counts is there all the same
            refused.append(str(error))

    with interruptible.tidied(tidy):
        if atomic:
            try:
                target.put(key, _DATA, if_absent=True)
                atomic = False
            except AlreadyExistsError:
                pass
        digests, check = _digests(target, key)
    target.creates_atomically = atomic
    notes: tuple[str, ...] = (
        () if atomic else ("this store does not keep two writers apart: push a step from one machine at a time",)
    )
    notes += tuple(
        "scratch keys and claims stay there, since nothing may be removed by us; who may, removes them by "
        f"`ckptstore clean --run URL`: {text}"
        for text in refused
    )
    return Conditions(digests, check, notes)


@functools.lru_cache(maxsize=4)
def find_uploads(target: Backend) -> tuple[S3Multipart | None, str]:
    """Uploads that can go on after a crash, or why there are none; one is begun, listed and ended, once for each backend."""
    from ckptstore.backends.s3control import control
    from ckptstore.backends.s3multipart import multipart

    digests = find_out(target).control
    try:
        uploads = multipart(digests or control(target), digests=digests is not None)
        uploads.try_out(PROBE)
    except (UnavailableError, AccessError) as error:
        return None, str(error)
    return uploads, ""


def look_for_uploads(target: Backend) -> tuple[S3Multipart | None, str]:
    """Of find_uploads(), what can be known without writing: those that are there are listed, and none may be begun."""
    from ckptstore.backends.s3control import control
    from ckptstore.backends.s3multipart import multipart

    try:
        uploads = multipart(control(target), digests=False)
        uploads.unfinished(PROBE)
    except (UnavailableError, AccessError) as error:
        return None, str(error)
    return uploads, ""


def _digests(target: Backend, key: str) -> tuple[S3Control | None, str]:
    """The control calls and the digest's name, or None and why not; `key` holds _DATA, and may be overwritten."""
    from ckptstore.backends.s3control import control

    try:
        store = control(target)
        stored = store.head(key).crc64
        if stored is None:
            return None, f"the store keeps no {ALGORITHM}"
        if stored != native.crc64(_DATA) or not store.refuses_damage(key):
            return None, f"the store does not compute the {ALGORITHM} that it tells"
    except (UnavailableError, AccessError) as error:
        return None, f"{error}. {error.hint}".strip()
    return store, ALGORITHM
