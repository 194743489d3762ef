"""Pickles made of builtins, byte by byte: for the one file that AReaL demands as a pickle.

Protocol 2, and only the opcodes below; nothing is imported or called when it is loaded, and nothing here loads a pickle.
Opcodes: pickletools in the standard library documents them.
"""

from __future__ import annotations

import struct

from ckptstore.errors import UsageError

Value = None | bool | int | str | list["Value"] | dict[str, "Value"]


def dumps(value: Value) -> bytes:
    """The pickle of `value`; integers of up to 32 bits, text of any length. UsageError for anything else."""
    return b"\x80\x02" + _emit(value) + b"."


def _emit(value: Value) -> bytes:
    if value is None:
        return b"N"
    if value is True:
        return b"\x88"
    if value is False:
        return b"\x89"
    if isinstance(value, int) and -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, list):
        return b"](" + b"".join(map(_emit, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_emit(key) + _emit(item) for key, item in value.items()) + b"u"
    raise UsageError(f"a {type(value).__name__} cannot be put into a pickle of builtins")
