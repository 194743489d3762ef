"""What a run holds: every checkpoint with its status and the evidence for it, the slot, and what is in the way."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptstore import damage, parallel
from ckptstore import left as left_behind
from ckptstore import side as side_folders
from ckptstore.backends import open_backend
from ckptstore.backends.base import Backend
from ckptstore.backends.below import Below
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, NotFoundError, StorageError
from ckptstore.frameworks import steps
from ckptstore.frameworks.areal import layout, recover_info
from ckptstore.frameworks.areal.layout import RunRef
from ckptstore.frameworks.areal.recover_info import RecoverInfo
from ckptstore.left import Left
from ckptstore.model import FRESH_OPTIMIZER, MANIFEST_NAME, Checkpoint, Finding, Part, Status, worst
from ckptstore.native import Folder
from ckptstore.parts import (
    find_manifest,
    folder_of,
    read_part,
    vouching,
    with_dcp_holdings,
    worsen,
)
from ckptstore.saves import owner, prepared

_ADOPTED = re.compile(r"globalstep[0-9]{1,9}")
MIRROR = f"{layout.MAIN_PART}/{layout.SIDE}"  #: our own folder in a run in an object store
_AT_ONCE = 16  #: adopted steps that are read there


#: Formats from which a trainer restores more than weights; replacing one by anything else loses that.
RESUMABLE = frozenset({"dcp", "hf+optim", "mixed"})


@dataclass(frozen=True, slots=True)
class Listing:
    """One look at a run. Checkpoints by step, the slot apart."""

    run: RunRef
    checkpoints: tuple[Checkpoint, ...]
    slot: Checkpoint | None
    recover_info: RecoverInfo | None
    adopted: tuple[Checkpoint, ...]  #: slots of earlier steps that were kept, by step
    notes: tuple[str, ...]
    newest_file: str  #: the file of the run that was written last, by the trainer
    newest_mtime_ns: int
    framework: str = "areal"  #: areal, or steps: a store of steps, with neither slot nor recover_info
    left: Mapping[str, Left] = field(default_factory=dict)  #: by place_of: what training has left
    doubt: str = ""  #: why that cannot be told, if so: then nobody may choose by himself

    def refuse_doubt(self) -> None:
        """StorageError where it is not known what training has left: for whoever is about to choose."""
        if self.doubt:
            raise StorageError(self.doubt, operation="read", path=left_behind.NAME, hint="Remove it, and name the step.")

    def latest(self) -> Checkpoint | None:
        """The newest export that is whole, and not left; None without one. StorageError as refuse_doubt."""
        self.refuse_doubt()
        return next((one for one in reversed(self.checkpoints) if one.status.usable and not one.left), None)

    def at_step(self, step: int) -> list[Checkpoint]:
        """The exports of that global step (several only where a run changed its steps per epoch)."""
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.step == step]


def scan(backend: Backend) -> Listing:
    """List the run that `backend` is rooted at, at level quick: names, sizes, manifests; no weights are read.

    NotFoundError when the run's folder is missing. Unreadable folders make their checkpoint PARTIAL, with the reason.
    """
    tree = backend.tree(max_depth=5 if backend.is_folder else 6)  # one more: attempts have a folder of their own
    if steps.is_store(tree):
        return _scan_steps(backend, tree)
    run = layout.sort_out(tree)
    notes = list(run.notes)
    checkpoints = [
        Checkpoint(name.step, name.epoch, name.epoch_step, "export", tuple(_parts(backend, run, folders)))
        for name, folders in sorted(run.exports.items())
    ]
    checkpoints = _compare_siblings(checkpoints)
    side = _side(backend)
    left, doubt = left_behind.noted(backend, side, tree, at=MIRROR)
    if side:
        checkpoints = _with_known_damage(backend, checkpoints, damage.known(side))
    checkpoints = [*left_behind.marked(backend, checkpoints, left)]
    stored = run.folders.get(layout.RECOVER_INFO) if run.recover_info else None
    info = recover_info.read(backend, stored, as_dumped=backend.is_folder)
    adopted = tuple(left_behind.marked(backend, read_adopted(side) if side else _mirrored(backend, tree), left))
    slot = _slot(backend, run, info)
    if side and slot is not None:
        (slot,) = _with_known_damage(backend, [with_copy(slot, adopted)], damage.known(side))
    if doubt:
        notes.append(doubt)
    if run.stray_slot and run.folders[run.stray_slot].entries:
        notes.append(
            f"{layout.SLOT}/ lies directly in the trial, where old guides put it: AReaL never reads it "
            f"(it reads {layout.MAIN_PART}/{layout.SLOT}/), and takes it for a model's name; move it away"
        )
    if not (backend.is_folder or checkpoints):
        notes += [f"a run lies at {url}" for url in _runs_beside(backend.location, tree)]
    newest_file, newest_mtime_ns = _newest(run)
    return Listing(
        layout.run_ref(backend.location),
        tuple(checkpoints),
        slot,
        info,
        adopted,
        tuple(notes),
        newest_file,
        newest_mtime_ns,
        left=left,
        doubt=doubt,
    )


def _runs_beside(url: str, tree: Mapping[str, Folder]) -> list[str]:
    """Some runs below a URL that is none, or around it: one that is named a folder too high or too low would look empty."""
    found = set()
    for path in tree:
        *above, name = path.split("/")
        if layout.parse_export_name(name):
            found.add("/".join((url, *above[:-1])) if above else url.rpartition("/")[0])
        elif above and steps.is_step(name):
            found.add("/".join((url, *above)))
    return sorted(found)[:8]


def _side(backend: Backend) -> str:
    """The run's side folder; empty for a run in an object store, which has none."""
    if not backend.is_folder:
        return ""
    return side_folders.side_folder(backend.location, f"{backend.location}/{layout.MAIN_PART}/{layout.SLOT}")


