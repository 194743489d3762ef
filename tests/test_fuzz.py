"""Torn, flipped, hostile and foreign files: ckptstore refuses them by its own errors, soon, and in little memory.

A few hundred cases here; millions with `./run soak tests/test_fuzz.py` ($FUZZ_SECONDS each, $FUZZ_SEED). A case that fails
prints its number, which makes it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ckptstore import (
    canonical,
    config,
    damage,
    halt,
    importing,
    journal,
    ledger,
    lock,
    manifest,
    pins,
    side,
    tensors,
    untrusted,
)
from ckptstore.backends.local import LocalBackend
from ckptstore.backends.s3control import xml_of
from ckptstore.errors import CkptStoreError, IntegrityError
from ckptstore.formats import FormatError, archives, check_structure, dcp, inert, safetensors, torchzip
from ckptstore.frameworks.areal import layout, recover_info, saving, trainer_logs
from ckptstore.model import FileInfo, Status
from ckptstore.seal import describe
from ckptstore.store import CheckpointStore
from ckptstore.transfer import claims, mirrored
from tests import commands, fuzzed, mutations, trees

QUICK_CASES = 20
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


def _sums(name: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, data: bytes) -> None:
        times = (folder / name).stat()
        files = {name: FileInfo(name, times.st_size, times.st_mtime_ns, times.st_ino)}
        found = archives.compare(folder, files)
        assert found is None or 0 < found.compared_bytes <= found.total_bytes

    return read


def _manifest(folder: Path, data: bytes) -> None:
    vouched = canonical.vouches_for(data, [FileInfo("a/b.bin", 10, 7, 1), FileInfo("model.safetensors", 5000, 8, 2)])
    found = manifest.parse(data)
    assert vouched <= ({entry.path for entry in found.files} == {"a/b.bin", "model.safetensors"})
    again = manifest.parse(found.to_bytes())
    assert again == found, "what was read is not what would be written"
    for entry in found.files:
        assert not {"", ".", ".."} & set(entry.path.split("/"))
        assert "\0" not in entry.path
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
    Target("sums in a .pt", "tensor.pt", _sums("tensor.pt"), ()),
    Target("sums in a deflated .pt", "deflated.pt", _sums("deflated.pt"), ()),
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
            with fuzzed.bounded(target.name):
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
    for data in parsers.samples[target.file][:1]:
        offsets = range(len(data)) if len(data) < 20 else sorted(rng.sample(range(len(data)), 20))
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


# Whole stores, and every verb


def _damaged_stores(store: fuzzed.Store, cases: Iterator[int]) -> int:
    done = 0
    for case in cases:
        rng = random.Random(case)
        store.renew()
        touched, what, slow = fuzzed.damage_store(store, rng)
        try:
            with fuzzed.little_memory():
                store.check(touched, slow=slow, rng=rng)
        except (Exception, fuzzed.Hung) as error:
            raise AssertionError(f"case {case}, {what}: {error!r:.300}") from error
        done += 1
    return done


def _numbers(seconds: float, *, seed: int = SEED) -> Iterator[int]:
    end, case = time.monotonic() + seconds, seed * 1_000_000
    while time.monotonic() < end:
        yield case
        case += 1


STORES = {"areal": (fuzzed.areal_run, fuzzed.areal_verbs), "steps": (fuzzed.steps_store, fuzzed.steps_verbs)}


@pytest.fixture
def store(request: pytest.FixtureRequest, memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fuzzed.Store]:
    commands.isolate(monkeypatch, memory_path)
    made = fuzzed.Store(memory_path, *STORES[request.param])
    yield made
    fuzzed.unlock(memory_path)


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_damaged_stores(store: fuzzed.Store) -> None:
    store.check(set())
    assert _damaged_stores(store, iter(range(SEED * 1_000_000, SEED * 1_000_000 + 4))) == 4


@pytest.mark.soak
@pytest.mark.parametrize("store", STORES, indirect=True)
def test_damaged_stores_for_long(store: fuzzed.Store) -> None:
    print(f"{_damaged_stores(store, _numbers(SOAK_S))} stores")


SIDE_FILES = ("pins.json", "mirror.json", "damaged.json", "metrics.jsonl", "TRIPPED.json", "lock", "stage", "id")


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "link to zero", "link to itself", "link to passwd", "sparse"])
@pytest.mark.parametrize("name", SIDE_FILES)
def test_no_file_of_ours_keeps_anybody_waiting(memory_path: Path, name: str, kind: str) -> None:
    """Whatever lies under its name."""
    place = memory_path / "stage-0" / "stage.json" if name == "stage" else memory_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"{}")
    mutations.ENTRIES[kind](place)
    folder = str(memory_path)
    reads: dict[str, Callable[[], Any]] = {
        "pins.json": lambda: pins.read(folder),
        "mirror.json": lambda: mirrored.read(folder),
        "damaged.json": lambda: damage.known(folder),
        "metrics.jsonl": lambda: ledger.read(str(place)),
        "TRIPPED.json": lambda: halt.read(folder),
        "lock": lambda: (lock.read_holder(str(place)), lock.busy(folder)),
        "stage": lambda: side.stages(folder),
        "id": lambda: untrusted.open_regular(place).close(),
    }
    with fuzzed.bounded(f"{name} as {kind}"), fuzzed.little_memory(), contextlib.suppress(CkptStoreError, OSError):
        reads[name]()


@pytest.mark.parametrize(
    "text",
    [
        "saver: {freq_epochs: 2001-99-99}",
        "saver: {freq_epochs: 0b_}",
        "saver: {freq_epochs: !!int ''}",
        "saver: {freq_epochs: !!bool x}",
        "saver: {freq_epochs: !!timestamp x}",
        "saver: {freq_epochs: 2001-01-01, freq_steps: .nan, freq_secs: !!binary aGVsbG8=}",
        "saver: &a {freq_epochs: *a, freq_steps: !!set {1}}",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\nsaver: {freq_steps: *d}",
        "saver: !!python/object/apply:os.system [touch pwned]",
        "[" * 2000,
        "experiment_name: "
        + "".join("${a}" for _ in range(1000))
        + "\na: "
        + "${b}" * 1000
        + "\nb: "
        + "${c}" * 1000
        + "\nc: xxxx",
        "\n".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}${{a{n + 1}}}${{a{n + 1}}}" for n in range(40))
        + "\nsaver: {freq_steps: '${a0}'}",
    ],
)
def test_a_hostile_configuration(parsers: Parsers, text: str) -> None:
    parsers.feed(next(target for target in TARGETS if target.name == "config"), text.encode(), text[:60])
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("pins", b'{"pins":[{"step":1e999,"path":"","why":"","at":0}]}'),
        ("pins", b'{"pins":[{"step":1,"path":"","why":"","at":NaN}]}'),
        ("mirror", b'{"url":"","safe":{},"newest_step":-Infinity,"looked_at":0,"problem":""}'),
        ("mirror", b'{"url":"","safe":{},"newest_step":1,"looked_at":1' + b"0" * 400 + b',"problem":""}'),
        ("trip", b'{"last_good_step":' + b"9" * 4300 + b"}"),
        (
            "lock",
            b'{"host":"","pid":1,"doing":"","done_bytes":1,"total_bytes":1,"started_at_s":0,"heartbeat_at_s":1'
            + b"0" * 400
            + b"}",
        ),
        ("import", b'{"step":1e999,"loss":1}'),
        ("import", b'{"step":NaN,"loss":1}'),
        ("ledger", b'{"event":' + b"[" * 400 + b"]" * 400 + b',"step":1,"at":1}'),
        ("recover_info", b'{"epoch":0,"epoch_step":0,"global_step":' + b"9" * 4300 + b',"steps_per_epoch":1}'),
        ("listing of S3", b'<?xml version="1.0" encoding="UTF-99"?><a/>'),
        ("listing of S3", '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'.encode("utf-16")),
        ("manifest", b'{"format":' + b"[" * 480 + b"]" * 480 + b"}"),
    ],
)
def test_what_the_fuzzer_has_found(parsers: Parsers, what: str, data: bytes) -> None:
    parsers.feed(next(target for target in TARGETS if target.name == what), data, "found")


def test_a_header_that_the_reference_refuses_is_refused() -> None:
    for about in (5, {"format": 5}, ["pt"], None):
        text = json.dumps({"__metadata__": about, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        data = len(text).to_bytes(8, "little") + text + b"x"
        with pytest.raises(FormatError):
            safetensors.read_header(_read_at(data), "x", len(data))


def test_what_we_accept_the_reference_reads(samples: dict[str, list[bytes]]) -> None:
    """Of thousands of mutated headers: a checkpoint that is called whole loads."""
    reference = pytest.importorskip("safetensors")
    accepted = 0
    for case in range(400):
        rng = random.Random(f"reference {SEED} {case}")
        data = mutations.mutate(rng, rng.choice(samples["x.safetensors"]), "x.safetensors")
        try:
            safetensors.read_header(_read_at(data), "x", len(data))
        except FormatError:
            continue
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if any(len(entry) > 3 for name, entry in header.items() if name != "__metadata__"):
            continue  # what is in fields that nobody knows is not looked at
        accepted += 1
        reference.deserialize(data)
    assert accepted > 20


def test_a_zip_that_names_exabytes(memory_path: Path) -> None:
    """Its directory says how long a record is; nobody makes memory for it, or a plan to read it."""
    layout = torchzip.tensor("float32", (4,))
    data = layout.head + bytes(16) + layout.tail(0)
    at = data.rfind(b"archive/data/0") - 46
    for size in (4 << 20, 1 << 31, 0xFFFFFFFE):
        forged = data[: at + 20] + size.to_bytes(4, "little") * 2 + data[at + 28 :]
        (memory_path / "model.pt").write_bytes(forged)
        found = tensors.places(_read_at(forged), {"model.pt": FileInfo("model.pt", len(forged), 0, 1)})
        assert not found.found
        assert "archive" in found.not_scanned[0]


def test_a_shape_without_end_is_refused_at_once() -> None:
    """The product of its sizes alone would take minutes."""
    big = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"
    shape = b"(" + big * 3000 + b"t"
    layout = torchzip.tensor("float32", (4,))
    code = layout.head[layout.head.index(b"\x80\x02") :]
    forged = code[: code.index(b"Q") + 1] + b"K\x00" + shape + shape + b"N" + b"tR."
    with fuzzed.bounded("a shape", 5.0), pytest.raises(FormatError):
        torchzip._describe(forged)


def test_shards_of_hundreds_of_sets_are_listed_soon() -> None:
    names = [FileInfo(f"m{n}-00001-of-99999.safetensors", 9, 0, n) for n in range(2000)]
    with fuzzed.bounded("names", 5.0):
        assert len(layout.read_signs(names).findings) > 2000


@pytest.mark.parametrize("seconds", [-1, 1 << 40])
def test_a_file_of_another_century_is_saved_like_any_other(memory_path: Path, seconds: int) -> None:
    """Its time does not fit into a manifest: once, that made the manifest one that nobody could read."""
    source = trees.write_model(memory_path / "source")
    os.utime(source / "config.json", (seconds, seconds))
    store = CheckpointStore(memory_path / "store")
    store.save(1, source)
    assert store.verify(1).checkpoint.status is Status.COMMITTED
    trees.bitflip(memory_path / "store" / "step-1" / "config.json")
    assert store.verify(1).checkpoint.status is Status.CORRUPT


def test_names_in_a_decision_do_not_drive_the_terminal(memory_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = fuzzed.steps_store(memory_path)
    mirrored.write(f"{root}/.ckptstore", mirrored.Record("s3://b/\x1b[2J", {}, -1, 1.7e9, ""))
    shown = commands.invoke(capfd, "prune", "--dry-run", "--keep-last", "1", "--run", root)
    assert "\x1b" not in shown.out
    assert "\\x1b[2J" in shown.out


def _spoil_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "ckptstore.manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("metrics", [None, {"loss": 0.5}])
@pytest.mark.parametrize(("old", "new"), [('"crc":"', '"crc":"x'), ('"chunks":[]', '"chunks":["0000000000000000"]')])
def test_a_step_whose_manifest_cannot_be_trusted(
    memory_path: Path, metrics: dict[str, float] | None, old: str, new: str
) -> None:
    """Its inventory is right, its digests are none: it is not COMMITTED, and nothing hands out its bytes as what was saved."""
    store = CheckpointStore(memory_path / "store")
    store.save(1, trees.write_model(memory_path / "source"), metrics=metrics)
    folder = memory_path / "store" / "step-1"
    _spoil_manifest(folder, old, new)
    trees.bitflip(folder / "model.safetensors")
    assert store.get(1).status is Status.COMPLETE
    assert "does not count" in store.get(1).parts[0].notes[0]
    with pytest.raises(IntegrityError, match="cannot be trusted"):
        store.restore(1, memory_path / "restored")
    assert not (memory_path / "restored").exists()
    with pytest.raises(IntegrityError, match="cannot be trusted"):  # a push would make a manifest of the damage
        describe(store.backend, store.get(1), store.get(1).parts[0], None)
