"""What a report says, in order: the answer first, then what it stands on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xgblora.report.answers import AnsweredRow, changed_most
from xgblora.report.chart import Chart
from xgblora.report.comparison_charts import accuracy_chart, difference_chart
from xgblora.report.curve_charts import booster_charts, dev_chart, loss_chart
from xgblora.report.intervals import beyond_chance
from xgblora.report.layers import block_norms
from xgblora.report.paired import Difference, paired_difference
from xgblora.report.result import RunResult
from xgblora.report.run_charts import calibration_chart, confusion_chart, layer_chart
from xgblora.report.view import RunView, by_label

CHANGED = 20
"""Rows that are shown."""
LONGEST = 600
"""Characters of a prompt that are shown: its end, which is what is answered."""


@dataclass(frozen=True)
class Figure:
    """A number that is read at first sight. ``value`` is what ``metrics.json`` has under ``metric``."""

    metric: str
    value: float
    shown: str
    name: str


@dataclass(frozen=True)
class Part:
    """What is said of one run."""

    run: RunView
    number: int
    sentence: str
    figures: list[Figure]
    layers: str
    """Which layers changed, in a sentence."""
    forgotten: str
    changed: list[AnsweredRow]
    charts: dict[str, Chart]
    settings: list[tuple[str, str]]
    use: list[tuple[str, str]]
    """Commands, and what each is for."""


@dataclass(frozen=True)
class Content:
    """All of a report."""

    title: str
    lead: str
    trust: str
    """How far the lead can be trusted."""
    charts: list[Chart]
    """Of all runs together."""
    parts: list[Part]


def content(runs: Sequence[RunView]) -> Content:
    """What a report of these runs says.

    Args:
        runs: At least one, of the same model and task.
    """
    first = runs[0].result
    differences, reference = _differences(runs)
    trained = [run for run in runs if run.result.trainer != "none"]
    made = [loss_chart(trained), dev_chart(trained), *booster_charts(trained)]
    if len(runs) > 1:
        labels = list(by_label(runs))
        made = [accuracy_chart(runs), difference_chart(differences, reference, labels), *made]
    lead = reached(first) if len(runs) == 1 else _compared(runs)
    trust = _chance(first) if len(runs) == 1 else _difference_words(differences, reference)
    return Content(
        title=f"{first.task}, learned by {first.model.replace(chr(92), '/').rsplit('/', 1)[-1]}",
        lead=lead,
        trust=trust,
        charts=[chart for chart in made if chart is not None],
        parts=[_part(run, number) for number, run in enumerate(runs)],
    )


def reached(result: RunResult) -> str:
    """What a run came to, in one sentence."""
    low, high = (100 * end for end in result.interval)
    rows = f"{result.rows['evaluation']:,} {result.evaluation_split} rows"
    sentence = (
        f"{result.label}: {100 * result.zero_shot_accuracy:.1f} → {100 * result.accuracy:.1f} % of {rows} right "
        f"({100 * result.gain:+.1f} points; 95 % interval {low:.1f} to {high:.1f})"
    )
    if result.training_seconds is None:
        return f"{sentence}. Nothing was trained."
    took = f"{sentence}, in {_minutes(result.training_seconds)} of training"
    return f"{took}." if result.peak_memory_mb is None else f"{took} and {result.peak_memory_mb:,.0f} MB of memory."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _chance(result: RunResult) -> str:
    won, lost = result.rows_won, result.rows_lost
    losses = f"Their loss went from {result.zero_shot_loss:.3f} to {result.eval_loss:.3f} nats."
    if won is None or lost is None or result.method == "zero-shot":
        return losses
    verdict = "more than chance explains" if beyond_chance(won, lost) else "within what chance explains"
    seed = "One seed: another one may differ by more than this interval says."
    return f"{won:,} rows became right and {lost:,} became wrong, which is {verdict} (McNemar). {losses} {seed}"


def _compared(runs: Sequence[RunView]) -> str:
    groups = by_label(runs)
    means = {label: sum(run.result.accuracy for run in group) / len(group) for label, group in groups.items()}
    order = sorted(means, key=lambda label: -means[label])
    base = sum(run.result.zero_shot_accuracy for run in runs) / len(runs)
    seeds = max(len(group) for group in groups.values())
    result = runs[0].result
    parts = ", ".join(f"{label} {100 * means[label]:.1f} %" for label in order)
    over = "1 seed" if seeds == 1 else f"{seeds} seeds"
    rows = f"{result.rows['evaluation']:,} {result.evaluation_split} rows"
    return f"{parts} of {rows} right ({over}); the base {100 * base:.1f} %."


def _differences(runs: Sequence[RunView]) -> tuple[dict[str, Difference], str]:
    """Every method against LoRA, or the first one, where their answers were kept."""
    groups = {
        label: {run.result.seed: [row.trained.is_right for row in run.answers] for run in group}
        for label, group in by_label(runs).items()
    }
    reference = next((label for label in groups if label.startswith("LoRA")), next(iter(groups)))
    others = [label for label in groups if label != reference]
    made = {label: paired_difference(groups[reference], groups[label]) for label in others}
    return {label: one for label, one in made.items() if one is not None}, reference


def _difference_words(differences: Mapping[str, Difference], reference: str) -> str:
    sentences = [
        f"{label} is {'ahead of' if of.mean >= 0 else 'behind'} {reference} by {100 * abs(of.mean):.1f} points, "
        f"{100 * of.low:+.1f} to {100 * of.high:+.1f}: {'a clear difference' if of.is_clear else 'it may be chance'}."
        for label, of in differences.items()
    ]
    return " ".join(sentences)


def _part(run: RunView, number: int) -> Part:
    made = {
        "layers": layer_chart(run, f"layers-{number}"),
        "calibration": calibration_chart(run, f"calibration-{number}"),
        "confusion": confusion_chart(run, f"confusion-{number}"),
    }
    return Part(
        run=run,
        number=number,
        sentence=reached(run.result),
        figures=_figures(run.result),
        layers=_layers(run),
        forgotten=_forgotten(run.result),
        changed=changed_most(run.answers, CHANGED),
        charts={name: chart for name, chart in made.items() if chart is not None},
        settings=[(name, _shown(value)) for name, value in sorted(run.settings.items()) if value not in (None, [], "")],
        use=_use(run),
    )


def _figures(result: RunResult) -> list[Figure]:
    made: list[tuple[str, float | None, str, float, str]] = [
        ("zero_shot_accuracy", result.zero_shot_accuracy, "{:.1f} %", 100, "right before"),
        ("accuracy", result.accuracy, "{:.1f} %", 100, "right after"),
        ("zero_shot_loss", result.zero_shot_loss, "{:.3f} nats", 1, "loss before"),
        ("eval_loss", result.eval_loss, "{:.3f} nats", 1, "loss after"),
        ("score", result.score, "{:.1f} %", 100, (result.metric or "").replace("_", " ")),
        ("reward", result.reward, "{:.3f}", 1, "mean reward"),
        ("boosters", result.boosters, "{:,}", 1, "boosters"),
        ("rank", result.rank, "{:,}", 1, "rank of the adapter"),
        ("forward_sequences", result.forward_sequences, "{:,}", 1, "examples forwarded"),
        ("training_seconds", result.training_seconds, "{:,.0f} s", 1, "training"),
        ("peak_memory_mb", result.peak_memory_mb, "{:,.0f} MB", 1, "peak memory"),
    ]
    return [
        Figure(metric, value, form.format(factor * value), name)
        for metric, value, form, factor, name in made
        if value is not None
    ]


def _layers(run: RunView) -> str:
    blocks = sorted(block_norms(run.norms), key=lambda block: -block.total)
    if not blocks:
        return ""
    every = sum(block.total**2 for block in blocks)
    shares = ", ".join(f"{block.name} ({100 * block.total**2 / every:.0f} %)" for block in blocks[:3])
    return (
        f"{len(blocks)} decoder layers changed. Most of the squared change is in {shares}; the rest of the model is as "
        "it was."
    )


def _forgotten(result: RunResult) -> str:
    if result.forgotten is None:
        return "Not measured: --other_text FILE scores text that nothing is trained on, before and after."
    direction = "rose" if result.forgotten > 0 else "fell"
    return (
        f"The loss of a token of other text {direction} by {abs(result.forgotten):.3f} nats "
        f"({result.zero_shot_other_text_loss:.3f} → {result.other_text_loss:.3f})."
    )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(of)}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _use(run: RunView) -> list[tuple[str, str]]:
    if not run.asks:
        return []
    folder = run.folder
    return [
        ("Ask it", run.asks),
        ("Score labelled rows of your own", f"xgblora eval {folder} --file rows.csv"),
        ("For PEFT and vLLM", f"xgblora export {folder} --format peft --output my_adapter"),
        ("For llama.cpp", f"xgblora export {folder} --format gguf-lora --output my_adapter.gguf"),
    ]


def tail(prompt: str) -> str:
    """The end of a prompt, as much as is shown."""
    return prompt.strip() if len(prompt) <= LONGEST else f"… {prompt.strip()[-LONGEST:]}"
