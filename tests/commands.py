"""Ways to run the command line: in this process, in one of its own, and on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptstore.cli import run as run_cli

ESCAPE = "\x1b"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
COMMAND = (sys.executable, "-m", "ckptstore.recover")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path, user: str = "alice") -> None:
    """As `user` in `folder`, with none of the variables that this machine may have set."""
    for name in ("CKPTSTORE_FILEROOT", "NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", user)
    monkeypatch.chdir(folder)


def invoke(capfd: pytest.CaptureFixture[str], *words: object) -> Result:
    """The command line in this process."""
    capfd.readouterr()
    code = run_cli([str(word) for word in words])
    out, err = capfd.readouterr()
    return Result(code, out, err)


def environment(**more: str) -> dict[str, str]:
    """A small environment for a process of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "LOGNAME", "HOME", "PYTHONPATH") if name in os.environ}
    return {**kept, "PYTHONUTF8": "1", **more}


def spawn(*words: object, env: dict[str, str] | None = None, **options: Any) -> Result:
    """The command line in a process of its own, without a terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)],
        env=environment() if env is None else env,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Terminal:
    """A program on a pseudo-terminal: what it shows is read, what a person would type is written."""

    def __init__(self, words: Sequence[object], *, columns: int = 100, env: dict[str, str] | None = None) -> None:
        self.shown = ""
        self._descriptor, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.process = subprocess.Popen(
            [*map(str, words)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment(TERM="xterm-256color") if env is None else env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _read(self, timeout_s: float) -> bool:
        """Take in what was written meanwhile; False at the end."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # EIO: the last holder of the terminal has gone
            return False
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def expect(self, text: str, timeout_s: float = 30) -> None:
        """Read until `text` is shown; AssertionError when the program ends, or takes too long."""
        end = time.monotonic() + timeout_s
        while text not in plain(self.shown):
            assert time.monotonic() < end, f"{text!r} was not shown:\n{self.shown}"
            assert self._read(0.1), f"the program ended before {text!r}:\n{self.shown}"

    def type(self, text: str) -> None:
        """What a person types."""
        os.write(self._descriptor, text.encode())

    def press_ctrl_c(self) -> Result:
        """Until it ends: Python misses one that comes just before it waits for a line."""
        for _ in range(5):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.finish(5)
        return self.finish(5)

    def hang_up(self) -> None:
        """The connection drops: the terminal is gone, and the program gets SIGHUP."""
        os.close(self._descriptor)

    def finish(self, timeout_s: float = 30) -> Result:
        """Read to the end; the exit code, and everything shown."""
        end = time.monotonic() + timeout_s
        while self._read(0.1):
            assert time.monotonic() < end, f"still running:\n{self.shown}"
            if self.process.poll() is not None and not select.select([self._descriptor], [], [], 0)[0]:
                break
        return Result(self.process.wait(timeout_s), self.shown, "")


def plain(text: str) -> str:
    """`text` without colours."""
    return _COLOURS.sub("", text)


def flat(text: str) -> str:
    """`text` without colours and with all white space as one blank: independent of where lines were broken."""
    return " ".join(plain(text).split())


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)


def snapshot(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything below a folder: mode, size, mtime and content; equal before and after something that changes nothing."""
    found = {}
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(root))] = (seen.st_mode, seen.st_size if data else 0, seen.st_mtime_ns, data)
    return found
