"""Conversion of an export of 4 GiB in 4 files beside a plain copy of the same files: `pytest benchmarks/test_convert.py`.

CKPTSTORE_BENCH_DIR: on which disk (default: pytest's own folder). CKPTSTORE_BENCH_GIB: how much, in whole GiB.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ckptstore import native
from ckptstore.frameworks.areal import convert
from ckptstore.model import FileInfo

TENSORS = 16  # a file, of 64 MiB each


@pytest.fixture(scope="module")
def room():
    with tempfile.TemporaryDirectory(dir=os.environ.get("CKPTSTORE_BENCH_DIR")) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def export(room):
    folder = room / "hf"
    folder.mkdir()
    noise, weight_map = os.urandom(64 << 20), {}
    count = int(os.environ.get("CKPTSTORE_BENCH_GIB", "4"))
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        keys = [f"model.layers.{number * TENSORS + n}.mlp.up_proj.weight" for n in range(TENSORS)]
        header = {
            key: {"dtype": "BF16", "shape": [4096, 8192], "data_offsets": [n << 26, n + 1 << 26]} for n, key in enumerate(keys)
        }
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in keys:
                file.write(noise)
        weight_map.update(dict.fromkeys(keys, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    os.sync()
    return folder


def infos(folder):
    return [FileInfo(path.name, (s := path.stat()).st_size, s.st_mtime_ns, s.st_ino) for path in sorted(folder.iterdir())]


def specs(folder):
    return [native.FileSpec(*info[:4]) for info in infos(folder)]


@pytest.mark.parametrize("way", ["copy", "convert", "convert and check", "back"])
def test_conversion(benchmark, export, room, way):
    expected = {name: digest.chunks for name, digest in native.digest_files(export, specs(export)).items()}
    source = export
    if way == "back":
        source = room / "dcp"
        source.mkdir()
        convert.hf_to_dcp(export, source, infos(export), optimizer="zero")

    def fresh():
        shutil.rmtree(room / "out", ignore_errors=True)
        (room / "out").mkdir()
        os.sync()

    def run():
        if way == "copy":
            native.copy_files(source, room / "out", specs(source))
        elif way == "back":
            convert.dcp_to_hf(source, room / "out", infos(source))
        else:
            known = expected if way == "convert and check" else None
            convert.hf_to_dcp(source, room / "out", infos(source), optimizer="zero", expected=known)

    benchmark.pedantic(run, setup=fresh, rounds=3)
    size = sum(info.size_bytes for info in infos(source))
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 2)
    shutil.rmtree(room / "out")
    if way == "back":
        shutil.rmtree(source)
