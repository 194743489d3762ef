"""pull and push by several ranks: the bytes are shared, one commits, and what ends one ends all."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptstore import listing
from ckptstore.backends import open_backend
from ckptstore.model import MANIFEST_NAME, Level, Status
from ckptstore.store import CheckpointStore
from ckptstore.transfer.fetching import Wanted
from ckptstore.transfer.sharing import deal, share_of
from ckptstore.verify import verify
from tests import commands, trees, warm
from tests.faults import Proxy
from tests.test_push_pull import EXPORT, add_big_file, flip, same, send
from tests.test_remote_looking import sealed_run

CHUNK = 8 << 20
#: Waits of seconds instead of minutes, for what the tests let fail.
HASTY = (
    "from ckptstore import rendezvous, recover\n"
    "rendezvous.MEET_S, rendezvous.JOIN_S, rendezvous.STALE_S = {meet}, {join}, 4\n"
    "{more}\nrecover.main()"
)


# --- shares --------------------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.sets(st.integers(0, 7))), max_size=6),
    st.integers(1, 9),
)
def test_every_missing_byte_is_one_ranks(files, size):
    """Whatever is there already, and however many they are."""
    wanted = []
    for number, (size_bytes, known, have) in enumerate(files):
        chunks = -(-size_bytes // 8)
        expected = [*range(100, 100 + chunks)] if known else None
        there = {n: 100 + n for n in have if n < chunks} if known else {}
        wanted.append(Wanted(f"f{number}", f"k{number}", size_bytes, expected, there))
    seen: dict[tuple[str, int], int] = {}
    loads = []
    for rank in range(size):
        load = 0
        for file in share_of(wanted, rank, size, chunk_bytes=8):
            for chunk in range(-(-file.size_bytes // 8)):
                if chunk not in file.have:
                    seen[file.name, chunk] = seen.get((file.name, chunk), 0) + 1
                    load += min(8, file.size_bytes - chunk * 8)
        loads.append(load)
    missing = {(f.name, n) for f in wanted for n in range(-(-f.size_bytes // 8)) if n not in f.have}
    assert seen == dict.fromkeys(missing, 1)
    if all(file.expected is not None for file in wanted):
        assert max(loads) - min(loads) <= 16, "a chunk more or less at either end"


def test_files_are_dealt_by_bytes():
    shares = deal([("a", 10), ("b", 10), ("c", 5), ("d", 5), ("e", 5), ("f", 5)], 4)
    assert sorted(name for share in shares for name in share) == [*"abcdef"]
    assert sorted(sum({"a": 10, "b": 10}.get(name, 5) for name in share) for share in shares) == [10, 10, 10, 10]


# --- real processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(seaweed, tmp_path_factory):
    """A run with a 40 MiB file, and its URL. Nobody changes either."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.environment().items():
            patch.setenv(name, value)
        run = sealed_run(tmp_path_factory.mktemp("stored"))
        trees.set_age(add_big_file(run).parent, 3600)
        CheckpointStore(run).seal(46)
        send(run, url := seaweed.place())
    return run, url


@pytest.fixture
def pushed(stored, s3, seaweed):
    """The same through a proxy of its own."""
    proxy = Proxy(seaweed.port)
    yield SimpleNamespace(
        run=stored[0], url=stored[1], proxy=proxy, env=commands.environment(**seaweed.environment(proxy.port))
    )
    proxy.close()


_STARTED: list[warm.Python] = []


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """A test that fails in its middle leaves none waiting."""
    yield
    while _STARTED:
        _STARTED.pop().kill()


def start(*words: object, env: dict[str, str]) -> warm.Python:
    _STARTED.append(warm.Python(*words, env=env))
    return _STARTED[-1]


def torchrun(count: int, *words: object, env: dict[str, str]) -> warm.Python:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m", "--")
    return start(*launcher, "ckptstore.recover", *words, env=env)


