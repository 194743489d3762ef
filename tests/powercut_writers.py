"""Who is put to power cuts, and how what a cut left is judged: ckptstore's commits, and what people save with today.

python -m tests.powercut_writers [--parts N] [NAME…]      prints the table of docs/reliability.md (root; about ten minutes)
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptstore import CheckpointStore, cli
from ckptstore.errors import CkptStoreError
from ckptstore.model import Status
from ckptstore.retention import Keep
from ckptstore.saves import steps
from tests import powercut, trees
from tests.crashing import content, without_manifest
from tests.test_steps import write

OLD, NEW, NOTHING = "old", "new", "nothing"


class Wrong(Exception):
    """Something is visible that is not what was saved. `silent`: it loads without an error."""

    def __init__(self, problem: str, *, silent: bool = False) -> None:
        super().__init__(problem)
        self.silent = silent


class Writer:
    """One way to save. `before`: what a reader finds before the call; after it, NEW. `judge` raises Wrong."""

    name = ""
    before = NOTHING
    cut: powercut.State  #: which is judged

    def __init__(self, room: Path) -> None:
        self.room = room

    def prepare(self, folder: Path) -> None:
        """What lies there before."""

    def act(self, folder: Path) -> None:
        """The call."""
        raise NotImplementedError

    def promised(self, recording: powercut.Recording) -> int:
        """From how many entries of the log on the new one must be there: when the call had come back."""
        return recording.returned

    def judge(self, folder: Path) -> str:
        """What a reader finds: NOTHING, OLD or NEW."""
        raise NotImplementedError


# --- ckptstore -----------------------------------------------------------------------------------------------------


class Save(Writer):
    """`store.save` of files, a step that is not there yet, beside one that is."""

    name = "ckptstore `save`"
    step = 2

    def __init__(self, room: Path) -> None:
        super().__init__(room)
        self.old = write(room / "old", "one", 200_000)
        self.new = write(room / "new", "two", 200_000)

    def prepare(self, folder: Path) -> None:
        CheckpointStore(folder / "store").save(1, self.old)

    def act(self, folder: Path) -> None:
        CheckpointStore(folder / "store").save(self.step, self.new)

    def judge(self, folder: Path) -> str:
        store = CheckpointStore(folder / "store")
        found = self.whole(store)
        if 1 not in found:
            raise Wrong("the step that was there before is lost")
        go_on(store, self.old)
        return found.get(self.step, NOTHING)

    def whole(self, store: CheckpointStore) -> dict[int, str]:
        """Every step that is listed, by its bytes. Wrong for one that is not whole, committed and verified."""
        known = {repr(content(self.old)): OLD, repr(content(self.new)): NEW}
        found = {}
        for checkpoint in store.list():
            here = repr(without_manifest(content(Path(checkpoint.parts[0].path))))
            if checkpoint.status is not Status.COMMITTED or here not in known:
                raise Wrong(f"step {checkpoint.step} is {checkpoint.status}, {known.get(here, 'with other bytes')}")
            if not (report := store.verify(checkpoint.step)).ok:
                raise Wrong(f"step {checkpoint.step}: {report.findings}")
            found[checkpoint.step] = known[here]
        return found


def go_on(store: CheckpointStore, source: Path) -> None:
    """After any cut the next save goes through, and nothing of the one that was cut stays."""
    try:
        store.save(9, source)
    except CkptStoreError as error:
        raise Wrong(f"the next save fails: {error}") from error
    if left := steps.leftovers(store.folder):
        raise Wrong(f"the next save leaves {left}")


class Resave(Save):
    """`store.save` over a step that is there."""

    name = "ckptstore `save` over a step"
    before = OLD
    step = 1


class Prune(Save):
    """`store.prune` of two steps of four. OLD: one of them is there."""

    name = "ckptstore `prune`"
    before = OLD

    def prepare(self, folder: Path) -> None:
        for step in (1, 2, 3, 4):
            CheckpointStore(folder / "store").save(step, self.old)

    def act(self, folder: Path) -> None:
        CheckpointStore(folder / "store").prune(Keep(last=2))

    def judge(self, folder: Path) -> str:
        store = CheckpointStore(folder / "store")
        found = self.whole(store)
        if not {3, 4} <= set(found):
            raise Wrong(f"prune was to keep 3 and 4: there are {sorted(found)}")
        go_on(store, self.old)
        return OLD if {1, 2} & set(found) else NEW


class Setup(Writer):
    """`ckptstore setup` of an AReaL run, over a slot that is there. Any command finishes what was cut."""

    name = "ckptstore `setup`"
    before = OLD

    def run(self, folder: Path) -> Path:
        return folder / "checkpoints/alice/exp/trial"

    def prepare(self, folder: Path) -> None:
        run = self.run(folder)
        trees.write_model(trees.checkpoint(run, 46), seed=1)
        trees.write_dcp_slot(run / "default/recover_checkpoint", seed=2)
        trees.set_age(run, 3600)
        self.new, self.old = content(trees.checkpoint(run, 46)), content(run / "default/recover_checkpoint")

    def act(self, folder: Path) -> None:
        assert quietly("setup", "--as-is", "--json", "--run", self.run(folder)) == 0

    def judge(self, folder: Path) -> str:
        run = self.run(folder)
        if quietly("list", "--json", "--run", run) != 0:
            raise Wrong("list fails")
        slot = run / "default/recover_checkpoint"
        here = without_manifest(content(slot)) if slot.exists() else {}
        verdict = NEW if here == self.new else OLD if here == self.old else ""
        if not verdict or content(trees.checkpoint(run, 46)) != self.new:
            raise Wrong(f"the slot or the export has other bytes: {sorted(here)}")
        if quietly("verify", "--slot", "--json", "--run", run) != 0:
            raise Wrong("the slot does not pass verify")
        if quietly("setup", "--as-is", "--json", "--run", run) != 0 or without_manifest(content(slot)) != self.new:
            raise Wrong("the next setup fails")
        if self.old not in [content(path) for path in (run.parent / ".ckptstore" / run.name).glob("old-*/*")]:
            raise Wrong("the old slot is lost")
        return verdict


def quietly(*words: object) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return cli.run([str(word) for word in words])


# --- state dicts ---------------------------------------------------------------------------------------------------


def state(seed: int) -> dict[str, Any]:
    """Six tensors, 4.8 MB; each value tells which state it is of."""
    import torch

    return {f"layer.{number}": torch.arange(200_000, dtype=torch.float32) + 1e6 * seed + number for number in range(6)}


def which(found: dict[str, Any]) -> str:
    import torch

    for verdict, seed in ((OLD, 1), (NEW, 2)):
        wanted = state(seed)
        if found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted):
            return verdict
    raise Wrong("loads without an error, and is neither the old nor the new one", silent=True)


class States(Writer):
    """A writer of state dicts at one path. `over`: there is one already."""

    path = "state"

    def __init__(self, room: Path, *, over: bool = False) -> None:
        super().__init__(room)
        if over:
            self.before, self.name = OLD, f"{self.name} over one"

    def prepare(self, folder: Path) -> None:
        if self.before == OLD:
            self.save(state(1), folder / self.path)

    def act(self, folder: Path) -> None:
        self.save(state(2), folder / self.path)

    def judge(self, folder: Path) -> str:
        if not self.visible(folder / self.path):
            return NOTHING
        try:
            found = self.load(folder / self.path)
        except BaseException as error:
            raise Wrong(f"{type(error).__name__}: {str(error)[:100]}") from error
        return which(found)

    def visible(self, path: Path) -> bool:
        return path.exists()

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        raise NotImplementedError

    def load(self, path: Path) -> dict[str, Any]:
        raise NotImplementedError


class TorchSave(States):
    name, path = "`torch.save`", "state.pt"

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        import torch

        torch.save(tensors, path)

    def load(self, path: Path) -> dict[str, Any]:
        import torch

        return torch.load(path, weights_only=True)


class SaveFile(States):
    name, path = "safetensors `save_file`", "state.safetensors"

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path)

    def load(self, path: Path) -> dict[str, Any]:
        from safetensors.torch import load

        return load(path.read_bytes())


class DcpSave(States):
    name, path = "`dcp.save`", "step"

    def visible(self, path: Path) -> bool:
        return (path / ".metadata").exists()

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(tensors, checkpoint_id=path, no_dist=True)

    def load(self, path: Path) -> dict[str, Any]:
        import torch
        import torch.distributed.checkpoint as dcp

        found = {key: torch.zeros_like(value) for key, value in state(2).items()}
        dcp.load(found, checkpoint_id=path, no_dist=True)
        return found


class DcpSaveOfTwo(DcpSave):
    """As two ranks would: two files."""

    name = "`dcp.save` of two shards"

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path, thread_count=2), no_dist=True)


class OurSave(States):
    """`ckptstore.torch.save`; what it left is read by safetensors."""

    name, path = "`ckptstore.torch.save`", "store"

    def visible(self, path: Path) -> bool:
        return bool(path.is_dir() and CheckpointStore(path).list())

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        import ckptstore.torch as ckpt

        ckpt.save(CheckpointStore(path), 1, {"model": tensors})

    def load(self, path: Path) -> dict[str, Any]:
        from safetensors.torch import load

        if not CheckpointStore(path).verify(1).ok:
            raise Wrong("it does not pass verify")
        return load((path / "step-1/model.safetensors").read_bytes())


class OurDcp(OurSave):
    """`dcp.save` by StoreWriter; what it left is read by plain dcp.load."""

    name = "`dcp.save` with `StoreWriter`"

    def save(self, tensors: dict[str, Any], path: Path) -> None:
        import torch.distributed.checkpoint as dcp

        from ckptstore.torch import StoreWriter

        dcp.save(tensors, storage_writer=StoreWriter(CheckpointStore(path), 1), no_dist=True)

    def load(self, path: Path) -> dict[str, Any]:
        if not CheckpointStore(path).verify(1).ok:
            raise Wrong("it does not pass verify")
        return DcpSave(self.room).load(path / "step-1")


OURS: dict[str, Callable[[Path], Writer]] = {
    "save": Save,
    "resave": Resave,
    "prune": Prune,
    "setup": Setup,
    "torch": OurSave,
    "torch-over": lambda room: OurSave(room, over=True),
    "dcp": OurDcp,
    "dcp-over": lambda room: OurDcp(room, over=True),
}
OTHERS: dict[str, Callable[[Path], Writer]] = {
    "dcp.save": DcpSave,
    "dcp.save-over": lambda room: DcpSave(room, over=True),
    "dcp.save-two-over": lambda room: DcpSaveOfTwo(room, over=True),
    "torch.save": TorchSave,
    "torch.save-over": lambda room: TorchSave(room, over=True),
    "save_file": SaveFile,
    "save_file-over": lambda room: SaveFile(room, over=True),
}


# --- the campaign --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What the states of one call were. Lost: the old one before the call returned, or the new one afterwards."""

    name: str
    states: int = 0
    wrong_before: int = 0  #: before the call had returned: visible, and not what was saved
    wrong_after: int = 0
    silent: int = 0  #: of the wrong ones: they load without an error
    lost_before: int = 0
    lost_after: int = 0
    whole: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.wrong_before + self.wrong_after + self.lost_before + self.lost_after

    def row(self) -> str:
        cells = (self.states, self.wrong_before, self.lost_before, self.wrong_after, self.lost_after, self.silent)
        return f"| {self.name} | {' | '.join(map(str, cells))} |"


