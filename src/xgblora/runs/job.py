"""A run to be carried out somewhere else: what is sent there, and what became of it."""

import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from xgblora.config import RunConfig
from xgblora.errors import XgbloraError, within_memory
from xgblora.report import METRICS, RunResult
from xgblora.runs.folder import folder_of
from xgblora.runs.run import run
from xgblora.runs.workspace import Workspace
from xgblora.training.record import TRAINING_LOSS, read_jsonl

RETRIES = 3
"""How often a run goes on after its process died."""
SECONDS = 5.0
"""Between two looks at how far runs have come."""


@dataclass(frozen=True)
class Job:
    """A run to be carried out, wherever that is."""

    config: RunConfig
    rows: RunConfig
    """The configuration whose workspace serves it."""
    watch: Sequence[TrainerCallback] = ()
    """Called in its process, as a trainer calls."""


@dataclass(frozen=True)
class Finished:
    """What became of a job."""

    job: Job
    error: Exception | None = None

    def result(self) -> RunResult:
        """What the run left in its folder. Raises what ended it."""
        if self.error is not None:
            raise self.error
        folder = folder_of(self.job.config)
        if not (folder / METRICS).is_file():
            raise XgbloraError(f"{folder} is not here: processes on other machines need a disk that all share")
        return RunResult.read(folder)


_loaded: list[tuple[dict[str, Any], Workspace]] = []
"""What served the last job of this process: the next one wants the same, as a rule."""


def outcome(job: Job, cores: int) -> Exception | None:
    """Carry out a job in a process of its own kind. Returns what ended it."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(cores)
    job.config.disable_tqdm = job.rows.disable_tqdm = True
    try:
        with within_memory(f"in {folder_of(job.config)}", "fewer runs at once (--cores_per_run) or smaller batches"):
            if not _loaded or _loaded[0][0] != job.rows.resolved():
                _loaded[:] = []
                _loaded.append((job.rows.resolved(), Workspace(job.rows)))
            run(job.config, _loaded[0][1], job.watch)
    except XgbloraError as error:
        return error
    except Exception:  # ours: whoever started this wants to see where
        return RuntimeError(traceback.format_exc())
    return None


def state(jobs: Iterable[Job]) -> str:
    """How far runs have come, by what they have written."""
    places = []
    for job in jobs:
        folder = folder_of(job.config)
        with suppress(OSError, XgbloraError):
            lines = read_jsonl(folder / TRAINING_LOSS)
            places.append(f"{folder.name} at step {lines[-1]['step']:,}" if lines else folder.name)
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def time_left(seconds: float) -> str:
    """The end of a line that says how long all runs that are left will take; nothing where that is soon."""
    minutes = round(seconds / 60)
    return f"; about {minutes} minutes left for all" if minutes > 1 else ""


def cores_in_words(count: int) -> str:
    """So many cores."""
    return f"{count} core{'' if count == 1 else 's'}"