def ranks(count: int, *words: object, env: dict[str, str], nodes: int = 1, meet=30, join=20, more="", to=()):
    """As launchers other than torchrun start them: nobody stops the others when one dies. `to`: --to of each node."""
    started = []
    for rank in range(count):
        local = count // nodes
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local, "MASTER_PORT": "1"}
        own = ["--to", str(to[rank // local])] if to else []
        program = HASTY.format(meet=meet, join=join, more=more.format(node=rank // local))
        started.append(start("-c", program, *words, *own, env=env | {name: str(value) for name, value in place.items()}))
    return started


def ended(processes, timeout_s=60):
    """Exit codes and outputs."""
    found = [process.finish(timeout_s) for process in processes]
    return [one.returncode for one in found], [one.stdout for one in found], "".join(one.stderr for one in found)


def whole(run: Path) -> None:
    (checkpoint,) = CheckpointStore(run).list()
    assert checkpoint.status is Status.COMMITTED
    assert verify(open_backend(run), checkpoint, Level.FULL).ok


def side_of(run: Path) -> list[str]:
    side = run.parent / ".ckptstore" / run.name
    return sorted(name for name in os.listdir(side) if name != "lock") if side.is_dir() else []


def asked_bytes(proxy: Proxy) -> int:
    """How much of the weights was asked for."""
    total = 0
    for request in proxy.seen:
        if request.method == "GET" and "optim" in request.path:
            first, last = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", request.head).groups()
            total += int(last) - int(first) + 1
    return total


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_pulled_by_torchrun(pushed, tmp_path, count):
    there = tmp_path / "there/trial0"
    code, (out,), err = ended([torchrun(count, "pull", "46", "--from", pushed.url, "--to", there, env=pushed.env)])
    assert code == [0], err
    assert out.count("step 46, default is here") == 1
    assert same(pushed.run / EXPORT, there / EXPORT)
    whole(there)
    assert side_of(there) == []
    assert asked_bytes(pushed.proxy) == (pushed.run / EXPORT / "optim_world_size_1_rank_0.pt").stat().st_size


def test_pushed_together(pushed, s3):
    codes, (out, other), err = ended(ranks(2, "push", "46", "--run", pushed.run, "--to", s3, env=pushed.env))
    assert codes == [0, 0], err
    assert (out.count("is committed"), other) == (1, "")
    (found,) = listing.scan(open_backend(s3)).checkpoints
    assert verify(open_backend(s3), found, Level.FULL).ok
    assert side_of(pushed.run) == []
    bodies = sum(len(r.body) for r in pushed.proxy.seen if r.method in ("PUT", "POST"))
    assert bodies < 1.01 * found.size_bytes + 100_000, "nothing was sent twice"


@pytest.fixture
def slow(pushed):
    """A store that answers three ranges of the weights, and then no more: a pull is under way until something ends it."""
    left = [3]

    def choose(request):
        if "optim" in request.path and request.method == "GET":
            left[0] -= 1
            return "stall" if left[0] < 0 else ""
        return ""

    pushed.proxy.choose = choose
    return pushed


def under_way(there: Path, timeout_s=40) -> None:
    """Wait until some bytes of the weights have come."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for path in (there.parent / ".ckptstore" / there.name).glob("stage-*/default/optim*"):
            if path.stat().st_blocks > 8 * 2048:
                return
        time.sleep(0.05)
    raise AssertionError("nothing came")


def nothing_visible(there: Path) -> None:
    assert not (there / EXPORT).exists()
    assert all(checkpoint.status is not Status.COMMITTED for checkpoint in CheckpointStore(there).list())


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_is_killed(slow, tmp_path, capfd, victim):
    """The others end by themselves, soon; nothing is there; the next launch goes on with what had come."""
    there = tmp_path / "there/trial0"
    words = ("pull", "46", "--from", slow.url, "--to", there, "--json")
    processes = ranks(4, *words, env=slow.env)
    under_way(there)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, _, err = ended(processes, 20)
    assert time.monotonic() - began < 10
    assert all(codes), codes
    assert codes[victim] == -signal.SIGKILL
    assert f"rank {victim} died: its process is gone" in err
    nothing_visible(there)
    assert "ranks.json" not in side_of(there) or victim == 0
    slow.proxy.choose = lambda request: ""
    codes, outs, err = ended(ranks(2, *words, env=slow.env))
    assert codes == [0, 0], err
    whole(there)
    assert re.search(r'"kept_bytes": [1-9]', outs[0])
    assert [name for name in side_of(there) if not name.startswith("ranks-")] == []
    assert commands.invoke(capfd, "clean", "--run", there).code == 0
    assert side_of(there) == []


def test_a_rank_of_torchrun_is_killed(slow, tmp_path):
    there = tmp_path / "there/trial0"
    launcher = torchrun(2, "pull", "46", "--from", slow.url, "--to", there, env=slow.env)
    under_way(there)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True).stdout.split()
    victim = next(pid for pid in children if b"ckptstore.recover" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    (code,), _, _ = ended([launcher], 60)
    assert code
    nothing_visible(there)


def test_nothing_is_committed_before_the_slowest_is_through(pushed, tmp_path):
    """The second half comes late: the first one's rank waits for it."""

    def choose(request):
        found = re.search(rb"(?i)range: bytes=(\d+)-", request.head)
        if "optim" in request.path and found and int(found[1]) > 24 << 20:
            time.sleep(3)
        return ""

    pushed.proxy.choose = choose
    there = tmp_path / "there/trial0"
    codes, _, err = ended(ranks(2, "pull", "46", "--from", pushed.url, "--to", there, env=pushed.env))
    assert codes == [0, 0], err
    whole(there)


def test_damage_that_one_rank_meets_ends_all(pushed, s3, tmp_path):
    send(pushed.run, s3)
    key = f"{EXPORT}/optim_world_size_1_rank_0.pt"
    backend = open_backend(s3)
    data = bytearray(backend.get(key))
    data[-1] ^= 1
    backend.put(key, data)
    backend.put(manifest := f"{EXPORT}/{MANIFEST_NAME}", backend.get(manifest))
    there = tmp_path / "there/trial0"
    codes, _, err = ended(ranks(2, "pull", "46", "--from", s3, "--to", there, env=pushed.env))
    assert all(codes), codes
    assert "the bytes from" in err
    nothing_visible(there)


@pytest.mark.soak
def test_a_rank_that_never_comes(pushed, tmp_path):
    """Bounded, and it is said which one is missing."""
    there = tmp_path / "there/trial0"
    processes = ranks(3, "pull", "46", "--from", pushed.url, "--to", there, env=pushed.env, meet=4, join=1)
    processes[2].send_signal(signal.SIGKILL)
    codes, _, err = ended(processes, 30)
    assert all(codes), codes
    assert "rank 2" in err
    nothing_visible(there)


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["one-disk", "own-disks"])
def test_two_machines(pushed, tmp_path, shared):
    """Another machine's processes cannot be seen, only their beats. Of a shared disk each byte is read once, else by both."""
    elsewhere = "rendezvous._host = lambda: 'machine {node}'"
    to = [tmp_path / "a/trial0", tmp_path / ("a" if shared else "b") / "trial0"]
    words = ("pull", "46", "--from", pushed.url)
    codes, _, err = ended(ranks(4, *words, env=pushed.env, nodes=2, join=4, more=elsewhere, to=to))
    assert codes == [0, 0, 0, 0], err
    for there in set(to):
        whole(there)
        assert side_of(there) == []
    size = (pushed.run / EXPORT / "optim_world_size_1_rank_0.pt").stat().st_size
    assert asked_bytes(pushed.proxy) == size * len(set(to))


@pytest.mark.soak
def test_a_machine_that_falls_silent(slow, tmp_path):
    """No process can be looked for there: its beat stops, and that ends all."""
    there = tmp_path / "there/trial0"
    words = ("pull", "46", "--from", slow.url)
    more = "rendezvous._host = lambda: 'machine {node}'"
    processes = ranks(2, *words, env=slow.env, nodes=2, join=4, more=more, to=[there, there])
    under_way(there)
    processes[1].send_signal(signal.SIGSTOP)
    (code,), _, err = ended(processes[:1], 20)
    processes[1].kill()
    assert code == 1
    assert "rank 1 died: no sign of it" in err
    nothing_visible(there)


@pytest.mark.soak
def test_what_a_rank_does_not_see_fails_all(pushed, tmp_path):
    """Two machines with different folders of one name: what one commits, the other must see, or say that it does not."""
    there = tmp_path / "there/trial0"
    blind = "from ckptstore import sharing; sharing.SEEN_WITHIN_S = 0.5\nif {node}: sharing.LocalBackend = lambda path: "
    blind += "type('Elsewhere', (), dict(tree=lambda *w, **o: open_backend('/nonexistent').tree(), location=path))()"
    more = f"from ckptstore.backends import open_backend\n{blind}"
    codes, _, err = ended(
        ranks(2, "pull", "46", "--from", pushed.url, env=pushed.env, nodes=2, join=4, more=more, to=[there, there])
    )
    assert all(codes), (codes, err)
    assert "rank 1 does not see" in err


def test_clean_knows_what_a_killed_leader_left(tmp_path, capfd):
    run = trees.make_run(tmp_path, steps=(46,))
    side = run.parent / ".ckptstore/trial0"
    (side / "ranks-0123").mkdir(parents=True)
    (side / "ranks-0123/alive-0").write_text("{}")
    (side / "ranks.json").write_text("{}")
    assert commands.invoke(capfd, "clean", "--run", run).code == 0
    assert side_of(run) == []


def test_a_dry_run_meets_nobody(pushed, tmp_path):
    there = tmp_path / "there/trial0"
    codes, outs, err = ended(ranks(2, "pull", "46", "--dry-run", "--from", pushed.url, "--to", there, env=pushed.env))
    assert codes == [0, 0], err
    assert "would be fetched" in outs[0]
    assert outs[1] == ""
    assert not there.exists()
    shutil.rmtree(tmp_path / "there", ignore_errors=True)


@pytest.mark.parametrize("largest", [1, 2], ids=["the leader's share", "another's"])
def test_one_that_is_damaged_does_not_hold_up_the_others(pushed, s3, tmp_path, largest):
    run = tmp_path / "run/trial0"
    shutil.copytree(pushed.run, run)
    newest = run / "default" / trees.folder_name(93)
    sizes = sorted((path.stat().st_size, path) for path in newest.iterdir() if path.name != MANIFEST_NAME)
    flip(sizes[-largest][1], 0)
    codes, (out, _), err = ended(ranks(2, "push", 93, 46, "--run", run, "--to", s3, env=pushed.env))
    assert codes == [3, 0], err
    assert "step 93 is not pushed" in err
    assert "step 46, default is committed" in out
    (found,) = [found for found in listing.scan(open_backend(s3)).checkpoints if found.status is Status.COMMITTED]
    assert verify(open_backend(s3), found, Level.FULL).ok
