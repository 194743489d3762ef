"""Power cuts of both nodes at once, while they save together or end a save that was cut: `resume_step` on each pair of disks.

python -m tests.powercut_both [--parts N] [NAME…]      adds to the table of docs/reliability.md (root)

Each node has a disk of its own, and both disks' writes are logged. Which cuts can be of one moment is told by what the nodes
say to each other: who has heard a word has it from one whose disk had by then what lay there when it was said. All else that
orders them (torch's collectives) is left out, so that a pair may be replayed which could not be. Cuts that leave the same
names, bytes and times on a disk are one content; each pair of contents that can be is resumed from once, by two real ranks.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ckptstore import CheckpointStore
from ckptstore.saves import steps
from ckptstore.torch import nodes, resuming
from tests import powercut
from tests.crashing import content
from tests.powercut_nodes import FIRST, PREPARED, SECOND, Pair, drafts, leave_draft, look, pair, resume, save, set_of
from tests.powercut_writers import NEW, NOTHING, OLD, Wrong, room

NODES = (0, 1)  #: the first is the coordinator's
COMMIT, PREPARED_WORD, COMMITTED_WORD = "commit", "prepared/1", "committed/1"


# --- what the nodes say to each other ------------------------------------------------------------------------------


class Word(NamedTuple):
    """Something that a node told the other, or heard. `entries`: as many were in the log of its own disk."""

    key: str
    told: bool
    entries: int


def noted(store: CheckpointStore, mesh: Any, eager: bool, work: Callable[..., Any], *more: Any) -> list[Word]:
    """The work, and each word of this node: counted before it is told, and after it is heard. `eager`: the kernel has just
    written back what nobody had flushed.
    """
    disk = Path(store.folder).parents[1]  # powercut.record mounts it there
    tell, told, gather = nodes.Channel.tell, nodes.Channel.told, resuming._gather
    words: list[Word] = []
    heard: set[str] = set()
    rounds = itertools.count()

    def entries() -> int:
        if eager:
            powercut.run("sync", "-f", store.folder)
        return powercut.written(disk)

    def telling(channel: nodes.Channel, key: str, document: Any) -> None:
        words.append(Word(key, True, entries()))
        tell(channel, key, document)

    def hearing(channel: nodes.Channel, key: str) -> Any:
        found = told(channel, key)
        if found is not None and key not in heard:
            heard.add(key)
            words.append(Word(key, False, entries()))
        return found

    def gathering(value: Any, group: Any) -> list[Any]:
        number, rank = next(rounds), dist.get_rank()
        words.append(Word(f"{number} by {rank}", True, entries()))
        found = gather(value, group)
        words.append(Word(f"{number} by {1 - rank}", False, entries()))
        return found

    nodes.Channel.tell, nodes.Channel.told = telling, hearing  # type: ignore[method-assign]
    resuming._gather = gathering
    try:
        work(store, mesh, *more)
    finally:
        nodes.Channel.tell, nodes.Channel.told = tell, told  # type: ignore[method-assign]
        resuming._gather = gather
    return words


class Order:
    """Which cuts of the two disks can be of one moment."""

    def __init__(self, words: list[list[Word]]) -> None:
        self.said = [{word.key: word.entries for word in of_one if word.told} for of_one in words]
        self._bounds: list[tuple[int, int, int]] = []  # of node, if more than heard: at least told of the other
        for node in NODES:
            for word in words[node]:
                if not word.told and word.key in self.said[1 - node]:
                    self._bounds.append((node, word.entries, self.said[1 - node][word.key]))

    def can_be(self, cuts: tuple[int, int]) -> bool:
        return all(cuts[node] <= heard or cuts[1 - node] >= told for node, heard, told in self._bounds)

    def given(self, node: int, key: str, cut: int) -> bool:
        """Whether a node had given this word, by a cut of its disk."""
        return key in self.said[node] and cut >= self.said[node][key]


# --- the two disks -------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A state that a cut may have left on one disk."""

    at: int  #: so many entries of its log were sent to it
    holds: str  #: its content


