"""Makes what AReaL resumes from out of what it exports, without torch: see docs on the two eras in `era.py`.

From v0.4 on the slot is a torch.distributed.checkpoint (`hf_to_dcp`); before, it is the export itself and one optimizer
file a rank (`era_a_optimizer`). What an export does not hold, the optimizer's moments, cannot come back: both write those of
an optimizer that has not stepped. `dcp_to_hf` goes the other way, to evaluate or publish a slot.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from ckptstore import native
from ckptstore.errors import UsageError, from_os_error
from ckptstore.formats import dcp_writer, streaming, torchzip
from ckptstore.formats.dcp_writer import Item, KeyPath, Origin, TensorItem
from ckptstore.frameworks.areal import adamw, hf_export
from ckptstore.frameworks.areal.adamw import AdamW
from ckptstore.frameworks.areal.dcp_export import SHARD_BYTES, ConvertResult, dcp_to_hf
from ckptstore.model import FileInfo

__all__ = ["SHARD_BYTES", "AdamW", "ConvertResult", "dcp_to_hf", "era_a_optimizer", "hf_to_dcp"]

Path = str | os.PathLike[str]


def hf_to_dcp(
    source: Path,
    destination: Path,
    files: Sequence[FileInfo],
    *,
    optimizer: Literal["none", "zero"],
    settings: AdamW | None = None,
    expected: Mapping[str, Sequence[int]] | None = None,
    chunk_bytes: int = native.CHUNK_BYTES,
    progress: native.Progress | None = None,
) -> ConvertResult:
    """Write the export `files` of `source` as an AReaL DCP slot into the folder `destination`; durable when it returns.

    `optimizer`: "none" for AReaL that can leave it out (recover.no_load_optim), "zero" for one that demands its keys; what
    a checkpoint says in `settings` beats the run's configuration once loaded. `expected`: CRCs of the files' chunks of
    `chunk_bytes`, checked in the one read. Digests are in chunks of native.CHUNK_BYTES.

    Raises RefusedError for exports that cannot become an FSDP slot, and what native.copy_files raises. Whatever was
    written by then stays: the destination is the caller's stage.
    """
    start = time.monotonic()
    export = hf_export.read(source, files, expected)
    entries: dict[KeyPath, Item] = {}
    for name, weight in export.weights.items():
        entries["dcp", "model", name] = TensorItem(weight.dtype, weight.shape, Origin(weight.file, weight.offset))
    for name, holder in export.aliases.items():
        entries["dcp", "model", name] = entries["dcp", "model", holder]
    notes = list(export.notes)
    if optimizer == "zero":
        parameters = {name: (export.weights[name].dtype, export.weights[name].shape) for name in export.parameters}
        entries.update(adamw.entries(settings or AdamW(), parameters))
        notes.append("the optimizer starts afresh: moments of zeros, step 0")
    digests = dcp_writer.write(
        source,
        destination,
        export.files,
        entries,
        expected=expected,
        also_read=export.unused if expected else (),
        chunk_bytes=chunk_bytes,
        progress=progress,
    )
    written = sum(os.stat(os.path.join(destination, name)).st_size for name in digests)
    return ConvertResult(digests, written, time.monotonic() - start, tuple(notes))


def era_a_optimizer(
    source: Path,
    destination: Path,
    files: Sequence[FileInfo],
    *,
    world_size: int,
    settings: AdamW | None = None,
) -> dict[str, native.Digest]:
    """Write one optimizer file a rank beside the export `files` of `source`, copied to `destination`; their digests.

    AReaL up to v0.3 loads them with the export. Each has the group of all parameters and no state: fresh moments.
    """
    if world_size < 1:
        raise UsageError(f"a world of {world_size} ranks")
    count = len(hf_export.read(source, files).parameters)
    content = torchzip.value(adamw.empty_state(settings or AdamW(), count))
    digests = {}
    for rank in range(world_size):
        name = f"optim_world_size_{world_size}_rank_{rank}.pt"
        with streaming.created(os.path.join(destination, name), len(content)) as fd:
            digests[name] = streaming.digest(streaming.write_at(fd, 0, content))
    try:
        native.fsync_path(destination)
    except OSError as error:
        raise from_os_error(error, doing="syncing", path=os.fspath(destination)) from error
    return digests
