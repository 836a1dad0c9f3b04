"""Evaluation: its numbers do not depend on batches, order or layout."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, build, byte_tokenizer, examples
from xgblora import Example, LayerSubset, Ledger, XgbloraError, attach, evaluate, evaluate_stages, predict
from xgblora.tasks import TASKS, Task


def test_batches_and_layout_do_not_matter(architecture: PreTrainedConfig) -> None:
    model = build(architecture)
    rows = examples(30, options=[[5], [9, 6], [7, 7, 7]])
    one = evaluate(model, rows, packed=True, batch_size=1)
    for packed, size in ((True, 7), (True, 100), (False, 7)):
        other = evaluate(model, rows, packed=packed, batch_size=size)
        assert other.predictions == one.predictions
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
    assert one.accuracy == sum(p == e.label for p, e in zip(one.predictions, rows, strict=True)) / 30


def test_the_prompts_own_tokens_do_not_count() -> None:
    model = build(ARCHITECTURES["llama"])
    rows = examples(10)
    trained_on_all = [Example(e.prompt, e.options, e.label, score_prompt=True) for e in rows]
    assert evaluate(model, trained_on_all, True, 4).loss == evaluate(model, rows, True, 4).loss


def test_language_model_loss_is_of_the_correct_option() -> None:
    model = build(ARCHITECTURES["llama"])
    row = examples(1)[0]
    found = evaluate(model, [row], packed=True, batch_size=1, classification=False)
    with torch.no_grad():
        logits = model(torch.tensor([row.prompt])).logits[0, -1].double()
    wanted = -torch.log_softmax(logits, 0)[row.options[row.label][0]].item()
    assert found.loss == pytest.approx(wanted, rel=1e-4)
    assert math.log(2) < wanted


def test_predictions_are_options() -> None:
    model = build(ARCHITECTURES["llama"])
    task = TASKS["RottenTomatoes"]
    found = predict(model, byte_tokenizer(), task, ["fine", "bad", "so"])
    assert len(found) == 3
    assert set(found) <= set(task.options)


@pytest.mark.parametrize("classification", [True, False])
def test_calibrated_scores_are_what_a_prompt_adds(classification: bool) -> None:
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
    found = evaluate(model, rows, True, 7, classification, calibrated=True)
    assert found.predictions == [scores.index(max(scores)) for scores in wanted]
    assert found.predictions != evaluate(model, rows, True, 7, classification).predictions
    losses = [math.log(sum(map(math.exp, scores))) - scores[e.label] for e, scores in zip(rows, wanted, strict=True)]
    if classification:
        assert found.loss == pytest.approx(sum(losses) / 30, rel=1e-4)
    with pytest.raises(XgbloraError, match="give the task a null_prompt"):
        evaluate(model, examples(4), True, 7, calibrated=True)


def test_rows_without_answers_are_predicted() -> None:
    model = build(ARCHITECTURES["llama"])
    task = Task("T", "{{ a }} {{ b }} is", "choices", "label", source=dict)
    rows = [{"a": "x", "b": "y", "choices": ["one", "two", "three"]}, {"a": "z", "b": "y", "choices": ["four", "five"]}]
    found = predict(model, byte_tokenizer(), task, rows)
    assert [answer in row["choices"] for answer, row in zip(found, rows, strict=True)] == [True, True]
    with pytest.raises(XgbloraError, match=r"T asks by several columns \(a, b, choices\): give rows"):
        predict(model, byte_tokenizer(), task, ["x"])


@pytest.mark.parametrize("subset", [None, LayerSubset(1, "top")])
def test_stages_are_the_model_with_its_first_boosters(subset: LayerSubset | None, randomise: Any) -> None:
    model = build(ARCHITECTURES["llama"])
    rows = examples(40)
    expected = [evaluate(model, rows, True, 8)]
    ledger = Ledger(attach(model, 1, 16, ["o_proj"], xgblora=True, layers=subset))
    for number in range(3):
        with torch.no_grad():
            for layer, _, _ in ledger.adapters.slices:
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(number)))
        expected.append(evaluate(model, rows, True, 8))
        if number < 2:
            ledger.merge(number + 1, "", 1.0)
    found = evaluate_stages(ledger.adapters, rows, True, 8)
    assert [stage.predictions for stage in found] == [stage.predictions for stage in expected]
    assert [stage.loss for stage in found] == pytest.approx([stage.loss for stage in expected], rel=1e-5)
    assert len({stage.loss for stage in found}) == 4
    assert evaluate(model, rows, True, 8).loss == expected[-1].loss  # all as it was
