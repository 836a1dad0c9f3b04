"""Packed rows of a .gguf file to float32: by numba's machine code where numba is installed, else by torch."""

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from xgblora import hf

logger = logging.getLogger(__name__)

PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
"""Kinds that hold numbers as they are."""

KINDS = (
    *(*PLAIN, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K),
    *(Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS),
)
"""Kinds that can stay packed."""


def unpack(packed: Tensor, kind: Kind, rows: Tensor, out: Tensor) -> None:
    """Unpack some rows of a weight, each number as the ``gguf`` package has it, to the last bit.

    Args:
        packed: (rows, bytes) uint8.
        kind: One of :data:`KINDS`.
        rows: (wanted,) int32, which rows.
        out: (wanted, columns) float32, on the same device: where they go.
    """
    if kind in PLAIN:
        out.copy_(packed[rows].view(PLAIN[kind]))
    elif packed.device.type == "cpu" and has_numba():
        import numba

        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        _kernels()[kind](packed.numpy(), rows.numpy(), out.numpy())
    elif kind in (Kind.Q5_0, Kind.Q5_1):
        out.copy_(_five_bits(packed[rows], kind).view(out.shape))
    else:
        out.copy_(hf.dequantize(packed[rows], int(kind)).view(out.shape))


@cache
def has_numba() -> bool:
    """Whether numba is installed; says once what it would bring."""
    if importlib.util.find_spec("numba") is not None:
        return True
    logger.info('Packed weights are unpacked several times faster with numba: pip install "xgblora[packed]"')
    return False


@cache
def _kernels() -> Any:
    from xgblora.base.kernels import KERNELS

    return KERNELS


def _five_bits(packed: Tensor, kind: Kind) -> Tensor:
    """Q5_0 and Q5_1, which transformers lacks: a scale (and a least value), 32 fifth bits, 32 times four bits."""
    _, size = GGML_QUANT_SIZES[kind]
    blocks = packed.reshape(-1, size)
    heads = (size - 20) // 2
    scale, *least = blocks[:, : 2 * heads].contiguous().view(torch.float16).float().split(1, dim=1)
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    fifth = ((blocks[:, 2 * heads : 2 * heads + 4, None] >> bits) & 1).flatten(1) << 4
    four = blocks[:, -16:]
    number = (torch.cat([four & 15, four >> 4], dim=1) | fifth).float()
    return scale * number + least[0] if least else scale * (number - 16)
