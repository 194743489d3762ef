"""Gloo ranks on "nodes" that have a disk each, as folders: saves, loads, and ranks that are killed on the way.

python -m tests.node_ranks look ROOT                       what saves and loads give, as JSON
python -m tests.node_ranks at ROOT WHO WHERE               one rank is killed in a phase of the commit
python -m tests.node_ranks finish ROOT                     what resume_step makes of drafts that a crash may have left
python -m tests.node_ranks kill ROOT WORLD TIMES SEED      a rank, or all of a node, killed at random moments
python -m tests.node_ranks save ROOT WORLD NUMBER STEP      one save
python -m tests.node_ranks load URL WORLD STEP              what so many ranks load from one place, as JSON

As in killed_ranks, from which much comes: ranks are forked, and all values of a save are its number.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from ckptstore import CheckpointStore, native
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError, NothingToResumeError, NotWholeError
from ckptstore.model import MANIFEST_NAME, Status
from ckptstore.parts import read_manifest
from ckptstore.retention import Keep
from ckptstore.saves import prepared, steps
from ckptstore.torch import StoreReader, StoreWriter, nodes, resume_step, resuming
from tests import killed_ranks
from tests.killed_ranks import END_S, GROUP_TIMEOUT_S, Board, await_end, free_port

NODES = 2
RESAVED = 1  # the step that every other save replaces: an old one, so that the newest is new each time


def step_of(number: int) -> int:
    return RESAVED if number % 2 else number


def store_of(root: Path, rank: int, world: int) -> CheckpointStore:
    return CheckpointStore(root / f"node{rank * NODES // world}")


def fork(world: int, work: Callable[[int, Any], Any], out: Path) -> list[int]:
    """Ranks that meet, and do `work` on (rank, mesh); what it returns, or raised, goes to `out`."""
    port = free_port()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 7
        try:
            where = f"tcp://127.0.0.1:{port}"
            timeout = timedelta(seconds=GROUP_TIMEOUT_S)
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timeout)
            result = work(rank, init_device_mesh("cpu", (world,)))
            (out / f"{rank}.json").write_text(json.dumps(result))
            dist.barrier()
            dist.destroy_process_group()
            code = 0
        except BaseException:  # noqa: BLE001 (the process ends; its code says so)
            traceback.print_exc()
        finally:
            os._exit(code)
    return pids


def together(world: int, work: Callable[[int, Any], Any]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pids = fork(world, work, Path(folder))
        codes = [await_end(pid, 60) for pid in pids]
        assert codes == [0] * world, codes
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def saved(root: Path, world: int, number: int, step: int) -> list[Any]:
    def work(rank: int, mesh: Any) -> Any:
        writer = StoreWriter(store_of(root, rank, world), step, metrics={"loss": float(number)})
        dcp.save(killed_ranks.state_of(number, mesh), storage_writer=writer)
        return sorted(os.listdir(Path(writer._store.folder, f"step-{step}")))

    return together(world, work)


def load(store: CheckpointStore, step: int | None, mesh: Any) -> Any:
    """The values that are loaded, or what is raised."""
    state = killed_ranks.state_of(0, mesh)
    try:
        dcp.load(state, storage_reader=StoreReader(store, step))
    except dcp.CheckpointException as error:
        found = [failure[0] for failure in error.failures.values()]
        return [(type(one).__name__, str(one), getattr(one, "usable_step", None), getattr(one, "files", ())) for one in found]
    numbers = {state["number"], *state["same"].unique().tolist()}
    for tensor in state["model"].values():
        numbers.update(tensor.to_local().unique().tolist())
    return sorted(numbers)


def look(root: Path) -> dict[str, Any]:
    world = 4
    report: dict[str, Any] = {"files": saved(root, world, 5, 5)}

    def loading(step: int | None, *, node: int | None = None) -> Callable[[int, Any], Any]:
        def work(rank: int, mesh: Any) -> Any:
            store = store_of(root, rank, world) if node is None else CheckpointStore(root / f"node{node}")
            return load(store, step, mesh)

        return work

    def resuming(rank: int, mesh: Any) -> Any:
        return resume_step(store_of(root, rank, world))

    report["loaded"] = together(world, loading(5))
    report["elsewhere"] = together(world, loading(5, node=0))
    report["fewer"] = together(2, loading(5))
    kept = root / "kept"
    saved(root, world, 6, 6)
    shutil.copytree(root / "node1/step-6", kept)
    saved(root, world, 7, 6)
    report["saved again"] = together(world, loading(6))
    report["side"] = [sorted(os.listdir(root / f"node{node}/.ckptstore")) for node in range(NODES)]
    report["resume"] = together(world, resuming)
    # One node has the step as it was before.
    shutil.rmtree(root / "node1/step-6")
    shutil.copytree(kept, root / "node1/step-6")
    report["a mix"] = together(world, loading(6))
    report["resume beside a mix"] = together(world, resuming)
    StoreReader.prepare_global_plan = lambda self, plans: plans  # type: ignore[method-assign]
    report["planted"] = together(world, loading(6))
    return report


def finish(root: Path) -> dict[str, Any]:
    """Saves of which one node has only a draft, as a kill leaves it, and what is wrong with some of them. By case: what is
    resumed from, what is loaded from there, and how many drafts are left on each node.
    """
    for number in (5, 6):
        saved(root / "whole", NODES, number, number)
    shutil.copytree(root / "whole", root / "saved again")
    saved(root / "saved again", NODES, 7, 6)

    def with_draft(case: str, node: int = 1, *, of: str = "whole") -> Path:
        shutil.copytree(root / of, root / case)
        return unpublish(root / case / f"node{node}", 6)

    with_draft("cut")
    with_draft("cut on the coordinator's", 0)
    flip(with_draft("a changed bit") / "__1_0.distcp")
    (with_draft("a file is missing") / "__1_0.distcp").unlink()
    os.truncate(with_draft("shorter") / "__1_0.distcp", 1000)
    (with_draft("one file more") / "more").touch()
    edit(with_draft("another digest"), digest="0" * 64)
    edit(with_draft("more nodes"), nodes=3)
    edit(with_draft("of the other node"), node=0)
    with_draft("published by none")
    unpublish(root / "published by none/node0", 6)
    # The draft is of an earlier save of that step; of the later one the node has nothing.
    shutil.rmtree(with_draft("another set", of="saved again").parent)
    shutil.copytree(
        with_draft("x").parent, root / "another set/node1/.ckptstore" / next((root / "x/node1").glob("*/save-*")).name
    )
    # Cut between the renames of a replacement: the new one lies under the name that the old one is to have.
    draft = with_draft("between renames", of="saved again")
    shutil.copytree(root / "whole/node1/step-6", root / "between renames/node1/step-6")
    draft.rename(draft.parent.parent / f"old-step-6-{draft.parent.name.removeprefix('save-')}")
    shutil.rmtree(draft.parent)
    # Step 6 as it was, and what was to replace it is prepared on both; on one it was cut between the renames.
    shutil.copytree(root / "saved again", root / "saved again by none")
    for node in range(NODES):
        draft = unpublish(root / f"saved again by none/node{node}", 6)
        shutil.copytree(root / f"whole/node{node}/step-6", root / f"saved again by none/node{node}/step-6")
    draft.rename(draft.parent.parent / f"old-step-6-{draft.parent.name.removeprefix('save-')}")
    shutil.rmtree(draft.parent)
    # The bugs that these cases are for.
    planted = {
        "published by none": ("undone", lambda ranks: sorted({save for rank in ranks for save in rank.prepared})),
        "a changed bit": ("_check", lambda one: None),
        "another digest": ("identity", lambda manifest: str(manifest.step)),
    }
    cases = [path.name for path in sorted(root.iterdir()) if path.name not in ("whole", "saved again", "x")]
    for case in planted:
        shutil.copytree(root / case, root / f"planted: {case}")

    def work(rank: int, mesh: Any) -> Any:
        report = {}
        for case in [*cases, *(f"planted: {case}" for case in planted)]:
            store = store_of(root / case, rank, NODES)
            if case.startswith("planted"):
                name, bug = planted[case.removeprefix("planted: ")]
                kept = getattr(resuming, name)
                setattr(resuming, name, bug)
            step = resume_step(store)
            loaded = load(store, step, mesh)
            if case.startswith("planted"):
                setattr(resuming, name, kept)
            report[case] = [step, loaded if not isinstance(loaded[0], tuple) else loaded[0][0]]
        return report

    answers = together(NODES, work)
    assert answers[0] == answers[1], answers
    for case, answer in answers[0].items():
        answer += [len(prepared.waiting(str(root / case / f"node{node}/.ckptstore"))) for node in range(NODES)]

    def slowly(rank: int, mesh: Any) -> int:
        publish = steps.publish
        steps.publish = lambda *args, **kwargs: (time.sleep(1), publish(*args, **kwargs))[1]
        return resume_step(store_of(root / "four ranks", rank, 4))

    with_draft("four ranks")
    return dict(answers[0]) | {"four ranks": together(4, slowly)}


def unpublish(store: Path, step: int) -> Path:
    """As if the node had been killed before it published the step."""
    folder = store / f"step-{step}"
    home = store / ".ckptstore" / f"save-{json.loads((folder / MANIFEST_NAME).read_bytes())['group']['id']}"
    home.mkdir()
    (home / "owner").touch()
    folder.rename(home / "step")
    for note in store.glob(f".ckptstore/whole-{step}-*"):
        note.unlink()
    return home / "step"


def flip(path: Path) -> None:
    info = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def edit(draft: Path, **changed: Any) -> None:
    path = draft / MANIFEST_NAME
    document = json.loads(path.read_bytes())
    document["group"] |= changed
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


# --- kills ---------------------------------------------------------------------------------------------------------


def save_on(root: Path, rank: int, world: int, mesh: Any, first: int, board: Board) -> None:
    killed_ranks.state_of(first, mesh)
    board.met()
    for number in range(first, first + 1000):
        state = killed_ranks.state_of(number, mesh)
        board.say(rank, "planning")
        dcp.save(state, storage_writer=StoreWriter(store_of(root, rank, world), step_of(number)))
        board.say(rank, "between saves", number)


def watch(board: Board, rank: int) -> None:
    """Say where in a save a rank is."""
    publish, stage = steps.publish, nodes._stage

    def publishing(*args: Any, **kwargs: Any) -> Any:
        board.say(rank, "committing")
        return publish(*args, **kwargs)

    def staging(*args: Any, **kwargs: Any) -> Any:
        board.say(rank, "written")
        return stage(*args, **kwargs)

    steps.publish, nodes._stage = publishing, staging  # type: ignore[assignment]


def trial(
    root: Path, world: int, first: int, strike: Callable[[list[int], Board], list[int]], **planted: Any
) -> dict[str, Any]:
    """`strike` kills some; the others must end with an error; then what is on the nodes is judged, and loaded."""
    board = Board(world)
    for rank in range(world):
        board.say(rank, "starting", first - 1)

    def work(rank: int, mesh: Any) -> None:
        watch(board, rank)
        if planted.get("rank") == rank:
            plant(str(planted["where"]), first + 2)
        save_on(root, rank, world, mesh, first, board)

    with tempfile.TemporaryDirectory() as out:
        pids = fork(world, work, Path(out))
        try:
            board.await_met()
            struck = strike(pids, board)
            began = time.monotonic()
            phase = board.read(struck[0])[0]
            codes = {rank: await_end(pid, END_S) for rank, pid in enumerate(pids) if rank not in struck}
            took_s = time.monotonic() - began
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            returned = max(board.read(rank)[1] for rank in range(world))
            board.close()
    assert set(codes.values()) <= {7}, f"the others, {took_s:.1f} s after {struck} were struck in {phase}: {codes}"
    judge(root, returned if returned >= first else -1)
    before = published(root)
    loaded = together(world, lambda rank, mesh: resumed(store_of(root, rank, world), mesh))
    values = {tuple(map(tuple, loaded_by.values())) for loaded_by in loaded}
    assert len(values) == 1, f"ranks load different states: {loaded}"
    whole = judge(root, returned if returned >= first else -1)
    counts = whole.keys() - left_by_any(root)
    found = whole[max(counts)] if counts else -1
    assert found >= max(whole.values(), default=-1) - 1, f"not the last save, nor what it replaces where it was cut: {whole}"
    assert loaded[0]["resumed"][:1] == [float(found)] if found >= 0 else not loaded[0]["resumed"], (found, loaded)
    after = published(root)
    assert all(node == after[0] for node in after), f"what one node had published, not all have: {before} {after}"
    assert set(after[0].items()) <= set().union(*(node.items() for node in before)), f"published by none: {before} {after}"
    saves = sorted(number - first for number in whole.values() if number >= first)
    return {"phase": phase, "seconds": round(took_s, 1), "returned": returned - first + 1, "saves": saves}


def left_by_any(root: Path) -> set[int]:
    """The steps that a node has noted as left, and that are still the same save there."""
    found = set()
    for node in range(NODES):
        record = root / f"node{node}/.ckptstore/left.json"
        for place, entry in json.loads(record.read_bytes())["left"].items() if record.exists() else ():
            manifest = root / f"node{node}" / place / "ckptstore.manifest.json"
            if manifest.exists() and json.loads(manifest.read_bytes())["commit"] == entry["commit"]:
                found.add(int(place.removeprefix("step-")))
    return found


def published(root: Path) -> list[dict[str, str]]:
    """What lies on each node, by the folders alone: a step's name to its set."""
    found = []
    for node in range(NODES):
        manifests = (root / f"node{node}").glob("step-*/ckptstore.manifest.json")
        found.append({path.parent.name: json.loads(path.read_bytes())["group"]["id"] for path in manifests})
    return found


