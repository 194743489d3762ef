"""Files of known bytes, and digests made by somebody else; for the tests and for the interpreters that they start.

Nothing is imported here that takes long, as pytest does: some tests start many.
"""

import functools
import os
import random
import time
from pathlib import Path

import awscrt.checksums

from ckptstore import native

CHUNK = 64 << 10  # small, so that small files have many


@functools.lru_cache(8)
def random_bytes(size, seed=0):
    return random.Random(f"{size} {seed}").randbytes(size)


def independent_digest(data, chunk=CHUNK):
    crc = awscrt.checksums.crc64nvme
    return native.Digest(crc(data) if data else 0, tuple(crc(data[i : i + chunk]) for i in range(0, len(data), chunk)))


def make_tree(root, contents):
    """Write {name: bytes} below root; return the specs."""
    for name, data in contents.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return [native.FileSpec(name, len(data)) for name, data in contents.items()]


def assert_same(source, destination, specs):
    for spec in specs:
        assert Path(destination, spec.name).read_bytes() == Path(source, spec.name).read_bytes(), spec.name
        a, b = Path(source, spec.name).stat(), Path(destination, spec.name).stat()
        assert (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def state(threads=1):
    """Descriptors and how many threads there are, once these are `threads`: one that was joined is listed for a moment."""
    threads += os.environ.get("CKPTSTORE_SANITIZED") == "thread"  # which has one of its own
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) <= threads:
            break
        time.sleep(0.001)
    return sorted(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
