"""A store of steps: any trainer's checkpoints, one folder `step-N` each, as `CheckpointStore.save` makes them.

    {store}/step-{N}/                    a checkpoint: its files and our manifest
    {store}/.ckptstore/                  our side folder: saves in progress, lock, pins; never a checkpoint

In an object store, which has no rename, each save of a step has a prefix of its own, and its manifest makes it count:

    {store}/step-{N}.{G}.{random}/       generation G of the step: nothing without a manifest; of several the highest counts

torchtitan names its folders `step-{N}`, too: such a store is listed as well, without manifests at first.
"""

from __future__ import annotations

import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckptstore.errors import UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.frameworks.areal.layout import SIDE, Signs
from ckptstore.model import MANIFEST_NAME, FileInfo
from ckptstore.native import Folder

MAX_STEP = 10**15
STATE_NAME = "state.json"  #: what ckptstore.torch.save writes beside the tensors
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,14})(?:\.([1-9][0-9]{0,8})\.[0-9a-f]{16})?")
_HOLDS = {  # a file of tensors, named by the state's first key → what it holds
    **dict.fromkeys(("model", "weights", "state_dict", "tensors"), "weights"),
    **dict.fromkeys(("optimizer", "optim"), "optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "scheduler"),
    **dict.fromkeys(("rng", "rng_state"), "rng"),
}


def folder_name(step: int) -> str:
    """The folder of a step. UsageError for a number that is none."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MAX_STEP:
        raise UsageError(f"a step is a whole number from 0, not {step!r:.40}")
    return f"step-{step}"


def generation_name(step: int, generation: int) -> str:
    """A new name for a generation, from 1, of a step in an object store."""
    return f"{folder_name(step)}.{generation}.{secrets.token_hex(8)}"


def plain_name(folder: str) -> str:
    """The name that a step's folder has in a store on a disk; any other name as it is."""
    return f"step-{match[1]}" if (match := _STEP.fullmatch(folder)) else folder


def step_of(folder: str) -> int:
    """The step that a folder is named as one of, or a generation of one; -1 for any other name."""
    return int(match[1]) if (match := _STEP.fullmatch(folder)) else -1


def is_step(folder: str) -> bool:
    """Whether a folder is named as a step's, or a generation's of one, is."""
    return _STEP.fullmatch(folder) is not None


class Generation(NamedTuple):
    """A folder of a step at the top of a tree. `number` 0: the plain folder, which is no generation."""

    step: int
    number: int
    folder: str
    committed: bool  #: whether there is a manifest in it


def generations_in(folders: Mapping[str, Folder]) -> list[Generation]:
    """All folders of steps at the top of a tree (Backend.tree), in no order."""
    return [
        Generation(int(match[1]), int(match[2] or 0), entry.name, _has_manifest(folders.get(entry.name)))
        for entry in folders[""].entries
        if stat.S_ISDIR(entry.mode) and (match := _STEP.fullmatch(entry.name))
    ]


def _has_manifest(folder: Folder | None) -> bool:
    return folder is not None and any(entry.name == MANIFEST_NAME for entry in folder.entries)


def steps_in(folders: Mapping[str, Folder]) -> dict[int, str]:
    """The folder that counts of each step in a tree, by step: a save without a manifest counts only under the plain name."""
    counting = [found for found in generations_in(folders) if found.committed or not found.number]
    return {found.step: found.folder for found in sorted(counting)}


def is_store(folders: Mapping[str, Folder]) -> bool:
    """Whether a tree is a store of steps: ours by the side folder in it, which no AReaL run has, or by its folders' names."""
    if any(entry.name == SIDE and stat.S_ISDIR(entry.mode) for entry in folders[""].entries):
        return True
    if not generations_in(folders):
        return False
    run = layout.sort_out(dict(folders))
    return not (run.exports or run.slots or run.recover_info)


def read_signs(files: Sequence[FileInfo], *, sealed: bool) -> Signs:
    """What the files' names say. What a manifest describes was committed whole: then nothing is missed by its name."""
    signs = layout.read_signs(files)
    names = {file.name for file in files}
    if STATE_NAME in names:
        found = [_HOLDS.get(name.removesuffix(".safetensors"), "") for name in sorted(names)]
        signs = Signs("state", tuple(kind for kind in ("weights", "optimizer", "scheduler", "rng") if kind in found), ())
    if sealed:
        return Signs("files" if signs.format == "unknown" else signs.format, signs.holds, ())
    return signs
