"""copy_files: the right bytes, digests and times, whatever the size, the threads and the strategy; and what it refuses."""

import itertools
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckptstore import native
from ckptstore.errors import (
    AlreadyExistsError,
    DigestMismatchError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    UsageError,
)

from .conftest import SANITIZED, mounted, run_python
from .files import CHUNK, assert_same, independent_digest, make_tree, random_bytes, state

BLOCK = 16 << 10
STRATEGIES = ["auto", "clone", "direct", "warm", "buffered"]
SIZES = [0, 1, 511, 512, 4095, 4096, 4097]
SIZES += [around + d for around in (BLOCK, CHUNK, 5 * CHUNK) for d in (-1, 0, 1)]
BIG = (1 << 20) + 4097  # past the small-file path
SIZES += [1 << 20, BIG, 3 * (1 << 20)]


def options(**changes):
    return native.CopyOptions(**{"chunk_bytes": CHUNK, "block_bytes": BLOCK, **changes})


def check_copy(source, destination, contents, **changes):
    specs = make_tree(source, contents)
    result = native.copy_files(source, destination, specs, options=options(**changes))
    assert_same(source, destination, specs)
    assert result.digests == {name: independent_digest(data) for name, data in contents.items()}
    assert result.bytes_copied == sum(map(len, contents.values())) == sum(result.strategies.values())
    assert result.bytes_reused == 0
    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_size(roots, strategy):
    check_copy(*roots, {f"f{size}": random_bytes(size) for size in SIZES}, strategy=strategy)


@pytest.mark.parametrize("threads", range(1, 17))
def test_every_number_of_threads(roots, threads):
    check_copy(*roots, {f"f{i}": random_bytes(BIG + i, i) for i in range(5)}, threads=threads)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tmpfs(tmp_path, strategy):
    with mounted("tmpfs", tmp_path / "mount", size_mib=64) as mount:
        source, destination = mount / "source", mount / "destination"
        source.mkdir()
        destination.mkdir()
        check_copy(source, destination, {f"f{s}": random_bytes(s) for s in SIZES}, strategy=strategy)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_other_file_systems(tmp_path, kind):
    with mounted(kind, tmp_path / "mount", size_mib=400) as mount:
        source = mount / "source"
        source.mkdir()
        contents = {f"f{s}": random_bytes(s) for s in SIZES}
        for strategy in STRATEGIES:
            destination = mount / strategy
            destination.mkdir()
            result = check_copy(source, destination, contents, strategy=strategy, verify_after_write=True)
            if kind != "ext4" and strategy in ("auto", "clone"):
                assert list(result.strategies) == ["clone"]
            else:
                assert "clone" not in result.strategies


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_clone_is_a_copy_of_its_own(tmp_path, kind):
    with mounted(kind, tmp_path / "mount", size_mib=400) as mount:
        (mount / "a").mkdir()
        (mount / "b").mkdir()
        data = random_bytes(BIG)
        specs = make_tree(mount / "a", {"f": data})
        result = native.copy_files(mount / "a", mount / "b", specs, options=options(strategy="clone"))
        assert result.strategies == {"clone": BIG}
        with (mount / "a" / "f").open("r+b") as file:  # what torch.save does to a shard
            file.write(b"overwritten")
        assert (mount / "b" / "f").read_bytes() == data


@pytest.mark.root
def test_clone_checks_what_was_expected(tmp_path):
    with mounted("xfs", tmp_path / "mount", size_mib=400) as mount:
        (mount / "a").mkdir()
        (mount / "b").mkdir()
        make_tree(mount / "a", {"f": random_bytes(BIG)})
        spec = native.FileSpec("f", BIG, expected=independent_digest(random_bytes(BIG, 1)).chunks)
        with pytest.raises(DigestMismatchError):
            native.copy_files(mount / "a", mount / "b", [spec], options=options(strategy="clone"))


