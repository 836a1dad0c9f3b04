"""Scoring options over a data set: accuracy and loss, sorted by length, in batches of equally many tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.inference_layout import inference_layout
from xgblora.models import context_length
from xgblora.objectives import option_scores, score_losses
from xgblora.packing import Example, build_batch, choose_route
from xgblora.tasks import Task, encode


@dataclass(frozen=True)
class Evaluation:
    """``accuracy`` in [0, 1], ``loss`` the mean over examples, ``predictions`` in the order given."""

    accuracy: float
    loss: float
    predictions: list[int]


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    packed: bool,
    batch_size: int,
    classification: bool = True,
    progress: str | None = None,
) -> Evaluation:
    """Choose the best option of every example.

    The loss is the training loss without the prompt's share: cross-entropy over options with ``classification``,
    else the mean negative log-probability of the correct option's tokens. A batch holds as many tokens as
    ``batch_size`` examples of average length. ``progress`` names a progress bar.
    """
    device = next(model.parameters()).device
    predictions = [0] * len(examples)
    losses = []
    with (
        inference_layout(model),
        tqdm(total=len(examples), desc=progress, unit="ex", leave=False, disable=progress is None) as bar,
    ):
        for chosen in _by_tokens(examples, batch_size):
            rows = [Example(e.prompt, e.options, e.label) for e in (examples[i] for i in chosen)]
            batch = build_batch(rows, packed).to(device).filled()
            scores = option_scores(model, batch, normalised=not classification)
            losses.append(score_losses(scores, batch.label, classification))
            for i, prediction in zip(chosen, scores.argmax(1).tolist(), strict=True):
                predictions[i] = prediction
            bar.update(len(chosen))
    correct = sum(p == e.label for p, e in zip(predictions, examples, strict=True))
    return Evaluation(correct / len(examples), torch.cat(losses).double().mean().item(), predictions)


def _by_tokens(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Numbers of examples, shortest first, in batches of at most ``batch_size`` times the mean token count."""
    tokens = [len(e.prompt) + sum(len(option) - 1 for option in e.options) for e in examples]
    room = batch_size * sum(tokens) / len(tokens)
    batch: list[int] = []
    used = 0
    for number in sorted(range(len(examples)), key=tokens.__getitem__):
        if batch and used + tokens[number] > room:
            yield batch
            batch, used = [], 0
        batch.append(number)
        used += tokens[number]
    yield batch


def predict(model: PreTrainedModel, tokenizer: Tokenizer, task: Task, texts: Sequence[str]) -> list[str]:
    """The option of ``task`` that the model chooses for each text, e.g. ``[' great', ' terrible']``."""
    rows = [{task.text_column: text, task.label_column: 0} for text in texts]
    examples = encode(task, rows, tokenizer, context_length(model) or 2048)
    found = evaluate(model, examples, choose_route(model), batch_size=16)
    return [task.options[index] for index in found.predictions]
