"""When to merge. The one place that decides; pure functions of the step and of the losses seen so far."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from xgblora.config import RunConfig
from xgblora.errors import XgbloraError


class PatienceState(NamedTuple):
    """What a patience schedule remembers between steps. Plain numbers: it goes into the checkpoint as it is."""

    steps: int = 0
    """Steps since the pair in training began."""
    average: float = 0.0
    """Exponentially smoothed loss of this pair, starting at its first loss."""
    best: float = 0.0
    """Lowest smoothed loss of this pair."""
    stale: int = 0
    """Steps since the smoothed loss last improved."""


@dataclass(frozen=True)
class Patience:
    """Merge when the smoothed loss has not improved by more than ``threshold`` for ``patience`` steps."""

    patience: int
    ema_beta: float
    threshold: float
    min_steps: int
    max_steps: int
    """0 = no bound."""

    def observe(self, state: PatienceState, loss: float) -> tuple[PatienceState, str]:
        """The state after one more step with this loss, and why a merge is due ("" where none is)."""
        average = loss if state.steps == 0 else self.ema_beta * state.average + (1 - self.ema_beta) * loss
        improved = state.steps == 0 or average < state.best - self.threshold
        state = PatienceState(
            steps=state.steps + 1,
            average=average,
            best=average if improved else state.best,
            stale=0 if improved else state.stale + 1,
        )
        if state.stale >= self.patience and state.steps >= self.min_steps:
            return state, f"no improvement for {state.stale} steps"
        if 0 < self.max_steps <= state.steps:
            return state, f"{state.steps} steps, the most of a booster"
        return state, ""


@dataclass(frozen=True)
class Schedule:
    """The resolved merge schedule of one run of ``total_steps`` optimizer steps.

    Fixed schedules merge after every ``every``-th step (0 = never); an epoch schedule is the same with
    ``every`` a multiple of the steps of an epoch. A merge never happens at the last step: nothing is left to
    train, the last pair simply is the last booster.
    """

    total_steps: int
    every: int = 0
    unit: Literal["step", "epoch"] = "step"
    steps_per_epoch: int = 1
    patience: Patience | None = None

    @property
    def expected_merges(self) -> int | None:
        """Merges of an uninterrupted run; None where the losses decide."""
        if self.patience is not None:
            return None
        return (self.total_steps - 1) // self.every if self.every else 0

    def observe(self, state: PatienceState, step: int, loss: float | None) -> tuple[PatienceState, str]:
        """Take note of the loss of ``step`` (1, 2, ...); say why a merge follows it ("" where none does).

        A step without a loss was not applied: patience does not count it.
        """
        if self.patience is not None:
            state, reason = (state, "") if loss is None else self.patience.observe(state, loss)
        else:
            reason = self.describe() if self.every > 0 and step % self.every == 0 else ""
        reason = reason if step < self.total_steps else ""
        return (PatienceState() if reason else state), reason

    def place(self, step: int) -> str:
        """How log lines and records name the place of a merge: ``step 2000`` or ``epoch 3``."""
        return f"epoch {step // self.steps_per_epoch}" if self.unit == "epoch" else f"step {step}"

    def describe(self) -> str:
        """One line for the log."""
        if self.patience is not None:
            bound = f", at most {self.patience.max_steps} steps a booster" if self.patience.max_steps else ""
            return f"after {self.patience.patience} steps without improvement{bound}"
        if self.every == 0:
            return "never"
        if self.unit == "epoch":
            return f"every {self.every // self.steps_per_epoch} epoch(s) of {self.steps_per_epoch} steps"
        return f"every {self.every} steps"


def resolve(config: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """The schedule that a configuration means: none for LoRA; for XGBLoRA patience, else steps, else epochs.

    Raises :class:`XgbloraError` where there is no step.

    Examples:
        >>> config = RunConfig(output_dir="runs/mine", xgblora=True, xgblora_steps_per_iteration=100, use_cpu=True)
        >>> resolve(config, total_steps=350, steps_per_epoch=50).expected_merges
        3
    """
    if total_steps < 1 or steps_per_epoch < 1:
        raise XgbloraError(f"a schedule needs at least one step, got {total_steps} steps, {steps_per_epoch} an epoch")
    if config.method != "xgblora":
        return Schedule(total_steps)
    if config.xgblora_use_adaptive_merge:
        return Schedule(
            total_steps,
            patience=Patience(
                patience=config.xgblora_patience,
                ema_beta=config.xgblora_ema_beta,
                threshold=config.xgblora_improvement_threshold,
                min_steps=config.xgblora_min_steps_per_adapter,
                max_steps=config.xgblora_max_steps_per_adapter,
            ),
        )
    if config.xgblora_steps_per_iteration > 0:
        return Schedule(total_steps, every=config.xgblora_steps_per_iteration)
    return Schedule(
        total_steps,
        every=config.xgblora_merge_frequency * steps_per_epoch,
        unit="epoch",
        steps_per_epoch=steps_per_epoch,
    )
