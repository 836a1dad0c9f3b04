"""Frozen linear layers in the layout that the CPU's matrix library computes in, while only forwards run.

torch hands a weight to the library in rows; the library then reorders it in every call, or takes a slower kernel.
Reordered once, SmolLM2's products are up to 1.4 times faster in float32 (``benchmarks/step_time.py`` has the step).
"""

import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xgblora.base.compilation import Opaque
from xgblora.base.packed import PackedLinear
from xgblora.base.swap import swap

logger = logging.getLogger(__name__)


class ReorderedLinear(Opaque):
    """A frozen linear layer whose weight lies in oneDNN's own layout; forward only, without gradients.

    ``weight`` gives the weight as ``source`` had it, to the last bit. ``source`` holds no weight in the meantime, so
    that memory holds each weight once; :meth:`restore` gives it back.
    """

    def __init__(self, source: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.transposed = isinstance(source, Conv1D)  # its weight is (in, out)
        weight = source.weight.detach()
        rows = weight.T.contiguous() if self.transposed else weight
        self.out_features, self.in_features = rows.shape[0], rows.shape[1]
        self.reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(rows)  # noqa: SLF001 (torch has no other name)
        self.bias = source.bias
        self.source = [source]  # in a list: not a submodule
        source.weight.data = weight.new_empty(0)

    def compute(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (torch has no other name)
        result: Tensor = multiply(x, self.reordered, self.bias, "none", [], "")
        return result

    @property
    def weight(self) -> Tensor:
        """The weight in its ordinary layout, made anew at every access."""
        rows = self.reordered.to_dense()
        return rows.T.contiguous() if self.transposed else rows

    def restore(self) -> None:
        """Give its weight back to the layer that this one was made from."""
        with torch.inference_mode(False):  # autograd refuses tensors made inside that mode, for good
            self.source[0].weight.data = self.weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


@contextmanager
def cpu_layout(model: PreTrainedModel) -> Iterator[None]:
    """Run forwards without gradients faster on a CPU; afterwards the model is what it was, to the last bit.

    Layers that train, share their weight, are quantised or lie on another device stay as they are, as do all where
    this torch has no such layout for the precision (float16 needs AVX512-FP16). May be nested.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    head = model.get_output_embeddings()  # read row by row
    freed = _FreedMemory()
    with ExitStack() as undo:
        for module in model.modules():
            if not isinstance(module, PackedLinear) or module is head:
                continue
            if module.weight.device.type == "cpu" and _has_layout(module.weight.dtype):
                undo.callback(setattr, module, "reordered", module.reordered)
                module.reordered = True
        for name, module in list(model.named_modules()):
            if type(module) not in (nn.Linear, Conv1D) or module is head:
                continue
            weight = module.weight
            if weight.requires_grad or weight.device.type != "cpu" or owners[id(weight)] > 1:
                continue
            try:
                layer = ReorderedLinear(module)
            except (AttributeError, RuntimeError) as error:
                logger.debug("%s weights keep their layout here: %s", weight.dtype, error)
                break
            freed.add(layer.reordered.nbytes)
            undo.callback(freed.add, layer.reordered.nbytes)
            swap(model, name, layer, undo)
            undo.callback(layer.restore)
            del layer
        yield


@cache
def _has_layout(dtype: torch.dtype) -> bool:
    """Whether this torch has a layout for weights of a precision."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype))  # noqa: SLF001 (no other name)
    except (AttributeError, RuntimeError):
        return False
    return True


class _FreedMemory:
    """Returns freed weights to the system every 32 MB, so that both layouts are never in memory together."""

    def __init__(self) -> None:
        self.held = 0

    def add(self, freed: int) -> None:
        """Count the bytes of a tensor that was let go."""
        self.held += freed
        if self.held >= 32 * 2**20:
            return_freed_memory()
            self.held = 0


def return_freed_memory() -> None:
    """Give what was freed back to the system: glibc keeps holes between tensors that are still in use."""
    if _malloc_trim is not None:
        _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
