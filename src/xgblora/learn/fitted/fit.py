"""The weak learner: a few directions, and a linear function of layer inputs along each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from xgblora.learn.fitted.activations import Observed, TailLoss

MINOR = 0.01
"""Share of what a reduced-rank regression explains, below which a direction is left out."""

MOST_EXPANSIONS = 6
"""How often the head is expanded again, where the fit has gone to."""

EXACT = 1e-3
"""Share by which the loss of a part of the vocabulary may differ from the whole one's where a fit ends."""


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


class Kernel:
    """How alike examples are to a linear function of layer inputs, which are scaled so that every layer counts alike.

    Inputs of a layer are divided by their mean distance from their mean; they keep their mean, which serves as the
    intercept. The Gram matrix (T, T) is of float64, for the sake of its root.

    Args:
        inputs: (T, in) for each layer.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        count = len(inputs[0])
        self.gram = torch.zeros(count, count, dtype=torch.float64, device=inputs[0].device)
        self.scales: list[float] = []
        self.variance = 0.0
        """Mean squared distance of the scaled inputs from their mean; 0 where all examples look alike."""
        for x in inputs:
            whole = x.float()
            centred = whole - whole.mean(0)
            spread = centred.norm(dim=1).mean().item()
            # The first layer may see one input in all examples, at a prompt's last word: nothing to learn.
            flat = spread <= 1e-5 * whole.norm(dim=1).mean().item()
            scale = 0.0 if flat else 1 / spread / len(inputs) ** 0.5
            self.scales.append(scale)
            if not flat:
                scaled = x.double() * scale
                self.gram.addmm_(scaled, scaled.T)
                self.variance += (centred * scale).square().sum(1).mean().item()
        # A little more on its diagonal makes examples that look alike to the layers differ by rounding alone.
        self.gram.diagonal().add_(1e-9 * self.gram.diagonal().mean())

    @cached_property
    def cholesky(self) -> Tensor:
        """The lower root (T, T) of the Gram matrix, float64."""
        return torch.linalg.cholesky(self.gram)

    @cached_property
    def root(self) -> Tensor:
        """The same, float32."""
        return self.cholesky.float()

    def fitted(self, values: Tensor, penalty: float) -> Tensor:
        """The ridge regression of ``values`` (T, n) on the inputs: K (K + penalty)^-1 values, float64."""
        ridged = self.gram.clone()
        ridged.diagonal().add_(penalty)
        values = values.double()
        return values - penalty * torch.cholesky_solve(values, torch.linalg.cholesky(ridged, out=ridged))


@dataclass(frozen=True)
class View:
    """What fits look at; the kernel is computed once, by the first that asks."""

    seen: Observed

    @cached_property
    def kernel(self) -> Kernel:
        """That of the layers' inputs."""
        return Kernel(self.seen.inputs)


def fit(
    seen: Observed,
    loss: TailLoss,
    ridge: float,
    directions: int = 1,
    outputs: Tensor | None = None,
    kernel: Kernel | None = None,
) -> Learner:
    """Fit the learner that lowers the loss of final hidden states h_t + sum_r f_tr u_r most, f_tr = sum_m a_mr . x_t^m.

    The penalty is ridge * variance * curvature / 2 * sum |a_m|^2 in units of :class:`Kernel`, with its variance and the
    loss's second derivative along u: both make ``ridge`` a number without units. What the layers that are turned down
    write along u is taken away by one share gamma for each u, which is not penalised.

    Args:
        seen: Inputs x and final hidden states h of the examples.
        loss: As a function of h.
        ridge: Penalty, without units.
        directions: At most so many, and only those that explain MINOR of all that inputs explain.
        outputs: Take these directions, (directions, hidden), instead.
        kernel: That of the inputs of ``seen``, where it serves several fits.
    """
    kernel = kernel or Kernel(seen.inputs)
    _, uphill = loss(seen.hidden)
    if kernel.variance == 0:  # all examples look alike to these layers
        outputs = torch.eye(1, seen.hidden.shape[1], device=seen.hidden.device)
        none = [x.new_zeros(1, x.shape[1], dtype=torch.float32) for x in seen.inputs]
        return Learner(outputs, none, outputs.new_zeros(1), torch.zeros_like(seen.hidden[:, :1]))
    penalty = ridge * kernel.variance
    if outputs is None:
        outputs = _explaining(kernel, penalty, -uphill, directions)
    loss.expand(seen.hidden)
    weight = penalty * torch.tensor([loss.curvature(seen.hidden, u) for u in outputs], device=outputs.device)

    root = kernel.root  # f = root @ b and sum |a_m|^2 = |b|^2 with the Gram matrix = root @ root.T
    opinion = seen.hidden.new_zeros(len(root), 1) if seen.written is None else seen.written @ outputs.T
    unit = root.norm() / opinion.norm() if opinion.any() else opinion.new_zeros(())  # the size of the others together
    b = nn.Parameter(root.new_zeros(len(root) + 1, len(outputs)))  # last row: gamma / unit

    def change(b: Tensor) -> Tensor:
        return root @ b[:-1] - unit * opinion * b[-1]

    def closure() -> Tensor:
        losses, gradient = loss(seen.hidden + change(b.detach()) @ outputs)
        along = gradient @ outputs.T
        b.grad = torch.cat([root.T @ along, -unit * (opinion * along).sum(0, keepdim=True)])
        b.grad[:-1] += weight * b.detach()[:-1]
        return losses.double().sum() + 0.5 * (weight * b[:-1].double().square()).sum()

    for _ in range(MOST_EXPANSIONS):
        optimizer = torch.optim.LBFGS([b], max_iter=200, history_size=20, line_search_fn="strong_wolfe")
        optimizer.step(closure)
        if loss.whole:
            break
        reached = closure().item()
        loss.expand(seen.hidden + change(b.detach()) @ outputs)
        if abs(closure().item() - reached) <= EXACT * abs(reached):
            break
    loss.expand(None)
    best = b.detach()
    dual = torch.linalg.solve_triangular(kernel.cholesky.T, best[:-1].double(), upper=True).float()
    inputs = [scale**2 * (dual.T @ x.float()) for x, scale in zip(seen.inputs, kernel.scales, strict=True)]
    return Learner(outputs, inputs, unit * best[-1], change(best))


def _explaining(kernel: Kernel, penalty: float, residual: Tensor, most: int) -> Tensor:
    """Directions (directions, hidden) of a reduced-rank ridge regression of (T, hidden) on a kernel's inputs."""
    _, sizes, rows = torch.linalg.svd(kernel.fitted(residual, penalty), full_matrices=False)
    kept = int((sizes.square() >= MINOR * sizes.square().sum()).sum())
    outputs = rows[: max(1, min(most, kept))].float()
    return torch.where((residual @ outputs.T).sum(0)[:, None] < 0, -outputs, outputs)
