"""A save of a step, wherever the store is: on a disk (steps.py) or at a URL (uploading.py). Begin, write, commit or abandon."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, SupportsFloat

from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.errors import UsageError
from ckptstore.manifest import Manifest
from ckptstore.metric_names import is_loss
from ckptstore.saves import steps, uploading
from ckptstore.saves.uploading import Upload, Written

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger("ckptstore")

Draft = steps.Draft | Upload

Metrics = Mapping[str, SupportsFloat]
"""By name; numbers of any kind, a tensor of one element too."""


def numbers_of(metrics: Metrics | None) -> dict[str, float]:
    """The metrics as they are now: what is saved in the background must not see what becomes of them. UsageError for what is
    no number: before anything is written. A loss that is NaN or infinite is said.
    """
    numbers: dict[str, float] = {}
    for name, value in dict(metrics or {}).items():
        if not isinstance(name, str):
            raise UsageError(f"a metric's name is text, not {name!r:.40}")
        try:
            # A loss as backward has left it: torch warns of float() of such, and its item() is meant for it.
            numbers[name] = float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: of a tensor without a value
            raise UsageError(
                f"the metric {name!r:.60} is {value!r:.60}, which is no number", hint="Leave it out where it is not known."
            ) from error
    if lost := [name for name, value in numbers.items() if is_loss(name) and not math.isfinite(value)]:
        _log.warning(
            "what is saved now has %s = %s: a load that names no step passes it over, and no rule of retention counts it",
            lost[0],
            numbers[lost[0]],
        )
    return numbers


def begin(backend: Backend, step: int) -> Draft:
    """Begin a save. Errors as steps.begin and uploading.begin."""
    return steps.begin(backend.location, step) if backend.is_folder else uploading.begin(backend, step)


def place(draft: Draft) -> str:
    """Where `write_buffers` puts files, for the other ranks: a path, or a prefix at the store's URL."""
    return draft.prefix if isinstance(draft, Upload) else draft.path


def write_buffers(
    backend: Backend, place: str, files: Mapping[str, Sequence[Buffer]], *, options: native.CopyOptions | None = None
) -> dict[str, Written]:
    """Write files from memory, durable and digested; each is a sequence of buffers. `options` are for disks."""
    contents = {name: uploading.Memory(buffers) for name, buffers in files.items()}
    if not backend.is_folder:
        return uploading.write(backend, place, contents)
    digests = native.write_files(place, files, options=options).digests
    return {name: Written(digests[name], content.size_bytes, content.mtime_ns) for name, content in contents.items()}


def write_folder(
    draft: Draft,
    directory: str,
    files: Sequence[native.FileSpec],
    *,
    options: native.CopyOptions | None = None,
    progress: native.Progress | None = None,
) -> dict[str, Written]:
    """Copy files of a folder: digested in the one read, durable. SourceChangedError. `options` are for disks."""
    if isinstance(draft, Upload):
        contents = {file.name: uploading.File(directory, file) for file in files}
        return uploading.write(draft.target, draft.prefix, contents, progress=progress)
    digests = native.copy_files(directory, draft.path, files, options=options, progress=progress).digests
    return {file.name: Written(digests[file.name], file.size_bytes, file.mtime_ns) for file in files}


def commit(
    draft: Draft, written: Mapping[str, Written], *, metrics: Mapping[str, float] | None = None, source: str = ""
) -> Manifest:
    """Make the draft its step: in one act, what was there before untouched until then. NotCommitted, CommitUncertain."""
    if isinstance(draft, Upload):
        return uploading.publish(draft, written, metrics=metrics, source=source)
    digests = {name: file.digest for name, file in written.items()}
    return steps.commit(draft, digests, metrics=metrics, source=source)


def abandon(draft: Draft) -> None:
    """Remove what is left of a draft; nothing where it was committed."""
    if isinstance(draft, Upload):
        uploading.discard(draft)
    else:
        steps.abandon(draft)
