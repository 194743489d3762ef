"""What becomes of files: torn, flipped, hostile. All of it from a seeded random.Random, so that a case can be made again."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 100_000  #: brackets
_RAW = itertools.count()


class Raw(str):
    """Text that goes into JSON as it is."""

    __slots__ = ()


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, -(2**63), 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -(10**400)),
    *map(Raw, ("9" * 4300, "9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "-0.0", "1E400", "0.1e-400", "01")),
    *(0.5, -0.5, 1e300, 1e18, 1e-320),
    *("", "a", "x" * 100_000, "\0", "a\0b", "\ud800", "\x1b[2J\x07", "\n", "‮", "nan", "é", "1", "-1", "true"),
    *(
        "/etc/passwd",
        "../../../etc/passwd",
        "..",
        ".",
        "a/../../b",
        "a//b",
        "C:\\x",
        "~root",
        "step-1",
        "$(id)",
        "${oc.env:HOME}",
    ),
    *([], {}, [[]], [None], {"": None}, {"a": {"a": {"a": 1}}}, ["x"] * 1000, [{}] * 100, {str(n): n for n in range(1000)}),
    *map(Raw, ("[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "[" * 400 + "]" * 400, "[" * 900 + "]" * 900)),
    *map(Raw, ('{"a":' * 300 + "1" + "}" * 300, '"unterminated', "", "tru", "'x'", "//", "\\u0000")),
)


def to_text(document: Any) -> str:
    """JSON, with what is Raw as it is."""
    raw: dict[str, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raw[token := f"@raw{next(_RAW)}@"] = str(value)
            return token
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(plain(document), separators=(",", ":"))
    for token, value in raw.items():
        text = text.replace(f'"{token}"', value)
    return text


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def mutate_document(rng: random.Random, document: Any) -> str:
    """JSON text of `document` with one thing of its structure wrong: a value, a field missing, twice or renamed."""
    document = json.loads(json.dumps(document))
    path = rng.choice(_places(document))
    if not path:
        return to_text(rng.choice(HOSTILE))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    match rng.randrange(10):
        case 0 if isinstance(parent, dict):
            del parent[key]
        case 0:
            parent.pop(key)
        case 1 if isinstance(parent, dict):  # twice, the second one with another value
            inside = {k: to_text(v) for k, v in parent.items()}
            twice = [*inside.items(), (key, to_text(rng.choice(HOSTILE)))]
            whole = Raw("{" + ",".join(f"{json.dumps(k)}{rng.choice(('', ' '))}:{v}" for k, v in twice) + "}")
            if len(path) == 1:
                return whole
            above = document
            for step in path[:-2]:
                above = above[step]
            above[path[-2]] = whole
        case 2 if isinstance(parent, dict):
            parent[rng.choice((f"{key} ", key.upper(), "", "\0", f"x{key}"))] = parent.pop(key)
        case 3 if isinstance(parent, dict):
            parent[rng.choice(("more", "__proto__", "", key * 3))] = rng.choice(HOSTILE)
        case 4 if isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            value = parent[key]
            changed = (value + 1, value - 1, -value, value * 2**32, float(value), str(value), value + 0.5)
            parent[key] = rng.choice(changed)
        case 5 if isinstance(parent[key], str):
            value = parent[key]
            parent[key] = rng.choice(
                (value + "x", value[:-1], value.upper(), f"/{value}", f"../{value}", value + "\0", value * 50)
            )
        case 6 if isinstance(parent, list):
            parent.insert(key, parent[key])
        case 7:
            parent[key] = [parent[key]]
        case _:
            parent[key] = rng.choice(HOSTILE)
    return to_text(document)


_NUMBER = re.compile(rb"\d+")
_HUGE = (b"0", b"-1", b"4294967295", b"9223372036854775807", b"18446744073709551616", b"1e999", b"9" * 5000, b"NaN", b"1.5")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One or two of the accidents, or attacks, that know nothing of the format."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = _accident(rng, data)
    return data


def _accident(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    if len(data) > 64 and rng.random() < 0.5:  # beginnings and ends are where formats are
        at = rng.choice((rng.randrange(64), len(data) - rng.randrange(64)))
    to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 16, 100)))
    match rng.randrange(14):
        case 0 | 1:
            return data[:at]
        case 2 | 3 | 4 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 5:
            return data[:at] + data[to:]
        case 6:
            return data[:at] + rng.randbytes(to - at or 1) + data[at:]
        case 7:
            return data[:at] + bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * (to - at) + data[to:]
        case 8:
            return data[:at] + data[at:to] * rng.choice((2, 3, 100)) + data[to:]
        case 9:
            value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, len(data), rng.randrange(1 << 40)))
            field = struct.pack("<Q", value)[: rng.choice((2, 4, 8))]
            return data[:at] + field + data[at + len(field) :]
        case 10:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" ", b"\n", b"\x1f\x8b")) + data
        case 11:
            return data + rng.choice((b"\0" * 64, b"\xff", b"{}", b"\n", data[-40:]))
        case 12 if numbers := list(_NUMBER.finditer(data)):
            which = rng.choice(numbers)
            return data[: which.start()] + rng.choice(_HUGE) + data[which.end() :]
        case 13:
            return data[: len(data) - (to - at)] + b"\0" * (to - at)
    return data[::-1] if rng.random() < 0.1 else b""


def mutate(rng: random.Random, data: bytes, name: str = "") -> bytes:
    """By the structure, where there is one that is known, else byte by byte."""
    if name.endswith(".jsonl"):
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = mutate(rng, lines[at])
        return b"\n".join(lines)
    if name.endswith(".safetensors") and len(data) > 8 and rng.random() < 0.6:
        size = struct.unpack("<Q", data[:8])[0]
        with contextlib.suppress(ValueError, RecursionError, OverflowError):
            header = mutate_document(rng, json.loads(data[8 : 8 + size])).encode()
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
    if b"PK\1\2" in data and rng.random() < 0.6:
        return _mutate_zip(rng, data)
    if data[:1] in (b"{", b"[") and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError, OverflowError):  # already so deep that nothing reads it
            return mutate_document(rng, json.loads(data)).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data)


def _mutate_zip(rng: random.Random, data: bytes) -> bytes:
    """A field of one of a zip's headers; both sizes of a record together, so that they agree."""
    places = [match.start() for match in re.finditer(rb"PK[\1\3\5\6]", data)]
    at = rng.choice(places)
    value = rng.choice((0, 1, len(data), 1 << 16, 1 << 31, (1 << 32) - 2, (1 << 32) - 1, rng.randrange(1 << 32)))
    field = struct.pack("<I", value)[: rng.choice((2, 4, 4))]
    if data[at : at + 4] == b"PK\1\2" and rng.random() < 0.5:
        at, field = at + 20, struct.pack("<II", value, value)
    else:
        at += 4 + rng.randrange(44)
    return data[:at] + field + data[at + len(field) :]


