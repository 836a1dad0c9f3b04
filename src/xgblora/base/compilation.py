"""torch.compile on packed forwards: one graph for all decoder layers, whatever the batch, the probes or the boosters.

Norms, activations, rotary embeddings and casts are fused. Adapted layers, reordered weights and the packed attention
stay single calls that the compiler does not look into, so neither a new batch nor a merge compiles anything anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.base.architecture import decoder_layers
from xgblora.errors import XgbloraError, one_line


class Opaque(nn.Module):
    """A linear-like module, (..., in) -> (..., out_features), whose inside torch.compile does not look into."""

    out_features: int
    number: Tensor | None = None
    """Its place in :data:`_called`. A tensor, as torch.compile would compile anew for every other integer."""

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`compute`, in a compiled graph as one call."""
        if torch.compiler.is_compiling() and self.number is not None:
            result: Tensor = _call(x, self.number, self.out_features)
            return result
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """What the module does."""
        raise NotImplementedError


_called: WeakValueDictionary[int, Opaque] = WeakValueDictionary()


@torch.library.custom_op("xgblora::call", mutates_args=())
def _call(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return _called[int(number)].compute(x)


@_call.register_fake
def _(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Compile the decoder layers of ``model``; forwards inside the block have no gradients.

    The first forward takes a minute at most; later ones, of whatever token count, compile nothing.

    Raises:
        XgbloraError: torch cannot compile here (on a CPU it needs a C++ compiler), or the model shows no decoder
            layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise XgbloraError(f"--torch_compile: {type(model).__name__} has no layers that can be compiled; leave it out")
    try:
        torch.compile(torch.neg)(torch.ones(2, device=model.device))
    except Exception as error:  # of many kinds, by compiler and platform
        reason = one_line(error, 150)
        raise XgbloraError(f"--torch_compile cannot work here: {reason} (a C++ compiler is needed)") from None
    for module in model.modules():
        if isinstance(module, Opaque):
            module.number = torch.tensor(id(module))
            _called[id(module)] = module
    for layer in layers.values():
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers.values():
            layer._compiled_call_impl = None  # noqa: SLF001 (torch has no public way back)


@contextmanager
def as_written(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside the block run the layers as they are, also where they are compiled: for hooks inside them."""
    before = {layer: layer._compiled_call_impl for layer in decoder_layers(model).values()}  # noqa: SLF001
    for layer in before:
        layer._compiled_call_impl = None  # noqa: SLF001 (torch has no public way back)
    try:
        yield
    finally:
        for layer, call in before.items():
            layer._compiled_call_impl = call  # noqa: SLF001
