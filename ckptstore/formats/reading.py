"""What all format checks share: bounded reads, strict JSON, safe names, and the error for a file that does
not hold.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from ckptstore.model import FileInfo, Finding, ReadAt, Status

MAX_JSON_BYTES = 32 << 20
#: Parsed JSON costs up to 25 times its text; real headers stay far below this many values (200,000 tensors in
#: one file).
MAX_JSON_VALUES = 2_000_000
_MAX_NAME_CHARS = 1024


class FormatError(ValueError):
    """A file is not what its format demands. `status` is what that makes of the checkpoint."""

    def __init__(self, problem: str, status: Status = Status.CORRUPT) -> None:
        super().__init__(problem)
        self.problem = problem
        self.status = status

    def finding(self, path: str) -> Finding:
        """The same, said of the file at `path`."""
        return Finding(path, self.problem, self.status)


def read_exactly(read_at: ReadAt, name: str, offset: int, length: int) -> bytes:
    """`length` bytes, which the file's listed size promises; FormatError if the file ends before."""
    data = read_at(name, offset, length)
    if len(data) < length:
        raise FormatError("became shorter while it was read", Status.PARTIAL)
    return data[:length]


def not_regular(info: FileInfo) -> Finding | None:
    """Why this entry cannot be trusted to hold bytes, if so: links are never followed, devices never
    opened.
    """
    if info.kind == "file":
        return None
    what = "a symbolic link, which is not followed" if info.kind == "symlink" else "not a regular file"
    return Finding(info.name, what, Status.PARTIAL)


def check_safe_name(name: object) -> str:
    """`name` if it is a relative path that stays below its folder; FormatError otherwise."""
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME_CHARS:
        raise FormatError("names a file by something that is no file name")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise FormatError(f"names a file outside its folder: {name[:80]!a}")
    return name


def parse_json(data: bytes, *, strict: bool) -> Any:
    """JSON of at most `MAX_JSON_VALUES` values. `strict` refuses duplicate keys and NaN, which HF's own logs
    contain.

    FormatError says PARTIAL when the text merely ends too early, CORRUPT otherwise.
    """
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MAX_JSON_VALUES:
        raise FormatError("holds more values than any real file of its kind")
    text = ""
    try:
        text = data.decode("utf-8")
        if strict:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        return json.loads(text)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise FormatError(f"truncated: the JSON ends after {len(data)} bytes", Status.PARTIAL) from None
        raise FormatError(f"not JSON: {error.msg} at byte {error.pos}") from None
    except RecursionError:
        raise FormatError("not JSON of a sane depth") from None
    except ValueError:  # not UTF-8, or a number of thousands of digits
        raise FormatError("not JSON: bytes that are no text or no number") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise FormatError("the JSON has a key twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FormatError("the JSON contains a number out of range")
    return value


def _no_constant(name: str) -> NoReturn:
    raise FormatError(f"the JSON contains {name}")
