"""Scoring a data set: loss, and accuracy of options or of written answers, in batches of equally many tokens."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.adapters import Adapters
from xgblora.errors import XgbloraError, within_memory
from xgblora.generation import Writer, exact_match_and_f1
from xgblora.inference_layout import inference_layout
from xgblora.lower_layers import LowerLayers
from xgblora.models import context_length
from xgblora.objectives import option_scores, score_losses
from xgblora.packing import Example, build_batch, choose_route, shared_beginning, split_by_tokens
from xgblora.tasks import Chat, Metric, Task, encode


@dataclass(frozen=True)
class Evaluation:
    """``accuracy`` in [0, 1], ``loss`` the mean over examples, ``predictions`` in the order given.

    ``texts``: the answers where the model writes them; then ``accuracy`` is the share of exact matches.
    """

    accuracy: float
    loss: float
    predictions: list[int]
    texts: list[str] | None = None


def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    packed: bool,
    batch_size: int,
    classification: bool = True,
    progress: str | None = None,
    writer: Writer | None = None,
    calibrated: bool = False,
) -> Evaluation:
    """Choose the best option of every example, or write its answer, with a ``writer``.

    ``calibrated``: an option's score is what the prompt adds to it, log p(option | prompt) - log p(option | null
    prompt) per token (Holtzman et al. 2021, arXiv 2104.08315): none is chosen for being a likely text by itself.

    The loss is the training loss without the prompt's share: cross-entropy over options with ``classification``,
    else the mean negative log-probability of the correct option's tokens. A batch holds as many tokens as
    ``batch_size`` examples of average length. ``progress`` names a progress bar.
    """
    nulls = null_scores(model, examples, packed, batch_size) if calibrated else None
    return _evaluate(
        model, examples, packed, batch_size, classification, progress, writer, [nullcontext], null_scores=nulls
    )[0]


def evaluate_stages(
    adapters: Adapters,
    examples: Sequence[Example],
    packed: bool,
    batch_size: int,
    classification: bool = True,
    progress: str | None = None,
    writer: Writer | None = None,
) -> list[Evaluation]:
    """The same with the first 0, 1, ... boosters and with all (the last is the pair in training), in one pass.

    What lies below the lowest layer that trains is computed once for all stages.
    """
    stages = [partial(adapters.first, count) for count in range(adapters.boosters + 2)]
    lower_layers = LowerLayers(adapters, cache_bytes=10**9)
    return _evaluate(
        adapters.model, examples, packed, batch_size, classification, progress, writer, stages, lower_layers
    )


@torch.inference_mode()
def _evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    packed: bool,
    batch_size: int,
    classification: bool,
    progress: str | None,
    writer: Writer | None,
    stages: Sequence[Callable[[], AbstractContextManager[None]]],
    lower_layers: LowerLayers | None = None,
    null_scores: Mapping[Hashable, Tensor] | None = None,
) -> list[Evaluation]:
    """One evaluation for every stage: what to do to the model around a forward."""
    normalised = not classification or null_scores is not None
    device = next(model.parameters()).device
    predictions = [[0] * len(examples) for _ in stages]
    losses: list[list[Tensor]] = [[] for _ in stages]
    with (
        inference_layout(model),
        tqdm(total=len(examples), desc=progress, unit="ex", leave=False, disable=progress is None) as bar,
    ):
        for chosen in _by_tokens(examples, batch_size):
            rows = [replace(examples[i], score_prompt=False) for i in chosen]
            plain = build_batch(rows, packed, share=lower_layers is None).to(device)
            batch = plain.filled()
            for number, stage in enumerate(stages):
                with (
                    within_memory(
                        f"evaluating {len(rows)} examples of {batch.tokens:,} tokens",
                        "lower --per_device_eval_batch_size or --max_length, or load the base in bfloat16",
                    ),
                    stage(),
                    lower_layers.shared(plain, batch) if lower_layers else nullcontext(),
                ):
                    scores = option_scores(model, batch, normalised)
                if null_scores is not None:
                    own = [null_scores[_null(row)] for row in rows]
                    scores = scores - nn.utils.rnn.pad_sequence(own, batch_first=True)
                losses[number].append(score_losses(scores, batch.label, classification))
                for i, prediction in zip(chosen, scores.argmax(1).tolist(), strict=True):
                    predictions[number][i] = prediction
            if lower_layers:
                lower_layers.clear()
            bar.update(len(chosen))
    means = [torch.cat(loss).double().mean().item() for loss in losses]
    if writer is None:
        return [Evaluation(accuracy(examples, p), loss, p) for p, loss in zip(predictions, means, strict=True)]
    found = []
    for stage, loss, prediction in zip(stages, means, predictions, strict=True):
        with stage():
            texts = writer.write(model, examples, None if progress is None else f"{progress}, writing")
        found.append(Evaluation(exact_match_and_f1(examples, texts)[0], loss, prediction, texts))
    return found


@torch.inference_mode()
def null_scores(
    model: PreTrainedModel, examples: Sequence[Example], packed: bool, batch_size: int
) -> dict[Hashable, Tensor]:
    """Mean token log-probabilities (options,) of every example's options after its null prompt, by :func:`_null`.

    Raises :class:`XgbloraError` where an example has no null prompt.
    """
    if not all(example.null_prompt for example in examples):
        raise XgbloraError("calibrated scores need a prompt that asks nothing: give the task a null_prompt")
    bare = {_null(e): Example(e.null_prompt, e.options, 0) for e in examples}
    keys, rows = list(bare), list(bare.values())
    found: dict[Hashable, Tensor] = {}
    for chosen in _by_tokens(rows, batch_size):
        batch = build_batch([rows[i] for i in chosen], packed).to(model.device)
        for i, scores in zip(chosen, option_scores(model, batch.filled(), normalised=True), strict=True):
            found[keys[i]] = scores[: len(rows[i].options)]
    return found


def _null(example: Example) -> Hashable:
    """What an example's scores without its prompt depend on."""
    return example.null_prompt, tuple(map(tuple, example.options))


