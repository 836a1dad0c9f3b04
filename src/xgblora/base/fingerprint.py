"""What tells one base model from another."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xgblora.base.packed import PackedEmbedding, PackedLinear, PackedWeight

SAMPLED = 64
"""Entries of each weight that a fingerprint looks at."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one base model from another, as JSON values: architecture, sizes, precision, a hash over all weights.

    The hash takes up to SAMPLED entries, evenly spread, of every weight as it is multiplied: reading all of a large
    model would take longer than loading it. A packed model and the same one unpacked are one model.
    """
    digest = hashlib.sha256()
    dtype = None
    for name, weight in _weights(model):
        digest.update(name.encode())
        digest.update(_sampled(weight).view(torch.uint8).numpy().tobytes())
        dtype = dtype or str(weight.dtype).removeprefix("torch.")
    config = model.config.get_text_config()
    packing = _packing(model)
    return {
        "architecture": type(model).__name__,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "dtype": dtype,
        "weights": digest.hexdigest(),
    } | ({} if packing is None else {"quantised": packing})


def _packing(model: PreTrainedModel) -> str | None:
    """What rounded the numbers of the model's own files; None where nothing did."""
    if any(isinstance(module, PackedLinear) and module.weight.rounded for module in model.modules()):
        return "8 bits"
    if (config := getattr(model.config, "quantization_config", None)) is None:
        return None
    method = config["quant_method"] if isinstance(config, dict) else config.quant_method  # as it was read, or settled
    return str(getattr(method, "value", method))


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """Every weight once, by the name and in the order of ``named_parameters`` of an unpacked model."""
    seen = set()
    for prefix, module in model.named_modules():
        packed = [("weight", module.weight)] if isinstance(module, PackedLinear | PackedEmbedding) else []
        for name, weight in [*packed, *module.named_parameters(recurse=False)]:
            if id(weight) not in seen:
                seen.add(id(weight))
                yield f"{prefix}.{name}" if prefix else name, weight


def _sampled(weight: Tensor | PackedWeight) -> Tensor:
    if hasattr(weight, "__tensor_flatten__"):  # made of several tensors, as torchao packs them
        parts = [_sampled(getattr(weight, name)) for name in weight.__tensor_flatten__()[0]]
        return torch.cat([part.view(torch.uint8) for part in parts])
    if isinstance(weight, Tensor):
        flat = weight.detach().flatten()
        return flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].cpu().contiguous()
    rows, columns = weight.shape
    places = torch.arange(0, rows * columns, max(1, rows * columns // SAMPLED))[:SAMPLED]
    return weight[places // columns][torch.arange(len(places)), places % columns].cpu()