# What lies under the name of a file that is something else


def _becomes(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        remove(path)
        make(path)

    return replace


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def _full_folder(path: Path) -> None:
    (path / "inside").mkdir(parents=True)
    (path / "inside" / path.name).write_bytes(b"x")


def _sparse(path: Path) -> None:
    """A terabyte; the bytes that were there first."""
    os.truncate(path, 1 << 40)


def _linked_out(path: Path) -> None:
    """Its own bytes, by way of a link that leads out of the store."""
    outside = path.parent / f"{path.name}.elsewhere"
    for folder in path.parents:
        if folder.name == "fuzzed":
            outside = folder.parent / "outside" / path.name
            break
    outside.parent.mkdir(exist_ok=True)
    shutil.copy2(path, outside)
    remove(path)
    path.symlink_to(outside)


def _stretched(to: int) -> Callable[[Path], None]:
    return lambda path: os.utime(path, (to, to))


ENTRIES: dict[str, Callable[[Path], None]] = {
    "fifo": _becomes(os.mkfifo),
    "socket": _becomes(_socket),
    "folder": _becomes(Path.mkdir),
    "full folder": _becomes(_full_folder),
    "link to nothing": _becomes(lambda path: path.symlink_to("nothing")),
    "link to itself": _becomes(lambda path: path.symlink_to(path.name)),
    "link to passwd": _becomes(lambda path: path.symlink_to("/etc/passwd")),
    "link to zero": _becomes(lambda path: path.symlink_to("/dev/zero")),
    "link above": _becomes(lambda path: path.symlink_to("..")),
    "link to its bytes": _linked_out,
    "gone": remove,
    "empty": lambda path: path.write_bytes(b""),
    "sparse": _sparse,
    "unreadable": lambda path: path.chmod(0),
    "before 1970": _stretched(-1),
    "after 2106": _stretched(1 << 33),
}
#: A terabyte of nothing takes minutes to be digested.
SLOW = frozenset({"sparse"})
