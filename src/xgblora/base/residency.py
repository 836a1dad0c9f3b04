"""Which weights may stay in memory, beside what a forward takes."""

import logging
from collections.abc import Callable

from xgblora.errors import MemoryBudgetError

logger = logging.getLogger(__name__)


class Residency:
    """Which weights stay in memory, and which comes after which.

    The first forward lets go of all and shows what it takes without them; from then on weights stay as they fit.

    Args:
        budget: Bytes that may be taken in all.
        taken: How many are at the moment.
    """

    def __init__(self, budget: int, taken: Callable[[], int]) -> None:
        self.budget, self.taken = budget, taken
        self.stay: dict[int, int] = {}
        """{first byte: bytes} of the weights that stay."""
        self._next: dict[int, tuple[int, int]] = {}
        self._last: int | None = None
        self._peak = 0
        self._exceeded = False

    def look(self) -> None:
        """See what is taken now."""
        self._peak = max(self._peak, self.taken() - sum(self.stay.values()))

    @property
    def left(self) -> int:
        """Bytes of the budget that nothing has now but the weights that stay, which would go."""
        return max(0, self.budget - self.taken() + sum(self.stay.values()))

    def used(self, start: int, size: int) -> tuple[bool, dict[int, int]]:
        """A weight was used: whether it stays, and which others no longer do. Raises as :meth:`PackedFile.used`."""
        self.look()
        again = start in self._next
        if self._peak > self.budget and not self._exceeded:
            needs = f"with no weight in memory, one forward takes {self._peak / 1e9:.2f} GB here"
            if not again:
                raise MemoryBudgetError(f"a memory budget of {self.budget / 1e9:.2f} GB is too small: {needs}")
            self._exceeded = True  # work was done: it is not thrown away
            logger.warning("The memory budget of %.2f GB is exceeded: %s", self.budget / 1e9, needs)
        dropped: dict[int, int] = {}
        if self._peak + sum(self.stay.values()) > self.budget:  # a longer batch came
            dropped, self.stay = self.stay, {}
        if self._last is not None:
            self._next[self._last] = start, size
        self._last = start
        if again and start not in self.stay and self._peak + sum(self.stay.values()) + size <= self.budget:
            self.stay[start] = size
        return start in self.stay, dropped

    def next(self, start: int) -> tuple[int, int] | None:
        """The weight (first byte, bytes) that was used after this one, where it is known and does not stay."""
        following = self._next.get(start)
        return None if following is None or following[0] in self.stay else following
