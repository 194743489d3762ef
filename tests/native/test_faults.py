"""Every system call of a copy fails in turn: a typed error or a right copy, nothing in between, and life goes on after.

The sweeps run in a fresh interpreter with faults.c in front of libc.
"""

import errno
import json

import pytest

from .conftest import SANITIZED, run_python

COMMON = """
import ctypes, os, shutil, sys, time
from pathlib import Path
from ckptstore import errors, native
from files import CHUNK, assert_same, independent_digest, make_tree, random_bytes, state

library = ctypes.CDLL(sys.argv[1])
top = Path(sys.argv[2])
source, destination = top / "source", top / "destination"
contents = {"big": random_bytes((1 << 20) + 5 * CHUNK + 77), "d/small": random_bytes(5000), "empty": b""}
specs = make_tree(source, contents)
digests = {name: independent_digest(data) for name, data in contents.items()}
expected = [native.FileSpec(s.name, s.size_bytes, expected=digests[s.name].chunks) for s in specs]

def arm(function, nth, action, path=b"destination", sticky=False):
    library.fault_arm(function.encode(), nth, int(sticky), str(action).encode(), path)

def disarm():
    arm("nothing", 1, 0)

def fresh():
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir()

def copy(specs=specs, **options):
    options = {"chunk_bytes": CHUNK, "block_bytes": 32 << 10, "threads": 2, **options}
    return native.copy_files(source, destination, specs, options=native.CopyOptions(**options))

"""


def sweep(faults, tmp_path, function, actions, *, strategy="auto", sticky=False, where="destination"):
    """Return {action: [what became of the copy with the 1st, 2nd, … call failing]}."""
    code = (
        COMMON
        + """
import json
function, actions, strategy, sticky, where = sys.argv[3], sys.argv[4].split(), sys.argv[5], sys.argv[6] == "1", sys.argv[7]
fresh()
copy(strategy=strategy)
before = state()
outcomes = {}
for action in actions:
    outcomes[action] = []
    for nth in range(1, 200):
        fresh()
        arm(function, nth, action, where.encode(), sticky)
        try:
            result = copy(strategy=strategy)
            outcome = "ok"
        except errors.CkptStoreError as error:
            outcome = type(error).__name__
            assert str(error), error
        hit = library.fault_hits() > 0
        disarm()
        assert state() == before, (action, nth, state())
        if not hit:
            break
        if outcome == "ok":
            assert result.digests == digests, (action, nth)
            assert_same(source, destination, specs)
        outcomes[action].append(outcome)
    fresh()
    copy(strategy=strategy)  # still usable
    assert_same(source, destination, specs)
print(json.dumps(outcomes))
"""
    )
    done = run_python(
        code, faults, tmp_path, function, " ".join(map(str, actions)), strategy, int(sticky), where, preload=faults
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT]


@pytest.fixture
def place(strategy, tmp_path, memory_path):
    """Where to copy: those that go through the page cache need no disk, and a sweep syncs hundreds of files."""
    return memory_path if strategy == "buffered" else tmp_path


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("strategy", ["auto", "buffered"])
def test_pwrite(faults, place, strategy, sticky):
    actions = [*ERRORS, "short", errno.EINTR][: 3 if sticky else 5]
    got = sweep(faults, place, "pwrite64", actions, strategy=strategy, sticky=sticky)
    assert len(got["5"]) > 30
    assert set(got["5"]) == {"StorageError"}
    assert set(got["28"]) == set(got["122"]) == {"NoSpaceError"}
    if not sticky:
        assert set(got["short"]) == set(got["4"]) == {"ok"}


@pytest.mark.parametrize("strategy", ["auto", "direct", "buffered"])
def test_pread(faults, place, strategy):
    actions = [errno.EIO, "short", errno.EINTR]
    got = sweep(faults, place, "pread64", actions, strategy=strategy, where="source/")
    assert set(got["5"]) == {"StorageError"}
    assert set(got["short"]) == set(got["4"]) == {"ok"}


@pytest.mark.parametrize("function", ["pread64", "pwrite64"])
def test_direct_io_refused_on_the_way(faults, tmp_path, function):
    """Some file systems take the O_DIRECT flag at open and refuse the transfer."""
    where = "source/" if function == "pread64" else "destination"
    got = sweep(faults, tmp_path, function, [errno.EINVAL], strategy="direct", where=where)
    assert "ok" in got["22"]


def test_fsync_is_final(faults, tmp_path):
    got = sweep(faults, tmp_path, "fsync", [*ERRORS, errno.EINTR])
    assert len(got["5"]) == 5  # three files, one folder, the root
    assert set(got["5"]) == set(got["4"]) == {"StorageError"}
    assert set(got["28"]) == {"NoSpaceError"}


@pytest.mark.parametrize(
    ("function", "action", "outcome"),
    [
        ("fallocate64", errno.EOPNOTSUPP, "ok"),
        ("fallocate64", errno.ENOSPC, "NoSpaceError"),
        ("fallocate64", errno.EINTR, "ok"),
        ("ftruncate64", errno.EIO, "StorageError"),
        ("ftruncate64", errno.EFBIG, "NoSpaceError"),
        ("futimens", errno.EPERM, "AccessError"),
        ("fstat", errno.EIO, "StorageError"),
        ("mkdirat", errno.EACCES, "AccessError"),
        ("mkdirat", errno.ENOSPC, "NoSpaceError"),
        ("close", errno.EIO, "StorageError"),
        ("close", errno.EINTR, "ok"),
    ],
)
def test_others(faults, tmp_path, function, action, outcome):
    if SANITIZED == "thread" and function == "fstat":
        pytest.skip("ThreadSanitizer stands in front of faults.c here")
    where = {"mkdirat": "d", "close": "destination/big"}.get(function, "destination/")
    got = sweep(faults, tmp_path, function, [action], where=where)[str(action)]
    assert got
    if function == "fstat":  # of the second, direct descriptor: that one is then done without
        got = [found for found in got if found != "ok"]
    assert set(got) == {outcome}, got


