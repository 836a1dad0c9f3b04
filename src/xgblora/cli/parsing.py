"""Arguments to configurations, by transformers' own parser."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from xgblora.config import UNSUPPORTED, RunConfig
from xgblora.errors import XgbloraError, did_you_mean, one_line
from xgblora.runs.experiment import ExperimentConfig
from xgblora.runs.run_yaml import RunFile, read_run_yaml

C = TypeVar("C")

FLAG = re.compile(r"^(--[a-zA-Z]|-h$)")


class _Parser(HfArgumentParser):
    """transformers' parser, with errors of one line, and without help on flags that are refused."""

    def error(self, message: str) -> NoReturn:
        raise XgbloraError(f"{message} ({self.prog} --help-all lists the flags)")

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        if names and str(names[0]).lstrip("-") in UNSUPPORTED:
            settings["help"] = argparse.SUPPRESS
        return super().add_argument(*names, **settings)


class _GivenParser(_Parser):
    """The same, for the flags alone that really stand in a command line."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        return super().add_argument(*names, **settings | {"default": argparse.SUPPRESS})


def parser(kind: type, verb: str, made_by: type[_Parser] = _Parser) -> _Parser:
    """The parser of a verb's flags."""
    made = made_by(kind, prog=f"xgblora {verb}", allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    # argparse of Python 3.11 takes -1e-3 for a flag; it is a number that we refuse with a better message.
    made._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)  # noqa: SLF001
    return made


def parse(kind: type[C], verb: str, argv: Sequence[str]) -> C:
    """The configuration that command-line arguments mean. Flags may have - in place of _."""
    for token in argv:
        name = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if token.startswith("--") and (reason := UNSUPPORTED.get(name)) and issubclass(kind, RunConfig):
            raise XgbloraError(f"--{name} is not supported: {reason}")
    flags = parser(kind, verb)
    try:
        config, unknown = flags.parse_args_into_dataclasses(
            list(argv), look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        raise error if isinstance(error, XgbloraError) else XgbloraError(one_line(error, 1000)) from error
    if unknown:
        known = [name for action in flags._actions for name in action.option_strings if _shown(name, action)]  # noqa: SLF001
        near = did_you_mean(unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1), known)
        raise XgbloraError(f"unknown argument {unknown[0]!r}{near} (xgblora {verb} --help-all lists the flags)")
    return config  # type: ignore[no-any-return]


def with_config(kind: type, verb: str, argv: Sequence[str]) -> tuple[list[str], RunFile | None]:
    """Put the flags of ``--config FILE`` in front of those of a command line, which win.

    Raises:
        XgbloraError: The file cannot be read, is of another verb, or names a flag that there is not.
    """
    kept, files = [], []
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            files.append(next(tokens, ""))
        elif token.startswith("--config="):
            files.append(token.partition("=")[2])
        else:
            kept.append(token)
    if not files:
        return kept, None
    if len(files) > 1 or not files[0]:
        raise XgbloraError("--config takes one file")
    file = read_run_yaml(Path(files[0]))
    if file.verb not in (None, verb):
        raise XgbloraError(f"--config {file.path} is of xgblora {file.verb}, not of xgblora {verb}")
    flags = {name: action for action in parser(kind, verb)._actions for name in action.option_strings}  # noqa: SLF001
    given = {flags[name].dest for token in kept if (name := token.partition("=")[0]) in flags}
    from_file: list[str] = []
    for name, value in file.flags.items():
        if f"--{name}" not in flags and name not in UNSUPPORTED:
            near = did_you_mean(name, [option.removeprefix("--") for option in flags])
            raise XgbloraError(f"--config {file.path}: there is no flag {name!r}{near}")
        if name in UNSUPPORTED or flags[f"--{name}"].dest not in given:
            values = value if isinstance(value, list) else [value]
            if values not in ([], [""], ["null"]):
                from_file += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return [*from_file, *kept], file


def _shown(name: str, action: argparse.Action) -> bool:
    return name.startswith("--") and "-" not in name[2:] and action.help != argparse.SUPPRESS


def parse_experiment(verb: str, argv: Sequence[str]) -> ExperimentConfig:
    """The same for ``compare`` and ``boost``: what follows ``--extra_args`` goes to every arm.

    Raises :class:`XgbloraError` where an extra flag contradicts one given before, or where a flag is the
    comparison's own to set.
    """
    argv = list(argv)
    mark = next((i for i, token in enumerate(argv) if token in ("--extra_args", "--extra-args")), len(argv))
    flags = parser(ExperimentConfig, verb, _GivenParser)
    before, extra = (vars(flags.parse_known_args(part)[0]) for part in (argv[:mark], argv[mark + 1 :]))
    for name in ["lora", "xgblora", "seed", "output_dir", *(["recipe"] if verb == "compare" else ["methods"])]:
        if name in before or name in extra:
            raise XgbloraError(f"--{name} is set for each run of a comparison: use --methods, --seeds, --output_root")
    for name in before.keys() & extra.keys():
        if before[name] != extra[name]:
            raise XgbloraError(f"--extra_args gives --{name} {extra[name]}, which contradicts --{name} {before[name]}")
    config = parse(ExperimentConfig, verb, argv[:mark] + argv[mark + 1 :])
    config.output_root = config.output_root or f"runs/{verb}_{config.task_name}"
    return config


def parse_of_run(kind: type[C], verb: str, argv: list[str]) -> tuple[Path, list[str], C]:
    """The folder of a run, which comes first, the texts after it, and the flags after these."""
    first = next((i for i, token in enumerate(argv) if FLAG.match(token)), len(argv))
    named = [token for token in argv[:first] if token != "--"]
    config = parse(kind, verb, argv[first:])
    if not named:
        raise XgbloraError(f"say which run: xgblora {verb} RUN")
    return Path(named[0]), named[1:], config
