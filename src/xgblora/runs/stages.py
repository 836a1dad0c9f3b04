"""Staged evaluation of a finished run: accuracy and loss with its first 0, 1, ... boosters."""

from dataclasses import asdict, dataclass
from pathlib import Path

from xgblora import group
from xgblora.adapters.boosters import load_adapters
from xgblora.adapters.plain_peft import WEIGHTS
from xgblora.config import RunConfig, flag, of_settings
from xgblora.files import digest, read_json, write_json
from xgblora.learn.evaluate import evaluate_stages
from xgblora.report import draw_stages
from xgblora.runs.folder import ADAPTER, CONFIG, require_finished
from xgblora.runs.sharing import require_same_inputs
from xgblora.runs.workspace import Workspace

STAGES = "stages.json"
WORKSPACE = (
    "model_name task_name task_file data_dir num_train num_dev num_eval train_set_seed max_length prompt_beginning "
    "train_as_classification only_train_option per_device_eval_batch_size disable_tqdm"
).split()
"""Settings of a run that say which model sees which rows."""


@dataclass
class StagesConfig:
    """The flags of ``stages``: all else is the run's own."""

    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")


@dataclass(frozen=True)
class Stage:
    """The model with its first boosters."""

    boosters: int
    rows: int
    """Evaluation rows, so that a reader can say how far chance reaches."""
    accuracy: float
    loss: float
    dev_accuracy: float | None
    """None for a run without dev rows."""
    dev_loss: float | None


def stages(run: Path, asked: StagesConfig) -> tuple[list[Stage], list[Path]]:
    """Evaluate every stage of a finished run on its dev and its evaluation rows; write table and figure.

    Args:
        run: The run's folder.
        asked: What does not follow from the run.

    Returns:
        The stages and the files, which the first of several processes writes.

    Raises:
        XgbloraError: The folder holds no finished run.
    """
    require_finished(run)
    settings = read_json(run / CONFIG)
    rows_and_model = {name: settings[name] for name in WORKSPACE}
    config = RunConfig(output_dir=str(run), dtype=of_settings(settings), **vars(asked), **rows_and_model)
    group.meet(config.ddp_timeout)
    workspace = Workspace(config)
    weights = run / ADAPTER / WEIGHTS
    require_same_inputs(workspace.base, lambda: workspace.contents(config) | {"adapter": digest(weights)})
    adapters = load_adapters(workspace.base, run / ADAPTER).adapters
    scored = {}
    for name, rows in ((workspace.eval_split, workspace.eval), ("dev", workspace.dev)):
        if rows:
            progress = None if config.disable_tqdm else f"stages, {name} rows"
            size = config.per_device_eval_batch_size
            scored[name] = evaluate_stages(adapters, rows, workspace.loss, size, progress)
    table = []
    for count, test in enumerate(scored[workspace.eval_split]):
        dev = scored["dev"][count] if "dev" in scored else None
        chosen_by = (dev.accuracy, dev.loss) if dev else (None, None)
        table.append(Stage(count, len(workspace.eval), test.accuracy, test.loss, *chosen_by))
    if not group.first():
        return table, []
    write_json(run / STAGES, [asdict(stage) for stage in table])
    figure = run / "stages.png"
    draw_stages(
        {name: [(stage.accuracy, stage.loss) for stage in evaluations] for name, evaluations in scored.items()}, figure
    )
    return table, [run / STAGES, figure]
