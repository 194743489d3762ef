"""Tensors as bytes: their own memory for the engine, and safetensors' names for their dtypes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ckptstore.errors import UsageError

#: safetensors' dtypes, largest first. Those that this torch lacks are left out.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, known)
    for name, known in {
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
        "C64": "complex64",
        "F32": "float32",
        "I32": "int32",
        "U32": "uint32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I16": "int16",
        "U16": "uint16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, known)
}
_HUGE_PAGE_BYTES = 2 << 20
_log = logging.getLogger("ckptstore")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; it lives as long as this does."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise UsageError("only a contiguous tensor on the CPU has bytes of its own")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    memory: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    memory.owner = tensor
    return memoryview(memory).cast("B")  # ctypes' own format takes no slices


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, wherever it is, as uint8: a view."""
    # One element or none counts as contiguous at any stride, and torch views no such stride as another dtype.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def host(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """New host memory. Where no more can be pinned (a container's limit) it is pageable: slower to copy to, and as right."""
    with torch.inference_mode(False):  # what is made in that mode can be changed in no other, and this is used again
        if pinned:
            try:
                return _staging(torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True))
            except RuntimeError as error:  # torch has no narrower one for this
                _log.warning("no pinned host memory for staging, the copy is slower: %s", error)
                return _staging(torch.empty(tuple(shape), dtype=dtype, device="cpu"))
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    """Note that it was made for copies from a device."""
    tensor.for_a_device = True  # type: ignore[attr-defined]
    return tensor


def buffers(count: int, size_bytes: int, *, pinned: bool) -> list[torch.Tensor]:
    """That many pieces of one allocation, of whole pages: a disk takes them without another copy."""
    slab = host((count * size_bytes,), torch.uint8, pinned=True) if pinned else _pages(count * size_bytes)
    pieces = [slab[begin : begin + size_bytes] for begin in range(0, len(slab), size_bytes)]
    return list(map(_staging, pieces)) if pinned else pieces


def _pages(size_bytes: int) -> torch.Tensor:
    """Pageable memory, of huge pages where the kernel gives them: a disk's request takes a limited number of pages."""
    mapped = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False):
        found = torch.frombuffer(mapped, dtype=torch.uint8)
    return found[-found.data_ptr() % _HUGE_PAGE_BYTES :][:size_bytes]


def pinned(tensor: torch.Tensor) -> bool:
    """Whether `host` made it as pinned memory, or would have. Noted: torch 2.6 asks the driver, which makes a context on
    device 0 in a process that uses no GPU.
    """
    return getattr(tensor, "for_a_device", False)


# --- streams -------------------------------------------------------------------------------------------------------

_streams: dict[tuple[torch.device, int], Any] = {}


def side_stream(device: torch.device, number: int) -> Any:
    """A stream to copy on beside the caller's. The same one each time: torch keeps memory for each stream."""
    if (device, number) not in _streams:
        new: Any = torch.cuda.Stream  # torch gives it no types
        _streams[device, number] = new(device)
    return _streams[device, number]


@contextlib.contextmanager
def on(stream: Any) -> Iterator[None]:
    """With that stream current, and its device; None: nothing, and CUDA is not touched.

    The device first: else the end of torch.cuda.stream makes device 0 current, and a context there, on a thread that had none.
    """
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def mark(stream: Any) -> Any:
    """An event after what the stream has been asked for. Who waits for it sleeps."""
    new: Any = torch.cuda.Event
    return stream.record_event(new(blocking=True))


def await_event(stream: Any, event: Any) -> None:
    """Wait for an event of that stream, on any thread."""
    with torch.cuda.device(stream.device):  # not device 0, where a fresh thread would make a context
        event.synchronize()


def synchronize(streams: Iterable[Any]) -> None:
    """Wait for all of them, also where one fails; the first error is raised then."""
    first: RuntimeError | None = None
    for stream in streams:
        try:
            stream.synchronize()
        except RuntimeError as error:
            first = first or error
    if first is not None:
        raise first


def refuse_capture(device: torch.device) -> None:
    """UsageError while the caller captures a CUDA graph: what is copied would be recorded instead."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise UsageError("a save or load inside of the capture of a CUDA graph", hint="Do it before or after the capture.")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values, contiguous on the CPU: itself where it is that already."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether its values are there: not so of meta and fake tensors, of those made of others, and where storage was freed.

    Reading at the address of one that has none would end the process.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    storage = tensor.untyped_storage()
    if tensor.device.type == "meta" or storage.device.type == "meta":
        return False
    try:
        return not tensor.numel() or storage.data_ptr() != 0
    except RuntimeError:  # how torch says that there is none
        return False


def is_made_of_others(tensor: torch.Tensor) -> bool:
    """Whether its type keeps its values in other tensors (torchao's quantized ones, what a collective has not yet brought)."""
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return own and not has_memory(tensor) and tensor.untyped_storage().device.type != "meta"


def without_memory(tensor: torch.Tensor, where: str) -> UsageError:
    """What to raise for a tensor, found at `where`, that has no plain memory."""
    what = f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, {tensor.device}"
    return UsageError(f"{where} is a tensor without plain memory ({what})", hint="Save it dense, or what it is made of.")


def checked(tensor: torch.Tensor, where: str) -> None:
    """UsageError for a tensor, found at `where`, that has no plain memory."""
    if is_lazy(tensor):
        raise UsageError(f"{where} is not initialized yet", hint="Run the lazy module once before its state is saved.")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and hasattr(tensor, "to_local"):
        raise UsageError(f"{where} is a shard of a distributed tensor", hint="Save it with dcp.save and StoreWriter.")
    if tensor.is_quantized or not has_memory(tensor):
        raise without_memory(tensor, where)
    if tensor.dtype not in NAMES:
        raise UsageError(f"{where} has the dtype {tensor.dtype}, which safetensors does not know", hint="Save it as another.")


def safetensors_layout(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, list[torch.Tensor]]:
    """The file of these tensors: its header, and the tensors in the order in which their bytes follow.

    Format: https://huggingface.co/docs/safetensors (8 bytes of length, JSON, data; tensors aligned to their items).
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]


def empty(dtype: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """A new tensor for what a safetensors header describes. UsageError where this torch has no such dtype."""
    if dtype not in DTYPES:
        raise UsageError(f"this torch ({torch.__version__}) has no dtype for safetensors' {dtype}")
    return torch.empty(tuple(shape), dtype=DTYPES[dtype], device=device)
