"""The layers that write to the residual stream, and what they write along a direction of it."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters.adapters import Adapters
from xgblora.adapters.linear import AdaptedLinear
from xgblora.adapters.targets import readable_names
from xgblora.base import Base
from xgblora.base.packed import PackedLinear
from xgblora.errors import XgbloraError

ATTENTION_WRITERS = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense")
"""How architectures call the layer that writes a block's attention to the residual stream."""

MLP_WRITERS = ("down_proj", "fc2", "mlp.c_proj", "mlp.dense_4h_to_h")
"""How they call the layer that writes a block's MLP."""

PART_UNITS = 1024
"""Units of a layer's inputs that are asked about at once."""

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "c_attn", "c_fc", "query_key_value")
"""Layers inside a block, which may be as wide as the residual stream and yet do not write to it."""


def residual_writers(model: PreTrainedModel | Base) -> list[str]:
    """Names of the layers that write attention and, where they are known, MLPs to the residual stream.

    They are what ``--recipe boost`` adapts. Names that plain PEFT would not load are left out.

    Args:
        model: Without adapters.

    Returns:
        What :func:`xgblora.attach` takes as ``target_modules``.

    Raises:
        XgbloraError: An architecture that calls those of the attention otherwise, or one where none is left.

    Example::

        attach(model, xgblora=True, target_modules=residual_writers(model))
    """
    base = Base.of(model)
    names = [name for block in base.layers.values() for name, _ in block.named_modules()]
    attention, mlp = (
        [writer for writer in writers if any(_is_called(name, writer) for name in names)]
        for writers in (ATTENTION_WRITERS, MLP_WRITERS)
    )
    if not attention:
        raise XgbloraError(
            f"--recipe boost does not know which layers of {type(base.model).__name__} write to the residual stream: "
            "name them with --lora_target_modules"
        )
    if not (readable := readable_names(base, attention + mlp)):
        raise XgbloraError(
            f"--recipe boost would adapt {', '.join(attention + mlp)} of {type(base.model).__name__}, where plain PEFT "
            "takes no adapters: use --recipe classic"
        )
    return readable


def _is_called(name: str, writer: str) -> bool:
    return name == writer or name.endswith("." + writer)


def require_writers(adapters: Adapters) -> None:
    """Raise :class:`XgbloraError` where ``adapters`` cannot hold fitted boosters."""
    if adapters.rank != 1:
        raise XgbloraError(f"a booster is a pair of rank 1, the adapters have rank {adapters.rank}")
    for name, layer in adapters.layers.items():
        if layer.out_features != adapters.base.width or name.rpartition(".")[2] in READERS:
            raise XgbloraError(
                f"--recipe boost fits layers that write to the residual stream; {name} does not: leave out "
                "--lora_target_modules (in a library: attach with target_modules=xgblora.residual_writers(model))"
            )


def turned_down(adapters: Adapters) -> list[bool]:
    """For each layer that trains, in the order of ``slices``: whether it is only turned down, not fitted.

    MLP layers are, beside attention layers that are fitted; alone they are fitted themselves.
    """
    names = {layer: name for name, layer in adapters.layers.items()}
    down = [any(_is_called(names[layer], writer) for writer in MLP_WRITERS) for layer, _, _ in adapters.slices]
    return [False] * len(down) if all(down) else down


def bias(layer: AdaptedLinear, dtype: torch.dtype) -> Tensor:
    """What the base layer adds to its product, (out,) float32.

    The layer is asked, not its parameters, so that a quantised one answers, too.

    Args:
        layer: Whose base layer it is.
        dtype: The model's.
    """
    if _is_bare(layer.base_layer):
        return layer.lora_B.new_zeros(layer.out_features)
    added: Tensor = layer.base_layer(layer.lora_A.new_zeros(1, layer.in_features, dtype=dtype))[0]
    return added.float()


def _is_bare(layer: nn.Module) -> TypeGuard[PackedLinear]:
    """Whether it is known to hold a packed weight and nothing else."""
    return isinstance(layer, PackedLinear) and layer.bias is None


def written_along(layer: AdaptedLinear, output: Tensor, dtype: torch.dtype) -> Tensor:
    """W^T u, (in,) float32: what the base layer writes along ``output`` u (out,) for each unit of its inputs."""
    parts = torch.arange(layer.in_features, device=output.device).split(PART_UNITS)
    if _is_bare(layer.base_layer):  # the same numbers, since a product with a unit is exact
        return torch.cat([layer.base_layer.columns(part) @ output for part in parts])
    units = torch.zeros(len(parts[0]), layer.in_features, dtype=dtype, device=output.device)
    added = bias(layer, dtype)

    def written(part: Tensor) -> Tensor:
        rows: Tensor = layer.base_layer(units[: len(part)].zero_().scatter_(1, part[:, None], 1))
        return rows.float() - added

    return torch.cat([written(part) @ output for part in parts])
