"""Where AReaL puts things (areal/utils/saver.py and recover.py, v0.3 to 2026-08), read and never created.

    {fileroot}/checkpoints/{user}/{experiment}/{trial}/          a run
        {part}/epoch{E}epochstep{S}globalstep{G}/                 a saved model (HF export), all numbers 0-based
        {part}/recover_checkpoint/                                the slot: one copy, overwritten in place
        recover_info/                                             step counter and states that belong to the slot
    {fileroot}/logs/{user}/{experiment}/{trial}/                  logs, config.yaml

That a folder exists proves nothing: AReaL's own helpers create the ones that they look for.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptstore.model import OURS, FileInfo, Finding, Part, Status
from ckptstore.native import Folder

EXPORT = re.compile(r"epoch([0-9]{1,9})epochstep([0-9]{1,9})globalstep([0-9]{1,9})")  # not \d: it takes any script
NEARLY_EXPORT = re.compile(r"(?i)(?=.*global_?step).*\d.*")
SLOT = "recover_checkpoint"
RECOVER_INFO = "recover_info"
#: Clocks of several nodes write into one run: files this close count as one save.
CLOCK_SKEW_NS = 5_000_000_000
MAIN_PART = "default"
MAIN_LOG = "main.log"  #: the trainer's own, in the run's log folder
SIDE = ".ckptstore"  #: our own folder beside the trials: stages, journals, old slots


class ExportName(NamedTuple):
    """The numbers in an export's folder name, all 0-based. The trainer's log counts from 1."""

    step: int
    epoch: int
    epoch_step: int


@dataclass(frozen=True, slots=True)
class RunRef:
    """Where a run is, and the names in its path. `fileroot` is empty when the path does not follow AReaL's layout."""

    path: str
    fileroot: str
    user: str
    experiment: str
    trial: str

    @property
    def logs(self) -> str:
        """The run's log folder, or empty when it cannot be known."""
        if not self.fileroot:
            return ""
        return os.path.join(self.fileroot, "logs", self.user, self.experiment, self.trial)


@dataclass(slots=True)
class RunTree:
    """What lies in a run, by role. Folders are relative to the run."""

    exports: dict[ExportName, dict[str, str]] = field(default_factory=dict)  #: name → part → folder
    slots: dict[str, str] = field(default_factory=dict)  #: part → folder
    recover_info: str = ""
    stray_slot: str = ""  #: `{trial}/recover_checkpoint`, where old guides put it and AReaL does not look
    notes: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)  #: folders whose names are almost those of checkpoints
    folders: dict[str, Folder] = field(default_factory=dict)


def parse_export_name(name: str) -> ExportName | None:
    """The numbers in an export's folder name, None when it is not exactly one (so `….tmp` is none)."""
    match = EXPORT.fullmatch(name)
    return ExportName(int(match[3]), int(match[1]), int(match[2])) if match else None


def run_ref(path: str) -> RunRef:
    """The names in a run's path; `fileroot` stays empty where `checkpoints` is not four levels up."""
    if "://" in path:  # in an object store: the logs are not beside it
        names = path.partition("://")[2].split("/")
        return RunRef(path, "", "", names[-2] if len(names) > 2 else "", names[-1])
    path = os.path.abspath(path)
    above = path.split("/")
    if len(above) >= 5 and above[-4] == "checkpoints":
        return RunRef(path, "/".join(above[:-4]) or "/", above[-3], above[-2], above[-1])
    return RunRef(path, "", "", os.path.basename(os.path.dirname(path)), os.path.basename(path))


def discover(fileroot: str) -> Iterator[RunRef]:
    """All runs below `{fileroot}/checkpoints`, by name; unreadable folders are passed over, links not followed."""
    for user in _subfolders(os.path.join(fileroot, "checkpoints")):
        for experiment in _subfolders(user.path):
            for trial in _subfolders(experiment.path):
                yield RunRef(trial.path, fileroot, user.name, experiment.name, trial.name)


