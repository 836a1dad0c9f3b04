"""A model kept ready to predict: measured once, its weights laid out once, for as many rows as come."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.base import Base
from xgblora.errors import XgbloraError
from xgblora.learn.evaluate import evaluate
from xgblora.learn.generation import Writer
from xgblora.tasks import Chat, Task, encode

Row = Mapping[str, Any] | str


class Predictor(ExitStack):
    """Predicts rows of one task, again and again. Closed, or as a context manager, it leaves the model as it was.

    Args:
        model: With its adapters.
        tokenizer: The model's.
        task: How a row becomes a question.
        batch_size: A batch holds as many tokens as so many rows of average length.

    Example::

        with Predictor(model, tokenizer, task) as predictor:
            predictor(["a warm and funny film"])  # ['great']
            predictor(["a dull mess", "superb"])  # ['terrible', 'great']
    """

    def __init__(
        self, model: PreTrainedModel | Base, tokenizer: Tokenizer, task: Task | Chat, batch_size: int = 16
    ) -> None:
        super().__init__()
        self.base = Base.of(model)
        self.tokenizer = tokenizer
        self.task = task
        self.batch_size = batch_size
        self.enter_context(self.base.without_gradients())

    def __call__(self, rows: Sequence[Row]) -> list[str]:
        """The option that the model chooses for each row, e.g. ``['great', 'terrible']``, or what it writes.

        Args:
            rows: The columns that the task's prompt and options are made of; a text stands for the only one.

        Raises:
            XgbloraError: A text where there are several columns, or a row that makes no question.
        """
        if isinstance(rows, str):
            raise XgbloraError("predict takes a list of rows or texts: put the text into a list")
        questions = [self.task.asked(row) for row in rows]
        if not questions:
            return []
        length = self.base.context_length or 2048
        examples = encode(self.task, questions, self.tokenizer, length, answered=False)
        self.base.require_known(examples)
        if self.task.generation is not None:
            return Writer(self.tokenizer, self.task.generation).write(self.base, examples)
        assert isinstance(self.task, Task)  # what an assistant says is always written
        chosen = evaluate(self.base, examples, batch_size=self.batch_size).predictions
        options = [self.task.question(row, answered=False).options for row in questions]
        return [texts[index].strip() for texts, index in zip(options, chosen, strict=True)]


def predict(model: PreTrainedModel | Base, tokenizer: Tokenizer, task: Task | Chat, rows: Sequence[Row]) -> list[str]:
    """Predict some rows once; :class:`Predictor` keeps the model ready for more.

    Args:
        model: As :class:`Predictor` takes it.
        tokenizer: As :class:`Predictor` takes it.
        task: As :class:`Predictor` takes it.
        rows: Rows or texts.

    Raises:
        XgbloraError: As :class:`Predictor` does.

    Example::

        predict(model, tokenizer, get_task("RottenTomatoes"), ["a warm and funny film"])  # ['great']
    """
    with Predictor(model, tokenizer, task) as predictor:
        return predictor(rows)
