"""Power cuts, replayed: what ext4 sends to a disk is logged, and each state that a cut could have left is mounted and judged.

A disk keeps what was flushed; of what was written since the last flush it may have kept any part. So for every write in the
log there is the state with all up to it, the one with nothing since the last flush, and some with a random part of that.
qemu-storage-daemon logs the writes (the format of dm-log-writes) below a loop device. Needs root, loop devices and FUSE.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SECTOR_BYTES = 512
PIECE_BYTES = 4096  # a write larger than that may be torn
IMAGE_BYTES = 48 << 20
DISCARD, FLUSH = 4, 1
TOOLS = ("qemu-storage-daemon", "losetup", "mount", "umount", "mkfs.ext4", "cp")
STOP_S = 20.0


def why_not() -> str:
    """Why power cuts cannot be replayed here; empty if they can."""
    if os.geteuid() != 0:
        return "replaying power cuts needs root (loop devices)"
    if not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        return "no /dev/fuse or no /dev/loop-control"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"missing {', '.join(missing)} (apt-get install qemu-system-common e2fsprogs)" if missing else ""


#: Of a module of tests that replay power cuts.
MARKS = [
    pytest.mark.root,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def measure(about: str, head: str, names: Sequence[str], campaign: Callable[[str, int], tuple[Any, Mapping[str, int]]]) -> int:
    """The command line of a table: `campaign` gives a name's result, with so many random parts, and what was seen how often."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--parts", type=int, default=3, help="random parts of what was not flushed, after each write")
    parser.add_argument("names", nargs="*", choices=[*names, []], help="all by default")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    warnings.simplefilter("ignore")
    logging.disable()  # torch logs each load that fails
    print(head, flush=True)
    for name in options.names or names:
        result, seen = campaign(name, options.parts)
        print(result.row(), flush=True)
        print(f"{name}: {dict(seen)}; {result.examples[:3]}", file=sys.stderr)
    return 0


class Write(NamedTuple):
    """One write; a flush has no data."""

    offset: int
    data: bytes


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def make_image(path: Path) -> None:
    """An empty ext4 in a file: everything initialised now, so that no kernel thread writes later."""
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """The file system of an image, or of a device's file."""
    folder.mkdir(exist_ok=True)
    loop = run("losetup", "-f", "--show", image)
    try:
        run("mount", "-t", "ext4", loop, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
    finally:
        run("losetup", "-d", loop)


@dataclass
class Recording:
    """What was written to a disk that began as `image`. `returned`: how many of `log` were written when the call came back.

    Or had given its word: what was to be durable by then must be there in each state from there on.
    """

    image: Path
    log: list[Write]
    returned: int


def written(room: Path) -> int:
    """How many entries the log of a recording has by now."""
    return len(read_log((room / "log").read_bytes()))


def record(image: Path, room: Path, act: Callable[[Path], None]) -> Recording:
    """Log what `act`, given the mounted folder, writes; afterwards an unrelated file is synced there, as life goes on.

    `image` stays as it is.
    """
    disk, log, export, pid = (room / name for name in ("disk", "log", "export", "pid"))
    run("cp", "--sparse=always", image, disk)
    for path in (log, export):
        path.write_bytes(b"")
    run(
        "qemu-storage-daemon", "--daemonize", "--pidfile", pid,
        "--blockdev", f"driver=file,node-name=disk,filename={disk}",
        "--blockdev", f"driver=file,node-name=log,filename={log}",
        "--blockdev", f"driver=blklogwrites,node-name=logged,file=disk,log=log,log-sector-size={SECTOR_BYTES}",
        "--export", f"type=fuse,id=export,node-name=logged,mountpoint={export},writable=on",
    )  # fmt: skip
    try:
        with mounted(export, room / "recorded") as folder:
            act(folder)
            returned = written(room)
            with (folder / "unrelated").open("wb") as file:
                file.write(b"x" * 5000)
                file.flush()
                os.fsync(file.fileno())
    finally:
        stop(int(pid.read_text()))
    return Recording(image, read_log(log.read_bytes()), returned)


def stop(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        assert select.select([descriptor], [], [], STOP_S)[0], "qemu-storage-daemon does not end"
    finally:
        os.close(descriptor)


def read_log(data: bytes) -> list[Write]:
    """The entries of a log of writes: a superblock, then for each a sector of header and the data."""
    entries = []
    at = SECTOR_BYTES
    while at + SECTOR_BYTES <= len(data):
        sector, sectors, flags, _ = struct.unpack_from("<4Q", data, at)
        if not (sector or sectors or flags):
            break
        assert not flags & DISCARD, "a discard: mount without"
        at += SECTOR_BYTES
        size = sectors * SECTOR_BYTES
        if size:
            entries.append(Write(sector * SECTOR_BYTES, data[at : at + size]))
        if flags & FLUSH:
            entries.append(Write(0, b""))
        at += size
    return entries


def pieces(write: Write) -> list[Write]:
    steps = range(0, len(write.data), PIECE_BYTES)
    return [Write(write.offset + begin, write.data[begin : begin + PIECE_BYTES]) for begin in steps]


class State(NamedTuple):
    """What the disk may hold after a cut."""

    image: Path  #: overwritten by the next
    cut: int  #: so many entries of the log were sent to the disk
    returned: bool  #: whether the call had come back by then
    name: str


def replay(recording: Recording, room: Path, *, parts: int, chance: random.Random) -> Iterator[State]:
    """Each state once. `parts`: after each write, so many random parts of what was not flushed."""
    flushed, image = room / "flushed", room / "state"
    run("cp", "--sparse=always", recording.image, flushed)
    pending: list[Write] = []
    seen: set[tuple[int, bool]] = set()  # states with nothing pending, by how much was flushed
    flushes = 0
    for cut in range(len(recording.log) + 1):
        if cut and recording.log[cut - 1].data:
            pending.append(recording.log[cut - 1])
        elif pending:
            apply(flushed, pending)
            pending = []
            flushes += 1
        returned = cut >= recording.returned
        choices: list[tuple[str, list[Write]]] = []
        if (not pending or cut == recording.returned) and (flushes, returned) not in seen:
            seen.add((flushes, returned))
            choices.append(("what was flushed", []))
        if pending and recording.log[cut - 1].data:
            choices.append(("all", pending))
            small = [piece for write in pending for piece in pieces(write)]
            for number in range(parts):
                share = chance.choice((0.1, 0.5, 0.9))
                choices.append((f"random part {number}", [piece for piece in small if chance.random() < share]))
        for name, chosen in choices:
            run("cp", "--sparse=always", flushed, image)
            apply(image, chosen)
            yield State(image, cut, returned, f"after {cut} of {len(recording.log)} writes and flushes, {name}")


def apply(image: Path, writes: list[Write]) -> None:
    with image.open("r+b") as file:
        for write in writes:
            file.seek(write.offset)
            file.write(write.data)
