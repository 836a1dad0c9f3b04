"""The weak learner: a few directions, and a linear function of layer inputs along each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xgblora.learn.fitted.activations import Observed
from xgblora.learn.fitted.kernel import ridge_regression
from xgblora.learn.fitted.tail_loss import Bend, TailLoss
from xgblora.randomness import Stream, generator

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
class Learner:
    """What a fit found."""

    outputs: Tensor
    """Directions u, (directions, hidden), of length 1 and at right angles to each other."""
    inputs: list[Tensor]
    """a_m, (directions, in) for each layer that is fitted."""
    share: Tensor
    """gamma, (directions,), of what the layers that are turned down write along u."""
    change: Tensor
    """f, (T, directions), of the examples it was fitted to."""

    def at(self, seen: Observed) -> Tensor:
        """f (T, directions) of other examples."""
        along = torch.stack([x.float() @ a.T for x, a in zip(seen.inputs, self.inputs, strict=True)]).sum(0)
        return along if seen.written is None else along - self.share * (seen.written @ self.outputs.T)


def fit(
    seen: Observed,
    loss: TailLoss,
    ridge: float,
    directions: int = 1,
    outputs: Tensor | None = None,
    least: float = 0.0,
) -> Learner:
    """Fit the learner that lowers the loss of final hidden states h_t + sum_r f_tr u_r most, f_tr = sum_m a_mr . x_t^m.

    The penalty is ridge * variance * curvature / 2 * sum |a_m|^2 in units of :class:`Kernel`, with its variance and the
    loss's second derivative along u: both make ``ridge`` a number without units. What the layers that are turned down
    write along u is taken away by one share gamma for each u, which is not penalised.

    It goes by Newton steps. Where the loss asks for words out of the whole vocabulary, they go by a part of it, which
    is taken again where they have got to.

    Args:
        seen: Inputs x and final hidden states h of the examples.
        loss: As a function of h.
        ridge: Penalty, without units.
        directions: How many u, at most.
        outputs: Take these, (directions, hidden), instead.
        least: Leave out those that explain a smaller share of all that inputs explain.
    """
    kernel = seen.kernel
    if kernel.variance == 0:  # all examples look alike to these layers
        outputs = torch.eye(1, seen.hidden.shape[1], device=seen.hidden.device)
        none = [x.new_zeros(1, x.shape[1], dtype=torch.float32) for x in seen.inputs]
        return Learner(outputs, none, outputs.new_zeros(1), torch.zeros_like(seen.hidden[:, :1]))
    penalty = ridge * kernel.variance
    coordinates = seen.coordinates
    loss.expand(seen.hidden)
    if outputs is None:
        outputs = _explaining(coordinates, penalty, -loss.gradient(seen.hidden), directions, least)
    draw = generator(0, Stream.CURVATURE)
    bend = loss.bend(seen.hidden, outputs, draw, undecided=True)
    weight = penalty * bend.curvature.clamp(min=torch.finfo(torch.float32).tiny)
    opinion = seen.hidden.new_zeros(len(coordinates), 1) if seen.written is None else seen.written @ outputs.T
    unit = coordinates.norm() / opinion.norm() if opinion.any() else opinion.new_zeros(())  # like the others together

    def change(b: Tensor) -> Tensor:  # last row: gamma / unit
        return coordinates @ b[:-1] - unit * opinion * b[-1]

    def slope(along: Tensor) -> Tensor:
        # Of a few columns this product is several times as fast as coordinates.T @ along.
        return torch.cat([(along.T @ coordinates).T, -unit * (opinion * along).sum(0, keepdim=True)])

    def penalised(b: Tensor) -> Tensor:
        return torch.cat([weight * b[:-1], torch.zeros_like(b[-1:])])

    def cost(b: Tensor, losses: Tensor) -> float:
        return losses.double().sum().item() + 0.5 * (b.double() * penalised(b)).sum().item()

    lengths = torch.cat([torch.linalg.vector_norm(coordinates, dim=0), unit.view(1) * opinion.norm()])[:, None].square()
    b = coordinates.new_zeros(coordinates.shape[1] + 1, len(outputs))
    here = cost(b, bend.losses)
    best = here, b  # by the whole vocabulary
    enough = ENOUGH * here
    for _ in range(MOST_STEPS):
        bend = loss.bend(seen.hidden + change(b) @ outputs, outputs, draw)

        def curved(p: Tensor, bend: Bend = bend) -> Tensor:
            return slope(bend.curved(change(p))) + penalised(p)

        steepness = lengths * bend.factors.square().sum(1).mean(0) + penalised(torch.ones_like(b))
        step = conjugate_gradient(curved, -slope(bend.slopes) - penalised(b), steepness)
        length, before = 1.0, here
        while length >= SHORTEST:
            near = seen.hidden + change(b + length * step) @ outputs
            if (there := cost(b + length * step, loss(near))) < here:
                b, here = b + length * step, there
                break
            length /= 2
        if before - here <= enough:
            if not loss.whole:
                loss.expand(seen.hidden + change(b) @ outputs)
                here = cost(b, loss(seen.hidden + change(b) @ outputs))
            gained = best[0] - here
            if gained > 0:
                best = here, b
            if loss.whole or gained <= enough:
                break
    else:
        loss.expand(None)
        if (here := cost(b, loss(seen.hidden + change(b) @ outputs))) < best[0]:
            best = here, b
    loss.expand(None)
    b = best[1]
    return Learner(outputs, kernel.function(b[:-1]), unit * b[-1], change(b))


def conjugate_gradient(product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Solve product(x) = right, where product is symmetric and positive, to within LEFT (Hestenes and Stiefel 1952).

    Args:
        product: Linear.
        right: Of any shape.
        diagonal: About that of the product's matrix, in the same shape, above 0 where ``right`` is not 0: what it is
            preconditioned by.

    Example:
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


def _explaining(coordinates: Tensor, penalty: float, residual: Tensor, most: int, least: float) -> Tensor:
    """Directions (directions, hidden) of a reduced-rank ridge regression of (T, hidden) on coordinates."""
    fitted = ridge_regression(coordinates, residual, penalty)
    _, sizes, rows = torch.linalg.svd(fitted.double(), full_matrices=False)
    kept = int((sizes.square() >= least * sizes.square().sum()).sum())
    outputs = rows[: max(1, min(most, kept))].float()
    return torch.where((residual @ outputs.T).sum(0)[:, None] < 0, -outputs, outputs)
