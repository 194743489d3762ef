"""The manifest: our inventory of one part of a checkpoint, and the marker that makes it COMMITTED.

Format: docs/manifest-format.md. Strict canonical JSON (sorted keys, no spaces, ASCII, one trailing newline), no pickle.
Parsing trusts nothing: bytes, entries and integers are capped, duplicate keys, NaN and unsafe names are refused.
The CRCs catch accidents, not malice: `Manifest.sha256` can be pinned out of band (`verify --expect-digest`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ckptstore.errors import ManifestError
from ckptstore.inspection import Inspection
from ckptstore.model import ATTEMPT_PREFIX, MANIFEST_NAME, FileInfo, NodeSet
from ckptstore.names import check_name, refuse_aliases

FORMAT = "ckptstore.manifest"
VERSION = 1
ALGORITHM = "crc64nvme"
MAX_BYTES = 64 << 20  # a 1 TiB checkpoint in 8 MiB chunks needs 2.5 MB
MAX_FILES = 1_000_000
MAX_CHUNKS = 16_000_000
MAX_BRACKETS = 4_000_000  # bounds what json.loads can allocate before we see any of it
MAX_NODES = 1_000_000

_CRC = re.compile(r"[0-9A-F]{16}")
_COMMIT = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BASE = re.compile(rf"(?:{re.escape(ATTEMPT_PREFIX)}[0-9a-f]{{16}})?")


class FileEntry(NamedTuple):
    """One file: what it was when the manifest was made. `crc` covers the file, `chunks` each `chunk_bytes` of it."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    crc: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything recorded about one part. Immutable; equal content gives equal bytes."""

    step: int
    epoch: int
    epoch_step: int
    part: str
    origin: str  #: seal: the trainer wrote them; setup, adopt: we copied them; convert: we made them, or copied such
    files: tuple[FileEntry, ...] = field(repr=False)  # with a digest for each 8 MiB
    chunk_bytes: int
    commit: str = field(default_factory=lambda: secrets.token_hex(16))  #: names this act of writing
    created_at: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    source: str = ""  #: for setup: the checkpoint's folder, relative to its run
    tool: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    nonfinite: tuple[str, ...] = ()  #: metrics that were NaN or infinite, which no JSON number is
    base: str = ""  #: in an object store: the folder beside the manifest that the files lie in; "": beside it themselves
    group: NodeSet | None = None  #: the set of nodes that this is a part of; None: these are all files there are

    def to_bytes(self) -> bytes:
        """The canonical JSON."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "digest": ALGORITHM,
            "chunk_bytes": self.chunk_bytes,
            "commit": self.commit,
            "created_at": self.created_at,
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "metrics": {name: float(value) for name, value in self.metrics.items()},  # 1 and 1.0 would give two digests
            "origin": self.origin,
            "part": self.part,
            "source": self.source,
            "step": self.step,
            "tool": self.tool,
            "files": [
                {
                    "path": file.path,
                    "bytes": file.size_bytes,
                    "mtime_ns": file.mtime_ns,
                    "inode": file.inode,
                    "crc": f"{file.crc:016X}",
                    # One chunk's CRC is the file's: kept only where it says more.
                    "chunks": [f"{crc:016X}" for crc in file.chunks] if len(file.chunks) > 1 else [],
                }
                for file in self.files
            ],
        }
        if self.base:
            document["base"] = self.base
        if self.nonfinite:
            document["nonfinite"] = list(self.nonfinite)
        if self.group is not None:
            document["group"] = self.group._asdict()
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the canonical JSON: what `--expect-digest` pins. Without `base`: a pull has its files elsewhere."""
        return hashlib.sha256(self.at_home.to_bytes()).hexdigest()

    @property
    def at_home(self) -> Manifest:
        """The same for files that lie beside it."""
        return dataclasses.replace(self, base="") if self.base else self

    @property
    def content(self) -> str:
        """Hex SHA-256 of what the files hold, whenever and by whom they were written: equal for equal bytes of one step."""
        return content_of(self.step, self.part, ((file.path, file.size_bytes, file.crc) for file in self.files))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def saved_at_s(self) -> float:
        """When it was committed, in Unix seconds; 0 where it does not say so in the way that ours do."""
        try:
            return datetime.strptime(self.created_at, "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except ValueError:
            return 0.0

    def inspect(self, files: Iterable[FileInfo]) -> Inspection:
        """Compare with what lies there now, by size, mtime and inode (level quick; reads nothing).

        A missing file is damage, and so is another size at the same mtime. A file with another mtime, or one that is not
        listed, was written since by the trainer: it voids the manifest, and proves no damage. Another inode alone is a
        copy that kept its times. Nobody writes into a saved step again: there other times are a copy's that did not keep
        them, and another size is damage.
        """
        present = {file.name: file for file in files}
        pairs = [(entry, present[entry.path]) for entry in self.files if entry.path in present]
        missing = [entry.path for entry in self.files if entry.path not in present]
        saved = self.origin == "save"
        changed = [entry.path for entry, file in pairs if file.mtime_ns != entry.mtime_ns and not saved]
        torn = [
            entry.path
            for entry, file in pairs
            if (file.mtime_ns == entry.mtime_ns or saved) and file.size_bytes != entry.size_bytes
        ]
        moved = any(file.inode != entry.inode for entry, file in pairs)
        listed = {entry.path for entry in self.files}
        extra = [name for name in present if name not in listed and name != MANIFEST_NAME]
        return Inspection(tuple(missing), tuple(changed), tuple(extra), moved, tuple(torn), saved)


def recorded_time(mtime_ns: int) -> int:
    """A time as a manifest can say it: the nearest from 1970 to 2262."""
    return min(max(mtime_ns, 0), (1 << 63) - 1)


def content_of(step: int, part: str, files: Iterable[tuple[str, int, int]]) -> str:
    """Manifest.content of files that have no manifest yet: path, bytes, CRC."""
    lines = [f"{step} {part}", *sorted(f"{size_bytes} {crc:016X} {path}" for path, size_bytes, crc in files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parse(data: bytes) -> Manifest:
    """The manifest in `data`. ManifestError for anything that is not one; unknown fields are ignored."""
    try:
        return _understood(_load(data))
    except RecursionError:  # showing what it holds takes more room than reading it did
        raise ManifestError("manifest nested too deeply") from None


def _understood(document: Mapping[str, Any]) -> Manifest:
    if document.get("format") != FORMAT:
        raise ManifestError(f"not a manifest: format is {document.get('format')!r:.60}, not {FORMAT!r}")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise ManifestError(
            f"manifest version {document.get('version')!r:.20}, and this ckptstore reads version {VERSION}",
            hint="Upgrade ckptstore.",
        )
    if document.get("digest") != ALGORITHM:
        raise ManifestError(f"digest algorithm {document.get('digest')!r:.40} is not known: {ALGORITHM} is")
    chunk_bytes = _int(document, "chunk_bytes", low=4096, high=1 << 40)
    entries = document.get("files")
    if not isinstance(entries, list) or len(entries) > MAX_FILES:
        raise ManifestError("manifest: `files` is not a list of at most a million entries")
    files = tuple(_entry(entry, chunk_bytes) for entry in entries)
    refuse_aliases([file.path for file in files])
    commit = _str(document, "commit")
    if not _COMMIT.fullmatch(commit):
        raise ManifestError("manifest: `commit` is not 32 hex digits")
    base = document.get("base", "")
    if not isinstance(base, str) or not _BASE.fullmatch(base):
        raise ManifestError(f"manifest: `base` is {base!r:.80}, which names no folder of ours")
    return Manifest(
        step=_int(document, "step", low=-1),
        epoch=_int(document, "epoch", low=-1),
        epoch_step=_int(document, "epoch_step", low=-1),
        part=check_name(_str(document, "part")),
        origin=_str(document, "origin"),
        files=files,
        chunk_bytes=chunk_bytes,
        commit=commit,
        created_at=_str(document, "created_at"),
        source=_str(document, "source"),
        tool=_str(document, "tool"),
        metrics=_metrics(document.get("metrics", {})),
        nonfinite=_names(document.get("nonfinite", [])),
        base=base,
        group=_node_set(document.get("group")),
    )


def _load(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ManifestError(f"manifest of {len(data):,} bytes: more than {MAX_BYTES:,} are not read")
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise ManifestError("manifest with too many entries")
    try:
        text = data.decode("ascii")
        document = _FAST.decode(text)
        # A repeated key leaves more `":` in the text than keys in the result; so does a quote inside a string, or a
        # field that we don't know: then the slow parser, which sees every key, decides. It costs twice the time.
        # White space before a colon would hide a key from that count.
        if text.count('":') != _count_keys(document) or any(colon in text for colon in _SPACED_COLONS):
            document = _CAREFUL.decode(text)
    except ManifestError:
        raise
    except RecursionError:
        raise ManifestError("manifest nested too deeply") from None
    except ValueError as error:
        raise ManifestError(f"manifest is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError("manifest is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ManifestError("manifest repeats a key")
    return result


def _refuse_constant(text: str) -> Any:
    raise ManifestError(f"manifest holds {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ManifestError(f"manifest holds a number out of range: {text[:40]}")
    return value


_SPACED_COLONS = (" :", "\t:", "\r:", "\n:")
_FAST = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_CAREFUL = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _count_keys(document: Any) -> int:
    """Keys of the objects that a manifest is made of; -1 where it is made of something else."""
    try:
        metrics, files = document["metrics"], document["files"]
        if type(metrics) is not dict or not all(type(file) is dict for file in files):
            return -1  # the length of a text or a list is no number of keys
        return len(document) + len(metrics) + sum(map(len, files))
    except (TypeError, KeyError):
        return -1


def _entry(entry: Any, chunk_bytes: int) -> FileEntry:
    # One flat pass: `list` parses ten thousand manifests, and a call per field doubled its time.
    try:
        path, size_bytes, mtime_ns, inode = entry["path"], entry["bytes"], entry["mtime_ns"], entry["inode"]
        crc, raw = entry["crc"], entry["chunks"]
    except (TypeError, KeyError) as error:
        raise ManifestError(f"manifest: a file entry is incomplete: {error}") from None
    if type(path) is not str or path == MANIFEST_NAME:
        raise ManifestError(f"manifest: {path!r:.80} cannot be listed")
    check_name(path)
    if not (type(size_bytes) is type(mtime_ns) is type(inode) is int and min(size_bytes, mtime_ns, inode) >= 0):
        raise ManifestError(f"manifest: size, mtime_ns or inode of {path!r} is not a whole number from 0")
    if max(size_bytes, mtime_ns, inode) >= 1 << 63 and (size_bytes >= 1 << 63 or mtime_ns >= 1 << 63 or inode >= 1 << 64):
        raise ManifestError(f"manifest: size, mtime_ns or inode of {path!r} is out of range")
    expected = -(-size_bytes // chunk_bytes)
    if expected > MAX_CHUNKS or type(raw) is not list or len(raw) != (expected if expected > 1 else 0):
        raise ManifestError(f"manifest: {path!r} does not have the {expected} chunk digests of {size_bytes:,} bytes")
    whole = _crc(crc)
    if not size_bytes and whole:
        raise ManifestError(f"manifest: {path!r} is empty, and its CRC is not that of nothing")
    chunks = tuple(map(_crc, raw)) if raw else ((whole,) if expected else ())
    return FileEntry(path, size_bytes, mtime_ns, inode, whole, chunks)


def _node_set(value: Any) -> NodeSet | None:
    if value is None:
        return None
    try:
        found = NodeSet(value["id"], value["node"], value["nodes"], value["digest"])
        whole = type(found.node) is type(found.nodes) is int and 0 <= found.node < found.nodes <= MAX_NODES
        if whole and _COMMIT.fullmatch(found.id) and _SHA256.fullmatch(found.digest):
            return found
    except (TypeError, KeyError):
        pass
    raise ManifestError(f"manifest: `group` is {value!r:.80}, which is no set of nodes")


def _crc(value: Any) -> int:
    if not isinstance(value, str) or not _CRC.fullmatch(value):
        raise ManifestError(f"manifest: {value!r:.40} is not a CRC of 16 upper-case hex digits")
    return int(value, 16)


def _int(document: Mapping[str, Any], key: str, *, low: int = 0, high: int = (1 << 63) - 1) -> int:
    value = document.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ManifestError(f"manifest: `{key}` is {value!r:.40}, not an integer from {low} to {high}")
    return value


def _str(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or len(value) > 4096:
        raise ManifestError(f"manifest: `{key}` is missing or not a short string")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(item) is str for item in value):
        raise ManifestError("manifest: `nonfinite` is not a list of names")
    return tuple(value)


def _metrics(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not all(type(item) in (int, float) for item in value.values()):
        raise ManifestError("manifest: `metrics` is not an object of numbers")
    try:
        return {key: float(item) for key, item in value.items()}
    except OverflowError:
        raise ManifestError("manifest: a metric is out of range") from None
