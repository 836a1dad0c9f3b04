"""On every architecture that transformers can build tiny: right, or refused in one line."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from architectures import KINDS, QUESTIONS, judge, tiny, unbuildable
from conftest import build
from xgblora import Base, Example, XgbloraError

QUICK = ("bloom", "deepseek_v2", "gpt_oss", "jamba", "mamba", "whisper")
"""ALiBi, fused experts, sinks and windows, a hybrid, a state space, layers that text does not reach."""


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.soak) for k in KINDS])
def test_right_or_refused(kind: str, tmp_path: Path) -> None:
    if (why := unbuildable(kind)) is not None:
        assert kind not in QUICK, why
        pytest.skip(f"not built tiny: {why}")
    verdict = judge(kind, tmp_path)
    assert not verdict.wrong
    for answer in verdict.answers.values():
        assert "\n" not in answer
    if kind in QUICK:
        assert [verdict.answers[question] for question in QUESTIONS[:3]] == ["right"] * 3


def test_the_page_tells_of_every_architecture() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert not [kind for kind in KINDS if f"| {kind} |" not in page and f"- {kind}: " not in page]
    assert "WRONG" not in page


def test_words_that_see_later_ones_are_no_causal_model() -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(XgbloraError, match="its words see later ones, so it is no causal model"):
        _ = Base(build(BertConfig(**sizes, intermediate_size=64))).packed


def test_layers_that_are_called_in_another_order_are_observed_by_name() -> None:
    """A hybrid runs its layers in an order of its own; and one that is called twice has no one input."""
    model = tiny("hrm_text")
    base = Base(model)
    twice = dict(model.named_modules())["model.L_module.layers.0.self_attn.o_proj"]
    with pytest.raises(XgbloraError, match="does not see every word once a forward"), torch.no_grad():
        next(base.observe([base.batch([Example([1, 2, 3], [[4], [5]], 0)])], [twice]))
    model = tiny("llama")
    base, names = Base(model), dict(model.named_modules())
    layers = [names[f"model.layers.{n}.self_attn.o_proj"] for n in (1, 0)]
    batch = base.batch([Example([1, 2, 3], [[4], [5]], 0)])
    with torch.no_grad():
        (there,), (back,) = (list(base.observe([batch], order)) for order in (layers, layers[::-1]))
    assert torch.equal(there.inputs[0], back.inputs[1])
    assert not torch.equal(there.inputs[0], there.inputs[1])
