"""A process that ends while one of its threads is in the engine ends as it would without."""

import os

import pytest

from .conftest import run_python

# A mirror's thread, for one, is a daemon. Up to Python 3.13 it gets pthread_exit() in place of the interpreter's lock.
SCRIPT = """
import sys, threading, time
from ckptstore import native

kind, root = sys.argv[1:]
size = 1 << 28
with open(f"{root}/f", "wb") as file:
    file.truncate(size)
data, spec = bytearray(1 << 20), native.FileSpec("f", size)
calls = {
    "crc": lambda: native.crc64(data),
    "digest": lambda: native.digest_files(root, [spec], threads=1),
    "weights": lambda: native.scan_weights(root, [native.Region("f", 0, size, "F32")], threads=1),
    "scan": lambda: native.scan_tree(root, threads=1),
    "path": lambda: native.supports_direct(root),
}

def work():
    while True:
        calls[kind]()

class Late:
    def __del__(self):
        time.sleep(0.25)  # longer than a tick: some modules, torch among them, take that long to go

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
sys.late = Late()
"""


@pytest.mark.parametrize("kind", ["crc", "digest", "weights", "scan", "path"])
def test_a_daemon_thread_in_the_engine(tmp_path, kind):
    options = os.environ.get("TSAN_OPTIONS", "") + ":report_thread_leaks=0"  # nobody joins a worker any more: as it is meant
    done = run_python(SCRIPT, kind, tmp_path, env={"TSAN_OPTIONS": options})
    assert (done.returncode, done.stderr) == (0, "")