def _subfolders(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            found = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    except OSError:
        return []
    return sorted(found, key=lambda entry: entry.name)


def sort_out(folders: dict[str, Folder]) -> RunTree:
    """Gives each folder of a run its role. `folders` is Backend.tree() of the run."""
    run = RunTree(folders=folders)
    for name, mode in _folders_in(folders, "", run.notes):
        if name == RECOVER_INFO:
            run.recover_info = name
        elif name == SLOT:
            run.stray_slot = name
        elif name == SIDE or not stat.S_ISDIR(mode):
            continue
        else:
            _sort_part(run, name)
    if run.strangers:
        more = f" and {len(run.strangers) - 3} more" if len(run.strangers) > 3 else ""
        run.notes.append(
            f"ignored, since AReaL gives no such names: {', '.join(run.strangers[:3])}{more} (rename what is a checkpoint)"
        )
    return run


def _sort_part(run: RunTree, part: str) -> None:
    for name, mode in _folders_in(run.folders, part, run.notes):
        folder = f"{part}/{name}"
        export = parse_export_name(name)
        if stat.S_ISLNK(mode):
            if export or name == SLOT:
                run.notes.append(f"{folder} is a link: not followed; name its target with --checkpoint-path")
        elif export:
            run.exports.setdefault(export, {})[part] = folder
        elif name == SLOT:
            run.slots[part] = folder
        elif name.endswith(".tmp") and parse_export_name(name.removesuffix(".tmp")):
            run.notes.append(f"{folder}: a save in progress, or one that a crash cut short; not a checkpoint")
        elif NEARLY_EXPORT.fullmatch(name):
            run.strangers.append(folder)


def _folders_in(folders: Mapping[str, Folder], path: str, notes: list[str]) -> list[tuple[str, int]]:
    folder = folders.get(path)
    if folder is None:
        return []
    if folder.error:
        notes.append(f"{path or 'the run'}: cannot be read ({os.strerror(folder.error)})")
    return sorted((entry.name, entry.mode) for entry in folder.entries if stat.S_ISDIR(entry.mode) or stat.S_ISLNK(entry.mode))


def files_of(folders: Mapping[str, Folder], path: str) -> tuple[list[FileInfo], list[Finding]]:
    """The files at and below `path` with names relative to it, and findings for what cannot be read or copied."""
    files: list[FileInfo] = []
    findings: list[Finding] = []
    pending = [""]
    while pending:
        inside = pending.pop()
        folder = folders.get(f"{path}/{inside}" if path and inside else path or inside)
        if folder is None:
            findings.append(Finding(inside, "folder nested too deeply to be a checkpoint's", Status.PARTIAL))
            continue
        if folder.error:
            findings.append(Finding(inside, f"cannot be read ({os.strerror(folder.error)})", Status.PARTIAL))
        for name, size_bytes, mtime_ns, inode, mode, _ in folder.entries:  # unpacked: this runs 100,000 times
            if name.startswith(OURS):
                continue
            if inside:
                name = f"{inside}/{name}"
            if stat.S_ISREG(mode):
                files.append(FileInfo(name, size_bytes, mtime_ns, inode))
            elif stat.S_ISDIR(mode):
                pending.append(name)
            else:
                kind = "symlink" if stat.S_ISLNK(mode) else "other"
                files.append(FileInfo(name, 0, mtime_ns, inode, kind))
    files.sort()
    return files, findings


# --- what the names of a part's files say -------------------------------------------------------------------------

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.(safetensors|bin)")
_OPTIMIZER = re.compile(r"optim_world_size_([0-9]{1,6})_rank_([0-9]{1,6})\.pt")
_TOKENIZER = frozenset({"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"})


_NEVER_EMPTY = (".safetensors", ".bin", ".pt", ".json", ".distcp", ".metadata")


class Signs(NamedTuple):
    """What AReaL's own signs say of a part: its format, what it holds, and what is missing (level quick)."""

    format: str
    holds: tuple[str, ...]
    findings: tuple[Finding, ...]


def read_signs(files: Iterable[FileInfo]) -> Signs:
    """Judge a part by the names and sizes of its files. Our manifest is not one of its files."""
    files = list(files)
    signs = _signs_of_names(tuple(file.name for file in files))
    odd = [
        Finding(file.name, f"is a {file.kind}, not a file: never followed or copied", Status.PARTIAL)
        if file.kind != "file"
        else Finding(file.name, "is empty (0 bytes)", Status.PARTIAL)
        for file in files
        if file.kind != "file" or (not file.size_bytes and file.name.endswith(_NEVER_EMPTY))
    ]
    return signs._replace(findings=(*odd, *signs.findings)) if odd else signs


@functools.lru_cache(maxsize=256)  # the checkpoints of a run hold the same names, thousands of times
def _signs_of_names(names: tuple[str, ...]) -> Signs:
    by_name = frozenset(names)
    if not by_name:
        return Signs("empty", (), (Finding("", "no files: the save was cut short before its first byte", Status.PARTIAL),))
    findings: list[Finding] = []
    dcp = ".metadata" in by_name or any(name.endswith(".distcp") for name in by_name)
    optimizer = [match for name in names if (match := _OPTIMIZER.fullmatch(name))]
    weights, weight_findings = _weights(by_name)
    if dcp and weights != "unknown":
        findings.append(Finding("", "holds both DCP and Hugging Face weights: two saves mixed in one folder", Status.CORRUPT))
        return Signs("mixed", ("weights",), tuple(findings))
    if dcp:
        if ".metadata" not in by_name:
            findings.append(Finding(".metadata", "missing: the save was cut short", Status.PARTIAL))
        if not any(name.endswith(".distcp") for name in by_name):
            findings.append(Finding("", "no .distcp shards beside .metadata", Status.PARTIAL))
        return Signs("dcp", ("weights",), tuple(findings))
    findings += weight_findings
    holds = [] if weights == "unknown" else ["weights"]
    if optimizer:
        findings += _optimizer_findings(optimizer)
        holds.append("optimizer")
    if _TOKENIZER & by_name:
        holds.append("tokenizer")
    if {"config.json", "adapter_config.json"} & by_name:
        holds.append("config")
    return Signs("hf+optim" if optimizer and weights != "unknown" else weights, tuple(holds), tuple(findings))


def _weights(by_name: frozenset[str]) -> tuple[str, list[Finding]]:
    """Format of the Hugging Face weights among the files, and what is missing of them."""
    if "adapter_model.safetensors" in by_name or "adapter_model.bin" in by_name or "adapter_config.json" in by_name:
        missing = [] if "adapter_config.json" in by_name else ["adapter_config.json"]
        if not {"adapter_model.safetensors", "adapter_model.bin"} & by_name:
            missing.append("adapter_model.safetensors")
        return "lora", [Finding(name, "missing", Status.PARTIAL) for name in missing]
    top = [name for name in sorted(by_name) if "/" not in name]
    weights = [name for name in top if name.endswith((".safetensors", ".bin")) and name != "training_args.bin"]
    indexes = [name for name in top if name.endswith((".safetensors.index.json", ".bin.index.json"))]
    findings: list[Finding] = []
    sets: dict[tuple[str, str, int], set[int]] = {}
    for name in weights:
        if match := _SHARD.fullmatch(name):
            sets.setdefault((match[1], match[4], int(match[3])), set()).add(int(match[2]))
    for (stem, suffix, count), found in sets.items():
        absent = (number for number in range(1, count + 1) if number not in found)
        findings += [
            Finding(f"{stem}-{number:05d}-of-{count:05d}.{suffix}", "shard missing", Status.PARTIAL)
            for number in itertools.islice(absent, 20)
        ]
        if f"{stem}.{suffix}.index.json" not in by_name:
            findings.append(
                Finding(
                    f"{stem}.{suffix}.index.json",
                    "missing: it is written after the last shard",
                    Status.PARTIAL,
                )
            )
    if indexes and not weights:
        findings.append(Finding(indexes[0], "names shards, and there are none", Status.PARTIAL))
    if not weights and not indexes:
        return "unknown", [Finding("", "no model weights (safetensors, .bin or DCP)", Status.PARTIAL)]
    if "config.json" not in by_name:
        findings.append(Finding("config.json", "missing: the model cannot be loaded without it", Status.PARTIAL))
    if any(name.endswith(".bin") for name in weights) and not any(name.endswith(".safetensors") for name in weights):
        return "hf-bin", findings
    return "hf-sharded" if sets or indexes else "hf", findings


def optimizer_ranks(part: Part) -> int:
    """How many ranks saved the optimizer shards of era A in `part`; 0 where it holds none."""
    return next((int(match[1]) for file in part.files if (match := _OPTIMIZER.fullmatch(file.name))), 0)


def _optimizer_findings(matches: list[re.Match[str]]) -> list[Finding]:
    """Era A saves one optimizer shard a rank; all must be there, for one world size."""
    sizes = {int(match[1]) for match in matches}
    if len(sizes) > 1:
        return [
            Finding(
                "",
                f"optimizer shards of several world sizes ({sorted(sizes)}): two saves mixed",
                Status.CORRUPT,
            )
        ]
    world = sizes.pop()
    ranks = {int(match[2]) for match in matches}
    return [
        Finding(f"optim_world_size_{world}_rank_{rank}.pt", "optimizer shard missing", Status.PARTIAL)
        for rank in range(min(world, 100_000))
        if rank not in ranks
    ][:20]
