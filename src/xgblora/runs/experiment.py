"""Methods x seeds: every arm the same data, the same first A, the same directions; resumable; figures at the end."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xgblora import agreement, group
from xgblora.config import NOT_NEGATIVE, POSITIVE, RunConfig, flag
from xgblora.errors import XgbloraError
from xgblora.files import write_json
from xgblora.progress import quiet
from xgblora.report import (
    REPORT,
    Curves,
    draw_eval,
    draw_loss,
    draw_merge_eval,
    draw_summary,
    read_curves,
    short,
    summarise,
)
from xgblora.runs.arms import METHODS, arm, arm_folder, idle_notes
from xgblora.runs.folder import CONFIG, contents, finished_result, folder_of, task_of
from xgblora.runs.html_report import report_at_the_end
from xgblora.runs.job import Job, time_left
from xgblora.runs.launch import LaunchFlags, carried_out
from xgblora.runs.run import attach_for
from xgblora.runs.run_yaml import RUN_YAML, write_run_yaml
from xgblora.runs.workspace import Workspace
from xgblora.tasks import Chat, Task
from xgblora.training.interruption import alone_in

logger = logging.getLogger(__name__)


@dataclass
class ExperimentConfig(RunConfig, LaunchFlags):
    """The flags of ``compare`` and ``boost``: those of a run, with other defaults, seeds and figures."""

    model_name: str = flag("facebook/opt-350m", "Hub id, local folder or .gguf file of the base model.")
    task_name: str = flag("SST2", "Name of the task.")
    learning_rate: float = flag(1e-5, "Learning rate of every arm.")
    max_steps: int = flag(20000, "Training steps of every arm.")
    xgblora_steps_per_iteration: int = flag(1000, "Steps between merges; 0: epochs decide.")
    eval_steps: float | None = flag(100, "Steps between evaluations on the development examples.")
    output_root: str | None = flag(None, "Folder of the comparison; default runs/<verb>_<task>.")
    seeds: list[int] = flag(lambda: [0, 1, 2], "Seeds; each arm is trained once with each.")
    methods: list[str] = flag(
        list,
        "What compare compares: lora, xgblora, boost (XGBLoRA by --recipe boost), backprop (LoRA by Adam); with "
        "nothing trained: in-context, calibrated, centroid, probe (--readout). "
        "Default: lora, xgblora and, where the task is no conversation, in-context.",
    )
    backprop_learning_rate: float = flag(5e-4, "Method backprop: learning rate of Adam, which falls to 0.", POSITIVE)
    in_context_examples: int = flag(
        8,
        "Method in-context: answered examples in front of every prompt, drawn by the seed from the training rows.",
        NOT_NEGATIVE,
    )
    skip_completed: bool = flag(False, "Go on with a broken comparison: keep finished runs, resume the unfinished one.")
    loss_figure_path: str | None = flag(
        None, "Default: loss.png in the folder.", aliases=("--loss_figure", "--loss-figure")
    )
    figure_path: str | None = flag(
        None, "Default: summary.png in the folder.", aliases=("--summary_figure", "--summary-figure")
    )
    merge_eval_figure_path: str | None = flag(
        None, "Default: merge_eval.png in the folder.", aliases=("--merge_eval_figure", "--merge-eval-figure")
    )
    eval_figure: str | None = flag(None, "Default: eval.png in the folder.")

    def __post_init__(self) -> None:
        self.output_dir = self.output_root or "runs"
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise XgbloraError(f"--seeds must be different numbers of 0 or more, got {self.seeds}")
        if len(set(self.methods)) != len(self.methods) or not set(self.methods) <= set(METHODS):
            raise XgbloraError(
                f"--methods must be different ones of {', '.join(METHODS)}, got {' '.join(self.methods)}"
            )
        self.require_launchable()
        super().__post_init__()

    @property
    def fits_boosters(self) -> bool:
        """Whether recipe boost is one of the methods: what it needs of the prompts, all methods get."""
        return super().fits_boosters or "boost" in self.methods

    @property
    def makes_boosters(self) -> bool:
        """Whether any arm has boosters: those start from ``--init_adapter``, arms of LoRA do not."""
        return not self.methods or bool({"xgblora", "boost"} & set(self.methods))


@dataclass(frozen=True)
class Result:
    """What a comparison left behind."""

    runs: list[Curves]
    """In order of method and seed."""
    files: list[Path]
    """What shows them."""


def arms(config: ExperimentConfig) -> list[RunConfig]:
    """The configuration of every run, in order of method and seed."""
    methods, task = config.methods or ["lora", "xgblora", "in-context"], task_of(config)
    if not config.methods and not isinstance(task, Task):
        methods.remove("in-context")  # conversations take no demonstrations
    _require_possible(methods, task)
    ways: dict[str, dict[str, Any]] = {
        "in-context": {"num_train": min(config.in_context_examples, config.train_rows)},
        "backprop": {"learning_rate": config.backprop_learning_rate},
    }
    runs = []
    for method in methods:
        for seed in config.seeds:
            folder = str(arm_folder(Path(str(config.output_root)), method, seed))
            same = {"seed": seed, "data_seed": seed, "prompt_beginning": config.prompt_beginning}
            runs.append(arm(config, method, output_dir=folder, **same, **ways.get(method, {})))
    return runs


def _require_possible(methods: Sequence[str], task: Task | Chat) -> None:
    """Raise :class:`XgbloraError` where the task does not have what a method needs."""
    fixed = isinstance(task, Task) and task.has_same_options
    for method in ("centroid", "probe"):
        if method in methods and not fixed:
            raise XgbloraError(
                f"method {method} is for the same options in every row, {task.name} has others: leave it out"
            )
    if "calibrated" in methods and not (isinstance(task, Task) and task.null_prompt):
        raise XgbloraError(
            f"method calibrated compares with a prompt that asks nothing: {task.name} has no null_prompt"
        )


def experiment(config: ExperimentConfig, verb: str = "compare") -> Result:
    """Run every arm, then write ``summary.json`` and the figures. ``run.yaml`` says how to do so again.

    Finished runs of the same configuration are kept with ``skip_completed``, or when all are finished; a run of
    another configuration is never reused.

    Args:
        config: The comparison.
        verb: The command that ``run.yaml`` names.

    Returns:
        The finished runs, and the files that show them; nothing on all but the first of several processes.

    Raises:
        XgbloraError: As :func:`run` does; and in front of an unfinished comparison without ``skip_completed`` or
            ``overwrite_output_dir``.
    """
    runs = arms(config)
    group.meet(config.ddp_timeout)
    finished, begun = agreement.of_first(lambda: ([*map(_is_finished, runs)], [*map(_is_begun, runs)]))
    if all(finished):
        logger.info(
            "All %d runs of %s are complete (--overwrite_output_dir trains again)", len(runs), config.output_root
        )
    elif any(begun) and not (config.skip_completed or config.overwrite_output_dir):
        raise XgbloraError(
            f"{config.output_root} holds an unfinished comparison ({sum(finished)} of {len(runs)} runs complete): "
            "go on with --skip_completed or start again with --overwrite_output_dir"
        )
    if not group.first():  # it shares the runs, and writes nothing
        if not all(finished):
            _carry_out(config, runs)
        return Result([], [])
    root = Path(str(config.output_root))
    with alone_in(root):
        if not all(finished):
            write_run_yaml(root, verb, config, contents(config))
            _carry_out(config, runs)
        return report(config, [folder_of(configured) for configured in runs])


def _is_finished(configured: RunConfig) -> bool:
    return finished_result(configured) is not None


def _is_begun(configured: RunConfig) -> bool:
    return (folder_of(configured) / CONFIG).is_file()


def _carry_out(config: ExperimentConfig, runs: Sequence[RunConfig]) -> None:
    for note in idle_notes(config, runs):
        logger.info("Note: %s", note)
    # Neither a fit, whose step length undoes the scaling, nor what is not trained.
    scalings = {
        configured.scaling for configured in runs if configured.recipe == "classic" and configured.trainer != "none"
    }
    if len(scalings) > 1:
        logger.warning(
            "The methods differ in scaling (alpha/r: %s) and so in step size: --lora_rank 1 compares alike",
            " and ".join(str(s) for s in sorted(scalings)),
        )
    # Rows are shared by all arms: an arm that trains says how many.
    trained = next((configured for configured in runs if configured.trainer != "none"), runs[0])
    finished = agreement.of_first(lambda: [*map(_is_finished, runs)])
    left = [configured for configured, done in zip(runs, finished, strict=True) if not done]
    in_turn = config.launcher == "one_by_one"
    if not in_turn:  # one of each method first: what a method refuses is seen at once
        left.sort(key=lambda configured: config.seeds.index(configured.seed))
    try:
        jobs = _announced(left, trained, len(runs), in_turn)
        for done in carried_out(jobs, len(left), config, left, lambda: _workspace(trained, left)):
            logger.info("%s", short(done.result()))
    except XgbloraError:
        if group.first() and not any(map(_is_begun, runs)):  # nothing was begun, so nothing stays
            (Path(str(config.output_root)) / RUN_YAML).unlink(missing_ok=True)
        raise


def _announced(left: Sequence[RunConfig], trained: RunConfig, whole: int, in_turn: bool) -> Iterator[Job]:
    """The runs that are left, each with a line when it begins."""
    begun = time.monotonic()
    for number, configured in enumerate(left):
        ahead = ""
        if number and in_turn:  # each as long as those before it, on average
            ahead = time_left((time.monotonic() - begun) / number * (len(left) - number))
        place = whole - len(left) + number + 1
        logger.info("Run %d of %d: %s%s", place, whole, folder_of(configured).name, ahead)
        yield Job(configured, trained)


def _workspace(trained: RunConfig, left: Sequence[RunConfig]) -> Workspace:
    """What serves all runs that are left. What it refuses, it refuses before any run."""
    workspace = Workspace(trained)
    for configured in left:
        if configured.keep_file:
            workspace.kept(configured)
        if configured.trainer != "none" and configured.seed == left[0].seed:
            with quiet("xgblora"):
                attach_for(configured, workspace.base, workspace.classification).detach()
    return workspace


def report(config: ExperimentConfig, folders: Sequence[Path]) -> Result:
    """Write summary and figures of finished runs."""
    root = Path(str(config.output_root))
    curves = [read_curves(folder) for folder in folders]
    identical = _identical(curves)
    summary = root / "summary.json"
    write_json(summary, summarise(curves) | {"identical_loss_curves": identical})
    for seed, same in identical.items():
        if same:
            logger.info("Seed %s: the loss curves of all methods are identical", seed)
    figures = [
        (draw_loss, config.loss_figure_path, "loss.png"),
        (draw_summary, config.figure_path, "summary.png"),
        (draw_merge_eval, config.merge_eval_figure_path, "merge_eval.png"),
        (draw_eval, config.eval_figure, "eval.png"),
    ]
    trained = [curve for curve in curves if curve.result.trainer != "none"]
    files = []
    for draw, asked, name in figures:
        path = Path(asked) if asked else root / name
        if draw in (draw_eval, draw_merge_eval) and not any(curve.evals for curve in curves):
            continue  # nothing was evaluated on the way
        if draw is draw_summary and not trained:
            continue
        draw(curves if draw is draw_summary or not trained else trained, path)
        files.append(path)
    return Result(curves, [*files, summary, *report_at_the_end(folders, root / REPORT)])


def _identical(curves: Sequence[Curves]) -> dict[str, bool]:
    """For each seed with several methods: whether their training losses are equal to the last bit."""
    seeds: dict[str, list[list[float]]] = {}
    for curve in curves:
        if curve.result.trainer != "none":
            seeds.setdefault(str(curve.result.seed), []).append([line["loss"] for line in curve.loss])
    return {seed: all(loss == group[0] for loss in group) for seed, group in seeds.items() if len(group) > 1}
