"""Ranges that arrive in any order, from several threads, written into one file: native.write_range."""

import errno
import json
import mmap
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptstore import native
from ckptstore.errors import AccessError, NoSpaceError, NotFoundError, RefusedError, StorageError, UsageError

from .conftest import mounted, run_python
from .files import random_bytes
from .test_faults import COMMON

MIB = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module", params=["here", "tmpfs", "xfs"])
def disk(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("disk")
    if request.param == "here":
        yield place
    else:
        with mounted(request.param, place / "mount", size_mib=320 if request.param == "xfs" else 64) as at:
            yield at


@pytest.fixture
def folder(disk):
    path = disk / "folder"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def whole_pages(data):
    """The same bytes, at the start of a page."""
    mapped = mmap.mmap(-1, max(1, len(data)))
    mapped[: len(data)] = data
    return memoryview(mapped)[: len(data)]


@pytest.mark.parametrize("size", [0, 1, PAGE, MIB - 1, MIB, 9 * MIB + 5])
def test_memory_of_whole_pages_goes_as_it_is(folder, size):
    data = random_bytes(size, seed=3)
    (folder / "file").write_bytes(b"")
    native.write_range(folder, "file", 0, whole_pages(data))
    assert (folder / "file").read_bytes() == data


@pytest.mark.parametrize("tail", [0, 1, PAGE - 1, PAGE, 777_777])
def test_ranges_in_any_order(folder, tail):
    data = random_bytes(20 * MIB + tail, seed=tail)
    (folder / "file").write_bytes(b"")
    os.truncate(folder / "file", len(data))
    step = 3 * MIB
    starts = list(range(0, len(data), step))
    random.Random(tail).shuffle(starts)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: native.write_range(folder, "file", at, data[at : at + step]), starts))
    assert (folder / "file").read_bytes() == data


@pytest.mark.parametrize("offset", [0, 1, 512, PAGE, PAGE + 1])
@pytest.mark.parametrize("size", [0, 1, PAGE, MIB - 1, MIB, 9 * MIB + 5])
def test_what_lies_around_a_range_stays(tmp_path, offset, size):
    before = random_bytes(12 * MIB, seed=1)
    new = random_bytes(size, seed=2)
    (tmp_path / "file").write_bytes(before)
    native.write_range(tmp_path, "file", offset, new)
    assert (tmp_path / "file").read_bytes() == before[:offset] + new + before[offset + size :]


def test_past_the_page_cache(tmp_path):
    if not native.supports_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    waits = 0
    for turn in range(4):  # the kernel may take a direct write through the cache now and then
        (tmp_path / f"{turn}").write_bytes(b"")
        os.truncate(tmp_path / f"{turn}", 4 * MIB)
        native.write_range(tmp_path, f"{turn}", 0, random_bytes(4 * MIB))
        with (tmp_path / f"{turn}").open("rb", buffering=0) as file:
            try:
                os.preadv(file.fileno(), [bytearray(1)], MIB, os.RWF_NOWAIT)
            except BlockingIOError:
                waits += 1
    assert waits > 0


def test_what_is_no_file_there(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "outside").write_bytes(b"untouched")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    data = random_bytes(2 * MIB)
    with pytest.raises(NotFoundError):
        native.write_range(tmp_path, "missing", 0, data)
    with pytest.raises((StorageError, AccessError)):
        native.write_range(tmp_path, "folder", 0, data)
    with pytest.raises((RefusedError, StorageError)):
        native.write_range(tmp_path, "pipe", 0, data)
    with pytest.raises(RefusedError):
        native.write_range(tmp_path, "link", 0, data)
    with pytest.raises(UsageError):
        native.write_range(tmp_path, "../outside", 0, data)
    assert (tmp_path / "outside").read_bytes() == b"untouched"


SWEEP = (
    COMMON
    + """
import json, mmap
data = memory = random_bytes((9 << 20) + 1234, seed=5)
if sys.argv[4] == "pages":
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
outcomes = {}
for action in sys.argv[3].split():
    outcomes[action] = []
    for nth in range(1, 50):
        fresh()
        (destination / "file").write_bytes(bytes(len(data)))
        before = state()
        arm("pwrite64", nth, action)
        try:
            native.write_range(destination, "file", 0, memory)
            outcome = "ok"
        except errors.CkptStoreError as error:
            outcome = type(error).__name__
        hit = library.fault_hits() > 0
        disarm()
        assert state() == before, (action, nth)
        if not hit:
            break
        assert outcome != "ok" or (destination / "file").read_bytes() == data, (action, nth)
        outcomes[action].append(outcome)
print(json.dumps(outcomes))
"""
)


@pytest.mark.parametrize("memory", ["any", "pages"])
def test_every_write_fails_in_turn(faults, tmp_path, memory):
    actions = [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.EFAULT, errno.EINTR, "short"]
    done = run_python(SWEEP, faults, tmp_path, " ".join(map(str, actions)), memory, preload=faults)
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(done.stdout)
    assert len(got["5"]) >= 3  # two blocks and the tail
    assert set(got["5"]) == {"StorageError"}
    assert set(got["28"]) == {"NoSpaceError"}
    assert set(got["4"]) == set(got["short"]) == {"ok"}
    assert got["22"][:2] == ["ok", "ok"]  # refused: the cache takes it
    assert got["14"][:2] == ["ok", "ok"]  # EFAULT: so does memory of a device driver that a disk may not read


# --- what writers need beside it -----------------------------------------------------------------------------------


def test_room_is_taken_and_content_stays(folder):
    (folder / "file").write_bytes(b"content")
    with (folder / "file").open("r+b") as file:
        native.allocate(file.fileno(), 8 * MIB, folder / "file")
    assert (folder / "file").read_bytes() == b"content" + bytes(8 * MIB - 7)
    assert (folder / "file").stat().st_blocks * 512 >= 8 * MIB


def test_no_room(tmp_path):
    with mounted("tmpfs", tmp_path / "mount", size_mib=64) as at, (at / "file").open("wb") as file:
        with pytest.raises(NoSpaceError, match="file"):
            native.allocate(file.fileno(), 100 * MIB, at / "file")
        assert shutil.disk_usage(at).free > 60 * MIB


def test_priority_of_one_thread():
    """Lowered for the thread that asks, and never raised."""
    seen = []

    def work():
        for nice in (3, 7, 5):
            native.be_nice(nice)
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [max(before, nice) for nice in (3, 7, 7)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