COLUMNS = (
    "",
    "states",
    "while it saves: visible but wrong",
    "while it saves: the old one lost",
    "after it returned: visible but wrong",
    "after it returned: the new one not there",
    "of the wrong ones, loaded without an error",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def campaign(make: Callable[[Path], Writer], *, parts: int, seed: int = 0, until_bad: bool = False) -> Result:
    """Record one call, and judge every state; or until one is bad, which is enough of a planted bug."""
    with room() as place:
        writer = make(place)
        image = place / "image"
        powercut.make_image(image)
        with powercut.mounted(image, place / "mount") as folder:
            writer.prepare(folder)
        recording = powercut.record(image, place, writer.act)
        recording.returned = writer.promised(recording)
        result = Result(writer.name)
        for cut in powercut.replay(recording, place, parts=parts, chance=random.Random(seed)):
            result.states += 1
            with powercut.mounted(cut.image, place / "mount") as folder:
                _count(result, writer, cut, folder)
            if until_bad and result.bad:
                break
        return result


def _count(result: Result, writer: Writer, cut: powercut.State, folder: Path) -> None:
    writer.cut = cut
    try:
        verdict = writer.judge(folder)
    except Wrong as wrong:
        result.examples.append(f"{cut.name}: {wrong}")
        result.silent += wrong.silent
        if cut.returned:
            result.wrong_after += 1
        else:
            result.wrong_before += 1
        return
    if cut.returned and verdict != NEW:
        result.lost_after += 1
        result.examples.append(f"{cut.name}: after it had returned there is {verdict}")
    elif not cut.returned and verdict not in (writer.before, NEW):
        result.lost_before += 1
        result.examples.append(f"{cut.name}: before it had returned there is {verdict}")
    else:
        result.whole[verdict] += 1


@contextlib.contextmanager
def room() -> Iterator[Path]:
    place = tempfile.mkdtemp(prefix="ckptstore-powercut-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        yield Path(place)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":

    def measured(name: str, parts: int) -> tuple[Result, dict[str, int]]:
        result = campaign((OURS | OTHERS)[name], parts=parts)
        return result, result.whole

    sys.exit(powercut.measure(__doc__, HEAD, [*OTHERS, *OURS], measured))
