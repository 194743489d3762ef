"""Two fake GPUs that do what CUDA may do at the latest, and forgive nothing that it does not.

A copy or a kernel on a stream happens when somebody waits for it, and not before. Memory that nobody holds any more may belong
to another by then, unless the stream is the one that it was made on. Each thread begins on device 0, where its first call would
make a context. What a save or a load does against that is in `Card.faults`, or shows in what was saved.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ckptstore.torch import memory

torch = pytest.importorskip("torch")

CARD = torch.device("cuda", 1)  #: the trainer's
OTHER = torch.device("cuda", 2)  #: where it has tensors too
POISON = 0xA5


def _done() -> None:
    """What was work."""


class Stream:
    """Work in order, done when it is waited for."""

    def __init__(self, device: Any = CARD) -> None:
        self.device = torch.device(device)
        self.work: list[Callable[[], object]] = []
        self.done = 0
        self.lock = threading.RLock()

    def add(self, job: Callable[[], object]) -> None:
        with self.lock:
            self.work.append(job)

    def run(self, until: int) -> None:
        Card.present.check()
        with self.lock:
            while self.done < until:
                self.work[self.done]()
                self.work[self.done] = _done  # what it held is free
                self.done += 1

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        assert event.stream is None or event.stream.device == self.device, "an event belongs to one device"
        event.stream, event.at = self, len(self.work)
        return event

    def wait_event(self, event: Event) -> None:
        stream, at = event.stream, event.at
        if stream is not None:
            self.add(lambda: stream.run(at))

    def synchronize(self) -> None:
        self.run(len(self.work))


class Event:
    def __init__(self, blocking: bool = False) -> None:
        self.stream: Stream | None = None
        self.at = 0

    def synchronize(self) -> None:
        assert self.stream is not None
        Card.present.use(Card.present.device)
        self.stream.run(self.at)


class Memory:
    """A tensor's memory, which others hold or have given back."""

    def __init__(self, tensor: Any) -> None:
        plain = tensor.as_subclass(torch.Tensor)
        self.storage = plain.untyped_storage()  # one object, as long as there is one: who keeps this is counted once
        self._layout = (plain.storage_offset(), plain.shape, plain.stride())
        self._dtype, self._conj = plain.dtype, plain.is_conj()

    @property
    def given_back(self) -> bool:
        return torch._C._storage_Use_Count(self.storage._cdata) <= 1

    def tensor(self) -> Any:
        found = torch.zeros(0, dtype=self._dtype, device="cpu").set_(self.storage, *self._layout)
        return found.conj() if self._conj else found


class OnCard(torch.Tensor):  # type: ignore[misc]
    """A tensor that says that it is on a device."""

    is_cuda = True
    device = CARD

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.copy_ and not isinstance(args[0], OnCard):
            Card.present.copy(args[0], args[1], wait=not kwargs.get("non_blocking"))
            return args[0]
        if function is torch.Tensor.copy_ and not isinstance(args[1], OnCard):
            assert kwargs.get("non_blocking"), "a copy that holds the reader up"
            Card.present.upload(args[0], args[1])
            return args[0]
        if function is torch.Tensor.cpu:
            target = torch.empty(args[0].shape, dtype=args[0].dtype)
            target.copy_(args[0])
            return target
        if function in (torch.Tensor.contiguous, torch.Tensor.resolve_conj, torch.Tensor.resolve_neg):
            return Card.present.made_of(args[0], function)
        return super().__torch_function__(function, kinds, args, kwargs)


class OnOther(OnCard):
    """On the second device."""

    device = OTHER


