"""What a run came to, in the sentences that stand at its end."""

from collections.abc import Mapping
from pathlib import Path

from xgblora.report.intervals import beyond_chance
from xgblora.report.result import RunResult


def closing(result: RunResult, dev_losses: Mapping[int, float], asks: str) -> list[str]:
    """The result in sentences: how good, whether by chance, what the dev rows say, and what to type next.

    Args:
        result: The run's.
        dev_losses: The dev loss with the first k boosters, where they were judged.
        asks: The command that asks its model: ``predict FOLDER TEXT`` with ``TEXT`` an example.
    """
    lines = [_reached(result)]
    if dev := _dev(result, dev_losses):
        lines.append(dev)
    if (rise := result.forgotten) is not None and result.boosters is not None:
        lines.append(
            f"Other text: the loss of a token {result.zero_shot_other_text_loss:.3f} -> {result.other_text_loss:.3f} "
            f"nats ({rise:+.3f})."
        )
    if result.boosters is not None:
        lines.append(f"Next: xgblora {asks}")
    return lines


def stages_closing(dev_losses: Mapping[int, float], folder: Path) -> str:
    """Which stage of a run the dev rows would choose, and what to type for its answers.

    Args:
        dev_losses: The dev loss with the first k boosters; empty for a run without dev rows.
        folder: The run's.
    """
    if not dev_losses:
        return "There are no dev rows to choose a stage by (--num_dev); test rows choose nothing."
    best, last = min(dev_losses, key=dev_losses.__getitem__), max(dev_losses)
    return (
        f"The dev loss is lowest with {best} of {last} boosters ({dev_losses[best]:.4f}).\n"
        f'Next: xgblora predict {folder.as_posix()} "a text" --boosters {best}'
    )


def short(result: RunResult) -> str:
    """The result in one line, for a log of several runs."""
    low, high = (100 * end for end in result.interval)
    took = "" if result.training_seconds is None else f"; trained in {result.training_seconds:,.0f} s"
    return (
        f"{result.label}, seed {result.seed}: {result.evaluation_split} {100 * result.zero_shot_accuracy:.1f} -> "
        f"{100 * result.accuracy:.1f} % ({low:.1f} to {high:.1f}){took}"
    )


def _reached(result: RunResult) -> str:
    low, high = (100 * end for end in result.interval)
    before, after = 100 * result.zero_shot_accuracy, 100 * result.accuracy
    sentence = (
        f"{result.evaluation_split.capitalize()}: {before:.1f} -> {after:.1f} % of {_rows(result.rows['evaluation'])} "
        f"right (95 % interval {low:.1f} to {high:.1f})"
    )
    if result.rows_won is None or result.rows_lost is None or result.method == "zero-shot":
        return f"{sentence}."
    verdict = "more than chance" if beyond_chance(result.rows_won, result.rows_lost) else "within chance"
    return f"{sentence}; {_rows(result.rows_won)} better, {_rows(result.rows_lost)} worse: {verdict}."


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _dev(result: RunResult, losses: Mapping[int, float]) -> str:
    """What the dev rows say against the model as it is."""
    before, now = result.zero_shot_dev_loss, result.dev_loss
    if before is not None and now is not None and now > before:
        return f"On the dev rows the loss rose from {before:.3f} to {now:.3f}: the base answers better."
    if not losses:
        return ""
    best, last = min(losses, key=losses.__getitem__), max(losses)
    if best == last:
        return ""
    return (
        f"The dev loss was lowest after booster {best} of {last} ({losses[best]:.3f} against {losses[last]:.3f}): "
        "--early_stopping_boosters keeps the boosters up to there."
    )
