"""Predictions as a table for people, or as CSV or JSON lines that keep the columns of their rows."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from xgblora.cli.output import console
from xgblora.learn.predictor import Prediction
from xgblora.tasks import Chat, Task

MOST_SHOWN = 60
"""Characters of a row that the table shows."""


class RowWriter(ABC):
    """Writes rows with their predictions, chunk by chunk."""

    def __init__(self, stream: TextIO, task: Task | Chat) -> None:
        self.stream = stream
        self.task = task

    @abstractmethod
    def add(self, row: Mapping[str, Any], prediction: Prediction) -> None:
        """Take a row."""

    def flush(self) -> None:
        """Let what was taken be seen."""
        self.stream.flush()


class CsvWriter(RowWriter):
    """The row's columns, then ``prediction``, ``probability``, and ``p(option)`` where rows share their options."""

    def __init__(self, stream: TextIO, task: Task | Chat) -> None:
        super().__init__(stream, task)
        self._writer: Any = None

    def add(self, row: Mapping[str, Any], prediction: Prediction) -> None:
        cells = {**row, "prediction": prediction.answer}
        if prediction.probabilities is not None:
            cells["probability"] = f"{prediction.probability:.6f}"
            if _same_options(self.task):
                cells |= {f"p({option})": f"{p:.6f}" for option, p in prediction.probabilities.items()}
        if self._writer is None:
            self._writer = csv.DictWriter(self.stream, list(cells), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(cells)


class JsonLinesWriter(RowWriter):
    """The row's columns, ``prediction``, ``probability`` and ``probabilities``."""

    def add(self, row: Mapping[str, Any], prediction: Prediction) -> None:
        cells: dict[str, Any] = {**row, "prediction": prediction.answer}
        if prediction.probabilities is not None:
            cells["probability"] = round(prediction.probability or 0.0, 6)
            cells["probabilities"] = {option: round(p, 6) for option, p in prediction.probabilities.items()}
        self.stream.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")


class TableWriter(RowWriter):
    """A line for each row: the answer, how sure it is, the beginning of the row."""

    def __init__(self, stream: TextIO, task: Task | Chat) -> None:
        super().__init__(stream, task)
        self._shows_header = True
        self._table = self._new()

    def _new(self) -> Table:
        table = Table(box=None, show_header=self._shows_header, pad_edge=False)
        table.add_column("prediction", min_width=12, overflow="fold")
        if self.task.generation is None:
            table.add_column("sure", justify="right", min_width=6)
        table.add_column(", ".join(self.task.asking), overflow="fold")
        return table

    def add(self, row: Mapping[str, Any], prediction: Prediction) -> None:
        shown = [" ".join(_text(row.get(name)).split()) for name in self.task.asking]
        beginning = " | ".join(shown)
        beginning = beginning if len(beginning) <= MOST_SHOWN else f"{beginning[: MOST_SHOWN - 3]}..."
        sure = [] if prediction.probability is None else [Text(f"{100 * prediction.probability:.0f} %")]
        self._table.add_row(Text(prediction.answer, "bold"), *sure, Text(beginning))

    def flush(self) -> None:
        console(self.stream).print(self._table)
        self._shows_header = False
        self._table = self._new()
        super().flush()


WRITERS: dict[str, type[RowWriter]] = {"table": TableWriter, "csv": CsvWriter, "jsonl": JsonLinesWriter}


def _same_options(task: Task | Chat) -> bool:
    if isinstance(task, Chat) or isinstance(task.options, str):
        return False
    return not any("{{" in option for option in task.options)


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):  # a conversation: what was said last
        return str(value[-1].get("content"))
    return str(value)