def _by_tokens(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Numbers of examples, shortest first, in batches of at most ``batch_size`` times the mean token count.

    What all prompts begin with is not counted.
    """
    shared = shared_beginning(examples)
    room = batch_size * (sum(e.tokens for e in examples) / len(examples) - shared)
    order = iter(sorted(range(len(examples)), key=lambda number: examples[number].tokens))
    for group in split_by_tokens(sorted(examples, key=lambda e: e.tokens), room, shared):
        yield list(islice(order, len(group)))


def score(metric: Metric, examples: Sequence[Example], found: Evaluation) -> float:
    """A task's metric of what a model chose or wrote, in [0, 1]."""
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score  # slow to import

    if metric == "accuracy":
        return found.accuracy
    if found.texts is not None:
        return exact_match_and_f1(examples, found.texts)[1]
    chosen, labels = torch.tensor(found.predictions), torch.tensor([example.label for example in examples])
    if metric == "macro_f1":
        options = max(len(example.options) for example in examples)
        return float(multiclass_f1_score(chosen, labels, num_classes=options, average="macro"))
    return float(binary_f1_score(chosen, labels))


def accuracy(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    """Share of examples whose chosen option is a correct one."""
    right = sum(p == e.label or p in e.also_correct for p, e in zip(predictions, examples, strict=True))
    return right / len(examples)


def predict(
    model: PreTrainedModel, tokenizer: Tokenizer, task: Task | Chat, rows: Sequence[Mapping[str, Any] | str]
) -> list[str]:
    """The option of ``task`` that the model chooses for each row, e.g. ``['great', 'terrible']``, or what it writes.

    ``rows`` hold the columns that the task's prompt and options are made of; a text stands for the only one. Raises
    :class:`XgbloraError` for a text where there are several, and for rows that make no question.
    """
    asked = [task.asked(row) for row in rows]
    examples = encode(task, asked, tokenizer, context_length(model.config) or 2048, answered=False)
    if task.generation is not None:
        return Writer(tokenizer, task.generation).write(model, examples)
    assert isinstance(task, Task)  # what an assistant says is always written
    found = evaluate(model, examples, choose_route(model), batch_size=16)
    questions = [task.question(row, answered=False) for row in asked]
    return [question.options[index].strip() for question, index in zip(questions, found.predictions, strict=True)]