def resumed(store: CheckpointStore, mesh: Any) -> dict[str, list[Any]]:
    """What a job does after a crash: one number, and all ranks the same; none where there is no step."""
    try:
        step = resume_step(store)
    except NothingToResumeError:
        return {"resumed": []}
    return {"resumed": load(store, step, mesh)}


def judge(root: Path, returned: int) -> dict[int, int]:
    """Every step on every node is whole for itself; a set is one save; what had returned is on all nodes. Steps and numbers."""
    held: list[dict[int, tuple[str, Any]]] = []
    for node in range(NODES):
        store = CheckpointStore(root / f"node{node}")
        for checkpoint in store.list():
            assert checkpoint.status is Status.COMMITTED, f"{checkpoint.step}: {checkpoint.status} {checkpoint.findings}"
            report = store.verify(checkpoint.step)
            assert report.ok, report.findings
            manifest = read_manifest(store.backend, f"step-{checkpoint.step}")
            assert manifest.group is not None
            assert (manifest.group.node, manifest.group.nodes) == (node, NODES)
        held.append(resuming.held(store))
    whole = {step: values(root, step) for step in held[0] if len({of.get(step, ("",))[0] for of in held}) == 1}
    for step, number in whole.items():
        assert step == step_of(number), f"step {step} holds save {number}"
    if returned >= 0:
        assert whole.get(step_of(returned)) == returned or whole.get(step_of(returned), -1) > returned, (
            f"save {returned} had returned, and is not on all nodes: {whole}"
        )
    if RESAVED not in whole and all(RESAVED in of for of in held):  # replaced on some: then the old one is still there
        ids = [of[RESAVED][0] for of in held]
        kept = [
            resuming.identity(read_manifest(LocalBackend(old.parent), old.name))
            for node in range(NODES)
            for old in (root / f"node{node}/.ckptstore").glob(f"old-step-{RESAVED}-*")
        ]
        assert any(name in kept for name in ids), "a step was replaced on one node, and what it replaced is gone"
    return whole


