"""How long a booster's step is: the search for it, whatever a step costs."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor


def line_search(loss_at: Callable[[float], float], start: float, most: int = 8) -> float:
    """Search for the step with the lowest loss: from ``start`` by doubling or halving, then by a parabola.

    Args:
        loss_at: Called for 0 and at most ``most`` other steps.
        start: Tried first.
        most: Steps that are tried.

    Returns:
        The best of the steps tried; 0 where none is better than no step.

    Examples:
        >>> line_search(lambda step: (step - 4) ** 2, start=1.0)
        4.0
    """
    tried = {0.0: loss_at(0.0), start: loss_at(start)}
    best = start
    if tried[start] < tried[0.0]:
        while len(tried) < most and best == max(tried):
            tried[2 * best] = loss_at(2 * best)
            best = min(tried, key=tried.__getitem__)
    while len(tried) < most and (best == 0.0 or best == sorted(tried)[1]):
        smaller = sorted(tried)[1] / 2
        tried[smaller] = loss_at(smaller)
        best = min(tried, key=tried.__getitem__)
    if best > 0 and 2 * best in tried and best / 2 in tried:
        left, middle, right = (tried[step] for step in (best / 2, best, 2 * best))
        bend = left - 2 * middle + right
        if bend > 0:
            vertex = best * 2 ** ((left - right) / (2 * bend))
            tried[vertex] = loss_at(vertex)
    return min(tried, key=tried.__getitem__)


def likely_next(step: float, start: float, tried: Collection[float]) -> list[float]:
    """Steps that :func:`line_search` will most likely ask for after ``step``.

    Where every forward reads the model again, they are measured in the same one.

    Examples:
        >>> likely_next(0.0, 1.0, []), likely_next(4.0, 1.0, [0.0, 1.0, 2.0])
        ([1.0, 2.0, 0.5], [8.0])
    """
    if step == 0:
        return [start, 2 * start, start / 2]
    lengths = [length for length in tried if length]
    if step == 2 * max(lengths, default=0):
        return [2 * step]
    return [step / 2] if 2 * step == min(lengths, default=0) else []


def shortest_as_good(losses: dict[float, Tensor], best: float) -> float:
    """The shortest step above 0 whose loss is within a standard error of the best step's, paired by example.

    The one-standard-error rule (Breiman et al. 1984, "Classification and regression trees"): with few examples the
    lowest mean is mostly a lucky one, and what a step leaves undone is the next booster's. 0 stays 0.

    Args:
        losses: (examples,) for each step tried.
        best: The step with the lowest mean.
    """
    for step in sorted(losses):
        more = losses[step] - losses[best]
        if 0 < step <= best and more.mean() <= more.std(correction=0) / len(more) ** 0.5:
            return step
    return best


@dataclass
class NewtonLength:
    """A step length found a few examples at a time, by Newton steps that need no rate.

    Each batch says, by the slope there and by the mean curvature so far, where the loss is lowest; the length is the
    mean of what all batches say (averaging, as in Polyak and Juditsky 1992). So that chance makes no step, the length
    that is taken is shorter by its standard error, as in :func:`shortest_as_good`.

    Examples:
        >>> import torch
        >>> found = NewtonLength()
        >>> for _ in range(2):
        ...     found.observe(torch.tensor([2.0, 2.0]) * (found.taken - 0.5), bend=2.0)
        >>> found.taken
        0.5
    """

    length: float = 0.0
    """In lengths of what was fitted."""
    steps: int = 0
    bends: float = 0.0
    """Sum of the curvatures so far."""
    examples: int = 0
    spread: float = 0.0
    """Sum of the squared differences of slopes from their batch's mean."""

    def observe(self, slopes: Tensor, bend: float) -> None:
        """Learn from the loss's derivatives along the length where it is taken.

        Args:
            slopes: First derivatives (examples,).
            bend: Mean second derivative.
        """
        there, slope = self.taken, slopes.double().mean().item()
        self.steps += 1
        self.bends += bend
        self.examples += len(slopes)
        self.spread += (slopes.double() - slope).square().sum().item()
        curvature = self.bends / self.steps
        most = self.steps**0.5  # a batch alone says little
        ahead = -slope / curvature if curvature > 0 else -math.copysign(most, slope)
        self.length += max(-most, min(most, there + ahead - self.length)) / self.steps

    @property
    def taken(self) -> float:
        """The length to take."""
        if self.bends <= 0 or not self.steps:
            return self.length
        error = self.spread**0.5 / self.examples * self.steps / self.bends
        return math.copysign(max(abs(self.length) - error, 0.0), self.length)
