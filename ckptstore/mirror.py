"""Mirror: what `watch` adopts, into an object store too, so that a machine that loses its disk loses no finished save.

An adopted step goes to `URL/default/.ckptstore/adopted/globalstep{N}/{part}/`, and its recover_info beside the parts: pushed
part by part like any checkpoint (push.py), the main model last. `list --run URL` shows it once all of it is COMMITTED, and
`setup --from URL` takes it, with the trainer's own recover_info. Nothing is ever removed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ckptstore.backends import open_backend
from ckptstore.backends.base import Backend
from ckptstore.errors import NotFoundError
from ckptstore.frameworks.areal import layout
from ckptstore.listing import mirror_of, scan
from ckptstore.model import Checkpoint, FileInfo, Status
from ckptstore.parts import read_manifest, read_part
from ckptstore.push import Sent, push
from ckptstore.verify import Notify


def mirror(backend: Backend, url: str, *, notify: Notify | None = None) -> list[Sent]:
    """Push each adopted step of the local run `backend` that is not in the run at `url` yet; what was sent. Thread-safe.

    Errors as push's: what was not sent this time is sent the next. AlreadyExistsError where the same step of another history
    is there, before a rollback: nothing is replaced.
    """
    sent: list[Sent] = []
    there = _contents_at(url)
    for checkpoint in scan(backend).adopted:
        if checkpoint.status is Status.COMMITTED and there.get(checkpoint.step) != _content(checkpoint):
            store = open_backend(checkpoint.store)
            sent += push(store, _with_info(store, checkpoint), open_backend(mirror_of(url, checkpoint.step)), notify=notify)
    return sent


def _contents_at(url: str) -> dict[int, list[str]]:
    try:
        return {checkpoint.step: _content(checkpoint) for checkpoint in scan(open_backend(url)).adopted}
    except NotFoundError:
        return {}  # nothing has been pushed there yet


def _content(checkpoint: Checkpoint) -> list[str]:
    store = open_backend(checkpoint.store)
    return [read_manifest(store, part.name).content for part in checkpoint.parts]


def _with_info(store: Backend, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its recover_info as one more part: whoever resumes from it needs that too."""

    def signs(files: Sequence[FileInfo], *, sealed: bool) -> layout.Signs:
        return layout.Signs("files", (), ())  # no model is missed in it

    info = read_part(store, layout.RECOVER_INFO, layout.RECOVER_INFO, store.tree(max_depth=5), read_signs=signs)
    return dataclasses.replace(checkpoint, parts=(*checkpoint.parts, info))
