"""What a model says of its own architecture: its decoder layers, its context, what it does to logits."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The blocks that the model runs one after the other, by name, in order; empty where it does not say."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


def body(model: PreTrainedModel) -> nn.Module:
    """What computes the final hidden states, below the head."""
    whole = model.base_model
    if whole is not model:
        return whole
    inner = getattr(model, "model", None)  # Llama 4 names another module as its base than it has
    return inner if isinstance(inner, nn.Module) else whole


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence that a model's positions allow; None where its configuration sets no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    return None


def finish_logits(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What some architectures do to logits after the head, read from their configuration."""
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma 2, its kin, xLSTM
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear layer of any kind; None for another module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    size = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return size if isinstance(size[0], int) and isinstance(size[1], int) else None  # type: ignore[return-value]
