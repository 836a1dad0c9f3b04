"""How training does: the step in progress, and means between two lines of the log."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from xgblora.learn.cost import Cost
from xgblora.learn.method import Step


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
        entries: dict[str, float] = {}
        if self.steps:
            entries["loss"] = self.loss / self.steps
        if self.projections:
            mean = self.projected / self.projections
            entries["projected_gradient_mean"] = mean
            entries["projected_gradient_std"] = max(self.projected_squares / self.projections - mean**2, 0.0) ** 0.5
            entries["zero_differences"] = self.zeros / self.projections
        if self.updates:
            entries["update_norm"] = self.update_norm / self.updates
        if self.skipped:
            entries["skipped_steps"] = self.skipped
        return entries

    def state(self) -> dict[str, Any]:
        """All sums, as JSON values."""
        return asdict(self)


@dataclass
class Meter:
    """Adds up the micro-batches of a step, and the steps of a run."""

    loss: float = float("nan")
    """Mean loss of the step in progress, over its micro-batches."""
    bad: bool = False
    """Whether a number of the step in progress is not finite, so that it is not applied."""
    bad_steps: int = 0
    """Such steps in a row."""
    micro_batch: int = 0
    """Micro-batches of the step in progress so far."""
    cost: Cost = field(default_factory=Cost)
    """Work of the run so far. Going back to an earlier state does not undo it."""
    health: Health = field(default_factory=Health)
    applied: int = 0
    """Steps of the run that were applied."""
    applied_loss: float = 0.0
    """Sum of their losses."""

    @property
    def mean_loss(self) -> float | None:
        """Mean loss over all applied steps of the run; None where there are none."""
        return self.applied_loss / self.applied if self.applied else None

    def begin(self) -> None:
        """A micro-batch comes: of a new step, or of the one in progress."""
        if self.micro_batch == 0:
            self.bad, self.loss = False, 0.0

    def add(self, step: Step, micro_batches: int) -> None:
        """Take note of one of the ``micro_batches`` of the step in progress."""
        self.cost += step.cost
        self.loss += step.loss * (1 / micro_batches)
        if step.projected is not None and not self.bad:
            self.health.measure(step.projected)
        self.micro_batch = (self.micro_batch + 1) % micro_batches
        if self.micro_batch == 0:
            self.bad_steps = self.bad_steps + 1 if self.bad else 0
            if self.bad:
                self.health.skipped += 1
            else:
                self.health.observe(self.loss)
                self.applied += 1
                self.applied_loss += self.loss

    def line(self) -> dict[str, float]:
        """The means since the last line of the log, and a new beginning."""
        entries, self.health = self.health.line(), Health()
        return entries
