"""The weak learner: a few directions, and a linear function of layer inputs along each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xgblora.learn.fitted.activations import Observed
from xgblora.learn.fitted.kept import Kept
from xgblora.learn.fitted.kernel import ridge_regression
from xgblora.learn.fitted.newton import Change, Penalised, lowest
from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.randomness import Stream, generator


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
    kept: float = 0.0
    """What a step of 1 costs in other text, for each of these examples; that of other steps grows with their square."""

    def at(self, seen: Observed) -> Tensor:
        """f (T, directions) of other examples."""
        along = torch.stack([x.float() @ a.T for x, a in zip(seen.inputs, self.inputs, strict=True)]).sum(0)
        return along if seen.written is None else along - self.share * (seen.written @ self.outputs.T)


def fit(
    seen: Observed,
    loss: TailLoss,
    ridge: float,
    directions: int | Tensor = 1,
    least: float = 0.0,
    note: Callable[[str], None] = no_note,
    kept: Kept | None = None,
) -> Learner:
    """Fit the learner that lowers the loss of final hidden states h_t + sum_r f_tr u_r most, f_tr = sum_m a_mr . x_t^m.

    The penalty is ridge * variance * curvature / 2 * sum |a_m|^2 in units of :class:`Kernel`, with its variance and the
    loss's second derivative along u: both make ``ridge`` a number without units. What the layers that are turned down
    write along u is taken away by one share gamma for each u, which is not penalised.

    It goes by Newton steps (:func:`lowest`).

    Args:
        seen: Inputs x and final hidden states h of the examples.
        loss: As a function of h.
        ridge: Penalty, without units.
        directions: How many u, at most; or which, (directions, hidden).
        least: Leave out those that explain a smaller share of all that inputs explain.
        note: Told how far it has come.
        kept: Text that is to change as little as it can.
    """
    kernel = seen.kernel
    if kernel.variance == 0:  # all examples look alike to these layers
        outputs = torch.eye(1, seen.hidden.shape[1], device=seen.hidden.device)
        none = [x.new_zeros(1, x.shape[1], dtype=torch.float32) for x in seen.inputs]
        return Learner(outputs, none, outputs.new_zeros(1), torch.zeros_like(seen.hidden[:, :1]))
    penalty = ridge * kernel.variance
    coordinates = seen.coordinates
    loss.expand(seen.hidden)
    if isinstance(directions, Tensor):
        outputs = directions
    else:
        outputs = _explaining(coordinates, penalty, -loss.gradient(seen.hidden), directions, least)
    draw = generator(0, Stream.CURVATURE)
    bend = loss.bend(seen.hidden, outputs, draw, undecided=True)
    weight = penalty * bend.curvature.clamp(min=torch.finfo(torch.float32).tiny)
    opinion = seen.opinion(outputs)
    unit = coordinates.norm() / opinion.norm() if opinion.any() else opinion.new_zeros(())  # like the others together
    beside = None if kept is None else kept.cost(outputs, unit, draw)
    cost = Penalised(loss, seen.hidden, outputs, Change(coordinates, opinion, unit), weight, beside)
    b = lowest(cost, bend.losses.double().sum().item(), draw, note)
    return Learner(
        outputs, kernel.function(b[:-1]), unit * b[-1], cost.change.at(b), cost.keeping(b) / len(bend.losses)
    )


def _explaining(coordinates: Tensor, penalty: float, residual: Tensor, most: int, least: float) -> Tensor:
    """Directions (directions, hidden) of a reduced-rank ridge regression of (T, hidden) on coordinates."""
    fitted = ridge_regression(coordinates, residual, penalty).double()
    # Its right singular vectors: of many positions this takes a fraction of the time and memory of an SVD.
    sizes, columns = torch.linalg.eigh(fitted.T @ fitted)
    kept = int((sizes >= least * sizes.sum()).sum())
    outputs = columns.T.flip(0)[: max(1, min(most, kept))].float().contiguous()
    return torch.where((residual @ outputs.T).sum(0)[:, None] < 0, -outputs, outputs)
