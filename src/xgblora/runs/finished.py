"""A finished run, read back from its folder: which model it adapts, what it is asked, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xgblora.adapters.boosters import Ledger, load_adapters
from xgblora.adapters.files import LEDGER, TASK
from xgblora.adapters.plain_peft import WEIGHTS
from xgblora.base import Base
from xgblora.base.load import load_configured
from xgblora.config import RunConfig, flag, is_size, of_settings
from xgblora.errors import XgbloraError, naming
from xgblora.files import digest, read_json, verify
from xgblora.learn.predictor import Predictor
from xgblora.runs.folder import CONFIG, adapter_of, base_name, task_of
from xgblora.runs.sharing import require_same_inputs
from xgblora.tasks import Chat, Task, load_task

LONGEST = 2048
"""Tokens of a prompt and its option, where no run says."""


@dataclass
class UseConfig:
    """The flags of every verb that asks the model of a run."""

    boosters: int | None = flag(None, "Only the first so many boosters; 0: the bare base. Default: all.")
    model_name: str | None = flag(None, "Base model, where it has moved since the run.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    batch_size: int = flag(16, "Rows scored at once, of average length.")
    use_cpu: bool = flag(False, "Leave a GPU alone.")
    memory_budget: str | None = flag(None, "Memory that the process may take, as 3GB (docs/base_models.md).")

    def __post_init__(self) -> None:
        if self.memory_budget is not None and not is_size(self.memory_budget):
            raise XgbloraError(f"--memory_budget must be a size like 3GB or 800MB, got {self.memory_budget}")
        if self.batch_size < 1:
            raise XgbloraError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.boosters is not None and self.boosters < 0:
            raise XgbloraError(f"--boosters must be 0 or more, got {self.boosters}")


@dataclass(frozen=True)
class FinishedRun:
    """What the folder of a run, or of an adapter by itself, says."""

    folder: Path
    adapter: Path
    model_name: str
    dtype: str
    task: Task | Chat
    max_length: int
    boosters: int
    settings: dict[str, Any]
    """Of the run; empty for an adapter by itself."""

    @property
    def text_loss(self) -> bool:
        """Whether it was trained as a language model."""
        chosen = self.settings.get("train_as_classification")
        return not (self.task.classification if chosen is None else chosen)


def read_finished(folder: Path) -> FinishedRun:
    """Read what a folder says.

    Args:
        folder: Of a run, or of an adapter that ``xgblora export`` wrote.

    Raises:
        XgbloraError: It holds no finished run, a file is damaged, or it does not say what the model is asked.
    """
    adapter = adapter_of(folder)
    fingerprint = verify(adapter)
    settings = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if (adapter / TASK).is_file():
        task = load_task(adapter / TASK, rows=False)
    elif settings:  # of an earlier version
        with naming(str(folder)):
            task = task_of(RunConfig(output_dir=str(folder), **_task_settings(settings)))
    else:
        raise XgbloraError(f"{adapter} does not say what the model is asked: {adapter / TASK} is missing")
    return FinishedRun(
        folder=folder,
        adapter=adapter,
        model_name=base_name(folder, adapter),
        dtype=of_settings(settings) if settings else str(fingerprint["base dtype"]).removeprefix("torch."),
        task=task,
        max_length=settings.get("max_length", LONGEST),
        boosters=len(read_json(adapter / LEDGER)["boosters"]) + 1,
        settings=settings,
    )


def asking(task: Task | Chat, folder: Path, example: str = "a text") -> str:
    """The command that asks the model of a run: ``predict FOLDER "a text"``.

    Args:
        task: Of the run.
        folder: Of the run.
        example: Where a text will do.
    """
    if isinstance(task, Chat):
        return f"chat {folder.as_posix()}"
    return f"predict {folder.as_posix()} " + (f'"{example}"' if len(task.asking) == 1 else "--file rows.csv")


def _task_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in ("task_file", "task_name")}


class RunPredictor(Predictor):
    """A :class:`Predictor` of a finished run."""

    ledger: Ledger
    """Its boosters."""


def open_finished(run: FinishedRun, config: UseConfig) -> RunPredictor:
    """Load the model of a run with its boosters, ready to be asked.

    Args:
        run: From :func:`read_finished`.
        config: How many boosters, and where the model is.

    Raises:
        XgbloraError: The base model cannot be had, or is another one; or there are fewer boosters.
    """
    count = run.boosters
    if config.boosters is not None and config.boosters > count:
        raise XgbloraError(f"{run.folder} has {count} boosters: --boosters takes 0 to {count}, got {config.boosters}")
    name = config.model_name or run.model_name
    settings = RunConfig(
        output_dir=str(run.folder),
        model_name=name,
        trust_remote_code=config.trust_remote_code,
        use_cpu=config.use_cpu,
        dtype=run.dtype,  # type: ignore[arg-type]
        memory_budget=config.memory_budget,
        load_4bit=run.settings.get("load_4bit", False),
        load_8bit=run.settings.get("load_8bit", False),
    )
    model, tokenizer = load_configured(settings)
    base = Base(model.to(settings.device))
    require_same_inputs(base, lambda: {"adapter": digest(run.adapter / WEIGHTS)})
    ledger = load_adapters(base, run.adapter)
    if config.boosters is not None:
        ledger.truncate(config.boosters)
    predictor = RunPredictor(base, tokenizer, run.task, config.batch_size, run.max_length)
    predictor.ledger = ledger
    return predictor


def load_run(folder: str | Path, boosters: int | None = None, batch_size: int = 16) -> RunPredictor:
    """The model of a finished run, ready to predict.

    Args:
        folder: Of a run, or of an adapter that ``xgblora export`` wrote. It says which base, task and precision.
        boosters: Only the first so many; 0 is the bare base. Default: all.
        batch_size: As :class:`Predictor` takes it.

    Raises:
        XgbloraError: There is no finished run, or its base model cannot be had.

    Example::

        with xgblora.load_run("runs/mine") as model:
            model.predictions(["a warm and funny film"])[0].probability  # 0.97
    """
    return open_finished(read_finished(Path(folder)), UseConfig(boosters=boosters, batch_size=batch_size))