def test_sub_folders_and_many_small_files(roots):
    contents = {f"d{i % 7}/e{i % 3}/f{i}": random_bytes(i * 37) for i in range(300)}
    check_copy(*roots, contents)
    assert stat.S_IMODE((roots[1] / "d1/e1").stat().st_mode) == 0o700
    assert stat.S_IMODE((roots[1] / "d1/e1/f1").stat().st_mode) == 0o600


def test_not_durable_and_nice(roots):
    check_copy(*roots, {"f": random_bytes(BIG)}, durable=False, nice=10)
    assert os.getpriority(os.PRIO_PROCESS, 0) < 10  # the workers alone are nice


def test_no_files(roots):
    result = native.copy_files(*roots, [])
    assert (result.digests, result.bytes_copied) == ({}, 0)


def test_names_that_are_not_utf8(roots):
    name = os.fsdecode(b"model-\xff.bin")
    check_copy(*roots, {name: b"abc"})


def test_page_cache_is_left_as_it_was(roots):
    """A copy of cold data must not fill the cache under a training job."""
    source, destination = roots
    specs = make_tree(source, {"f": random_bytes(8 << 20)})
    fd = os.open(source / "f", os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if not native.supports_direct(source):
        pytest.skip("no O_DIRECT on this file system")
    result = native.copy_files(source, destination, specs)
    assert result.strategies == {"direct": 8 << 20}
    for path in (source / "f", destination / "f"):
        assert cached_pages(path) < 300, path
    os.close(fd)
    (source / "f").read_bytes()
    os.unlink(destination / "f")
    assert native.copy_files(source, destination, specs).strategies == {"warm": 8 << 20}


def cached_pages(path):
    out = subprocess.run(["fincore", "-bnro", "PAGES", path], capture_output=True, text=True, check=True)
    return int(out.stdout)


# --- expected digests, resume, read-back ---------------------------------------------------------------------------


def with_expected(specs, contents):
    return [native.FileSpec(s.name, s.size_bytes, expected=independent_digest(contents[s.name]).chunks) for s in specs]


def test_expected_digests_are_checked_while_reading(roots):
    source, destination = roots
    contents = {"a": random_bytes(BIG), "d/b": random_bytes(5 * CHUNK + 3)}
    specs = with_expected(make_tree(source, contents), contents)
    native.copy_files(source, destination, specs, options=options())
    damaged = bytearray(contents["d/b"])
    damaged[3 * CHUNK + 5] ^= 1
    (source / "d/b").write_bytes(damaged)
    (destination / "again").mkdir()
    with pytest.raises(DigestMismatchError) as caught:
        native.copy_files(source, destination / "again", specs, options=options())
    assert (caught.value.path, caught.value.offset_bytes) == ("d/b", 3 * CHUNK)


@pytest.mark.parametrize("strategy", ["auto", "buffered"])
@pytest.mark.parametrize("known", [True, False], ids=["expected", "compared"])
def test_resume_writes_only_what_is_missing(roots, known, strategy):
    source, destination = roots
    contents = {"a": random_bytes(40 * CHUNK + 77), "d/b": random_bytes(3 * CHUNK), "new": b"new", "same": b"same"}
    specs = make_tree(source, contents)
    if known:
        specs = with_expected(specs, contents)
    torn = bytearray(contents["a"])
    torn[7 * CHUNK + 9] ^= 0x80
    torn[40 * CHUNK + 76] ^= 1
    make_tree(destination, {"a": bytes(torn), "d/b": contents["d/b"][: 2 * CHUNK], "same": b"same"})
    result = native.copy_files(source, destination, specs, options=options(resume=True, strategy=strategy))
    assert_same(source, destination, specs)
    assert result.digests == {name: independent_digest(data) for name, data in contents.items()}
    written = (CHUNK if known else BLOCK) + 77 + CHUNK + 3
    assert result.bytes_copied == written
    assert result.bytes_reused == sum(map(len, contents.values())) - written


def test_resume_cuts_what_is_too_long(roots):
    source, destination = roots
    contents = {"a": random_bytes(CHUNK + 5), "empty": b""}
    specs = make_tree(source, contents)
    make_tree(destination, {"a": contents["a"] + b"more", "empty": b"not empty"})
    native.copy_files(source, destination, specs, options=options(resume=True))
    assert_same(source, destination, specs)


def test_resume_after_a_failure(roots):
    source, destination = roots
    contents = {f"f{i}": random_bytes(BIG, i) for i in range(6)}
    specs = make_tree(source, contents)

    def stop(done, total):
        if done:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        native.copy_files(source, destination, specs, options=options(threads=1), progress=stop)
    result = native.copy_files(source, destination, specs, options=options(resume=True))
    assert_same(source, destination, specs)
    assert result.bytes_reused + result.bytes_copied == 6 * BIG


# --- from memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_write_from_memory(roots, strategy):
    contents = {f"d{s % 3}/f{s}": random_bytes(s) for s in SIZES}
    buffers = {name: (bytes, bytearray, memoryview)[i % 3](data) for i, (name, data) in enumerate(contents.items())}
    before = time.time_ns()
    result = native.write_files(roots[1], buffers, options=options(strategy=strategy, verify_after_write=True))
    assert result.digests == {name: independent_digest(data) for name, data in contents.items()}
    assert "clone" not in result.strategies
    assert "direct" not in result.strategies
    for name, data in contents.items():
        assert (roots[1] / name).read_bytes() == data
        assert (roots[1] / name).stat().st_mtime_ns >= before - 20_000_000


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_write_gathers_one_file_from_many_buffers(roots, strategy):
    """Cuts within, at and across blocks and chunks; empty pieces at either end and between."""
    data = random_bytes(3 * BIG + 77)
    cuts = sorted({0, 1, 5, 4096, CHUNK - 1, CHUNK, CHUNK + 1, BIG, 2 * BIG + 3, 2 * BIG + 3, len(data) - 1, len(data)})
    pieces = [b"", *(data[a:b] for a, b in itertools.pairwise(cuts)), b""]
    many = [data[i : i + 1] for i in range(5000)]
    result = native.write_files(roots[1], {"f": pieces, "g": tuple(many), "h": []}, options=options(strategy=strategy))
    assert (roots[1] / "f").read_bytes() == data
    assert (roots[1] / "g").read_bytes() == data[:5000]
    assert (roots[1] / "h").read_bytes() == b""
    assert result.digests["f"] == independent_digest(data)
    assert result.digests["g"] == independent_digest(data[:5000])


def test_write_from_memory_holds_and_lets_go_of_the_buffer(roots):
    data = bytearray(random_bytes(BIG))
    native.write_files(roots[1], {"f": data})
    data.append(1)  # BufferError while somebody holds it
    with pytest.raises(AlreadyExistsError):
        native.write_files(roots[1], {"f": data})
    data.append(1)
    result = native.write_files(roots[1], {"f": data}, options=options(resume=True))
    assert result.bytes_reused > BIG - CHUNK
    assert (roots[1] / "f").read_bytes() == data


def test_write_from_memory_refuses(roots):
    with pytest.raises(BufferError):
        native.write_files(roots[1], {"f": memoryview(b"abcdef")[::2]})
    with pytest.raises(UsageError):
        native.write_files(roots[1], {"../f": b"x"})
    with pytest.raises(NotFoundError):
        native.write_files(roots[1] / "nowhere", {"f": b"x"})


# --- refusals and changes ------------------------------------------------------------------------------------------


def test_existing_file_is_not_replaced(roots):
    specs = make_tree(roots[0], {"f": b"new"})
    make_tree(roots[1], {"f": b"old"})
    with pytest.raises(AlreadyExistsError):
        native.copy_files(*roots, specs)
    assert (roots[1] / "f").read_bytes() == b"old"


def test_missing_things(roots, tmp_path):
    specs = make_tree(roots[0], {"f": b"x"})
    for source, destination in ((tmp_path / "nowhere", roots[1]), (roots[0], tmp_path / "nowhere")):
        with pytest.raises(NotFoundError, match="nowhere"):
            native.copy_files(source, destination, specs)
    with pytest.raises(NotFoundError, match="ghost"):
        native.copy_files(*roots, [native.FileSpec("ghost", 1)])


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../x", "a//b", "./a", "a/.", "a\0b"])
def test_names_that_leave_the_root(roots, name):
    with pytest.raises(UsageError):
        native.copy_files(*roots, [native.FileSpec(name, 1)])


def test_wrong_arguments(roots):
    specs = make_tree(roots[0], {"f": b"x"})
    for bad in ({"chunk_bytes": 1000}, {"chunk_bytes": 0}, {"strategy": "magic"}, {"threads": -1}):
        with pytest.raises(UsageError):
            native.copy_files(*roots, specs, options=native.CopyOptions(**bad))
    with pytest.raises(UsageError, match="twice"):
        native.copy_files(*roots, specs * 2)
    with pytest.raises(UsageError, match="cover"):
        native.copy_files(*roots, [native.FileSpec("f", 1, expected=[1, 2])])


def _special(kind, path):
    match kind:
        case "link":
            path.symlink_to("/etc/passwd")
        case "link to folder":
            path.symlink_to("/etc")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_only_regular_files_are_read(roots, kind):
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("making a device needs root")
    _special(kind, roots[0] / "f")
    start = time.monotonic()
    with pytest.raises(RefusedError, match=r"regular file|symbolic link"):
        native.copy_files(*roots, [native.FileSpec("f", 1)])
    assert time.monotonic() - start < 5
    outcome = native.digest_files(roots[0], [native.FileSpec("f", 1)])["f"]
    assert isinstance(outcome, RefusedError)


@pytest.mark.parametrize("side", [0, 1])
def test_no_link_is_followed_on_the_way(roots, tmp_path, side):
    elsewhere = tmp_path / "elsewhere"
    make_tree(elsewhere, {"f": b"secret"})
    make_tree(roots[0], {"d/f": b"public"})
    victim = roots[side] / "d"
    if victim.exists():
        (victim / "f").unlink()
        victim.rmdir()
    victim.symlink_to(elsewhere)
    with pytest.raises(RefusedError, match="symbolic link"):
        native.copy_files(*roots, [native.FileSpec("d/f", 6)])
    assert (elsewhere / "f").read_bytes() == b"secret"


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_destination_is_not_written_through(roots, tmp_path, resume):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    specs = make_tree(roots[0], {"f": b"x"})
    (roots[1] / "f").symlink_to(victim)
    with pytest.raises((RefusedError, AlreadyExistsError)):
        native.copy_files(*roots, specs, options=options(resume=resume))
    assert victim.read_bytes() == b"precious"


def test_source_is_not_what_was_planned(roots):
    (_spec,) = make_tree(roots[0], {"f": b"12345"})
    status = (roots[0] / "f").stat()
    good = native.FileSpec("f", 5, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
    native.copy_files(*roots, [good])
    for bad in (
        native.FileSpec("f", 4),
        native.FileSpec("f", 6),
        native.FileSpec("f", 5, mtime_ns=status.st_mtime_ns + 1),
        native.FileSpec("f", 5, inode=status.st_ino + 1),
    ):
        (roots[1] / "f").unlink()
        with pytest.raises(SourceChangedError) as caught:
            native.copy_files(*roots, [bad])
        assert caught.value.path == "f"
        assert caught.value.retryable
        (roots[1] / "f").touch()


@pytest.mark.parametrize("change", ["write", "truncate", "replace", "grow"])
def test_source_changes_while_it_is_copied(roots, change):
    source, destination = roots
    specs = make_tree(source, {"f": random_bytes(24 << 20)})
    path = source / "f"
    changed = threading.Event()

    def touch(done, total):
        if done and not changed.is_set():
            changed.set()
            match change:
                case "write":
                    with path.open("r+b") as file:
                        file.write(b"new")
                case "truncate":
                    os.truncate(path, 1000)
                case "replace":
                    make_tree(source, {"other": b"other"})
                    os.rename(source / "other", path)
                case "grow":
                    with path.open("ab") as file:
                        file.write(b"more")

    slow = options(threads=1, block_bytes=4096, chunk_bytes=1 << 20, strategy="direct")
    if not native.supports_direct(source):
        pytest.skip("too fast to be changed on the way")
    with pytest.raises(SourceChangedError) as caught:
        native.copy_files(source, destination, specs, options=slow, progress=touch)
    assert changed.is_set()
    assert caught.value.path == "f"


# --- progress and stopping -----------------------------------------------------------------------------------------


def test_progress_ends_at_the_total(roots):
    seen = []
    specs = make_tree(roots[0], {"f": random_bytes(BIG), "g": b""})
    native.copy_files(*roots, specs, options=options(), progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (BIG, BIG)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_error_in_progress_cancels(roots):
    specs = make_tree(roots[0], {"f": random_bytes(BIG)})

    def fail(done, total):
        raise LookupError("from progress")

    with pytest.raises(LookupError, match="from progress"):
        native.copy_files(*roots, specs, options=options(), progress=fail)


INTERRUPTED = """
import os, signal, sys, threading, time
from ckptstore import native
source, destination, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.4, interrupt).start()
# Not durable: an fsync in flight takes as long as the disk says.
options = native.CopyOptions(threads=2, block_bytes=4096, strategy="direct", durable=False)
try:
    while True:  # until the signal comes, whatever the speed of the disk
        native.copy_files(source, destination, [native.FileSpec("f", size)], options=options)
        os.unlink(destination + "/f")
except KeyboardInterrupt:
    late = time.monotonic() - sent[0]
    threads = len(os.listdir("/proc/self/task"))
    print("stopped", late, threads)
"""


def test_ctrl_c_stops_within_a_second(roots):
    make_tree(roots[0], {"f": random_bytes(64 << 20)})
    done = run_python(INTERRUPTED, *roots, 64 << 20)
    assert done.returncode == 0, done.stderr
    word, late, threads = done.stdout.split()
    assert word == "stopped"
    assert float(late) < 1.0
    assert int(threads) == (2 if SANITIZED == "thread" else 1)  # ThreadSanitizer has one of its own


def test_no_descriptor_or_thread_is_left(roots):
    specs = make_tree(roots[0], {f"f{i}": random_bytes(BIG, i) for i in range(3)})
    bad = [*specs[:2], native.FileSpec("f2", BIG, expected=[0] * 17)]

    threads = len(os.listdir("/proc/self/task"))
    before = state(threads)
    for _ in range(30):
        with pytest.raises(DigestMismatchError):
            native.copy_files(*roots, bad, options=options(durable=False, resume=True))
    assert state(threads) == before


def test_python_runs_while_copying(roots):
    specs = make_tree(roots[0], {"f": random_bytes(32 << 20)})
    copier = threading.Thread(
        target=native.copy_files, args=(*roots, specs), kwargs={"options": options(block_bytes=4096, strategy="direct")}
    )
    copier.start()
    turns = 0
    while copier.is_alive():
        turns += 1
        time.sleep(0)
    assert turns > 100
    assert_same(*roots, specs)


def test_copies_side_by_side(roots):
    source, destination = roots
    contents = {f"f{i}": random_bytes(BIG, i) for i in range(4)}
    specs = make_tree(source, contents)
    results = {}

    def one(i):
        folder = destination / str(i)
        folder.mkdir()
        results[i] = native.copy_files(source, folder, specs, options=options(threads=3))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_same(source, destination / str(i), specs)
    assert len(results) == 4


def test_import_is_light():
    code = "import sys; from ckptstore import native; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run_python(code).stdout.split() == ["False", "False"]


def test_path_objects_and_text(roots):
    specs = make_tree(roots[0], {"f": b"x"})
    native.copy_files(str(roots[0]), Path(roots[1]), specs)
    assert sys.version_info >= (3, 11)
