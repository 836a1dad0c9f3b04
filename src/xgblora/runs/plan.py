"""What a run will take, before it is begun: the model is loaded, three steps are timed, and all of it goes again."""

import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xgblora.adapters.boosters import Ledger
from xgblora.config import RunConfig, banner, changed
from xgblora.learn.drawn import PLACES, rows_for_steps
from xgblora.learn.evaluate import evaluate
from xgblora.learn.losses import AnswerLoss
from xgblora.learn.objectives import judges_of
from xgblora.learn.schedule import resolve
from xgblora.progress import quiet
from xgblora.runs.run import attach_for
from xgblora.runs.workspace import Workspace
from xgblora.training.record import CurveRecorder, PeakMemory
from xgblora.training.trainer import Trainer

logger = logging.getLogger(__name__)

TIMED_STEPS = 3
TIMED_EXAMPLES = 64
"""Development or evaluation rows that are scored, and that a booster is fitted on, to see how long one takes."""
SEARCHES = 7
"""Step lengths that the search for a booster's tries, as a rule."""


@dataclass(frozen=True)
class Plan:
    """What one run will take. Seconds were measured on this machine."""

    steps: int
    merges: int | None
    """None where the loss decides."""
    trained: int
    """Examples forwarded by training; both probes of a direction count."""
    evaluated: int
    """Examples scored."""
    training_seconds: float
    evaluation_seconds: float
    peak_mb: float
    """Of the timed steps."""

    @property
    def minutes(self) -> float:
        """All of it."""
        return (self.training_seconds + self.evaluation_seconds) / 60

    def sentence(self, what: str) -> str:
        """All of it in words."""
        merges = "merges where the loss says so" if self.merges is None else f"{self.merges} merges"
        return (
            f"{what}: {self.steps:,} steps, {merges}; {self.trained:,} examples forwarded to train and "
            f"{self.evaluated:,} to evaluate; about {self.minutes:.1f} minutes; peak memory {self.peak_mb:,.0f} MB"
        )


