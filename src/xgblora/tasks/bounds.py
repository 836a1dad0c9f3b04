"""Bounds on the files that a task is made of: what lies beyond them is refused before a reader fills the memory."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from xgblora.errors import XgbloraError

LONGEST_CELL = 1_000_000
"""Characters of a text in a row. A prompt keeps the end of it that fits into the model's context."""

MOST_COLUMNS = 10_000
"""Columns of a data file."""

LARGEST_PARQUET = 2**32
"""Bytes that a Parquet file unpacks to."""

MOST_DEEP = 1000
"""Values in one another that libyaml, ten times as fast as Python, is asked to read: it has no bound of its own."""

_Fast = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

LARGEST_TASK_FILE = 200_000
"""Characters of a task file; and values in it, where an alias stands for all that it repeats."""


def require_bounded(path: Path) -> None:
    """Raise :class:`XgbloraError` where a data file is out of bounds. All else is the reader's to say."""
    checks = {".jsonl": _check_lines, ".csv": _check_csv, ".parquet": _check_parquet}
    checks[path.suffix](path)


def require_short_cells(rows: Dataset, path: Path) -> None:
    """Raise :class:`XgbloraError` where a text of some rows, as they were read, is too long."""
    for name, column in zip(rows.column_names, rows.data.columns, strict=True):
        if str(column.type) in ("string", "large_string", "binary"):
            longest = pc.max(pc.binary_length(column)).as_py() or 0
            if longest > 4 * LONGEST_CELL:  # bytes of that many characters
                raise _too_long(path, f"column {name!r}")


def load_yaml(text: str) -> Any:
    """Read a task file's YAML, all values as text.

    Raises :class:`XgbloraError` where it is too large, too deep, or where its aliases repeat one another.
    """
    if len(text) > LARGEST_TASK_FILE:
        raise XgbloraError(f"it has more than {LARGEST_TASK_FILE:,} characters")
    try:
        content = yaml.load(text, _Fast if _depth(text) < MOST_DEEP else yaml.BaseLoader)
        if _values(content, {}) > LARGEST_TASK_FILE:
            raise XgbloraError(f"its aliases make more than {LARGEST_TASK_FILE:,} values")
    except RecursionError as error:
        raise XgbloraError("its brackets lie too deep in one another") from error
    return content


def _depth(text: str) -> int:
    """No less than how deep values lie in one another: each level opens a bracket, or stands further to the right."""
    indented = max((len(line) - len(line.lstrip(" -?")) for line in text.splitlines()), default=0)
    return text.count("[") + text.count("{") + indented


def _values(content: Any, known: dict[int, int]) -> int:
    """How many values there are, each as often as an alias repeats it."""
    if id(content) not in known:
        parts = content if isinstance(content, list) else list(content.values()) if isinstance(content, dict) else []
        known[id(content)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(content)]


def _check_lines(path: Path) -> None:
    names: set[str] = set()
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(_short(lines, path), start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                names.update(row)
                _check_row(row.values(), len(names), path, number)


def _short(lines: Any, path: Path) -> Iterator[str]:
    """The lines of a file, each of which is read no further than it may go."""
    most = 10 * LONGEST_CELL
    while line := lines.readline(most + 1):
        if len(line) > most:
            raise XgbloraError(f"{path} has a line of more than {most:,} characters")
        yield line


def _check_csv(path: Path) -> None:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as lines:
            for number, row in enumerate(csv.reader(_short(lines, path)), start=0):
                _check_row(row, len(row), path, number)
    except csv.Error as error:
        if "field larger" in str(error):
            raise _too_long(path, "a cell") from error
    finally:
        csv.field_size_limit(before)


def _check_row(cells: Any, columns: int, path: Path, number: int) -> None:
    if columns > MOST_COLUMNS:
        raise XgbloraError(f"{path} has more than {MOST_COLUMNS:,} columns")
    if any(isinstance(cell, str) and len(cell) > LONGEST_CELL for cell in cells):
        raise _too_long(path, f"row {number}")


def _too_long(path: Path, place: str) -> XgbloraError:
    return XgbloraError(f"{path}, {place}: a text has more than {LONGEST_CELL:,} characters")


def _check_parquet(path: Path) -> None:
    try:
        about = pq.read_metadata(path)
    except Exception:  # no Parquet: the reader says so
        return
    if about.num_columns > MOST_COLUMNS:
        raise XgbloraError(f"{path} has more than {MOST_COLUMNS:,} columns")
    if sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups)) > LARGEST_PARQUET:
        raise XgbloraError(f"{path} unpacks to more than {LARGEST_PARQUET:,} bytes")
