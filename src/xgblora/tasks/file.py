"""Task files: a task as YAML, the package's own and the user's."""

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml

from xgblora.errors import XgbloraError, one_line
from xgblora.tasks.bounds import LARGEST_TASK_FILE, load_yaml
from xgblora.tasks.chat import Chat
from xgblora.tasks.data import READERS
from xgblora.tasks.task import SPLITS, Generation, Hub, Metric, Source, Task

KEYS = (
    *(field.name for field in fields(Task) if field.name not in ("source", "generation")),
    "generate",
    "chat",
    "hub",
    "data",
)
"""What a task file may say."""

CHAT_KEYS = ("name", "chat", "generate", "metric", "num_dev")
"""What one of conversations may."""


def load_task(path: str | Path, rows: bool = True) -> Task | Chat:
    """Read a task from a YAML file. All values are read as text, so that an option may be ``Yes`` or ``1``.

    Args:
        path: The file; docs/tasks.md lists its keys.
        rows: Whether it must say where the task's rows are.

    Raises:
        XgbloraError: The file describes no task.

    Example::

        load_task("examples/own_data/packages.yaml").options  # ('games', 'science', 'sound')
    """
    path = Path(path)
    try:
        content = load_yaml(_text(path))
        return _task(content, path, rows)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 1000)
        raise XgbloraError(f"cannot read the task file {path}: {reason}") from error
    except XgbloraError as error:
        raise XgbloraError(f"task file {path}: {error}") from error


def task_text(task: Task | Chat) -> str:
    """A task as a task file says it, without its rows: what :func:`load_task` reads with ``rows=False``.

    Examples:
        >>> print(task_text(Task("mood", "{{ text }} It was", ("bad", "good"), "label", {}, num_dev=20)))
        name: mood
        prompt: '{{ text }} It was'
        options:
        - bad
        - good
        answer: label
        num_dev: 20
        <BLANKLINE>
    """
    values = {field.name: getattr(task, field.name) for field in fields(task) if field.name != "source"}
    default = {field.name: field.default for field in fields(task)}
    stated = {name: value for name, value in values.items() if value != default[name]}
    if isinstance(task, Chat):
        stated = {"name": task.name, "chat": stated.pop("messages")} | stated
    if ends := stated.pop("generation", None):
        stated["generate"] = {"max_new_tokens": ends.max_new_tokens} | ({"stop": ends.stop} if ends.stop else {})
        for implied in ("options", "classification"):
            stated.pop(implied, None)
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items()}
    return str(yaml.safe_dump(lists, sort_keys=False, allow_unicode=True, width=1000))


