"""The processes of one launch meet through files in the side folder of a run, and learn when one of them fails or dies.

    {side}/ranks.json                    the launch's leader, and which folder below is its
    {side}/ranks-<random>/alive-R        rank R beats here, and says how far it is
                          roster         who takes part: from now on nobody may miss
                          NAME           what the leader tells the others, or a rank the leader
                          failed-R       why rank R ended: so all end

Rank 0 leads. A node whose local rank 0 sees no sign of it for JOIN_S has a disk of its own, and is led by that rank: each
disk's ranks make one group. A member that dies on this machine is missed within a second, one on another machine STALE_S
after its last sign. torch is not needed: RANK, WORLD_SIZE, … are read as torchrun sets them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ckptstore import parallel, places
from ckptstore import side as side_folders
from ckptstore.errors import CkptStoreError, RankError, from_os_error
from ckptstore.untrusted import open_regular

#: All ranks of a machine must have come by then. Launchers start them within seconds.
MEET_S = 60.0
#: So long ranks of other machines are waited for: who has not come by then has another disk.
JOIN_S = 15.0
STALE_S = 30.0
BEAT_S = 0.5
POLL_S = 0.05
POINTER = "ranks.json"
PREFIX = "ranks-"
MAX_BYTES = 1 << 30  #: a plan names every chunk of a part


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher tells a process. `name` is the same for all of one launch, and another for the next."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    name: str

    @property
    def neighbours(self) -> range:
        """The ranks of this machine."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)


