"""Writes pickles of builtins and of named classes from fixed templates, opcode by opcode.

Nothing is imported, called or inspected: what stands in the bytes is what the caller spelled out. The opcodes are those of
protocol 2 (pickletools documents them); `Memo` adds those of protocol 4 that keep large pickles small.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ckptstore.errors import UsageError


class Raw(bytes):
    """Opcodes that leave one value on the stack, as a part of a larger value."""

    __slots__ = ()


Value = None | bool | int | float | str | Raw | tuple["Value", ...] | list["Value"] | Mapping[str, "Value"]


def dumps(value: Value) -> bytes:
    """The pickle of `value`, which consists of builtins. UsageError for anything else."""
    return b"\x80\x02" + emit(value) + b"."


def emit(value: Value) -> bytes:
    """The opcodes that leave `value` on the stack."""
    match value:
        case Raw():
            return value
        case None:
            return b"N"
        case True:
            return b"\x88"
        case False:
            return b"\x89"
        case int():
            return integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(emit, value)) + b"t" if value else b")"
        case list():
            return b"](" + b"".join(map(emit, value)) + b"e" if value else b"]"
        case dict():
            return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u" if value else b"}"
        case _:
            raise UsageError(f"a {type(value).__name__} cannot be put into a pickle of builtins")


def integer(value: int) -> bytes:
    """Any integer, in the fewest bytes."""
    if 0 <= value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def name(module: str, qualified: str) -> bytes:
    """A class or function, as loading will import it."""
    return b"c" + f"{module}\n{qualified}\n".encode("ascii")


def call(function: bytes, arguments: tuple[Value, ...]) -> bytes:
    """What calling the function with these arguments gives."""
    return function + emit(arguments) + b"R"


class Memo:
    """Emits a piece once and refers to it from then on. The calls must be made in the order of the bytes."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def __call__(self, piece: bytes) -> bytes:
        """`piece`, which must leave one value and use no memo itself, or a reference to that value."""
        number = self._known.get(piece)
        if number is None:
            self._known[piece] = len(self._known)
            return piece + b"\x94"
        return b"h" + struct.pack("<B", number) if number < 256 else b"j" + struct.pack("<I", number)
