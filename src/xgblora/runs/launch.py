"""Many runs: one by one, in processes beside each other, or as tasks of a Ray cluster.

A run whose process dies goes on at its last checkpoint in another one, so however often that happens, its files are
the same.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from xgblora import group
from xgblora.config import RunConfig, flag
from xgblora.errors import XgbloraError
from xgblora.runs.cluster import on_ray
from xgblora.runs.job import Finished, Job, cores_in_words
from xgblora.runs.local import in_processes
from xgblora.runs.memory import expected_bytes, free
from xgblora.runs.run import run
from xgblora.runs.workspace import Workspace
from xgblora.training.interruption import StopAtSignal

logger = logging.getLogger(__name__)


@dataclass
class LaunchFlags:
    """The flags of verbs that carry out many runs."""

    launcher: Literal["one_by_one", "local", "ray"] = flag(
        "one_by_one",
        "How runs are carried out: one by one, in processes beside each other (local), or as tasks of the Ray cluster "
        "that RAY_ADDRESS names, else of one that is started here.",
    )
    cores: int | None = flag(None, "Cores of this machine that all runs together may use; default: all.")
    cores_per_run: int | None = flag(
        None, "Cores of one run; default: all of them, with a --launcher an equal share for every run."
    )

    def require_launchable(self) -> None:
        """Raise :class:`XgbloraError` where the flags cannot work."""
        for name in ("cores", "cores_per_run"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise XgbloraError(f"--{name} must be at least 1, got {value}")
        if self.launcher != "one_by_one" and group.size() > 1:
            raise XgbloraError(f"--launcher {self.launcher} starts processes itself: start it without torchrun")
        if self.launcher != "ray" and (self.cores_per_run or 1) > self.budget:
            raise XgbloraError(f"--cores_per_run {self.cores_per_run} are more than the {self.budget} there are")

    @property
    def budget(self) -> int:
        """Cores of this machine that may be used."""
        return self.cores or cores_here()


def cores_here() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def carried_out(
    jobs: Iterable[Job], total: int, flags: LaunchFlags, expected: Sequence[RunConfig], load: Callable[[], Workspace]
) -> Iterator[Finished]:
    """Carry out jobs, and say of each when it has ended.

    Args:
        jobs: Drawn one by one, each when there is a place for it.
        total: How many there are.
        flags: Where that is.
        expected: The configurations that jobs will have, as far as they are known: these ask for memory.
        load: Loads what serves all jobs, for those that are carried out in this process.

    Yields:
        Jobs in the order in which they end.

    Raises:
        XgbloraError: A launcher cannot be had, or a run's process died again and again.
    """
    if flags.launcher == "one_by_one":
        yield from _one_by_one(jobs, flags, load)
        return
    memory = max(expected_bytes(config) for config in {_kind(config): config for config in expected}.values())
    with StopAtSignal().listening():
        if flags.launcher == "ray":
            yield from on_ray(jobs, total, flags.budget, flags.cores_per_run, expected, memory)
            return
        cores = flags.cores_per_run or max(1, flags.budget // total)
        there = free(expected[0].device)
        places = min(total, flags.budget // cores, max(1, there // memory))
        logger.info(
            "Runs at once: %d, each with %s and about %.1f GB of the %.1f GB that are free",
            *(places, cores_in_words(cores), memory / 1e9, there / 1e9),
        )
        yield from in_processes(jobs, total, cores, places)


def _kind(config: RunConfig) -> tuple[str, str]:
    return config.method, f"{config.recipe} {config.trainer}"


def _one_by_one(jobs: Iterable[Job], flags: LaunchFlags, load: Callable[[], Workspace]) -> Iterator[Finished]:
    before, workspace = torch.get_num_threads(), None
    if flags.cores_per_run or flags.cores:
        torch.set_num_threads(flags.cores_per_run or flags.budget)
    try:
        for job in jobs:
            workspace = workspace or load()
            try:
                run(job.config, workspace, job.watch)
            except XgbloraError as error:
                yield Finished(job, error)
            else:
                yield Finished(job)
    finally:
        torch.set_num_threads(before)
