"""Torn, flipped, hostile and foreign files: whatever they hold, ckptstore refuses them by its own errors, soon, and in little memory.

A few hundred cases here; millions with `./run soak tests/test_fuzz.py` ($FUZZ_SECONDS each, $FUZZ_SEED). A case that fails
prints its number, which makes it again.
"""

from __future__ import annotations

import os
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptstore import claims, config, damage, halt, importing, journal, ledger, lock, manifest, mirrored, pins, side, tensors
from ckptstore.backends.local import LocalBackend
from ckptstore.backends.s3control import xml_of
from ckptstore.errors import CkptStoreError
from ckptstore.formats import FormatError, check_structure, dcp, inert, safetensors, torchzip
from ckptstore.frameworks.areal import recover_info, saving, trainer_logs
from ckptstore.model import FileInfo
from tests import fuzzed, mutations, trees

QUICK_CASES = 60
SOAK_S = float(os.environ.get("FUZZ_SECONDS", "120"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


class Target(NamedTuple):
    """Something that reads bytes which anybody may have written."""

    name: str
    file: str  #: under which the bytes lie; what is mutated by its structure goes by its suffix
    read: Callable[[Path, bytes], Any]  #: the folder that the file is in, and its bytes
    refuses: tuple[type[Exception], ...] = (CkptStoreError,)


def _read_at(data: bytes) -> Callable[[str, int, int], bytes]:
    return lambda name, offset, length: data[offset : offset + min(length, len(data))]


def _safetensors(folder: Path, data: bytes) -> None:
    safetensors.read_header(_read_at(data), "x.safetensors", len(data))


def _structure(name: str) -> Callable[[Path, bytes], Any]:
    return lambda folder, data: check_structure(_read_at(data), {name: FileInfo(name, len(data), 0, 1)})


def _places(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, data: bytes) -> None:
        found = tensors.places(_read_at(data), {name: FileInfo(name, len(data), 0, 1)})
        for place in found.found:
            assert 0 <= place.offset <= place.offset + place.length <= len(data), f"{place} is not in {len(data)} bytes"

    return read


def _manifest(folder: Path, data: bytes) -> None:
    vouched = manifest.vouches_for(data, [FileInfo("a/b.bin", 10, 7, 1), FileInfo("model.safetensors", 5000, 8, 2)])
    found = manifest.parse(data)
    assert vouched <= ({entry.path for entry in found.files} == {"a/b.bin", "model.safetensors"})
    again = manifest.parse(found.to_bytes())
    assert again == found, "what was read is not what would be written"
    for entry in found.files:
        assert not entry.path.startswith("/") and ".." not in entry.path.split("/") and "\0" not in entry.path
    found.inspect([FileInfo("a/b.bin", 10, 7, 1)])


def _journal(folder: Path, data: bytes) -> None:
    found = journal.pending(str(folder))
    assert found is not None
    for move in found.moves:
        for path, above in ((move.staged, folder), (move.aside, folder), (move.slot, folder.parent.parent)):
            real = Path(os.path.normpath(folder / path))
            assert real.is_relative_to(above), f"{path!r} leads out of {above}"
            assert real != above


def _ledger(folder: Path, data: bytes) -> None:
    found = ledger.read(ledger.path_in(str(folder)))
    from ckptstore import health

    for step in (0, 42, 93, 10**9):
        str(health.at_step(step, found, saved_at_s=1.7e9))


def _recover_info(folder: Path, data: bytes) -> None:
    backend = LocalBackend(folder.parent)
    info = recover_info.read(backend, backend.tree()[folder.name])
    assert info is None or (str(info) and info.resumes_at == info.step + 1 and -1 <= info.step < 1 << 63)
    recover_info.stored_controls(backend)


def _config(folder: Path, data: bytes) -> None:
    found = config.load(str(folder / "config.yaml"))
    for key in ("experiment_name", "saver.freq_epochs", "cluster.fileroot", "recover", "actor.path", "a", "b"):
        found.get(key), found.text(key)
    fuzzed.strict_json(saving.settings(found))
    saving.describe(found)


TARGETS = (
    Target("manifest", "ckptstore.manifest.json", _manifest),
    Target("safetensors", "x.safetensors", _safetensors, (FormatError,)),
    Target("structure of safetensors", "x.safetensors", _structure("x.safetensors"), ()),
    Target("structure of an index", "model.safetensors.index.json", _structure("model.safetensors.index.json"), ()),
    Target("structure of config.json", "config.json", _structure("config.json"), ()),
    Target("DCP metadata", ".metadata", lambda _, data: dcp.read_metadata(data), (FormatError,)),
    Target("structure of DCP", ".metadata", _structure(".metadata"), ()),
    Target("pickle", "dataloader_info.pkl", lambda _, data: inert.read(data, lambda name: True), (FormatError,)),
    Target("ranks in a pickle", "dataloader_info.pkl", lambda _, data: recover_info.saved_ranks(data), ()),
    Target(
        "torch zip", "tensor.pt", lambda _, data: torchzip.find_data(lambda o, n: data[o : o + n], len(data)), (FormatError,)
    ),
    Target("weights of safetensors", "x.safetensors", _places("x.safetensors"), ()),
    Target("weights of .pt", "tensor.pt", _places("tensor.pt"), ()),
    Target("weights of a deflated .pt", "deflated.pt", _places("deflated.pt"), ()),
    Target("journal", "journal.json", _journal),
    Target("pins", "pins.json", lambda folder, _: pins.read(str(folder))),
    Target("mirror", "mirror.json", lambda folder, _: mirrored.read(str(folder))),
    Target("known damage", "damaged.json", lambda folder, _: damage.known(str(folder)), ()),
    Target("trip", "TRIPPED.json", lambda folder, _: str(halt.read(str(folder)).error()), ()),
    Target("lock", "lock", lambda folder, _: str(lock.read_holder(str(folder / "lock"))), ()),
    Target("stage", "stage-0/stage.json", lambda folder, _: side.stages(str(folder.parent)), ()),
    Target("ledger", "metrics.jsonl", _ledger, ()),
    Target("import", "metrics.jsonl", lambda folder, _: importing.read(str(folder / "metrics.jsonl"))),
    Target("import of CSV", "metrics.csv", lambda folder, _: importing.read(str(folder / "metrics.csv"))),
    Target("import of a log", "main.log", lambda folder, _: importing.read(str(folder / "main.log"))),
    Target("logs", "main.log", lambda folder, _: trainer_logs.read(str(folder)), ()),
    Target("recover_info", "recover_info/step_info.json", _recover_info, ()),
    Target("recover_info's controls", "recover_info/saver_info.json", _recover_info, ()),
    Target("config", "config.yaml", _config),
    Target("claim", "step-1/.ckptstore.manifest.claim", lambda f, _: claims.files_of(LocalBackend(f.parent), "step-1"), ()),
    Target(
        "listing of S3",
        "uploads.xml",
        lambda _, data: list(xml_of(data, "listing")),
    ),
)


def _samples() -> Iterator[tuple[str, bytes]]:
    """Whole files, by the name that targets know them by."""
    entries = (
        manifest.FileEntry("a/b.bin", 10, 7, 1, 5, (5,)),
        manifest.FileEntry("model.safetensors", 5000, 8, 2, 6, (7, 8)),
    )
    made = manifest.Manifest(93, 1, 46, "default", "seal", entries, 4096, source="x", tool="t")
    group = manifest.NodeSet("0" * 32, 0, 2, "0" * 64)
    yield "ckptstore.manifest.json", made.to_bytes()
    rich = manifest.dataclasses.replace(made, metrics={"loss": 0.5, "a/b": 1.0}, group=group)
    yield "ckptstore.manifest.json", rich.to_bytes()
    yield "x.safetensors", trees.safetensors_bytes(trees.TENSORS)
    yield "x.safetensors", trees.safetensors_bytes({"a": ("F32", (0,)), "b": ("U8", (3,))})
    keys = {"dcp.model.a": ("bfloat16", (4, 4)), "b": ("float32", (2,))}
    items = [("dcp.model.a", "__0_0.distcp", 0, 1500), ("b", "__1_0.distcp", 1500, 900), ("c", "__0_0.distcp", 2400, 9)]
    yield ".metadata", trees.dcp_metadata(items, keys)
    layout = torchzip.tensor("bfloat16", (3, 5))
    yield "tensor.pt", layout.head + bytes(range(30)) + layout.tail(0)
    yield "tensor.pt", torchzip.value({"a": [1, 2.5, None, "x"]})


def _file_samples(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The same of a run that has them all."""
    run = fuzzed.areal_run(folder)
    trees.write_model(folder / "sharded", shards=3)
    for target in TARGETS:
        name = target.file.rpartition("/")[2]
        for path in sorted(folder.rglob(name)):
            if path.is_file():
                yield target.file, path.read_bytes()
    info = trees.write_recover_info(run, 93, world_size=2)
    yield "dataloader_info.pkl", (info / "dataloader_info.pkl").read_bytes()
    with zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", (info / "dataloader_info.pkl").read_bytes() * 3)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", b"12345678", compress_type=zipfile.ZIP_STORED)
    yield "deflated.pt", (folder / "deflated.pt").read_bytes()
    moves = [
        {"part": "default", "slot": "../../trial0/default/recover_checkpoint", "staged": "stage-00/default"}
        | {"aside": "old-0/default", "new": "commit:00", "old": "files:11"}
    ]
    document = {"action": "setup", "step": 93, "method": "exchange", "moves": moves, "created_at": "2026-01-01T00:00:00Z"}
    yield "journal.json", mutations.to_text(document | {"format": "ckptstore.journal", "version": 1}).encode()
    yield "metrics.csv", b"step,run - loss,run - loss__MIN,_timestamp\n1,0.5,0.1,1700000000\n2,nan,1,1700000001\n"
    yield "step-1/.ckptstore.manifest.claim", b'{"content":"00","host":"h","pid":1,"at":"2026","files":["a","b/c"]}'
    yield (
        "uploads.xml",
        (
            b'<?xml version="1.0" encoding="UTF-8"?><ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            b"<IsTruncated>false</IsTruncated><Upload><Key>a</Key><UploadId>u</UploadId></Upload></ListMultipartUploadsResult>"
        ),
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, data in (*_samples(), *_file_samples(tmp_path_factory.mktemp("samples"))):
        if data not in found.setdefault(name, []):
            found[name].append(data)
    missing = {target.file for target in TARGETS} - found.keys()
    assert not missing, f"nothing to mutate for {missing}"
    return found


class Parsers:
    """Mutates files, and has them read."""

    def __init__(self, folder: Path, samples: dict[str, list[bytes]]) -> None:
        self.folder = folder
        self.samples = samples

    def feed(self, target: Target, data: bytes, case: object) -> None:
        """AssertionError where the target does anything but read it or refuse it."""
        path = self.folder / target.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            with fuzzed.bounded(target.name, 5.0):
                target.read(path.parent, data)
        except target.refuses:
            pass
        except (Exception, fuzzed.Hung) as error:
            shown = f"{data[:200]!r}… ({len(data)} bytes)" if len(data) > 200 else repr(data)
            raise AssertionError(f"{target.name}, case {case}: {error!r:.300} for {shown}") from error
        finally:
            mutations.remove(path)

    def mutated(self, target: Target, case: int) -> None:
        rng = random.Random(f"{target.name} {case}")
        data = rng.choice(self.samples[target.file])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = mutations.mutate(rng, data, target.file)
        self.feed(target, data, case)


@pytest.fixture
def parsers(memory_path: Path, samples: dict[str, list[bytes]]) -> Iterator[Parsers]:
    with fuzzed.little_memory():
        yield Parsers(memory_path / "side" / "deep", samples)


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_what_is_whole_is_read(target: Target, parsers: Parsers) -> None:
    """Else the mutations would be of something that is refused at its first byte."""
    for data in parsers.samples[target.file]:
        if target.refuses and target.file not in ("tensor.pt", "main.log", "metrics.jsonl"):
            parsers.feed(target._replace(refuses=()), data, "whole")
        else:
            parsers.feed(target, data, "whole")


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_cut_short_anywhere(target: Target, parsers: Parsers) -> None:
    """At every offset; of long files at some of them, chosen anew by each seed."""
    rng = random.Random(SEED)
    for data in parsers.samples[target.file][:2]:
        offsets = range(len(data)) if len(data) < 100 else sorted(rng.sample(range(len(data)), 50))
        for offset in offsets:
            parsers.feed(target, data[:offset], f"cut at {offset}")


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_mutated_files(target: Target, parsers: Parsers) -> None:
    for case in range(QUICK_CASES):
        parsers.mutated(target, SEED * 1_000_000 + case)


@pytest.mark.soak
def test_mutated_files_for_long(parsers: Parsers) -> None:
    end, case = time.monotonic() + SOAK_S, SEED * 1_000_000
    while time.monotonic() < end:
        for target in TARGETS:
            parsers.mutated(target, case)
        case += 1
    print(f"{(case - SEED * 1_000_000) * len(TARGETS)} files")
