"""What a safetensors file, and a set of them with an index, prove about themselves.

A file is a little-endian length of 8 bytes, a JSON header of that length, and the tensors' bytes, which the
header's offsets cover exactly. There is no checksum: a changed bit in a tensor cannot be seen here.

An interrupted writer leaves a file that is shorter than its header declares: PARTIAL. Everything else that
does not fit, more bytes than declared included, is CORRUPT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from ckptstore.formats.reading import (
    MAX_JSON_BYTES,
    FormatError,
    check_safe_name,
    not_regular,
    parse_json,
    read_exactly,
)
from ckptstore.model import FileInfo, Finding, ReadAt, Status

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference reader
MAX_FINDINGS = 20  #: of one kind in one file; a model has thousands of tensors and one message is enough

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")


class Tensor(NamedTuple):
    """One tensor of a header; `begin` and `end` are byte offsets into the file's data, after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(read_at: ReadAt, name: str, size_bytes: int) -> dict[str, Tensor]:
    """The tensors of a file that is `size_bytes` long, which they cover exactly; FormatError if not."""
    if size_bytes < 8:
        what = "zero-length file" if size_bytes == 0 else f"truncated: {size_bytes} bytes, not even a header's length"
        raise FormatError(what, Status.PARTIAL)
    start = read_exactly(read_at, name, 0, min(9, size_bytes))
    header_bytes = int.from_bytes(start[:8], "little")
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise FormatError(f"not safetensors: a header of {header_bytes} bytes")
    if start[8:] not in (b"{", b""):
        raise FormatError("not safetensors: the header is not a JSON object")
    if 8 + header_bytes > size_bytes:
        raise FormatError(f"truncated: {size_bytes} bytes of at least {8 + header_bytes}", Status.PARTIAL)
    try:
        header = parse_json(read_exactly(read_at, name, 8, header_bytes), strict=True)
    except FormatError as error:
        if error.problem.startswith("became"):
            raise
        raise FormatError(f"header: {error.problem}") from None  # the header is all there: not an early end
    about = header.get("__metadata__", {})
    if not isinstance(about, dict) or not all(_is_text(text) for item in about.items() for text in item):
        raise FormatError("header: __metadata__ is no object of texts")  # the format's reference reader refuses it
    tensors = {key: _tensor(key, value) for key, value in header.items() if key != "__metadata__"}
    _check_extent(tensors, size_bytes - 8 - header_bytes, size_bytes)
    return tensors


def _tensor(key: str, value: Any) -> Tensor:
    shown = ascii(key[:80])
    if not _is_text(key):
        raise FormatError(f"header: {shown} is no text")
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise FormatError(f"header: {shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"header: {shown} has the unknown dtype {ascii(dtype)[:40]}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"header: {shown} has no valid shape or data_offsets")
    if prod(shape) * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise FormatError(f"header: {shown} of shape {shape[:8]} {dtype} does not fill its data_offsets")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _is_text(value: object) -> bool:
    """Half a surrogate pair, which JSON can say, is none."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def _sizes(value: object) -> bool:
    # A file system's largest file bounds every size; longer shapes than 64 exist in no framework.
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _check_extent(tensors: Mapping[str, Tensor], data_bytes: int, size_bytes: int) -> None:
    position = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise FormatError(f"header: tensors overlap or leave a gap at byte {min(position, tensor.begin)}")
        position = tensor.end
    if data_bytes < position:
        declared = size_bytes - data_bytes + position
        raise FormatError(f"truncated: {size_bytes} of {declared} bytes", Status.PARTIAL)
    if data_bytes > position:
        raise FormatError(f"{data_bytes - position} bytes more than its header declares")


def check_file(read_at: ReadAt, info: FileInfo) -> list[Finding]:
    """What is wrong with one file; empty if its header describes it exactly."""
    try:
        read_header(read_at, info.name, info.size_bytes)
    except FormatError as error:
        return [error.finding(info.name)]
    return []


def check_index(
    read_at: ReadAt,
    files: Mapping[str, FileInfo],
    index: FileInfo,
    headers: Mapping[str, Mapping[str, Tensor]],
) -> list[Finding]:
    """What is wrong between an index (`*.index.json`) and the shards beside it.

    `headers` holds those shards that could be read; tensors are looked up in these only.
    `metadata.total_size` is not compared: writers disagree on whether tied weights count once or twice,
    quantizers leave the old value, and no loader reads it, while the headers together with the files' sizes
    prove more than it could.
    """
    folder = index.name.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    try:
        if index.size_bytes > MAX_JSON_BYTES:
            raise FormatError(f"an index of {index.size_bytes} bytes")
        content = parse_json(read_exactly(read_at, index.name, 0, index.size_bytes), strict=True)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError("no weight_map")
        shards = {check_safe_name(shard): prefix + shard for shard in dict.fromkeys(map(_text, weight_map.values()))}
    except FormatError as error:
        return [error.finding(index.name)]
    findings = [
        Finding(path, f"missing shard, named by {index.name}", Status.PARTIAL) for path in shards.values() if path not in files
    ]
    lost = [
        key for key, shard in weight_map.items() if (header := headers.get(shards[shard])) is not None and key not in header
    ]
    for key in lost[:MAX_FINDINGS]:
        problem = f"lacks the tensor {key[:80]!a}, which {index.name} places there"
        findings.append(Finding(shards[weight_map[key]], problem, Status.CORRUPT))
    if len(lost) > MAX_FINDINGS:
        more = f"{len(lost) - MAX_FINDINGS} more tensors are not where it places them"
        findings.append(Finding(index.name, more, Status.CORRUPT))
    return findings


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise FormatError("the weight_map places a tensor in something that is no file name")
    return value


def check_shard_names(files: Mapping[str, FileInfo]) -> list[Finding]:
    """Shards (`model-00001-of-00003.safetensors`) without their index: writers make the index last, so the
    save never ended.
    """
    findings, seen = [], set()
    for name, info in files.items():
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        index = f"{match['stem']}.{match['suffix']}.index.json"
        if index not in files and index not in seen:
            seen.add(index)
            findings.append(Finding(index, "missing index: the save did not end", Status.PARTIAL))
        if info.size_bytes == 0 and match["suffix"] == "bin":
            findings.append(Finding(name, "zero-length file", Status.PARTIAL))
    return findings


def check_all(read_at: ReadAt, files: Mapping[str, FileInfo]) -> list[Finding]:
    """Every safetensors file, every index, and shards that lack one."""
    findings = check_shard_names(files)
    headers: dict[str, dict[str, Tensor]] = {}
    for name, info in files.items():
        if not name.endswith(".safetensors"):
            continue
        if (problem := not_regular(info)) is not None:
            findings.append(problem)
            continue
        try:
            headers[name] = read_header(read_at, name, info.size_bytes)
        except FormatError as error:
            findings.append(error.finding(name))
    for name, info in files.items():
        if name.endswith((".safetensors.index.json", ".bin.index.json")):
            problem = not_regular(info)
            findings.extend([problem] if problem else check_index(read_at, files, info, headers))
    return findings
