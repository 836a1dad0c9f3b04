"""An adapter from the log of its losses: every step is taken again, and nothing is forwarded."""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xgblora.adapters.boosters import Ledger, start_from
from xgblora.adapters.files import TASK
from xgblora.adapters.plain_peft import WEIGHTS
from xgblora.base import Base
from xgblora.base.load import load_configured
from xgblora.config import RunConfig, decisive, flag, of_settings
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.files import digest, read_json
from xgblora.learn.recorded import RecordedLoss
from xgblora.progress import Progress, quiet
from xgblora.runs.folder import ADAPTER, CONFIG
from xgblora.runs.run import attach_for
from xgblora.training.checkpoints import checkpoint_folder
from xgblora.training.record import REPLAY, read_jsonl
from xgblora.training.trainer import Trainer

WITHOUT: dict[str, Any] = {
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "early_stopping_boosters": 0,
    "reward": None,
    "objective": "likelihood",
    "reward_completions": None,
    "other_text": None,
    "task_file": None,
    "task_name": "SST2",
}
"""Settings of a run that have nothing to do with what its steps are."""


@dataclass
class ReplayConfig:
    """The flags of ``replay``: all else is the run's own."""

    step: int | None = flag(None, "Stop after this step. Default: the last one in the log.")
    output: str | None = flag(None, "Folder to write the adapter to. Default: replayed-STEP in the run's folder.")
    model_name: str | None = flag(None, "Base model, where it has moved since the run.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    folder: Path
    step: int
    seconds: float
    sha256: str
    """Of the adapter's weights."""
    same: dict[str, bool]
    """Whether they are the bytes of what the run itself left of that step, by the name of its folder."""

    def sentence(self) -> str:
        """Steps, time, and whether the bytes are those of the run."""
        judged = [f"{'the same' if same else 'OTHER'} bytes as {name}" for name, same in self.same.items()]
        about = f" ({', '.join(judged)})" if judged else ""
        took = f"{self.step:,} steps replayed in {self.seconds:.1f} s, without a forward"
        return f"{took}: SHA-256 {self.sha256[:16]}{about}"


class _StopAfter(TrainerCallback):
    """Writes the adapter after a step, and stops there."""

    def __init__(self, step: int, folder: Path, shown: Progress) -> None:
        self.step, self.folder, self.shown = step, folder, shown
        self.trainer: Trainer | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.shown.add(1)
        if state.global_step == self.step and self.trainer is not None:
            self.trainer.save_adapters(self.folder)
            control.should_training_stop = True


def replay(run: Path, asked: ReplayConfig, progress: bool = True) -> Replayed:
    """Rebuild the adapter of a zeroth-order run as it was after a step, from ``replay.jsonl``.

    Args:
        run: The run's folder; the run need not be finished.
        asked: Which step, and where to.
        progress: Show a bar.

    Raises:
        XgbloraError: There is no log, it does not reach the step, or the run is of another kind.

    Example::

        replay(Path("runs/mine"), ReplayConfig(step=200)).folder
    """
    for name in (CONFIG, REPLAY):
        if not (run / name).is_file():
            raise XgbloraError(
                f"{run / name} is missing: zeroth-order runs (--trainer zo) leave it, but for those by --recipe boost "
                "and --xgblora_init activations"
            )
    settings = read_json(run / CONFIG)
    if settings.get("base_score"):
        raise XgbloraError(f"{run} began with --base_score, whose booster is no step of the log: it is in its adapter")
    begin, *lines = read_jsonl(run / REPLAY) or [{}]
    rows, last = _reach(run / REPLAY, begin, lines, asked.step)
    step = last if asked.step is None else asked.step
    if not 1 <= step <= last:
        raise XgbloraError(f"--step must be 1 to {last}, the last step in {run / REPLAY}, got {step}")
    folder = Path(asked.output) if asked.output else run / f"replayed-{step}"
    if folder.exists():
        raise XgbloraError(f"{folder} exists already: choose another --output, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(settings, asked, scratch)
        model, _ = load_configured(config)
        base = Base(model.to(config.device), packed=True)  # nothing is forwarded: which way is faster need not be timed
        with quiet("xgblora", logging.ERROR):  # what the run said, it has said
            adapters = attach_for(config, base, classification=True)
        ledger = Ledger(adapters)
        ledger.task = settings["task_name"]
        if (task := run / ADAPTER / TASK).is_file():
            ledger.task_text = task.read_text(encoding="utf-8")
        if config.init_adapter:
            start_from(ledger, config.init_adapter)
        begun = time.perf_counter()
        with Progress(step, "replaying" if progress else None) as shown:
            stop = _StopAfter(step, folder, shown)
            loss = RecordedLoss((line["tokens"], line["losses"]) for line in lines)
            examples = [Example([1], [[1]], 0)] * rows
            stop.trainer = Trainer(model, config, ledger, examples, objective=loss, callbacks=[stop])
            with quiet("xgblora", logging.ERROR):
                stop.trainer.train()
        seconds = time.perf_counter() - begun
    sha256 = digest(folder / WEIGHTS)
    left = [checkpoint_folder(run, step), *([run / ADAPTER] if step == last else [])]
    same = {place.name: digest(place / WEIGHTS) == sha256 for place in left if (place / WEIGHTS).is_file()}
    return Replayed(folder, step, seconds, sha256, same)


def _reach(path: Path, begin: dict[str, Any], lines: Sequence[dict[str, Any]], asked: int | None) -> tuple[int, int]:
    """How many rows the run has, and the last step in its log. Raises where a gap comes before the step asked for."""
    if "rows" not in begin or not lines or lines[0]["step"] != 1:
        raise XgbloraError(f"{path} does not begin with the first step of a run")
    last = 0
    for line in lines:
        if not {"tokens", "losses"} <= set(line) or line["step"] - last not in (0, 1):
            if asked is None or asked > last:
                raise XgbloraError(f"{path} has a gap after step {last}: --step {last} replays what comes before it")
            break
        last = line["step"]
    return int(begin["rows"]), last


def _config(settings: dict[str, Any], asked: ReplayConfig, scratch: str) -> RunConfig:
    """The configuration of the run, without what its steps do not depend on."""
    named = {"dtype": of_settings(settings), "output_dir": scratch, "disable_tqdm": True}
    named |= {"trust_remote_code": asked.trust_remote_code, "use_cpu": settings.get("use_cpu", False)}
    if asked.model_name:
        named["model_name"] = asked.model_name
    return RunConfig(**decisive(settings) | WITHOUT | named)
