"""What a task is: where its rows come from, how a row becomes a prompt, and which answers there are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

SPLITS = ("train", "validation", "test")
"""Names of data files in a ``--data_dir``, without their ending."""


@dataclass(frozen=True)
class Task:
    """A classification task by prompt: the model chooses one of a few options as the prompt's continuation."""

    name: str
    text_column: str
    label_column: str
    prompt: str
    """Format string over the text column, e.g. ``{sentence} It was``. No space at its end: options begin with it."""
    options: tuple[str, ...]
    """Option i is the answer of label i, with its leading space."""
    source: Callable[[], Mapping[str, Dataset]]
    """Loads the task's own splits: train, and validation or test with labels."""
    classification: bool = True
    """Trains by default on the cross-entropy over options."""

    def render(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row."""
        return self.prompt.format(**{self.text_column: str(row[self.text_column]).strip()})