def _scan_steps(backend: Backend, tree: dict[str, Folder]) -> Listing:
    """A store of steps; one part each."""
    checkpoints = [
        Checkpoint(step, -1, -1, "export", (read_part(backend, layout.MAIN_PART, folder, tree, read_signs=steps.read_signs),))
        for step, folder in steps.steps_in(tree).items()
    ]
    notes: tuple[str, ...] = ()
    if side := _side(backend):
        checkpoints = _with_known_damage(backend, checkpoints, damage.known(side))
        ready = prepared.waiting(side)
        known = {one.name for one in ready}
        notes = (*(one.note for one in ready), *(one.note for one in owner.unsure(side) if one.name not in known))
    left, doubt = left_behind.noted(backend, side, tree, at=layout.SIDE)
    if doubt:
        notes = (*notes, doubt)
    checkpoints = [*left_behind.marked(backend, checkpoints, left)]
    newest = (
        max(
            (file.mtime_ns, f"{folder_of(backend, part)}/{file.name}")
            for c in checkpoints
            for part in c.parts
            for file in part.files
        )
        if any(c.file_count for c in checkpoints)
        else (0, "")
    )
    run = layout.run_ref(backend.location)
    return Listing(run, tuple(checkpoints), None, None, (), notes, newest[1], newest[0], "steps", left, doubt)


def _with_known_damage(
    backend: Backend, checkpoints: list[Checkpoint], known: dict[str, tuple[str, Finding]]
) -> list[Checkpoint]:
    """Checkpoints whose digests were found wrong before, and whose manifest is still the same, are CORRUPT."""
    if not known:
        return checkpoints

    def judge(part: Part) -> Part:
        commit, finding = known.get(folder_of(backend, part), ("", None))
        vouched = part.status is Status.COMMITTED or part.copy
        manifest = vouching(backend, part) if finding and vouched else None
        if finding is None or manifest is None or manifest.commit != commit:
            return part
        return dataclasses.replace(part, findings=(*part.findings, finding), status=Status.CORRUPT)

    return [dataclasses.replace(c, parts=tuple(judge(part) for part in c.parts)) for c in checkpoints]


def adopted_folder(side: str, step: int) -> str:
    """Where the slot of `step` is kept, in the run's side folder."""
    return os.path.join(side, "adopted", f"globalstep{step}")


def read_adopted(side: str) -> list[Checkpoint]:
    """The adopted steps in a side folder, by step; they appear there whole or not at all."""
    try:
        names = os.listdir(os.path.join(side, "adopted"))
    except OSError:
        return []
    stores = [LocalBackend(adopted_folder(side, step)) for step in _adopted_steps(names)]
    return [checkpoint for store in stores if (checkpoint := _read_kept(store)) is not None]


def mirror_of(url: str, step: int) -> str:
    """Where `watch --to URL` puts the adopted `step`: AReaL takes no notice of it in a folder that the run is pulled into."""
    return adopted_folder(f"{url}/{MIRROR}", step)


