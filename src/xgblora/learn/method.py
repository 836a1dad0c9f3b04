"""What a trainer asks of a method, and what a step of it comes to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.data.batch import Batch, Example
from xgblora.errors import XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.estimators import Key
from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.losses import Loss


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
    losses: Tensor | None = None
    """What forwards said, where the step follows from it and from the seed (:class:`Estimate`)."""


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
