"""GGUF blocks to float32 in machine code, made by numba on first use and kept by it on disk.

One function a kind, one row of a weight at a time. Layouts are those of ``ggml-quants.c``; products and sums are in the
order of the ``gguf`` package, so that every number is the same to the last bit.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as Kind
from numba import njit, prange

HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""Every number of 16 bits: numba knows none."""

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
"""What the 4 bits of IQ4_NL and IQ4_XS stand for."""


@njit(inline="always")
def _half(block, at):  # type: ignore[no-untyped-def]
    return HALF[block[at] | (np.uint16(block[at + 1]) << 8)]


@njit
def _q4_0(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 18):
        block, to = row[18 * k : 18 * k + 18], out[32 * k : 32 * k + 32]
        scale = _half(block, 0)
        for j in range(16):
            to[j] = scale * (np.float32(block[2 + j] & 15) - np.float32(8))
        for j in range(16):
            to[16 + j] = scale * (np.float32(block[2 + j] >> 4) - np.float32(8))


@njit
def _q4_1(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 20):
        block, to = row[20 * k : 20 * k + 20], out[32 * k : 32 * k + 32]
        scale, least = _half(block, 0), _half(block, 2)
        for j in range(16):
            to[j] = scale * np.float32(block[4 + j] & 15) + least
        for j in range(16):
            to[16 + j] = scale * np.float32(block[4 + j] >> 4) + least


