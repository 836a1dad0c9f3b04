"""The tasks, by name."""

from pathlib import Path

from xgblora.errors import XgbloraError, did_you_mean
from xgblora.tasks.bounds import load_yaml
from xgblora.tasks.chat import Chat
from xgblora.tasks.data import Samples, data_files, load_splits, read_rows, sample
from xgblora.tasks.encode import begun, encode
from xgblora.tasks.file import load_task, task_text
from xgblora.tasks.rotten_tomatoes import ROTTEN_TOMATOES
from xgblora.tasks.task import Generation, Hub, Metric, Question, Task


def _of_the_package() -> dict[str, Task]:
    described = (load_task(file) for file in sorted(Path(__file__).parent.glob("*.yaml")))
    return {task.name: task for task in (ROTTEN_TOMATOES, *described) if isinstance(task, Task)}


TASKS = _of_the_package()


def get_task(name: str) -> Task:
    """Look a task of the package up.

    Args:
        name: Case does not matter; ``xgblora tasks`` lists them.

    Raises:
        XgbloraError: There is none of that name.

    Examples:
        >>> get_task("sst2").options
        ('terrible', 'great')
    """
    for known, task in TASKS.items():
        if known.lower() == name.lower():
            return task
    if Path(name).suffix in (".yaml", ".yml"):
        raise XgbloraError(f"{name} is a task file: give it to --task_file, or to xgblora.load_task")
    raise XgbloraError(
        f"unknown task {name!r}{did_you_mean(name, TASKS)} (there are {', '.join(sorted(TASKS))}; your own is a "
        "--task_file)"
    )


__all__ = [
    "TASKS",
    "Chat",
    "Generation",
    "Hub",
    "Metric",
    "Question",
    "Samples",
    "Task",
    "begun",
    "data_files",
    "encode",
    "get_task",
    "load_splits",
    "load_task",
    "load_yaml",
    "read_rows",
    "sample",
    "task_text",
]
