"""Pairs drawn from activations, whose steps measure one number."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict

import torch
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example
from xgblora.errors import XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.estimators import Key, losses_along
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import MOST_DIRECTIONS, give_rank, option_directions, put, step_by
from xgblora.learn.fitted.fit import Learner, fit
from xgblora.learn.fitted.step_length import NewtonLength
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.fitted.writers import require_writers
from xgblora.learn.losses import AnswerLoss, Loss, OptionLoss
from xgblora.learn.method import Method, Step
from xgblora.randomness import Stream, generator

logger = logging.getLogger(__name__)

HALF_LENGTH = 0.5
"""How far from a pair's length losses are taken, in lengths of what was fitted. They differ by more than rounding."""

DRAWN_RIDGE = 1.0
"""Ridge penalty of pairs drawn from activations, as in :func:`fit`."""

PLACES = 3
"""Losses of an example in a step: here, and that far either way."""

STEP_SHARE = 0.25
"""Of the rows, what steps see. They look for one number a pair, so that most rows are for pairs."""

LEAST_ROWS = 3
"""Two that a pair is fitted to, and one for steps."""


def rows_for_steps(rows: int) -> int:
    """How many of the training rows steps see, where pairs are drawn from the others."""
    return max(1, round(STEP_SHARE * rows))


