"""What is saved is what plain PEFT loads: layer by layer, or the layers are refused before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from architectures import tiny
from conftest import ARCHITECTURES, build
from xgblora import Base, Ledger, RunConfig, XgbloraError, attach
from xgblora.runs.run import attach_for

IDS = torch.arange(3, 15)[None]


def save_and_load(
    model: PreTrainedModel, kind: str, folder: Path, randomise: Callable[..., None], **targets: Any
) -> Any:
    """Logits with random adapters, and plain PEFT's with the same."""
    ledger = Ledger(attach(model, xgblora=True, **targets))
    randomise(ledger.adapters, 0)
    ledger.merge(1, "step 1", None)
    randomise(ledger.adapters, 1)
    ledger.save(folder / "adapter")
    with torch.no_grad():
        return model(IDS, use_cache=False).logits, PeftModel.from_pretrained(tiny(kind), str(folder / "adapter"))(
            IDS, use_cache=False
        ).logits


@pytest.mark.parametrize("kind", ["deepseek_v2", "glm4_moe", "ernie4_5_moe", "qwen3_next"])
def test_names_that_peft_takes_for_fused_experts_are_refused(kind: str) -> None:
    model = tiny(kind)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(XgbloraError, match=r"would not be what plain PEFT loads \(.*\): give other --lora_target_mod"):
        attach(model, target_modules=["down_proj"])
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_layers_that_peft_holds_back_are_refused(kind: str) -> None:
    with pytest.raises(XgbloraError, match="plain PEFT"):
        attach(tiny(kind), target_modules=["out_proj"])


@pytest.mark.parametrize("kind", ["deepseek_v2", "glm4_moe", "qwen3_next", "mamba", "mixtral", "rwkv", "llama4_text"])
def test_default_layers_load_in_plain_peft(kind: str, tmp_path: Path, randomise: Callable[..., None]) -> None:
    ours, theirs = save_and_load(tiny(kind), kind, tmp_path, randomise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v2"])
def test_a_regular_expression_means_the_same_to_peft(kind: str, tmp_path: Path, randomise: Callable[..., None]) -> None:
    """Of experts that are fused, PEFT keeps the last part of every name alone: other layers would match, too."""
    model, asked = tiny(kind), r".*layers\.1\.self_attn\.o_proj"
    ours, theirs = save_and_load(model, kind, tmp_path, randomise, target_modules=asked)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_no_regular_expression_is_one_line() -> None:
    with pytest.raises(XgbloraError, match="no regular expression"):
        attach(tiny("llama"), target_modules="*.q_proj[")


def test_boost_leaves_out_what_peft_would_lose() -> None:
    config = RunConfig(recipe="boost", use_cpu=True, xgblora_layers=2)
    adapted = attach_for(config, Base(tiny("glm4_moe")), classification=True).layers
    assert {name.rpartition(".")[2] for name in adapted} == {"o_proj"}
    with pytest.raises(XgbloraError, match="where plain PEFT takes no adapters: use --recipe classic"):
        attach_for(config, Base(tiny("mamba")), classification=True)


def test_layers_that_text_does_not_reach_take_no_adapter() -> None:
    """A decoder without an encoder does not look at one."""
    adapted = attach(tiny("whisper")).layers
    assert len(adapted) == 4
    assert not any("encoder_attn" in name for name in adapted)
    with pytest.raises(XgbloraError, match=r"does not call .* for text"):
        attach(tiny("whisper"), target_modules=r".*encoder_attn\.q_proj")


def test_peft_joins_two_adapters_by_cat_and_not_by_linear(tmp_path: Path, randomise: Any) -> None:
    """As the model card says: the joint update is the sum of both, which linear does not make."""
    updates = []
    for number in range(2):
        model = build(ARCHITECTURES["llama"])
        ledger = Ledger(attach(model, 1, 16, ["q_proj"], xgblora=True))
        randomise(ledger.adapters, number)
        ledger.save(tmp_path / str(number))
        (layer, *_) = ledger.adapters.layers.values()
        updates.append(layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach())
    plain = PeftModel.from_pretrained(build(ARCHITECTURES["llama"]), str(tmp_path / "0"), adapter_name="a")
    plain.load_adapter(str(tmp_path / "1"), adapter_name="b")
    name = next(name for name, _ in plain.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    for kind, right in (("cat", True), ("linear", False)):
        plain.add_weighted_adapter(["a", "b"], [1.0, 1.0], kind, combination_type=kind)
        joint = plain.get_submodule(name).get_delta_weight(kind)
        assert torch.allclose(joint, updates[0] + updates[1], atol=1e-5) is right
