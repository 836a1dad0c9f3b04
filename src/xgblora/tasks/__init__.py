"""The tasks, by name."""

from xgblora.errors import XgbloraError
from xgblora.tasks.data import Samples, load_splits, sample
from xgblora.tasks.encode import encode
from xgblora.tasks.rotten_tomatoes import ROTTEN_TOMATOES
from xgblora.tasks.sst2 import SST2
from xgblora.tasks.task import Task

TASKS = {task.name: task for task in (ROTTEN_TOMATOES, SST2)}


def get_task(name: str) -> Task:
    """The task of that name (case does not matter). Raises :class:`XgbloraError` for an unknown one."""
    for known, task in TASKS.items():
        if known.lower() == name.lower():
            return task
    raise XgbloraError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")


__all__ = ["TASKS", "Samples", "Task", "encode", "get_task", "load_splits", "sample"]
