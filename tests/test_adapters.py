"""Adapters: equal to PEFT's, over any linear layer, in float32, and gone without a trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, LogLines, build
from xgblora import XgbloraError, attach
from xgblora.adapters import Probe

IDS = torch.tensor([[3, 17, 200, 41, 5, 9, 77], [8, 8, 250, 1, 2, 30, 4]])


def copy_to_peft(adapters: Any, peft_model: nn.Module) -> None:
    """Our A and B into PEFT's modules of the same names."""
    modules = dict(peft_model.named_modules())
    for name, layer in adapters.layers.items():
        theirs = modules[f"base_model.model.{name}"]
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B)


@pytest.mark.parametrize("rank", [1, 4])
def test_logits_equal_pefts(architecture: PreTrainedConfig, rank: int, randomise: Callable[..., None]) -> None:
    model = build(architecture)
    before = model(IDS).logits
    adapters = attach(model, rank=rank, alpha=16)
    randomise(adapters)
    ours = model(IDS).logits
    theirs = get_peft_model(build(architecture), LoraConfig(r=rank, lora_alpha=16, task_type="CAUSAL_LM"))
    copy_to_peft(adapters, theirs)
    torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 0.05, "the adapters must matter for this test to mean anything"


def test_default_targets_are_pefts(architecture: PreTrainedConfig) -> None:
    adapters = attach(build(architecture))
    theirs = get_peft_model(build(architecture), LoraConfig(r=1, task_type="CAUSAL_LM"))
    wrapped = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(adapters.layers) == wrapped


def test_new_adapters_change_nothing(architecture: PreTrainedConfig) -> None:
    model = build(architecture)
    before = model(IDS).logits
    attach(model)
    assert torch.equal(model(IDS).logits, before)


def test_first_a_is_kaiming_uniform_of_the_seed() -> None:
    one = attach(build(ARCHITECTURES["llama"]), seed=3)
    same = attach(build(ARCHITECTURES["llama"]), seed=3)
    other = attach(build(ARCHITECTURES["llama"]), seed=4)
    torch.manual_seed(99)  # the global generator has no say
    bound = 1 / 32**0.5  # sqrt(6 / ((1 + 5) * fan_in)) with a = sqrt(5)
    for first, second, third in zip(one.layers.values(), same.layers.values(), other.layers.values(), strict=True):
        assert torch.equal(first.lora_A, second.lora_A)
        assert not torch.equal(first.lora_A, third.lora_A)
        assert first.lora_A.abs().max() <= bound
        assert first.lora_A.abs().max() > 0.5 * bound
        assert not first.lora_B.any()


