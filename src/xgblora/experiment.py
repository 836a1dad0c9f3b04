"""Methods x seeds: every arm the same data, the same initial A, the same directions; resumable; figures at the end."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from transformers.hf_argparser import HfArg

from xgblora.config import Method, Recipe, RunConfig, arm, of_recipe
from xgblora.errors import XgbloraError
from xgblora.files import write_json
from xgblora.report import Curves, draw_eval, draw_loss, draw_merge_eval, draw_summary, read_curves, summarise
from xgblora.run import CONFIG, METRICS, Workspace, finished_metrics, run, task_of
from xgblora.tasks import Task

logger = logging.getLogger(__name__)


@dataclass
class ExperimentConfig(RunConfig):
    """The flags of ``compare`` and ``boost``: those of a run, with other defaults, seeds and figures."""

    model_name: str = HfArg(default="facebook/opt-350m", help="Hub id, local folder or .gguf file of the base model.")
    task_name: str = HfArg(default="SST2", help="Name of the task.")
    learning_rate: float = HfArg(default=1e-5, help="Learning rate of every arm.")
    max_steps: int = HfArg(default=20000, help="Training steps of every arm.")
    xgblora_steps_per_iteration: int = HfArg(default=1000, help="Steps between merges; 0: epochs decide.")
    eval_steps: float | None = HfArg(default=100, help="Steps between evaluations on the development examples.")
    output_root: str | None = HfArg(default=None, help="Folder of the comparison; default runs/<verb>_<task>.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Seeds; each arm is trained once with each.")
    methods: list[str] = HfArg(
        default_factory=list,
        help="What compare compares: lora, xgblora, boost (XGBLoRA by --recipe boost), in-context (nothing trained). "
        "Default: lora, xgblora and, where the task is no conversation, in-context.",
    )
    in_context_examples: int = HfArg(
        default=8,
        help="Method in-context: answered examples in front of every prompt, drawn by the seed from the training rows.",
    )
    skip_completed: bool = HfArg(
        default=False, help="Go on with a broken comparison: keep finished runs, resume the unfinished one."
    )
    loss_figure_path: str | None = HfArg(
        default=None, aliases=["--loss_figure", "--loss-figure"], help="Default: loss.png in the folder."
    )
    figure_path: str | None = HfArg(
        default=None, aliases=["--summary_figure", "--summary-figure"], help="Default: summary.png in the folder."
    )
    merge_eval_figure_path: str | None = HfArg(
        default=None, aliases=["--merge_eval_figure", "--merge-eval-figure"], help="Default: merge_eval.png there."
    )
    eval_figure: str | None = HfArg(default=None, help="Default: eval.png in the folder.")

    def __post_init__(self) -> None:
        self.output_dir = self.output_root or "runs"
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise XgbloraError(f"--seeds must be different numbers of 0 or more, got {self.seeds}")
        known = get_args(Method)
        if len(set(self.methods)) != len(self.methods) or not set(self.methods) <= set(known):
            raise XgbloraError(f"--methods must be different ones of {', '.join(known)}, got {' '.join(self.methods)}")
        super().__post_init__()

    @property
    def makes_boosters(self) -> bool:
        """Whether any arm has boosters: those start from ``--init_adapter``, arms of LoRA do not."""
        return not self.methods or not set(self.methods) <= {"lora", "in-context"}


@dataclass(frozen=True)
class Result:
    """``runs`` in order of method and seed, and the ``files`` that show them."""

    runs: list[Curves]
    files: list[Path]


def arms(config: ExperimentConfig) -> list[RunConfig]:
    """The configuration of every run, without flags that another arm's recipe was given them for."""
    root = Path(str(config.output_root))
    methods = config.methods or ["lora", "xgblora", "in-context"]
    if not config.methods and not isinstance(task_of(config), Task):
        methods.remove("in-context")  # conversations take no demonstrations
    recipes: dict[str, Recipe] = {method: "boost" if method == "boost" else "classic" for method in methods}
    runs = []
    for method, recipe in recipes.items():
        of_others: dict[str, Any] = {}
        for other in set(recipes.values()) - {recipe}:
            of_others |= of_recipe(other)
        for seed in config.seeds:
            folder = str(root / f"{method}_seed{seed}")
            if method == "in-context":
                of_others |= {"num_train": min(config.in_context_examples, config.train_rows)}
            runs.append(arm(config, cast(Method, method), seed=seed, data_seed=seed, output_dir=folder, **of_others))
    return runs


