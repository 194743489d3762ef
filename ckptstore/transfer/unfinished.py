"""Multipart uploads that were begun below a URL and never finished: no key shows them, and they cost money."""

from __future__ import annotations

import time
from typing import NamedTuple

from ckptstore.backends.base import Backend
from ckptstore.backends.s3control import Upload, control
from ckptstore.errors import AccessError, UnavailableError


class Looked(NamedTuple):
    """The uploads, the present by the clock that is behind, and why they were not looked for, if they were not."""

    uploads: tuple[Upload, ...]
    now_ns: int
    note: str


def look(target: Backend) -> Looked:
    """The unfinished uploads below a URL, whoever began them. Reads only; errors as Backend's."""
    now_ns = time.time_ns()
    if not target.location.startswith("s3://"):
        text = (
            "unfinished uploads were not looked for: only S3 tells of them. Where the store keeps some, a lifecycle rule of the"
        )
        return Looked((), now_ns, f"{text} bucket's can remove them")
    try:
        store = control(target)
        now_ns = min(now_ns, store.now_ns())  # a clock here that is ahead must not make a live push look dead
        return Looked(tuple(store.uploads()), now_ns, "")
    except (UnavailableError, AccessError) as error:
        return Looked((), now_ns, f"unfinished uploads were not looked for: {error}. {error.hint}".strip())


def abort(target: Backend, upload: Upload) -> None:
    """Give one up, and free its bytes."""
    control(target).abort(upload)