def test_only_the_pairs_are_trainable() -> None:
    model = build(ARCHITECTURES["llama"])
    model.requires_grad_(True)
    adapters = attach(model, rank=2)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapters.parameters()}
    assert sum(p.numel() for p in adapters.parameters()) == adapters.size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_float32_on_a_half_base(dtype: torch.dtype, randomise: Callable[..., None]) -> None:
    model = build(ARCHITECTURES["llama"], dtype)
    adapters = attach(model)
    randomise(adapters)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    layer = next(iter(adapters.layers.values()))
    x = torch.randn(3, 32).to(dtype)
    wanted = layer.base_layer(x).float() + 16 * (x.float() @ layer.lora_A.T) @ layer.lora_B.T
    # Equal but for the last bit; adapters computed in the base's dtype would be off by many.
    torch.testing.assert_close(layer(x).float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


class Int8Linear(nn.Module):
    """A quantised linear layer as a deployment has it: int8 weight, one scale a row, no float weight anywhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_wraps_quantised_layers_and_never_touches_their_weight(randomise: Callable[..., None]) -> None:
    model = build(ARCHITECTURES["llama"])
    for block in model.model.layers:
        block.self_attn.q_proj = Int8Linear(block.self_attn.q_proj)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    quantised = model(IDS).logits
    adapters = attach(model, target_modules=["q_proj"])
    assert torch.equal(model(IDS).logits, quantised)
    randomise(adapters)
    adapters.freeze_pair()
    model(IDS)
    adapters.detach()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert torch.equal(model(IDS).logits, quantised)


def test_detach_restores_the_model(architecture: PreTrainedConfig, randomise: Callable[..., None]) -> None:
    model = build(architecture)
    names, before = [n for n, _ in model.named_modules()], model(IDS).logits
    adapters = attach(model)
    randomise(adapters)
    adapters.detach()
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("boosters", [0, 2])
def test_a_probe_equals_perturbed_parameters(rank: int, boosters: int, randomise: Callable[..., None]) -> None:
    """Each position's probe against the plain thing: parameters really moved by eps z."""
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, rank=rank)
    for number in range(boosters):
        randomise(adapters, number + 10)
        adapters.freeze_pair()
    randomise(adapters)
    eps, count = 0.05, 3
    z = torch.randn(count, adapters.size, generator=torch.Generator().manual_seed(1))
    moves = [(0, 1), (0, -1), (1, 1), (2, -1)]
    ids = IDS[:1].repeat(len(moves), 1)
    select = torch.zeros(len(moves), count)
    for row, (direction, sign) in enumerate(moves):
        select[row, direction] = sign * eps
    with torch.no_grad(), adapters.probing(Probe(z, select.repeat_interleave(ids.shape[1], 0))):
        probed = model(ids).logits
    with torch.no_grad():
        for row, (direction, sign) in enumerate(moves):
            saved = [p.clone() for p in adapters.parameters()]
            for layer, a, b in adapters.slices:
                layer.lora_A += sign * eps * z[direction, a].view_as(layer.lora_A)
                layer.lora_B += sign * eps * z[direction, b].view(rank, -1).T
            torch.testing.assert_close(probed[row], model(ids[:1]).logits[0], rtol=1e-4, atol=1e-4)
            for parameter, value in zip(adapters.parameters(), saved, strict=True):
                parameter.copy_(value)
    assert (probed[0] - probed[1]).abs().max() > 1e-3


def test_another_rank_is_warned_of_and_forced(log_lines: LogLines) -> None:
    adapters = attach(build(ARCHITECTURES["opt"]), rank=4, xgblora=True)
    assert adapters.rank == 1
    assert log_lines.lines == ["XGBLoRA should use rank=1, but got r=4. This may cause unexpected behavior!"]


def test_targets_by_name_and_by_expression() -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), target_modules=["o_proj", "down_proj"])
    assert {name.rsplit(".", 1)[1] for name in adapters.layers} == {"o_proj", "down_proj"}
    by_expression = attach(build(ARCHITECTURES["llama"]), target_modules=r".*layers\.1\..*q_proj")
    assert list(by_expression.layers) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["nothing"]}, r"no layer of LlamaForCausalLM is named nothing; .*q_proj"),
        ({"target_modules": ["lm_head"]}, r"lm_head is a Linear: only linear layers below the output head"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens is a Embedding: only linear layers"),
        ({"rank": 0}, r"rank of an adapter must be at least 1, got 0"),
    ],
)
def test_bad_targets_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = build(ARCHITECTURES["llama"])
    with pytest.raises(XgbloraError, match=message):
        attach(model, **arguments)
    assert not [n for n, _ in model.named_modules() if "base_layer" in n], "a refused model must stay untouched"


def test_an_architecture_unknown_to_peft_takes_its_attentions_inputs() -> None:
    model = build(ARCHITECTURES["llama"])
    model.config.model_type = "novel"
    assert {name.rpartition(".")[2] for name in attach(model).layers} == {"q_proj", "v_proj"}


def test_an_architecture_of_unknown_layers_names_them() -> None:
    model = build(ARCHITECTURES["llama"])
    model.config.model_type = "novel"
    for block in model.model.layers:
        for old in ("q_proj", "v_proj"):
            block.self_attn.add_module(f"my_{old}", getattr(block.self_attn, old))
            delattr(block.self_attn, old)
    with pytest.raises(XgbloraError, match=r"no default layers are known for LlamaForCausalLM; give .*my_v_proj"):
        attach(model)


def test_attaching_twice_is_refused() -> None:
    model = build(ARCHITECTURES["llama"])
    attach(model)
    with pytest.raises(XgbloraError, match="has adapters already"):
        attach(model)