def experiment(config: ExperimentConfig) -> Result:
    """Run every arm, then write ``summary.json`` and the figures.

    Finished runs of the same configuration are kept with ``skip_completed``, or when all are finished; a run of
    another configuration is never reused. Raises :class:`XgbloraError` in front of an unfinished comparison
    without ``skip_completed`` or ``overwrite_output_dir``.
    """
    runs = arms(config)
    finished = [finished_metrics(each) is not None for each in runs]
    begun = [(Path(str(each.output_dir)) / CONFIG).is_file() for each in runs]
    if all(finished):
        logger.info(
            "All %d runs of %s are complete (--overwrite_output_dir trains again)", len(runs), config.output_root
        )
    elif any(begun) and not (config.skip_completed or config.overwrite_output_dir):
        raise XgbloraError(
            f"{config.output_root} holds an unfinished comparison ({sum(finished)} of {len(runs)} runs complete): "
            "go on with --skip_completed or start again with --overwrite_output_dir"
        )
    # Neither a fit, whose step length undoes the scaling, nor what is not trained.
    scalings = {each.scaling for each in runs if each.recipe == "classic" and each.trainer != "none"}
    if len(scalings) > 1:
        logger.warning(
            "The methods differ in scaling (alpha/r: %s) and so in step size: --lora_rank 1 compares alike",
            " and ".join(str(s) for s in sorted(scalings)),
        )
    workspace = None
    # Rows are shared by all arms: an arm that trains says how many.
    trained = next((each for each in runs if each.trainer != "none"), runs[0])
    for number, (each, done) in enumerate(zip(runs, finished, strict=True), start=1):
        if not done:
            workspace = workspace or Workspace(trained)
            logger.info("Run %d of %d: %s", number, len(runs), Path(str(each.output_dir)).name)
            run(each, workspace)
    return report(config, [Path(str(each.output_dir)) for each in runs])


def report(config: ExperimentConfig, folders: Sequence[Path]) -> Result:
    """Summary and figures of finished runs."""
    root = Path(str(config.output_root))
    curves = [read_curves(folder) for folder in folders]
    summary = root / "summary.json"
    write_json(summary, summarise(curves) | {"identical_loss_curves": _identical(curves)})
    for seed, same in _identical(curves).items():
        if same:
            logger.info("Seed %s: the loss curves of all methods are identical", seed)
    figures = [
        (draw_loss, config.loss_figure_path, "loss.png"),
        (draw_summary, config.figure_path, "summary.png"),
        (draw_merge_eval, config.merge_eval_figure_path, "merge_eval.png"),
        (draw_eval, config.eval_figure, "eval.png"),
    ]
    trained = [run for run in curves if run.metrics.get("seconds_per_step") is not None]
    files = []
    for draw, asked, name in figures:
        path = Path(asked) if asked else root / name
        if draw in (draw_eval, draw_merge_eval) and not any(run.evals for run in curves):
            continue  # nothing was evaluated on the way
        if draw is draw_summary and not trained:
            continue
        draw(curves if draw is draw_summary or not trained else trained, path)
        files.append(path)
    return Result(curves, [*files, summary, *(folder / METRICS for folder in folders)])


def _identical(curves: Sequence[Curves]) -> dict[str, bool]:
    """For each seed with several methods: whether their training losses are equal to the last bit."""
    seeds: dict[str, list[list[float]]] = {}
    for each in curves:
        if each.metrics["trainer"] != "none":
            seeds.setdefault(str(each.seed), []).append([line["loss"] for line in each.loss])
    return {seed: all(loss == group[0] for loss in group) for seed, group in seeds.items() if len(group) > 1}
