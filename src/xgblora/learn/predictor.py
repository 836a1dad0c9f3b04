"""A model kept ready to predict: measured once, its weights laid out once, for as many rows as come."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.base import Base
from xgblora.errors import XgbloraError, naming
from xgblora.learn.evaluate import evaluate
from xgblora.learn.generation import Writer
from xgblora.tasks import Chat, Task, encode

Row = Mapping[str, Any] | str


@dataclass(frozen=True)
class Prediction:
    """What a model answers to a row."""

    answer: str
    """The option that it chooses, or the text that it writes."""
    probabilities: dict[str, float] | None = None
    """Of the row's options, in their order, with the sum 1; None where the answer is written."""

    @property
    def probability(self) -> float | None:
        """Of the answer."""
        return None if self.probabilities is None else self.probabilities[self.answer]


class Predictor(ExitStack):
    """Predicts rows of one task, again and again. Closed, or as a context manager, it leaves the model as it was.

    Args:
        model: With its adapters.
        tokenizer: The model's.
        task: How a row becomes a question.
        batch_size: A batch holds as many tokens as so many rows of average length.
        max_length: Tokens of prompt and option; longer prompts lose their beginning. At most what the model takes.

    Example::

        with Predictor(model, tokenizer, task) as predictor:
            predictor(["a warm and funny film"])  # ['great']
            predictor.predictions(["a dull mess"])[0].probabilities  # {'terrible': 0.93, 'great': 0.07}
    """

    def __init__(
        self,
        model: PreTrainedModel | Base,
        tokenizer: Tokenizer,
        task: Task | Chat,
        batch_size: int = 16,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        self.base = Base.of(model)
        self.tokenizer = tokenizer
        self.task = task
        self.batch_size = batch_size
        self.max_length = min(max_length, self.base.context_length or max_length)
        self.enter_context(self.base.without_gradients())

    def __call__(self, rows: Sequence[Row]) -> list[str]:
        """The option that the model chooses for each row, e.g. ``['great', 'terrible']``, or what it writes.

        Args:
            rows: The columns that the task's prompt and options are made of; a text stands for the only one.

        Raises:
            XgbloraError: A text where there are several columns, or a row that makes no question.
        """
        return [prediction.answer for prediction in self.predictions(rows)]

    def predictions(self, rows: Sequence[Row]) -> list[Prediction]:
        """The same with the probabilities of the options. Raises as a call does."""
        if isinstance(rows, (str, Mapping)):
            raise XgbloraError("predict takes a list of rows or texts: put the one into a list")
        questions = []
        for number, row in enumerate(rows, start=1):
            with naming(f"{self.task.name}, row {number}"):
                questions.append(self.task.asked(row))
        if not questions:
            return []
        examples = encode(self.task, questions, self.tokenizer, self.max_length, answered=False)
        self.base.require_known(examples)
        if self.task.generation is not None:
            return [
                Prediction(text) for text in Writer(self.tokenizer, self.task.generation).write(self.base, examples)
            ]
        assert isinstance(self.task, Task)  # what an assistant says is always written
        chosen = evaluate(self.base, examples, batch_size=self.batch_size)
        predictions = []
        for row, place, likely in zip(questions, chosen.predictions, chosen.probabilities, strict=True):
            options = [option.strip() for option in self.task.question(row, answered=False).options]
            predictions.append(Prediction(options[place], dict(zip(options, likely.tolist(), strict=True))))
        return predictions


def predict(
    model: PreTrainedModel | Base,
    tokenizer: Tokenizer,
    task: Task | Chat,
    rows: Sequence[Row],
    batch_size: int = 16,
) -> list[str]:
    """Predict some rows once; :class:`Predictor` keeps the model ready for more, and gives probabilities.

    Args:
        model: As :class:`Predictor` takes it.
        tokenizer: As :class:`Predictor` takes it.
        task: As :class:`Predictor` takes it.
        rows: Rows or texts.
        batch_size: As :class:`Predictor` takes it.

    Raises:
        XgbloraError: As :class:`Predictor` does.

    Example::

        predict(model, tokenizer, get_task("RottenTomatoes"), ["a warm and funny film"])  # ['great']
    """
    with Predictor(model, tokenizer, task, batch_size) as predictor:
        return predictor(rows)
