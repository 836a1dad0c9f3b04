"""The command line: ``xgblora train | compare | boost | check | tasks | stages | export | demo``."""

import argparse
import io
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import transformers
from rich.console import Console
from rich.table import Table as RichTable
from tqdm import tqdm
from transformers import HfArgumentParser

from xgblora.config import UNSUPPORTED, RunConfig
from xgblora.errors import XgbloraError, one_line, within_memory
from xgblora.report import METRICS, read_curves, results_table
from xgblora.runs.check import CheckConfig, check
from xgblora.runs.demo import DemoConfig, demo
from xgblora.runs.experiment import ExperimentConfig, Result, experiment
from xgblora.runs.export import ExportConfig, export
from xgblora.runs.folder import ADAPTER, folder_of
from xgblora.runs.preview import PreviewConfig, rows_table, task_table
from xgblora.runs.run import run
from xgblora.runs.stages import StagesConfig, stages
from xgblora.tasks import get_task, load_task
from xgblora.training.interruption import Interrupted
from xgblora.training.record import TRAINING_LOSS

C = TypeVar("C")

USAGE = """usage: xgblora VERB [--flag value ...]      (xgblora VERB --help lists the flags)

  train     one run: one model, one task, one method, one seed
  compare   LoRA and XGBLoRA over seeds, with figures and a summary
  boost     XGBLoRA over seeds, with the evaluation at each merge
  check     rank, alpha and scaling of both methods, without training
  tasks     the tasks, or rows of one as a model sees them (xgblora tasks [NAME or my_task.yaml])
  stages    a finished run with its first 0, 1, ... boosters (xgblora stages RUN)
  export    a run's boosters for PEFT, as a whole model, or for llama.cpp (xgblora export RUN --format ...)
  demo      a small model learns a real task on this machine, in minutes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one verb; returns the exit code. Errors of the user's are one line on stderr and code 2."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    _set_up_output()
    try:
        if verb not in VERBS:
            raise XgbloraError(f"unknown verb {verb!r}: choose one of {', '.join(VERBS)}")
        with within_memory(
            f"in xgblora {verb}", "smaller batches, --load_bfloat16 or a smaller model; finished work is kept"
        ):
            return VERBS[verb](verb, rest)
    except XgbloraError as error:
        return _fail(str(error))
    except OSError as error:  # a full disk, a read-only folder
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except Interrupted as stop:
        again = "the same command" + (" with --skip_completed" if verb in ("compare", "boost") else "")
        print(f"{stop}; {again} goes on at the last checkpoint", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130


def _train(verb: str, argv: list[str]) -> int:
    config = parse(RunConfig, verb, argv)
    run(config)
    folder = folder_of(config)
    files = [folder / name for name in (ADAPTER, TRAINING_LOSS, METRICS)]
    _show(Result([read_curves(folder)], [file for file in files if file.exists()]))
    return 0


def _compare(verb: str, argv: list[str]) -> int:
    _show(experiment(parse_experiment(verb, argv)))
    return 0


def _boost(verb: str, argv: list[str]) -> int:
    config = parse_experiment(verb, argv)
    config.methods = ["boost" if config.recipe == "boost" else "xgblora"]
    _show(experiment(config))
    return 0


def _check(verb: str, argv: list[str]) -> int:
    return 0 if check(parse(CheckConfig, verb, argv)) else 1


def _tasks(verb: str, argv: list[str]) -> int:
    named = bool(argv) and not argv[0].startswith("-")
    config = parse(PreviewConfig, verb, argv[1:] if named else argv)
    if not named:
        _print(task_table(), [])
    else:
        of_file = Path(argv[0]).suffix in (".yaml", ".yml")
        _print(rows_table(load_task(argv[0]) if of_file else get_task(argv[0]), config), [])
    return 0


def _stages(verb: str, argv: list[str]) -> int:
    run_folder, config = _of_run(StagesConfig, verb, argv)
    scored, files = stages(run_folder, config)
    table = RichTable(title=f"{run_folder}: the first boosters alone")
    for column in ("boosters", "test accuracy %", "test loss", "dev accuracy %", "dev loss"):
        table.add_column(column, justify="right")
    for stage in scored:
        dev = ("", "")
        if stage.dev_accuracy is not None:
            dev = (f"{100 * stage.dev_accuracy:.1f}", f"{stage.dev_loss:.4f}")
        table.add_row(str(stage.boosters), f"{100 * stage.accuracy:.1f}", f"{stage.loss:.4f}", *dev)
    _print(table, files)
    return 0


def _export(verb: str, argv: list[str]) -> int:
    print(export(*_of_run(ExportConfig, verb, argv)))
    return 0


def _demo(verb: str, argv: list[str]) -> int:
    _show(demo(parse(DemoConfig, verb, argv)))
    return 0


def _of_run(kind: type[C], verb: str, argv: list[str]) -> tuple[Path, C]:
    """The folder of a run, which comes first, and the flags after it."""
    if argv and not argv[0].startswith("-"):
        return Path(argv[0]), parse(kind, verb, argv[1:])
    parse(kind, verb, argv)  # answers --help
    raise XgbloraError(f"say which run: xgblora {verb} RUN")


class _Parser(HfArgumentParser):
    """transformers' parser, with errors of one line, and without help on flags that are refused."""

    def error(self, message: str) -> NoReturn:
        raise XgbloraError(f"{message} (xgblora VERB --help lists the flags)")

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
    try:
        config, unknown = parser(kind, verb).parse_args_into_dataclasses(
            list(argv), look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        raise error if isinstance(error, XgbloraError) else XgbloraError(one_line(error, 1000)) from error
    if unknown:
        raise XgbloraError(f"unknown argument {unknown[0]!r} (xgblora {verb} --help lists the flags)")
    return config  # type: ignore[no-any-return]


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


def _show(result: Result) -> None:
    _print(results_table(result.runs), result.files)


def _print(table: RichTable, files: Sequence[Path]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print()
    console.print(table)
    for path in files:
        print(path)


class _BesideBars(logging.Handler):
    """Log lines on stdout that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def _set_up_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Windows console may lack a character
    package = logging.getLogger("xgblora")
    package.setLevel(logging.INFO)
    if not package.handlers:
        package.addHandler(_BesideBars())
    package.propagate = False
    transformers.logging.set_verbosity_error()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


VERBS: dict[str, Callable[[str, list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "boost": _boost,
    "check": _check,
    "tasks": _tasks,
    "stages": _stages,
    "export": _export,
    "demo": _demo,
}


if __name__ == "__main__":
    raise SystemExit(main())
