"""Python processes that begin with torch imported: an import takes seconds of a core, a fork of a process that has it none.

multiprocessing's fork server has imported it, and is forked for each. Otherwise they are as any other: with a pid, output and
an environment of their own. Only what is registered with `atexit` is not done at their end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection

_forks = multiprocessing.get_context("forkserver")
#: The last is what torch imports when a model is sharded.
_forks.set_forkserver_preload(["torch.distributed.checkpoint", "ckptstore.torch", "tests.store_ranks", "torch._dynamo"])


class Python:
    """`python -m MODULE …`, `python -c CODE …` or `python SCRIPT …`, until `finish` or `kill`, or the end of the tests."""

    def __init__(self, *words: object, env: Mapping[str, str] | None = None) -> None:
        reading, writing = _forks.Pipe(duplex=False)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        errors = Connection(os.dup(self._errors.fileno()))
        environment = dict(os.environ if env is None else env)
        self._process = _forks.Process(target=_run, args=(list(map(str, words)), environment, writing, errors), daemon=True)
        self._process.start()
        self.pid = int(self._process.pid or 0)
        self._ended = False
        writing.close()
        errors.close()
        self.stdout = open(os.dup(reading.fileno()), encoding="utf-8")  # noqa: SIM115
        reading.close()

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, the negative of a signal; subprocess.TimeoutExpired."""
        self._process.join(timeout_s)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout_s or 0)
        self._ended = True
        return code

    def finish(self, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """What became of it; killed, with subprocess.TimeoutExpired, where it takes longer. Its output must fit a pipe."""
        try:
            code = self.wait(timeout_s)
            self._errors.seek(0)
            return subprocess.CompletedProcess((), code, self.stdout.read(), self._errors.read())
        finally:
            self.kill()

    def send_signal(self, number: int) -> None:
        """On any thread; nothing where it has ended. Only `wait` asks what became of it: of two, one gets it."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """If it still runs; what it said can be read no more."""
        self._process.kill()
        self._process.join()
        self.stdout.close()
        self._errors.close()


def _run(words: list[str], environment: dict[str, str], output: Connection, errors: Connection) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    output.close()
    errors.close()
    # Those that were inherited believe to be what the fork server's were: a file, say, that can be sought in.
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False, buffering=1) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    kind, *sys.argv = words
    if kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(sys.argv[0], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")
