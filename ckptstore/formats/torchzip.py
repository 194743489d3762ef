"""The zip that torch.save makes of one value, without torch: laid out before its data is there, and read back.

An archive is a stored (uncompressed) zip: `data.pkl`, a few constant records, and for a tensor its bytes as `data/0`, at a
multiple of 64 within the archive. A CRC-32 stands behind its record and in the directory at the end, never before the data:
everything up to the data is known beforehand, and everything behind it has a length that is.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

from ckptstore.formats import inert, pickling
from ckptstore.formats.reading import FormatError

ITEM_BYTES = {
    "complex128": 16,
    **dict.fromkeys(("float64", "int64", "complex64", "uint64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys((f"float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")), 1),
}
#: Those that torch has had a storage of its own for. The others are bytes, and a dtype beside them.
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
_DTYPES = {storage: dtype for dtype, storage in _STORAGES.items()}
_ALIGNMENT = 64
_LARGE = 0xFFFFFFFF  #: from here on a size or offset needs the 64-bit fields
_FLAGS = 0x0808  # names are UTF-8; CRC and sizes stand behind the data
_TAIL_BYTES = 64 << 10
_BEFORE = ((".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little"))
_AFTER = (("version", b"3\n"), (".data/serialization_id", b"0" * 40))
_ALLOWED = {
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",
    inert.PERSISTENT,
    *(f"torch.{storage}" for storage in _DTYPES),
}


class _Record(NamedTuple):
    name: str
    offset: int
    size_bytes: int
    crc: int


class Layout(NamedTuple):
    """An archive around data of a known size: `head`, the data, and a tail that `tail` makes of the data's CRC-32."""

    head: bytes
    data_bytes: int
    tail_bytes: int
    records: tuple[_Record, ...]  #: those of the head
    data_offset: int  #: of the data's local header

    @property
    def length(self) -> int:
        """Bytes of the whole archive."""
        return len(self.head) + self.data_bytes + self.tail_bytes

    def tail(self, crc32: int) -> bytes:
        """What follows the data; always `tail_bytes` long."""
        data = _Record("data/0", self.data_offset, self.data_bytes, crc32)
        after = _descriptor(data)
        return after + _end((*self.records, data), len(self.head) + self.data_bytes + len(after))


