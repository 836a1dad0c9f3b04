"""Other text, of which a booster is to change as little as it can."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xgblora.data.batch import Example
from xgblora.learn.fitted.activations import Beside, Forwards, Observed, within
from xgblora.learn.fitted.newton import Change
from xgblora.learn.fitted.tail_loss import Bend, TailLoss
from xgblora.learn.losses import TextLoss
from xgblora.randomness import Stream, generator

MOST_POSITIONS = 4096
"""Predicted words of other text that a booster looks at, at most."""


@dataclass(frozen=True)
class Kept:
    """Other text that a fit looks at.

    A change of it costs the mean divergence of a text's words from what the model says now, to second order.
    """

    seen: Beside
    loss: TailLoss
    weight: float
    """How often a text counts."""

    def cost(self, outputs: Tensor, unit: Tensor, draw: torch.Generator) -> tuple[Change, Bend]:
        """f there along ``outputs`` (directions, hidden), as :class:`Penalised` takes it, and what it costs."""
        self.loss.expand(self.seen.hidden)
        bend = self.loss.bend(self.seen.hidden, outputs, draw)
        self.loss.expand(None)
        change = Change(self.seen.coordinates, self.seen.opinion(outputs), unit)
        return change, replace(bend, factors=bend.factors * self.weight**0.5)


def look_beside(forwards: Forwards, texts: Sequence[Example], seen: Observed) -> Kept:
    """One forward over some of ``texts``, others for each booster, beside what a booster is fitted to.

    At a weight of 1, the text to keep counts as much as the text to learn, however many there are of each.
    """
    order = torch.randperm(len(texts), generator=generator(0, Stream.KEPT, forwards.adapters.boosters)).tolist()
    shown = forwards.beside(within([texts[place] for place in order], MOST_POSITIONS), seen.kernel)
    weight = forwards.keep_weight * len(seen.examples) / len(shown.examples)
    return Kept(shown, TailLoss(forwards, shown, loss=TextLoss()), weight)
