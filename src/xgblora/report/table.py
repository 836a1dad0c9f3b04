"""The numbers of finished runs: a table to read and a summary to load."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from xgblora.report.curves import Curves

_SUMMARISED = (
    *("accuracy", "score", "reward", "gain", "dev_accuracy", "eval_loss"),
    *("seconds_per_step", "peak_memory_mb", "merges"),
)


def results_table(runs: Sequence[Curves]) -> Table:
    """One line a run: what it reached and what it cost."""
    first = runs[0].metrics
    split, rows = first["evaluation_split"], first["rows"]["evaluation"]
    table = Table(title=f"{first['model']} on {first['task']}, {rows} held-out {split} rows")
    names = ("method", "seed", "zero-shot", "dev", split, "gain", "eval loss", "merges", "forward passes", "s / step")
    metric = first.get("metric")  # a task's own, beside accuracy
    rewarded = "reward" in first
    for name in (*names, "peak MB", *([metric.replace("_", " ")] if metric else []), *(["reward"] * rewarded)):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for run in runs:
        m = run.metrics
        table.add_row(
            run.label,
            str(run.seed),
            _percent(m["zero_shot_accuracy"]),
            _percent(m["dev_accuracy"]),
            _percent(m["accuracy"]),
            f"{100 * m['gain']:+.1f}",
            f"{m['eval_loss']:.3f}",
            str(m["merges"]),
            f"{m['forward_passes']:,}",
            f"{m['seconds_per_step']:.3g}" if m.get("seconds_per_step") is not None else "-",
            f"{m['peak_memory_mb']:,.0f}" if m.get("peak_memory_mb") is not None else "-",
            *([_percent(m["score"])] if metric else []),
            *([f"{m['reward']:.3f}"] if rewarded else []),
        )
    return table


def summarise(runs: Sequence[Curves]) -> dict[str, Any]:
    """Mean and standard deviation over seeds for each method, and every run's metrics: ``summary.json``."""
    methods: dict[str, Any] = {}
    for label in dict.fromkeys(run.label for run in runs):
        group = [run.metrics for run in runs if run.label == label]
        methods[label] = {"seeds": [m["seed"] for m in group]}
        for name in _SUMMARISED:
            values = [m[name] for m in group if m.get(name) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                methods[label][name] = {"mean": statistics.fmean(values), "std": spread}
    return {"methods": methods, "runs": [run.metrics for run in runs]}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
