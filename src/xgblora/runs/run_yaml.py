"""``run.yaml``: the flags that repeat a run, with what made it; and any such file that a user writes."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from xgblora.config import UNSUPPORTED, RunConfig, default_of
from xgblora.errors import XgbloraError, one_line
from xgblora.files import write_atomically
from xgblora.tasks import load_yaml

RUN_YAML = "run.yaml"
ALWAYS = ("model_name", "task_name", "dtype", "seed", "seeds", "output_dir", "output_root")
"""Written also where they have their defaults: these may be others elsewhere."""
NEVER = (
    *("overwrite_output_dir", "skip_completed", "resume_from_checkpoint", "result_file"),
    *("load_float16", "load_bfloat16", "fp16", "bf16", "no_auto_device"),
)
"""What a run that is repeated does not repeat, and other names of ``dtype``."""
PACKAGES = ("xgblora", "torch", "transformers", "peft", "datasets", "numpy")
ABOUT = ("verb", "made_with", "sha256")
"""Entries that are no flags."""


@dataclass(frozen=True)
class RunFile:
    """The content of such a file."""

    path: Path
    flags: Mapping[str, Any]
    """By name, each a text or a list of texts, as they would stand in a command line."""
    verb: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests of the task, data and reward files of the run that wrote it."""

    def changed(self, now: Mapping[str, str]) -> list[str]:
        """Which of those files are others ``now``."""
        return [what for what, digest in self.sha256.items() if now.get(what) != digest]


def write_run_yaml(
    folder: Path,
    verb: str,
    config: RunConfig,
    digests: Mapping[str, str],
    name: str = RUN_YAML,
    without: Sequence[str] = (),
) -> None:
    """Write what repeats a run.

    Args:
        folder: Of the run, or of the comparison.
        verb: ``train``, ``compare``, ``boost`` or ``tune``.
        config: As it was given.
        digests: SHA-256 of the files that it reads.
        name: Of the file.
        without: Flags that are left to who repeats it.
    """
    flags = {}
    for declared in dataclasses.fields(config):
        flag = declared.name
        if not declared.init or flag in (*NEVER, *UNSUPPORTED, *without):
            continue
        value, default = getattr(config, flag) if flag in ALWAYS else config.asked[flag], default_of(declared)
        if flag in ALWAYS or (value != default and (value, default) != (False, "no")):  # what the parser makes of "no"
            flags[flag] = _plain(value)
    if config.task_file is not None:
        del flags["task_name"]
    if "output_root" in flags:
        del flags["output_dir"], flags["seed"]  # of each run in it
    made_with = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    content: dict[str, Any] = {"verb": verb, **flags}
    content |= {"made_with": made_with | {"machine": f"{platform.system()} {platform.machine()}"}}
    content |= {"sha256": dict(digests)} if digests else {}
    text = f"# xgblora {verb} --config FILE repeats this; flags beside it win.\n"
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    write_atomically(folder / name, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def _plain(value: Any) -> Any:
    """A flag's value as YAML has it."""
    value = getattr(value, "value", value)  # of an enumeration
    return json.dumps(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value


def read_run_yaml(path: Path) -> RunFile:
    """Read flags from a YAML file, all values as text.

    Raises :class:`XgbloraError` where it cannot be read, or a value is none that a command line can hold.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 1000)
        raise XgbloraError(f"cannot read --config {path}: {reason}") from error
    except XgbloraError as error:
        raise XgbloraError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise XgbloraError(f"--config {path} says nothing of the form 'flag: value'")
    flags = {}
    for name, value in content.items():
        if name in ABOUT:
            continue
        flag = str(name).removeprefix("--").replace("-", "_")
        if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(part, str) for part in value)):
            raise XgbloraError(f"--config {path}: {flag} is a text, a number or a list of them")
        flags[flag] = value
    verb, sha256 = content.get("verb"), content.get("sha256", {})
    return RunFile(path, flags, verb, sha256 if isinstance(sha256, dict) else {})
