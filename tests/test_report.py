"""Figures and tables: drawn from files alone, whole, and with the numbers that stand in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from xgblora.report import Curves, draw_eval, draw_loss, draw_merge_eval, draw_summary, results_table, summarise
from xgblora.report.curves import read_curves


def curves(label: str, seed: int, accuracy: float, merges: list[int] | None = None) -> Curves:
    loss = [{"step": step, "loss": 1 / step + seed / 10} for step in range(1, 41)]
    merges = merges or []
    evals = [{"step": s, "eval_loss": 1 / s, "eval_accuracy": accuracy, "merge": s in merges} for s in (10, 20, 30, 40)]
    metrics = {
        "method": "lora",
        "trainer": "zo",
        "seed": seed,
        "model": "some/model",
        "task": "SST2",
        "evaluation_split": "validation",
        "rows": {"evaluation": 100},
        "zero_shot_accuracy": 0.5,
        "dev_accuracy": accuracy,
        "accuracy": accuracy,
        "gain": accuracy - 0.5,
        "eval_loss": 0.25,
        "merges": len(merges),
        "merge_steps": merges,
        "forward_passes": 8000,
        "forward_sequences": 64000,
        "steps": 40,
        "seconds_per_step": 0.5,
        "peak_memory_mb": 1234.5,
    }
    return Curves(label, seed, loss, evals, merges, metrics)


RUNS = [curves("LoRA+ZO", 0, 0.75), curves("LoRA+ZO", 1, 0.85), curves("XGBLoRA+ZO", 0, 0.9, [10, 30])]


@pytest.mark.parametrize("draw", [draw_loss, draw_eval, draw_merge_eval, draw_summary])
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
@pytest.mark.parametrize("runs", [RUNS, RUNS[:1]], ids=["three", "one"])
def test_figures_are_whole_files(draw: Any, ending: str, runs: list[Curves], tmp_path: Path) -> None:
    path = tmp_path / "new folder" / f"figure.{ending}"
    draw(runs, path)
    assert path.read_bytes()[:8].strip().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_loss_figure_names_its_axes_methods_and_merges(tmp_path: Path) -> None:
    draw_loss(RUNS, tmp_path / "loss.svg")
    text = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    for words in (
        "step",
        "loss",
        "LoRA+ZO, mean of 2 seed",
        "XGBLoRA+ZO, mean of 1 seed",
        "merge: a booster is frozen",
    ):
        assert f"<!-- {words}" in text or words in text


def test_the_table_says_by_how_much() -> None:
    console = Console(width=140, record=True)
    console.print(results_table(RUNS))
    text = console.export_text()
    for number in ("50.0", "75.0", "+25.0", "+40.0", "0.250", "8,000", "0.5", "1,234"):
        assert number in text


def test_the_summary_has_means_and_deviations_over_seeds() -> None:
    methods = summarise(RUNS)["methods"]
    assert methods["LoRA+ZO"]["accuracy"]["mean"] == pytest.approx(0.8)
    assert methods["LoRA+ZO"]["accuracy"]["std"] == pytest.approx(0.05 * 2**0.5)
    assert methods["XGBLoRA+ZO"]["accuracy"]["std"] is None
    assert methods["LoRA+ZO"]["seeds"] == [0, 1]


def test_curves_are_read_back(tmp_path: Path) -> None:
    metrics = RUNS[2].metrics | {"method": "xgblora"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (tmp_path / "training_loss.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo', encoding="utf-8")
    found = read_curves(tmp_path)
    assert (found.label, found.merges) == ("XGBLoRA+ZO", [10, 30])
    assert found.loss == [{"step": 1, "loss": 0.5}], "a line that a kill left unfinished is dropped"
    assert found.evals == []
