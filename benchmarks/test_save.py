"""Tensors from memory to the disk and back, beside torch.save, safetensors and DCP; and what training waits for.

With `--device cuda` they are on a GPU, and the tables say so.
"""

import functools
import os
import shutil
import time

import pytest
from conftest import measure_child, measure_fio, measure_here, parse_size, record

from ckptstore import CheckpointStore, native

torch = pytest.importorskip("torch")
from stalls import STALLS, state_of, synchronized  # noqa: E402


@pytest.fixture(scope="module")
def device(request):
    wanted = request.config.getoption("--device")
    if wanted != "cpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return wanted


@functools.lru_cache(maxsize=1)
def made(size, device):
    return state_of(size, device)


@pytest.fixture
def tensors(request, device):
    """The same for one test after another."""
    return made(parse_size(request.config.getoption("--size")), device)


def at(device, what):
    """The name of a table."""
    return what if device == "cpu" else f"{what}, {device}"


def sync_tree(root):
    for folder, _, names in os.walk(root):
        for name in names:
            native.fsync_path(os.path.join(folder, name))
        native.fsync_path(folder)


def engine(tensors, path):
    path.mkdir()
    buffers = {f"{name}.bin": tensor.view(torch.uint8).numpy() for name, tensor in tensors.items()}
    native.write_files(path, buffers)


def store_save(tensors, path):
    import ckptstore.torch

    ckptstore.torch.save(CheckpointStore(path), 1, {"model": tensors})


def store_writer(tensors, path):
    import torch.distributed.checkpoint as checkpoint

    from ckptstore.torch import StoreWriter

    checkpoint.save(tensors, storage_writer=StoreWriter(CheckpointStore(path), 1), no_dist=True)


def torch_save(tensors, path):
    path.mkdir()
    torch.save(tensors, path / "model.pt")


def safetensors(tensors, path):
    from safetensors.torch import save_file

    path.mkdir()
    save_file(tensors, path / "model.safetensors")


def dcp(threads):
    def run(tensors, path):
        import torch.distributed.checkpoint as checkpoint

        writer = checkpoint.FileSystemWriter(path, thread_count=threads, sync_files=True)
        checkpoint.save(tensors, storage_writer=writer, no_dist=True)

    return run


def then_sync(run):
    def both(tensors, path):
        run(tensors, path)
        sync_tree(path)

    return both


WAYS = {  # name: (function, durable, digested)
    "fio write": (None, True, False),
    "ckptstore": (engine, True, True),
    "ckptstore.torch.save": (store_save, True, True),
    "dcp.save, StoreWriter": (store_writer, True, True),
    "torch.save": (torch_save, False, False),
    "torch.save, fsync": (then_sync(torch_save), True, False),
    "safetensors": (safetensors, False, False),
    "safetensors, fsync": (then_sync(safetensors), True, False),
    "DCP": (dcp(1), False, False),
    "DCP, 4 threads": (dcp(4), False, False),
}


OURS = ("ckptstore", "ckptstore.torch.save", "dcp.save, StoreWriter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WAYS)
def test_save(benchmark, place, tensors, device, name, turn):
    function, durable, digested = WAYS[name]
    if name == "ckptstore" and device != "cpu":
        pytest.skip("the engine knows only memory of the CPU")
    if name == "fio write" and shutil.which("fio") is None:
        pytest.skip("no fio")
    path = place / f"save-{time.monotonic_ns()}"

    def prepare():
        os.sync()
        time.sleep(0.3)

    size = sum(tensor.nbytes for tensor in tensors.values())

    def run():
        if name == "fio write":
            return measure_fio(path, size, 0, "write")
        return measure_here(lambda: function(tensors, path))

    record(
        benchmark,
        run,
        prepare=prepare,
        moved_bytes=size,
        group=at(device, "save from memory"),
        contender=name,
        ours=name in OURS,
        durable=durable,
        digested=digested,
        turn=turn,
    )
    if name == "fio write":
        return
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size <= written < size * 1.01 + 100_000
    if name == "ckptstore":
        first = next(iter(tensors))
        assert (path / f"{first}.bin").read_bytes() == tensors[first].view(torch.uint8).numpy().tobytes()
    shutil.rmtree(path)


# --- and back ------------------------------------------------------------------------------------------------------


def blank(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def where(tensors):
    return next(iter(tensors.values())).device


def store_load(path, tensors):
    import ckptstore.torch

    return ckptstore.torch.load(CheckpointStore(path), 1, map_location=where(tensors))["model"]


def store_reader(path, tensors):
    import torch.distributed.checkpoint as checkpoint

    from ckptstore.torch import StoreReader

    checkpoint.load(tensors, storage_reader=StoreReader(CheckpointStore(path), 1), no_dist=True)
    return tensors


def dcp_load(path, tensors):
    import torch.distributed.checkpoint as checkpoint

    checkpoint.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def safetensors_load(path, tensors):
    from safetensors.torch import load_file

    found = load_file(path / "model.safetensors", device=str(where(tensors)))
    return {name: tensor.clone() if tensor.device.type == "cpu" else tensor for name, tensor in found.items()}  # it only maps


LOADS = {  # name: (how it is saved, how it is loaded, digested)
    "ckptstore.torch.load": (store_save, store_load, True),
    "dcp.load, StoreReader": (store_writer, store_reader, True),
    "dcp.load": (dcp(1), dcp_load, False),
    "torch.load": (torch_save, lambda path, tensors: torch.load(path / "model.pt", map_location=where(tensors)), False),
    "safetensors load_file": (safetensors, safetensors_load, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heat", ["warm", "cold"])
@pytest.mark.parametrize("name", LOADS)
def test_load(benchmark, place, tensors, device, name, heat, turn):
    write, read, digested = LOADS[name]
    path = place / f"load-{time.monotonic_ns()}"
    write(tensors, path)
    target, found = blank(tensors) if name.startswith("dcp.load") else tensors, []  # the others make new ones, of this kind

    def prepare():
        os.sync()
        for file in path.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    if heat == "cold":
                        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        while opened.read(1 << 24):
                            pass

    record(
        benchmark,
        lambda: measure_here(synchronized(lambda: found.append(read(path, target)))),
        prepare=prepare,
        moved_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        group=at(device, f"load into memory, {heat}"),
        contender=name,
        ours="ckptstore" in name or "Store" in name,
        durable=False,
        digested=digested,
        turn=turn,
    )
    assert all(torch.equal(found[0][key].view(torch.int16), value.view(torch.int16)) for key, value in tensors.items())
    shutil.rmtree(path)


# --- what training waits for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STALLS)
def test_stall(benchmark, request, place, device, name, turn):
    """Until the state may change, from the second save on: the first makes the buffers."""
    if device == "cpu" and ("cached" in name or "Stager" in name or name == "torch_checkpointing"):
        pytest.skip("it pins its memory, for an accelerator")
    if name == "torch_checkpointing":
        pytest.importorskip("torch_checkpointing")
    made.cache_clear()  # a child has a state of its own
    torch.cuda.empty_cache()
    size = parse_size(request.config.getoption("--size"))
    path = place / f"stall-{time.monotonic_ns()}"
    record(
        benchmark,
        lambda: measure_child(do="stall", contender=name, size=size, device=device, path=path),
        moved_bytes=size,
        group=at(device, "what training waits for, of a save in the background"),
        contender=name,
        ours="ckptstore" in name,
        durable=False,
        digested="ckptstore" in name,
        turn=turn,
    )
    if name == "ckptstore.torch.save_async":
        assert CheckpointStore(path).verify(2).ok
    shutil.rmtree(path, ignore_errors=True)