class Card:
    """torch.cuda, as far as staging uses it. Every thread has its current device, and on each one its current stream."""

    present: Card

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        Card.present = self
        self.faults: list[str] = []
        self.defaults = {CARD: Stream(CARD), OTHER: Stream(OTHER), torch.device("cuda", 0): Stream("cuda:0")}
        self.default = self.defaults[CARD]
        self.local = threading.local()
        self.local.device = CARD
        self.contexts = {CARD, OTHER}
        self.capturing = False
        self.broken = ""  #: what every call says from now on
        self.pinned: dict[int, int] = {}  #: begin → end
        self.pinned_bytes = 0
        self.pinnable = True
        self.allocated = 0
        self._made: dict[int, tuple[Stream, Memory]] = {}  #: memory by the stream that it was made on; it stays with us
        real = torch.empty

        def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            if pin_memory and not self.pinnable:
                raise RuntimeError("CUDA error: out of memory")
            if torch.device(kwargs.get("device") or "cpu").type == "cuda":
                return real(*args, **kwargs | {"device": "cpu"}).fill_(0).as_subclass(OnCard)
            made = real(*args, **kwargs).zero_()  # not by chance what another test has left there
            self.allocated += 1
            if pin_memory:
                self.pinned[made.data_ptr()] = made.data_ptr() + made.nbytes
                self.pinned_bytes += made.nbytes
            return made

        patch.setattr(torch, "empty", empty)
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: self.is_pinned(tensor))
        patch.setattr(torch.cuda, "current_stream", self.current_stream)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(memory, "_streams", {})
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "device", self.on_device)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(torch.cuda, "synchronize", self.refuse)

    # --- devices and streams -------------------------------------------------------------------------------------------

    @property
    def device(self) -> Any:
        """The thread's current device."""
        return getattr(self.local, "device", torch.device("cuda", 0))

    def use(self, device: Any) -> None:
        """A call that needs a context on that device, and makes one."""
        if device not in self.contexts:
            self.faults.append(f"a context on {device}, where the trainer has none")

    @contextlib.contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before = self.device
        self.local.device = torch.device(device)
        self.use(self.device)
        try:
            yield
        finally:
            if before in self.contexts:  # as torch: else it stays where it is
                self.local.device = before

    def current_stream(self, device: Any = None) -> Any:
        device = self.device if device is None else device
        return getattr(self.local, "streams", {}).get(device, self.defaults[device])

    def _set_stream(self, stream: Any) -> None:
        self.local.device = stream.device
        self.use(stream.device)
        self.local.streams = getattr(self.local, "streams", {}) | {stream.device: stream}

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """Current for its device, which is current too."""
        if stream is None:
            yield
            return
        before, there = self.current_stream(), self.current_stream(stream.device)
        self._set_stream(stream)
        try:
            yield
        finally:
            self._set_stream(there)
            self._set_stream(before)

    def refuse(self, device: object = None) -> None:
        raise AssertionError("waits for all that anybody does on the device")

    # --- memory --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """An error that is there stays there."""
        if self.broken:
            raise RuntimeError(self.broken)

    def is_pinned(self, tensor: Any) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in list(self.pinned.items()))

    def made_of(self, tensor: Any, function: Any) -> Any:
        """`tensor`, or new memory that the current stream will fill."""
        source = tensor.as_subclass(torch.Tensor)
        made = function(source)
        if made.data_ptr() == source.data_ptr() and made.stride() == source.stride():
            return made.as_subclass(type(tensor))
        made.untyped_storage().fill_(POISON)
        stream = self.current_stream(tensor.device)
        self._made[made.data_ptr()] = (stream, Memory(made))
        stream.add(lambda: made.copy_(function(source)))
        return made.as_subclass(type(tensor))

    def copy(self, target: Any, tensor: Any, *, wait: bool) -> None:
        """To the host, on the current stream of its device."""
        self.check()
        stream = self.current_stream(tensor.device)
        source = Memory(tensor)
        owner, _ = self._made.get(source.storage.data_ptr(), (None, None))

        def late() -> None:
            with torch.inference_mode():
                if owner is not stream and source.given_back:
                    self.faults.append("memory was given back before it was copied")
                    source.storage.fill_(POISON)
                target.copy_(source.tensor())

        stream.add(late)
        if wait or not self.is_pinned(target):  # CUDA copies to pageable memory while one waits
            if not wait and self.pinnable:
                self.faults.append("a copy to pageable memory")
            stream.synchronize()

    def upload(self, target: Any, source: Any) -> None:
        """From pinned memory, as it is then."""
        self.check()
        stream = self.current_stream(target.device)
        there = Memory(target)
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode")  # as torch does
        if self.pinnable and not self.is_pinned(source):
            self.faults.append("a copy from pageable memory")

        def late() -> None:
            with torch.inference_mode():
                if there.given_back:
                    self.faults.append("memory was given back before it was filled")
                there.tensor().copy_(source)

        stream.add(late)
