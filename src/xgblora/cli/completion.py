"""Completion of verbs and flags by a shell."""

import argparse
from typing import Any

import shtab

from xgblora.cli.asking import PredictConfig
from xgblora.cli.parsing import parser
from xgblora.cli.verbs import VERBS
from xgblora.config import RunConfig
from xgblora.errors import XgbloraError
from xgblora.runs.check import CheckConfig
from xgblora.runs.conversation import ChatConfig
from xgblora.runs.demo import DemoConfig
from xgblora.runs.experiment import ExperimentConfig
from xgblora.runs.export import ExportConfig
from xgblora.runs.html_report import ReportConfig
from xgblora.runs.judge import JudgeConfig
from xgblora.runs.preview import PreviewConfig
from xgblora.runs.push import PushConfig
from xgblora.runs.replay import ReplayConfig
from xgblora.runs.stages import StagesConfig
from xgblora.runs.tune import TuneConfig
from xgblora.serving.serve import ServeConfig

KINDS: dict[str, type] = {
    **{"demo": DemoConfig, "tasks": PreviewConfig, "train": RunConfig, "compare": ExperimentConfig},
    **{
        "boost": ExperimentConfig,
        "tune": TuneConfig,
        "check": CheckConfig,
        "stages": StagesConfig,
        "replay": ReplayConfig,
        "export": ExportConfig,
    },
    **{"predict": PredictConfig, "eval": JudgeConfig, "chat": ChatConfig, "push": PushConfig},
    **{"report": ReportConfig, "serve": ServeConfig},
}
"""The flags of each verb that has some."""
OF_RUNS = ("predict", "eval", "chat", "serve", "report", "stages", "replay", "export", "push")
FILES = ("file", "task_file", "output", "result_file")
FOLDERS = ("data_dir", "output_dir", "output_root", "init_adapter")


def completion(verb: str, argv: list[str]) -> int:
    """Print the script that lets a shell complete xgblora's verbs and flags."""
    if len(argv) != 1 or argv[0] not in shtab.SUPPORTED_SHELLS:
        raise XgbloraError(f"say which shell: xgblora completion {' | '.join(shtab.SUPPORTED_SHELLS)}")
    print(shtab.complete(_all_verbs(), argv[0]))
    return 0


def _all_verbs() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser("xgblora")
    verbs = root.add_subparsers()
    for name, verb in VERBS.items():
        made = verbs.add_parser(name, help=verb.summary)
        if name == "completion":
            made.add_argument("shell", choices=list(shtab.SUPPORTED_SHELLS))
            continue
        if name in OF_RUNS:
            _completed(made.add_argument("run", help="folder of a run"), shtab.DIRECTORY)
        if issubclass(KINDS[name], RunConfig):
            _completed(made.add_argument("--config", help="YAML file of flags"), shtab.FILE)
        for action in parser(KINDS[name], name)._actions:  # noqa: SLF001
            flags = [flag for flag in action.option_strings if flag.startswith("--") and "-" not in flag[2:]]
            if action.help == argparse.SUPPRESS or not flags or action.dest == "help":
                continue
            settings: dict[str, Any] = {"choices": action.choices} if action.choices else {}
            # Of a long help its first sentence: shells show a line.
            help_line = str(action.help or "").partition(". ")[0].replace("%", "%%")
            added = made.add_argument(*flags, help=help_line, **settings)
            if action.dest in FILES or action.dest in FOLDERS:
                _completed(added, shtab.FILE if action.dest in FILES else shtab.DIRECTORY)
    return root


def _completed(action: argparse.Action, by: dict[str, Any]) -> None:
    action.complete = by  # type: ignore[attr-defined]  # where shtab looks for it
