"""Nodes with a disk each push their parts of a save together: one whole checkpoint at one URL, or none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptstore import CheckpointStore
from ckptstore.backends import open_backend
from ckptstore.errors import IntegrityError, NotWholeError
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.parts import read_manifest
from ckptstore.transfer import gathering
from ckptstore.transfer.sharing import deal
from ckptstore.verify import verify
from tests import commands, warm
from tests.faults import Proxy
from tests.test_sharing import _no_process_is_left, ended, start  # noqa: F401 (a fixture)

torch = pytest.importorskip("torch")
from tests.killed_ranks import free_port, values  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]
STEP = 6
COMMAND = "from ckptstore.recover import main\nmain()"
HASTY = "from ckptstore import rendezvous\nrendezvous.MEET_S = {}\n" + COMMAND


def node_ranks(*words: object) -> Any:
    done = warm.Python("-m", "tests.node_ranks", *words).finish(120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks on two nodes have saved, as steps 5 and 6. Nobody changes it."""
    root = tmp_path_factory.mktemp("saved")
    for step in (5, STEP):
        node_ranks("save", root, 4, step, step)
    return root


@pytest.fixture
def there(s3: str, seaweed: Any) -> Any:
    """A URL, behind a proxy."""
    proxy = Proxy(seaweed.port)
    yield SimpleNamespace(url=s3, proxy=proxy, env=commands.environment(**seaweed.environment(proxy.port)))
    proxy.close()


def push(
    there: Any, root: Path, count: int, *more: str, stores: tuple[str, str] = ("node0", "node1"), command: str = COMMAND
) -> list[warm.Python]:
    """So many ranks on two nodes, as a launcher other than torchrun starts them: nobody stops the others when one dies."""
    port = free_port()
    started = []
    for rank in range(count):
        local = count // 2
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = ("push", STEP, "--run", root / stores[rank // local], "--to", there.url, *more)
        env = there.env | {name: str(value) for name, value in place.items()}
        started.append(start("-c", command, *words, env=env))
    return started


def is_whole(url: str, step: int = STEP) -> None:
    backend = open_backend(url)
    (checkpoint,) = [one for one in CheckpointStore(url).list() if one.step == step]
    assert checkpoint.status is Status.COMMITTED
    report = verify(backend, checkpoint, Level.FULL)
    assert report.ok
    assert read_manifest(backend, f"step-{step}").group is None
    assert {file.name for file in checkpoint.parts[0].files} == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}


def nothing_visible(url: str) -> None:
    assert [blob.key for blob in open_backend(url).list() if blob.key.endswith(MANIFEST_NAME)] == []


def test_four_ranks_of_two_nodes(there: Any, saved: Path, tmp_path: Path) -> None:
    """One checkpoint, each byte sent once; any number of ranks load it there, and torch alone what was pulled."""
    codes, (out, *others), err = ended(push(there, saved, 4))
    assert codes == [0] * 4, err
    assert (out.count("is committed"), others, err) == (1, [""] * 3, "")
    is_whole(there.url)
    size = CheckpointStore(there.url).get(STEP).size_bytes
    assert sum(len(r.body) for r in there.proxy.seen if r.method in ("PUT", "POST")) < size + 200_000
    assert node_ranks("load", there.url, 3, STEP) == [[STEP]] * 3
    assert node_ranks("load", there.url, 1, STEP) == [[STEP]]
    pulled = commands.spawn("pull", STEP, "--from", there.url, "--to", tmp_path / "back", env=there.env)
    assert pulled.code == 0, pulled.err
    assert values(tmp_path / f"back/step-{STEP}") == STEP
    # Again, by other ranks, which see the nodes the other way round: all is there.
    before = len(there.proxy.seen)
    codes, (out, _), err = ended(push(there, saved, 2, stores=("node1", "node0")))
    assert codes == [0, 0], err
    assert "there already, committed" in out
    assert not [r for r in there.proxy.seen[before:] if r.method == "PUT" and ".distcp" in r.path]


@pytest.mark.soak
def test_two_launchers_of_torch(there: Any, saved: Path) -> None:
    """A torchrun a node, as on two machines; all steps, the newest one first as a dry run."""
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    for words in (("--latest", "--dry-run"), ("--all",)):
        port = free_port()
        both = []
        for node in (0, 1):
            where = ("--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port)
            command = ("push", *words, "--run", saved / f"node{node}", "--to", there.url)
            both.append(start(*launcher, *where, "-m", "--", "ckptstore.recover", *command, env=there.env))
        codes, (out, _), err = ended(both, 90)
        assert codes == [0, 0], err
        if "--dry-run" in words:
            assert "would be sent" in out
            assert list(open_backend(there.url).list()) == []
    for step in (5, STEP):
        is_whole(there.url, step)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.soak), 3])
