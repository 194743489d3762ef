"""State dicts in and out of a store of steps: no pickle, no torch.save, one read and one write."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ckptstore import native
from ckptstore.choose import passed_over
from ckptstore.errors import IntegrityError, NotFoundError, NothingToResumeError, UsageError
from ckptstore.formats import FormatError, safetensors
from ckptstore.frameworks.steps import STATE_NAME
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import Checkpoint, Part
from ckptstore.parts import diverged, files_folder_of, folder_of, manifest_told, read_manifest, reader
from ckptstore.retention import Keep, checked_keep, prune_after
from ckptstore.saves import saving
from ckptstore.saves.loading import Want, read_into, read_whole
from ckptstore.saves.saving import Metrics
from ckptstore.saves.uploading import Written
from ckptstore.store import CheckpointStore, needed
from ckptstore.torch import blocks, memory
from ckptstore.torch import state as states
from ckptstore.torch.bounce import onto, target_of
from ckptstore.torch.filling import File, Streams, in_memory

CONFIG_NAME = "config.json"
SUFFIX = ".safetensors"
_log = logging.getLogger("ckptstore")
_TRIES = 5  #: where each is overtaken by a save or a removal


def save(
    store: CheckpointStore,
    step: int,
    state_dict: Mapping[str, Any],
    *,
    metrics: Metrics | None = None,
    config: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
) -> Manifest:
    """Save a state dict as `step`: durable, digested, visible only when whole. Blocks until then.

    The state: tensors, numbers, text, bytes, None, dtypes, and dicts, lists and tuples of these. Tensors go from their own
    memory to the disk or the URL (those that are not contiguous by a copy, those on a GPU block by block, blocks.py); they
    must not change meanwhile. `config`, plain JSON, becomes config.json; `metrics` are for retention, and `keep` prunes by it
    afterwards. UsageError names what cannot be saved without a pickle; other errors as CheckpointStore.save.
    """
    needed(store)
    numbers, keep = saving.numbers_of(metrics), checked_keep(keep)
    encoded = states.Encoder(state_dict, torch.Tensor.detach)
    tensors = [tensor for inside in encoded.tensors.values() for tensor in inside.values()]
    if not (streams := Streams(tensors)):
        return write(store, step, files_of(encoded, config), metrics=numbers, keep=keep)
    files, rest = blocks_of(encoded), documents(encoded, config)

    def put(place: str) -> dict[str, Written]:
        written = blocks.write(store.backend, place, files, [], streams=streams)
        return written | saving.write_buffers(store.backend, place, rest)

    return commit(store, step, put, metrics=numbers, keep=keep)


def files_of(encoded: states.Encoder, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The files of a state whose tensors are on the CPU, as buffers in order: the tensors' memory, which they hold."""
    return {name: in_memory(file) for name, file in blocks_of(encoded).items()} | documents(encoded, config)


def blocks_of(encoded: states.Encoder) -> dict[str, File]:
    """The files of a state's tensors, wherever they are."""
    files = {}
    for name, tensors in encoded.tensors.items():
        if tensors:
            head, ordered = memory.safetensors_layout(tensors)
            files[f"{name}{SUFFIX}"] = File([head, *ordered])
    return files


def documents(encoded: states.Encoder, config: Mapping[str, Any] | None) -> dict[str, list[bytes]]:
    """The files beside the tensors'."""
    files = {STATE_NAME: [json.dumps(encoded.document, separators=(",", ":"), allow_nan=False).encode()]}
    if config is not None:
        try:
            files[CONFIG_NAME] = [json.dumps(dict(config), indent=2).encode()]
        except (TypeError, ValueError) as error:
            raise UsageError(f"config is not plain JSON: {error}") from error
    return files