class Data(NamedTuple):
    """A tensor's bytes within an archive. `crc32` is None where the writer was told to compute none."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    crc32: int | None


def tensor(dtype: str, shape: Sequence[int], *, expanded: bool = False) -> Layout:
    """The archive of a contiguous tensor; `expanded`: of one whose elements are all the single one that is stored."""
    stored = 1 if expanded else prod(shape)
    strides = tuple(0 if expanded else prod(shape[n + 1 :]) for n in range(len(shape)))
    ordered = pickling.Raw(pickling.call(pickling.name("collections", "OrderedDict"), ()))
    more: tuple[pickling.Value, ...] = ()
    if dtype in _STORAGES:
        rebuild, kind, count = "_rebuild_tensor_v2", pickling.name("torch", _STORAGES[dtype]), stored
    else:
        rebuild, kind = "_rebuild_tensor_v3", pickling.name("torch.storage", "UntypedStorage")
        count, more = stored * ITEM_BYTES[dtype], (pickling.Raw(pickling.name("torch", dtype)),)
    storage = pickling.Raw(pickling.emit(("storage", pickling.Raw(kind), "0", "cpu", count)) + b"Q")
    arguments = (storage, 0, tuple(shape), strides, False, ordered, *more)
    code = b"\x80\x02" + pickling.call(pickling.name("torch._utils", rebuild), arguments) + b"."
    head, records = _records((("data.pkl", code), *_BEFORE))
    layout = Layout(
        head + _local("data/0", len(head), stored * ITEM_BYTES[dtype]), stored * ITEM_BYTES[dtype], 0, records, len(head)
    )
    return layout._replace(tail_bytes=len(layout.tail(0)))


def value(content: pickling.Value) -> bytes:
    """The whole archive of a value made of builtins."""
    head, records = _records((("data.pkl", pickling.dumps(content)), *_BEFORE))
    return head + _end(records, len(head))


def _records(contents: Sequence[tuple[str, bytes]], begin: int = 0) -> tuple[bytes, tuple[_Record, ...]]:
    data, records = b"", []
    for name, content in contents:
        record = _Record(name, begin + len(data), len(content), zlib.crc32(content))
        data += _local(name, record.offset, len(content)) + content + _descriptor(record)
        records.append(record)
    return data, tuple(records)


def _local(name: str, offset: int, size_bytes: int) -> bytes:
    path = f"archive/{name}".encode()
    sizes = struct.pack("<HHQQ", 1, 16, size_bytes, size_bytes) if size_bytes >= _LARGE else b""
    begin = offset + 30 + len(path) + len(sizes) + 4
    padding = b"Z" * (-begin % _ALIGNMENT)
    extra = sizes + struct.pack("<2sH", b"FB", len(padding)) + padding
    size = _LARGE if sizes else 0
    return struct.pack("<4s5H3I2H", b"PK\3\4", 0, _FLAGS, 0, 0, 0, 0, size, size, len(path), len(extra)) + path + extra


def _descriptor(record: _Record) -> bytes:
    form = "<4sIQQ" if record.size_bytes >= _LARGE else "<4sIII"
    return struct.pack(form, b"PK\7\x08", record.crc, record.size_bytes, record.size_bytes)


def _end(records: Sequence[_Record], position: int) -> bytes:
    more, last = _records(_AFTER, position)
    directory = b"".join(map(_entry, (*records, *last)))
    count, begin, size = len(records) + len(last), position + len(more), len(directory)
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + size, 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(begin, _LARGE), 0)
    return more + directory + wide + locator + end


def _entry(record: _Record) -> bytes:
    path = f"archive/{record.name}".encode()
    size, offset = min(record.size_bytes, _LARGE), min(record.offset, _LARGE)
    # The wide fields stand in this order, each only where its narrow one is full.
    wide = [record.size_bytes] * 2 * (size == _LARGE) + [record.offset] * (offset == _LARGE)
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    fields = (0, 0, _FLAGS, 0, 0, 0, record.crc, size, size, len(path), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + path + extra


def find_data(read: Callable[[int, int], bytes], length: int) -> Data:
    """Where the tensor in an archive of `length` bytes lies; `read(offset, length)` reads within the archive.

    FormatError if it is no archive of one contiguous little-endian tensor with a storage of its own.
    """
    records = {record.name.partition("/")[2]: record for record in _directory(read, length)}
    needed = [records.get(name) for name in ("data.pkl", "byteorder", "data/0")]
    code, order, data = needed
    if code is None or data is None or code.size_bytes > 1 << 20:
        raise FormatError("not an archive of one tensor")
    if order is not None and (order.size_bytes > 16 or _content(read, order) != b"little"):
        raise FormatError("not little-endian")
    dtype, shape = _describe(_content(read, code))
    if data.size_bytes != prod(shape) * ITEM_BYTES[dtype]:
        raise FormatError(f"{data.size_bytes} bytes for a tensor of shape {shape[:8]} {dtype}")
    begin = _begin(read, data)
    if begin + data.size_bytes > length:
        raise FormatError("an archive that ends within its data")
    # Writers told to compute no CRC leave 0 in every record, the constant ones included.
    unchecked = code.crc == 0 and data.crc == 0
    return Data(dtype, shape, begin, data.size_bytes, None if unchecked else data.crc)


def _directory(read: Callable[[int, int], bytes], length: int) -> Iterator[_Record]:
    tail = read(max(0, length - _TAIL_BYTES), min(length, _TAIL_BYTES))
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise FormatError("not a zip archive, or one that is cut off")
    count, size, offset = struct.unpack_from("<H2I", tail, at + 10)
    if (wide := tail.rfind(b"PK\6\6", 0, at)) >= 0 and at - wide == 76:
        count, size, offset = struct.unpack_from("<3Q", tail, wide + 32)
    if size > 1 << 20 or offset + size > length or count > 1000:
        raise FormatError("not an archive of one tensor")
    directory, position = read(offset, size), 0
    for _ in range(count):
        try:
            fields = struct.unpack_from("<4s6H3I5H2I", directory, position)
        except struct.error:
            raise FormatError("a zip directory that is cut off") from None
        mark, method = fields[0], fields[4]
        crc, stored, full, name_bytes, extra_bytes, comment_bytes = fields[7:13]
        if mark != b"PK\1\2" or method != 0:
            raise FormatError("a zip whose records are compressed")
        begin = position + 46
        name = directory[begin : begin + name_bytes].decode("utf-8", "replace")
        extra = directory[begin + name_bytes : begin + name_bytes + extra_bytes]
        full, stored, place = _widen(extra, full, stored, fields[16])
        if full != stored:
            raise FormatError("a zip whose records are compressed")
        yield _Record(name, place, full, crc)
        position = begin + name_bytes + extra_bytes + comment_bytes


def _widen(extra: bytes, *values: int) -> list[int]:
    found, at = list(values), 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(size, len(extra) - at - 4) // 8}Q", extra, at + 4))
            found = [next(wide, value) if value == _LARGE else value for value in values]
        at += 4 + size
    return found


def _begin(read: Callable[[int, int], bytes], record: _Record) -> int:
    local = read(record.offset, 30)
    if len(local) < 30 or local[:4] != b"PK\3\4":
        raise FormatError("a zip record without its local header")
    name_bytes, extra_bytes = struct.unpack_from("<2H", local, 26)
    return int(record.offset + 30 + name_bytes + extra_bytes)


def _content(read: Callable[[int, int], bytes], record: _Record) -> bytes:
    content = read(_begin(read, record), record.size_bytes)
    if record.crc and zlib.crc32(content) != record.crc:
        raise FormatError(f"the CRC-32 of {record.name[:40]!a} does not match")
    return content


def _describe(code: bytes) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape of the tensor that a data.pkl rebuilds."""
    root = inert.read(code, _ALLOWED.__contains__)
    arguments = root.arguments if isinstance(root, inert.Record) else None
    if not isinstance(arguments, tuple) or len(arguments) < 4:
        raise FormatError("not a tensor")
    storage, offset, shape, strides = arguments[:4]
    kind = storage.arguments if isinstance(storage, inert.Record) else None
    if not (isinstance(kind, tuple) and len(kind) == 5 and isinstance(kind[1], inert.Name) and kind[1].name in _DTYPES):
        raise FormatError("not a tensor of a dtype that is known")
    if offset != 0:
        raise FormatError("a tensor that does not begin where its storage does")
    if not all(
        isinstance(size, tuple) and len(size) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in size)
        for size in (shape, strides)
    ):
        raise FormatError("a tensor without a shape")
    expected = tuple(prod(shape[n + 1 :]) for n in range(len(shape)))
    if len(strides) != len(shape) or any(
        size > 1 and stride != wanted for size, stride, wanted in zip(shape, strides, expected, strict=True)
    ):
        raise FormatError("a tensor that is not contiguous")
    return _DTYPES[kind[1].name], shape
