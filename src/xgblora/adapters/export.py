"""Adapters in the formats of other tools: folded into the weights, or as llama.cpp's adapter file."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.tensor_mapping import get_tensor_name_map
from transformers.pytorch_utils import Conv1D

from xgblora.adapters.adapters import Adapters
from xgblora.errors import XgbloraError
from xgblora.files import write_atomically

GGUF_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
"""Architectures whose adapter tensors llama.cpp takes in the layout written here, by transformers' model type."""

PAIRED_ROTARY = {"llama", "mistral"}
"""Model types whose q and k rows llama.cpp keeps in another order: it rotates neighbours, transformers halves."""


@torch.no_grad()
def fold(adapters: Adapters, dtype: torch.dtype) -> float:
    """Add all boosters to the base's weights, once, in float32, and take the adapters off.

    Args:
        adapters: Of a base with float32 weights.
        dtype: What the weights will be cast to.

    Returns:
        The share of the update that the cast loses: the norm of what the cast weights changed by minus the update, over
        the norm of the update.

    Raises:
        XgbloraError: The base has no float32 weights.
    """
    lost = size = 0.0
    for name, layer in adapters.layers.items():
        weight = getattr(layer.base_layer, "weight", None)
        # Tensors of other kinds are packed ones, of bitsandbytes or torchao.
        if type(weight) is not torch.nn.Parameter or weight.dtype != torch.float32:
            raise XgbloraError(f"{name} of the base has no float32 weight to fold into: export --format peft")
        A, B = layer.pairs()
        update = layer.scaling * (B @ A)
        update = update.T if isinstance(layer.base_layer, Conv1D) else update
        before = weight.to(dtype, copy=True).float()
        weight.add_(update)
        lost += (weight.to(dtype).float() - before - update).square().sum().item()
        size += update.square().sum().item()
    adapters.detach()
    return (lost / size) ** 0.5 if size else 0.0


def write_gguf(adapters: Adapters, file: Path) -> None:
    """Write llama.cpp's adapter file: float32 lora_a (K, in) and lora_b (out, K) of each layer that learned something.

    The format is that of llama.cpp's loader: ``general.type`` adapter, ``adapter.type`` lora, ``adapter.lora.alpha``,
    tensors named as the base's with .lora_a and .lora_b.

    Raises:
        XgbloraError: The layout is not known for this architecture.
    """
    config = adapters.model.config
    kind = str(config.model_type)
    if kind not in GGUF_ARCHITECTURES:
        raise XgbloraError(f"gguf-lora knows {', '.join(sorted(GGUF_ARCHITECTURES))}, not {kind}: export --format peft")
    architecture = GGUF_ARCHITECTURES[kind]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    rank = adapters.total_rank

    def write(work: Path) -> None:
        writer = gguf.GGUFWriter(work, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapters.scaling * rank))
        for name, layer in adapters.layers.items():
            A, B = (part.detach().cpu().numpy() for part in layer.pairs())
            if not B.any():
                continue
            target = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            if target is None:
                raise XgbloraError(f"llama.cpp has no tensor for {name}: export --format peft")
            if kind in PAIRED_ROTARY and name.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
                B = pair_rotary(B, heads)
            writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(A))
            writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(B))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(file, write)


def pair_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (out, ...) in transformers' order, each head's first halves before its second, as llama.cpp's pairs."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, 2, width // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
