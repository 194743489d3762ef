"""Too little room, memory, time or threads: a clean error, never the end of the process."""

import os
import shutil
import subprocess

import pytest

from ckptstore import native
from ckptstore.errors import NoSpaceError, StorageError

from .conftest import mounted, run_python, unsanitized
from .files import assert_same, independent_digest, make_tree, random_bytes

MIB = 1 << 20


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("strategy", ["auto", "buffered"])
def test_full_disk(tmp_path, kind, strategy):
    source = tmp_path / "source"
    specs = make_tree(source, {"a": random_bytes(6 * MIB), "b": random_bytes(40 * MIB)})
    with mounted(kind, tmp_path / "mount", size_mib=30) as mount:
        options = native.CopyOptions(strategy=strategy)
        with pytest.raises(NoSpaceError) as caught:
            native.copy_files(source, mount, specs, options=options)
        assert caught.value.hint
        for name in ("a", "b"):
            (mount / name).unlink(missing_ok=True)
        native.copy_files(source, mount, specs[:1], options=options)  # the room is given back
        assert_same(source, mount, specs[:1])


@pytest.mark.root
def test_no_inodes_left(tmp_path):
    source = tmp_path / "source"
    specs = make_tree(source, {f"f{i}": b"x" for i in range(40)})
    with mounted("tmpfs", tmp_path / "mount", size_mib=30, options=",nr_inodes=20") as mount, pytest.raises(NoSpaceError):
        native.copy_files(source, mount, specs)


@pytest.mark.root
def test_read_only_destination(tmp_path):
    source = tmp_path / "source"
    specs = make_tree(source, {"f": b"x"})
    with mounted("tmpfs", tmp_path / "mount", size_mib=2) as mount:
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        with pytest.raises(StorageError, match="Read-only"):
            native.copy_files(source, mount, specs)


@pytest.mark.root
def test_room_that_is_promised_and_not_there(tmp_path):
    """A thin disk: writes are taken, and fail at write-back. Only the sync tells."""
    source = tmp_path / "source"
    specs = make_tree(source, {f"f{i}": random_bytes(2 * MIB, i) for i in range(16)})
    with mounted("tmpfs", tmp_path / "thin", size_mib=16) as thin:
        image = thin / "image"
        with image.open("wb") as file:
            file.truncate(200 * MIB)
        if subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], capture_output=True).returncode:
            pytest.skip("no mkfs.ext4 here")
        (tmp_path / "mount").mkdir()
        done = subprocess.run(["mount", "-o", "loop", image, tmp_path / "mount"], capture_output=True)
        if done.returncode:
            pytest.skip("no loop devices here")
        try:
            for strategy in ("auto", "buffered"):
                options = native.CopyOptions(strategy=strategy)
                destination = tmp_path / "mount" / strategy
                destination.mkdir(exist_ok=True)
                with pytest.raises(StorageError):
                    native.copy_files(source, destination, specs, options=options)
        finally:
            subprocess.run(["umount", "-l", tmp_path / "mount"], check=True)


COPY = """
import sys
from ckptstore import errors, native
source, destination, size, threads, block = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
options = native.CopyOptions(threads=threads, block_bytes=block, chunk_bytes=max(block, 1 << 20))
try:
    native.copy_files(source, destination, [native.FileSpec("f", size)], options=options)
    print("copied")
except (MemoryError, errors.CkptStoreError) as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def _prlimit():
    if shutil.which("prlimit") is None:
        pytest.skip("no prlimit here")


@unsanitized
def test_out_of_memory_in_a_worker(roots):
    _prlimit()
    make_tree(roots[0], {"f": random_bytes(20 * MIB)})
    done = run_python(COPY, *roots, 20 * MIB, 8, 256 * MIB, prefix=["prlimit", "--as=400000000"])
    # 256 MiB blocks: not all of them fit
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("MemoryError", "copied")
    make_tree(roots[0], {"f": b"x"})
    done = run_python(COPY.replace("1 << 20", "1 << 30"), *roots, 1, 1, 1 << 30, prefix=["prlimit", "--as=400000000"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "MemoryError"


@unsanitized
def test_no_more_threads_to_be_had(roots):
    _prlimit()
    specs = make_tree(roots[0], {"f": random_bytes(20 * MIB)})
    # Each thread's stack is taken from the address space: a few fit, 32 do not.
    prefix = ["prlimit", "--as=330000000", "--stack=33554432"]
    done = run_python(COPY, *roots, 20 * MIB, 32, 65536, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "copied"
    assert_same(*roots, specs)


def test_largest_file_size(roots):
    _prlimit()
    make_tree(roots[0], {"f": random_bytes(20 * MIB)})
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)" + COPY
    done = run_python(code, *roots, 20 * MIB, 2, MIB, prefix=["prlimit", f"--fsize={8 * MIB}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "NoSpaceError"


def test_few_descriptors(roots):
    _prlimit()
    contents = {f"f{i}": random_bytes(i) for i in range(300)}
    specs = make_tree(roots[0], contents)
    code = """
