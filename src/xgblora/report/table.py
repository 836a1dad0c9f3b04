"""The numbers of finished runs: a table to read and a summary to load."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from xgblora.report.result import Curves

_SUMMARISED = (
    *("accuracy", "score", "reward", "gain", "dev_accuracy", "eval_loss", "other_text_loss"),
    *("seconds_per_step", "training_seconds", "peak_memory_mb", "merges"),
)


def results_table(runs: Sequence[Curves]) -> Table:
    """One line a run: what it reached and what it cost."""
    first = runs[0].result
    split = first.evaluation_split
    table = Table(
        title=f"{first.model} on {first.task}, {first.rows['evaluation']} held-out {split} rows",
        caption="accuracies in %; forwarded: examples; training in seconds, peak memory in MB"
        + ("" if first.forgotten is None else "; forgot: rise of other text's loss, nats"),
    )
    names = ["method", "seed", "zero-shot", "dev", split, "95 %", "gain", "loss", "merges", "forwarded", "training"]
    names += ["peak", *([first.metric.replace("_", " ")] if first.metric else [])]
    names += ["reward"] if first.reward is not None else []
    names += ["forgot"] if first.forgotten is not None else []
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for result in (run.result for run in runs):
        table.add_row(
            result.label,
            str(result.seed),
            _percent(result.zero_shot_accuracy),
            _percent(result.dev_accuracy),
            _percent(result.accuracy),
            "{:.1f}-{:.1f}".format(*(100 * end for end in result.interval)),
            f"{100 * result.gain:+.1f}",
            f"{result.eval_loss:.3f}",
            str(result.merges),
            f"{result.forward_sequences:,}",
            "-" if result.training_seconds is None else _seconds(result.training_seconds),
            "-" if result.peak_memory_mb is None else f"{result.peak_memory_mb:,.0f}",
            *([_percent(result.score)] if result.metric else []),
            *([f"{result.reward:.3f}"] if result.reward is not None else []),
            *([f"{result.forgotten:+.3f}"] if result.forgotten is not None else []),
        )
    return table


def summarise(runs: Sequence[Curves]) -> dict[str, Any]:
    """Mean and standard deviation over seeds for each method, and every run's metrics: ``summary.json``."""
    methods: dict[str, Any] = {}
    for label in dict.fromkeys(run.result.label for run in runs):
        group = [run.result.metrics() for run in runs if run.result.label == label]
        methods[label] = {"seeds": [m["seed"] for m in group]}
        for name in _SUMMARISED:
            values = [m[name] for m in group if m.get(name) is not None]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                methods[label][name] = {"mean": statistics.fmean(values), "std": spread}
    return {"methods": methods, "runs": [run.result.metrics() for run in runs]}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
