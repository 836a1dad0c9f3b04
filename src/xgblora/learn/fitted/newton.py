"""The lowest point of a penalised loss, by damped Newton steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.fitted.tail_loss import Bend, TailLoss

MOST_STEPS = 40
"""Newton steps of a fit at most."""

ENOUGH = 1e-3
"""Share of the loss before the fit by which a Newton step must lower it, and a part of the vocabulary the whole's."""

SHORTEST = 1 / 64
"""Share of a Newton step below which none is tried."""

MOST_PRODUCTS = 100
"""Products with the second derivative, of one Newton step."""

LEFT = 0.03
"""Share of the slope that may be left where a Newton step ends."""


@dataclass(frozen=True)
class Change:
    """f at some positions, as a function of b, (m + 1, directions).

    f = coordinates . b, less a share of the opinion: b's last row, in units of its own.
    """

    coordinates: Tensor
    """(T, m)."""
    opinion: Tensor
    """What may be taken away, (T, directions)."""
    unit: Tensor
    """Of the last row."""

    def at(self, b: Tensor) -> Tensor:
        """f, (T, directions)."""
        return self.coordinates @ b[:-1] - self.unit * self.opinion * b[-1]

    def slope(self, along: Tensor) -> Tensor:
        """Of b, from slopes (T, directions) of f."""
        # Of a few columns this product is several times as fast as coordinates.T @ along.
        return torch.cat([(along.T @ self.coordinates).T, -self.unit * (self.opinion * along).sum(0, keepdim=True)])

    def steepness(self, factors: Tensor) -> Tensor:
        """About the diagonal (m + 1, directions) of b's second derivative, from :attr:`Bend.factors`."""
        rows = torch.linalg.vector_norm(self.coordinates, dim=0)
        lengths = torch.cat([rows, self.unit.view(1) * self.opinion.norm()])[:, None].square()
        return lengths * factors.square().sum(1).mean(0)


@dataclass(frozen=True)
class Penalised:
    """The loss of h + f u and its penalties, as a function of b, (m + 1, directions).

    The ridge penalty leaves b's last row free.
    """

    loss: TailLoss
    hidden: Tensor
    """h, (T, hidden)."""
    outputs: Tensor
    """u, (directions, hidden)."""
    change: Change
    """f, of these positions."""
    weight: Tensor
    """Of the ridge penalty along each direction, (directions,)."""
    kept: tuple[Change, Bend] | None = None
    """f where it is to be small, and what it costs there to second order."""

    def moved(self, b: Tensor) -> Tensor:
        """h + f u, (T, hidden)."""
        return self.hidden + self.change.at(b) @ self.outputs

    def penalised(self, b: Tensor) -> Tensor:
        """The penalties' slope, which is linear in b."""
        return self._shrinking(b) + self._moving(b)

    def _shrinking(self, b: Tensor) -> Tensor:
        """The ridge penalty's slope."""
        return torch.cat([self.weight * b[:-1], torch.zeros_like(b[-1:])])

    def _moving(self, b: Tensor) -> Tensor:
        """The slope of what it costs to change other text."""
        if self.kept is None:
            return torch.zeros_like(b)
        change, bend = self.kept
        return change.slope(bend.curved(change.at(b)))

    def keeping(self, b: Tensor) -> float:
        """What it costs to change other text."""
        return 0.5 * (b.double() * self._moving(b)).sum().item()

    def cost(self, b: Tensor, losses: Tensor) -> float:
        """What is to be low, where the examples have these losses."""
        return losses.double().sum().item() + 0.5 * (b.double() * self.penalised(b)).sum().item()

    def steepness(self, b: Tensor, bend: Bend) -> Tensor:
        """About the diagonal of its second derivative, in the shape of ``b``."""
        steepness = self.change.steepness(bend.factors) + self._shrinking(torch.ones_like(b))
        return steepness if self.kept is None else steepness + self.kept[0].steepness(self.kept[1].factors)


def lowest(cost: Penalised, before: float, draw: torch.Generator, note: Callable[[str], None] = no_note) -> Tensor:
    """Where it is lowest, from b = 0 on.

    Where the loss asks for words out of the whole vocabulary, steps go by a part of it, which is taken again where they
    have got to. The loss has been expanded at b = 0; in the end it takes all of the vocabulary again.

    Args:
        cost: What is to be low.
        before: Its value at b = 0.
        draw: As :meth:`TailLoss.bend` takes it.
        note: Told how far it has come.

    Returns:
        b there.
    """
    loss, coordinates = cost.loss, cost.change.coordinates
    b = coordinates.new_zeros(coordinates.shape[1] + 1, len(cost.outputs))
    here = before
    best = here, b  # by the whole vocabulary
    enough = ENOUGH * here
    for number in range(1, MOST_STEPS + 1):
        bend = loss.bend(cost.moved(b), cost.outputs, draw)
        note(f"fitting, Newton step {number}, loss {bend.losses.mean():.4f}")

        def curved(p: Tensor, bend: Bend = bend) -> Tensor:
            return cost.change.slope(bend.curved(cost.change.at(p))) + cost.penalised(p)

        step = conjugate_gradient(curved, -cost.change.slope(bend.slopes) - cost.penalised(b), cost.steepness(b, bend))
        length, start = 1.0, here
        while length >= SHORTEST:
            near = b + length * step
            if (there := cost.cost(near, loss(cost.moved(near)))) < here:
                b, here = near, there
                break
            length /= 2
        if start - here > enough:
            continue
        if not loss.whole:
            loss.expand(cost.moved(b))
            here = cost.cost(b, loss(cost.moved(b)))
        gained = best[0] - here
        if gained > 0:
            best = here, b
        if loss.whole or gained <= enough:
            break
    else:
        loss.expand(None)
        if cost.cost(b, loss(cost.moved(b))) < best[0]:
            best = here, b
    loss.expand(None)
    return best[1]


def conjugate_gradient(product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Solve product(x) = right, where product is symmetric and positive, to within LEFT (Hestenes and Stiefel 1952).

    Args:
        product: Linear.
        right: Of any shape.
        diagonal: About that of the product's matrix, in the same shape, above 0 where ``right`` is not 0: what it is
            preconditioned by.

    Examples:
        >>> conjugate_gradient(lambda x: 2 * x, torch.tensor([4.0, 6.0]), torch.tensor([2.0, 2.0]))
        tensor([2., 3.])
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    x, left = torch.zeros_like(right), right
    direction = inverse * left
    size = (left * direction).sum()
    enough = LEFT**2 * size
    for _ in range(MOST_PRODUCTS):
        if size <= enough:
            break
        produced = product(direction)
        length = size / (direction * produced).sum()
        x = x + length * direction
        left = left - length * produced
        scaled = inverse * left
        before, size = size, (left * scaled).sum()
        direction = scaled + size / before * direction
    return x