def values(root: Path, step: int) -> int:
    """The number of a set: the files of all nodes beside each node's `.metadata`, read by torch alone."""
    numbers = set()
    for node in range(NODES):
        with tempfile.TemporaryDirectory() as merged:
            for other in range(NODES):
                for path in (root / f"node{other}/step-{step}").glob("*.distcp"):
                    os.symlink(path, Path(merged, path.name))
            shutil.copy(root / f"node{node}/step-{step}/.metadata", merged)
            numbers.add(killed_ranks.values(Path(merged)))
    assert len(numbers) == 1, f"step {step}: a mix of saves {numbers}"
    return numbers.pop()


def plant(where: str, number: int) -> None:
    """SIGKILL at a place in the commit of a save."""
    word, moment = where.split(":")

    def dying(real: Any, at: Callable[..., bool]) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            die = at(*args)
            if die and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    step = step_of(number)
    seen = collections.Counter[str]()

    def this_save(draft: Any, *more: Any) -> bool:
        seen[str(draft.step)] += 1
        # A step that is saved again: the second time.
        return bool(draft.step == step and seen[str(step)] == (1 if number % 2 == 0 else 2))

    if word == "exchange":
        native.rename_exchange = dying(native.rename_exchange, lambda _, to: to.endswith(f"/step-{step}"))
    elif word == "publish":
        steps.publish = dying(steps.publish, this_save)
    elif word == "stage":
        nodes._stage = dying(nodes._stage, this_save)
    else:
        told = collections.Counter[str]()

        def third(channel: Any, key: str, document: Any) -> bool:
            told[key.partition("/")[0]] += 1
            return key.partition("/")[0] == word and told[word] == 3

        nodes.Channel.tell = dying(nodes.Channel.tell, third)  # type: ignore[method-assign]


