"""Mirror: each finished checkpoint in an object store too, so that a machine that loses its disk loses none.

What a run has that is finished: of AReaL its exports, and the slots that `watch` or the trainer's shim adopted; of a store of
steps every COMMITTED step. An adopted step goes to `URL/default/.ckptstore/adopted/globalstep{N}/{part}/`, its recover_info
beside the parts; all else under the names that it has here. `list --run URL` shows each once all of it is COMMITTED, and
`setup --from URL` and `pull` take it. Nothing is ever removed there, and a run that is mirrored keeps here what is not safe
there yet (mirrored.py).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from ckptstore import choose, left, native, parallel, places
from ckptstore.backends import Bandwidth, is_url, normal_url, open_backend, tries
from ckptstore.backends.base import Backend
from ckptstore.errors import AlreadyExistsError, CkptStoreError, IntegrityError, NotFoundError, UsageError
from ckptstore.frameworks.areal import layout
from ckptstore.listing import MIRROR, Listing, mirror_of, scan
from ckptstore.model import Checkpoint, FileInfo, Status
from ckptstore.parts import find_manifest, folder_of, read_part
from ckptstore.transfer import conditions, mirrored
from ckptstore.transfer.mirrored import Lag, Record, finished
from ckptstore.transfer.push import Sent, push
from ckptstore.verify import Notify

log = logging.getLogger(__name__)

POLL_S = 5.0
LOOK_S = 5.0  #: between two looks, while an old step is sent, whether a newer one is there
LONGEST_PAUSE_S = 300.0  #: after an error, until the next try
NICENESS = 10  #: below the trainer's own threads


def mirror(
    backend: Backend,
    url: str,
    *,
    bandwidth: Bandwidth | None = None,
    between: Callable[[], object] = lambda: None,
    notify: Notify | None = None,
) -> list[Sent]:
    """Push each finished checkpoint of the local run `backend` that is not in the run at `url` yet; what was sent. Thread-safe.

    One at a time, the newest first (choose.newest_first), also one that was saved while another was sent: the machine may
    be gone before all are there. An old one that is being sent gives way to it where its parts stay (docs/decisions/0019).
    Errors as push's: what was not sent this time is sent the next. AlreadyExistsError, after all others were sent, where the
    same step of another history is there, before a rollback: nothing is replaced; IntegrityError, likewise, for a checkpoint
    that is damaged here. `between` is called before each look at what comes next.
    """
    return list(_mirror(backend, url, bandwidth=bandwidth, between=between, notify=notify))


def _mirror(
    backend: Backend, url: str, *, bandwidth: Bandwidth | None, between: Callable[[], object], notify: Notify | None
) -> Iterator[Sent]:
    url = normal_url(url)
    listing = scan(backend)
    if listing.framework == "areal" and not (listing.checkpoints or listing.adopted or listing.slot or listing.recover_info):
        return  # nothing has been saved yet: of what kind the run is, and so where its side folder lies, is not known
    side = places.side_of(backend.location)
    record = _begun(side, url)
    problem: CkptStoreError | None = None
    try:
        record = _carry_left(listing, url, record, bandwidth)
        here = finished(listing)
        there = _committed_at(url, bandwidth)
        known = {mirrored.name_of(checkpoint): checkpoint.mark for checkpoint in here if record.holds(checkpoint)}
        still = {name: mark for name, mark in known.items() if name in there}
        steps = [checkpoint.step for checkpoint in there.values()]
        record = dataclasses.replace(record, safe=still, newest_step=max([-1, *steps]))
        record = dataclasses.replace(record, present_step=mirrored.newest_safe(record, here, there=steps))
        tried: set[tuple[str, str]] = set()
        run = listing.run.path
        queue = _queue(run, here, record, tried)
        while queue:
            checkpoint = queue.pop(0)
            name = mirrored.name_of(checkpoint)
            mark = (name, checkpoint.mark)

            def overtaken(record: Record = record, mark: tuple[str, str] = mark) -> bool:
                between()
                ahead = _queue(run, finished(scan(backend)), record, tried - {mark})
                return bool(ahead) and mirrored.name_of(ahead[0]) != mark[0]

            told = notify
            if name != mirrored.name_of(choose.newest_first(run, here)[0]):
                told = _giving_way(open_backend(url, bandwidth=bandwidth), overtaken, notify)
            tried.add(mark)
            try:
                if not _is_same(backend, checkpoint, there.get(name)):
                    yield from _push(backend, url, checkpoint, bandwidth=bandwidth, notify=told)
                    between()
                    here = finished(scan(backend))
                    queue = _queue(run, here, record, tried)
            except _OvertakenError:
                tried.discard(mark)
                here = finished(scan(backend))
                queue = _queue(run, here, record, tried)
                continue
            except (AlreadyExistsError, IntegrityError) as error:  # of this one alone: the others shall not wait for it
                problem = problem or error
                continue
            safe = {**record.safe, name: checkpoint.mark}
            record = dataclasses.replace(record, safe=safe, newest_step=max(record.newest_step, checkpoint.step))
            record = dataclasses.replace(record, present_step=mirrored.newest_safe(record, here))
            mirrored.write(side, record)
        if problem is not None:
            raise problem
    except CkptStoreError as error:
        mirrored.write(side, dataclasses.replace(record, looked_at_s=time.time(), problem=str(error)[:500]))
        raise
    mirrored.write(side, dataclasses.replace(record, looked_at_s=time.time(), problem=""))


def _carry_left(listing: Listing, url: str, record: Record, bandwidth: Bandwidth | None) -> Record:
    """Put what training has left there as it is here, where that has changed: who resumes from there shall not return to it."""
    mark = left.digest(listing.left)
    if mark == record.left or listing.doubt:
        return record
    place = layout.SIDE if listing.framework == "steps" else MIRROR
    open_backend(url, bandwidth=bandwidth).put(f"{place}/{left.NAME}", left.to_bytes(listing.left))
    return dataclasses.replace(record, left=mark)


def _queue(run: str, here: Iterable[Checkpoint], record: Record, tried: Collection[tuple[str, str]]) -> list[Checkpoint]:
    """What of a run is to be sent, the first to be sent first."""
    waiting = [checkpoint for checkpoint in here if not record.holds(checkpoint)]
    untried = [c for c in waiting if (mirrored.name_of(c), c.mark) not in tried]
    return choose.newest_first(run, untried)


class _OvertakenError(CkptStoreError):
    """Another checkpoint shall be sent before the one that is being sent."""


def _giving_way(target: Backend, overtaken: Callable[[], bool], notify: Notify | None) -> Notify:
    """`notify` for a push that ends when it is `overtaken`, where what it has sent stays (docs/decisions/0019)."""
    due_s = time.monotonic() + LOOK_S
    stays: bool | None = None

    def told(doing: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal due_s, stays
        if notify is not None:
            notify(doing, done_bytes, total_bytes)
        if time.monotonic() < due_s or stays is False:
            return
        if stays is None:
            stays = conditions.find_uploads(target)[0] is not None
        if stays and overtaken():
            raise _OvertakenError("a newer checkpoint goes first")
        due_s = time.monotonic() + LOOK_S

    return told


def is_safe(backend: Backend, url: str) -> bool:
    """Whether `mirror` would have nothing to do, as far as can be told without a request."""
    record = _record(backend, url)
    try:
        listing = scan(backend)
    except NotFoundError:
        return True  # the trainer has not begun
    here = finished(listing)
    if record is None:
        return not here
    carried = bool(listing.doubt) or record.left == left.digest(listing.left)
    return bool(record.looked_at_s) and not record.problem and carried and all(record.holds(checkpoint) for checkpoint in here)


def _record(backend: Backend, url: str) -> Record | None:
    record = mirrored.read(places.side_of(backend.location))
    return record if record is not None and record.url == url else None


def _finished(backend: Backend) -> list[Checkpoint]:
    try:
        return finished(scan(backend))
    except NotFoundError:
        return []  # the trainer has not begun


class Mirror:
    """Mirrors a run in the background, while training goes on: a context manager, or `close` ends it.

    One checkpoint at a time, its threads at a low priority. An error is logged and in `lag`, and tried again with growing
    pauses; it never comes to the trainer. Thread-safe.
    """

    def __init__(self, backend: Backend, url: str, *, bandwidth: Bandwidth | None = None) -> None:
        if not backend.is_folder:
            raise UsageError(f"{backend.location} is no folder of this machine", hint="A mirror goes from a folder to a URL.")
        if not is_url(url):
            raise UsageError(f"a mirror goes to a URL, and {url} is none", hint="Say s3://BUCKET/PREFIX.")
        self._backend, self._url, self._bandwidth = backend, normal_url(url), bandwidth
        open_backend(self._url)  # what no try will ever open is no mirror: it would keep everything here for ever
        self._ended, self._wake = threading.Event(), threading.Event()
        self._stuck: frozenset[str] = frozenset()  # marks of what the last pass has tried in vain, all others being safe
        self._thread = threading.Thread(target=self._run, name="ckptstore-mirror", daemon=True)
        self._thread.start()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Whoever pressed Ctrl-C does not wait for a request that no store answers.
        self._end(parallel.PATIENCE_S if kind is not None and issubclass(kind, KeyboardInterrupt) else None)

    @property
    def lag(self) -> Lag:
        """How far it is behind, by what is on the disk now."""
        return mirrored.lag(self._record or Record(self._url), self._finished())

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all that is finished now is safe there; whether it is.

        False also where it never will be: one is refused there, or damaged here (`lag.problem`), and all others are safe.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._stuck = frozenset()  # it may fare better now
        wake_s = time.monotonic()
        while waiting := self._waiting():
            if time.monotonic() >= wake_s:  # sooner than after an error's pause, and no more often than ever
                self._wake.set()
                wake_s += POLL_S
            given_up = deadline is not None and time.monotonic() > deadline
            if given_up or waiting <= self._stuck or not self._thread.is_alive():
                return False
            time.sleep(0.1)
        return True

    def close(self) -> None:
        """End it within seconds, a request that is not answered left out; what is half sent is gone on with the next time."""
        self._end(None)

    def _end(self, patience_s: float | None) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        native.be_nice(NICENESS)
        pause_s = POLL_S
        while not self._ended.is_set():
            tried = self._waiting()
            try:
                if not is_safe(self._backend, self._url):
                    with tries.until(self._ended):
                        mirror(self._backend, self._url, bandwidth=self._bandwidth, notify=self._notify)
                pause_s = POLL_S
                self._stuck = frozenset()
            except parallel.Stopped:
                return
            except CkptStoreError as error:
                if self._ended.is_set():
                    return
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                said = f"{error}. {error.hint}" if error.hint else error
                log.warning("ckptstore: not mirrored to %s (tried again in %.0f s): %s", self._url, pause_s, said)
                alone = isinstance(error, (AlreadyExistsError, IntegrityError))  # all others were sent
                self._stuck = tried & self._waiting() if alone else frozenset()
            self._pause(pause_s)

    def _pause(self, pause_s: float) -> None:
        """Until the next pass; what is stuck does not keep waiting what was saved since."""
        deadline = time.monotonic() + pause_s
        while (left_s := deadline - time.monotonic()) > 0 and not self._wake.wait(min(left_s, POLL_S)):
            if self._stuck and self._waiting() - self._stuck:
                break
        self._wake.clear()

    @property
    def _record(self) -> Record | None:
        return _record(self._backend, self._url)

    def _finished(self) -> list[Checkpoint]:
        return _finished(self._backend)

    def _waiting(self) -> frozenset[str]:
        """Marks of what is finished here, and not safe there."""
        record = self._record or Record(self._url)
        return frozenset(checkpoint.mark for checkpoint in self._finished() if not record.holds(checkpoint))

    def _notify(self, doing: str, done_bytes: int, total_bytes: int) -> None:
        if self._ended.is_set():
            raise parallel.Stopped("the mirror was closed")


def _begun(side: str, url: str) -> Record:
    """The record of this mirror: an empty one where there was none, or another URL's."""
    record = mirrored.read(side)
    if record is None or record.url != url:
        record = Record(url)
        mirrored.write(side, record)
    return record


