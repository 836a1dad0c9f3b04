"""The embedded SmolLM2-135M and real sentences: what tiny models cannot show."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import estimate, option_scores
from xgblora import Base, Example, Ledger, attach, encode, evaluate, load_model, load_splits
from xgblora.base.wheels import shipped_file
from xgblora.config import EMBEDDED_MODEL
from xgblora.data.batch import build_batch
from xgblora.tasks import TASKS

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Example]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model, tokenizer = load_model()
    task = TASKS["RottenTomatoes"]
    return model, tokenizer, encode(task, load_splits(task)["train"].select(range(0, 6400, 100)), tokenizer, 2048)


@pytest.mark.parametrize("unpack", [pytest.param(True, marks=pytest.mark.soak), False])
def test_the_converted_model_is_the_gguf(unpack: bool, loaded: Loaded) -> None:
    model, _, rows = loaded
    direct, _ = load_model(str(shipped_file(EMBEDDED_MODEL)), unpack=unpack)
    ids = torch.tensor([rows[0].prompt])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)


def test_packed_scores_equal_one_sentence_at_a_time(loaded: Loaded) -> None:
    model, _, rows = loaded
    assert Base(model).packed
    rows = rows[:8]
    with torch.no_grad():
        packed = option_scores(model, build_batch(rows), normalised=True)
        for example, scores in zip(rows, packed, strict=True):
            plain = model(torch.tensor([example.prompt])).logits[0, -1].log_softmax(-1)
            wanted = plain[[option[0] for option in example.options]]
            torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.soak), torch.bfloat16])
def test_a_merge_after_training_is_bit_identical(dtype: torch.dtype) -> None:
    model, tokenizer = load_model(dtype=dtype)
    task = TASKS["RottenTomatoes"]
    rows = encode(task, load_splits(task)["train"].select(range(0, 6400, 800)), tokenizer, 2048)
    adapters = attach(model, xgblora=True)
    batch = build_batch(rows)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=3e-3)
    for step in range(2):
        optimizer.zero_grad()
        adapters.accumulate_gradient(estimate(adapters, batch, step=step).gradient)
        optimizer.step()
    with torch.no_grad():
        before = option_scores(model, batch)
        Ledger(adapters).merge(2, "step 2", 1.0)
        after = option_scores(model, batch)
        adapters.detach()
        bare = option_scores(model, batch)
    assert torch.equal(before, after)
    assert not torch.equal(before, bare)


def test_zero_shot_prefers_one_option(loaded: Loaded) -> None:
    """Known of this model: near chance, with a loss far above log 2."""
    model, _, rows = loaded
    zero_shot = evaluate(model, rows, batch_size=32)
    assert 0.3 < zero_shot.accuracy < 0.75
    assert 0.9 < zero_shot.loss < 1.6