class DrawnMethod(Method):
    """Pairs drawn from activations; a step measures how far the one in training should go.

    A new pair is fitted to what the model gets wrong in a few examples, as recipe boost fits a booster, and begins at
    length 0. Then one number is unknown in place of tens of thousands, and three losses of a batch say much about it:
    of the model as it is, and at half a length more and less (SPSA in one dimension, whose curvature is known as well).
    """

    examples_flag = "--per_device_train_batch_size"
    moves = True

    def __init__(self, adapters: Adapters, loss: Loss, config: RunConfig) -> None:
        super().__init__(adapters, loss)
        if not isinstance(loss, AnswerLoss):
            raise XgbloraError(
                "--xgblora_init activations fits pairs to the options' or the language model's loss: it takes no "
                "reward and no other objective"
            )
        require_writers(adapters)
        self.config = config
        self.prefix: Prefix = Prefix(adapters.model, int(config.activation_cache_gb * 1e9))
        self.forwards = Forwards(adapters, loss, self.prefix, config.forward_tokens)
        self.fitted: list[Example] = []
        """Rows that pairs are drawn from. No step sees them, so that what a pair has by heart makes it no longer."""
        self.found = NewtonLength()
        """The length of the pair in training."""
        self.drawn: tuple[int, Learner, Tensor] | None = None
        """Number of the pair in training, what it was fitted to be, and what one length more adds to it."""

    def split(self, rows: Sequence[Example]) -> list[Example]:
        """Set aside most of the rows for pairs to be drawn from; returns the others, for steps."""
        if len(rows) < LEAST_ROWS:
            raise XgbloraError(
                f"--xgblora_init activations fits pairs to rows that no step sees, so it needs {LEAST_ROWS} at least, "
                f"got {len(rows)}: raise --num_train"
            )
        if self.config.xgblora:
            give_rank(self.adapters, self._directions(rows, self.config.xgblora_init_directions))
            if (needed := self._directions(rows, MOST_DIRECTIONS)) > self.adapters.rank and self._chooses:
                logger.info(
                    "Options differ along %d directions, pairs move along %d: --xgblora_init_directions %d came "
                    "further in fewer steps (docs/experiments.md, section 25)",
                    *(needed, self.adapters.rank, needed),
                )
        order = torch.randperm(len(rows), generator=generator(self.config.seed, Stream.ACTIVATIONS)).tolist()
        count = rows_for_steps(len(rows))
        self.fitted = [rows[place] for place in sorted(order[count:])]
        return [rows[place] for place in sorted(order[:count])]

    @torch.no_grad()
    def step(self, batch: Batch, key: Key, share: float = 1.0) -> Step:
        cost, number = Cost(), self.adapters.boosters
        if self.drawn is None or self.drawn[0] != number:
            learner, along, cost = self._draw(number)
            self.drawn = number, learner, along
        _, learner, along = self.drawn
        batch = batch.to(self.adapters.device)
        tokens = self.loss.tokens
        losses = losses_along(self.adapters, self.loss, batch, self.prefix, PLACES, self.config.forward_tokens)
        places = torch.tensor([HALF_LENGTH, -HALF_LENGTH, 0.0], device=self.adapters.device)
        more, less, here = losses(along, places.repeat_interleave(batch.segments)[:, None]).view(PLACES, -1)
        slopes = (more - less) / (2 * HALF_LENGTH)
        bend = ((more + less - 2 * here) / HALF_LENGTH**2).double().mean().item()
        forwarded = self.loss.tokens - tokens if self.loss.writes else PLACES * batch.tokens
        cost += Cost(PLACES, PLACES * batch.segments, forwarded)
        loss = here.mean().item()
        finite = math.isfinite(loss) and math.isfinite(bend) and bool(slopes.isfinite().all())
        if finite:
            self.found.observe(slopes, bend)
            step_by(self.adapters, learner, self.found.taken)
        return Step(loss, cost, finite, slopes)

    def _draw(self, number: int) -> tuple[Learner, Tensor, Cost]:
        """Fit pair ``number`` to the model with the boosters before it, and put it there at its length.

        Returns the fit, what one length adds to the pair (1, parameters), laid out like a direction, and the cost.

        It is a function of (seed, number) and of these boosters: a resumed run draws it again, and counts it once.
        """
        forwards, before = self.forwards, self.forwards.tokens
        forwards.note, forwards.work = self.note, f"pair {number + 1}"
        rows = self.rows_of(number)
        with self.adapters.first(number):
            (seen,) = forwards.observe(rows)
            loss = TailLoss(forwards, seen)
            with forwards.base.held():
                learner = fit(seen, loss, DRAWN_RIDGE, self._directions(rows, self.adapters.rank), note=forwards.tell)
        put(self.adapters, learner, 1.0)
        layers = [layer for layer, _, _ in self.adapters.slices]
        parts = [part for layer in layers for part in (torch.zeros_like(layer.lora_A), layer.lora_B)]
        along = self.adapters.flatten(parts)[None]
        step_by(self.adapters, learner, self.found.taken)
        cost = Cost(1, len(rows), forwards.tokens - before)
        return learner, along, Cost() if self.found.steps else cost

    def rows_of(self, number: int) -> list[Example]:
        """The rows of pair ``number``: the next ones of an order that begins anew when all were taken."""
        count = min(self.config.xgblora_init_examples, len(self.fitted))
        turn, start = divmod(number * count, len(self.fitted))
        order = self._order(turn) + self._order(turn + 1)
        return [self.fitted[place] for place in order[start : start + count]]

    def _order(self, turn: int) -> list[int]:
        """Places of the rows in the order in which they are taken for the ``turn``-th time."""
        draw = generator(self.config.seed, Stream.ACTIVATIONS, turn + 1)
        return list(torch.randperm(len(self.fitted), generator=draw).tolist())

    def _directions(self, rows: Sequence[Example], most: int) -> int:
        """Along how many directions, ``most`` of them, a pair is fitted to these rows."""
        return min(most, option_directions(rows)) if self._chooses else most

    @property
    def _chooses(self) -> bool:
        """Whether answers are chosen, not written."""
        return isinstance(self.loss, OptionLoss)

    def without_gradients(self) -> AbstractContextManager[None]:
        return self.adapters.base.without_gradients()

    def state(self) -> dict[str, float]:
        return asdict(self.found)

    def restore(self, state: dict[str, float]) -> None:
        self.found, self.drawn = NewtonLength(**state), None  # type: ignore[arg-type]

    def after_merge(self) -> None:
        super().after_merge()
        self.found = NewtonLength()

    def after_checkpoint(self) -> None:
        self.prefix.clear()  # other sums round otherwise