def _push(
    backend: Backend, url: str, checkpoint: Checkpoint, *, bandwidth: Bandwidth | None, notify: Notify | None
) -> Sequence[Sent]:
    if not checkpoint.store:
        return push(backend, checkpoint, open_backend(url, bandwidth=bandwidth), notify=notify)
    store = open_backend(checkpoint.store)
    target = open_backend(mirror_of(url, checkpoint.step), bandwidth=bandwidth)
    return push(store, _with_info(store, checkpoint), target, notify=notify)


def _committed_at(url: str, bandwidth: Bandwidth | None) -> Mapping[str, Checkpoint]:
    """What is COMMITTED there, by name."""
    try:
        listing = scan(open_backend(url, bandwidth=bandwidth))
    except NotFoundError:
        return {}  # nothing has been pushed there yet
    found = (*listing.checkpoints, *listing.adopted)
    return {mirrored.name_of(checkpoint): checkpoint for checkpoint in found if checkpoint.status is Status.COMMITTED}


def _is_same(backend: Backend, here: Checkpoint, there: Checkpoint | None) -> bool:
    """Whether an adopted step is there, with the same content; of all others a push finds it out."""
    if there is None or not there.store:
        return False
    content = _content(backend, here)
    return content is not None and content == _content(backend, there)


def _content(backend: Backend, checkpoint: Checkpoint) -> list[str] | None:
    store = open_backend(checkpoint.store) if checkpoint.store else backend
    manifests = [find_manifest(store, folder_of(store, part)) for part in checkpoint.parts]
    known = [manifest.content for manifest in manifests if manifest is not None]
    return known if len(known) == len(manifests) else None


def _with_info(store: Backend, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its recover_info as one more part: whoever resumes from it needs that too."""

    def signs(files: Sequence[FileInfo], *, sealed: bool) -> layout.Signs:
        return layout.Signs("files", (), ())  # no model is missed in it

    info = read_part(store, layout.RECOVER_INFO, layout.RECOVER_INFO, store.tree(max_depth=5), read_signs=signs)
    return dataclasses.replace(checkpoint, parts=(*checkpoint.parts, info))
