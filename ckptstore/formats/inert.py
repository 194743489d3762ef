"""Reads a pickle as data: names stay names, calls stay records, and nothing is imported, called, hashed or
compared.

Only the opcodes that Python's pickler emits for plain values and dataclasses (protocols 2 to 5) are
understood; a pickle with any other opcode, or with a name that the caller does not allow, is refused. Time
and memory are linear in the bytes.
"""

from __future__ import annotations

import contextlib
import gc
import struct
from collections.abc import Callable, Iterator
from typing import Any

from ckptstore.formats.reading import FormatError

PERSISTENT = "pickle.persistent_id"  #: to be allowed by who expects ids of things outside the pickle (torch's storages)
MAX_VALUES = 12_000_000  #: bounds memory (about 1 GB at worst) where each byte of input makes an object
_MARK = object()
_NOTHING = object()  # an opcode that leaves no new value on the stack
_INT = struct.Struct("<i")
_UNSIGNED = struct.Struct("<I")
_DOUBLE = struct.Struct(">d")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which looks at a million new objects again and again: half of the time it takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Name:
    """A class or function that the pickle refers to."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def full(self) -> str:
        """As Python would import it."""
        return f"{self.module}.{self.name}"


class Record:
    """An object that loading would make: what would be called, with what, the state and the items it would be given."""

    __slots__ = ("arguments", "made_by", "pairs", "state")

    def __init__(self, made_by: Name, arguments: Any) -> None:
        self.made_by = made_by
        self.arguments = arguments
        self.state: Any = None
        self.pairs: Pairs | None = None  #: of an OrderedDict and its like


class Pairs(list[Any]):
    """A dict as [key, value, key, value, …]: keys are never hashed, so a crafted key costs nothing."""

    __slots__ = ()


def read(data: bytes, is_allowed: Callable[[str], bool], *, most_values: int = MAX_VALUES) -> Any:
    """The value that `data` describes. FormatError if it is no whole pickle, names something not
    allowed, or makes more than `most_values` objects.
    """
    machine = _Machine(data, is_allowed, most_values)
    try:
        result = machine.run()
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, AttributeError, KeyError):
        raise FormatError("not a whole pickle") from None
    if machine.refused:
        shown = ", ".join(ascii(name[:80])[1:-1] for name in sorted(machine.refused)[:5])
        raise FormatError(f"names {shown}")
    return result


class _Machine:
    def __init__(self, data: bytes, is_allowed: Callable[[str], bool], most_values: int) -> None:
        self.data = data
        self.most_values = most_values
        self.position = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.names: dict[tuple[str, str], Name] = {}
        self.is_allowed = is_allowed
        self.refused: set[str] = set()

    def run(self) -> Any:
        # The most frequent opcodes first, and inline: this loop is all the time that a large file takes.
        data, stack, memo, push, pop = self.data, self.stack, self.memo, self.stack.append, self.stack.pop
        at = values = 0
        while True:
            code = data[at]
            at += 1
            if code == 0x94:  # MEMOIZE
                memo.append(stack[-1])
                continue
            if code == 0x6A:  # LONG_BINGET
                push(memo[_UNSIGNED.unpack_from(data, at)[0]])
                at += 4
                continue
            if code == 0x68:  # BINGET
                push(memo[data[at]])
                at += 1
                continue
            if code == 0x4B:  # BININT1
                push(data[at])
                at += 1
                continue
            if code == 0x81 or code == 0x52:  # NEWOBJ, REDUCE
                arguments, made_by = pop(), pop()
                if type(made_by) is not Name or arguments is _MARK:
                    raise FormatError("calls something that is no name")
                push(Record(made_by, arguments))
            elif code == 0x62:  # BUILD
                state, target = pop(), stack[-1]
                if type(target) is not Record or state is _MARK:
                    raise FormatError("gives state to something that is no record")
                target.state = state
                continue
            elif code == 0x2E:  # STOP
                if len(stack) != 1 or stack[0] is _MARK:
                    raise FormatError("not a whole pickle")
                return stack[0]
            elif (handle := _OPCODES.get(code)) is not None:
                self.position = at
                result = handle(self)
                at = self.position
                if result is not _NOTHING:
                    push(result)
            elif (sized := _SIZED.get(code)) is not None:
                self.position = at
                push(self.sized(*sized))
                at = self.position
            elif (constant := _CONSTANTS.get(code, _MARK)) is not _MARK:
                push(constant)
                continue
            elif code == 0x30:  # POP
                pop()
                continue
            else:
                raise FormatError(f"opcode {code:#04x}, which no such file needs")
            values += 1
            if values > self.most_values:
                raise FormatError("holds more values than are read")

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        piece = self.data[self.position : self.position + size]
        if len(piece) < size:
            raise FormatError("not a whole pickle")
        self.position += size
        return piece

    def sized(self, length_bytes: int, convert: Callable[[bytes], Any]) -> Any:
        return convert(self.take(self.number(length_bytes)))

    def since_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise FormatError("not a whole pickle")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def named(self, module: str, name: str) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise FormatError("not a whole pickle")
        known = self.names.get((module, name))
        if known is None:
            known = self.names[module, name] = Name(module, name)
            if not self.is_allowed(known.full) and len(self.refused) < 100:
                self.refused.add(known.full)
        return known

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 512)
        if end < 0:
            raise FormatError("not a whole pickle")
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "surrogatepass")


def _signed(piece: bytes) -> int:
    return int.from_bytes(piece, "little", signed=True)


def _extend(machine: _Machine, items: list[Any], kind: type) -> Any:
    target: Any = machine.stack[-1]
    if type(target) is Record and kind is Pairs:
        if target.pairs is None:
            target.pairs = Pairs()
        target.pairs.extend(items)
        return _NOTHING
    fits = type(target) is kind
    if not fits:
        raise FormatError("not a whole pickle")
    target.extend(items)
    return _NOTHING


def _tuple(machine: _Machine, size: int) -> Any:
    items = machine.stack[-size:]
    if len(items) < size or _MARK in items:
        raise FormatError("not a whole pickle")
    del machine.stack[-size:]
    return tuple(items)


def _call(machine: _Machine) -> Any:
    made_by, arguments, _ = _tuple(machine, 3)
    if type(made_by) is not Name:
        raise FormatError("calls something that is no name")
    return Record(made_by, arguments)


def _persistent(machine: _Machine) -> Any:
    return Record(machine.named(*PERSISTENT.split(".")), machine.stack.pop())


def _skip(machine: _Machine, size: int) -> Any:
    machine.take(size)
    return _NOTHING


def _put(machine: _Machine, size: int) -> Any:
    number, memo = machine.number(size), machine.memo
    if number > len(memo):  # picklers count
        raise FormatError("not a whole pickle")
    memo[number : number + 1] = [machine.stack[-1]]
    return _NOTHING


_CONSTANTS: dict[int, Any] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}
#: opcode → bytes of the length that precedes the value, and what the value's bytes mean
_SIZED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    0x8C: (1, _text),
    0x58: (4, _text),
    0x8D: (8, _text),
    0x43: (1, bytes),
    0x42: (4, bytes),
    0x8E: (8, bytes),
    0x8A: (1, _signed),
}
_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: _skip(m, 1),  # PROTO
    0x95: lambda m: _skip(m, 8),  # FRAME: its length adds nothing here
    0x28: lambda _: _MARK,  # MARK
    0x4D: lambda m: m.number(2),
    0x4A: lambda m: _INT.unpack(m.take(4))[0],
    0x47: lambda m: _DOUBLE.unpack(m.take(8))[0],
    0x5D: lambda _: [],
    0x7D: lambda _: Pairs(),
    0x8F: lambda _: [],  # EMPTY_SET, kept as a list
    0x90: lambda m: _extend(m, m.since_mark(), list),  # ADDITEMS
    0x91: lambda m: tuple(m.since_mark()),  # FROZENSET
    0x61: lambda m: _extend(m, [m.stack.pop()], list),  # APPEND
    0x65: lambda m: _extend(m, m.since_mark(), list),  # APPENDS
    0x73: lambda m: _extend(m, list(_tuple(m, 2)), Pairs),  # SETITEM
    0x75: lambda m: _extend(m, m.since_mark(), Pairs),  # SETITEMS
    0x74: lambda m: tuple(m.since_mark()),
    0x85: lambda m: _tuple(m, 1),
    0x86: lambda m: _tuple(m, 2),
    0x87: lambda m: _tuple(m, 3),
    0x93: lambda m: m.named(*_tuple(m, 2)),  # STACK_GLOBAL
    0x63: lambda m: m.named(m.line(), m.line()),  # GLOBAL
    0x92: _call,  # NEWOBJ_EX
    0x51: _persistent,  # BINPERSID
    0x71: lambda m: _put(m, 1),
    0x72: lambda m: _put(m, 4),
}
