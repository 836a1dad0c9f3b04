"""How alike positions are to a linear function of layer inputs."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Kernel:
    """Coordinates of positions, in which a linear function of their layer inputs is one of few numbers.

    Inputs of a layer are divided by their mean distance from their mean, so that all layers count alike, or as much as
    they are said to; they keep their mean, which serves as the intercept. With the Gram matrix of some positions, the
    landmarks, K = L L^T, a position whose products with them are k has the coordinates L^-1 k: a function is
    f = coordinates . b, with a squared norm |b|^2. Of the landmarks themselves that is exact; of others it is what the
    landmarks can say (Williams and Seeger 2001, "Using the Nystrom method to speed up kernel machines").

    Args:
        inputs: Of the landmarks, (landmarks, in) for each layer.
        weights: How much each layer counts.
    """

    def __init__(self, inputs: Sequence[Tensor], weights: Sequence[float] | None = None) -> None:
        self.inputs = inputs
        self.count = 0
        """How many landmarks."""
        self.scales: list[float] = []
        self.variance = 0.0
        """Mean squared distance of the scaled inputs from their mean; 0 where all positions look alike."""
        for x, weight in zip(inputs, weights or [1.0] * len(inputs), strict=True):
            whole, self.count = x.float(), len(x)
            centred = whole - whole.mean(0)
            spread = centred.norm(dim=1).mean().item()
            # The first layer may see one input in all examples, at a prompt's last word: nothing to learn.
            flat = spread <= 1e-5 * whole.norm(dim=1).mean().item()
            self.scales.append(0.0 if flat else weight / spread / len(inputs) ** 0.5)
            self.variance += (centred * self.scales[-1]).square().sum(1).mean().item()

    @cached_property
    def root(self) -> Tensor:
        """L, the lower root (landmarks, landmarks) of the Gram matrix, float64."""
        gram: Tensor | None = None
        for x, scale in zip(self.inputs, self.scales, strict=True):
            scaled = x.double() * scale
            gram = scaled.new_zeros(self.count, self.count) if gram is None else gram
            gram.addmm_(scaled, scaled.T)
        assert gram is not None  # some layer trains
        # A little more on its diagonal makes examples that look alike to the layers differ by rounding alone.
        gram.diagonal().add_(1e-9 * gram.diagonal().mean())
        return torch.linalg.cholesky(gram, out=gram)

    @cached_property
    def landmarks(self) -> Tensor:
        """Coordinates of the landmarks, (landmarks, landmarks) float32."""
        return self.root.float()

    def fetch(self) -> None:
        """Have the landmarks' inputs here, where they lie with several processes."""
        self.inputs = list(self.inputs)

    def coordinates(self, inputs: Sequence[Tensor]) -> Tensor:
        """Those of other positions, (positions, landmarks) float32, from their inputs (positions, in)."""
        products = torch.zeros(self.count, len(inputs[0]), device=self.root.device)
        for x, landmarks, scale in zip(inputs, self.inputs, self.scales, strict=True):
            products.addmm_(landmarks.float() * scale, x.float().T * scale)
        return torch.linalg.solve_triangular(self.root, products.double(), upper=False).T.float()

    def function(self, b: Tensor) -> list[Tensor]:
        """The function coordinates . b, with b (landmarks, n), of inputs as they are: (n, in) for each layer."""
        dual = torch.linalg.solve_triangular(self.root.T, b.double(), upper=True).float()
        return [scale**2 * (dual.T @ x.float()) for x, scale in zip(self.inputs, self.scales, strict=True)]


def ridge_regression(coordinates: Tensor, values: Tensor, penalty: float) -> Tensor:
    """What a linear function of coordinates (T, m) explains of ``values`` (T, n) with a ridge penalty, (T, n)."""
    gram = coordinates.T @ coordinates
    gram.diagonal().add_(penalty)
    return coordinates @ torch.cholesky_solve(coordinates.T @ values, torch.linalg.cholesky(gram, out=gram))