def main(doing: str, root: Path, *words: str) -> None:
    torch.set_num_threads(1)
    if doing in ("save", "load"):
        world, *numbers = map(int, words)
        if doing == "save":
            print(json.dumps(saved(root, world, *numbers)))
        else:
            print(json.dumps(together(world, lambda rank, mesh: load(CheckpointStore(sys.argv[2]), numbers[0], mesh))))
        return
    if doing == "look":
        print(json.dumps(look(root)))
        return
    if doing == "finish":
        print(json.dumps(finish(root)))
        return
    if doing == "at":
        who, where = int(words[0]), words[1]
        # first is even: the third save replaces no step, the fourth (first odd) the step RESAVED.
        first = int(words[2])

        def fell(pids: list[int], board: Board) -> list[int]:
            assert await_end(pids[who], 60) == -signal.SIGKILL
            return [who]

        seen = trial(root, 2, first, fell, rank=who, where=where)
        print(json.dumps(seen))
        return
    world, times, seed = map(int, words)
    chance = random.Random(seed)
    kills: collections.Counter[str] = collections.Counter()
    first, longest, returned = 1000, 0.0, 0
    for number in range(times):
        whole_node = number % 3 == 2
        victim = chance.randrange(world)

        def strike(pids: list[int], board: Board, victim: int = victim, whole_node: bool = whole_node) -> list[int]:
            time.sleep(chance.uniform(0.05, 1.5))
            near = [rank for rank in range(len(pids)) if rank * NODES // world == victim * NODES // world]
            struck = near if whole_node else [victim]
            for rank in struck:
                os.kill(pids[rank], signal.SIGKILL)
            return struck

        seen = trial(root, world, first, strike)
        kills[f"{'node' if whole_node else 'rank'}, {seen['phase']}"] += 1
        longest = max(longest, seen["seconds"])
        returned += seen["returned"]
        for node in range(NODES):
            CheckpointStore(root / f"node{node}").prune(Keep(last=3))
        judge(root, -1)
        print(f"{number}: {seen}", file=sys.stderr, flush=True)
        first += 1000
    print(json.dumps({"kills": kills, "longest_s": longest, "saves_returned": returned}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    assert issubclass(NotWholeError, CkptStoreError)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
