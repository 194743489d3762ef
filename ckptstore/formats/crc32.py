"""CRC-32 (the zip's) of a whole from the CRC-32s of its parts, which zlib computes but Python's binding cannot combine."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is x^0
_ONE = 1 << 31


def combine(a: int, b: int, b_bytes: int) -> int:
    """The CRC-32 of A followed by B, from both CRCs and the length of B."""
    # Appending n zero bytes multiplies the remainder by x^8n; inversions before and after cancel out.
    return _multiply(_power(8 * b_bytes), a) ^ b if b_bytes else a


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(1024)  # most parts have one of few lengths
def _power(exponent: int) -> int:
    """The remainder of x^exponent."""
    result, at = _ONE, 0
    while exponent:
        if exponent & 1:
            result = _multiply(_SQUARES[at % len(_SQUARES)], result)
        exponent >>= 1
        at += 1
    return result


def _squares() -> list[int]:
    squares = [_ONE >> 1]
    for _ in range(66):
        squares.append(_multiply(squares[-1], squares[-1]))
    return squares


_SQUARES = _squares()  # x^(2^n)
