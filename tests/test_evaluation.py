"""Evaluation: its numbers do not depend on batches, order or layout."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, build, byte_tokenizer, examples
from xgblora import (
    Base,
    Example,
    LayerSubset,
    Ledger,
    OptionLoss,
    Predictor,
    TextLoss,
    XgbloraError,
    attach,
    evaluate,
    evaluate_stages,
    predict,
)
from xgblora.base import base, cpu_layout
from xgblora.learn.evaluate import evaluate_together
from xgblora.learn.losses import AnswerLoss
from xgblora.tasks import TASKS, Task


def test_batches_and_layout_do_not_matter(architecture: PreTrainedConfig) -> None:
    model = build(architecture)
    rows = examples(30, options=[[5], [9, 6], [7, 7, 7]])
    one = evaluate(model, rows, batch_size=1)
    for packed, size in ((True, 7), (True, 100), (False, 7)):
        other = evaluate(Base(model, packed), rows, batch_size=size)
        assert other.predictions == one.predictions
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
    assert one.accuracy == sum(p == e.label for p, e in zip(one.predictions, rows, strict=True)) / 30


@pytest.mark.parametrize("calibrated", [False, True])
def test_sets_that_are_evaluated_together_are_those_evaluated_alone(calibrated: bool) -> None:
    base = Base(build(ARCHITECTURES["llama"]))
    sets = [
        [replace(example, null_prompt=(9, 9)) for example in examples(count, options=[[5], [9, 6], [7, 7, 7]])]
        for count in (13, 5)
    ]
    together = evaluate_together(base, sets, batch_size=4, calibrated=calibrated)
    alone = [evaluate(base, rows, batch_size=4, calibrated=calibrated) for rows in sets]
    assert together == alone
    assert [len(evaluation.probabilities) for evaluation in together] == [13, 5]
    for one, other in zip(together, alone, strict=True):
        assert all(map(torch.equal, one.probabilities, other.probabilities))
    with pytest.raises(XgbloraError, match="there are no rows"):
        evaluate_together(base, [sets[0], []])


def test_the_prompts_own_tokens_do_not_count() -> None:
    model = build(ARCHITECTURES["llama"])
    rows = examples(10)
    trained_on_all = [Example(e.prompt, e.options, e.label, score_prompt=True) for e in rows]
    assert evaluate(model, trained_on_all).loss == evaluate(model, rows).loss


def test_language_model_loss_is_of_the_correct_option() -> None:
    model = build(ARCHITECTURES["llama"])
    row = examples(1)[0]
    loss = evaluate(model, [row], TextLoss()).loss
    with torch.no_grad():
        logits = model(torch.tensor([row.prompt])).logits[0, -1].double()
    wanted = -torch.log_softmax(logits, 0)[row.options[row.label][0]].item()
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert math.log(2) < wanted


def test_predictions_are_options() -> None:
    model = build(ARCHITECTURES["llama"])
    task = TASKS["RottenTomatoes"]
    answers = predict(model, byte_tokenizer(), task, ["fine", "bad", "so"])
    assert len(answers) == 3
    assert set(answers) <= set(task.options)
    assert predict(model, byte_tokenizer(), task, []) == []
    with pytest.raises(XgbloraError, match="put the one into a list"):
        predict(model, byte_tokenizer(), task, "fine")


def test_a_model_is_measured_and_laid_out_once_for_many_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, task = build(ARCHITECTURES["llama"]), byte_tokenizer(), TASKS["RottenTomatoes"]
    texts = ["fine", "bad", "so", "x" * 20]
    expected = predict(model, tokenizer, task, texts)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    measured, laid_out = [], []
    route, layer = base.measure_route, cpu_layout.ReorderedLinear.__init__
    monkeypatch.setattr(base, "measure_route", lambda bases: measured.append(1) or route(bases))
    monkeypatch.setattr(
        cpu_layout.ReorderedLinear, "__init__", lambda self, source: laid_out.append(1) or layer(self, source)
    )
    with Predictor(model, tokenizer, task) as predictor:
        once = len(laid_out)
        assert once > 0
        assert [predictor([text])[0] for text in texts] == expected
    assert (len(measured), len(laid_out)) == (1, once)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_no_rows_are_refused_in_one_line() -> None:
    model = build(ARCHITECTURES["llama"])
    with pytest.raises(XgbloraError, match="there are no rows to evaluate"):
        evaluate(model, [])
    with pytest.raises(XgbloraError, match="there are no rows to evaluate"):
        evaluate_stages(attach(model), [])


@pytest.mark.parametrize("loss", [OptionLoss(), TextLoss()])
def test_calibrated_scores_are_what_a_prompt_adds(loss: AnswerLoss) -> None:
    model = build(ARCHITECTURES["llama"])
    draw = [[[5], [9, 6], [7, 7, 7]], [[8, 4], [3]]]
    rows = [
        replace(row, options=draw[number % 2], label=number % 2, null_prompt=(20, 21 + number % 3))
        for number, row in enumerate(examples(30))
    ]

    def plain(prompt: Sequence[int], option: list[int]) -> float:
        with torch.no_grad():
            logs = model(torch.tensor([[*prompt, *option]])).logits[0].double().log_softmax(-1)
        return sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(option)) / len(option)

    wanted = [[plain(e.prompt, option) - plain(e.null_prompt, option) for option in e.options] for e in rows]
    calibrated = evaluate(model, rows, loss, 7, calibrated=True)
    assert calibrated.predictions == [scores.index(max(scores)) for scores in wanted]
    assert calibrated.predictions != evaluate(model, rows, loss, 7).predictions
    losses = [math.log(sum(map(math.exp, scores))) - scores[e.label] for e, scores in zip(rows, wanted, strict=True)]
    if isinstance(loss, OptionLoss):
        assert calibrated.loss == pytest.approx(sum(losses) / 30, rel=1e-4)
    with pytest.raises(XgbloraError, match="give the task a null_prompt"):
        evaluate(model, examples(4), calibrated=True)


def test_rows_without_answers_are_predicted() -> None:
    model = build(ARCHITECTURES["llama"])
    task = Task("T", "{{ a }} {{ b }} is", "choices", "label", source=dict)
    rows = [{"a": "x", "b": "y", "choices": ["one", "two", "three"]}, {"a": "z", "b": "y", "choices": ["four", "five"]}]
    answers = predict(model, byte_tokenizer(), task, rows)
    assert [answer in row["choices"] for answer, row in zip(answers, rows, strict=True)] == [True, True]
    with pytest.raises(XgbloraError, match=r"T asks by several columns \(a, b, choices\): give rows"):
        predict(model, byte_tokenizer(), task, ["x"])


@pytest.mark.parametrize("subset", [None, LayerSubset(1, "top")])
def test_stages_are_the_model_with_its_first_boosters(subset: LayerSubset | None, randomise: Any) -> None:
    model = build(ARCHITECTURES["llama"])
    rows = examples(40)
    expected = [evaluate(model, rows)]
    ledger = Ledger(attach(model, 1, 16, ["o_proj"], xgblora=True, layers=subset))
    for number in range(3):
        with torch.no_grad():
            for layer, _, _ in ledger.adapters.slices:
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(number)))
        expected.append(evaluate(model, rows))
        if number < 2:
            ledger.merge(number + 1, "", 1.0)
    stages = evaluate_stages(ledger.adapters, rows)
    assert [stage.predictions for stage in stages] == [stage.predictions for stage in expected]
    assert [stage.loss for stage in stages] == pytest.approx([stage.loss for stage in expected], rel=1e-5)
    assert len({stage.loss for stage in stages}) == 4
    assert evaluate(model, rows).loss == expected[-1].loss  # all as it was
