"""Ctrl-C at every line of a save: the store holds the old step or the new one, nothing is left that cannot be removed while
the process lives on, and the next save works.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import linecache
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ckptstore
from ckptstore import CheckpointStore, Keep
from ckptstore.errors import BusyError
from ckptstore.lock import RunLock
from ckptstore.saves import background, owner, steps

torch = pytest.importorskip("torch")
ckpt = pytest.importorskip("ckptstore.torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]
HOME = os.path.dirname(ckptstore.__file__) + os.sep
LARGE = 5 << 20  #: items; more than `max_host_bytes`


def state(number: int, items: int = 50) -> dict[str, Any]:
    return {"model": {"w": torch.full((items,), float(number))}, "n": number}


WAYS: dict[str, Callable[[CheckpointStore, Path], object]] = {
    "save": lambda store, source: ckpt.save(store, 1, state(2)),
    "another step": lambda store, source: ckpt.save(store, 2, state(2), keep=Keep(last=1)),
    "async": lambda store, source: ckpt.save_async(store, 1, state(2)).wait(30),
    "waves": lambda store, source: ckpt.save_async(store, 1, state(2, LARGE), max_host_bytes=16 << 20).wait(30),
    "folder": lambda store, source: store.save(1, source),
    "dcp": lambda store, source: dcp.save(state(2)["model"], storage_writer=ckpt.StoreWriter(store, 2), no_dist=True),
}


def _leaves_a_with(frame: FrameType) -> bool:
    """Whether the line is that of a `with` whose __exit__ comes next: traced, but no signal is handled there."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    return line.startswith("with ") and dis.opname[frame.f_code.co_code[frame.f_lasti]] == "LOAD_CONST"


class Lines:
    """Counts the lines of ours that this thread executes, and presses Ctrl-C before the n-th."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.seen: list[str] = []
        self._pressed = False

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(HOME) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.seen.append(f"{frame.f_code.co_filename.removeprefix(HOME)}:{frame.f_lineno}")
            if 0 < self.stop_at <= len(self.seen) and not self._pressed and not _leaves_a_with(frame):
                self._pressed = True
                raise KeyboardInterrupt
        return self._line

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def pressed(way: str, store: CheckpointStore, source: Path, stop_at: int) -> list[str]:
    """Save so, interrupted before that line of ours; what was executed."""
    lines = Lines(stop_at)
    # torch's own holds it. In a finalizer nobody hears it.
    with contextlib.suppress(KeyboardInterrupt, CheckpointException), lines:
        WAYS[way](store, source)
    return lines.seen


def look(store: CheckpointStore, at: str) -> None:
    began = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # the save's own
        ckptstore.wait_all(30)
    for line in list(background._lines.values()):  # also one that was not noted any more
        line.pool.submit(int).result(30)
    try:
        with RunLock(steps.side_of(store.folder), "the test"):
            pass
    except BusyError:  # pressed in its __exit__: the traceback held it, and is in a cycle
        gc.collect()
        with RunLock(steps.side_of(store.folder), "the test"):
            pass
    found = {checkpoint.step: checkpoint for checkpoint in store.list()}
    assert found, at
    assert found.keys() <= {1, 2}, at
    assert all(checkpoint.status.usable and store.verify(step).ok for step, checkpoint in found.items()), (at, found)
    if (number := found.get(1)) is not None and number.parts[0].format == "state":
        assert ckpt.load(store, 1)["n"] in (1, 2), at
    for _ in range(2):
        for name in steps.leftovers(store.folder):
            steps.side_folders.discard(steps.side_of(store.folder), name)
        left = {name.partition("-")[0] for name in os.listdir(steps.side_of(store.folder))}
        if not (left := left & {"save", "new", "trash", "aside"}):
            break
        gc.collect()  # torch's exception has the writer, and is in a cycle
    assert not left, at
    ckpt.save(store, 3, state(3))
    assert ckpt.load(store, 3)["n"] == 3
    assert time.monotonic() - began < 20, at


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], list[str]]]:
    """Calls that save in some way into a store of step 1, are interrupted at some line (0: nowhere), and look at it then."""
    monkeypatch.setattr(owner, "_NEWBORN_S", -1.0)
    monkeypatch.setattr(steps, "LOCK_PATIENCE_S", 1.0)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # hundreds of saves, each durable
    root = Path(tempfile.mkdtemp(dir=memory, prefix="ckptstore-tests-"))
    source = root / "source"
    source.mkdir()
    (source / "file").write_bytes(b"2" * 100)
    made = 0

    def attempt(way: str, stop_at: int) -> list[str]:
        nonlocal made
        made += 1
        store = CheckpointStore(root / f"store{made}")
        ckpt.save(store, 1, state(1))
        seen = pressed(way, store, source, stop_at)
        look(store, f"{way}, line {stop_at}: {seen[-1]}")
        shutil.rmtree(store.folder)
        return seen

    yield attempt
    shutil.rmtree(root)


@pytest.mark.parametrize("way", WAYS)
def test_now_and_then(attempts: Callable[[str, int], list[str]], way: str) -> None:
    seen = attempts(way, 0)
    for stop_at in range(7, len(seen), len(seen) // 5):
        attempts(way, stop_at)


def test_at_each_line_that_locks(attempts: Callable[[str, int], list[str]]) -> None:
    """What is held then must not stay so: every later save would wait for it."""
    seen = attempts("another step", 0)
    for at in sorted({seen.index(line) for line in seen if line.startswith(("lock.py", "saves/owner.py"))}):
        attempts("another step", at + 1)


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_at_every_line(attempts: Callable[[str, int], list[str]], way: str) -> None:
    """The number of lines differs from run to run, with threads: until none is interrupted."""
    stop_at = 1
    while len(attempts(way, stop_at)) >= stop_at:
        stop_at += 1
