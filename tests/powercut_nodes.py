"""Power cuts on one of two nodes that save a step together, each on its own disk: what `resume_step` makes of each state.

python -m tests.powercut_nodes [--parts N] [NAME…]      adds to the table of docs/reliability.md (root)

A cut leaves a node with nothing of the save, with its part prepared, or with the step. The other node has published once all
had prepared: so both resume from the step that both have, or finish the save, and nothing else. Two real ranks save and
resume, over gloo; the other one's store is what it may have been at that moment.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import multiprocessing
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckptstore import CheckpointStore
from ckptstore.model import MANIFEST_NAME, Status
from ckptstore.saves import owner, prepared, steps
from ckptstore.torch import StoreReader, StoreWriter, nodes, resume_step, resuming
from tests import powercut
from tests.killed_ranks import GROUP_TIMEOUT_S, free_port
from tests.powercut_writers import HEAD, NEW, NOTHING, OLD, Result, Writer, Wrong, campaign, go_on
from tests.test_steps import write

PREPARED = "prepared"
FIRST, SECOND = 1, 2  #: the numbers of the saves, and all their values
END_S = 30.0
START_S = 120.0


# --- two ranks -----------------------------------------------------------------------------------------------------


def state_of(number: int, mesh: Any) -> dict[str, Any]:
    """A state of which every value is `number`; 1.6 MB, over the ranks."""
    tensors = {f"w{i}": distribute_tensor(torch.full((200_003 + i,), float(number)), mesh, [Shard(0)]) for i in range(2)}
    return {"model": tensors, "same": torch.full((1000,), float(number)), "number": number}


def save(store: CheckpointStore, mesh: Any, step: int, number: int) -> None:
    writer = StoreWriter(store, step)
    dcp.save(state_of(number, mesh), storage_writer=writer)
    writer.close()  # what leads a node has ended then


def resume(store: CheckpointStore, mesh: Any) -> list[int]:
    """The step, and the values that are loaded from it."""
    step = resume_step(store)
    state = state_of(0, mesh)
    dcp.load(state, storage_reader=StoreReader(store, step))
    values = {state["number"], *state["same"].unique().tolist()}
    for tensor in state["model"].values():
        values.update(tensor.to_local().unique().tolist())
    return [step, *sorted(map(int, values))]


class Pair:
    """This rank and the other, in a process of its own: both do the same, each with its own store."""

    def __init__(self, rank: int, mesh: Any, other: Connection) -> None:
        self.rank = rank
        self._mesh = mesh
        self._other = other

    def both(self, work: Callable[..., Any], mine: Path, theirs: Path, *more: Any) -> list[Any]:
        """What it returns on both, or raises."""
        self._other.send((work, theirs, more))
        try:
            own = work(CheckpointStore(mine), self._mesh, *more)
        except Exception as error:  # noqa: BLE001 (returned)
            own = error
        assert self._other.poll(END_S), "the other rank does not answer"
        return [own, self._other.recv()]

    def succeed(self, work: Callable[..., Any], mine: Path, theirs: Path, *more: Any) -> None:
        answers = self.both(work, mine, theirs, *more)
        assert not any(isinstance(answer, Exception) for answer in answers), answers


def meet(rank: int, port: int) -> Any:
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    return init_device_mesh("cpu", (2,))


def serve(asked: Connection, rank: int, port: int) -> None:
    """The other rank, until nobody asks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    asked.send("torch is imported")  # which takes longer than ranks wait for each other
    mesh = meet(rank, port)
    with contextlib.suppress(EOFError):
        while True:
            work, store, more = asked.recv()
            try:
                answer = work(CheckpointStore(store), mesh, *more)
            except Exception:  # noqa: BLE001 (told)
                answer = RuntimeError(traceback.format_exc())
            asked.send(answer)
    dist.destroy_process_group()


