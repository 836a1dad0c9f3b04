"""A search for the flags with the lowest dev loss: trials by Optuna, each a run of its own, on any launcher."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xgblora.config import RunConfig, decisive, differences, flag
from xgblora.errors import DivergedError, XgbloraError
from xgblora.files import write_json
from xgblora.report import TrialResult, Trials, draw_trials
from xgblora.runs.arms import variant
from xgblora.runs.folder import contents, folder_of, task_of
from xgblora.runs.job import Finished, Job, time_left
from xgblora.runs.launch import LaunchFlags, carried_out
from xgblora.runs.run_yaml import write_run_yaml
from xgblora.runs.search import Searched, Value, as_given, in_words, parse_search, require_possible, usual_search
from xgblora.runs.workspace import Workspace
from xgblora.training.interruption import alone_in

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import JournalStorage

logger = logging.getLogger(__name__)

STUDY = "study.journal"
"""The record of all trials, as Optuna keeps it: optuna-dashboard reads it, too."""
NAME = "xgblora"
"""Of the study in it."""
TRIALS, PICTURE, BEST = "trials.json", "trials.png", "best.yaml"
EVALUATIONS = 10
"""Of a trial, where nothing else is asked for: at each it may be ended."""
WARM = 3
"""One part in so many of a trial is carried out before it may be ended."""
JUDGES = 5
"""Trials that are not ended early: others are compared with them."""


@dataclass
class TuneConfig(RunConfig, LaunchFlags):
    """The flags of ``tune``: those of a run, what is searched, and how trials are carried out."""

    search: list[str] = flag(
        list,
        "What is tried: NAME=LOW..HIGH (numbers with a point evenly in their logarithm) or NAME=A,B,C, of flags of "
        "xgblora train. Default: learning_rate, zo_eps, lora_rank, xgblora_layers: those with an effect.",
    )
    trials: int = flag(20, "Trials in all; the first one has the flags as they are given.")
    prune: bool = flag(True, "End a trial whose dev loss is above the median of earlier ones at the same step.")
    output_root: str | None = flag(None, "Folder of the trials; default runs/tune_<task>.")

    def __post_init__(self) -> None:
        self.output_dir = self.output_root = (
            self.output_root or f"runs/tune_{Path(self.task_file or self.task_name).stem}"
        )
        if self.trials < 1:
            raise XgbloraError(f"--trials must be at least 1, got {self.trials}")
        self.require_launchable()
        super().__post_init__()
        if self.trainer == "none":
            raise XgbloraError("--trainer none trains nothing, so there is nothing to tune")


@dataclass(frozen=True)
class Tuned:
    """What a search left behind."""

    trials: Trials
    folder: Path
    """Of the best trial's run."""
    files: list[Path] = field(default_factory=list)
    """What repeats the best one, and shows all of them."""


class Pruned(XgbloraError):
    """A trial was ended because earlier ones were better at the same step."""


