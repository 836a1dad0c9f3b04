"""The methods by which a pair learns: a gradient is estimated, or a pair is fitted."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from xgblora.adapters.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example
from xgblora.errors import DivergedError, XgbloraError
from xgblora.learn.drawn import DrawnMethod
from xgblora.learn.estimators import Estimator, Key, estimator
from xgblora.learn.fitted import RECIPES, Recipe
from xgblora.learn.losses import AnswerLoss, Loss, OptionLoss, TextLoss
from xgblora.learn.method import Method, Step
from xgblora.learn.rewards import Reward

logger = logging.getLogger(__name__)


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
        return Step(estimate.loss, estimate.cost, finite, estimate.projected, estimate.losses)

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