def write(
    store: CheckpointStore,
    step: int,
    files: Mapping[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    keep: Keep | None = None,
    options: native.CopyOptions | None = None,
) -> Manifest:
    """Write files from memory as `step`, commit it, and prune."""
    put = functools.partial(saving.write_buffers, store.backend, files=files, options=options)
    return commit(store, step, put, metrics=metrics, keep=keep)


def commit(
    store: CheckpointStore,
    step: int,
    put: Callable[[str], dict[str, Written]],
    *,
    metrics: Mapping[str, float] | None = None,
    keep: Keep | None = None,
) -> Manifest:
    """Let `put` write the files of `step` into a place, commit it, and prune."""
    draft = saving.begin(store.backend, step)
    try:
        manifest = saving.commit(draft, put(saving.place(draft)), metrics=metrics)
    finally:
        saving.abandon(draft)
    prune_after(store.backend, step, keep)
    return manifest


def load(store: CheckpointStore, step: int | None = None, *, map_location: torch.device | str | None = None) -> dict[str, Any]:
    """The state saved as `step` (None: the newest whole one), on the CPU or at `map_location`.

    Without a step, those are passed over, with a warning, of which a breaker's metrics say that training had gone bad, and
    those that were saved with a loss that is NaN or infinite.
    Read once, in parallel, into the new tensors' memory (that of a GPU by pinned buffers, bounce.py), every digest checked:
    DigestMismatchError for damage, NothingToResumeError where there is no step, and
    NotFoundError where there is not even the bucket. What was not saved by `save` is UsageError.
    A step that another process saves again meanwhile, or removes while the newest is wanted, is no damage: it begins anew.
    """
    part, manifest = find(store, step)
    for tries_left in range(_TRIES - 1, -1, -1):
        try:
            return _load(store, part, manifest, map_location)
        except (IntegrityError, NotFoundError):
            part, now = find(store, step)
            if not tries_left or now.commit == manifest.commit:
                raise
            manifest = now
    raise AssertionError("the last try returns or raises")


def _load(store: CheckpointStore, part: Part, manifest: Manifest, map_location: torch.device | str | None) -> dict[str, Any]:
    files = {entry.path: entry for entry in manifest.files}
    if STATE_NAME not in files:
        raise UsageError(
            f"step {manifest.step} was not saved by ckptstore.torch.save ({part.format})",
            hint="A DCP checkpoint is loaded by dcp.load with StoreReader; any by CheckpointStore.restore.",
        )
    folder = files_folder_of(store.backend, part)
    text = read_whole(store.backend, folder, files[STATE_NAME], chunk_bytes=manifest.chunk_bytes)
    document, wanted = states.read(text)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    wanted_on = torch.device(map_location or "cpu")
    device = wanted_on if wanted_on.type == "cuda" and store.backend.is_folder else torch.device("cpu")
    reads = []
    headers: list[tuple[bytes, bytearray, str]] = []
    for file, names in wanted.items():
        entry = files.get(file + SUFFIX)
        if entry is None:
            raise IntegrityError(f"step {manifest.step}: state.json names {file}{SUFFIX}, and there is none")
        header, wants, tensors[file] = _plan(store, part, entry, names, device)
        again = bytearray(len(header))
        headers.append((header, again, entry.path))
        reads.append((entry, [Want(0, memoryview(again)), *wants]))
    bounce = onto(tensor for inside in tensors.values() for tensor in inside.values())
    read_into(store.backend, folder, reads, chunk_bytes=manifest.chunk_bytes, bounce=bounce)
    for first, again, name in headers:  # the header that was believed is the one whose digest was checked
        if first != again:
            raise IntegrityError(f"{part.path}/{name} changed while it was read", hint="Use another checkpoint.")
    if device != wanted_on:
        tensors = {file: {name: tensor.to(wanted_on) for name, tensor in inside.items()} for file, inside in tensors.items()}
    result = states.decode(document, tensors)
    if not isinstance(result, dict):
        raise IntegrityError(f"step {manifest.step}: state.json holds a {type(result).__name__}, no state dict")
    return result


def find(store: CheckpointStore, step: int | None) -> tuple[Part, Manifest]:
    """A step's files and its manifest."""
    needed(store)
    if step is None:
        return _newest(store)
    checkpoint = store.get(step)
    if not checkpoint.status.usable:
        raise IntegrityError(
            f"step {step} is {checkpoint.status}: {'; '.join(map(str, checkpoint.findings[:3]))}", hint="Load another step."
        )
    try:
        return checkpoint.parts[0], read_manifest(store.backend, folder_of(store.backend, checkpoint.parts[0]))
    except NotFoundError as error:
        raise UsageError(
            f"step {step} has no manifest: it was not saved by ckptstore", hint="Load it with what has saved it."
        ) from error


def see_nothing(store: CheckpointStore) -> None:
    """That nothing is saved there yet: no such folder, or nothing below the URL. NotFoundError where there is no such bucket.

    A misspelled bucket must not look like an empty store: training would begin anew.
    """
    if not store.backend.is_folder:
        next(iter(store.backend.list()), None)


def _newest(store: CheckpointStore) -> tuple[Part, Manifest]:
    for tries_left in range(_TRIES - 1, -1, -1):
        try:
            listing = store.scan()
            listing.refuse_doubt()
            whole = [one for one in listing.checkpoints if one.status.usable]
        except NotFoundError:  # no such folder, or nothing below the URL
            see_nothing(store)
            whole = []
        bad = passed_over(store.backend.location, whole)
        newest = _sound(store, [one for one in reversed(whole) if one.step not in bad], bad)
        if newest is None:
            raise NothingToResumeError(
                f"there is no {'good' if bad else 'whole'} step in {store.backend.location}",
                hint=f"Name one to load it: step {whole[-1].step} has {bad[whole[-1].step]}."
                if bad
                else "Nothing has been saved there yet.",
            )
        if newest != whole[-1]:
            last = whole[-1].step
            _log.warning("step %d is loaded, not %d: %s (name a step to load it)", newest.step, last, bad[last])
        elif newest.step in bad:
            _log.warning("step %d is loaded although %s: there is no other", newest.step, bad[newest.step])
        try:
            return find(store, newest.step)
        except (NotFoundError, UsageError):
            if not tries_left or newest in store.list():  # not removed meanwhile
                raise
    raise AssertionError("the last try returns or raises")


def _sound(store: CheckpointStore, good: Sequence[Checkpoint], bad: dict[int, str]) -> Checkpoint | None:
    """The first that was not saved with a loss that is no number, else just the first; `bad` gets what it passes over."""
    for one in good:
        if not (why := diverged(manifest_told(store.backend, folder_of(store.backend, one.parts[0])))):
            return one
        bad[one.step] = why
    return next(iter(good), None)


def _plan(
    store: CheckpointStore, part: Part, entry: FileEntry, names: set[str], device: torch.device
) -> tuple[bytes, list[Want], dict[str, torch.Tensor]]:
    """A safetensors file's header, where its tensors go, and these tensors, still empty."""
    read_at = reader(store.backend, part)
    try:
        found = safetensors.read_header(read_at, entry.path, entry.size_bytes)
    except FormatError as error:
        raise IntegrityError(f"{part.path}/{entry.path}: {error}", hint="Load another step.") from error
    begin = 8 + int.from_bytes(read_at(entry.path, 0, 8), "little")
    if lacking := names - found.keys():
        raise IntegrityError(f"{part.path}/{entry.path} lacks {sorted(lacking)[0]!r}, which state.json names")
    tensors = {name: memory.empty(found[name].dtype, found[name].shape, device) for name in found if name in names}
    wants = [Want(begin + found[name].begin, target_of(tensor)) for name, tensor in tensors.items() if tensor.numel()]
    return read_at(entry.path, 0, begin), wants, tensors
