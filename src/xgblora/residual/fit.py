"""The weak learner: a few directions, and a linear function of layer inputs along each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xgblora.residual.activations import Observed, TailLoss

MINOR = 0.01
"""Share of what a reduced-rank regression explains, below which a direction is left out."""


@dataclass(frozen=True)
class Learner:
    """``outputs``: directions u, (directions, hidden), of length 1 and at right angles to each other.

    ``inputs``: a_m, (directions, in) for each layer. ``change``: f, (T, directions).
    """

    outputs: Tensor
    inputs: list[Tensor]
    change: Tensor

    def at(self, inputs: Sequence[Tensor]) -> Tensor:
        """f (T, directions) of other inputs, (T, in) for each layer."""
        return torch.stack([x @ a.T for x, a in zip(inputs, self.inputs, strict=True)]).sum(0)


def fit(
    seen: Observed,
    loss: TailLoss,
    ridge: float,
    own: Sequence[Callable[[Tensor], Tensor] | None] | None = None,
    directions: int = 1,
    outputs: Tensor | None = None,
) -> Learner:
    """The learner that lowers the loss of final hidden states h_t + sum_r f_tr u_r most, f_tr = sum_m a_mr . x_t^m.

    Inputs of a layer are divided by their mean distance from their mean, so that every layer counts alike; they keep
    their mean, which serves as the intercept. The penalty is ridge * variance * curvature / 2 * sum |a_m|^2, with the
    mean squared distance of the scaled inputs from their mean and the loss's second derivative along u: both make
    ``ridge`` a number without units.

    ``own``: what :func:`turned_down` says of each layer. Layers that it names are turned down instead, all by one share
    gamma for each u, which is not penalised: a_m = -gamma W_m^T u. ``directions``: at most so many, and only those that
    explain MINOR of all that inputs explain; ``outputs``: they are these, (directions, hidden).
    """
    own = own or [None] * len(seen.inputs)
    scales = []
    gram = seen.hidden.new_zeros(len(seen.hidden), len(seen.hidden), dtype=torch.float64)
    variance = 0.0
    for x, write in zip(seen.inputs, own, strict=True):
        centred = x - x.mean(0)
        spread = centred.norm(dim=1).mean()
        # A layer may see the same input in every example (the first one, at a prompt's last word): nothing to learn.
        flat = write is not None or spread <= 1e-5 * x.norm(dim=1).mean()
        scale = torch.zeros_like(spread) if flat else 1 / spread / own.count(None) ** 0.5
        scales.append(scale)
        if not flat:
            scaled = x.double() * scale  # in float32 the rounding of its products may leave it without a Cholesky root
            gram += scaled @ scaled.T
            variance += (centred * scale).square().sum(1).mean().item()
    _, uphill = loss(seen.hidden)
    if variance == 0:  # all examples look alike to these layers
        width = seen.hidden.shape[1]
        none = [torch.zeros_like(x[:1]) for x in seen.inputs]
        return Learner(torch.eye(1, width, device=gram.device), none, torch.zeros_like(seen.hidden[:, :1]))
    penalty = ridge * variance
    if outputs is None:
        outputs = _explaining(gram, penalty, -uphill, directions)
    count = len(outputs)

    # f = root @ b and sum |a_m|^2 = |b|^2 with the Gram matrix = root @ root.T; a little more on its diagonal makes
    # examples that look alike to the layers differ by rounding alone.
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())
    cholesky = torch.linalg.cholesky(gram)
    root = cholesky.float()
    weight = penalty * torch.tensor([loss.curvature(seen.hidden, u) for u in outputs], device=root.device)
    written = [None if write is None else [write(u) for u in outputs] for write in own]
    opinion = torch.zeros_like(seen.hidden[:, :count])
    for x, w in zip(seen.inputs, written, strict=True):
        if w is not None:
            opinion += x @ torch.stack(w, dim=1)
    unit = root.norm() / opinion.norm() if opinion.any() else opinion.new_zeros(())  # the size of the others together
    b = nn.Parameter(root.new_zeros(len(root) + 1, count))  # last row: gamma / unit
    optimizer = torch.optim.LBFGS([b], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def change(b: Tensor) -> Tensor:
        return root @ b[:-1] - unit * opinion * b[-1]

    def closure() -> Tensor:
        losses, gradient = loss(seen.hidden + change(b.detach()) @ outputs)
        along = gradient @ outputs.T
        b.grad = torch.cat([root.T @ along, -unit * (opinion * along).sum(0, keepdim=True)])
        b.grad[:-1] += weight * b.detach()[:-1]
        return losses.double().sum() + 0.5 * (weight * b[:-1].double().square()).sum()

    optimizer.step(closure)
    found = b.detach()
    dual = torch.linalg.solve_triangular(cholesky.T, found[:-1].double(), upper=True).float()
    inputs = [
        scale**2 * (dual.T @ x) if w is None else -(unit * found[-1])[:, None] * torch.stack(w)
        for x, scale, w in zip(seen.inputs, scales, written, strict=True)
    ]
    return Learner(outputs, inputs, change(found))


def _explaining(gram: Tensor, penalty: float, residual: Tensor, most: int) -> Tensor:
    """Directions (directions, hidden) of a reduced-rank ridge regression of (T, hidden) on inputs of a Gram matrix."""
    ridged = gram.clone()
    ridged.diagonal().add_(penalty)
    fitted = gram @ torch.cholesky_solve(residual.double(), torch.linalg.cholesky(ridged))
    _, sizes, found = torch.linalg.svd(fitted, full_matrices=False)
    kept = int((sizes.square() >= MINOR * sizes.square().sum()).sum())
    outputs = found[: max(1, min(most, kept))].float()
    return torch.where((residual @ outputs.T).sum(0)[:, None] < 0, -outputs, outputs)
