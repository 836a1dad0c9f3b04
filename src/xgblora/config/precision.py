"""In which precision the base is loaded where nobody says."""

import time
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch

from xgblora.config.conditions import probed

DType = Literal["float32", "bfloat16", "float16"]

SHORTEST_PROBE = 5e-3
"""Of a zeroth-order step in bfloat16: below it rounding is as large as the difference of the two probes."""


def choose(config: Any) -> DType:
    """bfloat16 where this machine computes faster in it and the method bears it, else float32.

    Args:
        config: A :class:`RunConfig`, not settled yet.
    """
    if probed(config) and config.zo_eps < SHORTEST_PROBE:
        return "float32"
    return "bfloat16" if bfloat16_is_faster(torch.cuda.is_available() and not config.use_cpu) else "float32"


def of_settings(settings: Mapping[str, Any]) -> DType:
    """The precision of a run by its ``config.json``."""
    if settings.get("load_float16"):
        return "float16"
    return "bfloat16" if settings.get("load_bfloat16") else "float32"


@cache
def bfloat16_is_faster(on_gpu: bool = False) -> bool:
    """Whether a linear layer takes less time in bfloat16 than in float32, by a clear margin. Takes some milliseconds.

    Args:
        on_gpu: Ask the GPU, not the processor.
    """
    if on_gpu:
        return torch.cuda.is_bf16_supported()
    with torch.random.fork_rng(devices=[]):
        weight, x = torch.randn(1536, 576), torch.randn(512, 576)

    def seconds(dtype: torch.dtype) -> float:
        w, y = weight.to(dtype), x.to(dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(y, w)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