@dataclass
class Disk:
    """One node's disk: what was logged, and every state that a cut could leave."""

    place: Path
    node: int
    recording: powercut.Recording = field(init=False)
    cuts: list[Cut] = field(default_factory=list)
    images: dict[str, Path] = field(default_factory=dict)  #: of each content
    shown: collections.Counter[str] = field(default_factory=collections.Counter)  #: what lies there, over all cuts
    looks: dict[str, str | Wrong] = field(default_factory=dict)  #: what lies there, by content

    def replay(self, set_id: str, *, parts: int) -> None:
        for state in powercut.replay(self.recording, self.place, parts=parts, chance=random.Random(self.node)):
            with powercut.mounted(state.image, self.place / "mount") as folder:
                holds = fingerprint(folder / "store")
                if holds not in self.looks:
                    try:
                        self.looks[holds] = look(folder / "store", set_id)
                    except Wrong as wrong:
                        self.looks[holds] = wrong
            if holds not in self.images:
                self.images[holds] = self.place / f"content-{len(self.images)}"
                powercut.run("cp", "--sparse=always", state.image, self.images[holds])
            self.cuts.append(Cut(state.cut, holds))
            here = self.looks[holds]
            self.shown["wrong" if isinstance(here, Wrong) else here] += 1

    @contextlib.contextmanager
    def with_content(self, holds: str) -> Iterator[Path]:
        """The store, on a copy of the disk that may be written."""
        image = self.place / "now"
        powercut.run("cp", "--sparse=always", self.images[holds], image)
        with powercut.mounted(image, self.place / "mount") as folder:
            yield folder / "store"