class _Judge(TrainerCallback):
    """Reports every dev loss of a trial to the study, and ends the trial where that advises it."""

    def __init__(self, study: Path, number: int) -> None:
        self.study = study
        self.number = number

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        from optuna.pruners import MedianPruner

        trial = _trial(self.study, self.number)
        trial.study.pruner = MedianPruner(n_startup_trials=JUDGES, n_warmup_steps=state.max_steps // WARM)
        trial.report(_loss(metrics), state.global_step)
        if state.global_step < state.max_steps and trial.should_prune():
            raise Pruned(f"trial {self.number} was ended at step {state.global_step}")


def _loss(metrics: dict[str, float]) -> float:
    """What is to be low: the loss of dev rows or, with a reward, minus that."""
    return -metrics["eval_reward"] if "eval_reward" in metrics else metrics["eval_loss"]


def tune(config: TuneConfig) -> Tuned:
    """Carry out trials, or those that are left of them, and write down which was best.

    Carried out one by one, a trial follows from the flags and the trials before it, also where the search was stopped
    in between. Test rows choose nothing.

    Args:
        config: What is tried.

    Returns:
        The trials, and the best one.

    Raises:
        XgbloraError: As :func:`~xgblora.runs.run.run` does; Optuna is not installed; the folder holds other trials;
            or no trial came to its end.
    """
    root = Path(str(config.output_root))
    searched = parse_search(config.search) if config.search else usual_search(config)
    require_possible(config, searched)
    task = task_of(config)
    if not (task.num_dev if config.num_dev is None else config.num_dev):
        raise XgbloraError("the best trial is the one with the lowest dev loss: set --num_dev above 0")
    given = as_given(config, searched) or {}
    first = _configured(config, 0, given)  # refused now, where anything is
    for one in searched:
        for value in one.values:
            _configured(config, 0, given | {one.name: value})
    with alone_in(root):
        study = _study(config, root, searched)
        write_run_yaml(root, "tune", config, contents(config))
        jobs = _jobs(config, study, first, searched)
        left = config.trials - _ended(study)
        for done in carried_out(jobs, left, config, [first], lambda: Workspace(first)) if left > 0 else ():
            _tell(study, done)
        return _report(config, study, root, searched)


def _configured(config: TuneConfig, number: int, values: dict[str, Value]) -> RunConfig:
    """The run of a trial."""
    settings: dict[str, Any] = dict(values)
    if config.recipe == "classic" and config.eval_steps is None and config.eval_strategy == "no":
        settings["eval_strategy"] = "epoch" if config.max_steps < 0 else "steps"
        settings["eval_steps"] = None if config.max_steps < 0 else max(1, config.max_steps // EVALUATIONS)
    return variant(config, output_dir=str(_folder(config, number)), **settings)


def _folder(config: TuneConfig, number: int) -> Path:
    """Where the run of a trial lies."""
    return Path(str(config.output_root)) / f"trial_{number:03d}"


def _study(config: TuneConfig, root: Path, searched: Sequence[Searched]) -> "Study":
    """The study of a folder, made where there is none. Raises :class:`XgbloraError` where it is of other flags."""
    digests, search = contents(config), [str(one) for one in searched]
    facts = {"settings": decisive(config.resolved()), "search": search, "sha256": digests}
    if config.overwrite_output_dir:
        (root / STUDY).unlink(missing_ok=True)
    storage = _storage(root / STUDY)  # says what to install
    import optuna

    study = optuna.create_study(study_name=NAME, storage=storage, direction="minimize", load_if_exists=True)
    theirs = study.user_attrs
    if not theirs:
        for name, fact in facts.items():
            study.set_user_attr(name, fact)
        if as_given(config, searched) is None:
            logger.info("Note: the flags as given are no trial, since --search leaves their values out")
        return study
    different = differences(theirs["settings"], config.resolved())
    different += ["another --search"] if theirs["search"] != search else []
    different += [f"{what} has changed" for what, digest in digests.items() if theirs["sha256"].get(what) != digest]
    if different:
        raise XgbloraError(
            f"{root} holds trials of another configuration ({', '.join(different[:3])}): choose another --output_root, "
            "or --overwrite_output_dir to start again"
        )
    return study


def _storage(file: Path) -> "JournalStorage":
    """The record of trials in a file, made where there is none."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError as error:
        raise XgbloraError("xgblora tune needs Optuna: python -m pip install 'xgblora[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return JournalStorage(JournalFileBackend(str(file), JournalFileOpenLock(str(file))))


def _trial(file: Path, number: int) -> "Trial":
    """A trial that is at work."""
    import optuna

    storage = _storage(file)
    trial = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(NAME), number)
    return optuna.Trial(optuna.load_study(study_name=NAME, storage=storage), trial)


def _ended(study: "Study") -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _jobs(config: TuneConfig, study: "Study", rows: RunConfig, searched: Sequence[Searched]) -> Iterator[Job]:
    """Trials that were at work when the search was stopped, then new ones."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    begun, ended = time.monotonic(), _ended(study)
    broken = [trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]
    file = Path(str(config.output_root)) / STUDY
    while broken or _begun(study) < config.trials:
        if broken:
            trial = _trial(file, broken.pop(0))
        else:
            number = _begun(study)
            if not number and (given := as_given(config, searched)) is not None:
                study.enqueue_trial(given, skip_if_exists=True)
            # Of its own for every trial: a search that goes on draws what it would have drawn.
            seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
            study.sampler = TPESampler(seed=seed, n_startup_trials=max(1, config.trials // 3))
            trial = study.ask()
        values = {one.name: one.drawn_by(trial) for one in searched}
        ahead = ""
        if (done := _ended(study) - ended) and config.launcher == "one_by_one":
            ahead = time_left((time.monotonic() - begun) / done * (config.trials - trial.number))
        logger.info("Trial %d of %d: %s%s", trial.number + 1, config.trials, in_words(values), ahead)
        yield Job(_configured(config, trial.number, values), rows, [_Judge(file, trial.number)] * config.prune)


def _begun(study: "Study") -> int:
    from optuna.trial import TrialState

    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def _tell(study: "Study", done: Finished) -> None:
    """Note what became of a trial."""
    from optuna.trial import TrialState

    number = int(folder_of(done.job.config).name.rpartition("_")[2])
    if isinstance(done.error, Pruned):
        study.tell(number, state=TrialState.PRUNED)
        logger.info("Trial %d: ended early, as earlier ones were better", number + 1)
        return
    if isinstance(done.error, DivergedError):
        study.tell(number, state=TrialState.FAIL)
        logger.info("Trial %d: the loss diverged", number + 1)
        return
    result = done.result()
    loss = -result.dev_reward if result.dev_reward is not None else result.dev_loss
    assert loss is not None  # there are dev rows
    study.tell(number, loss)
    logger.info("Trial %d: dev %s; best %s", number + 1, f"{loss:.4f}", f"{study.best_value:.4f}")


def _report(config: TuneConfig, study: "Study", root: Path, searched: Sequence[Searched]) -> Tuned:
    """Write down all trials, show them, and write what repeats the best one."""
    from optuna.trial import TrialState

    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "ended early", TrialState.FAIL: "diverged"}
    given = as_given(config, searched)
    trials = [
        TrialResult(
            trial.number,
            given is not None and trial.number == 0,
            dict(trial.params),
            states[trial.state],
            trial.value if trial.state == TrialState.COMPLETE else None,
            trial.last_step,
            None if trial.duration is None else trial.duration.total_seconds(),
        )
        for trial in study.get_trials()
        if trial.state in states
    ]
    complete = [trial for trial in trials if trial.loss is not None]
    if not complete:
        raise XgbloraError(f"no trial in {root} came to its end: search lower learning rates")
    best = min(complete, key=lambda trial: (trial.loss, trial.number))
    again = variant(config, output_dir=None, **best.values)
    write_run_yaml(root, "train", again, contents(again), BEST, without=("output_dir",))
    content = {"search": [str(one) for one in searched], "best": best.number}
    write_json(root / TRIALS, content | {"trials": [vars(trial) for trial in trials]})
    measure = "dev loss" if config.reward is None else "minus the dev reward"
    shown = Trials(trials, best, measure, {one.name: one.log for one in searched})
    draw_trials(shown, f"{Path(config.model_name).name} on {task_of(config).name}", root / PICTURE)
    return Tuned(shown, _folder(config, best.number), [root / name for name in (BEST, PICTURE, TRIALS)])