def _mirrored(backend: Backend, tree: dict[str, Folder]) -> Iterable[Checkpoint]:
    """Adopted steps in a run's URL. They come part by part: one that is not COMMITTED as a whole is none."""
    inside = tree.get(f"{MIRROR}/adopted", Folder(0, []))
    found: dict[int, Checkpoint] = {}

    def read(step: int, stop: parallel.Stop) -> None:
        kept = _read_kept(Below(backend, adopted_folder(MIRROR, step)))
        if kept is not None and kept.status is Status.COMMITTED:
            found[step] = kept

    # A mirror removes nothing, and each takes some requests, one after the other.
    parallel.each(_adopted_steps(entry.name for entry in inside.entries), read, threads=_AT_ONCE)
    return [found[step] for step in sorted(found)]


def _adopted_steps(names: Iterable[str]) -> list[int]:
    return sorted(int(name.removeprefix("globalstep")) for name in names if _ADOPTED.fullmatch(name))


def _read_kept(store: Backend) -> Checkpoint | None:
    """The adopted step that `store` is rooted at; None where it is not all there."""
    try:
        tree = store.tree(max_depth=5 if store.is_folder else 6)
    except CkptStoreError as error:
        if not store.is_folder and not isinstance(error, NotFoundError):
            raise  # an outage must not choose an older step
        return None  # being removed, or another user keeps it to himself
    folders = sorted(entry.name for entry in tree[""].entries if stat.S_ISDIR(entry.mode))
    parts = [
        with_dcp_holdings(store, read_part(store, name, name, tree))
        for name in sorted(folders, key=lambda part: (part != layout.MAIN_PART, part))
        if name != layout.RECOVER_INFO
    ]
    info = recover_info.read(store, tree.get(layout.RECOVER_INFO))
    named = _ADOPTED.fullmatch(store.location.rpartition("/")[2])
    manifests = [find_manifest(store, part.name) for part in parts if part.status is Status.COMMITTED]
    if any(manifest is not None and manifest.origin == "convert" for manifest in manifests):
        parts = [never_stepped(part) for part in parts]
    if not parts or info is None or not named or info.step != int(named[0].removeprefix("globalstep")):
        return None
    return Checkpoint(info.step, info.epoch, info.epoch_step, "adopted", tuple(parts), store=store.location)


def backend_for(backend: Backend, checkpoint: Checkpoint) -> Backend:
    """The backend that `checkpoint`'s parts lie under: `backend`, the store of an adopted one, or a folder of its own."""
    path = checkpoint.parts[0].path
    if checkpoint.store:
        return open_backend(checkpoint.store)
    return backend if path.startswith(f"{backend.location}/") else LocalBackend(path)


def _parts(backend: Backend, run: layout.RunTree, folders: dict[str, str]) -> Iterable[Part]:
    # The main model first: it is what people mean by "the checkpoint".
    for name in sorted(folders, key=lambda part: (part != layout.MAIN_PART, part)):
        yield read_part(backend, name, folders[name], run.folders)


def _compare_siblings(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """What other checkpoints of the run show to be missing: a part, or the tokenizer, which is written last."""
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.status.usable]
    # A critic without its twin proves nothing of the others: it is the odd one.
    twins = [checkpoint for checkpoint in whole if any(part.name == layout.MAIN_PART for part in checkpoint.parts)]
    names = {part.name for checkpoint in twins for part in checkpoint.parts}
    with_tokenizer = {part.name for checkpoint in whole for part in checkpoint.parts if "tokenizer" in part.holds}
    result = []
    for checkpoint in checkpoints:
        missing = {*names, layout.MAIN_PART} - {part.name for part in checkpoint.parts}
        late = [part.name for part in checkpoint.parts if part.name in with_tokenizer - set(_tokenized(checkpoint))]
        late = [name for name in late if next(p for p in checkpoint.parts if p.name == name).status is Status.COMPLETE]
        if not missing and not late:
            result.append(checkpoint)
            continue
        parts = [
            worsen(part, "tokenizer files missing: other steps have them, and they are written last")
            if part.name in late
            else part
            for part in checkpoint.parts
        ]
        if missing:
            parts[0] = worsen(parts[0], f"its part {', '.join(sorted(missing))} is missing at this step")
        result.append(dataclasses.replace(checkpoint, parts=tuple(parts)))
    return result


def _tokenized(checkpoint: Checkpoint) -> list[str]:
    return [part.name for part in checkpoint.parts if "tokenizer" in part.holds]