def fingerprint(folder: Path) -> str:
    """Names, kinds, modes and bytes of all below a folder, and when each file was written."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.update(repr((str(path.relative_to(folder)), status.st_mode)).encode())
        if stat.S_ISREG(status.st_mode):
            found.update(repr((status.st_mtime_ns, status.st_size)).encode() + path.read_bytes())
    return found.hexdigest()


# --- what is put to power cuts -------------------------------------------------------------------------------------


class Both:
    """`dcp.save` by two nodes, each on its own disk."""

    name = "`dcp.save` by two nodes"

    def __init__(self, place: Path, ranks: Pair, *, over: bool, eager: bool = False) -> None:
        self.ranks = ranks
        self.eager = eager
        self.step = 1 if over else 2
        self.before = OLD if over else NOTHING
        self.name += ", over a step" * over + ", written back at once" * eager
        self.disks = [Disk(place / f"node{node}", node) for node in NODES]
        for disk in self.disks:
            disk.place.mkdir()
        self.id = ""  #: of the set that is saved
        self.first: list[Any] = []  #: step 1 as it was before, by node
        self.order = Order([[], []])

    def both(self, work: Callable[..., Any], stores: list[Path], *more: Any) -> list[Any]:
        """What it returns on each node. Wrong if it fails on one."""
        own = self.ranks.rank
        answers = self.ranks.both(work, stores[own], stores[1 - own], *more)
        for answer in answers:
            if isinstance(answer, Exception):
                raise Wrong(f"{getattr(work, '__name__', work)} fails: {answer}") from answer
        return answers if own == 0 else answers[::-1]

    def prepare(self, stores: list[Path]) -> None:
        self.both(save, stores, 1, FIRST)
        self.first = [content(store / "step-1") for store in stores]

    def act(self, stores: list[Path]) -> list[list[Word]]:
        words: list[list[Word]] = self.both(noted, stores, self.eager, save, self.step, SECOND)
        self.id = set_of(stores[0] / f"step-{self.step}")
        return words

    def record(self) -> None:
        """What both write, each to its own disk, and the order that their words make."""
        first, second = self.disks
        for disk in self.disks:
            powercut.make_image(disk.place / "image")
        with (
            powercut.mounted(first.place / "image", first.place / "mount") as one,
            powercut.mounted(second.place / "image", second.place / "mount") as other,
        ):
            self.prepare([one / "store", other / "store"])

        def with_both(one: Path, other: Path) -> None:
            self.order = Order(self.act([one / "store", other / "store"]))

        def with_one(one: Path) -> None:
            second.recording = powercut.record(second.place / "image", second.place, lambda other: with_both(one, other))

        first.recording = powercut.record(first.place / "image", first.place, with_one)

    def broken_word(self, node: int, cut: Cut) -> str:
        """What a node's disk lacks of what it had given its word for; "" if it keeps it."""
        here = self.disks[node].looks[cut.holds]
        if isinstance(here, Wrong):
            return str(here)
        if node == 0 and here != NEW and self.order.given(0, COMMIT, cut.at):
            return f"the coordinator has said that it has published, and there is {here}"
        if node == 1 and here != NEW and self.order.given(1, COMMITTED_WORD, cut.at):
            return f"it has said that it has published, and there is {here}"
        if node == 1 and here not in (PREPARED, NEW) and self.order.given(1, PREPARED_WORD, cut.at):
            return f"it has said that it is prepared, and there is {here}"
        return ""

    def decided(self, cuts: tuple[Cut, Cut]) -> bool:
        """Whether somebody may rely on the save: from then on it must be there."""
        return self.order.given(0, COMMIT, cuts[0].at)

    def judge(self, stores: list[Path]) -> str:
        """Both resume, look, and save again. What they agree on: NEW, or what was before."""
        here = [look(store, self.id) for store in stores]
        wanted = NEW if NEW in here else self.before
        if self.before == OLD and len(set(here)) == 2 and NEW in here:
            node = here.index(NEW)
            aside = stores[node] / f".ckptstore/old-step-1-{self.id}"
            if content(aside) != self.first[node]:
                raise Wrong(f"not all nodes have the new one, and the old one is gone from node {node}: {here}")
        ready = [drafts(store) for store in stores]
        expected = [self.step, SECOND] if wanted == NEW else [1, FIRST]
        for _ in ("once", "and again: there is nothing more to do"):
            answers = self.both(resume, stores)
            if answers != [expected, expected]:
                raise Wrong(f"on the disks are {here}: resumed from {answers}, and not {expected}", silent=True)
        after = [look(store, self.id) for store in stores]
        if (NEW in after) != (wanted == NEW) or (wanted == NEW and after != [NEW, NEW]):
            raise Wrong(f"on the disks were {here}: after they were resumed from there are {after}")
        if wanted != NEW and (left := [drafts(store) for store in stores]) != ready:
            raise Wrong(f"prepared were {ready}, and are {left}")
        if wanted == NEW and (kept := [path for store in stores for path in store.glob(".ckptstore/old-step-*")]):
            raise Wrong(f"all nodes have it, and there is still {kept}")
        self.same(stores)
        self.both(save, stores, 9, FIRST)
        self.same(stores)
        if left := [name for store in stores for name in [*drafts(store), *steps.leftovers(str(store))]]:
            raise Wrong(f"the next save leaves {left}")
        return wanted

    def same(self, stores: list[Path]) -> None:
        """What one node shows the other shows too, of the same save."""
        shown = [{step: name for step, (name, _) in resuming.held(CheckpointStore(store)).items()} for store in stores]
        if shown[0] != shown[1]:
            raise Wrong(f"the nodes show different steps: {shown}", silent=True)


class BothResume(Both):
    """`resume_step`, after a save that one node has published and the other has prepared. Decided from the start."""

    name = "`resume_step` by two nodes"

    def prepare(self, stores: list[Path]) -> None:
        super().prepare(stores)
        saved = [disk.place / "saved" for disk in self.disks]
        for store, copy in zip(stores, saved, strict=True):
            shutil.copytree(store, copy)
        self.both(save, saved, self.step, SECOND)
        made = [copy / f"step-{self.step}" for copy in saved]
        self.id = set_of(made[0])
        if (there := stores[0] / f"step-{self.step}").exists():
            there.rename(stores[0] / f".ckptstore/old-{there.name}-{self.id}")
        shutil.copytree(made[0], there)
        leave_draft(stores[1], self.id, made[1])
        os.sync()

    def act(self, stores: list[Path]) -> list[list[Word]]:
        words: list[list[Word]] = self.both(noted, stores, self.eager, resume)
        return words

    def broken_word(self, node: int, cut: Cut) -> str:
        here = self.disks[node].looks[cut.holds]
        return "" if here == NEW or (node == 1 and here == PREPARED) else str(here)

    def decided(self, cuts: tuple[Cut, Cut]) -> bool:
        return True


