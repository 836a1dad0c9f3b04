"""Staged evaluation of a finished run: accuracy and loss with its first 0, 1, ... boosters."""

from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from xgblora.boosters import LEDGER, load_adapters
from xgblora.config import RunConfig
from xgblora.errors import XgbloraError
from xgblora.evaluation import evaluate_stages
from xgblora.files import read_json, write_json
from xgblora.report import draw_stages
from xgblora.run import CONFIG, Workspace

STAGES = "stages.json"
WORKSPACE = (
    "model_name task_name task_file data_dir num_train num_dev num_eval train_set_seed max_length "
    "train_as_classification only_train_option load_float16 load_bfloat16 per_device_eval_batch_size disable_tqdm"
).split()
"""Settings of a run that say which model sees which rows."""


@dataclass
class StagesConfig:
    """The flags of ``stages``: all else is the run's own."""

    trust_remote_code: bool = HfArg(default=False, help="Run Python code that comes with the model.")


@dataclass(frozen=True)
class Stage:
    """The model with its first ``boosters`` boosters; dev values are None for a run without dev rows."""

    boosters: int
    accuracy: float
    loss: float
    dev_accuracy: float | None
    dev_loss: float | None


def stages(run: Path, asked: StagesConfig) -> tuple[list[Stage], list[Path]]:
    """Evaluate every stage of the run in folder ``run`` on its dev and its evaluation rows; write table and figure.

    Returns the stages and the files. Raises :class:`XgbloraError` where the folder holds no finished run.
    """
    for file in (run / CONFIG, run / "adapter" / LEDGER):
        if not file.is_file():
            raise XgbloraError(f"{run} holds no finished run: {file} is missing")
    settings = read_json(run / CONFIG)
    config = RunConfig(output_dir=str(run), **vars(asked), **{name: settings[name] for name in WORKSPACE})
    workspace = Workspace(config)
    adapters = load_adapters(workspace.model, run / "adapter").adapters
    rows = {workspace.eval_split: workspace.eval, "dev": workspace.dev}
    size, kind = config.per_device_eval_batch_size, workspace.classification
    scored = {
        name: evaluate_stages(
            adapters,
            examples,
            workspace.packed,
            size,
            kind,
            None if config.disable_tqdm else f"stages, {name} rows",
            workspace.writer,
        )
        for name, examples in rows.items()
        if examples
    }
    found = []
    for count, test in enumerate(scored[workspace.eval_split]):
        dev = scored["dev"][count] if "dev" in scored else None
        found.append(Stage(count, test.accuracy, test.loss, dev.accuracy if dev else None, dev.loss if dev else None))
    write_json(run / STAGES, [asdict(stage) for stage in found])
    figure = run / "stages.png"
    draw_stages(
        {name: [(each.accuracy, each.loss) for each in evaluations] for name, evaluations in scored.items()}, figure
    )
    return found, [run / STAGES, figure]
