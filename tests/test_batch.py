"""Packed batches: the same numbers as one sequence at a time, whatever the architecture."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from conftest import ARCHITECTURES, LogLines, build, examples, option_scores
from xgblora import Base, Batch, Example, OptionLoss, TextLoss
from xgblora.base import attention, head
from xgblora.data.batch import FILLING, SHARED, build_batch, shared_beginning

ROWS = [
    Example([3, 50, 60, 70, 80], [[5], [9]], 0),
    Example([4, 51], [[5, 6, 7], [9]], 1),
    Example([7, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [[5, 8], [9, 6, 4, 3], [10]], 2),
]


class Watch(TorchDispatchMode):
    """Precisions and shapes of the tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[torch.dtype, torch.Size]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.made.add((tensor.dtype, tensor.shape))
        return result


def plain_scores(model: PreTrainedModel, example: Example) -> list[float]:
    """The definition: one option a call, no packing, mean log-probability of its tokens."""
    scores = []
    for option in example.options:
        ids = torch.tensor([[*example.prompt, *option]])
        with torch.no_grad():
            logprobs = F.log_softmax(model(ids).logits[0].double(), dim=-1)
        start = 0 if example.score_prompt else len(example.prompt) - 1
        places = range(start, ids.shape[1] - 1)
        scores.append(sum(logprobs[i, ids[0, i + 1]].item() for i in places) / len(places))
    return scores


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("score_prompt", [False, True])
def test_option_scores_equal_one_option_a_call(
    architecture: PreTrainedConfig, packed: bool, score_prompt: bool
) -> None:
    model = build(architecture)
    rows = [Example(e.prompt, e.options, e.label, score_prompt) for e in ROWS]
    with torch.no_grad():
        packed_scores = option_scores(model, build_batch(rows, packed))
    for example, scores in zip(rows, packed_scores, strict=True):
        wanted = plain_scores(model, example)
        torch.testing.assert_close(scores[: len(wanted)], torch.tensor(wanted), rtol=1e-4, atol=1e-4)
        assert (scores[len(wanted) :] == -torch.inf).all()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("score_prompt", [False, True])