def launch() -> Launch | None:
    """The launch that this process is one of several of, by torchrun's variables; None where it is alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    numbers = [os.environ.get(name, "") for name in names]
    if not all(number.isdigit() for number in numbers):
        return None
    rank, world_size, local_rank, local_world_size = map(int, numbers)
    if not (local_rank <= rank < world_size and local_rank < local_world_size <= world_size and world_size > 1):
        return None
    words = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    name = " ".join([numbers[1], *(os.environ.get(word, "") for word in words)])
    return Launch(rank, world_size, local_rank, local_world_size, name)


class Rendezvous:
    """A context manager: entered, all members have met; left with an error, all others end with a RankError too.

    `tell`, `wait` and `check` may be called from one thread at a time. RankError where somebody does not come in time.
    """

    def __init__(self, run: str, launch: Launch) -> None:
        self.run, self._launch = os.path.abspath(run), launch
        self.rank = launch.rank
        self.leads = launch.rank == 0
        self.members: list[int] = []
        self.progress = (0, 0)  #: what to tell others: the number of this rank's job, and bytes done of it
        self._leader = 0
        self._folder = ""
        self._me = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._checked_s = 0.0
        self._summed = (0.0, 0)
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="ckptstore-rank", daemon=True)

    @property
    def side(self) -> str:
        """The run's side folder: known for certain once the leader has made the run's own."""
        return places.side_of(self.run)

    @property
    def neighbours(self) -> int:
        """How many ranks run on this machine."""
        return self._launch.local_world_size

    @property
    def index(self) -> int:
        """The place of this rank among the members."""
        return self.members.index(self.rank)

    @property
    def size(self) -> int:
        """How many take part."""
        return len(self.members)

    def __enter__(self) -> Rendezvous:
        try:
            self._meet()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                self._part()
            except BaseException as late:
                self._end(late)
                raise
        self._end(error)

    def tell(self, name: str, document: Any) -> None:
        """Put `document` where `wait(name)` of the others finds it, whole."""
        self._write(name, document)

    def wait(self, name: str, *, tick: Callable[[], None] | None = None) -> Any:
        """What was told under `name`, as soon as it is. RankError when a member fails or dies before."""
        return self.wait_any(name, tick=tick)

    def wait_any(self, *names: str, tick: Callable[[], None] | None = None) -> Any:
        """What was told under the first of `names` that is."""
        while True:
            for name in names:
                if (found := self._read(name)) is not None:
                    return found
            self.check()
            if tick is not None:
                tick()
            time.sleep(POLL_S)

    def others_bytes(self, job: int) -> int:
        """How much of a job the others say that they have done, in all. Read about once in BEAT_S."""
        now = time.monotonic()
        if now - self._summed[0] >= BEAT_S:
            beats = [self._read(f"alive-{rank}") or {} for rank in self.members if rank != self.rank]
            told = [beat.get("progress", (0, 0)) for beat in beats]
            self._summed = (now, sum(done for number, done in told if number == job))
        return self._summed[1]

    def check(self) -> None:
        """RankError when a member has failed or died. Cheap: it looks about once in BEAT_S."""
        now = time.monotonic()
        if now - self._checked_s < BEAT_S:
            return
        self._checked_s = now
        # The leader looks at all, the others at the leader: what ends one ends it, and so them.
        for rank in self.members if self.leads else [self._leader]:
            if rank != self.rank and (problem := self._problem(rank, now)) and (problem := self._problem(rank, now)):
                raise RankError(problem, rank=rank, hint="The same command goes on with what has arrived.")

    def _problem(self, rank: int, now: float) -> str:
        """What is wrong with a rank. To be asked twice: between two of these looks it may have ended as it should."""
        beat = self._read(f"alive-{rank}")
        failed = self._read(f"failed-{rank}")
        if failed is not None:
            return f"rank {rank} failed: {failed.get('why', 'it did not say why')}"
        if self._read(f"bye-{rank}") is not None:
            return ""
        if self._has_ended():
            return f"rank {rank}, which led, has ended before this one"
        before, since = self._seen.get(rank, (None, now))
        if beat != before or rank not in self._seen:
            self._seen[rank] = (beat, now)
            since = now
        if beat is not None and not _lives(beat):
            return f"rank {rank} died: its process is gone"
        return f"rank {rank} died: no sign of it for {STALE_S:.0f} s" if now - since > STALE_S else ""

    def _meet(self) -> None:
        deadline = time.monotonic() + MEET_S
        if self._launch.rank and self._launch.local_rank == 0:
            self.leads = not self._follow(time.monotonic() + JOIN_S)
        elif self._launch.rank and not self._follow(deadline + JOIN_S):
            raise RankError(f"rank {self.rank} saw no sign of rank 0 in {self.side} for {MEET_S + JOIN_S:.0f} s", rank=0)
        if self.leads:
            self._lead(deadline)

    def _lead(self, deadline: float) -> None:
        try:
            os.makedirs(self.run, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, doing="creating", path=self.run) from error
        side_folders.make_side(self.side)
        for name in side_folders.leftovers(self.side):
            if name.startswith(PREFIX) and not self._is_lively(name):
                side_folders.discard(self.side, name)
        self._leader = self.rank
        self._folder = os.path.join(self.side, f"{PREFIX}{secrets.token_hex(8)}")
        try:
            os.mkdir(self._folder, 0o755)
        except OSError as error:
            raise from_os_error(error, doing="creating", path=self._folder) from error
        parallel.start(self._heart)
        self._write(f"alive-{self.rank}", self._state(0))
        pointer = {"launch": self._launch.name, "folder": os.path.basename(self._folder), "rank": self.rank, **self._me}
        _write_file(os.path.join(self.side, POINTER), pointer)
        join_until = time.monotonic() + JOIN_S
        while True:
            present = [rank for rank in range(self._launch.world_size) if self._read(f"alive-{rank}") is not None]
            missing = [rank for rank in self._launch.neighbours if rank not in present]
            now = time.monotonic()
            if len(present) == self._launch.world_size or (not missing and now > join_until):
                break
            if now > deadline:
                raise RankError(
                    f"rank {missing[0]} of this machine did not come within {MEET_S:.0f} s (WORLD_SIZE is "
                    f"{self._launch.world_size})",
                    rank=missing[0],
                    hint="For one process inside of a training: run it without WORLD_SIZE and RANK in its environment.",
                )
            time.sleep(POLL_S)
        self.members = present
        self._write("roster", present)

    def _follow(self, deadline: float) -> bool:
        """Join the group of a leader that lives; whether there was one by the deadline."""
        beats: dict[str, Any] = {}
        while time.monotonic() < deadline:
            pointer = _read_file(os.path.join(self.side, POINTER))
            if isinstance(pointer, dict) and pointer.get("launch") == self._launch.name:
                folder = os.path.join(self.side, os.path.basename(str(pointer.get("folder"))))
                beat = _read_file(os.path.join(folder, f"alive-{pointer.get('rank')}"))
                # On another machine only a beat that goes on tells a leader from what an earlier launch left.
                moved = beats.setdefault(folder, beat) != beat
                if beat is not None and (_lives(beat) if beat.get("host") == self._me["host"] else moved):
                    self._folder, self._leader = folder, int(pointer["rank"])
                    self._join()
                    return True
            time.sleep(POLL_S)
        return False

    def _join(self) -> None:
        parallel.start(self._heart)
        self._write(f"alive-{self.rank}", self._state(0))
        roster = self.wait("roster")
        if self.rank not in roster:
            raise RankError(f"rank {self.rank} came too late: the others had begun", rank=self.rank)
        self.members = list(roster)

    def _part(self) -> None:
        """All stay until all are through: who fails at the very end fails them all."""
        self._write(f"bye-{self.rank}", {})
        if self.leads:
            for rank in self.members:
                self.wait(f"bye-{rank}")

    def _end(self, error: BaseException | None) -> None:
        self._stop.set()
        if self._heart.ident is not None:
            self._heart.join()
        if not self._folder:
            return
        if error is not None:
            with contextlib.suppress(CkptStoreError, OSError):  # they miss its beat else
                why = str(error) or type(error).__name__
                self._write(f"failed-{self.rank}", {"why": why})
        if self.leads:
            with contextlib.suppress(CkptStoreError, OSError):  # `clean` knows the folder; others may still read why it failed
                pointer = _read_file(os.path.join(self.side, POINTER))
                if isinstance(pointer, dict) and pointer.get("folder") == os.path.basename(self._folder):
                    os.unlink(os.path.join(self.side, POINTER))
                if error is None:
                    side_folders.discard(self.side, os.path.basename(self._folder))

    def _is_lively(self, name: str) -> bool:
        """Whether a folder of a launch has been written to of late, by this machine's clock and its server's."""
        newest = 0.0
        with contextlib.suppress(OSError), os.scandir(os.path.join(self.side, name)) as entries:
            newest = max((entry.stat().st_mtime for entry in entries), default=0.0)
        return time.time() - newest < 2 * STALE_S

    def _has_ended(self) -> bool:
        return not os.path.isdir(self._folder)

    def _state(self, beat: int) -> dict[str, Any]:
        return {**self._me, "beat": beat, "progress": self.progress}

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(CkptStoreError):  # on a full disk the work itself says so
                self._write(f"alive-{self.rank}", self._state(beat))

    def _write(self, name: str, document: Any) -> None:
        _write_file(os.path.join(self._folder, name), document)

    def _read(self, name: str) -> Any:
        return _read_file(os.path.join(self._folder, name))


def _write_file(path: str, document: Any) -> None:
    draft = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(draft, "x", encoding="ascii") as file:
            json.dump(document, file)
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise from_os_error(error, doing="writing", path=path) from error


def _read_file(path: str) -> Any:
    """The document, None where it is not there (yet). Network file systems say ESTALE for one that is just replaced."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def _host() -> str:
    """Names this machine, and the space that its process numbers are of: containers share disks and names."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}"


def _started(pid: int) -> int:
    """When a process of this machine started, in ticks since boot; -1 for one that is gone, or dead and not yet buried."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def _lives(beat: Any) -> bool:
    """Whether the process that wrote `beat` lives, as far as this machine can tell: one elsewhere does."""
    if not isinstance(beat, dict) or beat.get("host") != _host():
        return True
    return type(beat.get("pid")) is int and _started(beat["pid"]) == beat.get("started")
