"""Reordered weights: the same function, each weight in memory once, and the model as it was afterwards."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, build, examples, option_scores
from xgblora import attach, evaluate
from xgblora.base.cpu_layout import ReorderedLinear, cpu_layout
from xgblora.data.batch import build_batch


def reordered(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ReorderedLinear)]


def possible(dtype: torch.dtype) -> bool:
    """Whether this processor's library has a layout of its own for the precision (bfloat16 needs AVX-512, say)."""
    try:
        ReorderedLinear(nn.Linear(16, 16, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_function_stays_and_the_model_comes_back(architecture: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = build(architecture, dtype)
    attach(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    batch = build_batch(examples(6, options=[[5], [9, 4]]))
    with torch.inference_mode():
        expected = option_scores(model, batch, normalised=True)
        with cpu_layout(model):
            changed = reordered(model)
            scores = option_scores(model, batch, normalised=True)
            inside = model.state_dict()
    assert bool(changed) == possible(dtype)
    torch.testing.assert_close(scores, expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-3)
    after = model.state_dict()
    assert after.keys() == before.keys() == inside.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(inside[name], tensor) for name, tensor in before.items())
    assert all(module is modules[name] for name, module in model.named_modules())


def test_a_weight_is_in_memory_once() -> None:
    model = build(ARCHITECTURES["llama"])
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    layers = [model.get_submodule(name) for name in names]
    with cpu_layout(model):
        assert reordered(model) == names
        assert not any(layer.weight.numel() for layer in layers)
    assert all(layer.weight.numel() for layer in layers)


def test_what_trains_or_is_shared_keeps_its_layout() -> None:
    model = build(ARCHITECTURES["llama"])
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.weight = second.up_proj.weight
    first.down_proj.weight.requires_grad_(True)
    with cpu_layout(model):
        kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kept == {
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    }


def test_gradients_flow_after_an_evaluation() -> None:
    """Weights put back inside inference mode must not be tensors that autograd refuses."""
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model)
    evaluate(model, examples(4), batch_size=4)
    option_scores(model, build_batch(examples(4))).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())


def test_an_error_inside_puts_the_weights_back() -> None:
    model = build(ARCHITECTURES["gpt2"])
    with pytest.raises(KeyboardInterrupt), cpu_layout(model):
        raise KeyboardInterrupt
    assert not reordered(model)
    assert all(p.numel() for p in model.parameters())


def test_nested_use_changes_nothing_twice() -> None:
    model = build(ARCHITECTURES["opt"])
    with cpu_layout(model):
        inner = reordered(model)
        with cpu_layout(model):
            assert reordered(model) == inner
        assert reordered(model) == inner
    assert not reordered(model)
