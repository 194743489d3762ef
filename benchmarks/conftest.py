"""What the benchmarks share: the place, the data, and how a run is measured.

Contenders take turns (A B A B), the first round is dropped by report.py, and every run's result is checked. Run them with
benchmarks/run.py; they are no part of the tests.
"""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from ckptstore import native

MIB = 1 << 20
SMALL_BYTES = 16 << 10


def parse_size(text):
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise pytest.UsageError(f"not a size: {text!r} (try 8GiB)")
    return int(match[1]) << 10 * ("KMGT".index(match[2].upper()) + 1 if match[2] else 0)


def pytest_addoption(parser):
    group = parser.getgroup("ckptstore")
    group.addoption("--dir", default="", help="a folder on the disk to measure (default: the current one)")
    group.addoption("--size", default="2GiB", help="bytes to copy in one run")
    group.addoption("--small-files", type=int, default=20_000, help="how many files of 16 KiB")
    group.addoption("--device", default="cpu", help="where the tensors are that are saved: cpu or cuda")
    group.addoption("--rounds", type=int, default=4, help="turns of each contender; the first is dropped")


def pytest_generate_tests(metafunc):
    if "turn" in metafunc.fixturenames:
        metafunc.parametrize("turn", range(metafunc.config.getoption("--rounds")))


def pytest_collection_modifyitems(items):
    """Let the contenders of one table take turns, rather than each run all its rounds in a row."""
    first_seen = {}

    def order(numbered):
        number, item = numbered
        params = item.callspec.params if hasattr(item, "callspec") else {}
        table = (item.path, item.originalname, params.get("shape"), params.get("heat"))
        return first_seen.setdefault(table, number), params.get("turn", -1), number

    items[:] = [item for _, item in sorted(enumerate(items), key=order)]


def pytest_benchmark_update_machine_info(config, machine_info):
    flags = Path("/proc/cpuinfo").read_text().split()
    machine_info["cores"] = len(os.sched_getaffinity(0))
    machine_info["crc64"] = native.implementations()[0]
    machine_info["avx512"] = "avx512f" in flags
    machine_info["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine_info["dir"] = config.getoption("--dir") or os.getcwd()
    machine_info["size"] = config.getoption("--size")
    machine_info["device"] = config.getoption("--device")
    machine_info["load"] = os.getloadavg()
    mount = subprocess.run(
        ["findmnt", "-no", "FSTYPE,SOURCE,OPTIONS", "-T", machine_info["dir"]], capture_output=True, text=True
    )
    machine_info["file_system"] = mount.stdout.strip()


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """What one run took. `peak_bytes`: the largest resident set of its process; 0 where it is not known."""

    seconds: float
    cpu_s: float
    peak_bytes: int


def measure_child(**job: object) -> Usage:
    """Run one job of child.py in a process of its own; an error is an error of the benchmark."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file, default=str)
        file.flush()
        command = [sys.executable, str(Path(__file__).with_name("child.py")), file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def measure_command(command: str, **variables: object) -> Usage:
    """Run a shell command with some variables set."""
    settings = "".join(f"{name}={shlex.quote(str(value))}; " for name, value in variables.items())
    return measure_child(do="shell", command=f"exec >/dev/null; {settings}{command}")


def measure_here(function: Callable[[], object]) -> Usage:
    """Run a function of this process: for what works on tensors that it holds. Its memory is not told apart."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.monotonic()
    function()
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, cpu, 0)


def measure_fio(path: Path, size_bytes: int, source_bytes: int, mode: str) -> Usage:
    """Let fio read, write, or (mode "both") read one file while writing another: what the disk itself can do.

    It moves `size_bytes`; PATH.read must be there, of `source_bytes`, and is read as often as it takes.
    """
    common = ["--bs=2m", "--direct=1", "--ioengine=io_uring", "--iodepth=16"]
    jobs = []
    if mode in ("read", "both"):
        sizes = [f"--size={source_bytes // MIB * MIB}", f"--io_size={size_bytes // MIB * MIB}"]
        jobs += ["--name=read", f"--filename={path}.read", "--rw=read", *sizes, *common]
    if mode in ("write", "both"):
        write = ["--rw=write", "--end_fsync=1", f"--size={size_bytes // MIB * MIB}"]
        jobs += ["--name=write", f"--filename={path}.write", *write, *common]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(["fio", "--output-format=json", *jobs], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = max(job[kind]["runtime"] / 1000 for job in json.loads(done.stdout)["jobs"] for kind in ("read", "write"))
    Path(f"{path}.write").unlink(missing_ok=True)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, cpu, 0)


def record(benchmark, run, *, moved_bytes, prepare=None, **facts):
    """One run under pytest-benchmark, with what report.py needs beside the time."""
    usages = []

    def once():
        usages.append(run())

    benchmark.pedantic(once, setup=prepare, rounds=1, iterations=1)
    benchmark.extra_info.update(asdict(usages[0]), moved_bytes=moved_bytes, **facts)
    return usages[0]


# --- the place and the data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def place(request):
    """An empty folder on the disk that is measured; removed at the end."""
    base = Path(request.config.getoption("--dir") or os.getcwd())
    folder = base / f".ckptstore-benchmark-{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class DataSet:
    """Files of random bytes below a folder, with digests that were made when they were written."""

    root: Path
    specs: list[native.FileSpec]
    size_bytes: int

    def check(self, copied: Path) -> None:
        outcome = native.digest_files(copied, [native.FileSpec(s.name, s.size_bytes, expected=s.expected) for s in self.specs])
        bad = [name for name, found in outcome.items() if isinstance(found, Exception)]
        assert not bad, f"{copied}: {bad[:3]} are wrong"

    @property
    def files(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """As child.py takes them."""
        return [(spec.name, spec.size_bytes, tuple(spec.expected or ())) for spec in self.specs]

    def warm(self) -> None:
        for spec in self.specs:
            with open(self.root / spec.name, "rb", buffering=0) as file:
                while file.read(MIB):
                    pass

    def cool(self) -> None:
        """Drop it from the page cache, which takes no root."""
        for spec in self.specs:
            fd = os.open(self.root / spec.name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _make(root, sizes):
    specs = []
    for name, size in sizes.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = []
        with path.open("wb") as file:
            for offset in range(0, size, native.CHUNK_BYTES):
                block = os.urandom(min(native.CHUNK_BYTES, size - offset))
                chunks.append(native.crc64(block, implementation="portable"))
                file.write(block)
        specs.append(native.FileSpec(name, size, expected=tuple(chunks)))
    os.sync()  # an fsync for each of 20,000 files takes minutes
    return DataSet(root, specs, sum(sizes.values()))


@pytest.fixture(scope="session")
def data_sets(request, place):
    """Return a function from a shape's name to its data, made once."""
    size = parse_size(request.config.getoption("--size"))
    small = request.config.getoption("--small-files")
    shapes = {
        "one file": {"model.safetensors": size},
        "16 shards": {f"model-{i:05d}.safetensors": size // 16 + 4096 * i + i for i in range(16)},
        "small files": {f"d{i // 1000:03d}/f{i:06d}": SMALL_BYTES for i in range(small)},
    }
    made = {}

    def get(shape):
        if shape not in made:
            for other in made.values():  # one at a time: disks of rented machines are small
                shutil.rmtree(other.root)
            made.clear()
            made[shape] = _make(place / shape.replace(" ", "-"), shapes[shape])
        return made[shape]

    return get
