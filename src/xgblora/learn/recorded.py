"""Losses that are known already: a step is taken again without a forward."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from xgblora.base import Base
from xgblora.base.layer_major import Turn, no_turn
from xgblora.data.batch import Batch
from xgblora.errors import XgbloraError
from xgblora.learn.losses import Loss


class RecordedLoss(Loss):
    """What forwards of a zeroth-order run said, in the order in which it asked them (MeZO, arXiv 2305.17333, 2.1).

    With the seed, directions and so the whole run follow from that. Batches need only have as many examples.

    Args:
        lines: Tokens that were forwarded, and losses (places,), of each micro-batch.

    Examples:
        >>> from xgblora.base.load import tiny_model
        >>> from xgblora.data.batch import Example
        >>> base = Base(tiny_model())
        >>> batch = base.batch([Example([1], [[1]], 0)]).repeat(2)
        >>> [losses.tolist() for losses in RecordedLoss([(7, [0.5, 0.25])]).all_losses(base, [batch])]
        [[0.5, 0.25]]
    """

    writes = True
    """Tokens are those that were counted, not those of the batches."""

    def __init__(self, lines: Iterable[tuple[int, Sequence[float]]]) -> None:
        self._lines = iter(lines)
        self._coming: list[float] = []

    def all_losses(self, base: Base, batches: Sequence[Batch], turn: Turn = no_turn) -> Iterator[Tensor]:
        wanted = sum(batch.segments for batch in batches)
        if not self._coming:
            tokens, losses = next(self._lines, (0, ()))
            self.tokens += tokens
            self._coming = list(losses)
        if not self._coming or len(self._coming) % wanted:
            raise XgbloraError(f"a step of {wanted} losses was recorded with {len(self._coming)}: the log is damaged")
        losses, self._coming = self._coming[:wanted], self._coming[wanted:]
        both = torch.tensor(losses, device=base.device).view(2, -1)
        start = 0
        for batch in batches:
            end = start + batch.segments // 2
            yield both[:, start:end].flatten()
            start = end

    def losses(self, base: Base, batch: Batch) -> Tensor:
        """Nothing is known of other forwards: a step that was not finite is diagnosed by such."""
        return torch.full((batch.segments,), torch.nan)