import sys
from ckptstore import native
specs = [native.FileSpec(f"f{i}", i) for i in range(300)]
native.copy_files(sys.argv[1], sys.argv[2], specs, options=native.CopyOptions(threads=4))
"""
    done = run_python(code, *roots, prefix=["prlimit", "--nofile=40"])
    assert done.returncode == 0, done.stderr
    assert_same(*roots, specs)


PEAK = """
import resource, sys
from ckptstore import native
native.implementations()
def peak_kib():  # not ru_maxrss: a child starts with that of its parent
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak_kib()
result = native.copy_files(sys.argv[1], sys.argv[2], [native.FileSpec("f", int(sys.argv[3]))],
                           options=native.CopyOptions(threads=4, block_bytes=1 << 20, strategy=sys.argv[4]))
print(peak_kib() - before)
"""


@pytest.mark.parametrize("strategy", ["auto", "direct", "buffered"])
@unsanitized
def test_memory_does_not_grow_with_the_file(roots, strategy):
    size = 96 * MIB
    with (roots[0] / "f").open("wb") as file:
        file.write(random_bytes(MIB) * 96)
    done = run_python(PEAK, *roots, size, strategy)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12 << 10  # KiB: four blocks of 1 MiB, their stacks, and change


@pytest.mark.root
@unsanitized
def test_in_a_memory_limited_group(roots):
    group = f"/sys/fs/cgroup/memory/ckptstore-{os.getpid()}"
    try:
        os.mkdir(group)
        with open(f"{group}/memory.limit_in_bytes", "w") as file:
            file.write("64M")
    except OSError as error:
        pytest.skip(f"no memory groups (v1) here: {error}")
    try:
        with (roots[0] / "f").open("wb") as file:
            file.write(random_bytes(MIB) * 128)
        code = f"open('{group}/cgroup.procs', 'w').write('0')\n" + PEAK
        done = run_python(code, *roots, 128 * MIB, "auto")
        assert done.returncode == 0, done.stderr
        assert_same(*roots, [native.FileSpec("f", 128 * MIB)])
    finally:
        with open("/sys/fs/cgroup/memory/cgroup.procs", "w") as file:
            file.write("0")
        os.rmdir(group)


FORKED = """
import os, sys
from ckptstore import native
options = native.CopyOptions(chunk_bytes=65536)
spec = native.FileSpec("f", 200000)
native.copy_files(sys.argv[1], sys.argv[2], [spec], options=options)
child = os.fork()
if child == 0:
    os.unlink(sys.argv[2] + "/f")
    native.copy_files(sys.argv[1], sys.argv[2], [spec], options=options)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_works_after_a_fork(roots):
    specs = make_tree(roots[0], {"f": random_bytes(200000)})
    done = run_python(FORKED, *roots)
    assert done.stdout.split() == ["7"], done.stderr
    assert_same(*roots, specs)


def test_digest_of_more_chunks_than_blocks_of_memory(tmp_path):
    data = random_bytes(5 * MIB + 1)
    specs = make_tree(tmp_path, {"f": data})
    assert native.digest_files(tmp_path, specs, chunk_bytes=4096)["f"] == independent_digest(data, 4096)
