"""The demo, shortened: the same path that ``make demo`` takes, on the real model and the real sentences."""

import json
from pathlib import Path

import pytest

from xgblora.cli import main


def test_a_short_demo_ends_with_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--max_steps 4 --xgblora_steps_per_iteration 2 --num_train 16 --num_dev 4 --num_eval 8 --eval_steps 2"
    flags += " --per_device_train_batch_size 4 --boost_boosters 2 --use_cpu true --disable_tqdm true --logging_steps 1"
    assert main(["demo", "--output_root", str(tmp_path), *flags.split()]) == 0
    out = capsys.readouterr().out
    for words in (
        "LoRA+ZO",
        "XGBLoRA+ZO",
        "Boost ",
        "zero-shot",
        "forwarded",
        "training",
        "loss.png",
        "summary.png",
        "summary.json",
    ):
        assert words in out
    assert "8 held-out test rows" in out
    assert "XGBLoRA: Merging and reinitializing at step 2" in out
    metrics = [json.loads((tmp_path / f"{m}_seed0" / "metrics.json").read_text("utf-8")) for m in ("lora", "xgblora")]
    assert metrics[0]["zero_shot_loss"] == metrics[1]["zero_shot_loss"]
    assert metrics[0]["eval_loss"] != metrics[1]["eval_loss"]
    assert metrics[0]["eval_loss"] != metrics[0]["zero_shot_loss"]