def _slot(backend: Backend, run: layout.RunTree, info: RecoverInfo | None) -> Checkpoint | None:
    """The recover slot, with the step that it can be shown to hold; None when no part of it has a file."""
    parts = [
        with_dcp_holdings(backend, part)
        for part in _parts(backend, run, run.slots)
        if part.files or (part.findings and part.format != "empty")
    ]
    if not parts:
        return None
    notes: list[str] = []
    found = [find_manifest(backend, run.slots[part.name]) for part in parts if part.status is Status.COMMITTED]
    ours = [manifest for manifest in found if manifest is not None]
    if len(ours) == len(parts) and len({manifest.step for manifest in ours}) == 1:
        first = ours[0]
        step, epoch, epoch_step = first.step, first.epoch, first.epoch_step
        if any(manifest.origin == "convert" for manifest in ours):
            parts = [never_stepped(part) for part in parts]
            notes.append("made from an export")
        if info is not None and info.step != step:
            notes.append(f"recover_info names step {info.step}, the slot holds {step}: AReaL would count from the wrong one")
    elif any(part.format not in RESUMABLE for part in parts):
        step, epoch, epoch_step = -1, -1, -1
        notes.append("not what the trainer saves there (no DCP, no optimizer shards): its step is unknown")
    elif info is None or info.step < 0:
        step, epoch, epoch_step = -1, -1, -1
        notes.append("no recover_info names its step")
    elif backend.is_folder and max(part.mtime_ns for part in parts) > info.mtime_ns + layout.CLOCK_SKEW_NS:
        step, epoch, epoch_step = -1, -1, -1
        notes.append(f"its files are newer than recover_info (step {info.step}): a save was cut short, its step is unknown")
        parts = [worsen(part, "newer than recover_info: the save was cut short") for part in parts]
    else:
        step, epoch, epoch_step = info.step, info.epoch, info.epoch_step
    return Checkpoint(step, epoch, epoch_step, "slot", tuple(parts), tuple(notes))


def with_copy(slot: Checkpoint, kept: Iterable[Checkpoint]) -> Checkpoint:
    """The slot, with the copy that was kept of just this save: what the copy's manifest says holds of the slot's bytes too.

    A copy has its source's times: one of an earlier save of the same step is told from it by them.
    """
    for copy in kept:
        if copy.step == slot.step >= 0 and (parts := [_vouched(part, copy) for part in slot.parts]) and all(parts):
            return dataclasses.replace(slot, parts=tuple(part for part in parts if part is not None))
    return slot


def _vouched(part: Part, copy: Checkpoint) -> Part | None:
    """The part as the manifest of its copy judges it; None where that is of another save."""
    manifest = find_manifest(open_backend(copy.store), part.name)
    if manifest is None or (seen := manifest.inspect(part.files)).void:
        return None
    if part.status is Status.COMMITTED:
        return part  # by its own
    new = tuple(finding for finding in seen.findings if finding not in part.findings)
    return dataclasses.replace(
        part,
        copy=f"{copy.store}/{part.name}",
        findings=(*part.findings, *new),
        status=worst([part.status, *(finding.status for finding in new)]),
    )


def never_stepped(part: Part) -> Part:
    """The part as it is when setup made it out of an export: what it holds of an optimizer has never stepped."""
    return dataclasses.replace(part, holds=tuple(FRESH_OPTIMIZER if h == "optimizer" else h for h in part.holds))


def _newest(run: layout.RunTree) -> tuple[str, int]:
    """The file that the trainer wrote last, for "is it still running?"; what we wrote does not count."""
    newest: tuple[int, str] = (0, "")
    for path, folder in run.folders.items():
        if layout.SIDE in path.split("/"):  # a trial that is a mount of its own has our things inside
            continue
        # What is older than our manifest in a slot or a recover_info is ours; what is newer, the trainer has saved since.
        written = path.rpartition("/")[2] in (layout.SLOT, layout.RECOVER_INFO)
        ours_ns = max((entry.mtime_ns for entry in folder.entries if entry.name == MANIFEST_NAME), default=0) if written else 0
        at_least_ns = max(newest[0], ours_ns)
        for entry in folder.entries:
            if entry.mtime_ns > at_least_ns and entry.name != MANIFEST_NAME and stat.S_ISREG(entry.mode):
                at_least_ns = entry.mtime_ns
                newest = (at_least_ns, f"{path}/{entry.name}" if path else entry.name)
    return newest[1], newest[0]
