"""Runs as tasks of a Ray cluster."""

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xgblora.config import RunConfig
from xgblora.errors import Interrupted, XgbloraError, one_line
from xgblora.progress import Progress
from xgblora.runs.folder import folder_of
from xgblora.runs.job import RETRIES, SECONDS, Finished, Job, cores_in_words, outcome, state

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""That a cluster has to answer."""
LAST_SECONDS = 60.0
"""That runs on a cluster have to save a checkpoint."""
OBJECTS = 100_000_000
"""Bytes that a Ray of our own sets aside for objects: what is exchanged are configurations."""


def on_ray(
    jobs: Iterable[Job], total: int, here: int, cores: int | None, expected: Sequence[RunConfig], memory: int
) -> Iterator[Finished]:
    """Carry out jobs, as many at once as the cluster has cores for.

    Args:
        jobs: Drawn one by one, each when there is a place for it.
        total: How many there are.
        here: Cores of a cluster that is started for them, where there is none.
        cores: Of each; None: an equal share.
        expected: The configurations that they will have.
        memory: Bytes that each asks for.

    Yields:
        Jobs in the order in which they end.

    Raises:
        XgbloraError: There is no Ray, or no cluster, or it has no such machine.
    """
    ray = _connected(here)
    pending = dict[Any, Job]()
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        alive = [machine.get("CPU", 0) for machine in machines]
        cores = cores or max(1, int(min(max(alive), sum(alive) // total)))
        if cores > max(alive):
            raise XgbloraError(f"--cores_per_run {cores} are more than any machine of the cluster has ({max(alive):g})")
        if memory > (most := max(machine.get("memory", 0) for machine in machines)):
            raise XgbloraError(
                f"a run takes about {memory / 1e9:.1f} GB, and no machine of the cluster has over {most / 1e9:.1f}: "
                "smaller batches, --dtype bfloat16 or a smaller model"
            )
        gpus = int(expected[0].device.type == "cuda")
        places = max(1, int(sum(alive)) // cores)
        task = ray.remote(_on_node).options(num_cpus=cores, num_gpus=gpus, memory=memory, max_retries=RETRIES)
        logger.info("Tasks of Ray: %d at once, each with %s and %.1f GB", places, cores_in_words(cores), memory / 1e9)
        stream = iter(jobs)
        with Progress(total, "finished", "runs") as progress:
            while True:
                while len(pending) < places and (job := next(stream, None)) is not None:
                    pending[task.remote(job, cores, str(Path.cwd()))] = job
                if not pending:
                    return
                ready, _ = ray.wait(list(pending), timeout=SECONDS)
                progress.say(state(pending.values()))
                for reference in ready:
                    job = pending.pop(reference)
                    progress.add()
                    yield Finished(job, _returned(ray, reference, job))
    finally:
        for reference in pending:
            ray.cancel(reference)  # as Ctrl-C: the run saves a checkpoint
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=LAST_SECONDS)
        ray.shutdown()


def _connected(here: int) -> Any:
    """Ray, connected to the cluster that there is, else to one that is started here and goes again."""
    try:
        import ray
    except ImportError as error:
        raise XgbloraError("--launcher ray needs Ray: python -m pip install 'xgblora[scale]'") from error
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _require_answer(address)
        ray.init(address="auto", **quietly)
    except ConnectionError as error:
        if address:
            raise XgbloraError(f"no Ray cluster answers at RAY_ADDRESS, {address}") from error
        ray.init(num_cpus=here, include_dashboard=False, object_store_memory=OBJECTS, **quietly)
    return ray


def _require_answer(address: str) -> None:
    """Raise :class:`ConnectionError` where nothing listens: Ray would look for it for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # a word of Ray's own, as "auto"
    try:
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(one_line(error)) from error


def _on_node(job: Job, cores: int, folder: str) -> Exception | None:
    """Carry out a job as a task of Ray. ``folder``: where the paths of its flags begin."""
    os.chdir(folder)
    try:
        return outcome(job, cores)
    except Interrupted as stop:
        os._exit(stop.code)  # a process that was told to end: Ray starts the task anew, unless it was cancelled


def _returned(ray: Any, reference: Any, job: Job) -> Exception | None:
    """What ended a job, where something did."""
    try:
        error: Exception | None = ray.get(reference)
    except ray.exceptions.RayError as lost:
        return XgbloraError(f"Ray gave up {folder_of(job.config)} ({one_line(lost)})")
    return error
