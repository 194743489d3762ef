"""A store of steps: any trainer's checkpoints, one folder `step-N` each, as `CheckpointStore.save` makes them.

    {store}/step-{N}/                    a checkpoint: its files and our manifest
    {store}/.ckptstore/                  our side folder: saves in progress, lock, pins; never a checkpoint

torchtitan names its folders the same way: such a store is listed too, without manifests at first.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence

from ckptstore.errors import UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.frameworks.areal.layout import SIDE, Signs
from ckptstore.model import FileInfo
from ckptstore.native import Folder

MAX_STEP = 10**15
STATE_NAME = "state.json"  #: what ckptstore.torch.save writes beside the tensors
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,14})")
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


def steps_in(folders: Mapping[str, Folder]) -> dict[int, str]:
    """The step folders at the top of a tree (Backend.tree), by step."""
    found = {
        int(match[1]): entry.name
        for entry in folders[""].entries
        if stat.S_ISDIR(entry.mode) and (match := _STEP.fullmatch(entry.name))
    }
    return dict(sorted(found.items()))


def is_store(folders: Mapping[str, Folder]) -> bool:
    """Whether a tree is a store of steps: ours by the side folder in it, which no AReaL run has, or by its folders' names."""
    if any(entry.name == SIDE and stat.S_ISDIR(entry.mode) for entry in folders[""].entries):
        return True
    if not steps_in(folders):
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