KINDS: dict[str, tuple[type[Both], bool, bool]] = {
    "save": (Both, False, False),
    "save-over": (Both, True, False),
    "save-over-eager": (Both, True, True),
    "resume": (BothResume, False, False),
    "resume-over": (BothResume, True, False),
    "resume-over-eager": (BothResume, True, True),
}


# --- the campaign --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What the pairs of cuts came to. A pair may be bad in several ways."""

    name: str
    cuts: tuple[int, int]  #: the states of each disk
    pairs: int = 0  #: that can be of one moment
    contents: int = 0  #: pairs of contents that these are of
    resumed: int = 0  #: of these, as many were resumed from
    wrong: int = 0  #: pairs: visible but wrong, or the nodes disagree, or they cannot go on
    broken: int = 0  #: of what a node had given its word for something is not there
    lost: int = 0  #: the save was decided, and is not there
    whole: collections.Counter[str] = field(default_factory=collections.Counter)  #: what was on both disks, and what came of it
    examples: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.wrong + self.broken + self.lost

    def row(self) -> str:
        states = f"{self.cuts[0]} and {self.cuts[1]}"
        return f"| {self.name} | {states} | {self.pairs:,} | {self.resumed} | {self.wrong} | {self.broken} | {self.lost} |"


COLUMNS = (
    "",
    "states of the disks",
    "pairs of one moment",
    "of different contents",
    "visible but wrong, or different",
    "a node's word broken",
    "decided, and not there",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def both_campaign(kind: str, *, parts: int, rank: int = 0, each: int = 0, until: str = "") -> Result:
    """`rank`: the node whose rank is in this process (bugs are planted here). `each`: so many pairs of contents are resumed
    from, of those in which the disks hold the same (nothing, prepared, the step); 0 for all. `until`: the count
    of bad ones that is enough of a planted bug.
    """
    make, over, eager = KINDS[kind]
    with room() as place, pair(rank) as ranks:
        both = make(place, ranks, over=over, eager=eager)
        both.record()
        for disk in both.disks:
            disk.replay(both.id, parts=parts)
        return _judge_all(both, each=each, until=until)


def _judge_all(both: Both, *, each: int, until: str) -> Result:
    first, second = both.disks
    result = Result(both.name, (len(first.cuts), len(second.cuts)))
    contents: dict[tuple[str, str], list[tuple[Cut, Cut]]] = {}
    for cuts in itertools.product(first.cuts, second.cuts):
        if both.order.can_be((cuts[0].at, cuts[1].at)):
            contents.setdefault((cuts[0].holds, cuts[1].holds), []).append(cuts)
    result.pairs = sum(map(len, contents.values()))
    result.contents = len(contents)
    resumed = collections.Counter[str]()
    for holds, of_these in contents.items():
        here = " beside ".join(str(disk.looks[one]) for disk, one in zip(both.disks, holds, strict=True))
        for cuts in of_these:
            if word := both.broken_word(0, cuts[0]) or both.broken_word(1, cuts[1]):
                result.broken += 1
                result.examples.append(f"after {cuts[0].at} and {cuts[1].at} writes and flushes: {word}")
        resumed[here] += 1
        if not each or resumed[here] <= each:
            result.resumed += 1
            _resume(result, both, holds, of_these, here)
        if until and getattr(result, until):
            break
    return result


def _resume(result: Result, both: Both, holds: tuple[str, str], of_these: list[tuple[Cut, Cut]], here: str) -> None:
    where = f"after {of_these[0][0].at} and {of_these[0][1].at} writes and flushes, {here}"
    try:
        with both.disks[0].with_content(holds[0]) as one, both.disks[1].with_content(holds[1]) as other:
            verdict = both.judge([one, other])
    except Wrong as wrong:
        result.wrong += len(of_these)
        result.examples.append(f"{where}: {wrong}")
        return
    result.whole[f"{here}: {verdict}"] += len(of_these)
    if verdict != NEW and (lost := sum(both.decided(cuts) for cuts in of_these)):
        result.lost += lost
        result.examples.append(f"{where}: it was decided, and there is {verdict}")


if __name__ == "__main__":

    def measured(kind: str, parts: int) -> tuple[Result, dict[str, int]]:
        result = both_campaign(kind, parts=parts)
        return result, result.whole

    sys.exit(powercut.measure(__doc__, HEAD, KINDS, measured))
