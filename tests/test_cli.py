"""The documented commands as users type them, and every kind of bad input as one clear line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, write_rows
from xgblora import RunConfig, XgbloraError
from xgblora.cli import main
from xgblora.files import verify
from xgblora.runs.arms import METHODS, arm
from xgblora.runs.experiment import ExperimentConfig
from xgblora.runs.run import run as carry_out
from xgblora.runs.workspace import Workspace

ROOT = Path(__file__).parents[1]


XGBLORA_BANNER = """================================================================================
XGBLoRA Configuration:
  Actual rank used: 1 (forced to 1 for XGBLoRA)
  Alpha: 16
  Scaling (alpha/r): 16.0
  Steps per iteration: 12
  Merge frequency (epochs): 1
================================================================================
"""
LORA_BANNER = """================================================================================
Standard LoRA Configuration:
  Rank: 1
  Alpha: 16
  Scaling (alpha/r): 16.0
================================================================================
Initializing LoRA with: r=1, alpha=16, xgblora=False
"""


def test_the_documented_comparison(run: Run, small: list[str], tmp_path: Path) -> None:
    """The bug report's command: equal curves, no merge line, alpha given once."""
    root = tmp_path / "out put"  # with a space, as on Windows
    documented = "--learning_rate 1e-2 --zo_eps 1e-3 --max_steps 12 --xgblora_steps_per_iteration 12 --eval_steps 4"
    documented += " --lora_rank 1 --lora_alpha 16 --seeds 0 1 --logging_steps 1"
    command = ["compare", "--output_root", root, "--loss_figure_path", root / "curve.png", *documented.split(), *small]
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.count(LORA_BANNER) == 2
    assert out.count(XGBLORA_BANNER) == 2
    assert out.count("Initializing LoRA with: r=1, alpha=16, xgblora=True") == 2
    assert "Merging" not in out
    assert out.count("--xgblora_init activations came to") == 1
    assert "Merge schedule: every 12 steps; expected merges: 0" in out
    assert "Seed 0: the loss curves of all methods are identical" in out
    for seed in (0, 1):
        lora, xgblora = (root / f"{method}_seed{seed}" for method in ("lora", "xgblora"))
        curve = (lora / "training_loss.jsonl").read_bytes()
        assert curve == (xgblora / "training_loss.jsonl").read_bytes()
        lines = [json.loads(line) for line in curve.splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 13))
        health = {"projected_gradient_mean", "projected_gradient_std", "zero_differences", "update_norm"}
        assert set(lines[0]) == {"step", "loss", "epoch", "learning_rate"} | health
        for name in ("metrics.json", "config.json", "eval_loss.jsonl", "trainer_state.json", "adapter"):
            assert (xgblora / name).exists(), name
    metrics = json.loads((root / "xgblora_seed0" / "metrics.json").read_text(encoding="utf-8"))
    wanted = {"accuracy", "dev_accuracy", "zero_shot_accuracy", "merges", "forward_passes", "seconds_per_step"}
    assert wanted | {"peak_memory_mb"} <= set(metrics)
    assert metrics["merges"] == 0
    assert metrics["forward_passes"] == 24
    assert metrics["evaluation_split"] == "validation"
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    assert summary["methods"]["LoRA+ZO"]["accuracy"] == summary["methods"]["XGBLoRA+ZO"]["accuracy"]
    # The baseline that costs no training, with other examples for each seed.
    assert list(summary["methods"]) == ["LoRA+ZO", "XGBLoRA+ZO", "in-context"]
    baseline = [result for result in summary["runs"] if result["method"] == "in-context"]
    assert [result["rows"]["train"] for result in baseline] == [8, 8]
    assert baseline[0]["eval_loss"] != baseline[1]["eval_loss"] != metrics["zero_shot_loss"]
    assert {result["zero_shot_loss"] for result in summary["runs"]} == {metrics["zero_shot_loss"]}
    for figure in ("curve.png", "summary.png", "merge_eval.png", "eval.png"):
        assert (root / figure).read_bytes().startswith(b"\x89PNG"), figure
    # The same command on a finished comparison says so and leaves the runs alone.
    before = (root / "lora_seed0" / "metrics.json").stat().st_mtime_ns
    code, out, _ = run(*command)
    assert code == 0
    assert "All 6 runs of" in out
    assert (root / "lora_seed0" / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("trainer", ["zo", pytest.param("regular", marks=pytest.mark.soak)])
def test_2000_steps_without_a_merge_are_bit_identical(trainer: str, run: Run, small: list[str], tmp_path: Path) -> None:
    """The reason this project exists, at the length of the report."""
    flags = "--max_steps 2000 --xgblora_steps_per_iteration 2000 --lora_rank 1 --lora_alpha 16 --seeds 0"
    flags += " --eval_steps 1000 --save_strategy no --optim adamw_torch --learning_rate 1e-3 --zo_eps 1e-2"
    code, out, _ = run("compare", "--output_root", tmp_path, *flags.split(), "--trainer", trainer, *small)
    assert code == 0
    assert "Merging" not in out
    curves = [(tmp_path / f"{method}_seed0" / "training_loss.jsonl").read_bytes() for method in ("lora", "xgblora")]
    assert curves[0] == curves[1]
    losses = [json.loads(line)["loss"] for line in curves[0].splitlines()]
    assert len(losses) == 200
    assert losses[-1] < losses[0], "curves that never moved would be equal, too"


def test_skip_completed_goes_on_and_never_reuses_another_configuration(
    run: Run, small: list[str], tmp_path: Path
) -> None:
    command = ["compare", "--output_root", tmp_path, *["--max_steps", "6", "--lora_rank", "1", "--seeds", "0"], *small]
    assert run(*command)[0] == 0
    kept = tmp_path / "lora_seed0" / "metrics.json"
    (tmp_path / "xgblora_seed0" / "metrics.json").unlink()
    before = kept.stat().st_mtime_ns
    code, _, err = run(*command)
    assert code == 2
    assert "unfinished comparison (2 of 3 runs complete): go on with --skip_completed" in err
    assert run(*command, "--skip_completed")[0] == 0
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "xgblora_seed0" / "metrics.json").is_file()
    code, _, err = run(*command, "--skip_completed", "--lora_alpha", 8)
    assert code == 2
    assert "lora_seed0 holds a run of another configuration (lora_alpha 16 -> 8.0)" in err
    assert run(*command, "--overwrite_output_dir", "--lora_alpha", 8)[0] == 0
    assert kept.stat().st_mtime_ns != before


