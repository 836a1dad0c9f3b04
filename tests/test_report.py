"""Figures and tables: drawn from files alone, whole, and with the numbers that stand in them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from rich.console import Console

from xgblora.report import (
    Curves,
    RunResult,
    draw_eval,
    draw_loss,
    draw_merge_eval,
    draw_summary,
    read_curves,
    results_table,
    summarise,
)


def curves(method: str, seed: int, accuracy: float, merges: list[int] | None = None, **metrics: Any) -> Curves:
    loss = [{"step": step, "loss": 1 / step + seed / 10} for step in range(1, 41)]
    merges = merges or []
    evals = [{"step": s, "eval_loss": 1 / s, "eval_accuracy": accuracy, "merge": s in merges} for s in (10, 20, 30, 40)]
    result = RunResult(
        method=method,
        trainer="zo",
        seed=seed,
        model="some/model",
        task="SST2",
        evaluation_split="validation",
        rows={"train": 200, "dev": 50, "evaluation": 100},
        zero_shot_accuracy=0.5,
        zero_shot_loss=0.9,
        dev_accuracy=accuracy,
        dev_loss=0.3,
        accuracy=accuracy,
        gain=accuracy - 0.5,
        eval_loss=0.25,
        merges=len(merges),
        merge_steps=merges,
        boosters=len(merges) + 1,
        forward_passes=8000,
        forward_sequences=64000,
        steps=40,
        seconds_per_step=0.5,
        training_seconds=20.5,
        peak_memory_mb=1234.5,
        trainable_parameters=100,
    )
    return Curves(replace(result, **metrics), loss, evals)


RUNS = [curves("lora", 0, 0.75), curves("lora", 1, 0.85), curves("xgblora", 0, 0.9, [10, 30])]


@pytest.mark.parametrize("draw", [draw_loss, draw_eval, draw_merge_eval, draw_summary])
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
@pytest.mark.parametrize("runs", [RUNS, RUNS[:1]], ids=["three", "one"])
def test_figures_are_whole_files(draw: Any, ending: str, runs: list[Curves], tmp_path: Path) -> None:
    path = tmp_path / "new folder" / f"figure.{ending}"
    draw(runs, path)
    assert path.read_bytes()[:8].strip().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("draw", [draw_eval, draw_merge_eval])
def test_figures_of_dev_rows_without_accuracy_show_the_loss(draw: Any, tmp_path: Path) -> None:
    runs = [
        replace(run, evals=[{n: v for n, v in e.items() if n != "eval_accuracy"} for e in run.evals]) for run in RUNS
    ]
    for number, shown in enumerate((runs, RUNS)):
        draw(shown, tmp_path / f"{number}.svg")
    bare, whole = ((tmp_path / f"{number}.svg").read_text(encoding="utf-8") for number in (0, 1))
    assert "<!-- loss (nats) -->" in bare
    assert "accuracy" not in bare.lower()
    assert "<!-- accuracy (%) -->" in whole


def test_the_loss_figure_names_its_axes_methods_and_merges(tmp_path: Path) -> None:
    draw_loss(RUNS, tmp_path / "loss.svg")
    text = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    for words in (
        "step",
        "loss",
        "LoRA+ZO, 2 seeds, running mean over 2 points",
        "XGBLoRA+ZO, 1 seed, running mean over 2 points",
        "merge: a booster is frozen",
    ):
        assert f"<!-- {words}" in text or words in text


def _drawn(draw: Any, runs: list[Curves], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Axes]:
    """The axes of a figure, as they are when it is written."""
    kept: list[Figure] = []
    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: (kept.append(figure), write(figure, *a, **b)))
    draw(runs, tmp_path / "figure.png")
    return list(kept[0].axes)


def _with_base(runs: list[Curves]) -> list[Curves]:
    return [
        replace(run, result=replace(run.result, zero_shot_dev_accuracy=0.5, zero_shot_dev_loss=0.75)) for run in runs
    ]


def test_evaluations_begin_with_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (axes,) = _drawn(draw_eval, _with_base(RUNS), monkeypatch, tmp_path)
    curves_of_runs = [line for line in axes.lines if len(line.get_xdata()) == 5]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in curves_of_runs] == [(0, 50)] * 3
    assert "50 development rows" in axes.get_title()


def test_without_boosters_there_is_a_line_across(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    accuracies, losses = _drawn(draw_merge_eval, _with_base(RUNS), monkeypatch, tmp_path)
    for axes, values, base in ((accuracies, (75, 85), 50), (losses, (0.025, 0.025), 0.75)):
        across, boosted = axes.lines[:2], axes.lines[2]
        assert [tuple(line.get_ydata()) for line in across] == [(value, value) for value in values]
        assert list(boosted.get_xdata()) == [0, 1, 2, 3]
        assert boosted.get_ydata()[0] == base


@pytest.mark.parametrize("runs", [[RUNS[0], RUNS[2]], RUNS[:2]], ids=["one seed", "two seeds"])
def test_one_seed_has_an_interval_and_several_are_seen(
    runs: list[Curves], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left, right = _drawn(draw_summary, runs, monkeypatch, tmp_path)
    one = len({run.result.seed for run in runs}) == 1
    assert ("interval of 1 seed" in left.get_title()) is one
    assert ("1 seed" in right.get_title()) is one
    ends = [segment for bar in left.containers if isinstance(bar, ErrorbarContainer) for segment in bar[2]]
    assert len(ends) == (2 if one else 0)
    if one:
        (line,) = ends[0].get_segments()
        assert line[:, 1].tolist() == pytest.approx([100 * end for end in runs[0].result.interval])
    dots = [line for line in left.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in dots] == ([] if one else [[75, 85]])


def test_the_table_says_by_how_much() -> None:
    console = Console(width=140, record=True)
    console.print(results_table(RUNS))
    text = console.export_text()
    for number in ("50.0", "75.0", "+25.0", "+40.0", "0.250", "64,000", "20", "1,234"):
        assert number in text


def test_the_summary_has_means_and_deviations_over_seeds() -> None:
    methods = summarise(RUNS)["methods"]
    assert methods["LoRA+ZO"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert methods["LoRA+ZO"]["accuracy"]["std"] == pytest.approx(0.05 * 2**0.5)
    assert methods["XGBLoRA+ZO"]["accuracy"]["std"] is None
    assert methods["LoRA+ZO"]["seeds"] == [0, 1]


def test_curves_are_read_back(tmp_path: Path) -> None:
    RUNS[2].result.write(tmp_path / "metrics.json")
    (tmp_path / "training_loss.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo', encoding="utf-8")
    again = read_curves(tmp_path)
    assert again.result == RUNS[2].result
    assert again.result.label == "XGBLoRA+ZO"
    assert again.loss == [{"step": 1, "loss": 0.5}], "a line that a kill left unfinished is dropped"
    assert again.evals == []


def test_metrics_hold_what_a_run_has() -> None:
    """Scores, rewards and what training took are there together or not at all; an accuracy of no rows is null."""
    trained = RUNS[0].result.metrics()
    assert not {"metric", "score", "reward", "dev_reward"} & trained.keys()
    assert trained["seconds_per_step"] == 0.5
    nothing = dict.fromkeys(("boosters", "training_seconds", "trainable_parameters", "dev_accuracy", "dev_loss"))
    bare = replace(RUNS[0].result, **nothing).metrics()
    assert not {"boosters", "seconds_per_step", "peak_memory_mb"} & bare.keys()
    assert bare["dev_accuracy"] is None
    scored = replace(RUNS[0].result, metric="f1", score=0.5, zero_shot_score=0.25).metrics()
    assert (scored["score"], scored["dev_score"]) == (0.5, None)
    with pytest.raises(TypeError):
        RunResult(**{name: value for name, value in trained.items() if name != "accuracy"})


def test_boost_is_no_zeroth_order_method_and_its_time_is_that_of_the_training(tmp_path: Path) -> None:
    """A step of boost is a whole booster: seconds a step of two methods cannot stand beside each other."""
    runs = [*RUNS, curves("boost", 0, 0.9, [1, 2], seconds_per_step=70.0, training_seconds=210.0)]
    assert runs[-1].result.label == "Boost"
    draw_summary(runs, tmp_path / "summary.svg")
    text = (tmp_path / "summary.svg").read_text(encoding="utf-8")
    assert "210 s" in text
    assert "70 s" not in text
    console = Console(width=140, record=True)
    console.print(results_table(runs))
    assert "210" in console.export_text()
