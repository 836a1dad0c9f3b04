"""A finished run as a report shows it: its numbers and curves, what it answered, what it changed, how it was made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xgblora.report.answers import AnsweredRow
from xgblora.report.result import Curves, RunResult

POINTS = 1000
"""Of a drawn line at most."""
WINDOWS = 20
"""A running mean is over this share of a curve."""


@dataclass(frozen=True)
class RunView:
    """All that a report says of one run."""

    folder: str
    """As a user types it."""
    curves: Curves
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    """What it was made with; empty for a run of an earlier version, as ``answers``."""
    answers: Sequence[AnsweredRow] = ()
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Frobenius norm of what every booster adds to the weight of each adapted layer."""
    asks: str = ""
    """The command that asks its model; empty where nothing was trained."""

    @property
    def result(self) -> RunResult:
        """Its metrics."""
        return self.curves.result

    @property
    def name(self) -> str:
        """Method and seed."""
        return f"{self.result.label}, seed {self.result.seed}"


@dataclass(frozen=True)
class Line:
    """Values over the work that was done until each."""

    y: list[float]
    x: dict[str, list[float]]
    """Steps, examples and seconds."""


def first_unit(runs: Sequence[RunView]) -> str:
    """What curves are drawn over at first: steps, or examples where steps of different runs forward different many."""
    sizes = {round(run.result.forward_sequences / max(run.result.steps, 1)) for run in runs}
    return "steps" if len(sizes) == 1 else "examples"


def over_work(run: RunView, steps: Sequence[float], values: Sequence[float]) -> Line:
    """Values at some steps, over steps, examples forwarded and seconds: of these two, as many for every step."""
    result, most = run.result, max(run.result.steps, 1)
    done = np.array(thinned(steps), dtype=float)
    x = {"steps": done, "examples": done * result.forward_sequences / most}
    x["seconds"] = done * (result.training_seconds or 0.0) / most
    return Line(_short(thinned(values)), {unit: _short(place) for unit, place in x.items()})


def smoothed(run: RunView, steps: Sequence[float], values: Sequence[float]) -> Line:
    """The running mean of a curve, each at the end of what it is a mean over."""
    window = max(1, len(values) // WINDOWS)
    if not len(values):
        return over_work(run, [], [])
    means = np.convolve(np.array(values, dtype=float), np.ones(window) / window, mode="valid")
    return over_work(run, list(steps)[window - 1 :], means.tolist())


def thinned(values: Sequence[float]) -> list[float]:
    """Every k-th of them, and the last, so that POINTS or so are left.

    Examples:
        >>> len(thinned(range(20_000))), thinned(range(20_000))[-1]
        (1001, 19999)
    """
    stride = -(-len(values) // POINTS) or 1
    kept = list(values[::stride])
    return kept if not len(values) or (len(values) - 1) % stride == 0 else [*kept, values[-1]]


def _short(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def by_label(runs: Sequence[RunView]) -> dict[str, list[RunView]]:
    """Runs by method, in the order in which they come."""
    groups: dict[str, list[RunView]] = {}
    for run in runs:
        groups.setdefault(run.result.label, []).append(run)
    return groups