def test_a_rank_is_killed(there: Any, saved: Path, victim: int) -> None:
    """The others end by themselves, nothing is there, and the next push sends what has not come."""
    there.proxy.choose = lambda request: "stall" if request.method == "PUT" and "__3_0.distcp" in request.path else ""
    processes = push(there, saved, 4)
    deadline = time.monotonic() + 40
    arrived = {"__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
    while not arrived <= {blob.key.rpartition("/")[2] for blob in open_backend(there.url).list()}:
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, _, err = ended(processes, 20)
    assert time.monotonic() - began < 15
    assert all(codes), codes
    assert f"rank {victim} died: its process is gone" in err or (victim == 0 and "rank 0" in err), err
    nothing_visible(there.url)
    there.proxy.choose = lambda request: ""
    before = len(there.proxy.seen)
    codes, _, err = ended(push(there, saved, 2))
    assert codes == [0, 0], err
    is_whole(there.url)
    sent = {r.path.rpartition("/")[2].partition("?")[0] for r in there.proxy.seen[before:] if r.method == "PUT"}
    assert not sent & arrived, sent
    assert "__3_0.distcp" in sent


@pytest.mark.soak
def test_ranks_killed_at_any_moment(there: Any, saved: Path) -> None:
    """What is visible is whole; the others end; the last push needs no help."""
    chance = random.Random(seed := random.getrandbits(30))
    print(f"seed {seed}")
    seen: dict[str, int] = {}
    for number in range(25):
        place = SimpleNamespace(url=f"{there.url}/{number}", env=there.env)
        processes = push(place, saved, 4, command=HASTY.format(15))
        time.sleep(chance.uniform(0.2, 2.5))
        processes[victim := chance.randrange(4)].send_signal(signal.SIGKILL)
        codes, _, err = ended(processes, 40)
        visible = [blob.key for blob in open_backend(place.url).list() if blob.key.endswith(MANIFEST_NAME)]
        # Who is killed at the very end takes nothing away: rank 0 may have committed, and the others be through.
        assert visible or all(codes), (victim, codes, err)
        what = f"{'committed' if visible else 'not'}, {codes.count(0)} ended well"
        seen[what] = seen.get(what, 0) + 1
        if visible:
            is_whole(place.url)
        codes, _, err = ended(push(place, saved, 2))
        assert codes == [0, 0], err
        is_whole(place.url)
    print(seen)


@pytest.mark.soak
def test_a_rank_that_never_comes(there: Any, saved: Path) -> None:
    """Bounded, and it is said which one is missing."""
    processes = push(there, saved, 4, command=HASTY.format(3))
    processes[2].kill()
    codes, _, err = ended([process for process in processes if process is not processes[2]], 30)
    assert all(codes), codes
    assert "rank 2 did not come within 3 s" in err
    assert list(open_backend(there.url).list()) == []


@pytest.mark.soak
def test_another_save_of_the_step(there: Any, saved: Path, tmp_path: Path) -> None:
    """Takes the place of what is there in one act, and only when told to."""
    root = tmp_path / "again"
    shutil.copytree(saved, root)
    assert ended(push(there, saved, 2))[0] == [0, 0]
    node_ranks("save", root, 4, 7, STEP)
    codes, _, err = ended(push(there, root, 2))
    assert all(codes)
    assert "with other bytes" in commands.flat(err)
    assert node_ranks("load", there.url, 1, STEP) == [[STEP]]
    codes, _, err = ended(push(there, root, 2, "--replace"))
    assert codes == [0, 0], err
    assert node_ranks("load", there.url, 1, STEP) == [[7]]
    is_whole(there.url)


def test_refusals(there: Any, saved: Path, tmp_path: Path) -> None:
    """Each says which rank, or node, and leaves nothing at the URL."""
    shutil.copytree(saved / "node1", tmp_path / "lacking")
    shutil.rmtree(tmp_path / f"lacking/step-{STEP}")
    os.symlink(saved / "node0", tmp_path / "node0")
    codes, _, err = ended(push(there, tmp_path, 2, stores=("node0", "lacking")))
    assert all(codes)
    assert f"rank 1 ({tmp_path / 'lacking'}) has no step {STEP}" in commands.flat(err), err
    codes, _, err = ended(push(there, tmp_path, 2, stores=("node0", "node0")))
    assert all(codes)
    assert "no rank has node 2's part" in commands.flat(err), err
    alone = commands.spawn("push", STEP, "--run", saved / "node1", "--to", there.url, env=there.env)
    assert alone.code == 1
    assert "is of node 2 of 2" in commands.flat(alone.err)
    assert "torchrun --nnodes 2" in commands.flat(alone.err)
    assert list(open_backend(there.url).list()) == []


# --- the pieces ----------------------------------------------------------------------------------------------------


def told(saved: Path, *nodes: int, step: int = STEP) -> list[dict[str, str]]:
    return [gathering.look(open_backend(saved / f"node{node}"), step) for node in nodes]


def edited(one: dict[str, str], change: Any) -> dict[str, str]:
    document = json.loads(one["manifest"])
    change(document)
    return one | {"manifest": json.dumps(document)}


def test_parts_that_do_not_belong_together(saved: Path) -> None:
    """Nothing is put together that was not saved together; each check is needed for its case."""
    found, holders = gathering.whole(STEP, told(saved, 0, 0, 1, 1))
    assert found.group is None
    assert (holders["__0_0.distcp"], holders["__3_0.distcp"], holders[".metadata"]) == ([0, 1], [2, 3], [0, 1])
    assert gathering.whole(STEP, told(saved, 1, 0)).manifest == found, "whoever asks"
    assert found.content != read_manifest(open_backend(saved / "node0"), f"step-{STEP}").content

    good, other = told(saved, 0, 1)
    with pytest.raises(NotWholeError, match=r"rank 1 .* has another save of it than rank 0"):
        gathering.whole(STEP, [good, *told(saved, 1, step=5)])
    with pytest.raises(NotWholeError, match="no rank has node 1's part"):
        gathering.whole(STEP, [other])
    changed = edited(other, lambda document: document["files"][0].update(crc="0" * 16))
    with pytest.raises(IntegrityError, match="not those that were saved together"):
        gathering.whole(STEP, [good, changed])
    with pytest.raises(IntegrityError, match="is not what its manifest says"):
        gathering.whole(STEP, [good | {"metadata": good["metadata"][:-8]}, other])


def test_what_metadata_names_must_be_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the digest of the set agrees: two nodes may have saved nonsense alike."""

    def agreeing(*parts: dict[str, str]) -> list[dict[str, str]]:
        contents = [gathering.manifests.parse(part["manifest"].encode()).content for part in parts]
        digest = gathering.hashlib.sha256("\n".join(contents).encode()).hexdigest()
        return [edited(part, lambda document: document["group"].update(digest=digest)) for part in parts]

    good, other = told(saved, 0, 1)
    gathering.whole(STEP, agreeing(good, other))
    fewer = edited(other, lambda document: document["files"].pop())
    with pytest.raises(IntegrityError, match=r"names __3_0\.distcp, and no node has it"):
        gathering.whole(STEP, agreeing(good, fewer))

    shorter = edited(other, lambda document: document["files"][-1].update(bytes=1000))
    with pytest.raises(IntegrityError, match="or as much of it"):
        gathering.whole(STEP, agreeing(good, shorter))

    def rename(document: dict[str, Any]) -> None:
        document["files"][-1]["path"] = "__1_0.distcp"
        document["files"].sort(key=lambda file: file["path"])

    with pytest.raises(IntegrityError, match=r"two nodes have a __1_0\.distcp, and not the same"):
        gathering.whole(STEP, agreeing(good, edited(other, rename)))


def test_files_are_dealt_to_those_who_have_them() -> None:
    files = [("a", 10), ("b", 10), ("c", 5), ("d", 1)]
    holders = {"a": [0, 1], "b": [0, 1], "c": [2], "d": [0, 1, 2]}
    assert deal(files, 3, holders=holders) == [["a"], ["b"], ["c", "d"]]


def test_an_ordinary_step_goes_alone(there: Any, tmp_path: Path) -> None:
    """What one node has saved is a checkpoint for itself."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f/weights").write_bytes(os.urandom(1000))
    CheckpointStore(tmp_path / "store").save(3, tmp_path / "f")
    done = commands.spawn("push", "--latest", "--run", tmp_path / "store", "--to", there.url, env=there.env)
    assert done.code == 0, done.err
    back = commands.spawn("pull", 3, "--from", there.url, "--to", tmp_path / "back", env=there.env)
    assert back.code == 0, back.err
    assert (tmp_path / "back/step-3/weights").read_bytes() == (tmp_path / "f/weights").read_bytes()
    assert CheckpointStore(tmp_path / "back").verify(3).ok
