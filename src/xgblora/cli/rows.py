"""Rows to predict: texts of the command line, lines of stdin, or a file; in chunks, as they come."""

import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from xgblora.errors import XgbloraError
from xgblora.tasks import Chat, Task, read_rows

CHUNK = 256
"""Rows that are predicted together."""

ADDED = ("prediction", "probability", "probabilities")
"""Columns that a prediction adds to a row, beside one ``p(option)`` for each option."""


@dataclass(frozen=True)
class Rows:
    """Rows of a task, in chunks."""

    chunks: Iterator[Sequence[Mapping[str, Any]]]
    count: int | None
    """None where nobody knows."""


def rows_of(task: Task | Chat, texts: Sequence[str], file: str | None) -> Rows:
    """The rows that a command line names.

    Args:
        task: Whose columns they have.
        texts: Each stands for the only column of the prompt.
        file: In place of texts. Without either, stdin has a text in every line.

    Raises:
        XgbloraError: There are none, or they are not of this task; before any model is loaded.
    """
    if texts and file is not None:
        raise XgbloraError("texts and --file are two sources of rows: give one of them")
    if file is not None:
        rows = read_rows(Path(file), task, answered=False)
        for name in rows.column_names:
            if name in ADDED or name.startswith("p("):
                raise XgbloraError(f"{file} has a column {name!r}, where predictions go: rename it")
        starts = range(0, len(rows), CHUNK)
        return Rows((rows.select(range(i, min(i + CHUNK, len(rows)))).to_list() for i in starts), len(rows))
    if texts:
        return Rows(iter([[task.asked(text) for text in texts]]), len(texts))
    task.asked("a text")  # refuses a task that asks by several columns
    if sys.stdin is None or sys.stdin.isatty():
        raise XgbloraError('say what to predict: xgblora predict RUN "a text", --file rows.csv, or lines on stdin')
    return Rows(([task.asked(line) for line in lines] for lines in lines_of(sys.stdin)), None)


def lines_of(stream: TextIO) -> Iterator[list[str]]:
    """The lines of a stream that are not empty, as many at once as have arrived, at most :data:`CHUNK`."""
    arrived: queue.Queue[str | None] = queue.Queue(maxsize=4 * CHUNK)

    def read() -> None:
        try:
            for line in stream:
                if line.strip():
                    arrived.put(line.rstrip("\r\n"))
        finally:
            arrived.put(None)

    threading.Thread(target=read, daemon=True).start()  # a file that is read blocks, and has no timeout on Windows
    ended = False
    while not ended and (first := arrived.get()) is not None:
        lines = [first]
        while len(lines) < CHUNK and not arrived.empty():
            if (line := arrived.get()) is None:
                ended = True
                break
            lines.append(line)
        yield lines
