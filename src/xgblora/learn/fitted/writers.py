"""The layers that write to the residual stream, and what they write along a direction of it."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters.adapters import Adapters
from xgblora.adapters.linear import AdaptedLinear
from xgblora.adapters.targets import readable_names
from xgblora.base import Base
from xgblora.base.architecture import linear_shape
from xgblora.base.packed import PackedLinear
from xgblora.base.writers import Writer
from xgblora.errors import XgbloraError

PART_UNITS = 1024
"""Units of a layer's inputs that are asked about at once."""


def residual_writers(model: PreTrainedModel | Base) -> list[str]:
    """Names of the layers that write attention and MLPs to the residual stream. They are measured.

    They are what ``--recipe boost`` adapts. Names that plain PEFT would not load are left out.

    Args:
        model: Without adapters.

    Returns:
        What :func:`xgblora.attach` takes as ``target_modules``.

    Raises:
        XgbloraError: No layer does, as far as it can be measured, or none that is left.

    Example::

        attach(model, xgblora=True, target_modules=residual_writers(model))
    """
    base = Base.of(model)
    kind = type(base.model).__name__
    if not any(writer.mixes for writer in base.writers.values()):
        raise XgbloraError(
            f"--recipe boost finds no layer of {kind} whose output reaches the residual stream in a way that it can "
            "follow: use --recipe classic"
        )
    of_attention, of_mlps = (
        [name for name, writer in base.writers.items() if writer.mixes is mixes] for mixes in (True, False)
    )
    names = [*_short(base, of_attention), *_short(base, of_mlps)]
    if not (readable := readable_names(base, names)):
        raise XgbloraError(
            f"--recipe boost would adapt {', '.join(names)} of {kind}, where plain PEFT takes no adapters: use "
            "--recipe classic"
        )
    return readable


def last_writers(model: PreTrainedModel | Base) -> list[str]:
    """Names of the layers that write MLPs to the residual stream in the last decoder layer: mostly one.

    What they write passes no other layer. So a booster of theirs does what its fit said, however far it goes; one of a
    lower layer, or of the attention before the MLP, changes what those behind it see. Text needs long steps
    (docs/experiments.md, section 20).

    Args:
        model: Without adapters.

    Returns:
        As :func:`residual_writers`; its names, where there are no such layers.

    Raises:
        XgbloraError: As :func:`residual_writers`.

    Example::

        attach(model, xgblora=True, target_modules=last_writers(model))
    """
    base = Base.of(model)
    last = next(reversed(base.layers), None)
    names = [name for name, writer in base.writers.items() if writer.layer == last and not writer.mixes]
    return readable_names(base, names) or residual_writers(base)


def _short(base: Base, names: Sequence[str]) -> list[str]:
    """As few words of each name, from its end, as no other linear module ends with; in order."""
    asked = set(names)
    others = [name for name, module in base.model.named_modules() if linear_shape(module) and name not in asked]
    short: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        short[next(end for end in ends if not any(other.endswith(f".{end}") for other in others))] = None
    return list(short)


def require_writers(adapters: Adapters) -> None:
    """Raise :class:`XgbloraError` where ``adapters`` cannot hold fitted boosters."""
    for name in adapters.layers:
        if name not in adapters.base.writers:
            raise XgbloraError(
                f"fitted pairs go on layers that write to the residual stream; {name} does not, or not in a way that "
                "they can follow: leave out --lora_target_modules (in a library: attach with "
                "target_modules=xgblora.residual_writers(model))"
            )


def writers_in_training(adapters: Adapters) -> list[Writer]:
    """How what each layer that trains gives reaches the final hidden states, in the order of ``slices``."""
    names = {layer: name for name, layer in adapters.layers.items()}
    return [adapters.base.writers[names[layer]] for layer, _, _ in adapters.slices]


def turned_down(adapters: Adapters) -> list[bool]:
    """For each layer that trains, in the order of ``slices``: whether it is only turned down, not fitted.

    MLP layers are, beside attention layers that are fitted; alone they are fitted themselves.
    """
    down = [not writer.mixes for writer in writers_in_training(adapters)]
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
    """What the base layer writes along each row u of ``output`` (n, out) for each unit of its inputs: u W, (n, in)."""
    parts = torch.arange(layer.in_features, device=output.device).split(PART_UNITS)
    if _is_bare(layer.base_layer):  # the same numbers, since a product with a unit is exact
        return torch.cat([layer.base_layer.columns(part) @ output.T for part in parts]).mT
    units = torch.zeros(len(parts[0]), layer.in_features, dtype=dtype, device=output.device)
    added = bias(layer, dtype)

    def written(part: Tensor) -> Tensor:
        rows: Tensor = layer.base_layer(units[: len(part)].zero_().scatter_(1, part[:, None], 1))
        return rows.float() - added

    return torch.cat([written(part) @ output.T for part in parts]).mT
