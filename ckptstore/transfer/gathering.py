"""One whole checkpoint out of the parts that several nodes have of a save (a manifest's `group`).

Each node has its own ranks' files, and a `.metadata` of its own that names them all. Together they are one checkpoint of
torch's: the files of all nodes, and the first one's `.metadata`. Its manifest names them all, and no set.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ckptstore import manifest as manifests
from ckptstore import native
from ckptstore.backends.base import Backend
from ckptstore.errors import CkptStoreError, IntegrityError, NotWholeError
from ckptstore.formats import FormatError, dcp
from ckptstore.listing import Listing, scan
from ckptstore.manifest import FileEntry, Manifest
from ckptstore.model import Checkpoint, NodeSet, Status
from ckptstore.parts import find_manifest, folder_of, read_manifest


class Whole(NamedTuple):
    """What is to be brought together."""

    manifest: Manifest
    holders: Mapping[str, Sequence[int]]  #: file → which of those who were asked have it


def group_of(backend: Backend, checkpoint: Checkpoint) -> NodeSet | None:
    """The set that a checkpoint is a part of; None for one that is all there is."""
    manifest = find_manifest(backend, folder_of(backend, checkpoint.parts[0]))
    return manifest.group if manifest is not None else None


def concerns(backend: Backend, listing: Listing, steps: Sequence[int]) -> bool:
    """Whether one of these steps (none: any) is, or may be, one of which other nodes have parts: it is not here."""
    if listing.framework != "steps":
        return False
    found = [checkpoint for step in steps for checkpoint in listing.at_step(step)] if steps else listing.checkpoints
    return len(found) < max(len(steps), 1) or any(group_of(backend, checkpoint) for checkpoint in found)


def look(backend: Backend, step: int) -> dict[str, str]:
    """What lies here of a step, for `whole` on another machine; `why` there is nothing that counts."""
    told = {"at": backend.location, "manifest": "", "metadata": "", "why": ""}
    try:
        found = scan(backend).at_step(step)
        if not found:
            return told | {"why": f"has no step {step}"}
        if found[-1].status is not Status.COMMITTED:
            return told | {"why": f"has step {step} {found[-1].status}: {'; '.join(map(str, found[-1].findings[:3]))}"}
        folder = folder_of(backend, found[-1].parts[0])
        manifest = read_manifest(backend, folder)
        if manifest.group is None:
            return told | {"why": f"has another save of step {step}, by one node alone"}
        metadata = backend.get(f"{folder}/{dcp.METADATA_NAME}") if not manifest.group.node else b""
    except CkptStoreError as error:
        return told | {"why": f"cannot be looked at: {error}"}
    return told | {"manifest": manifest.to_bytes().decode("ascii"), "metadata": base64.b64encode(metadata).decode("ascii")}


def whole(step: int, told: Sequence[Mapping[str, Any]]) -> Whole:
    """The checkpoint that the parts are together; `told` by rank, as `look` gives it.

    NotWholeError names the ranks that lack the step, or have another save of it, and the nodes that nobody has.
    IntegrityError where the parts are not what was saved.
    """
    lacking = [f"rank {rank} ({one['at']}) {one['why']}" for rank, one in enumerate(told) if one["why"]]
    if lacking:
        raise _not_whole(step, lacking)
    parts = [manifests.parse(one["manifest"].encode("ascii")) for one in told]
    groups = [part.group for part in parts if part.group is not None]
    lacking = [
        f"rank {rank} ({told[rank]['at']}) has another save of it than rank 0"
        for rank, group in enumerate(groups)
        if (group.id, group.nodes, group.digest) != (groups[0].id, groups[0].nodes, groups[0].digest)
    ]
    nodes: dict[int, Manifest] = {}
    for part, group in zip(parts, groups, strict=True):
        nodes.setdefault(group.node, part)
    lacking += [f"no rank has node {node + 1}'s part" for node in range(groups[0].nodes) if node not in nodes]
    if lacking:
        raise _not_whole(step, lacking)
    content = "\n".join(nodes[node].content for node in range(groups[0].nodes))
    if hashlib.sha256(content.encode()).hexdigest() != groups[0].digest:
        raise IntegrityError(f"step {step}: the nodes' parts are not those that were saved together", hint="Push another step.")
    files: dict[str, FileEntry] = {}
    holders: dict[str, list[int]] = {}
    for node, manifest in sorted(nodes.items()):
        for entry in manifest.files:
            if node and entry.path == dcp.METADATA_NAME:
                continue
            known = files.setdefault(entry.path, entry)
            if (known.size_bytes, known.crc) != (entry.size_bytes, entry.crc):
                raise IntegrityError(f"step {step}: two nodes have a {entry.path}, and not the same", hint="Push another step.")
            holders.setdefault(entry.path, []).extend(rank for rank, group in enumerate(groups) if group.node == node)
    _check_metadata(step, files, next(one["metadata"] for one, group in zip(told, groups, strict=True) if not group.node))
    ordered = tuple(files[name] for name in sorted(files))
    return Whole(dataclasses.replace(nodes[0], files=ordered, group=None), holders)


def _not_whole(step: int, lacking: Sequence[str]) -> NotWholeError:
    shown = "; ".join(lacking[:5]) + (f"; and {len(lacking) - 5} more" if len(lacking) > 5 else "")
    return NotWholeError(
        f"step {step} is not there from all of its nodes: {shown}",
        hint="Start as many ranks as there are nodes at least, each with the store of its node.",
    )


def _check_metadata(step: int, files: Mapping[str, FileEntry], encoded: str) -> None:
    """All that it names lies among the files."""
    try:
        data = base64.b64decode(encoded, validate=True)
        if dcp.METADATA_NAME not in files or native.crc64(data) != files[dcp.METADATA_NAME].crc:
            raise IntegrityError(f"step {step}: {dcp.METADATA_NAME} is not what its manifest says", hint="Push another step.")
        needed = dcp.read_metadata(data).shard_bytes
    except (FormatError, binascii.Error) as error:
        raise IntegrityError(f"step {step}: {dcp.METADATA_NAME}: {error}", hint="Push another step.") from error
    wrong = [name for name, size in needed.items() if name not in files or files[name].size_bytes < size]
    if wrong:
        raise IntegrityError(
            f"step {step}: {dcp.METADATA_NAME} names {wrong[0]}, and no node has it, or as much of it",
            hint="Push another step.",
        )
