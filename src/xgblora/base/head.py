"""The output head: logits and log-probabilities of final hidden states, in parts that memory bears."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xgblora.base.architecture import finish_logits
from xgblora.base.packed import PackedWeight

HEAD_BYTES = 2**27
"""Bytes of the output head in float32 that are multiplied at once. A whole head may take gigabytes."""

READS_AT_ONCE = 1024
"""Predicting positions whose logits are held at once."""


def logits(model: PreTrainedModel, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
    """Logits (reads, rows) float32 of hidden states (reads, hidden), from float32 products; without ``rows`` of all."""
    if rows is not None:
        return _logits(model, hidden, rows)
    return torch.cat([_logits(model, hidden, words) for words in _vocabulary(model)], dim=1)


def log_probabilities(model: PreTrainedModel, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
    """Log-probability (targets,) float32 of each ``word`` (targets,) at hidden state ``read`` (targets,) of ``hidden``.

    The head is multiplied in chunks of the vocabulary, and recomputed chunk by chunk for a gradient: neither it nor its
    logits are ever held whole.
    """
    logs, places = [], []
    for start in range(0, len(hidden), READS_AT_ONCE):
        block = hidden[start : start + READS_AT_ONCE]
        place = ((read >= start) & (read < start + len(block))).nonzero()[:, 0]
        logs.append(_log_probabilities(model, block, read[place] - start, word[place]))
        places.append(place)
    together = torch.cat(logs)
    return torch.empty_like(together).index_copy(0, torch.cat(places), together)


def likeliest(model: PreTrainedModel, hidden: Tensor, count: int) -> Tensor:
    """The ``count`` likeliest words (reads, count) of each of some hidden states (reads, hidden)."""
    best = hidden.new_empty(len(hidden), 0, dtype=torch.float32)
    word = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
    for words in _vocabulary(model):
        more, place = _logits(model, hidden, words).topk(min(count, words.stop - words.start), dim=1)
        best, chosen = torch.cat([best, more], dim=1).topk(min(count, best.shape[1] + more.shape[1]), dim=1)
        word = torch.cat([word, place + words.start], dim=1).gather(1, chosen)
    return word


def log_sum_of_others(model: PreTrainedModel, hidden: Tensor, words: Tensor) -> Tensor:
    """Log of the sum of e^logit, (reads,) float32, over all words of the vocabulary but some."""

    def chunk(hidden: Tensor, part: slice) -> Tensor:
        inside = words[(words >= part.start) & (words < part.stop)] - part.start
        return _logits(model, hidden, part).index_fill(1, inside, -torch.inf).logsumexp(1)

    parts = [
        checkpoint(chunk, hidden, part, use_reentrant=False, preserve_rng_state=False) for part in _vocabulary(model)
    ]
    return torch.stack(parts).logsumexp(0)


def _log_probabilities(model: PreTrainedModel, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
    def chunk(hidden: Tensor, words: slice) -> tuple[Tensor, Tensor]:
        of_words = _logits(model, hidden, words)
        inside = (word >= words.start) & (word < words.stop)
        chosen = of_words[read, (word - words.start).clamp(0, of_words.shape[1] - 1)]
        return torch.where(inside, chosen, 0), torch.logsumexp(of_words, dim=1)

    first, *others = _vocabulary(model)
    if not others:
        chosen, total = chunk(hidden, first)
        return chosen - total[read]
    again = partial(checkpoint, chunk, hidden, use_reentrant=False, preserve_rng_state=False)
    chosen, total = again(first)
    for words in others:
        more, part = again(words)
        chosen, total = chosen + more, torch.logaddexp(total, part)
    return chosen - total[read]


def _vocabulary(model: PreTrainedModel) -> list[slice]:
    """The vocabulary in chunks of at most HEAD_BYTES of the head."""
    words, width = model.get_output_embeddings().weight.shape
    size = max(1, HEAD_BYTES // (4 * width))
    return [slice(start, min(start + size, words)) for start in range(0, words, size)]


def _logits(model: PreTrainedModel, hidden: Tensor, rows: Tensor | slice) -> Tensor:
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    weight = head.weight
    parts = weight.parts(rows) if isinstance(weight, PackedWeight) and isinstance(rows, slice) else [rows]
    of_parts = [
        F.linear(hidden.float(), weight[part].float(), None if bias is None else bias[part].float()) for part in parts
    ]
    return finish_logits(model.config, of_parts[0] if len(parts) == 1 else torch.cat(of_parts, dim=1))
