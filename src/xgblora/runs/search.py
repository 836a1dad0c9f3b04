"""What ``xgblora tune`` tries: flags, each with a range or a few values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from xgblora.base.load import load_model_config
from xgblora.config import FLAGS, Flags, RunConfig
from xgblora.errors import XgbloraError, did_you_mean
from xgblora.report.tuning import short

Value = float | int | bool | str

FIXED = (
    *("model_name", "dtype", "load_4bit", "load_8bit", "unpack", "memory_budget", "task_name", "task_file", "data_dir"),
    *("num_train", "num_dev", "num_eval", "max_length", "train_set_seed", "prompt_beginning", "reward", "objective"),
    *("other_text", "train_as_classification", "only_train_option", "seed", "data_seed", "output_dir", "lora"),
    *("xgblora", "recipe", "trainer", "readout", "max_steps", "num_train_epochs", "eval_steps", "eval_strategy"),
)
"""What all trials have in common: else they could not be compared, or would not cost the same."""


@dataclass(frozen=True)
class Searched:
    """A flag and the values that are tried."""

    name: str
    values: tuple[Value, ...]
    """All of them, or the lowest and the highest."""
    between: bool = False
    """Whether what lies between is tried, too: real numbers above 0 evenly in their logarithm, others evenly."""

    @property
    def log(self) -> bool:
        """Whether values are drawn evenly in their logarithm."""
        return self.between and isinstance(self.values[0], float) and self.values[0] > 0

    def holds(self, value: Any) -> bool:
        """Whether a value may be tried."""
        return self.values[0] <= value <= self.values[1] if self.between else value in self.values

    def drawn_by(self, trial: Any) -> Value:
        """What a trial of Optuna's suggests."""
        if not self.between:
            value: Value = trial.suggest_categorical(self.name, self.values)
            return value
        low, high = self.values
        if isinstance(low, int):
            return int(trial.suggest_int(self.name, low, high))
        return float(trial.suggest_float(self.name, low, high, log=self.log))


def parse_search(texts: Sequence[str]) -> list[Searched]:
    """``NAME=LOW..HIGH`` and ``NAME=A,B,C``, where NAME is a flag of ``train``.

    Raises:
        XgbloraError: There is no such flag, or it is the same in all trials, or the values are none of its.

    Examples:
        >>> rate, rank = parse_search(["learning_rate=1e-4..1e-1", "lora_rank=1,8"])
        >>> rate.values, rate.log, rank.name, rank.values
        ((0.0001, 0.1), True, 'lora_r', (1, 8))
    """
    searched = [_parse(text) for text in texts]
    names = [one.name for one in searched]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise XgbloraError(f"--search names {twice} twice")
    return searched


def _parse(text: str) -> Searched:
    written, equals, values = text.partition("=")
    name = _spellings().get(written.removeprefix("--").replace("-", "_"))
    if not equals or not values:
        raise XgbloraError(f"--search takes NAME=LOW..HIGH or NAME=A,B,C, got {text!r}")
    if name is None:
        raise XgbloraError(f"--search: there is no flag {written!r}{did_you_mean(written, _spellings())}")
    if name in FIXED or not FLAGS[name].identity:
        raise XgbloraError(f"--search: {written} is the same in all trials, by which they are compared: leave it out")
    if ".." not in values:
        return Searched(name, tuple(_value(name, one) for one in values.split(",")))
    low, high = (_value(name, one) for one in values.split("..", 1))
    if isinstance(low, (bool, str)) or isinstance(high, (bool, str)) or not low < high:
        raise XgbloraError(f"--search {text}: a range goes from a number to a larger one")
    return Searched(name, (low, high), between=True)


def _spellings() -> dict[str, str]:
    """Flags by all their names."""
    spellings = {name: name for name in FLAGS}
    for field in dataclasses.fields(Flags):
        for alias in field.metadata.get("aliases", ()) if field.name in FLAGS else ():
            spellings[str(alias).removeprefix("--").replace("-", "_")] = field.name
    return spellings


def _value(name: str, text: str) -> Value:
    """A value of a flag. Raises :class:`XgbloraError` where it is none."""
    hint = get_type_hints(Flags)[name]
    if get_origin(hint) is list:
        raise XgbloraError(f"--search: {name} is a list, and no value to be tried")
    kinds = [hint] if get_origin(hint) is Literal else [*get_args(hint)] or [hint]
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise XgbloraError(f"--search: {name} is true or false, got {text!r}")
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                value = kind(text)
            except ValueError:
                continue
            wrong = next((check for check in FLAGS[name].checks if not check.holds(value)), None)
            if wrong is not None or not math.isfinite(value):
                raise XgbloraError(f"--search: {name} must be {wrong.wants if wrong else 'a number'}, got {text}")
            return value
    if int in kinds or float in kinds:
        raise XgbloraError(f"--search: {name} is a number, got {text!r}")
    return text


def usual_search(config: RunConfig) -> list[Searched]:
    """What is tried where nothing else is asked for: rate, probes, rank and layers, where they have an effect.

    Rates lie within a factor of 30 of what was given, probes within 10, and so does a ridge that was given.
    """
    layers = _layers(config)
    shares = (0, layers // 4, 3 * layers // 4) if config.fits_boosters else (0, layers // 4, layers // 2)
    usual = [
        *(_around(name, getattr(config, name), factor) for name, factor in (("learning_rate", 30), ("zo_eps", 10))),
        Searched("lora_r", tuple(sorted({1, 2, 4, 8, 16} | {config.rank}))),
        Searched("xgblora_layers", tuple(dict.fromkeys((config.xgblora_layers, *shares)))),
        *([] if config.boost_ridge is None else [_around("boost_ridge", config.boost_ridge, 10)]),
    ]
    return [
        one for one in usual if FLAGS[one.name].idle(config) is None and not (one.name == "lora_r" and config.xgblora)
    ]


def require_possible(config: RunConfig, searched: Sequence[Searched]) -> None:
    """Raise :class:`XgbloraError` where a flag has no effect, or the model has fewer layers than are to be tried."""
    for one in searched:
        if (idle := FLAGS[one.name].idle(config)) is not None:
            raise XgbloraError(f"--search: {idle.message(one.name, config)}")
        if one.name == "xgblora_layers" and (most := max(map(int, one.values))) > (layers := _layers(config)):
            raise XgbloraError(f"--search: xgblora_layers must be at most {layers}, the model's layers, got {most}")


def _layers(config: RunConfig) -> int:
    return int(load_model_config(config.model_name, config.trust_remote_code).get_text_config().num_hidden_layers)


def _around(name: str, value: float, factor: float) -> Searched:
    return Searched(name, (value / factor, value * factor), between=True)


def as_given(config: RunConfig, searched: Sequence[Searched]) -> dict[str, Value] | None:
    """What the flags themselves say of what is tried; None where that is not to be tried."""
    given = {one.name: getattr(config, one.name) for one in searched}
    return given if all(given[one.name] is not None and one.holds(given[one.name]) for one in searched) else None


def in_words(values: Mapping[str, Value]) -> str:
    """Values of flags, short.

    Examples:
        >>> in_words({"learning_rate": 0.00012345, "lora_r": 8})
        'learning_rate 0.000123, lora_r 8'
    """
    return ", ".join(f"{name} {short(value)}" for name, value in values.items())