@contextlib.contextmanager
def pair(rank: int) -> Iterator[Pair]:
    """`rank`: the one in this process."""
    forks = multiprocessing.get_context("forkserver")
    here, there = forks.Pipe()
    port = free_port()
    process = forks.Process(target=serve, args=(there, 1 - rank, port), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(START_S), "the other rank does not start"
        here.recv()
        mesh = meet(rank, port)
        try:
            yield Pair(rank, mesh, here)
        finally:
            here.close()
            dist.destroy_process_group()
    finally:
        process.join(END_S)
        process.kill()
        process.join()


# --- who is put to power cuts --------------------------------------------------------------------------------------


class Node(Writer):
    """The node that the coordinator leads from afar. Its word is `prepared`: from then on the other may publish."""

    name = "`dcp.save` by two nodes: a node's disk"
    rank = 1
    word, done = "prepared/1", "committed/1"  #: of Channel.tell: what must be durable by then
    meanwhile = "published"  #: what the other may have made of it, once the word is given or the step is here

    def __init__(self, room: Path, ranks: Pair, *, over: bool = False) -> None:
        super().__init__(room)
        assert ranks.rank == self.rank
        self.ranks = ranks
        self.other = room / "other"  #: its store, as it was at several moments
        self.files = write(room / "files", "next", 10_000)
        self.step = 1 if over else 2
        self.before = OLD if over else NOTHING
        if over:
            self.name = f"{self.name} over a step"
        self.said: dict[str, int] = {}  #: what the nodes tell each other; how many writes were in the log
        self.shown = collections.Counter[str]()  #: what lay on the disk, over all states
        self.id = ""  #: of the set that is saved

    def prepare(self, folder: Path) -> None:
        self.ranks.succeed(save, folder / "store", self.other / "before", 1, FIRST)

    def act(self, folder: Path) -> None:
        shutil.copytree(self.other / "before", self.other / "live")
        tell = nodes.Channel.tell

        def telling(channel: nodes.Channel, key: str, document: Any) -> None:
            self.said.setdefault(key, powercut.written(self.room))
            tell(channel, key, document)

        nodes.Channel.tell = telling  # type: ignore[method-assign]
        try:
            self.ranks.succeed(save, folder / "store", self.other / "live", self.step, SECOND)
        finally:
            nodes.Channel.tell = tell  # type: ignore[method-assign]
        self.moments(self.other / "live")

    def moments(self, saved: Path) -> None:
        """The other's store as it was when it had prepared, and when it had published and knew no more."""
        folder = saved / f"step-{self.step}"
        self.id = set_of(folder)
        before, ready, published = (self.other / name for name in ("before", "prepared", "published"))
        shutil.copytree(before, ready)
        leave_draft(ready, self.id, folder)
        shutil.copytree(before, published)
        if (there := published / folder.name).exists():
            there.rename(published / f".ckptstore/old-{folder.name}-{self.id}")
        shutil.copytree(folder, there)

    def promised(self, recording: powercut.Recording) -> int:
        return self.said[self.word]

    def judge(self, folder: Path) -> str:
        store = folder / "store"
        here = look(store, self.id)
        self.shown[here] += 1
        if here != NEW and self.cut.cut >= self.said[self.done]:
            raise Wrong(f"it has told the others that it has published, and there is {here}")
        if here == NEW and not self.cut.returned and self.rank:
            raise Wrong("it has published, and had not said that it is prepared")
        verdict = self.before
        if here != NEW:
            self.resume(store, "prepared", NOTHING)
        if here == NEW or self.cut.returned:
            verdict = NEW
            self.resume(store, self.meanwhile, NEW)
            if look(store, self.id) != NEW:
                raise Wrong("it is not there after it was resumed from")
            if kept := [*store.glob(".ckptstore/old-step-*")]:
                raise Wrong(f"all nodes have it, and there is still {kept}")
        go_on(CheckpointStore(store), self.files)
        if left := drafts(store):
            raise Wrong(f"the next save leaves {left}")
        return verdict

    def resume(self, store: Path, other: str, wanted: str) -> None:
        """Both resume, the other from one of its moments. NOTHING: of this save, and what is prepared stays."""
        theirs = self.other / "now"
        shutil.rmtree(theirs, ignore_errors=True)
        shutil.copytree(self.other / other, theirs)
        ready = [drafts(store), drafts(theirs)]
        answers = self.ranks.both(resume, store, theirs)
        if any(isinstance(answer, Exception) for answer in answers):
            raise Wrong(f"the other has {other}: {answers}")
        expected = [self.step, SECOND] if wanted == NEW else [1, FIRST]
        if answers != [expected, expected]:
            raise Wrong(f"the other has {other}: resumed from {answers}, and not {expected}", silent=True)
        if wanted != NEW and [drafts(store), drafts(theirs)] != ready:
            raise Wrong(f"prepared were {ready}, and are {[drafts(store), drafts(theirs)]}")


class Coordinator(Node):
    """The coordinator's node. Its word is `commit`: it has published by then, and the others may from then on."""

    name = "`dcp.save` by two nodes: the coordinator's disk"
    rank = 0
    word = done = "commit"
    meanwhile = "prepared"


class Resume(Node):
    """`resume_step`, on the node that publishes what another has published. What it does is whole at any time."""

    name = "`resume_step` after a save that was cut"

    def __init__(self, room: Path, ranks: Pair, *, over: bool = False) -> None:
        super().__init__(room, ranks, over=over)
        self.before = NEW  # of a save that was decided

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        shutil.copytree(folder / "store", self.room / "saved")
        shutil.copytree(self.other / "before", self.other / "live")
        self.ranks.succeed(save, self.room / "saved", self.other / "live", self.step, SECOND)
        self.moments(self.other / "live")
        leave_draft(folder / "store", self.id, self.room / f"saved/step-{self.step}")

    def act(self, folder: Path) -> None:
        shutil.copytree(self.other / "published", self.other / "resumed")
        gather = resuming._gather

        def gathering(value: Any, group: Any) -> list[Any]:
            if value is None:
                self.said[self.word] = self.said[self.done] = powercut.written(self.room)
            return gather(value, group)

        resuming._gather = gathering
        try:
            self.ranks.succeed(resume, folder / "store", self.other / "resumed")
        finally:
            resuming._gather = gather

    def judge(self, folder: Path) -> str:
        store = folder / "store"
        here = look(store, self.id)
        self.shown[here] += 1
        if here == NOTHING or (here != NEW and self.cut.returned):
            raise Wrong(f"there is {here}")
        self.resume(store, "published", NEW)
        if look(store, self.id) != NEW:
            raise Wrong("it is not there after it was resumed from")
        go_on(CheckpointStore(store), self.files)
        return NEW


def look(store: Path, set_id: str) -> str:
    """What lies there of a set. Wrong for anything visible that is not whole, or if the step before is gone too soon."""
    here = CheckpointStore(store)
    found = NOTHING
    steps_there = {checkpoint.step: checkpoint for checkpoint in here.list()}
    for step, checkpoint in steps_there.items():
        report = here.verify(step)
        if checkpoint.status is not Status.COMMITTED or not report.ok:
            raise Wrong(f"step {step} is {checkpoint.status}: {report.findings}")
        if set_of(store / f"step-{step}") == set_id:
            found = NEW
    if 1 not in steps_there or not set(steps_there) <= {1, 2}:
        raise Wrong(f"there are {sorted(steps_there)}")
    return PREPARED if found == NOTHING and set_id in drafts(store) else found


def set_of(folder: Path) -> str:
    group = json.loads((folder / MANIFEST_NAME).read_bytes())["group"]
    return str(group["id"]) if group else ""


def drafts(store: Path) -> list[str]:
    """The sets of what is prepared there."""
    return [one.group.id for one in prepared.left(steps.side_of(str(store)))]


def leave_draft(store: Path, name: str, files: Path) -> None:
    """As a node that was killed when it had prepared."""
    home = Path(steps.home_of(str(store), name))
    home.mkdir(0o700)
    (home / owner.OWNER).touch()
    shutil.copytree(files, home / "step")


KINDS: dict[str, tuple[type[Node], bool]] = {
    "node": (Node, False),
    "node-over": (Node, True),
    "coordinator": (Coordinator, False),
    "coordinator-over": (Coordinator, True),
    "resume": (Resume, False),
    "resume-over": (Resume, True),
}


def node_campaign(kind: str, *, parts: int, until_bad: bool = False) -> tuple[Result, collections.Counter[str]]:
    """And what lay on the disk."""
    make, over = KINDS[kind]
    made: list[Node] = []
    with pair(make.rank) as ranks:

        def writer(room: Path) -> Node:
            made.append(make(room, ranks, over=over))
            return made[0]

        return campaign(writer, parts=parts, until_bad=until_bad), made[0].shown


if __name__ == "__main__":
    sys.exit(powercut.measure(__doc__, HEAD, KINDS, lambda kind, parts: node_campaign(kind, parts=parts)))
