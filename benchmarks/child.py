"""One measured run in a process of its own: takes a job from a JSON file, prints what it used as JSON.

Of its own, because a process starts with the peak memory of the one that made it, and pytest with torch is not small.
"""

import json
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path


def shell(command):
    """Run by a shell, a child of this small process."""
    start = time.monotonic()
    pid = os.spawnvp(os.P_NOWAIT, "bash", ["bash", "-ec", command])
    _, status, used = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"failed: {command}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss << 10


def here(function):
    """Run in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.monotonic()
    function()
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, peak_bytes()


def peak_bytes():
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak[1]) << 10


def specs_of(job):
    from ckptstore import native

    return [native.FileSpec(name, size, expected=expected) for name, size, expected in job["files"]]


def copy(job):
    from ckptstore import native

    specs = specs_of(job)
    options = native.CopyOptions(**job["options"])
    os.mkdir(job["destination"])
    return here(lambda: native.copy_files(job["source"], job["destination"], specs, options=options))


def digest(job):
    from ckptstore import native

    specs = specs_of(job)
    found = {}
    usage = here(lambda: found.update(native.digest_files(job["source"], specs, **job["options"])))
    bad = [name for name, one in found.items() if isinstance(one, Exception)]
    if bad:
        sys.exit(f"wrong: {bad[:3]}")
    return usage


def copytree(job):
    def run():
        shutil.copytree(job["source"], job["destination"])
        if job["sync"]:
            os.sync()

    return here(run)


def stall(job):
    import stalls

    seconds, cpu_s, _ = stalls.measure(job, here)
    return seconds, cpu_s, peak_bytes()  # that of the whole save


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    jobs = {"shell": lambda: shell(job["command"]), "copy": lambda: copy(job), "digest": lambda: digest(job)}
    jobs |= {"copytree": lambda: copytree(job), "stall": lambda: stall(job)}
    seconds, cpu_s, peak = jobs[job["do"]]()
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
