"""A method makes one training step: it estimates a gradient of the pair in training, or fits the pair."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example
from xgblora.errors import DivergedError, XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.estimators import Estimator, Key, estimator
from xgblora.learn.fitted import RECIPES, Recipe
from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.losses import AnswerLoss, Loss, OptionLoss, TextLoss
from xgblora.learn.rewards import Reward

logger = logging.getLogger(__name__)


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
    """A step leaves a finished pair behind, which no optimizer moves further."""
    prefix: Prefix | None = None
    """Keeps what lies below the lowest layer that trains."""
    step_length: float = 1.0
    """Where the search for the next step's length begins, in a method that makes one. A checkpoint holds it."""

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

    def without_gradients(self) -> AbstractContextManager[None]:
        return self.adapters.base.without_gradients()


def method(adapters: Adapters, loss: Loss, config: RunConfig) -> Method:
    """The method that a configuration asks for, for these adapters and this loss.

    Raises:
        XgbloraError: Nothing is trained, or the adapters or the loss are not what the method needs.
    """
    if config.trainer == "none":
        raise XgbloraError("--trainer none does not train: evaluate instead")
    kind = FittedMethod if config.recipe in RECIPES else GradientMethod
    return kind(adapters, loss, config)