def _text(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(LARGEST_TASK_FILE + 1)


def _task(content: Any, path: Path, rows: bool) -> Task | Chat:
    if not isinstance(content, dict):
        raise XgbloraError("it says nothing of the form 'key: value'")
    for key in content:
        if key not in KEYS:
            raise XgbloraError(f"unknown key {key!r}: choose from {', '.join(KEYS)}")
    values = dict(content)
    if "chat" in values:
        return _chat(values, path, rows)
    if "generate" in values:
        values["generation"] = _generation(values.pop("generate"))
        values = {"options": (), "classification": "false"} | values
    for key in ("prompt", "options", "answer"):
        if not values.get(key) and not (key == "options" and "generation" in values):
            raise XgbloraError(f"{key} is missing")
    for key in ("name", "prompt", "beginning", "null_prompt", "answer", "option"):
        if not isinstance(values.get(key, ""), str):
            raise XgbloraError(f"{key} is a text, not {values[key]!r}")
    for key in ("options", "labels"):
        if isinstance(values.get(key), list):
            values[key] = _texts(key, values[key])
    if "labels" in values and (
        not isinstance(values["labels"], tuple) or len(values["labels"]) != len(values["options"])
    ):
        raise XgbloraError("labels is a list with one entry for each option")
    _check_metric(values)
    if "classification" in values:
        values["classification"] = _one_of("classification", values["classification"], {"true": True, "false": False})
    if "num_dev" in values:
        values["num_dev"] = _whole("num_dev", values["num_dev"])
    source = _source(values.pop("hub", None), values.pop("data", None), path.parent, rows)
    return Task(source=source, **({"name": path.stem} | values))


def _chat(values: dict[str, Any], path: Path, rows: bool) -> Chat:
    for key in values:
        if key not in (*CHAT_KEYS, "hub", "data"):
            raise XgbloraError(f"a chat has no {key}: it may say {', '.join(CHAT_KEYS)}")
    if not isinstance(values["chat"], str) or not values["chat"]:
        raise XgbloraError("chat is the name of the column that holds messages")
    if "num_dev" in values:
        values["num_dev"] = _whole("num_dev", values["num_dev"])
    if "generate" in values:
        content = values.pop("generate")
        if not isinstance(content, dict) or content.keys() != {"max_new_tokens"}:
            raise XgbloraError("generate of a chat says max_new_tokens; the model's own end of a turn stops it")
        values["generation"] = Generation(_whole("max_new_tokens", content["max_new_tokens"]), stop="")
    _check_metric(values)
    source = _source(values.pop("hub", None), values.pop("data", None), path.parent, rows)
    return Chat(messages=values.pop("chat"), source=source, **({"name": path.stem} | values))


def _check_metric(values: dict[str, Any]) -> None:
    if values.get("metric", "accuracy") not in get_args(Metric):
        raise XgbloraError(f"metric {values['metric']!r} is not known: choose from {', '.join(get_args(Metric))}")


def _generation(content: Any) -> Generation:
    if (
        not isinstance(content, dict)
        or not content.keys() <= {"max_new_tokens", "stop"}
        or not content.get("stop", ".")
    ):
        raise XgbloraError("generate says max_new_tokens and stop, the text that ends an answer")
    values = dict(content)
    if "max_new_tokens" in values:
        values["max_new_tokens"] = _whole("max_new_tokens", values["max_new_tokens"])
    return Generation(**values)


def _whole(key: str, value: Any) -> int:
    if not str(value).isdecimal() or len(str(value)) > 18:
        raise XgbloraError(f"{key} is a whole number, not {value!r:.40}")
    return int(value)


def _one_of(key: str, value: Any, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise XgbloraError(f"{key} is one of {', '.join(choices)}, not {value!r}")
    return choices[value]


def _texts(key: str, values: list[Any]) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise XgbloraError(f"{key} are texts; {value!r} is none")
    for value, times in Counter(values).items():
        if times > 1:
            raise XgbloraError(f"{key} holds {value!r} twice")
    return tuple(values)


def _source(hub: Any, data: Any, folder: Path, needed: bool) -> Source:
    """Where rows come from: ``hub`` with path, name and splits, or ``data`` with a file for each split."""
    if hub is None and data is None and not needed:
        return {}
    if (hub is None) == (data is None):
        raise XgbloraError("say where the rows are: either data (a file for each split) or hub")
    if hub is not None:
        if not isinstance(hub, dict) or "path" not in hub or not hub.keys() <= {"path", "name", "revision", "splits"}:
            raise XgbloraError("hub says path, and may say name, revision and splits")
        splits = hub.get("splits", {"train": "train", "test": "test"})
        _check_splits("hub: splits", splits)
        return Hub(hub["path"], hub.get("name"), hub.get("revision"), splits)
    _check_splits("data", data)
    for file in data.values():
        if Path(file).suffix not in READERS:
            raise XgbloraError(f"data file {file!r} has another ending than {', '.join(READERS)}")
    return {split: folder / file for split, file in data.items()}


def _check_splits(what: str, splits: Any) -> None:
    if not isinstance(splits, dict) or not splits.keys() <= set(SPLITS):
        raise XgbloraError(f"{what} has an entry for each of {', '.join(SPLITS)} (one of the last two may be left out)")
    if not all(isinstance(value, str) and value for value in splits.values()):
        raise XgbloraError(f"{what}: each entry is a name")
    if "train" not in splits or len(splits) < 2:
        raise XgbloraError(f"{what} needs train, and test or validation to evaluate on")
