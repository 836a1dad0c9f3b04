"""The curves and metrics of one finished run, read back from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xgblora.record import EVAL_LOSS, TRAINING_LOSS, read_jsonl

NAMES = {"lora": "LoRA", "xgblora": "XGBLoRA", "boost": "Boost", "zero-shot": "zero-shot", "in-context": "in-context"}
TRAINERS = {"zo": "+ZO", "regular": "+backprop", "none": ""}


@dataclass(frozen=True)
class Curves:
    """``loss``: lines of training_loss.jsonl; ``evals``: of eval_loss.jsonl; ``merges``: steps; ``metrics``."""

    label: str
    seed: int
    loss: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    merges: list[int]
    metrics: dict[str, Any]


def read_curves(folder: Path) -> Curves:
    """Read a finished run."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))

    def lines(name: str) -> list[dict[str, Any]]:
        return read_jsonl(folder / name) if (folder / name).is_file() else []

    return Curves(
        label=NAMES[metrics["method"]] + TRAINERS[metrics["trainer"]],
        seed=metrics["seed"],
        loss=lines(TRAINING_LOSS),
        evals=lines(EVAL_LOSS),
        merges=metrics["merge_steps"],
        metrics=metrics,
    )
