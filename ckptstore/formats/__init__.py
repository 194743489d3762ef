"""What the files of a checkpoint prove about themselves, without torch, without a manifest, and without
trusting a byte.

Damage is returned, never raised; only the medium's own errors (OSError) propagate. One rule gives the status:
what an interrupted writer leaves (absent, zero-length, or shorter than the file itself declares) is PARTIAL,
any other misfit is CORRUPT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptstore.formats import dcp, safetensors
from ckptstore.formats.reading import FormatError, not_regular, parse_json, read_exactly
from ckptstore.model import FileInfo, Finding, ReadAt, Status

__all__ = ["FormatError", "check_structure"]

#: JSON that a loader needs: the trainer or the inference server fails on it after the restart. Other JSON is
#: the user's.
_HF_JSON = re.compile(
    r"(adapter_|generation_|preprocessor_|processor_|tokenizer_)?config\.json"
    r"|(tokenizer|added_tokens|special_tokens_map|vocab|trainer_state|metadata)\.json"
)
#: Larger ones (a tokenizer's vocabulary) are looked at only where truncation shows: at their ends.
_PARSED_JSON_BYTES = 4 << 20
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".distcp")


def check_structure(read_at: ReadAt, files: Mapping[str, FileInfo]) -> list[Finding]:
    """Everything wrong with a part's files, by the formats that their names announce; empty if nothing is.

    `files` maps each name (relative to the part) to its entry; `read_at` reads them by these names.
    """
    findings = [*safetensors.check_all(read_at, files), *_check_dcp(read_at, files)]
    for name, info in files.items():
        base = name.rpartition("/")[2]
        if _HF_JSON.fullmatch(base):
            findings.extend(_check_json(read_at, info))
        elif info.size_bytes == 0 and info.kind == "file" and base.endswith(_TORCH_SUFFIXES):
            findings.append(Finding(name, "zero-length file", Status.PARTIAL))
    return list(dict.fromkeys(findings))  # two checks may see the same


def _check_dcp(read_at: ReadAt, files: Mapping[str, FileInfo]) -> list[Finding]:
    findings: list[Finding] = []
    claimed: set[str] = set()
    for metadata in sorted(name for name in files if name.rpartition("/")[2] == dcp.METADATA_NAME):
        folder = metadata.removesuffix(dcp.METADATA_NAME)
        claimed.add(folder)

        def read_below(name: str, offset: int, length: int, folder: str = folder) -> bytes:
            return read_at(folder + name, offset, length)

        below = {
            name.removeprefix(folder): info._replace(name=name.removeprefix(folder))
            for name, info in files.items()
            if name.startswith(folder)
        }
        found = dcp.check_folder(read_below, below)
        findings.extend(finding._replace(path=folder + finding.path) for finding in found)
    for folder in {name.rpartition("/")[0] for name in files if name.endswith(".distcp")}:
        prefix = f"{folder}/" if folder else ""
        if not any(prefix.startswith(known) for known in claimed):
            findings.append(Finding(prefix + dcp.METADATA_NAME, "missing: the save did not end", Status.PARTIAL))
    return findings


def _check_json(read_at: ReadAt, info: FileInfo) -> list[Finding]:
    if (problem := not_regular(info)) is not None:
        return [problem]
    size_bytes = info.size_bytes
    try:
        if size_bytes == 0:
            raise FormatError("zero-length file", Status.PARTIAL)
        if size_bytes <= _PARSED_JSON_BYTES:
            parse_json(read_exactly(read_at, info.name, 0, size_bytes), strict=False)
        elif not read_exactly(read_at, info.name, 0, 64).lstrip().startswith((b"{", b"[")):
            raise FormatError("not JSON")
        elif not read_exactly(read_at, info.name, size_bytes - 64, 64).rstrip().endswith((b"}", b"]")):
            raise FormatError(f"truncated: the JSON ends after {size_bytes} bytes", Status.PARTIAL)
    except FormatError as error:
        return [error.finding(info.name)]
    return []
