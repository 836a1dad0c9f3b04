"""Which settings are refused: values out of range, flags where they cannot work, flags that contradict each other."""

import dataclasses
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers.integrations import get_available_reporting_integrations

from xgblora.config.flag import DECLARED, Check, Needs, default_of
from xgblora.config.flags import FLAGS, UNSUPPORTED, Flags
from xgblora.errors import XgbloraError

LARGEST = 3.4e38
"""Of the numbers that adapters and losses are made of."""


def check(config: Any) -> None:
    """Raise :class:`XgbloraError` with the first reason why ``config``, a :class:`RunConfig`, cannot work."""
    messages = _unsupported(config), _unwritable(config), _out_of_range(config), _out_of_place(config)
    for message in chain(*messages, _contradictions(config)):
        raise XgbloraError(message)


def _unsupported(config: Any) -> Iterator[str]:
    defaults = {field.name: default_of(field) for field in dataclasses.fields(Flags)}
    for name, reason in UNSUPPORTED.items():
        value, default = getattr(config, name), defaults[name]
        if value != default and (value or default):  # the parser makes a list of an empty text
            yield f"--{name} is not supported: {reason}"


def _unwritable(config: Any) -> Iterator[str]:
    """Values that no file name, and no JSON file, can hold."""
    checked = _checks(config)
    for name, value in config.asked.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, str) and "\0" in part for part in parts):
            yield f"--{name} holds a zero byte"
        if any(isinstance(part, str) and not part for part in parts) and isinstance(value, (list, tuple)):
            yield f"--{name} holds an empty name"
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts) and not checked.get(name):
            yield f"--{name} must be a finite number, got {value}"
        if any(isinstance(part, float) and math.isfinite(part) and abs(part) > LARGEST for part in parts):
            yield f"--{name} must be a number that float32 holds, got {value}"


def _out_of_range(config: Any) -> Iterator[str]:
    for name, checks in _checks(config).items():
        value = config.asked[name]
        for wrong in (check for check in checks if value is not None and not check.holds(value)):
            yield f"--{name} must be {wrong.wants}, got {value}"
    for name, hint in get_type_hints(Flags).items():
        choices, value = _choices(hint), getattr(config, name)
        if choices and value is not None and value not in choices:
            yield f"--{name} must be one of {', '.join(choices)}, got {value}"


def _checks(config: Any) -> dict[str, list[Check]]:
    """Which values each flag takes, also those that a verb has beside the flags of a run."""
    fields = dataclasses.fields(config)
    beside = {field.name: DECLARED[field].checks for field in fields if field.init and field in DECLARED}
    return beside | {name: flag.checks for name, flag in FLAGS.items()}


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, perhaps with None beside it; none where another type is allowed, too."""
    kinds = [hint] if get_origin(hint) is Literal else [kind for kind in get_args(hint) if kind is not type(None)]
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


def _out_of_place(config: Any) -> Iterator[str]:
    """Flags that were given where they cannot work. One that says what follows anyway does no harm."""
    derived = config.derived()
    for name, flag in FLAGS.items():
        idle = flag.idle(config)
        if isinstance(idle, Needs) and config.given(name) and config.asked[name] != derived.get(name):
            yield idle.message(name, config)


def _contradictions(config: Any) -> Iterator[str]:
    if config.train_rows < (config.trainer != "none"):
        least = "at least 1" if config.trainer != "none" else "0 or more"
        yield f"--num_train must be {least}, got {config.train_rows}"
    if config.max_steps < 0 and not config.num_train_epochs > 0:
        yield f"--num_train_epochs must be a positive number, got {config.num_train_epochs}"
    if config.task_file is not None and not Path(config.task_file).is_file():
        yield f"the task file {config.task_file} does not exist"
    for flag, file in (("other_text", config.other_text), ("boost_keep", config.keep_file)):
        if file is not None and not Path(file).is_file():
            yield f"the file of --{flag}, {file}, does not exist"
    if config.objective == "reward":
        if config.reward is None:
            yield "--objective reward needs a --reward: accuracy, exact_match, f1, rouge_l or your own"
        if config.trainer == "regular" and config.reward_completions == "greedy":
            yield "--reward_completions greedy has no gradient for --trainer regular: take expected, or --trainer zo"
        if config.recipe == "boost" and config.reward_completions == "greedy":
            yield "--recipe boost raises the mean reward of all answers: --reward_completions expected"
    if config.init_adapter and not config.makes_boosters:
        yield "--init_adapter starts from boosters, which --xgblora has: give both"
    if config.lora and config.xgblora:
        yield "--lora and --xgblora are two methods: give one of them"
    if config.recipe == "boost" and config.trainer == "regular":
        yield "--recipe boost needs no gradient: leave out --trainer regular"
    if message := too_few_rows(config, config.train_rows):
        yield message
    if config.early_stopping_boosters and config.load_best_model_at_end:
        yield "--early_stopping_boosters and --load_best_model_at_end both choose what to keep"
    if config.num_dev == 0 and (
        config.eval_strategy != "no" or config.load_best_model_at_end or config.early_stopping_boosters
    ):
        yield "evaluation during training needs development examples: set --num_dev above 0"
    metric = (config.metric_for_best_model or "loss").removeprefix("eval_")
    metrics = ["loss", "accuracy", *(["reward"] if config.objective == "reward" else [])]
    if metric not in metrics:
        yield f"--metric_for_best_model must be one of {', '.join(metrics)}, got {config.metric_for_best_model}"
    if config.save_strategy == "best" and config.metric_for_best_model is None:
        yield f"--save_strategy best needs --metric_for_best_model: one of {', '.join(metrics)}"
    yield from _unavailable(config)
    if config.xgblora_use_adaptive_merge:
        for name, most in (("xgblora_steps_per_iteration", 0), ("xgblora_merge_frequency", 1)):
            if getattr(config, name) > most:
                yield f"--xgblora_use_adaptive_merge and --{name} are two merge schedules: give one"
        if 0 < config.xgblora_max_steps_per_adapter < config.xgblora_min_steps_per_adapter:
            yield "--xgblora_max_steps_per_adapter is below --xgblora_min_steps_per_adapter"


def _unavailable(config: Any) -> Iterator[str]:
    """Loggers whose package is not installed."""
    asked = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in asked or []:
        if name not in ("all", "none", *get_available_reporting_integrations()):
            yield f"--report_to {name} is not known, or its package is not installed (python -m pip install {name})"


def too_few_rows(config: Any, rows: int) -> str | None:
    """Why so many training rows do not suffice for recipe boost; None where they do."""
    if config.recipe != "boost" or config.trainer == "none":
        return None
    searched = config.boost_searched(rows)
    if rows - searched >= 2:
        return None
    return (
        f"--recipe boost fits boosters on at least 2 examples and finds their step lengths on 1 or more, got {rows} "
        f"training rows, of which {searched} are set aside: raise --num_train"
    )
