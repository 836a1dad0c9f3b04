"""Evaluation: its numbers do not depend on batches, order or layout."""

import math

import pytest
import torch
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, build, byte_tokenizer, examples
from xgblora import Example, evaluate, predict
from xgblora.tasks import TASKS


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
