"""A durable write of tensors from memory: the engine beside torch.save, safetensors and torch's DCP."""

import os
import shutil
import time

import pytest
from conftest import measure_fio, measure_here, parse_size, record

from ckptstore import native

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tensors(request):
    size = parse_size(request.config.getoption("--size"))
    generator = torch.Generator().manual_seed(1)
    rows = size // 16 // 2 // 1024
    make = lambda: torch.randint(-(2**15), 2**15, (rows, 1024), dtype=torch.int16, generator=generator)  # noqa: E731
    return {f"layer{i}.weight": make().view(torch.bfloat16) for i in range(16)}


def sync_tree(root):
    for folder, _, names in os.walk(root):
        for name in names:
            native.fsync_path(os.path.join(folder, name))
        native.fsync_path(folder)


def engine(tensors, path):
    path.mkdir()
    buffers = {f"{name}.bin": tensor.view(torch.uint8).numpy() for name, tensor in tensors.items()}
    native.write_files(path, buffers)


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
    "torch.save": (torch_save, False, False),
    "torch.save, fsync": (then_sync(torch_save), True, False),
    "safetensors": (safetensors, False, False),
    "safetensors, fsync": (then_sync(safetensors), True, False),
    "DCP": (dcp(1), False, False),
    "DCP, 4 threads": (dcp(4), False, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WAYS)
def test_save(benchmark, place, tensors, name, turn):
    function, durable, digested = WAYS[name]
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
        group="save from memory",
        contender=name,
        ours=name == "ckptstore",
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