def test_write_back_errors_are_final(faults, tmp_path):
    got = sweep(faults, tmp_path, "sync_file_range", [errno.EIO, errno.ENOSYS], strategy="buffered")
    assert got["5"]
    assert set(got["5"]) == {"StorageError"}
    assert set(got["38"]) == {"ok"}


def test_without_openat2(faults, tmp_path):
    """Old kernels say ENOSYS, containers EPERM: each component is then opened by itself."""
    for action, sticky in ((errno.ENOSYS, True), (errno.EPERM, True), (errno.EAGAIN, False)):
        got = sweep(faults, tmp_path, "openat2", [action], sticky=sticky, where="")
        assert set(got[str(action)]) <= {"ok"}
    got = sweep(faults, tmp_path, "openat2", [errno.EMFILE, errno.EACCES], where="big")
    assert "AccessError" in got["13"]
    assert "StorageError" in got["24"]


LINKS_WITHOUT_OPENAT2 = (
    COMMON
    + """
arm("openat2", 1, 38, b"", True)
(source / "link").symlink_to("d")
(source / "file-link").symlink_to("big")
for name in ("link/small", "file-link"):
    fresh()
    try:
        copy([native.FileSpec(name, 5000)])
    except errors.RefusedError as error:
        assert "symbolic link" in str(error)
    else:
        raise SystemExit("followed " + name)
    outcome = native.digest_files(source, [native.FileSpec(name, 5000)])[name]
    assert isinstance(outcome, errors.RefusedError), outcome
scan = native.scan_tree(source)
assert "link" not in scan and "d" in scan, scan.keys()
assert library.fault_hits() > 0
"""
)


def test_no_link_is_followed_without_openat2(faults, tmp_path):
    done = run_python(LINKS_WITHOUT_OPENAT2, faults, tmp_path, preload=faults)
    assert done.returncode == 0, done.stderr


def test_without_cachestat(faults, tmp_path):
    got = sweep(faults, tmp_path, "cachestat", [errno.ENOSYS, errno.EPERM], sticky=True, where="source")
    assert set(got["38"]) == set(got["1"]) == {"ok"}


LIE = (
    COMMON
    + """
for nth in (1, 3, 20):
    fresh()
    arm("pwrite64", nth, "lie")
    copy(threads=1)  # the write is claimed, so a plain copy cannot know …
    disarm()
    at_fault = [s.name for s in specs if (source / s.name).read_bytes() != (destination / s.name).read_bytes()]
    assert len(at_fault) == 1, at_fault
    outcome = native.digest_files(destination, expected, chunk_bytes=CHUNK)
    bad = [name for name, found in outcome.items() if isinstance(found, errors.DigestMismatchError)]
    assert bad == at_fault, outcome
    fresh()
    arm("pwrite64", nth, "lie")
    try:
        copy(threads=1, verify_after_write=True)  # … but reading back does
    except errors.DigestMismatchError as error:
        assert error.path == at_fault[0]
    else:
        raise SystemExit("a lost write went unseen")
    disarm()
"""
)


def test_lost_write_is_seen(faults, tmp_path):
    done = run_python(LIE, faults, tmp_path, preload=faults)
    assert done.returncode == 0, done.stderr


FLIP = (
    COMMON
    + """
for nth in (1, 2, 9, 30):
    fresh()
    arm("pread64", nth, "flip", b"source/")
    try:
        copy(expected, threads=1)
    except errors.DigestMismatchError:
        assert library.fault_hits() == 1
    else:
        assert library.fault_hits() == 0, nth
    disarm()
"""
)


def test_bit_flipped_while_reading_is_seen(faults, tmp_path):
    done = run_python(FLIP, faults, tmp_path, preload=faults)
    assert done.returncode == 0, done.stderr


COUNT = (
    COMMON
    + """
fresh()
arm("fsync", 1, 5)
try:
    copy(threads=1)
except errors.StorageError as error:
    assert error.errno == 5 and error.operation == "sync" and "destination" in error.path, vars(error)
else:
    raise SystemExit("ignored")
assert library.fault_calls() == 1, "fsync was called again after it failed"
"""
)


def test_fsync_is_not_retried(faults, tmp_path):
    done = run_python(COUNT, faults, tmp_path, preload=faults)
    assert done.returncode == 0, done.stderr


MANY = (
    COMMON
    + """
small = {f"s/{i}": random_bytes(100 + i) for i in range(200)}
specs = make_tree(source, small)
def calls(function, action=0):
    fresh()
    arm(function, 1 if action else 1_000_000, action or 5)
    try:
        copy(specs, durable=True)
    except errors.StorageError as error:
        assert error.errno == 5, error
    called = library.fault_calls()
    disarm()
    return called
print(calls("fsync"), calls("syncfs"), calls("syncfs", 5))
arm("syncfs", 1, 5)
fresh()
try:
    copy(specs)
except errors.StorageError:
    print("final")
"""
)


def test_many_small_files_are_synced_at_once(faults, tmp_path):
    done = run_python(MANY, faults, tmp_path, preload=faults)
    assert done.returncode == 0, done.stderr
    fsyncs, syncfs, failed, final = done.stdout.split()
    assert (fsyncs, syncfs, failed, final) == ("0", "1", "1", "final")
