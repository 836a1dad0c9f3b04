"""What the base and the trained model answer to every evaluation row: ``answers.jsonl``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xgblora.errors import XgbloraError
from xgblora.files import write_atomically

ANSWERS = "answers.jsonl"
BINS = 10
"""Of a calibration curve: equally wide, over the probability of the answer (Guo et al. 2017, arXiv 1706.04599)."""
MOST_ANSWERS = 20
"""Different answers at most, of which a confusion can still be read."""


@dataclass(frozen=True)
class Answer:
    """What one model says of one row."""

    text: str
    """The option that it chooses, or what it writes."""
    is_right: bool
    probability: float | None = None
    """Of that option; None where answers are written."""
    of_right: float | None = None
    """Probability of the right option; of several right ones, of the first."""


@dataclass(frozen=True)
class AnsweredRow:
    """A row, and what is said of it before and after."""

    prompt: str
    right: tuple[str, ...]
    """All right answers."""
    base: Answer
    trained: Answer

    @property
    def change(self) -> float:
        """By how much the right answer became likelier; of written answers, whether one became right (1) or wrong."""
        if self.trained.of_right is None or self.base.of_right is None:
            return float(self.trained.is_right) - float(self.base.is_right)
        return self.trained.of_right - self.base.of_right


def write_answers(rows: Sequence[AnsweredRow], file: Path) -> None:
    """Write a line for each row, as JSON."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
    write_atomically(file, lambda work: work.write_text("".join(lines), encoding="utf-8", newline="\n"))


def read_answers(file: Path) -> list[AnsweredRow]:
    """Read what :func:`write_answers` wrote.

    Raises:
        XgbloraError: A line is damaged; the message has its number.
    """
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise XgbloraError(f"{file}, line {number} is damaged ({error}): remove the file") from error
    return rows


def _row(entry: Mapping[str, Any]) -> AnsweredRow:
    base, trained = Answer(**entry["base"]), Answer(**entry["trained"])
    return AnsweredRow(str(entry["prompt"]), tuple(map(str, entry["right"])), base, trained)


def changed_most(rows: Sequence[AnsweredRow], count: int) -> list[AnsweredRow]:
    """The rows whose right answer's probability changed most, the largest change first, up or down.

    Of written answers those that became right or wrong, then those that are other ones.
    """
    changed = [row for row in rows if row.change or row.base.text != row.trained.text]
    return sorted(changed, key=lambda row: -abs(row.change))[:count]


@dataclass(frozen=True)
class Bin:
    """Answers that are about equally sure."""

    sure: float
    """Mean probability of the answers."""
    right: float
    """Share of them that is right."""
    rows: int


def calibration(answers: Sequence[Answer]) -> list[Bin]:
    """How often answers are right, by how sure the model is of them. Bins without answers are left out."""
    sure = [(answer.probability, answer.is_right) for answer in answers if answer.probability is not None]
    groups: dict[int, list[tuple[float, bool]]] = {}
    for probability, hit in sure:
        groups.setdefault(min(int(probability * BINS), BINS - 1), []).append((probability, hit))
    return [
        Bin(sum(p for p, _ in group) / len(group), sum(hit for _, hit in group) / len(group), len(group))
        for _, group in sorted(groups.items())
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between how sure answers are and how often they are right, by rows.

    Examples:
        >>> round(calibration_error([Bin(0.9, 0.8, 30), Bin(0.6, 0.6, 10)]), 3)
        0.075
    """
    return sum(abs(one.sure - one.right) * one.rows for one in bins) / max(sum(one.rows for one in bins), 1)


def confusion(rows: Sequence[AnsweredRow]) -> tuple[list[str], list[list[int]]] | None:
    """Answers, and how often each was given (columns) by the trained model where each is right (lines).

    None where answers are written, several are right, or there are more than can be read.
    """
    if not rows or any(len(row.right) != 1 or row.trained.probability is None for row in rows):
        return None
    names = sorted({*_texts(rows)})
    if len(names) > MOST_ANSWERS:
        return None
    places = {name: place for place, name in enumerate(names)}
    counts = [[0] * len(names) for _ in names]
    for row in rows:
        counts[places[row.right[0]]][places[row.trained.text]] += 1
    return names, counts


def _texts(rows: Sequence[AnsweredRow]) -> Iterator[str]:
    for row in rows:
        yield from (row.right[0], row.base.text, row.trained.text)
