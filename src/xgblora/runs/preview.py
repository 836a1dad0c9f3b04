"""What there is to train on: the tasks, and how the rows of one of them look to a model."""

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from xgblora.base.load import load_tokenizer
from xgblora.config import EMBEDDED_MODEL, flag
from xgblora.tasks import TASKS, Chat, Hub, Task, encode, load_splits

ROWS = 3
"""Rows of a task that are shown."""


@dataclass
class PreviewConfig:
    """The flags of ``tasks``."""

    model_name: str = flag(EMBEDDED_MODEL, "Model whose tokenizer counts the tokens.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    data_dir: str | None = flag(None, "Folder with the task's rows, as for training.")


def task_table() -> Table:
    """Every task of the package, a line each."""
    table = Table(title="xgblora tasks NAME shows rows of one; docs/tasks.md says how to describe your own")
    for column in ("task", "options", "trains as", "metric", "dev rows", "data"):
        table.add_column(column, no_wrap=column != "options")
    for name in sorted(TASKS, key=str.lower):
        task = TASKS[name]
        table.add_row(name, escape(_options(task)), _loss(task), task.metric, str(task.num_dev), escape(_data(task)))
    return table


def rows_table(task: Task | Chat, config: PreviewConfig) -> Table:
    """The first training rows of a task as a model sees them, with their token counts.

    Raises :class:`XgbloraError` where its rows or the tokenizer cannot be had, or a row makes no question.
    """
    rows = load_splits(task, config.data_dir)["train"]
    rows = rows.select(range(min(ROWS, len(rows))))
    tokenizer = load_tokenizer(config.model_name, config.trust_remote_code)
    examples = encode(task, rows, tokenizer, max_length=10**9)
    shown: list[tuple[str, list[str], tuple[int, ...]]]
    if isinstance(task, Chat):  # a row is several examples, in the words of the model's template
        shown = [(tokenizer.decode(e.prompt), tokenizer.batch_decode(e.options), (0,)) for e in examples]
    else:
        asked = [task.question(row) for row in rows]
        shown = [(question.prompt, list(question.options), question.correct) for question in asked]
    table = Table(
        title=f"{task.name}: columns {', '.join(task.columns)}; trains as {_loss(task)}; metric {task.metric}",
        show_lines=True,
    )
    table.add_column("prompt, in quotes")
    table.add_column("tokens", justify="right")
    table.add_column("options (the correct one is trained on)")
    table.add_column("tokens", justify="right")
    for (prompt, texts, correct), example in zip(shown, examples, strict=True):
        options = Text()
        for place, option in enumerate(texts):
            style = "bold green" if place in correct else ""
            options.append(f"{option!r}{'  correct' if style else ''}\n", style)
        options.rstrip()
        counts = "\n".join(str(len(option)) for option in example.options)
        table.add_row(Text(f'"{prompt}"'), str(len(example.prompt)), options, counts)
    return table


def _options(task: Task) -> str:
    if task.generation:
        return "written by the model"
    if isinstance(task.options, str) or any("{{" in option for option in task.options):
        return "of each row"
    return ", ".join(task.options)


def _loss(task: Task | Chat) -> str:
    return "classification" if task.classification else "language model"


def _data(task: Task) -> str:
    source = task.source
    if isinstance(source, Hub):
        return source.path + (f", {source.name}" if source.name else "")
    return "PyPI wheel"
