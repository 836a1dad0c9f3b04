"""The verbs that ask the model of a finished run: predictions, how right they are, a conversation, a server."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from rich.table import Table

from xgblora import group
from xgblora.cli.output import print_table, set_up_output
from xgblora.cli.parsing import parse_of_run
from xgblora.cli.rows import rows_of
from xgblora.cli.writers import WRITERS
from xgblora.config import flag
from xgblora.errors import XgbloraError
from xgblora.files import require_writable, write_atomically
from xgblora.progress import Progress
from xgblora.runs.conversation import ChatConfig, Conversation
from xgblora.runs.finished import UseConfig, open_finished, read_finished
from xgblora.runs.judge import JudgeConfig, Judgement, judge, rows_to_judge
from xgblora.serving.serve import ServeConfig
from xgblora.serving.serve import serve as serve_run
from xgblora.tasks import Chat


@dataclass
class PredictConfig(UseConfig):
    """The flags of ``predict``."""

    file: str | None = flag(None, "Rows to predict, .csv, .jsonl or .parquet, in the columns of the task's prompt.")
    format: Literal["table", "csv", "jsonl"] | None = flag(
        None, "How predictions are written. Default: by the ending of --output, else a table."
    )
    output: str | None = flag(None, "Write to this file, not to the screen.")

    def __post_init__(self) -> None:
        super().__post_init__()
        ending = Path(self.output).suffix.removeprefix(".") if self.output else ""
        self.format = self.format or {"csv": "csv", "jsonl": "jsonl"}.get(ending, "table")  # type: ignore[assignment]


def predict(verb: str, argv: list[str]) -> int:
    """Answers for new texts or rows."""
    set_up_output(log_to_stderr=True)
    folder, texts, config = parse_of_run(PredictConfig, verb, argv)
    if config.output:
        require_writable(Path(config.output))
    if group.size() > 1 and config.file is None:
        raise XgbloraError("several processes share a --file: texts and stdin come to one process")
    group.meet()
    run = read_finished(folder)
    rows = rows_of(run.task, texts, config.file)

    def write(stream: TextIO) -> None:
        writer = WRITERS[str(config.format)](stream, run.task)
        what = "predicting" if config.output and group.first() else None
        with open_finished(run, config) as predictor, Progress(rows.count, what) as progress:
            for chunk in rows.chunks:
                for row, prediction in zip(chunk, predictor.predictions(chunk), strict=True):
                    writer.add(row, prediction)
                writer.flush()
                progress.add(len(chunk))

    if not group.first():
        _in_file(Path(os.devnull), write)
    elif config.output is None:
        write(sys.stdout)
    else:
        write_atomically(Path(config.output), lambda path: _in_file(path, write))
        print(config.output)
    return 0


def evaluate(verb: str, argv: list[str]) -> int:
    """How right a run is on labelled rows."""
    set_up_output(log_to_stderr=True)
    folder, texts, config = parse_of_run(JudgeConfig, verb, argv)
    if texts:
        raise XgbloraError(f"unknown argument {texts[0]!r}: labelled rows are in a --file")
    group.meet()
    run = read_finished(folder)
    rows = rows_to_judge(run, config.file)
    with open_finished(run, config) as predictor:
        judgement = judge(run, predictor, rows, progress=group.first())
    if not group.first():
        return 0
    if config.format == "json":
        print(json.dumps(judgement.as_json(), indent=2, ensure_ascii=False))
    else:
        print(judgement.sentence(f"{folder} on {config.file}"))
        if judgement.options:
            print_table(_by_option(judgement))
    return 0


def chat(verb: str, argv: list[str]) -> int:
    """A conversation with a model that learned conversations."""
    set_up_output(log_to_stderr=True)
    folder, texts, config = parse_of_run(ChatConfig, verb, argv)
    run = read_finished(folder)
    if not isinstance(run.task, Chat):
        raise XgbloraError(f"{folder} learned {run.task.name}, which is no conversation: xgblora predict {folder} TEXT")
    with open_finished(run, config) as predictor:
        conversation = Conversation(predictor, run.task, config)
        for text in texts or _typed():
            conversation.say(text, sys.stdout)
    return 0


def serve(verb: str, argv: list[str]) -> int:
    """A page to try a run, and a server for clients."""
    set_up_output()
    folder, texts, config = parse_of_run(ServeConfig, verb, argv)
    if texts:
        raise XgbloraError(f"unknown argument {texts[0]!r}: one run is served")
    serve_run(folder, config)
    return 0


def _typed() -> Iterator[str]:
    """What somebody types, line by line, until they leave."""
    if sys.stdin.isatty():
        print("Type a message; an empty line or Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _in_file(path: Path, write: Callable[[TextIO], None]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write(file)


def _by_option(judgement: Judgement) -> Table:
    table = Table(title="rows by their right option; the last columns are what was predicted")
    table.add_column("right option")
    names = [option.option for option in judgement.options]
    for column in ("rows", "precision %", "recall %", "F1 %", *(f"-> {name}" for name in names)):
        table.add_column(column, justify="right")
    for option in judgement.options:
        shares = (f"{100 * share:.1f}" for share in (option.precision, option.recall, option.f1))
        table.add_row(option.option, str(option.rows), *shares, *map(str, option.predicted))
    return table
