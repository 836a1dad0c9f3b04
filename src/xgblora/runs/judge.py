"""How right a finished run is on labelled rows: accuracy, F1, confusion, calibration."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from xgblora.config import flag
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.learn.evaluate import Evaluation, evaluate
from xgblora.learn.generation import Writer, exact_match_and_f1
from xgblora.learn.losses import AnswerLoss, OptionLoss, TextLoss
from xgblora.report import calibration, calibration_error, wilson
from xgblora.runs.answering import answers_of
from xgblora.runs.finished import FinishedRun, RunPredictor, UseConfig
from xgblora.tasks import Task, encode, read_rows


@dataclass
class JudgeConfig(UseConfig):
    """The flags of ``eval``."""

    file: str | None = flag(None, "Labelled rows, .csv, .jsonl or .parquet, in the task's columns.")
    format: Literal["table", "json"] = flag("table", "How the numbers are printed.")


@dataclass(frozen=True)
class OfOption:
    """What became of the rows whose right answer is one option."""

    option: str
    rows: int
    precision: float
    recall: float
    f1: float
    predicted: list[int]
    """How many of them were given each option in turn: a line of the confusion matrix."""


@dataclass(frozen=True)
class Judgement:
    """How right a model is. Shares are in [0, 1]."""

    rows: int
    accuracy: float
    """Where answers are written, the share of exact matches."""
    interval: tuple[float, float]
    """95 %, Wilson's."""
    f1: float
    """Mean over the options; where answers are written, of their words. As accuracy where each row has own options."""
    loss: float
    """Mean, in nats."""
    calibration_error: float | None
    """Mean distance between the probability of the answer and how often such answers are right (ECE, Guo et al. 2017,
    arXiv 1706.04599, 10 bins); None where answers are written."""
    options: list[OfOption]
    """Empty where the options are not the same for all rows."""

    def sentence(self, what: str) -> str:
        """The most of it in one sentence about ``what``."""
        low, high = (100 * end for end in self.interval)
        parts = [f"{100 * self.accuracy:.1f} % of {self.rows:,} rows right (95 % interval {low:.1f} to {high:.1f})"]
        parts.append(f"F1 {100 * self.f1:.1f} %, loss {self.loss:.3f} nats")
        if self.calibration_error is not None:
            parts.append(f"says how sure it is with a mean error of {100 * self.calibration_error:.1f} points")
        return f"{what}: {'; '.join(parts)}."

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def rows_to_judge(run: FinishedRun, file: str | None) -> Dataset:
    """The labelled rows of ``--file``. Raises :class:`XgbloraError` where there are none."""
    if file is None:
        raise XgbloraError("say which rows: xgblora eval RUN --file rows.csv")
    return read_rows(Path(file), run.task)


def judge(run: FinishedRun, predictor: RunPredictor, rows: Dataset, progress: bool = False) -> Judgement:
    """Score labelled rows.

    Args:
        run: Says which loss is its own.
        predictor: Of the run.
        rows: With their answers, at least one.
        progress: Show a progress bar.
    """
    task = run.task
    examples = encode(task, rows, predictor.tokenizer, predictor.max_length)
    predictor.base.require_known(examples)
    writer = Writer(predictor.tokenizer, task.generation) if task.generation else None
    loss: AnswerLoss = TextLoss(writer) if run.text_loss or writer else OptionLoss()
    bar = f"scoring {len(examples)} rows" if progress else None
    evaluation = evaluate(predictor.base, examples, loss, predictor.batch_size, bar)
    if evaluation.texts is not None:
        f1, error, options = exact_match_and_f1(examples, evaluation.texts)[1], None, []
    else:
        options = _of_options(task, rows, examples, evaluation)
        f1 = sum(option.f1 for option in options) / len(options) if options else evaluation.accuracy
        error = calibration_error(calibration(answers_of(examples, evaluation, predictor.tokenizer)))
    return Judgement(
        rows=len(examples),
        accuracy=evaluation.accuracy,
        interval=wilson(round(evaluation.accuracy * len(examples)), len(examples)),
        f1=f1,
        loss=evaluation.loss,
        calibration_error=error,
        options=options,
    )


def _of_options(task: Any, rows: Dataset, examples: Sequence[Example], evaluation: Evaluation) -> list[OfOption]:
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import

    assert isinstance(task, Task)  # a conversation is written
    names = [tuple(option.strip() for option in task.question(row).options) for row in rows]
    if len(set(names)) > 1:
        return []
    chosen, labels = torch.tensor(evaluation.predictions), torch.tensor([example.label for example in examples])
    matrix = multiclass_confusion_matrix(chosen, labels, num_classes=len(names[0]))
    of_options = []
    for place, name in enumerate(names[0]):
        hits, there, given = matrix[place, place].item(), matrix[place].sum().item(), matrix[:, place].sum().item()
        precision, recall = (hits / total if total else 0.0 for total in (given, there))
        f1 = 2 * hits / (there + given) if there + given else 0.0
        of_options.append(OfOption(name, int(there), precision, recall, f1, matrix[place].tolist()))
    return of_options
