"""A finished run: its metrics, typed, and its curves, read back from its folder."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xgblora.errors import XgbloraError
from xgblora.files import read_json, write_json
from xgblora.report.intervals import wilson
from xgblora.training.record import EVAL_LOSS, TRAINING_LOSS, read_jsonl

METRICS = "metrics.json"
NAMES = {"lora": "LoRA", "xgblora": "XGBLoRA", "boost": "Boost"}
ESTIMATORS = {"zo": "+ZO", "regular": "+backprop"}
OPTIONAL = {
    "rows_won": ("rows_won", "rows_lost"),
    "zero_shot_dev_loss": ("zero_shot_dev_loss",),
    "zero_shot_dev_accuracy": ("zero_shot_dev_accuracy",),
    "metric": ("metric", "score", "zero_shot_score", "dev_score"),
    "reward": ("reward", "zero_shot_reward", "dev_reward"),
    "other_text_loss": ("other_text_loss", "zero_shot_other_text_loss"),
    "boosters": ("boosters",),
    "rank": ("rank",),
    "trainable_parameters": ("seconds_per_step", "trainable_parameters"),
    "training_seconds": ("training_seconds", "peak_memory_mb"),
}
"""Metrics that a run has together, or not at all: the first name says which."""


@dataclass(frozen=True)
class RunResult:
    """Everything that ``metrics.json`` says of a finished run. Accuracies and scores are in [0, 1], losses in nats.

    Example::

        result = RunResult.read(Path("runs/mine"))
        result.accuracy, result.merges
    """

    method: str
    """lora, xgblora, boost, zero-shot, in-context, calibrated, centroid or probe."""
    trainer: str
    seed: int
    model: str
    task: str
    evaluation_split: str
    rows: dict[str, int]
    """How many there were: train, dev, evaluation."""
    zero_shot_accuracy: float
    zero_shot_loss: float
    accuracy: float
    """On the evaluation rows, as everything that does not begin with ``dev_``."""
    eval_loss: float
    gain: float
    """``accuracy`` - ``zero_shot_accuracy``."""
    dev_accuracy: float | None
    """None for a run without dev rows, as everything that begins with ``dev_``."""
    dev_loss: float | None
    zero_shot_dev_loss: float | None = None
    zero_shot_dev_accuracy: float | None = None
    rows_won: int | None = None
    """Evaluation rows that the model has right and the base had wrong."""
    rows_lost: int | None = None
    """The other way round."""
    metric: str | None = None
    """The task's own, where it is not accuracy."""
    score: float | None = None
    zero_shot_score: float | None = None
    dev_score: float | None = None
    reward: float | None = None
    """Mean reward, where the run had one."""
    zero_shot_reward: float | None = None
    dev_reward: float | None = None
    other_text_loss: float | None = None
    """Of a token of text that nothing was trained on, where the run had some."""
    zero_shot_other_text_loss: float | None = None
    merges: int = 0
    merge_steps: list[int] = field(default_factory=list)
    boosters: int | None = None
    """None where nothing was trained."""
    rank: int | None = None
    """Of the adapter that is left, all boosters together."""
    steps: int = 0
    forward_passes: int = 0
    forward_sequences: int = 0
    forward_tokens: int = 0
    seconds_per_step: float | None = None
    """Median."""
    training_seconds: float | None = None
    """Of all steps, or of fitting a classifier; None where there was nothing to fit."""
    peak_memory_mb: float | None = None
    trainable_parameters: int | None = None

    @property
    def label(self) -> str:
        """What tables and figures call the method."""
        return NAMES.get(self.method, self.method) + (
            ESTIMATORS[self.trainer] if self.method in ("lora", "xgblora") else ""
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, at 95 %."""
        rows = self.rows["evaluation"]
        return wilson(round(self.accuracy * rows), rows)

    @property
    def forgotten(self) -> float | None:
        """By how much the loss of other text rose."""
        if self.other_text_loss is None or self.zero_shot_other_text_loss is None:
            return None
        return self.other_text_loss - self.zero_shot_other_text_loss

    def before_on_dev(self, column: str) -> float | None:
        """What the base had on the dev rows, where that is known.

        Args:
            column: Of an evaluation: ``eval_accuracy``, ``eval_loss`` or ``eval_reward``.
        """
        return {"eval_accuracy": self.zero_shot_dev_accuracy, "eval_loss": self.zero_shot_dev_loss}.get(column)

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        absent = {name for key, group in OPTIONAL.items() if getattr(self, key) is None for name in group}
        return {name: value for name, value in asdict(self).items() if name not in absent}

    def write(self, file: Path) -> None:
        """Write the metrics."""
        write_json(file, self.metrics())

    @classmethod
    def read(cls, folder: Path) -> "RunResult":
        """Read the metrics of a finished run. Raises :class:`XgbloraError` where they are missing or damaged."""
        try:
            return cls(**read_json(folder / METRICS))
        except TypeError as error:
            raise XgbloraError(f"{folder / METRICS} is damaged, or of another version ({error})") from error


@dataclass(frozen=True)
class Curves:
    """A finished run with its curves."""

    result: RunResult
    loss: list[dict[str, Any]]
    """Lines of training_loss.jsonl."""
    evals: list[dict[str, Any]]
    """Lines of eval_loss.jsonl."""


def read_curves(folder: Path) -> Curves:
    """Read a finished run."""
    files = [folder / name for name in (TRAINING_LOSS, EVAL_LOSS)]
    return Curves(RunResult.read(folder), *(read_jsonl(file) if file.is_file() else [] for file in files))