def test_logits_may_be_held_part_by_part(packed: bool, score_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and gradients; a target's position may lie in any part."""
    model = build(ARCHITECTURES["llama"])
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    batch = build_batch([Example(e.prompt, e.options, e.label, score_prompt) for e in ROWS], packed)
    results = []
    for reads, head_bytes in ((1024, 2**27), (3, 2**27), (1024, 7 * 32 * 4), (3, 100 * 32 * 4)):
        monkeypatch.setattr(head, "READS_AT_ONCE", reads)
        monkeypatch.setattr(head, "HEAD_BYTES", head_bytes)  # 7 or 100 of 300 words
        losses = TextLoss()(model, batch)
        results.append((losses, *torch.autograd.grad(losses.sum(), weight)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_a_wide_head_is_never_held_whole_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of a bfloat16 head: no float32 copy is whole, and none waits for the backward pass."""
    model = build(ARCHITECTURES["llama"], torch.bfloat16)
    words, width = model.lm_head.weight.shape
    part = 50
    monkeypatch.setattr(head, "HEAD_BYTES", 4 * width * part)
    batch = build_batch(ROWS)
    hidden = torch.randn(batch.read.numel(), width, requires_grad=True)
    waiting: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        waiting.append(tensor.numel() if tensor.dtype == torch.float32 else 0)
        return tensor

    with Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logs = Base(model).log_probabilities(hidden, batch.target_read, batch.target)
        logs.sum().backward()
        Base(model).logits(hidden)
    assert max(waiting) < part * width
    assert (torch.float32, torch.Size([part, width])) in watch.made
    assert (torch.float32, torch.Size([words, width])) not in watch.made
    whole = F.linear(hidden, model.lm_head.weight.float()).log_softmax(1)
    torch.testing.assert_close(logs, whole[batch.target_read, batch.target], rtol=1e-5, atol=1e-5)


def test_logits_of_a_large_vocabulary_are_never_whole() -> None:
    """Forward and backward at 1,000 positions over 50,000 words: 200 MB of logits, of which 8 are held at once."""
    sizes: dict[str, Any] = {"vocab_size": 50_000, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1}
    model = build(LlamaConfig(**sizes, num_attention_heads=8))
    hidden = torch.randn(1000, 512, requires_grad=True)
    with Watch() as watch:
        Base(model).log_probabilities(hidden, torch.arange(1000), torch.arange(1000)).sum().backward()
    assert max(shape.numel() for _, shape in watch.made) <= 2**21


@pytest.mark.parametrize("packed", [True, False])
def test_losses_equal_their_definitions(packed: bool) -> None:
    model = build(ARCHITECTURES["opt"])
    batch = build_batch(ROWS, packed)
    wanted = [plain_scores(model, e) for e in ROWS]
    cross_entropy = [-F.log_softmax(torch.tensor(s), 0)[e.label] for e, s in zip(ROWS, wanted, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(OptionLoss()(model, batch), torch.stack(cross_entropy), rtol=1e-4, atol=1e-4)
        language = torch.tensor([-s[e.label] for e, s in zip(ROWS, wanted, strict=True)])
        torch.testing.assert_close(TextLoss()(model, batch), language, rtol=1e-4, atol=1e-4)


def test_single_token_options_cost_no_tokens_and_leave_out_the_softmax() -> None:
    """Scores without the log-softmax differ by a constant an example, so the loss is the same."""
    model = build(ARCHITECTURES["llama"])
    rows = examples(6)
    batch = build_batch(rows)
    assert batch.single_token
    assert batch.tokens == sum(len(e.prompt) for e in rows)
    with torch.no_grad():
        difference = option_scores(model, batch) - option_scores(model, batch, normalised=True)
    torch.testing.assert_close(difference[:, 0], difference[:, 1], rtol=1e-4, atol=1e-4)
    assert difference.abs().max() > 0.1


def test_a_prompt_is_computed_once_for_all_its_options() -> None:
    batch = build_batch([ROWS[2]])
    assert batch.tokens == 11 + 1 + 3 + 0


@pytest.mark.parametrize("packed", [True, False])
def test_repeated_batches_repeat_losses(packed: bool) -> None:
    model = build(ARCHITECTURES["llama"])
    batch = build_batch(ROWS, packed)
    with torch.no_grad():
        once, thrice = OptionLoss()(model, batch), OptionLoss()(model, batch.repeat(3))
    torch.testing.assert_close(thrice.view(3, -1), once.expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_architectures_run_packed(architecture: PreTrainedConfig, dtype: torch.dtype) -> None:
    assert Base(build(architecture, dtype)).packed


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4),
        GPTNeoConfig(
            vocab_size=300,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
        Gemma2Config(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            head_dim=8,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_fall_back_to_padding_and_say_so(config: PreTrainedConfig, log_lines: LogLines) -> None:
    model = build(config)
    assert not Base(model).packed
    assert log_lines.containing("cannot run packed batches")
    assert log_lines.containing("padded rows are used")
    with torch.no_grad():
        padded = option_scores(model, build_batch(ROWS, packed=False))
    wanted = plain_scores(model, ROWS[1])
    torch.testing.assert_close(padded[1, :2], torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_rows_may_attend_in_one_call(architecture: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    model = build(architecture)
    batch = build_batch(ROWS).filled()
    with torch.no_grad():
        expected = option_scores(model, batch)
        groups = attention._groups
        monkeypatch.setattr(attention, "_groups", lambda batch, together: groups(batch, together=True))
        torch.testing.assert_close(option_scores(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_the_check_of_packing_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were segments not kept apart, it would show."""

    def leaky(batch: Batch, together: bool) -> list[Any]:
        everything = torch.arange(batch.tokens)
        return [attention._Group(0, 1, batch.tokens, everything, None, None)]

    monkeypatch.setattr(attention, "_groups", leaky)
    assert not Base(build(ARCHITECTURES["llama"])).packed


def test_the_models_own_attention_is_restored() -> None:
    model = build(ARCHITECTURES["llama"])
    before = model.config._attn_implementation
    ids = torch.tensor([[3, 4, 5]])
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        OptionLoss()(model, build_batch(ROWS))
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)


def test_filler_changes_no_score_and_leaves_few_token_counts() -> None:
    model = build(ARCHITECTURES["mistral"])
    counts = set()
    for size in range(1, 60):
        batch = build_batch(examples(size, seed=size))
        filled = batch.filled()
        counts.add(filled.input_ids.numel())
        assert batch.tokens <= filled.input_ids.numel() < batch.tokens * (1 + 1 / FILLING) + 8
        if size % 20 == 1:
            with torch.no_grad():
                torch.testing.assert_close(option_scores(model, filled), option_scores(model, batch))
    assert len(counts) < 45


def test_padded_rows_need_no_filler() -> None:
    batch = build_batch(ROWS, packed=False)
    assert batch.filled() is batch


BEGINNING = list(range(20, 20 + SHARED + 8))
UNEQUAL = [
    Example([*BEGINNING[: SHARED + 8 * (number > 0)], *e.prompt], e.options, e.label) for number, e in enumerate(ROWS)
]


@pytest.mark.parametrize("options", ["forked", "single"])
@pytest.mark.parametrize("once", [False, True])
def test_a_beginning_that_all_prompts_share_is_computed_once(
    architecture: PreTrainedConfig, options: str, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scores as one option a call, on a CPU and as on a GPU."""
    model = build(architecture)
    rows = [replace(row, options=[[5], [9]], label=0) for row in UNEQUAL] if options == "single" else UNEQUAL
    groups = attention._groups
    monkeypatch.setattr(attention, "_groups", lambda batch, together: groups(batch, once))
    batch = build_batch(rows, share=True)
    assert batch.shared == SHARED  # what the shortest prompt has of it
    assert batch.tokens == sum(row.tokens for row in rows) - 2 * SHARED
    with torch.no_grad():
        shared_scores = option_scores(model, batch.filled(), normalised=True)
    for row, scores in zip(rows, shared_scores, strict=True):
        wanted = plain_scores(model, row)
        torch.testing.assert_close(scores[: len(wanted)], torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_what_is_shared_must_be_worth_it_and_leave_each_prompt_a_token() -> None:
    one = Example(BEGINNING, [[5], [9]], 0)
    assert shared_beginning([one, one]) == len(BEGINNING) - 1
    assert shared_beginning([one]) == 0
    assert shared_beginning([one, Example([*BEGINNING[: SHARED - 1], 3, 4], [[5], [9]], 0)]) == 0
    assert build_batch([one, one]).shared == build_batch([one, one], packed=False, share=True).shared == 0
