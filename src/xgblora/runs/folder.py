"""The folder of a run: whether it is this run's, what it holds, and how it is made ready."""

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig

from xgblora.adapters.files import LEDGER
from xgblora.config import RunConfig, differences
from xgblora.errors import XgbloraError
from xgblora.files import digest, is_part, read_json, remove_parts, remove_sealed, require_sealed, write_json
from xgblora.learn.rewards import reward_file
from xgblora.report import ANSWERS, METRICS, REPORT, RunResult
from xgblora.runs.environment import ENVIRONMENT
from xgblora.runs.run_yaml import RUN_YAML, write_run_yaml
from xgblora.tasks import Chat, Task, data_files, get_task, load_task
from xgblora.training.checkpoints import FILES, checkpoints
from xgblora.training.interruption import LOCK
from xgblora.training.record import EVAL_LOSS, REPLAY, TRAINING_LOSS

CONFIG = "config.json"
ADAPTER = "adapter"
STATE = "trainer_state.json"
WRITTEN = (METRICS, REPORT, ANSWERS, ENVIRONMENT, TRAINING_LOSS, EVAL_LOSS, REPLAY, STATE, RUN_YAML, CONFIG)
"""The files of a run, beside its adapter and its checkpoints."""
DIGESTS = "sha256"
"""The entry of ``config.json`` with the digests of the files that a run reads."""


def folder_of(config: RunConfig) -> Path:
    """The folder of a run."""
    return Path(str(config.output_dir))


def task_of(config: RunConfig) -> Task | Chat:
    """The task of a run: of its file, else of its name."""
    return load_task(config.task_file) if config.task_file else get_task(config.task_name)


def classifies(config: RunConfig, task: Task | Chat) -> bool:
    """Whether a run of a task scores options against each other; else it is trained as a language model."""
    return task.classification if config.train_as_classification is None else config.train_as_classification


def contents(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each local file that decides, beside the settings, what a run computes: task, data, reward, text."""
    data = data_files(task_of(config), config.data_dir)
    files = {f"the {split} data ({file.name})": file for split, file in data.items()}
    if config.task_file:
        files["--task_file"] = Path(config.task_file)
    if config.other_text:
        files["--other_text"] = Path(config.other_text)
    if config.keep_file:
        files["--boost_keep"] = config.keep_file
    if config.reward and (module := reward_file(config.reward)):
        files["--reward"] = module
    return {what: digest(file) for what, file in files.items() if file.is_file()}


def finished_result(config: RunConfig) -> RunResult | None:
    """The result of this very run, where its folder holds it. Raises as :func:`require_ours` does."""
    folder = folder_of(config)
    if config.overwrite_output_dir or not (folder / METRICS).is_file():
        return None
    require_ours(config)
    try:
        return RunResult.read(folder)
    except XgbloraError as error:
        raise XgbloraError(f"{error}: remove it to evaluate the run again") from error


def dev_losses(run: Path) -> dict[int, float]:
    """The dev loss of a finished run with its first k boosters, for every k that was judged."""
    if not (run / ADAPTER / LEDGER).is_file():
        return {}
    entries = read_json(run / ADAPTER / LEDGER)
    evaluations = [booster["evaluation"] for booster in entries["boosters"]] + [entries["evaluation"]]
    return {count: judged["eval_loss"] for count, judged in enumerate(evaluations, start=1) if judged}


def require_finished(run: Path) -> None:
    """Raise :class:`XgbloraError` where a folder holds no finished run."""
    for file in (run / CONFIG, run / ADAPTER / LEDGER):
        if not file.is_file():
            raise XgbloraError(f"{run} holds no finished run: {file} is missing")


def adapter_of(run: Path) -> Path:
    """The folder of the adapter of a finished run; an adapter's own folder may be given, too.

    Raises :class:`XgbloraError` where there is none.
    """
    adapter = run / ADAPTER if (run / ADAPTER / LEDGER).is_file() else run
    if not (adapter / LEDGER).is_file():
        raise XgbloraError(f"{run} holds no finished run: {run / ADAPTER / LEDGER} is missing")
    return adapter


def base_name(run: Path, adapter: Path) -> str:
    """The base model that an adapter was trained on, as the run or the adapter says."""
    if (run / CONFIG).is_file():
        return str(read_json(run / CONFIG)["model_name"])
    name = LoraConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name:
        raise XgbloraError(f"{adapter} does not say which base model it belongs to: give --model_name")
    return str(name)


def require_ours(config: RunConfig) -> None:
    """Raise :class:`XgbloraError` where a run may not have its folder: it holds another run, or foreign files.

    ``--overwrite_output_dir`` replaces runs: what no run has written is neither removed nor written over.
    """
    folder = folder_of(config)
    if folder.exists() and not folder.is_dir():
        raise XgbloraError(f"{folder} is a file: choose another --output_dir")
    if config.overwrite_output_dir:
        _require_replaceable(folder)
        return
    if not (folder / CONFIG).is_file():
        if folder.is_dir() and any(file.name != LOCK and not is_part(file) for file in folder.iterdir()):
            raise XgbloraError(f"{folder} holds files of something else: choose another --output_dir")
        return
    try:
        theirs = read_json(folder / CONFIG)
    except XgbloraError as error:
        raise XgbloraError(f"{error}: remove it to start again") from error
    digests = theirs.pop(DIGESTS, {})
    different = differences(theirs, config.resolved())
    if not different:  # other settings read other files
        now = contents(config)
        different = [f"{what} has changed" for what in now if now[what] != digests.get(what, now[what])]
    if different:
        raise XgbloraError(
            f"{folder} holds a run of another configuration ({', '.join(different[:3])}): choose another "
            "--output_dir, or --overwrite_output_dir to replace it"
        )


def _require_replaceable(folder: Path) -> None:
    held_run = (folder / CONFIG).is_file() and DIGESTS in read_json(folder / CONFIG)
    for name in WRITTEN:
        if (folder / name).exists() and not held_run:
            raise XgbloraError(
                f"{folder / name} is of no run of xgblora's, and --overwrite_output_dir replaces nothing else: choose "
                "another --output_dir"
            )
    for sealed in (folder / ADAPTER, *checkpoints(folder)):
        require_sealed(sealed, FILES if held_run else ())


def prepare_folder(config: RunConfig, digests: Mapping[str, str]) -> None:
    """Make the run's folder, whose lock is held, ready for it, and write its ``config.json``.

    A folder that holds an unfinished run of the same configuration is kept, to be resumed.

    Args:
        config: Of the run.
        digests: By :func:`contents`, of the files that were read.
    """
    folder = folder_of(config)
    remove_parts(folder)
    if config.overwrite_output_dir:
        for sealed in (folder / ADAPTER, *checkpoints(folder)):
            remove_sealed(sealed, FILES)
        for name in WRITTEN:  # config.json last: until then it says that the others are a run's
            (folder / name).unlink(missing_ok=True)
    write_json(folder / CONFIG, config.resolved() | {DIGESTS: dict(digests)})
    write_run_yaml(folder, "train", config, digests)
