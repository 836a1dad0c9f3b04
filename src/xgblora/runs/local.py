"""Runs in processes beside each other on this machine."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from xgblora.errors import Interrupted, XgbloraError
from xgblora.progress import Progress
from xgblora.runs.folder import folder_of
from xgblora.runs.job import RETRIES, SECONDS, Finished, Job, outcome, state

logger = logging.getLogger(__name__)


class _Worker:
    """A process that carries out one job after the other."""

    def __init__(self, cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, cores))
        with _deaf():
            self.process.start()
        theirs.close()

    def death(self) -> str:
        """How the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        with suppress(ValueError):
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"signal {-code}"


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started inside the block do not hear Ctrl-C: they are told by the one that started them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(jobs: Connection, cores: int) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C goes to a whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("xgblora").setLevel(logging.WARNING)
    try:
        while True:
            job = jobs.recv()
            logging.basicConfig(format=f"{folder_of(job.config).name}: %(message)s", force=True)
            jobs.send(outcome(job, cores))
    except (EOFError, BrokenPipeError):  # nobody waits for the outcome any more
        return
    except Interrupted as stop:
        sys.exit(stop.code)


def _end_with_parent() -> None:
    """Stop as if told to, where the process that hands out jobs is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def in_processes(jobs: Iterable[Job], total: int, cores: int, places: int) -> Iterator[Finished]:
    """Carry out jobs, so many at once.

    Args:
        jobs: Drawn one by one, each when there is a place for it.
        total: How many there are.
        cores: Of each.
        places: How many at once.

    Yields:
        Jobs in the order in which they end.

    Raises:
        XgbloraError: The processes of a run died again and again.
    """
    stream, again = iter(jobs), list[Job]()
    idle, busy, deaths = list[_Worker](), dict[_Worker, Job](), Counter[Path]()
    try:
        with Progress(total, "finished", "runs") as progress:
            while True:
                while len(busy) < places and (job := again.pop() if again else next(stream, None)) is not None:
                    idle = [worker for worker in idle if worker.process.is_alive()]
                    worker = idle.pop() if idle else _Worker(cores)
                    worker.pipe.send(job)
                    busy[worker] = job
                if not busy:
                    return
                ready = wait([worker.pipe for worker in busy], SECONDS)
                progress.say(state(busy.values()))
                for worker in [worker for worker in busy if worker.pipe in ready]:
                    job = busy.pop(worker)
                    try:
                        error = worker.pipe.recv()
                    except (EOFError, OSError):
                        _note_death(folder_of(job.config), worker.death(), deaths)
                        again.append(job)
                        continue
                    idle.append(worker)
                    progress.add()
                    yield Finished(job, error)
    finally:
        _stop(idle, [*busy])


def _note_death(folder: Path, how: str, deaths: Counter[Path]) -> None:
    """Raise :class:`XgbloraError` where it was one too many."""
    deaths[folder] += 1
    if deaths[folder] > RETRIES:
        raise XgbloraError(
            f"the process of {folder} died {deaths[folder]} times ({how}): where memory is short, give more "
            "--cores_per_run, so that fewer run at once"
        )
    logger.warning("The process of %s died (%s): the run goes on at its last checkpoint", folder.name, how)


def _stop(idle: Sequence[_Worker], busy: Sequence[_Worker]) -> None:
    """Let runs save a checkpoint, and end. A second signal ends them at once."""
    workers = [*idle, *busy]
    try:
        for worker in workers:
            worker.pipe.close()
        for worker in busy:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
