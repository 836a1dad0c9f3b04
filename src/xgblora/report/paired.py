"""How much better one method is than another, over the same rows and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xgblora.report.intervals import LEVEL

DRAWS = 5000


@dataclass(frozen=True)
class Difference:
    """Of two methods' accuracies, paired by seed and row. Shares, so in [-1, 1]."""

    mean: float
    """Over the seeds."""
    low: float
    high: float
    """Ends of the interval, 95 %."""
    of_seeds: dict[int, float]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Mapping[int, Sequence[bool]], second: Mapping[int, Sequence[bool]], draws: int = DRAWS
) -> Difference | None:
    """Accuracy of the second method less that of the first, with its bootstrap interval (Efron 1979).

    Rows are drawn anew, and so are seeds where there are several: the interval says what other rows of the kind, and
    other seeds, may show. With one seed it says nothing of other seeds.

    Args:
        first: For each seed, whether each row was answered right.
        second: The same rows, by the other method.
        draws: How many samples.

    Returns:
        The difference; None where the methods have no seed with the same number of rows in common.

    Examples:
        >>> answers = {0: [True, False, True, True]}
        >>> difference = paired_difference({0: [False] * 4}, answers)
        >>> difference.mean, difference.of_seeds
        (0.75, {0: 0.75})
    """
    seeds = [seed for seed in first if seed in second and len(first[seed]) == len(second[seed]) > 0]
    if not seeds:
        return None
    draw = np.random.default_rng(0)
    gains = [np.array(second[seed], dtype=float) - np.array(first[seed], dtype=float) for seed in seeds]
    alike = len({len(gain) for gain in gains}) == 1  # then the rows are the same ones for all seeds
    weights = _weights(draw, draws, len(gains[0])) if alike else None
    of_seeds = np.stack([gain @ (_weights(draw, draws, len(gain)) if weights is None else weights) for gain in gains])
    chosen = draw.integers(0, len(seeds), (len(seeds), draws))
    means = np.take_along_axis(of_seeds, chosen, axis=0).mean(0)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    differences = {seed: float(gain.mean()) for seed, gain in zip(seeds, gains, strict=True)}
    return Difference(sum(differences.values()) / len(seeds), float(low), float(high), differences)


def _weights(draw: np.random.Generator, draws: int, rows: int) -> np.ndarray:
    """How often each row is in each sample, as a share (rows, draws)."""
    return draw.multinomial(rows, np.full(rows, 1 / rows), size=draws).T / rows
