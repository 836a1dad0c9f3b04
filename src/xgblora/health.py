"""How training does between two lines of its log: the loss, and whether the estimator still measures anything."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass
class Health:
    """Sums over the steps since the last line of the log: plain numbers, so that a checkpoint can hold them."""

    steps: int = 0
    loss: float = 0.0
    """Sum over the steps, each a mean over its examples."""
    skipped: int = 0
    """Steps that were not applied, as a number in them was not finite; they are in no other sum."""
    projections: int = 0
    projected: float = 0.0
    projected_squares: float = 0.0
    zeros: int = 0
    """Projected gradients that are exactly zero: both probes gave one loss."""
    updates: int = 0
    update_norm: float = 0.0

    def observe(self, loss: float) -> None:
        """Add the loss of a step."""
        self.steps += 1
        self.loss += loss

    def measure(self, projected: Tensor) -> None:
        """Add the projected gradients of a micro-batch, (directions,) float32."""
        values = projected.double()
        self.projections += values.numel()
        self.projected += values.sum().item()
        self.projected_squares += values.square().sum().item()
        self.zeros += int((values == 0).sum())

    def moved(self, norm: float) -> None:
        """Add how far an optimizer step went: the Euclidean norm over all trainable parameters."""
        self.updates += 1
        self.update_norm += norm

    def line(self) -> dict[str, float]:
        """The means, as a log line has them. ``loss`` is missing where no step was applied.

        ``projected_gradient_mean`` and ``_std`` are in units of the loss per unit length of a direction;
        ``zero_differences`` is the share, in [0, 1], of probes whose two losses are equal: eps lost to rounding.
        """
        found: dict[str, float] = {}
        if self.steps:
            found["loss"] = self.loss / self.steps
        if self.projections:
            mean = self.projected / self.projections
            found["projected_gradient_mean"] = mean
            found["projected_gradient_std"] = max(self.projected_squares / self.projections - mean**2, 0.0) ** 0.5
            found["zero_differences"] = self.zeros / self.projections
        if self.updates:
            found["update_norm"] = self.update_norm / self.updates
        if self.skipped:
            found["skipped_steps"] = self.skipped
        return found

    def state(self) -> dict[str, Any]:
        """All sums, as JSON values."""
        return asdict(self)