def plan(config: RunConfig, workspace: Workspace) -> Plan:
    """Time three steps (or a small booster) and some evaluations of a run, and say what all of it will take.

    Args:
        config: The run's. Nothing is written to its folder.
        workspace: With its model and rows.

    Raises:
        XgbloraError: As the run would.
    """
    if config.trainer != "none":
        for line in banner(config):
            logger.info(line)
    scored = _scored(config, workspace, workspace.loss)
    both = len(workspace.eval) + len(workspace.dev)
    if config.trainer == "none":
        shown = 1 + config.train_rows  # answered examples before each prompt
        return Plan(0, 0, 0, 2 * both, 0.0, (1 + shown) * both * scored, 0.0)
    memory = PeakMemory(config.device)
    rows = rows_for_steps(len(workspace.train)) if config.draws_pairs else len(workspace.train)
    steps_per_epoch = -(-rows // (config.per_device_train_batch_size * config.gradient_accumulation_steps))
    steps = config.max_steps if config.max_steps > 0 else round(config.num_train_epochs * steps_per_epoch)
    merges = resolve(config, steps, steps_per_epoch).expected_merges if config.xgblora else 0
    if config.recipe == "boost":
        trained, seconds = _fitted(config, workspace)
    elif config.draws_pairs:
        trained, seconds = _drawn(config, workspace, steps, 1 + (merges or 0))
    else:
        step_seconds, examples = _timed(config, workspace, workspace.train, TIMED_STEPS)
        trained, seconds = steps * examples // TIMED_STEPS, steps * step_seconds
    judge, on_the_way = judges_of(config, workspace.reward or workspace.loss)
    judged = _evaluations(config, steps, steps_per_epoch) * len(workspace.dev)
    alike = on_the_way is judge or not judged
    evaluation_seconds = 2 * both * scored + judged * (scored if alike else _scored(config, workspace, on_the_way))
    return Plan(steps, merges, trained, 2 * both + judged, seconds, evaluation_seconds, memory.read())


def _scored(config: RunConfig, workspace: Workspace, loss: AnswerLoss) -> float:
    """Seconds that it takes to score a row."""
    rows = (*workspace.dev, *workspace.eval)[:TIMED_EXAMPLES]
    begin = time.perf_counter()
    evaluate(workspace.base, rows, loss, config.per_device_eval_batch_size)
    return (time.perf_counter() - begin) / len(rows)


def _fitted(config: RunConfig, workspace: Workspace) -> tuple[int, float]:
    """Examples that recipe boost forwards, and its seconds: those of a small booster and its teacher, scaled up."""
    few = workspace.train[: min(TIMED_EXAMPLES, len(workspace.train))]
    small = changed(config, boost_boosters=1, boost_examples=len(few), boost_teacher_examples=len(few))
    seconds, examples = _timed(small, workspace, few, 1)
    rows = len(workspace.train)
    searched = config.boost_searched(rows)
    fitted, taught = min(rows - searched, config.boost_fitted), min(rows - searched, config.boost_teacher_examples)
    looks = config.boost_boosters - (fitted == taught)  # the first booster is fitted to what the teacher saw
    forwarded = taught + searched + looks * fitted + config.boost_boosters * SEARCHES * searched
    return forwarded, seconds * forwarded / max(examples, 1)


def _drawn(config: RunConfig, workspace: Workspace, steps: int, pairs: int) -> tuple[int, float]:
    """Examples that steps and pairs drawn from activations forward, and their seconds: as many for each example."""
    step_seconds, _ = _timed(config, workspace, workspace.train, TIMED_STEPS)
    rows = len(workspace.train)
    stepped = rows_for_steps(rows)
    of_step = PLACES * min(config.per_device_train_batch_size, stepped)
    forwarded = steps * of_step + pairs * min(config.xgblora_init_examples, rows - stepped)
    return forwarded, step_seconds * forwarded / of_step


@quiet("xgblora")  # of steps that are thrown away nobody wants to hear
def _timed(config: RunConfig, workspace: Workspace, rows: Sequence, steps: int) -> tuple[float, int]:  # type: ignore[type-arg]
    """Seconds of a step, and the examples that so many steps forward."""
    adapters = attach_for(config, workspace.base, workspace.classification)
    try:
        with tempfile.TemporaryDirectory(prefix="xgblora-") as folder:
            settings: dict[str, Any] = {
                **{"output_dir": folder, "save_strategy": "no", "eval_strategy": "no", "eval_steps": None},
                **{
                    "disable_tqdm": True,
                    "report_to": [],
                    "early_stopping_boosters": 0,
                    "load_best_model_at_end": False,
                },
                "resume_from_checkpoint": None,
            }
            short = changed(config, **settings | ({} if config.recipe == "boost" else {"max_steps": steps}))
            short.train_as_classification, short.num_dev = workspace.classification, workspace.num_dev
            ledger = Ledger(adapters)
            trainer = Trainer(workspace.base.model, short, ledger, rows, None, workspace.reward or workspace.loss)
            recorder = CurveRecorder(Path(folder), ledger)
            trainer.add_callback(recorder)
            trainer.train()
            return statistics.median(recorder.step_seconds), trainer.cost.sequences
    finally:
        adapters.detach()


def _evaluations(config: RunConfig, steps: int, steps_per_epoch: int) -> int:
    """How often the dev rows are scored on the way."""
    if config.eval_strategy == "no":
        return config.boost_boosters if config.recipe == "boost" and config.early_stopping_boosters else 0
    every = config.eval_steps if config.eval_strategy == "steps" else steps_per_epoch
    return int(steps / (every or 1)) if (every or 1) >= 1 else int(1 / float(every or 1))


def whole(plans: Sequence[Plan]) -> Plan:
    """Several runs, one after the other."""
    total = plans[0]
    for other in plans[1:]:
        total = replace(
            total,
            steps=total.steps + other.steps,
            merges=None if total.merges is None or other.merges is None else total.merges + other.merges,
            trained=total.trained + other.trained,
            evaluated=total.evaluated + other.evaluated,
            training_seconds=total.training_seconds + other.training_seconds,
            evaluation_seconds=total.evaluation_seconds + other.evaluation_seconds,
            peak_mb=max(total.peak_mb, other.peak_mb),
        )
    return total
