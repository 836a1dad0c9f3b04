"""How a run ends: with the boosters that dev rows keep, in a sentence, and with what to type next."""

import io
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import LogLines, Run
from test_report import curves
from xgblora import RunConfig, progress
from xgblora.config import precision
from xgblora.progress import Progress
from xgblora.report import closing, short
from xgblora.report.intervals import beyond_chance
from xgblora.runs.arms import arm
from xgblora.runs.demo import SIZES, DemoConfig, _begun, demo, forwards, sized
from xgblora.runs.experiment import ExperimentConfig, arms
from xgblora.runs.folder import dev_losses

RESULT = replace(curves("boost", 0, 0.85, [1, 2]).result, rows_won=20, rows_lost=2, zero_shot_dev_loss=0.9)


@pytest.mark.parametrize(
    ("changes", "losses", "says"),
    [
        (
            {},
            {},
            "Validation: 50.0 -> 85.0 % of 100 rows right (95 % interval 76.7 to 90.7); 20 rows better, 2 rows worse",
        ),
        ({}, {}, "2 rows worse: more than chance."),
        ({"rows_won": 2, "rows_lost": 1}, {}, "2 rows better, 1 row worse: within chance."),
        ({"dev_loss": 0.95}, {}, "On the dev rows the loss rose from 0.900 to 0.950: the base answers better."),
        ({}, {1: 0.5, 2: 0.4, 3: 0.45}, "The dev loss was lowest after booster 2 of 3 (0.400 against 0.450)"),
        ({}, {}, 'Next: xgblora predict runs/mine "a text"'),
    ],
)
def test_a_run_says_what_it_came_to(changes: dict[str, float], losses: dict[int, float], says: str) -> None:
    lines = closing(replace(RESULT, **changes), losses, 'predict runs/mine "a text"')
    assert any(says in line for line in lines), lines


def test_nothing_is_said_against_what_is_best() -> None:
    lines = closing(RESULT, {1: 0.5, 2: 0.4}, "chat runs/mine")
    assert len(lines) == 2
    assert lines[-1] == "Next: xgblora chat runs/mine"
    assert short(RESULT) == "Boost, seed 0: validation 50.0 -> 85.0 % (76.7 to 90.7); trained in 20 s"


@pytest.mark.parametrize(("won", "lost", "differs"), [(0, 0, False), (3, 0, False), (30, 10, True), (10, 30, True)])
def test_what_is_beyond_chance(won: int, lost: int, differs: bool) -> None:
    assert beyond_chance(won, lost) is differs


@pytest.mark.parametrize(
    ("flags", "keeps"), [("", True), ("--early_stopping_boosters 0", False), ("--num_dev 0", False)]
)
def test_recipe_boost_keeps_the_boosters_up_to_the_lowest_dev_loss(
    flags: str, keeps: bool, run: Run, small: list[str], tmp_path: Path
) -> None:
    settings = "--recipe boost --prompt_beginning none --boost_boosters 5 --boost_ridge 0.01"  # the fifth is too many
    command = ["train", *small, *settings.split(), *flags.split()]
    assert run(*command, "--output_dir", tmp_path / "run")[0] == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    if not keeps:
        assert metrics["boosters"] == 5
        return
    lines = (tmp_path / "run" / "eval_loss.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line)["eval_loss"] for line in lines]
    assert len(losses) == 5
    assert metrics["boosters"] == 1 + losses.index(min(losses)) < 5
    assert metrics["dev_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert max(dev_losses(tmp_path / "run")) == metrics["boosters"]


@pytest.mark.parametrize(
    ("flags", "faster", "dtype"),
    [
        ({}, True, "float32"),  # zeroth-order probes of 1e-3 are lost in bfloat16
        ({"zo_eps": 1e-2}, True, "bfloat16"),
        ({"recipe": "boost"}, True, "bfloat16"),
        ({"trainer": "regular"}, True, "bfloat16"),
        ({"trainer": "none"}, False, "float32"),
        ({"recipe": "boost"}, False, "float32"),
        ({"recipe": "boost", "dtype": "float32"}, True, "float32"),
        ({"load_float16": True}, True, "float16"),
        ({"bf16": True}, False, "bfloat16"),
    ],
)
def test_precision_chooses_itself(
    flags: dict[str, object], faster: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda on_gpu=False: faster)
    config = RunConfig(output_dir="x", use_cpu=True, **flags)
    assert config.dtype == dtype
    assert config.resolved()["load_bfloat16"] == (dtype == "bfloat16")


def test_the_arms_of_a_comparison_have_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda on_gpu=False: True)
    config = ExperimentConfig(use_cpu=True, methods=["lora", "boost"], output_root="x")
    assert {configured.dtype for configured in arms(config)} == {"float32"}
    assert arm(ExperimentConfig(use_cpu=True, zo_eps=1e-2), "lora").dtype == "bfloat16"


def test_a_log_has_lines_and_a_terminal_a_bar(log_lines: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(4, "training", "steps", done=1) as shown:
        shown.add()
        shown.say("loss 0.5")
    assert log.getvalue() == ""
    assert log_lines.lines[-1].startswith("training: 2 of 4 steps, loss 0.5, 00:00 so far, about 00:00 left")
    with Progress(4, None) as hidden:
        hidden.add(4)
    assert len(log_lines.lines) == 2
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "training", "steps") as shown:
        shown.add()
    assert "training" in terminal.getvalue()
    assert len(log_lines.lines) == 2


def test_a_run_that_no_terminal_shows_has_no_carriage_return(run: Run, small: list[str], tmp_path: Path) -> None:
    bars = [token for token in small if token not in ("--disable_tqdm", "true", "--use_cpu")]
    code, out, err = run("train", *bars, "--use_cpu", "true", "--max_steps", 4, "--output_dir", tmp_path / "run")
    assert code == 0
    assert "\r" not in out + err
    assert not (tmp_path / "run" / "eval_loss.jsonl").exists()
    assert (tmp_path / "run" / "training_loss.jsonl").read_text("utf-8").count("\n") == 1  # of a run of four steps, too


def test_the_demo_takes_what_fits_and_keeps_what_was_given() -> None:
    work = [forwards(settings) for settings in SIZES.values()]
    assert work == sorted(work, reverse=True)
    config = sized(DemoConfig(use_cpu=True, num_eval=77), "quarter")
    assert (config.num_eval, config.num_train, config.size) == (77, SIZES["quarter"]["num_train"], "quarter")


def test_a_demo_goes_on_in_its_size(model_folder: Path, data_folder: Path, tmp_path: Path, log_lines: LogLines) -> None:
    settings = {"model_name": str(model_folder), "task_name": "SST2", "data_dir": str(data_folder), "use_cpu": True}
    settings |= {"num_train": 24, "num_dev": 8, "num_eval": 8, "max_steps": 2, "disable_tqdm": True, "eval_steps": 2}
    settings |= {"methods": ["boost", "lora"], "output_root": str(tmp_path / "demo")}
    demo(DemoConfig(**settings, size="eighth"))
    again = DemoConfig(**settings)
    assert _begun(again) == "eighth"
    level = logging.getLogger("xgblora.runs.run").level
    demo(again)
    assert log_lines.containing("All 2 runs of")
    assert logging.getLogger("xgblora.runs.run").level == level
