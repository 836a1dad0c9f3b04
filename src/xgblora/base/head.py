"""The output head: logits and log-probabilities of final hidden states, in parts that memory bears."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xgblora.base.architecture import finish_logits

HEAD_BYTES = 2**22
"""Bytes of the output head in float32 that are multiplied at once on a CPU: they and their logits stay in its cache."""

GPU_HEAD_BYTES = 2**27
"""The same on a GPU, where every product is a call more. A whole head may take gigabytes."""

READS_AT_ONCE = 1024
"""Predicting positions whose logits are held at once."""


def logits(model: PreTrainedModel, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
    """Logits (reads, rows) float32 of hidden states (reads, hidden), from float32 products; without ``rows`` of all."""
    if rows is not None:
        return _logits(model, hidden, rows)
    words = model.get_output_embeddings().weight.shape[0]
    result = hidden.new_empty(len(hidden), words, dtype=torch.float32)
    for part in _vocabulary(model):  # into one tensor: small ones between parts of the head leave holes in memory
        result[:, part] = _logits(model, hidden, part)
    return result


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


def log_sum_of_others(model: PreTrainedModel, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of e^logit over all words of the vocabulary but some, and its slope.

    The head is multiplied twice, a part at a time: for the logits, and for what their slopes pull at.

    Args:
        model: Whose head it is.
        hidden: Final hidden states (reads, hidden).
        words: What is left out.

    Returns:
        (reads,) and (reads, hidden), float32.
    """
    total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    slope = torch.zeros_like(hidden, dtype=torch.float32)
    for part in _vocabulary(model):
        inside = words[(words >= part.start) & (words < part.stop)] - part.start
        if len(inside) == part.stop - part.start:
            continue
        weight, products = _product(model, hidden, part)
        products.requires_grad_()
        with torch.enable_grad():
            logits = finish_logits(model.config, products).index_fill(1, inside, -torch.inf)
            of_part = logits.logsumexp(1)
        (pull,) = torch.autograd.grad(of_part, products, torch.ones_like(of_part))
        of_part = of_part.detach()
        before, total = total, torch.logaddexp(total, of_part)
        slope *= (before - total).exp()[:, None]
        slope.addmm_(pull.mul_((of_part - total).exp()[:, None]), weight)
    return total, slope


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
    """The vocabulary in chunks of at most HEAD_BYTES of the head, or GPU_HEAD_BYTES."""
    weight = model.get_output_embeddings().weight
    words, width = weight.shape
    size = max(1, (HEAD_BYTES if weight.device.type == "cpu" else GPU_HEAD_BYTES) // (4 * width))
    return [slice(start, min(start + size, words)) for start in range(0, words, size)]


def _logits(model: PreTrainedModel, hidden: Tensor, rows: Tensor | slice) -> Tensor:
    return finish_logits(model.config, _product(model, hidden, rows)[1])


def _product(model: PreTrainedModel, hidden: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
    """What some rows of the head hold, and the products (reads, rows) of hidden states with them, float32."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    weight = head.weight[rows].float()
    return weight, F.linear(hidden.float(), weight, None if bias is None else bias[rows].float())
