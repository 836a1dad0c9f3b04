"""What a recipe is: a way to fit the pair in training to some examples."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xgblora.data.batch import Example
from xgblora.learn.cost import Cost


@dataclass(frozen=True)
class Fit:
    """What became of one booster."""

    loss: float
    """Mean loss of the fitted examples before it."""
    before: float
    """Mean loss of the examples that the fit did not see."""
    after: float
    """The same with the booster."""
    step_length: float
    """0 where no step lowered it."""
    cost: Cost


Worth = Callable[[Example], Sequence[float]]
"""What each of an example's options is worth."""


Written = Callable[[Sequence[Example]], Sequence[tuple[Sequence[Sequence[int]], Sequence[float]]]]
"""Some answers that the model as it is writes to each example's prompt, and what each of them is worth."""


def no_note(state: str) -> None:
    """Nobody is told."""


class Recipe(ABC):
    """Fits one booster after the other."""

    note: Callable[[str], None] = staticmethod(no_note)
    """Told what a long fit is doing."""

    @abstractmethod
    def split(self, rows: Sequence[Example]) -> Sequence[Example]:
        """Set rows aside that no booster is fitted on; returns the others."""

    @abstractmethod
    def keep(self, texts: Sequence[Example]) -> None:
        """Change as little of these texts as can be, which have all their tokens predicted."""

    @abstractmethod
    def fit(self, examples: Sequence[Example], start: float) -> Fit:
        """Fit the pair in training to the examples, in place; ``start`` is the step length that is tried first."""
