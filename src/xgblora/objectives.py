"""Losses of a batch, one float32 number an example: what both the estimator and backpropagation minimise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from xgblora.packing import Batch, head_logits, read_hidden

Objective = Callable[[PreTrainedModel, Batch], Tensor]
"""(model, batch) -> losses (segments,) float32; write your own to train on anything a forward pass can score."""


READS_AT_ONCE = 1024
"""Predicting positions whose logits over the vocabulary are held at once: 200 MB with 49,152 words."""


def option_scores(model: PreTrainedModel, batch: Batch, normalised: bool = False) -> Tensor:
    """Mean token log-probability of each option: (segments, max_options) float32, -inf where there is none.

    When every option is a single token and ``normalised`` is False, the logits of these tokens alone are taken:
    the log-softmax over the vocabulary would subtract the same number from all options of an example.
    """
    return hidden_scores(model, read_hidden(model, batch), batch, normalised)


def hidden_scores(model: PreTrainedModel, hidden: Tensor, batch: Batch, normalised: bool = False) -> Tensor:
    """:func:`option_scores` from the final hidden states (reads, hidden) of ``batch``."""
    if batch.single_token and not normalised:
        rows, column = torch.unique(batch.target, return_inverse=True)
        logits = head_logits(model, hidden, rows)
        token_scores = logits[batch.target_read, column]
    else:
        token_scores = _log_probabilities(model, hidden, batch)
    options = batch.option_cell.numel()
    total = token_scores.new_zeros(options).index_add(0, batch.target_option, token_scores)
    mean = total / torch.bincount(batch.target_option, minlength=options)
    cells = mean.new_full((batch.segments * batch.max_options,), -torch.inf)
    return cells.index_copy(0, batch.option_cell, mean).view(batch.segments, batch.max_options)


def _log_probabilities(model: PreTrainedModel, hidden: Tensor, batch: Batch) -> Tensor:
    """Log-probability (targets,) of every target token.

    READS_AT_ONCE reads at a time: the whole vocabulary's logits of a batch of long options would take gigabytes.
    """
    found, places = [], []
    for start in range(0, len(hidden), READS_AT_ONCE):
        logits = head_logits(model, hidden[start : start + READS_AT_ONCE], None)
        place = ((batch.target_read >= start) & (batch.target_read < start + len(logits))).nonzero()[:, 0]
        read = batch.target_read[place] - start
        found.append(logits[read, batch.target[place]] - torch.logsumexp(logits, dim=1)[read])
        places.append(place)
    scores = torch.cat(found)
    return torch.empty_like(scores).index_copy(0, torch.cat(places), scores)


def score_losses(scores: Tensor, label: Tensor, classification: bool, targets: Tensor | None = None) -> Tensor:
    """Losses (segments,) from scores (segments, options): cross-entropy, or minus the correct option's score.

    With ``targets`` (segments, options) in place of labels: :func:`divergences` from them.
    """
    if targets is not None:
        return divergences(scores, targets)
    if classification:
        return F.cross_entropy(scores, label, reduction="none")
    return -scores.gather(1, label[:, None])[:, 0]


def divergences(scores: Tensor, targets: Tensor) -> Tensor:
    """Kullback-Leibler divergences (segments,) of the options' probabilities from ``targets`` (segments, options)."""
    logs = scores.log_softmax(dim=1).masked_fill(~scores.isfinite(), 0)
    return (torch.xlogy(targets, targets) - targets * logs).sum(1)


def classification_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy of the correct option among all options, by their mean token log-probabilities (MeZO, B.2)."""
    return score_losses(option_scores(model, batch), batch.label, classification=True)


def language_model_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean negative log-probability of the correct option's tokens (and the prompt's where the examples say so)."""
    return score_losses(option_scores(model, batch, normalised=True), batch.label, classification=False)
