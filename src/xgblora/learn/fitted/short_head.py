"""The output head near some final hidden states, as far as a fit needs it: a few words, and all others as one lump."""

import torch
from torch import Tensor

from xgblora.base import Base

LIKELIEST = 16
"""Words that count one by one, of each position the likeliest; the others' sum is a straight line in its logarithm."""


def listed(base: Base, final: Tensor, words: Tensor) -> Tensor:
    """Words worth listing, in ascending order: ``words``, and the likeliest ones of each state (reads, hidden)."""
    return torch.unique(torch.cat([words, base.likeliest(final, LIKELIEST).flatten()]))


class ShortHead:
    """Log-probabilities of final hidden states close to some others, without most of the vocabulary.

    log Z(g) = log(sum over listed words of e^logit(g) + e^(r + s . (g - g0))): r is the log-sum of all other words at
    g0 and s its gradient there, so value and gradient are those of the whole head at g0.

    Args:
        base: Whose head it is.
        final: g0, (reads, hidden), as the head takes it.
        words: Which are listed, in ascending order; those among them that will be asked for.
    """

    def __init__(self, base: Base, final: Tensor, words: Tensor) -> None:
        self.base = base
        self.words = words
        self.at = final.detach()
        self.rest, self.slope = base.log_sum_of_others(self.at, self.words)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """As :meth:`Base.logits`."""
        return self.base.logits(hidden, rows)

    def log_probabilities(self, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
        """As :meth:`Base.log_probabilities`, of all reads that it was made for."""
        logits = self.base.logits(hidden, self.words)
        rest = self.rest + ((hidden - self.at) * self.slope).sum(1)
        total = torch.logaddexp(logits.logsumexp(1), rest)
        return logits[read, torch.searchsorted(self.words, word)] - total[read]
