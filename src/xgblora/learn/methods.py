"""A method makes one training step: it estimates a gradient of the pair in training, or fits the pair."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example
from xgblora.errors import DivergedError, XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.estimators import Estimator, Key, estimator, losses_along
from xgblora.learn.fitted import RECIPES, Recipe
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import MOST_DIRECTIONS, give_rank, option_directions, put, step_by
from xgblora.learn.fitted.fit import Learner, fit
from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.fitted.step_length import NewtonLength
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.fitted.writers import require_writers
from xgblora.learn.losses import AnswerLoss, Loss, OptionLoss, TextLoss
from xgblora.learn.rewards import Reward
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


@dataclass(frozen=True)
class Step:
    """What became of one batch."""

    loss: float
    """Mean over the examples, before the step (for a probe, over both signs)."""
    cost: Cost
    finite: bool = True
    """Whether all numbers are; if not, nothing was changed."""
    projected: Tensor | None = None
    """Every projected gradient, of a zeroth-order step."""


class Method(ABC):
    """What a trainer asks for a step."""

    examples_flag: str
    """The flag that says how many examples a step has."""
    fits: bool = False
    """A step leaves a finished pair behind."""
    moves: bool = False
    """A step moves the pair itself; no optimizer does."""
    prefix: Prefix | None = None
    """Keeps what lies below the lowest layer that trains."""

    def __init__(self, adapters: Adapters, loss: Loss) -> None:
        self.adapters = adapters
        self.loss = loss
        self.note: Callable[[str], None] = no_note
        """Told what a long step is doing."""

    def split(self, rows: Sequence[Example]) -> Sequence[Example]:
        """Set aside what the method keeps for itself; returns the rows to make batches of."""
        return rows

    def keep(self, texts: Sequence[Example]) -> None:
        """Change as little of these texts as can be, which have all their tokens predicted (``score_prompt``).

        Raises:
            XgbloraError: The method cannot.
        """
        raise XgbloraError("only --recipe boost can keep off other text")

    @abstractmethod
    def step(self, batch: Batch, key: Key, share: float = 1.0) -> Step:
        """Learn from one batch, whose examples are the ``share`` of its step."""

    def without_gradients(self) -> AbstractContextManager[None]:
        """The context in which steps are taken."""
        return nullcontext()

    def after_merge(self) -> None:
        """The pair became a booster. The new one may train above it: then what was kept of lower layers is wrong."""
        if self.prefix is not None and not self.adapters.same_layers_next:
            self.prefix.clear()

    def state(self) -> dict[str, float]:
        """What a resumed run needs to know beside the pair. A checkpoint holds it."""
        return {}

    def restore(self, state: dict[str, float]) -> None:  # noqa: B027 (most methods need nothing)
        """Go on where :meth:`state` was taken."""

    def after_checkpoint(self) -> None:  # noqa: B027 (most methods keep nothing that a resumed run lacks)
        """A run that is resumed here must go on in the same state."""


class GradientMethod(Method):
    """A step writes the estimated gradient into ``.grad`` of the pair; a torch optimizer moves it."""

    examples_flag = "--per_device_train_batch_size"

    def __init__(self, adapters: Adapters, loss: Loss, config: RunConfig) -> None:
        super().__init__(adapters, loss)
        self.config = config
        if not loss.writes:
            self.prefix = Prefix(adapters.model, int(config.activation_cache_gb * 1e9))
        self.estimator: Estimator = estimator(config, self.prefix)

    def step(self, batch: Batch, key: Key, share: float = 1.0) -> Step:
        estimate = self.estimator(self.adapters, self.loss, batch.to(self.adapters.device), key, share)
        finite = math.isfinite(estimate.loss) and bool(torch.isfinite(estimate.gradient).all())
        if finite:
            self.adapters.accumulate_gradient(estimate.gradient)
        return Step(estimate.loss, estimate.cost, finite, estimate.projected)

    def without_gradients(self) -> AbstractContextManager[None]:
        if self.config.trainer != "zo":
            return nullcontext()
        return self.adapters.base.without_gradients(self.config.torch_compile)

    def after_checkpoint(self) -> None:
        if self.prefix is not None:
            self.prefix.clear()  # other sums round otherwise


class FittedMethod(Method):
    """A step fits the pair in training to the batch: it becomes a booster as it is."""

    examples_flag = "--boost_examples"
    fits = True
    moves = True

    def __init__(self, adapters: Adapters, loss: Loss, config: RunConfig) -> None:
        super().__init__(adapters, loss)
        worth, written = None, None
        if isinstance(loss, Reward) and loss.writes:
            written, loss = partial(loss.of_written, adapters.base), TextLoss()
        elif isinstance(loss, Reward):
            worth, loss = loss.of_options, OptionLoss()
        if not isinstance(loss, AnswerLoss):
            raise XgbloraError(
                f"--recipe {config.recipe} fits the options' or the language model's loss, or a reward: it takes no "
                "other objective"
            )
        self.prefix = Prefix(adapters.model, int(config.activation_cache_gb * 1e9))
        self.recipe: Recipe = RECIPES[config.recipe](adapters, loss, config, self.prefix, worth, written)
        self.step_length = 1.0
        """Where the search for the next booster's step length begins."""

    def split(self, rows: Sequence[Example]) -> Sequence[Example]:
        return self.recipe.split(rows)

    def keep(self, texts: Sequence[Example]) -> None:
        self.recipe.keep(texts)

    def step(self, batch: Batch, key: Key, share: float = 1.0) -> Step:
        self.recipe.note = self.note
        fit = self.recipe.fit(batch.examples, self.step_length)
        if not math.isfinite(fit.loss):
            raise DivergedError(
                f"the loss is {fit.loss} at booster {key.step + 1}, which was not kept: load the base in float32 or "
                "bfloat16; the last checkpoint is kept"
            )
        if fit.step_length:
            self.step_length = fit.step_length
        else:
            logger.info("Booster %d adds nothing: no step along it lowers the loss", self.adapters.boosters + 1)
        return Step(fit.loss, fit.cost)

    def state(self) -> dict[str, float]:
        return {"step_length": self.step_length}

    def restore(self, state: dict[str, float]) -> None:
        self.step_length = state["step_length"]

    def without_gradients(self) -> AbstractContextManager[None]:
        return self.adapters.base.without_gradients()


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
        self.forwards = Forwards(adapters, loss, self.prefix)
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
        losses = losses_along(self.adapters, self.loss, batch, self.prefix, PLACES)
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


def method(adapters: Adapters, loss: Loss, config: RunConfig) -> Method:
    """The method that a configuration asks for, for these adapters and this loss.

    Raises:
        XgbloraError: Nothing is trained, or the adapters or the loss are not what the method needs.
    """
    if config.trainer == "none":
        raise XgbloraError("--trainer none does not train: evaluate instead")
    if config.recipe in RECIPES:
        return FittedMethod(adapters, loss, config)
    kind = DrawnMethod if config.draws_pairs else GradientMethod
    return kind(adapters, loss, config)