def test_boost_evaluates_at_every_merge(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = "--max_steps 10 --xgblora_steps_per_iteration 3 --eval_steps 5 --seeds 0 --merge_eval_figure".split()
    code, out, _ = run("boost", "--output_root", tmp_path, *flags, tmp_path / "merges.png", *small)
    assert code == 0
    assert [line for line in out.splitlines() if "Merging" in line] == [
        f"XGBLoRA: Merging and reinitializing at step {step}" for step in (3, 6, 9)
    ]
    lines = (tmp_path / "xgblora_seed0" / "eval_loss.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [(entry["step"], entry["merge"], entry["boosters"]) for entry in map(json.loads, lines)]
    assert evals == [(3, True, 1), (5, False, 1), (6, True, 2), (9, True, 3), (10, False, 3)]
    assert (tmp_path / "merges.png").is_file()
    assert not (tmp_path / "lora_seed0").exists()


def test_train_takes_every_spelling(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = (
        "--lora --lora-rank 4 --lora-alpha 16 --evaluation-strategy steps --eval-steps 2 --max-steps 4 --zo-eps 1e-2"
    )
    code, out, _ = run("train", *flags.split(), "--output-dir", tmp_path / "a", *small, "--no_auto_device")
    assert code == 0
    assert "Initializing LoRA with: r=4, alpha=16, xgblora=False" in out
    assert "--no_auto_device has no effect" in out
    flags = "--lora_r 4 --lora --eval_strategy steps --eval_steps 2 --max_steps 4 --zo_eps 1e-2 --lora_alpha 16"
    assert run("train", *flags.split(), "--output_dir", tmp_path / "b", *small)[0] == 0
    curves = [(tmp_path / name / "training_loss.jsonl").read_bytes() for name in "ab"]
    assert curves[0] == curves[1]


def test_train_resumes_and_finishes(run: Run, small: list[str], tmp_path: Path) -> None:
    """An unfinished folder goes on at its checkpoint and ends as if it had never stopped; a finished one says so."""
    flags = "--xgblora --xgblora_steps_per_iteration 4 --max_steps 10 --save_steps 3 --logging_steps 1".split()
    flags += "--optim adamw_torch --learning_rate 1e-2 --eval_steps 5".split()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = tmp_path / "result.json"
    assert run("train", *flags, "--output_dir", whole, *small, "--result_file", result)[0] == 0
    assert json.loads(result.read_text(encoding="utf-8")) == json.loads((whole / "metrics.json").read_text("utf-8"))
    assert run("train", *flags, "--output_dir", broken, *small)[0] == 0
    # As a kill after step 9's checkpoint leaves it, with a line beyond it half-written.
    (broken / "metrics.json").unlink()
    shutil.rmtree(broken / "checkpoint-10")
    with (broken / "training_loss.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 10, "lo')
    code, out, _ = run("train", *flags, "--output_dir", broken, *small)
    assert code == 0
    assert "Resuming from" in out
    for name in ("training_loss.jsonl", "eval_loss.jsonl", "adapter/adapter_model.safetensors", "adapter/ledger.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (whole, broken)]
    for name in ("accuracy", "dev_loss", "merges", "forward_passes", "forward_tokens"):
        assert metrics[0][name] == metrics[1][name]
    code, out, _ = run("train", *flags, "--output_dir", broken, *small)
    assert code == 0
    assert "is complete: nothing to do" in out


def test_boosters_of_few_layers(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = "--xgblora --xgblora_layers 1 --xgblora_layer_choice top --xgblora_steps_per_iteration 2 --max_steps 4"
    code, _, err = run("train", *flags.split(), "--output_dir", tmp_path / "run", *small)
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert metrics["merge_steps"] == [2]
    assert metrics["trainable_parameters"] == 4 * 32  # A and B of q and v in one of two layers
    assert config["xgblora_layers"] == 1


@pytest.mark.parametrize("trainer", ["regular", "none"])
def test_other_trainers(trainer: str, run: Run, small: list[str], tmp_path: Path) -> None:
    rows = ["--num_train", 0] if trainer == "none" else []
    command = ["train", "--trainer", trainer, "--max_steps", 4, "--output_dir", tmp_path / "run", *small, *rows]
    code, out, _ = run(*command)
    assert code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["forward_passes"] == (4 if trainer == "regular" else 0)
    if trainer == "none":
        assert metrics["accuracy"] == metrics["zero_shot_accuracy"]
        assert "zero-shot" in out


@pytest.mark.parametrize(
    "flags", ["--train_as_classification false", "--train_as_classification false --only_train_option false"]
)
def test_language_model_losses(flags: str, run: Run, small: list[str], tmp_path: Path) -> None:
    flags += " --trainer regular --max_steps 30 --logging_steps 1 --optim adamw_torch --learning_rate 1e-2"
    assert run("train", *flags.split(), "--output_dir", tmp_path, *small)[0] == 0
    lines = (tmp_path / "training_loss.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.1


def test_a_test_split_is_what_is_evaluated(run: Run, small: list[str], data_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (folder / name).write_bytes((data_folder / name).read_bytes())
    write_rows(folder / "test.jsonl", 14)
    code, _, _ = run("train", *small, "--data_dir", folder, "--trainer", "none", "--output_dir", tmp_path / "run")
    assert code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["evaluation_split"] == "test"
    assert metrics["rows"]["evaluation"] == 14


CHECK_LINES = ["rank (r): 1", "alpha: 16", "scaling (alpha/r): 16.0"]


def test_check_of_equal_methods_passes(run: Run) -> None:
    code, out, _ = run("check", "--model_name", "tiny", "--rank", 1, "--alpha", 16)
    assert code == 0
    for line in CHECK_LINES:
        assert out.count(f"  {line}\n") == 2
    assert "16.0 for both methods: a fair comparison of scaling" in out


@pytest.mark.parametrize("mode", ["lora", "xgblora"])
def test_check_of_one_method(mode: str, run: Run) -> None:
    code, out, _ = run("check", "--model_name", "tiny", "--mode", mode, "--rank", 8)
    assert code == 0
    assert ("XGBLoRA Configuration" in out) == (mode == "xgblora")
    assert out.count("  rank (r): ") == 1


def test_a_comparison_refuses_an_arm_before_any_run(run: Run, small: list[str], tmp_path: Path) -> None:
    argv = ["compare", *small, "--max_steps", "2", "--methods", "lora", "xgblora", "--xgblora_layers", "99"]
    code, _, err = run(*argv, "--output_root", tmp_path / "arms")
    assert (code, err.splitlines()[-1][:31]) == (2, "error: --xgblora_layers must be")
    assert not [*tmp_path.glob("arms/*")]


def test_check_fails_where_the_methods_are_not_comparable(run: Run) -> None:
    code, out, _ = run("check", "--model_name", "tiny", "--rank", 8)
    assert code == 1
    assert "FAILED: scaling (alpha/r) is 2.0 for LoRA and 16.0 for XGBLoRA" in out


def test_check_fails_where_eps_is_lost(run: Run) -> None:
    code, out, _ = run("check", "--model_name", "tiny", "--zo_eps", 1e-11)
    assert code == 1
    assert "--zo_eps 1e-11 is lost in float32" in out


def test_check_names_capacity_and_flags_without_effect(run: Run) -> None:
    code, out, _ = run(
        "check",
        "--model_name",
        "tiny",
        "--max_steps",
        100,
        "--xgblora_steps_per_iteration",
        25,
        "--xgblora_patience",
        7,
        "--xgblora_merge_frequency",
        2,
    )
    assert code == 0
    assert "3 merges leave 4 booster(s), LoRA has rank 1: not a fair comparison of capacity" in out
    assert "Note: --xgblora_merge_frequency has no effect" in out
    assert "Note: --xgblora_patience has no effect without --xgblora_use_adaptive_merge" in out


@pytest.mark.parametrize(("eps", "noted"), [("1e-3", True), ("1e-2", False)])
def test_short_probes_in_bfloat16_are_named(eps: str, noted: bool, run: Run, small: list[str], tmp_path: Path) -> None:
    flags = f"--load_bfloat16 --zo_eps {eps} --max_steps 2".split()
    code, out, err = run("train", *flags, "--output_dir", tmp_path / "run", *small)
    assert code == 0
    assert ("is short for bfloat16" in out + err) == noted


def test_learning_in_context_is_a_run(run: Run, model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    flags = (
        f"--model_name {model_folder} --data_dir {data_folder} --task_name SST2 --trainer none --num_eval 20".split()
    )
    metrics = {}
    for count in ("0", "2"):
        folder = tmp_path / count
        code, out, _ = run("train", *flags, "--num_train", count, "--output_dir", folder, "--use_cpu", "true")
        assert code == 0
        assert ("in-context" if count == "2" else "zero-shot") in out
        metrics[count] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["0"]["rows"]["train"] == 0
    assert metrics["0"]["eval_loss"] == metrics["0"]["zero_shot_loss"] == metrics["2"]["zero_shot_loss"]
    assert metrics["2"]["eval_loss"] != metrics["2"]["zero_shot_loss"]
    command = ["train", *flags, "--num_train", 0, "--calibrated", "--output_dir", tmp_path / "calibrated"]
    assert run(*command)[0] == 0
    calibrated = json.loads((tmp_path / "calibrated" / "metrics.json").read_text(encoding="utf-8"))
    assert calibrated["eval_loss"] != metrics["0"]["eval_loss"]
    code, _, err = run("train", *flags[:-4], "--num_train", 0, "--output_dir", tmp_path / "x", "--max_steps", 1)
    assert code == 2
    assert "--num_train must be at least 1, got 0" in err


def test_xgblora_with_another_rank_warns(run: Run, small: list[str], tmp_path: Path) -> None:
    code, out, _ = run("train", "--xgblora", "--lora_r", 8, "--max_steps", 1, "--output_dir", tmp_path, *small)
    assert code == 0
    assert "XGBLoRA should use rank=1, but got r=8. This may cause unexpected behavior!" in out
    assert "Initializing LoRA with: r=1, alpha=16, xgblora=True" in out


BAD_FLAGS = [
    ("--task_name Nope", "unknown task 'Nope' (there are AGNews, BoolQ, CB"),
    ("--nope 3", "unknown argument '--nope'"),
    ("--zo_eps 0", "--zo_eps must be a positive number, got 0.0"),
    ("--zo_eps -1e-3", "--zo_eps must be a positive number, got -0.001"),
    ("--zo_eps nan", "--zo_eps must be a positive number, got nan"),
    ("--zo_eps small", "argument --zo_eps/--zo-eps: invalid float value: 'small'"),
    ("--learning_rate 0", "--learning_rate must be a positive number"),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1, got 0"),
    ("--per_device_train_batch_size -2", "--per_device_train_batch_size must be at least 1, got -2"),
    ("--push_to_hub", "--push_to_hub is not supported: a finished run is uploaded by xgblora push"),
    ("--auto_find_batch_size", "--auto_find_batch_size is not supported: a batch that does not fit stops the run"),
    ("--do_train false", "--do_train is not supported: --trainer none is the run that does not train"),
    ("--dispatch_batches true", "unknown argument '--dispatch_batches'"),
    ("--accelerator-config x.json", "--accelerator_config is not supported: processes share forwards in this package"),
    ("--train_sampling_strategy group_by_length", "--train_sampling_strategy must be random or sequential"),
    ("--recipe boost", "--max_steps counts steps: one step of --recipe boost is a booster (--boost_boosters)"),
    ("--trainer none --calibrated --gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1"),
    ("--max_steps 0", "--max_steps must be at least 1"),
    ("--max_steps -5", "--max_steps must be at least 1"),
    ("--lora_r 0", "--lora_r must be at least 1, got 0"),
    ("--lora_alpha 0", "--lora_alpha must be a positive number"),
    ("--zo_num_perturbations 0", "--zo_num_perturbations must be at least 1"),
    ("--xgblora --xgblora_steps_per_iteration -1", "--xgblora_steps_per_iteration must be 0 or more"),
    ("--lora --xgblora", "are two methods: give one of them"),
    ("--load_float16 --bf16", "bfloat16 and float16 are two precisions of the base: give --dtype alone"),
    ("--dtype float32 --bf16", "bfloat16 and float32 are two precisions of the base"),
    ("--eval_steps 2 --num_dev 0", "needs development examples"),
    ("--trainer sometimes", "argument --trainer: invalid choice"),
    ("--optim nope", "nope is not a valid OptimizerNames"),
    ("--lora_target_modules nothing", "no layer of OPTForCausalLM is named nothing; give --lora_target_modules, here"),
    ("--model_name ./no/such/folder", "the model folder ./no/such/folder does not exist"),
    ("--model_name nobody/no-such-model", "cannot load the model 'nobody/no-such-model'"),
    ("--xgblora --xgblora_layers 3", "--xgblora_layers must be 1 to 2, the layers with adapters, got 3"),
    ("--xgblora --xgblora_layers -1", "--xgblora_layers must be 0 or more"),
    ("--activation_cache_gb -1", "--activation_cache_gb must be 0 or more"),
    ("--activation_cache_gb nan", "--activation_cache_gb must be 0 or more"),
    ("--torch_compile --trainer regular", "--torch_compile is for --trainer zo"),
    ("--torch_compile_mode max-autotune", "--torch_compile_mode is not supported"),
    ("--label_smoothing_factor 0.1", "--label_smoothing_factor is not supported"),
    ("--logging_nan_inf_filter", "--logging_nan_inf_filter is not supported: it hides a diverged loss"),
    ("--calibrated", "--calibrated weighs the options of the base as it is: give --trainer none"),
    ("--task_file no/such.yaml", "--task_name and --task_file name two tasks: give one of them"),
    ("--data_dir no/such/folder", "the data folder no/such/folder does not exist"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_flags_are_one_line(flags: str, message: str | None, run: Run, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = run("train", "--max_steps", 2, "--output_dir", folder, *small, *flags.split())
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in out + err
    assert not folder.exists(), "nothing half-written stays behind"


BAD_DATA = [
    ("train.jsonl", "", "train.jsonl is empty"),
    ("train.jsonl", '{"sentence": "a", "label": 0}\n{"sentence": ', "cannot read"),
    ("train.jsonl", '{"text": "a", "label": 0}\n', "has no column 'sentence', which SST2 needs; it has: text, label"),
    ("train.jsonl", '{"sentence": "a"}\n', "has no column 'label'"),
    (
        "train.jsonl",
        '{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 2}\n',
        "train.jsonl, row 2: the answer 2 is not one of 0 to 1, the options 'terrible', 'great'",
    ),
    (
        "train.jsonl",
        '{"sentence": "a", "label": "good"}\n',
        "row 1: the answer 'good' is not one of the options 'terrible', 'great'",
    ),
    ("train.jsonl", '{"sentence": "a", "label": null}\n', "row 1: column 'label' is empty"),
    ("train.jsonl", '{"sentence": "  ", "label": 1}\n', "row 1: column 'sentence' is empty"),
    ("train.jsonl", '{"sentence": "a\\u0000b", "label": 1}\n', "row 1: the prompt holds a NUL byte"),
    ("train.jsonl", '{"sentence": "a", "label": [0, 1, 2]}\n', "row 1: the answer 2 is not one of 0 to 1"),
    ("train.csv", "sentence,label\n", "has no rows"),
    ("train.csv", "sentence,label\nfine,-1\n", "row 1: the answer -1 is not one of 0 to 1"),
    ("train.parquet", "this is not parquet", "cannot read"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD_DATA, ids=[f"{f}-{m[:25]}" for f, _, m in BAD_DATA])
def test_bad_data_is_one_line(
    file: str, content: str, message: str, run: Run, small: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / file).write_text(content, encoding="utf-8")
    write_rows(folder / "validation.jsonl", 4)
    code, out, err = run("train", *small, "--data_dir", folder, "--output_dir", tmp_path / "run")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists(), "nothing half-written stays behind"


def test_missing_data_files(run: Run, small: list[str], tmp_path: Path) -> None:
    command = ["train", *small, "--data_dir", tmp_path, "--output_dir", tmp_path / "run"]
    assert "has no train file" in run(*command)[2]
    write_rows(tmp_path / "train.jsonl", 4)
    assert "has neither a test nor a validation file" in run(*command)[2]
    write_rows(tmp_path / "validation.jsonl", 4)
    (tmp_path / "train.csv").write_text("sentence,label\nx,1\n", encoding="utf-8")
    assert "has several train files (train.jsonl, train.csv): keep one" in run(*command)[2]


@pytest.mark.parametrize("file", ["model.gguf", "model.safetensors"])
def test_corrupt_models(file: str, run: Run, small: list[str], model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for original in model_folder.iterdir():
        (folder / original.name).write_bytes(original.read_bytes())
    (folder / file).write_bytes(b"GGUF" + b"\x00\x01garbage" * 40)
    name = folder / file if file.endswith("gguf") else folder
    code, out, err = run("train", *small, "--model_name", name, "--output_dir", tmp_path / "run")
    assert code == 2
    assert "cannot load the model" in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


OWN_CODE = """
from pathlib import Path
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
class OwnConfig(OPTConfig):
    model_type = "own"
class OwnModel(OPTForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_where_it_is_trusted(
    run: Run, small: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran, output = tmp_path / "model", tmp_path / "ran", tmp_path / "run"
    shutil.copytree(model_folder, folder)
    (folder / "own.py").write_text(OWN_CODE.format(ran=str(ran)), encoding="utf-8")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"model_type": "own"}
    described["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    described |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    flags = [*small, "--model_name", folder, "--xgblora", "--max_steps", 2, "--lora_target_modules", "q_proj"]
    data = flags[flags.index("--data_dir") + 1]
    commands = {
        "check": ["check", *flags],
        "tasks": ["tasks", "SST2", "--data_dir", data, "--model_name", folder],
        "train": ["train", *flags, "--output_dir", output],
        "stages": ["stages", output],
        "export": ["export", output, "--format", "merged"],
    }
    for verb, command in commands.items():
        ran.unlink(missing_ok=True)
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (2, 1), verb
        assert "needs Python code that comes with it" in err, verb
        assert not ran.exists(), verb
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]  # or it would not run again
        code, _, err = run(*command, "--trust_remote_code")
        assert (code, err) == (0, ""), verb
        assert ran.exists(), verb
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["trust_remote_code"] is True


def test_a_folder_with_something_else_is_refused(run: Run, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
    code, _, err = run("train", *small, "--max_steps", 2, "--output_dir", tmp_path)
    assert code == 2
    assert "holds files of something else" in err
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
    code, _, err = run("train", *small, "--max_steps", 2, "--output_dir", tmp_path / "letter.txt")
    assert code == 2
    assert "is a file" in err


def test_another_run_in_the_folder_is_refused(run: Run, small: list[str], tmp_path: Path) -> None:
    command = ["train", *small, "--max_steps", 2, "--output_dir", tmp_path]
    assert run(*command)[0] == 0
    before = (tmp_path / "metrics.json").read_bytes()
    code, _, err = run(*command, "--zo_eps", "5e-3")
    assert code == 2
    assert "holds a run of another configuration (zo_eps 0.001 -> 0.005)" in err
    boost = [token for token in command if token not in ("--max_steps", 2)]
    code, _, err = run(*boost, *"--xgblora --recipe boost --boost_ridge 2".split())
    assert code == 2
    assert "holds a run of another configuration (recipe classic -> boost, boost_ridge None -> 2.0" in err
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert run(*command, "--zo_eps", "5e-3", "--overwrite_output_dir")[0] == 0


def test_flags_of_the_other_recipe_do_not_make_another_run(run: Run, small: list[str], tmp_path: Path) -> None:
    command = ["train", *small, "--max_steps", 2, "--output_dir", tmp_path]
    assert run(*command)[0] == 0
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["boost_ridge"]  # as an older version wrote it
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run(*command, "--boost_boosters", 7)[0] == 0


def test_a_diverging_run_stops_in_one_line(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = "--lora --trainer regular --learning_rate 1e30 --max_steps 9 --save_steps 1 --max_grad_norm 0".split()
    code, _, err = run("train", *small, *flags, "--output_dir", tmp_path)
    assert code == 2
    assert "which was not applied" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "metrics.json").exists()
    assert list(tmp_path.glob("checkpoint-*"))


def test_extra_args_reach_both_arms_and_may_not_contradict(run: Run, small: list[str], tmp_path: Path) -> None:
    command = ["compare", "--output_root", tmp_path, "--max_steps", 2, "--lora_rank", 1, "--seeds", 0, *small]
    assert run(*command, "--extra_args", "--zo_num_perturbations", 3)[0] == 0
    for method in ("lora", "xgblora"):
        metrics = json.loads((tmp_path / f"{method}_seed0" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["forward_passes"] == 2 * 3 * 2
    code, _, err = run(*command, "--lora_alpha", 16, "--extra_args", "--lora-alpha", 8)
    assert code == 2
    assert "--extra_args gives --lora_alpha 8.0, which contradicts --lora_alpha 16.0" in err
    for flags in (["--xgblora"], ["--extra_args", "--seed", "4"]):
        code, _, err = run(*command, *flags)
        assert code == 2
        assert "is set for each run of a comparison" in err


def test_boosting_from_training_to_export(run: Run, small: list[str], tmp_path: Path) -> None:
    """Train by the recipe, look at its stages, export a part, and start the next run from that part."""
    folder, part, second = tmp_path / "run", tmp_path / "part", tmp_path / "second"
    boost = "train --recipe boost --boost_boosters 3 --boost_search_share 0.4 --early_stopping_boosters 0".split()
    code, out, err = run(*boost, *small, "--eval_strategy", "steps", "--output_dir", folder)
    assert (code, err) == (0, "")
    assert "Recipe: boost" in out
    assert "│ Boost " in out
    assert "Boost+" not in out
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["method"], metrics["merges"], metrics["steps"]) == ("boost", 2, 3)
    assert metrics["eval_loss"] < metrics["zero_shot_loss"]
    assert verify(folder / "adapter")["task"] == "SST2"
    ledger = json.loads((folder / "adapter" / "ledger.json").read_text(encoding="utf-8"))
    assert [booster["evaluation"] is not None for booster in ledger["boosters"]] == [True, True]
    upper = {f"model.decoder.layers.1.{name}" for name in ("self_attn.out_proj", "fc2")}  # the upper half of two layers
    assert all(set(booster["norms"]) <= upper for booster in ledger["boosters"])
    assert ledger["boosters"][0]["norms"]

    code, out, err = run("stages", folder)
    assert (code, err) == (0, "")
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    assert [stage["boosters"] for stage in stages] == [0, 1, 2, 3]
    assert stages[0]["loss"] == pytest.approx(metrics["zero_shot_loss"], rel=1e-5)
    assert stages[3]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert stages[1]["dev_loss"] == pytest.approx(ledger["boosters"][0]["evaluation"]["eval_loss"], rel=1e-5)
    assert (folder / "stages.png").read_bytes().startswith(b"\x89PNG")

    assert run("export", folder, "--boosters", 2, "--output", part)[0] == 0
    targets = ["--lora_target_modules", "out_proj", "fc2"]
    flags = ["--xgblora", "--max_steps", "2", "--init_adapter", part, "--output_dir", second]
    code, out, _ = run("train", *flags, *targets, *small, "--overwrite_output_dir", "true")
    assert code == 0
    assert r"was trained on prompts that begin with '\n', those of this run begin with ''" in out
    alike = ["--prompt_beginning", "auto", "--overwrite_output_dir", "true"]
    code, out, err = run("train", *flags, *targets, *small, *alike)
    assert (code, err) == (0, "")
    assert "was trained on prompts that" not in out
    after = json.loads((second / "metrics.json").read_text(encoding="utf-8"))
    assert after["zero_shot_loss"] == metrics["zero_shot_loss"]
    assert after["merges"] == 0
    assert after["eval_loss"] == pytest.approx(stages[2]["loss"], abs=0.05)
    assert len(json.loads((second / "adapter" / "ledger.json").read_text(encoding="utf-8"))["boosters"]) == 2


def test_boost_beside_lora(run: Run, small: list[str], tmp_path: Path) -> None:
    """Each method in its own steps; the figures count examples forwarded."""
    flags = "--methods lora boost --seeds 0 --max_steps 4 --eval_steps 2 --lora_rank 1 --boost_boosters 2".split()
    code, out, err = run("compare", "--output_root", tmp_path, *flags, *small)
    assert (code, err) == (0, "")
    assert "Scaling" in out
    steps = [
        json.loads((tmp_path / f"{m}_seed0" / "metrics.json").read_text("utf-8"))["steps"] for m in ("lora", "boost")
    ]
    assert steps == [4, 2]
    assert (tmp_path / "eval.png").is_file()
    assert "no effect" not in out  # each arm has the flags of its recipe
    lora = json.loads((tmp_path / "lora_seed0" / "config.json").read_text("utf-8"))
    assert lora["boost_boosters"] == RunConfig(output_dir="unused").boost_boosters


def test_learning_in_context_beside_lora(run: Run, small: list[str], tmp_path: Path) -> None:
    """A row of the table and a bar of the summary; curves are of what was trained."""
    flags = "--methods in-context lora --in_context_examples 2 --seeds 0 1 --max_steps 4 --eval_steps 2".split()
    command = ["compare", "--output_root", tmp_path, *flags, *small]
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.count("│ in-context") == 2
    shown, lora = (
        json.loads((tmp_path / name / "metrics.json").read_text("utf-8")) for name in ("in-context_seed0", "lora_seed0")
    )
    assert [m["rows"] for m in (shown, lora)] == [{"train": n, "dev": 10, "evaluation": 20} for n in (2, 40)]
    assert shown["eval_loss"] != shown["zero_shot_loss"]
    assert shown["zero_shot_loss"] == lora["zero_shot_loss"]
    assert all((tmp_path / f"{name}.png").is_file() for name in ("loss", "eval", "summary"))
    assert "identical" not in out
    assert "All 4 runs" in run(*command)[1]


def test_few_training_rows_are_all_shown_in_context(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = ["--num_train", 4, "--seeds", 0, "--max_steps", 2]
    assert run("compare", "--output_root", tmp_path, *small, *flags)[0] == 0
    metrics = json.loads((tmp_path / "in-context_seed0" / "metrics.json").read_text("utf-8"))
    assert metrics["rows"]["train"] == 4


def test_a_workspace_serves_runs_of_its_own_rows(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """Else a run would train on other rows than its record says."""

    def config(**flags: Any) -> RunConfig:
        common = {"model_name": str(model_folder), "data_dir": str(data_folder), "task_name": "SST2", "num_eval": 4}
        common |= {"max_steps": 1, "num_dev": 4, "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path)}
        return RunConfig(**common | flags)

    workspace = Workspace(config(num_train=20))
    for flags in ({"num_train": 10}, {"num_train": 40}, {"num_train": 30, "trainer": "none"}):
        with pytest.raises(XgbloraError, match="a workspace of --num_train 20 does not serve"):
            carry_out(config(**flags), workspace)
    assert not list(tmp_path.iterdir())
    assert carry_out(config(num_train=2, trainer="none"), workspace).rows["train"] == 2


def test_a_flag_that_an_older_version_lacked_has_its_default(run: Run, small: list[str], tmp_path: Path) -> None:
    command = ["train", *small, "--trainer", "none", "--num_train", 0, "--output_dir", tmp_path]
    assert run(*command)[0] == 0
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del config["calibrated"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "is complete: nothing to do" in run(*command)[1]
    assert "another configuration (calibrated False -> True" in run(*command, "--calibrated")[2]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("compare --recipe boost", "--methods"),
        ("boost --methods lora", "--methods"),
        ("compare --methods lora trees", "lora, xgblora, boost"),
        ("compare --methods lora lora", "different ones"),
        ("train --init_adapter somewhere", "--xgblora"),
        ("compare --methods lora --init_adapter somewhere", "--xgblora"),
        ("boost --init_adapter nowhere --output_root OUT", "no PEFT adapter"),
        ("train --xgblora --init_adapter nowhere --output_dir OUT", "no PEFT adapter"),
        ("train --recipe boost --lora_target_modules v_proj --output_dir OUT", "residual stream"),
        ("stages", "say which run"),
        ("stages nowhere", "no finished run"),
    ],
)
def test_what_boosting_cannot_do_is_one_line(
    command: str, says: str, run: Run, small: list[str], tmp_path: Path
) -> None:
    verb, *rest = command.replace("OUT", str(tmp_path / "out")).split()
    code, _, err = run(verb, *rest, *([] if verb == "stages" else small))
    assert code == 2
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["run", "compare_xgblora_lora", "run_xgblora", "test_alpha_config"])
def test_the_documented_scripts_start(script: str) -> None:
    """As a process of its own, from the repository root; the check runs whole, the others show their flags."""
    arguments = ["--rank", "1", "--alpha", "16"] if script == "test_alpha_config" else ["--help"]
    done = subprocess.run(
        [sys.executable, f"large_models/{script}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("Check passed" if script == "test_alpha_config" else "--xgblora_steps_per_iteration") in done.stdout


RUNS = {
    "lora": "--lora --lora_r 4",
    "xgblora": "--xgblora --xgblora_steps_per_iteration 3 --max_steps 9",
    "layers": "--xgblora --xgblora_layers 2 --xgblora_layer_choice top",
    "boost": "--recipe boost --boost_boosters 3 --early_stopping_boosters 2",
    "boost by hand": "--xgblora --recipe boost --xgblora_layers 1 --lora_target_modules out_proj",
    "regular": "--trainer regular --lora --max_steps 5",
    "regular, boosted": "--trainer regular --xgblora --xgblora_use_adaptive_merge",
    "reward": "--reward accuracy --xgblora",
    "expected reward": "--reward f1 --trainer regular --lora",
    "in context": "--trainer none --num_train 4",
    "calibrated": "--trainer none --num_train 0 --calibrated",
    "half": "--load_bfloat16 --lora --zo_eps 1e-2",
}


TIMED = ("lora", "xgblora", "layers", "regular", "regular, boosted", "half")
QUICK = [(name, model) for name in RUNS if name not in TIMED for model in (False, True)]
QUICK += [("lora", True), ("xgblora", True), ("regular", True), ("half", True)]
"""Of steps that are timed, those of the tiny model; the others are soak's."""


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=() if (name, model) in QUICK else pytest.mark.soak)
        for model in (False, True)
        for name in RUNS
    ],
)
def test_check_takes_the_flags_of_every_run(name: str, model: bool, run: Run, small: list[str]) -> None:
    """It says what that run is, and passes; with a model it looks at that one."""
    flags = [*RUNS[name].split(), *(small if model else ["--use_cpu", "true"])]
    code, out, err = run("check", *flags)
    assert (code, err) == (0, "")
    assert out.endswith("Check passed\n")
    trains = "--trainer none" not in RUNS[name]
    boosted = "xgblora" in RUNS[name] or "boost" in RUNS[name]
    assert ("XGBLoRA Configuration" in out) == (trains and boosted)
    assert ("Standard LoRA Configuration" in out) == ((trains and not boosted) or (name == "half" and not boosted))
    assert ("Recipe: boost" in out) == ("--recipe boost" in RUNS[name])
    if name == "lora":
        assert "  rank (r): 4\n" in out


@pytest.mark.parametrize("mode", ["both", "lora", "xgblora"])
def test_check_of_a_mode_beside_a_method(mode: str, run: Run) -> None:
    """What --mode says is shown, whatever else is given."""
    code, out, _ = run("check", "--model_name", "tiny", "--recipe", "boost", "--mode", mode, "--use_cpu", "true")
    assert code == 0
    assert ("Recipe: boost" in out) == (mode != "lora")
    assert ("Standard LoRA Configuration" in out) == (mode != "xgblora")


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    run: Run, small: list[str], data_folder: Path, tmp_path: Path
) -> None:
    """The model is not even there."""
    rows = tmp_path / "rows"
    rows.mkdir()
    write_rows(rows / "train.jsonl", 2)
    write_rows(rows / "validation.jsonl", 4)
    nowhere = ["--model_name", tmp_path / "no model", "--output_dir", tmp_path / "run"]
    for flags, message in (
        (["--recipe", "boost", "--num_train", 1], "--recipe boost fits boosters on at least 2 examples"),
        (["--recipe", "boost", "--data_dir", rows, "--num_train", 40, "--num_dev", 0], "got 2 training rows"),
        (["--xgblora", "--init_adapter", tmp_path], "holds no PEFT adapter"),
        (["--reward", "best"], "--reward 'best' is neither one of"),
        (["--train_as_classification", "true", "--task_name", "SQuAD"], "SQuAD has no options to classify"),
    ):
        code, _, err = run("train", *small, *flags, *nowhere)
        assert (code, err.count("\n")) == (2, 1), flags
        assert message in err
        assert not (tmp_path / "run").exists()


def test_a_flag_that_means_nothing_to_any_arm_is_noted_once(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = ["--methods", "lora", "boost", "--seeds", 0, "--max_steps", 2, "--boost_boosters", 1]
    code, out, _ = run("compare", "--output_root", tmp_path, *flags, "--xgblora_patience", 7, *small)
    assert code == 0
    assert out.count("has no effect") == 1
    assert "Note: --xgblora_patience has no effect without --xgblora_use_adaptive_merge" in out


def test_every_arm_keeps_the_flags_that_work_there() -> None:
    flags: dict[str, Any] = {"lora_r": 4, "xgblora_layers": 1, "xgblora_layer_choice": "top", "zo_eps": 0.5}
    flags |= {"lora_target_modules": ["fc2"], "boost_ridge": 2.0, "max_steps": 9, "eval_steps": 3}
    config = ExperimentConfig(use_cpu=True, **flags)
    arms = {method: arm(config, method) for method in METHODS}
    lora, xgblora, boost, shown = (arms[name] for name in ("lora", "xgblora", "boost", "in-context"))
    assert [arms[name].zo_eps for name in ("backprop", "calibrated", "centroid", "probe")] == 4 * [RunConfig.zo_eps]
    assert arms["backprop"].lora_target_modules == ["fc2"]
    default = RunConfig(output_dir="unused", use_cpu=True)
    assert [a.rank for a in (lora, xgblora, boost)] == [4, 1, 1]
    assert [a.xgblora_layers for a in (lora, xgblora, boost, shown)] == [0, 1, 0, 0]
    assert [a.xgblora_layer_choice for a in (lora, xgblora, boost)] == [None, "top", "top"]
    assert [a.lora_target_modules for a in (lora, xgblora, boost)] == [["fc2"], ["fc2"], []]
    assert [a.zo_eps for a in (lora, xgblora, boost, shown)] == [0.5, 0.5, default.zo_eps, default.zo_eps]
    assert [a.boost_ridge for a in (lora, xgblora, boost)] == [default.boost_ridge, default.boost_ridge, 2.0]
    assert [a.max_steps for a in (lora, xgblora, boost)] == [9, 9, boost.boost_boosters]
    assert [a.eval_steps for a in (lora, xgblora, boost)] == [3, 3, 1]
    rewarded = ExperimentConfig(use_cpu=True, reward="accuracy", reward_completions="expected", reward_samples=7)
    for method in ("lora", "xgblora"):
        assert arm(rewarded, method).reward_completions == "expected"
        assert arm(rewarded, method).reward_samples == 7


def test_flags_that_have_no_effect_do_not_make_another_run(run: Run, small: list[str], tmp_path: Path) -> None:
    command = ["train", "--lora", *small, "--max_steps", 2, "--output_dir", tmp_path]
    assert run(*command)[0] == 0
    assert "is complete" in run(*command, "--xgblora_patience", 7, "--boost_ridge", 2)[1]
    code, _, err = run(*command, "--zo_eps", 0.5)
    assert code == 2
    assert "(zo_eps 0.001 -> 0.5)" in err


def test_help_is_silent_on_what_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = capsys.readouterr().out
    assert "--zo_eps" in text
    assert "--warmup_steps" in text
    assert "--push_to_hub" not in text
