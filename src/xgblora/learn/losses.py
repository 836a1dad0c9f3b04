"""Losses of a batch, one number an example: what estimators, backpropagation and fits minimise."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from xgblora.base import Base
from xgblora.base.layer_major import Turn, later, no_turn
from xgblora.data.batch import Batch
from xgblora.learn.generation import Writer

Objective = Callable[[PreTrainedModel, Batch], Tensor]
"""(model, batch) -> losses (segments,) float32. Write your own to train on anything a forward pass can score."""


class Loss(ABC):
    """A loss that this package knows how to make ready: an :data:`Objective` with properties."""

    writes: bool = False
    """Its forwards are its own, of padded rows: one or more for every example of a batch in turn."""
    tokens: int = 0
    """With ``writes``: tokens fed to the model so far. Other losses' forwards are as long as their batches."""

    def __call__(self, model: PreTrainedModel | Base, batch: Batch) -> Tensor:
        """Losses (segments,) float32 of a batch."""
        return self.losses(Base.of(model), batch)

    @abstractmethod
    def losses(self, base: Base, batch: Batch) -> Tensor:
        """Losses (segments,) float32 of a batch."""

    def all_losses(self, base: Base, batches: Sequence[Batch], turn: Turn = no_turn) -> Iterator[Tensor]:
        """The same of several batches; ``turn`` as in :meth:`Base.hidden`."""
        for number, batch in enumerate(batches):
            turn(number)
            yield self.losses(base, batch)


class FunctionLoss(Loss):
    """A function of the user's as a loss."""

    def __init__(self, function: Objective) -> None:
        self.function = function

    def losses(self, base: Base, batch: Batch) -> Tensor:
        with base.ready(batch):
            return self.function(base.model, batch)


class AnswerLoss(Loss):
    """A loss of options' scores, their mean token log-probabilities. Recipe boost needs one of these."""

    normalised: bool
    """Scores are log-probabilities; else what is equal for all options of an example may be left out of them."""
    writer: Writer | None = None
    """What writes the answers of a task where they are written; else the best option is the answer."""

    def losses(self, base: Base, batch: Batch) -> Tensor:
        return self.of_scores(self.scores(base, batch), batch.label)

    def all_losses(self, base: Base, batches: Sequence[Batch], turn: Turn = no_turn) -> Iterator[Tensor]:
        for batch, scores in zip(batches, self.all_scores(base, batches, turn=turn), strict=True):
            yield self.of_scores(scores, batch.label)

    def scores(self, base: Base, batch: Batch, normalised: bool | None = None) -> Tensor:
        """Scores (segments, max_options) float32 of a batch's options, -inf where there is none."""
        (scores,) = self.all_scores(base, [batch], normalised)
        return scores

    def all_scores(
        self, base: Base, batches: Iterable[Batch], normalised: bool | None = None, turn: Turn = no_turn
    ) -> Iterator[Tensor]:
        """The same of several batches, which pass the model together where that saves reading it (:meth:`Base.waves`).

        ``turn``: as in :meth:`Base.hidden`.
        """
        start = 0
        for wave in base.waves(batches):
            hidden = list(base.hidden(wave, later(turn, start)))
            with base.held():
                yield from [
                    option_scores(base, of_batch, batch, self.normalised if normalised is None else normalised)
                    for of_batch, batch in zip(hidden, wave, strict=True)
                ]
            start += len(wave)

    @abstractmethod
    def of_scores(self, scores: Tensor, label: Tensor) -> Tensor:
        """Losses (segments,) from scores (segments, options) and the correct options (segments,)."""


class OptionLoss(AnswerLoss):
    """Cross-entropy of the correct option among all options (MeZO, arXiv 2305.17333, appendix B.2).

    Examples:
        >>> from xgblora.base.load import tiny_model
        >>> from xgblora.data.batch import Example
        >>> base = Base(tiny_model())
        >>> OptionLoss()(base, base.batch([Example([1, 2, 3], [[4], [5]], label=0)])).shape
        torch.Size([1])
    """

    normalised = False

    def of_scores(self, scores: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(scores, label, reduction="none")


class TextLoss(AnswerLoss):
    """Mean negative log-probability of the correct option's tokens (and the prompt's, where the examples say so)."""

    normalised = True

    def __init__(self, writer: Writer | None = None) -> None:
        self.writer = writer

    def of_scores(self, scores: Tensor, label: Tensor) -> Tensor:
        return -scores.gather(1, label[:, None])[:, 0]


class Head(Protocol):
    """What scores options: a base, or what stands for its head."""

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """As :meth:`Base.logits`."""

    def log_probabilities(self, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
        """As :meth:`Base.log_probabilities`."""


def option_scores(head: Head, hidden: Tensor, batch: Batch, normalised: bool = False) -> Tensor:
    """Mean token log-probability of each option.

    When every option is a single token and ``normalised`` is False, the logits of these tokens alone are taken: the
    log-softmax over the vocabulary would subtract the same number from all options of an example.

    Args:
        head: A base, or what stands for its head.
        hidden: Final hidden states (reads, hidden) of ``batch``.
        batch: What was forwarded.
        normalised: Take the whole vocabulary in any case.

    Returns:
        (segments, max_options) float32, -inf where there is no option.
    """
    return option_means(token_scores(head, hidden, batch, normalised), batch)


def token_scores(head: Head, hidden: Tensor, batch: Batch, normalised: bool = False) -> Tensor:
    """What :func:`option_scores` takes the means of: (targets,) float32."""
    if batch.single_token and not normalised:
        words, column = torch.unique(batch.target, return_inverse=True)
        return head.logits(hidden, words)[batch.target_read, column]
    return head.log_probabilities(hidden, batch.target_read, batch.target)


def option_means(scores: Tensor, batch: Batch) -> Tensor:
    """Means (segments, max_options) of the scores (targets,) of each option's tokens, -inf where there is none."""
    options = batch.option_cell.numel()
    total = scores.new_zeros(options).index_add(0, batch.target_option, scores)
    mean = total / torch.bincount(batch.target_option, minlength=options)
    cells = mean.new_full((batch.segments * batch.max_options,), -torch.inf)
    return cells.index_copy(0, batch.option_cell, mean).view(batch.segments, batch.max_options)


def divergences(scores: Tensor, targets: Tensor) -> Tensor:
    """Kullback-Leibler divergences (segments,) of the options' probabilities from ``targets`` (segments, options)."""
    logs = scores.log_softmax(dim=1).masked_fill(~scores.isfinite(), 0)
    return (torch.xlogy(targets, targets) - targets * logs).sum(1)