@njit
def _q5_0(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 22):
        block, to = row[22 * k : 22 * k + 22], out[32 * k : 32 * k + 32]
        scale = _half(block, 0)
        for j in range(16):
            high = (block[2 + j // 8] >> (j % 8)) & 1, (block[4 + j // 8] >> (j % 8)) & 1
            to[j] = scale * (np.float32((block[6 + j] & 15) | (high[0] << 4)) - np.float32(16))
            to[16 + j] = scale * (np.float32((block[6 + j] >> 4) | (high[1] << 4)) - np.float32(16))


@njit
def _q5_1(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 24):
        block, to = row[24 * k : 24 * k + 24], out[32 * k : 32 * k + 32]
        scale, least = _half(block, 0), _half(block, 2)
        for j in range(16):
            high = (block[4 + j // 8] >> (j % 8)) & 1, (block[6 + j // 8] >> (j % 8)) & 1
            to[j] = scale * np.float32((block[8 + j] & 15) | (high[0] << 4)) + least
            to[16 + j] = scale * np.float32((block[8 + j] >> 4) | (high[1] << 4)) + least


@njit
def _q8_0(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 34):
        block, to = row[34 * k : 34 * k + 34], out[32 * k : 32 * k + 32]
        scale = _half(block, 0)
        for j in range(32):
            to[j] = np.float32(np.int8(block[2 + j])) * scale


@njit
def _q2_k(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 84):
        block, to = row[84 * k : 84 * k + 84], out[256 * k : 256 * k + 256]
        scale, least = _half(block, 80), _half(block, 82)
        for group in range(16):
            first, shift = 16 + 32 * (group // 8) + 16 * (group % 2), 2 * (group // 2 % 4)
            by = scale * np.float32(block[group] & 15)
            minus = least * np.float32(block[group] >> 4)
            for j in range(16):
                to[16 * group + j] = by * np.float32((block[first + j] >> shift) & 3) - minus


@njit
def _q3_k(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 110):
        block, to = row[110 * k : 110 * k + 110], out[256 * k : 256 * k + 256]
        scale = _half(block, 108)
        for group in range(16):
            low = (block[96 + group % 8] >> (4 * (group // 8))) & 15
            high = (block[104 + group % 4] >> (2 * (group // 4))) & 3
            by = scale * (np.float32(low | (high << 4)) - np.float32(32))
            first, shift = 32 + 32 * (group // 8) + 16 * (group % 2), 2 * (group // 2 % 4)
            mask, bit = 16 * (group % 2), group // 2
            for j in range(16):
                less = 4 * (1 - ((block[mask + j] >> bit) & 1))
                to[16 * group + j] = by * np.float32(np.int8((block[first + j] >> shift) & 3) - np.int8(less))


@njit(inline="always")
def _scale_and_least(block, at, group):  # type: ignore[no-untyped-def]
    """The 6 bits each that Q4_K and Q5_K keep of a group of 32, from their 12 bytes that begin at ``at``."""
    if group < 4:
        return block[at + group] & 63, block[at + 4 + group] & 63
    low = block[at + 4 + group]
    high = (block[at + group - 4] >> 6) << 4, (block[at + group] >> 6) << 4
    return (low & 15) | high[0], (low >> 4) | high[1]


@njit
def _q4_k(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 144):
        block, to = row[144 * k : 144 * k + 144], out[256 * k : 256 * k + 256]
        scale, least = _half(block, 0), _half(block, 2)
        for group in range(8):
            by, minus = _scale_and_least(block, 4, group)
            by, minus = scale * np.float32(by), least * np.float32(minus)
            first, shift = 16 + 32 * (group // 2), 4 * (group % 2)
            for j in range(32):
                to[32 * group + j] = by * np.float32((block[first + j] >> shift) & 15) - minus


@njit
def _q5_k(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 176):
        block, to = row[176 * k : 176 * k + 176], out[256 * k : 256 * k + 256]
        scale, least = _half(block, 0), _half(block, 2)
        for group in range(8):
            by, minus = _scale_and_least(block, 4, group)
            by, minus = scale * np.float32(by), least * np.float32(minus)
            first, shift = 48 + 32 * (group // 2), 4 * (group % 2)
            for j in range(32):
                number = ((block[first + j] >> shift) & 15) | (((block[16 + j] >> group) & 1) << 4)
                to[32 * group + j] = by * np.float32(number) - minus


@njit
def _q6_k(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 210):
        block, to = row[210 * k : 210 * k + 210], out[256 * k : 256 * k + 256]
        scale = _half(block, 208)
        for group in range(16):
            by = scale * np.float32(np.int8(block[192 + group]))
            half, part, second = group // 8, group // 2 % 4, 16 * (group % 2)
            first, shift = 64 * half + 32 * (part % 2) + second, 4 * (part // 2)
            high = 128 + 32 * half + second
            for j in range(16):
                number = ((block[first + j] >> shift) & 15) | (((block[high + j] >> (2 * part)) & 3) << 4)
                to[16 * group + j] = by * (np.float32(number) - np.float32(32))


@njit
def _iq4_nl(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 18):
        block, to = row[18 * k : 18 * k + 18], out[32 * k : 32 * k + 32]
        scale = _half(block, 0)
        for j in range(16):
            to[j] = scale * LEVELS[block[2 + j] & 15]
        for j in range(16):
            to[16 + j] = scale * LEVELS[block[2 + j] >> 4]


@njit
def _iq4_xs(row, out):  # type: ignore[no-untyped-def]
    for k in range(len(row) // 136):
        block, to = row[136 * k : 136 * k + 136], out[256 * k : 256 * k + 256]
        scale = _half(block, 0)
        for group in range(8):
            low = (block[4 + group // 2] >> (4 * (group % 2))) & 15
            high = (block[2 + group // 4] >> (2 * (group % 4))) & 3
            by = scale * (np.float32(low | (high << 4)) - np.float32(32))
            first = 8 + 16 * group
            for j in range(16):
                to[32 * group + j] = by * LEVELS[block[first + j] & 15]
            for j in range(16):
                to[32 * group + 16 + j] = by * LEVELS[block[first + j] >> 4]


@njit(parallel=True, cache=True)
def q4_0(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q4_0."""
    for i in prange(len(wanted)):
        _q4_0(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q4_1(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q4_1."""
    for i in prange(len(wanted)):
        _q4_1(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q5_0(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q5_0."""
    for i in prange(len(wanted)):
        _q5_0(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q5_1(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q5_1."""
    for i in prange(len(wanted)):
        _q5_1(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q8_0(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q8_0."""
    for i in prange(len(wanted)):
        _q8_0(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q2_k(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q2_K."""
    for i in prange(len(wanted)):
        _q2_k(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q3_k(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q3_K."""
    for i in prange(len(wanted)):
        _q3_k(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q4_k(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q4_K."""
    for i in prange(len(wanted)):
        _q4_k(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q5_k(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q5_K."""
    for i in prange(len(wanted)):
        _q5_k(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def q6_k(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of Q6_K."""
    for i in prange(len(wanted)):
        _q6_k(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def iq4_nl(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of IQ4_NL."""
    for i in prange(len(wanted)):
        _iq4_nl(packed[wanted[i]], out[i])


@njit(parallel=True, cache=True)
def iq4_xs(packed, wanted, out):  # type: ignore[no-untyped-def]
    """Rows of IQ4_XS."""
    for i in prange(len(wanted)):
        _iq4_xs(packed[wanted[i]], out[i])


KERNELS: dict[Kind, Callable[[np.ndarray, np.ndarray, np.ndarray], None]] = {
    Kind.Q4_0: q4_0,
    Kind.Q4_1: q4_1,
    Kind.Q5_0: q5_0,
    Kind.Q5_1: q5_1,
    Kind.Q8_0: q8_0,
    Kind.Q2_K: q2_k,
    Kind.Q3_K: q3_k,
    Kind.Q4_K: q4_k,
    Kind.Q5_K: q5_k,
    Kind.Q6_K: q6_k,
    Kind.IQ4_NL: iq4_nl,
    Kind.IQ4_XS: iq4_xs,
}
"""Each takes packed rows (rows, bytes) uint8, the numbers of those wanted (wanted,) int32, and where they go
(wanted, columns) float32; on as many threads as numba is set to. Not made by one function for all kinds: numba keeps on
disk what it compiled of functions of a module alone."""
