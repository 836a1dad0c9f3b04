"""The verbs that start a run, or show what one would be."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from xgblora import group
from xgblora.cli.output import print_table, set_up_output
from xgblora.cli.parsing import parse, parse_experiment, with_config
from xgblora.config import RunConfig, better
from xgblora.report import METRICS, REPORT, RunResult, closing, read_curves, results_table, trials_table
from xgblora.runs.arms import arm_folder
from xgblora.runs.check import CheckConfig
from xgblora.runs.check import check as carry_out_check
from xgblora.runs.demo import DemoConfig
from xgblora.runs.demo import demo as carry_out_demo
from xgblora.runs.experiment import ExperimentConfig, Result, arms, experiment
from xgblora.runs.finished import asking
from xgblora.runs.folder import ADAPTER, contents, dev_losses, folder_of, require_ours, task_of
from xgblora.runs.html_report import report_at_the_end
from xgblora.runs.plan import Plan, plan, whole
from xgblora.runs.run import run
from xgblora.runs.run_yaml import RunFile
from xgblora.runs.tune import TuneConfig
from xgblora.runs.tune import tune as carry_out_tune
from xgblora.runs.workspace import Workspace
from xgblora.training.record import TRAINING_LOSS

logger = logging.getLogger(__name__)


def train(verb: str, argv: list[str]) -> int:
    """One run."""
    set_up_output()
    argv, dry = _dry(argv)
    argv, file = with_config(RunConfig, verb, argv)
    config = parse(RunConfig, verb, argv)
    _note_changes(file, config)
    if dry:
        require_ours(config)
        return _say([(folder_of(config).name, plan(config, Workspace(config)))])
    run(config)
    if not group.first():
        return 0
    folder = folder_of(config)
    files = [folder / name for name in (ADAPTER, TRAINING_LOSS, METRICS)]
    files += report_at_the_end([folder], folder / REPORT)
    curves = read_curves(folder)
    _close(curves.result, folder, config)
    _show(Result([curves], [file for file in files if file.exists()]))
    _say_better([config])
    return 0


def compare(verb: str, argv: list[str]) -> int:
    """Methods over seeds."""
    return _experiment(verb, argv, None)


def boost(verb: str, argv: list[str]) -> int:
    """XGBLoRA over seeds."""
    return _experiment(verb, argv, lambda config: ["boost" if config.recipe == "boost" else "xgblora"])


def _experiment(verb: str, argv: list[str], methods: Callable[[ExperimentConfig], list[str]] | None) -> int:
    set_up_output()
    argv, dry = _dry(argv)
    argv, file = with_config(ExperimentConfig, verb, argv)
    config = parse_experiment(verb, argv)
    if methods is not None:
        config.methods = methods(config)
    _note_changes(file, config)
    if not dry:
        result = experiment(config, verb)
        if not group.first():
            return 0
        _show(result)
        _say_better(arms(config))
        return 0
    runs = arms(config)
    workspace = Workspace(runs[0])
    names = [folder_of(run).name for run in runs]
    planned = {
        _method(name): plan(run, workspace)
        for name, run in zip(names, runs, strict=True)
        if run.seed == config.seeds[0]
    }
    return _say([(name, planned[_method(name)]) for name in names])


def _method(name: str) -> str:
    return name.rpartition("_seed")[0]


def tune(verb: str, argv: list[str]) -> int:
    """Trials, and what repeats the best one."""
    set_up_output()
    argv, file = with_config(TuneConfig, verb, argv)
    config = parse(TuneConfig, verb, argv)
    _note_changes(file, config)
    tuned = carry_out_tune(config)
    best, first = tuned.trials.best, tuned.trials.all[0]
    print_table(trials_table(tuned.trials), [*tuned.files, tuned.folder])
    given = f"; the flags as given: {first.loss:.4f}" if first.given and first.loss is not None else ""
    print(f"Best: trial {best.number + 1}, {tuned.trials.measure} {best.loss:.4f}{given}.")
    _close(RunResult.read(tuned.folder), tuned.folder, config)
    print(f"To train it again, over other seeds: xgblora train --config {tuned.files[0].as_posix()} --seed 1")
    return 0


def check(verb: str, argv: list[str]) -> int:
    """What flags mean, without training."""
    set_up_output()
    argv, file = with_config(CheckConfig, verb, argv)
    config = parse(CheckConfig, verb, argv)
    _note_changes(file, config)
    return 0 if carry_out_check(config) else 1


def demo(verb: str, argv: list[str]) -> int:
    """The demo."""
    set_up_output()
    argv, _ = with_config(DemoConfig, verb, argv)
    config = parse(DemoConfig, verb, argv)
    result = carry_out_demo(config)
    _show(result)
    boosted = next((run.result for run in result.runs if run.result.method == "boost"), None)
    if boosted is not None:
        folder = arm_folder(Path(str(config.output_root)), "boost", boosted.seed)
        print()
        _close(boosted, folder, config, "a warm and funny film")
    return 0


def _close(result: RunResult, folder: Path, config: RunConfig, example: str = "a text") -> None:
    """Print what a run came to, and the command that asks its model, about ``example`` where a text will do."""
    task = task_of(config)
    for line in closing(result, dev_losses(folder), asking(task, folder, example)):
        print(line)


def _say_better(configs: Sequence[RunConfig]) -> None:
    """Print what would have done better, once."""
    for line in dict.fromkeys(filter(None, map(better, configs))):
        print(line)


def _dry(argv: list[str]) -> tuple[list[str], bool]:
    """Without ``--dry_run``, and whether it was there."""
    kept = [token for token in argv if token.replace("-", "_") != "__dry_run"]
    return kept, len(kept) < len(argv)


def _note_changes(file: RunFile | None, config: RunConfig) -> None:
    if file is not None:
        for what in file.changed(contents(config)):
            logger.warning("Note: %s is not what it was when %s was written", what, file.path)


def _say(plans: list[tuple[str, Plan]]) -> int:
    for name, one in plans:
        print(one.sentence(name))
    if len(plans) > 1:
        print(whole([one for _, one in plans]).sentence(f"all {len(plans)} runs"))
    print("Nothing was trained.")
    return 0


def _show(result: Result) -> None:
    print_table(results_table(result.runs), result.files)
