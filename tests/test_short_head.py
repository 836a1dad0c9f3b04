"""A part of the vocabulary in place of all of it: exact where it was taken, and where a fit ends."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig

from conftest import build, examples
from xgblora import Base, Example, OptionLoss, TextLoss, attach
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.fit import Learner, fit
from xgblora.learn.fitted.short_head import ShortHead, listed
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.losses import AnswerLoss

SIZES: dict[str, Any] = {
    "vocab_size": 20_000,
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
HEADS = {
    "llama": LlamaConfig(**SIZES),
    "a bent head": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=64),
}
OPTIONS = [[5, 6], [9], [13, 14, 15]]
WORDS = torch.tensor([5, 9, 14])


def states(count: int, seed: int = 0) -> Tensor:
    """Final hidden states."""
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", HEADS)
def test_value_and_gradient_are_the_whole_heads(name: str) -> None:
    base, hidden = Base(build(copy.deepcopy(HEADS[name]))), states(6)
    read, word = torch.tensor([0, 1, 2, 3, 4, 5, 0]), torch.tensor([5, 9, 14, 5, 9, 14, 14])
    head = ShortHead(base, hidden, listed(base, hidden, WORDS))
    assert len(head.words) < 120
    seen = []
    for log_probabilities in (base.log_probabilities, head.log_probabilities):
        at = hidden.clone().requires_grad_()
        logs = log_probabilities(at, read, word)
        seen.append((logs.detach(), *torch.autograd.grad(logs.sum(), at)))
    torch.testing.assert_close(seen[1][0], seen[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1][1], seen[0][1], atol=1e-4, rtol=1e-3)


def test_further_away_the_error_grows_with_the_square() -> None:
    base, hidden, direction = Base(build(copy.deepcopy(HEADS["llama"]))), states(6), states(6, seed=1)
    read, word = torch.arange(6), WORDS.repeat(2)
    head = ShortHead(base, hidden, listed(base, hidden, WORDS))
    with torch.no_grad():
        errors = [
            (head.log_probabilities(near, read, word) - base.log_probabilities(near, read, word)).abs().mean()
            for near in (hidden + step * direction for step in (0.2, 0.1))
        ]
    assert 3 < errors[0] / errors[1] < 5
    assert errors[1] < 0.05


@pytest.mark.parametrize("of_answers", [OptionLoss(), TextLoss()], ids=["options", "text"])
def test_a_fit_with_a_part_ends_where_one_with_all_of_it_does(
    of_answers: AnswerLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xgblora.learn.fitted.newton.ENOUGH", 1e-6)
    model = build(copy.deepcopy(HEADS["llama"]))
    model.get_output_embeddings().weight.mul_(0.2)  # unsure enough for a loss that bends upwards
    forwards = Forwards(attach(model, 1, 16, ["o_proj"], xgblora=True), of_answers)
    learners: list[Learner] = []
    with torch.no_grad():
        (seen,) = forwards.observe(examples(24, OPTIONS))
        for most in (4, 10**6):  # a part, and never
            monkeypatch.setattr("xgblora.learn.fitted.tail_loss.WORTHWHILE", most)
            loss = TailLoss(forwards, seen)
            loss.expand(seen.hidden)
            assert loss.whole == (most > 4)
            learners.append(fit(seen, loss, 0.1))
            assert loss.whole  # again
        changes = [seen.hidden + learner.change @ learner.outputs for learner in learners]
        exact = [TailLoss(forwards, seen)(hidden).mean().item() for hidden in (seen.hidden, *changes)]
    assert exact[1] < exact[0] - 0.1
    assert exact[1] == pytest.approx(exact[2], rel=2e-3)
    if isinstance(of_answers, TextLoss):
        return  # a random model's bends hardly: many fits are as good
    difference = (learners[0].change @ learners[0].outputs - learners[1].change @ learners[1].outputs).norm()
    assert difference < 0.02 * learners[1].change.norm()


def test_the_likeliest_words_are_found_across_parts_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    base, hidden = Base(build(copy.deepcopy(HEADS["llama"]))), states(5)
    expected = base.logits(hidden).topk(7).indices
    whole = base.log_sum_of_others(hidden, expected.flatten())
    monkeypatch.setattr("xgblora.base.head.HEAD_BYTES", 4 * 32 * 3000)
    assert torch.equal(base.likeliest(hidden, 7), expected)
    for parts, all_at_once in zip(base.log_sum_of_others(hidden, expected.flatten()), whole, strict=True):
        torch.testing.assert_close(parts, all_at_once)


def test_a_part_of_the_head_that_is_listed_whole_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    base, hidden = Base(build(copy.deepcopy(HEADS["llama"]))), states(2)
    monkeypatch.setattr("xgblora.base.head.HEAD_BYTES", 4 * 32 * 5000)
    value, slope = base.log_sum_of_others(hidden, torch.arange(5000))
    torch.testing.assert_close(value, base.logits(hidden)[:, 5000:].logsumexp(1))
    assert slope.isfinite().all()


def test_one_word_of_each_option_takes_no_part_of_the_head() -> None:
    adapters = attach(build(copy.deepcopy(HEADS["llama"])), 1, 16, ["o_proj"], xgblora=True)
    forwards = Forwards(adapters, OptionLoss())
    with torch.no_grad():
        (seen,) = forwards.observe([Example([20, 21, 22], [[5], [9]], 0) for _ in range(4)])
    loss = TailLoss(forwards, seen)
    loss.expand(seen.hidden)
    assert loss.whole
