"""run.yaml repeats a run; a dry run says what one will take; a card says how to load what came out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import Run, write_rows
from xgblora.cli import main
from xgblora.files import verify
from xgblora.runs.finished import read_finished

SHORT = ["--max_steps", "6", "--logging_steps", "1", "--learning_rate", "1e-2", "--zo_eps", "1e-2"]
POLYNOMIAL = ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"power": 3.0}']
REPEATED = ("training_loss.jsonl", "trainer_state.json", "adapter/adapter_model.safetensors")


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--xgblora", "--xgblora_steps_per_iteration", "2", *SHORT], marks=pytest.mark.soak),
        ["--lora", "--lora_rank", "3", "--lora_target_modules", "q_proj", "v_proj", *SHORT, *POLYNOMIAL],
        ["--recipe", "boost", "--boost_boosters", "2"],
        pytest.param([*SHORT, *POLYNOMIAL], marks=pytest.mark.soak),
    ],
)
def test_run_yaml_repeats_a_run_to_the_last_bit(flags: list[str], small: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(["train", *small, *flags, "--output_dir", str(first)]) == 0
    assert main(["train", "--config", str(first / "run.yaml"), "--output_dir", str(again)]) == 0
    for name in REPEATED:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    theirs, ours = settings(first), settings(again)
    assert ours.pop("output_dir") == str(again)
    assert theirs.pop("output_dir") == str(first)
    assert theirs == ours
    assert theirs["made_with"]["torch"] == torch.__version__.partition("+")[0] or theirs["made_with"]["torch"]
    assert set(theirs["sha256"]) == {"the train data (train.jsonl)", "the validation data (validation.jsonl)"}


def test_run_yaml_repeats_a_comparison(small: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    flags = [*SHORT, "--lora_rank", "1", "--seeds", "1", "--methods", "lora", "xgblora"]
    assert main(["compare", *small, *flags, "--output_root", str(first)]) == 0
    assert main(["compare", "--config", str(first / "run.yaml"), "--output_root", str(again)]) == 0
    for arm in ("lora_seed1", "xgblora_seed1"):
        for name in REPEATED:
            assert (first / arm / name).read_bytes() == (again / arm / name).read_bytes(), (arm, name)


def test_flags_win_over_the_file_also_by_another_name(small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lora_rank: 3\nlearning-rate: 1e-2\nnum_dev: null\nxgblora_patience: 7\n", encoding="utf-8")
    flags = ["--max_steps", "2", "--lora_r", "2", f"--config={file}", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *small, *flags]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert (config["lora_r"], config["learning_rate"], config["xgblora_patience"]) == (2, 0.01, 7)


def test_extra_flags_of_a_comparison_win_too(small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-2\nmax_steps: 2\nmethods: [lora]\nseeds: 0\n", encoding="utf-8")
    flags = ["--config", str(file), "--output_root", str(tmp_path / "all"), "--extra_args", "--learning_rate", "0.5"]
    assert main(["compare", *small, *flags]) == 0
    config = json.loads((tmp_path / "all" / "lora_seed0" / "config.json").read_text("utf-8"))
    assert (config["learning_rate"], config["max_steps"]) == (0.5, 2)


def test_other_data_than_run_yaml_was_written_with_are_named(
    run: Run,
    small: list[str],
    tmp_path: Path,
    model_folder: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 60), ("validation", 20)):
        write_rows(data / f"{split}.jsonl", count)
    flags = [*small, "--data_dir", data, *SHORT]
    assert run("train", *flags, "--output_dir", tmp_path / "run")[0] == 0
    write_rows(data / "train.jsonl", 70)
    code, out, _ = run("train", "--config", tmp_path / "run" / "run.yaml", "--output_dir", tmp_path / "again")
    assert code == 0
    assert "Note: the train data (train.jsonl) is not what it was when" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "there is no flag 'lerning_rate': did you mean learning_rate?"),
        ("verb: compare", "is of xgblora compare, not of xgblora train"),
        ("- a\n- b", "says nothing of the form 'flag: value'"),
        ("a: {b: c", "cannot read --config"),
        ("lr_scheduler_kwargs: {power: 3}", "lr_scheduler_kwargs is a text, a number or a list of them"),
        ("push_to_hub: true", "--push_to_hub is not supported"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        (None, "cannot read --config"),
    ],
)
def test_a_file_that_cannot_be_meant(text: str | None, message: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    code, _, err = run("train", "--config", file, "--output_dir", tmp_path / "run")
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()
    assert run("train", "--config")[0] == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--xgblora --xgblora_steps_per_iteration 2 --max_steps 6",
            "6 steps, 2 merges; 96 examples forwarded to train",
        ),
        ("--lora --max_steps 6 --zo_num_perturbations 2", "6 steps, 0 merges; 192 examples forwarded to train"),
        pytest.param("--lora --num_train_epochs 2", "10 steps, 0 merges", marks=pytest.mark.soak),
        ("--xgblora --xgblora_use_adaptive_merge --max_steps 4", "4 steps, merges where the loss says so"),
        ("--recipe boost --boost_boosters 2", "2 steps, 1 merges"),
        ("--trainer none", "0 steps, 0 merges; 0 examples forwarded to train and 60 to evaluate"),
    ],
)
def test_a_dry_run_says_what_a_run_does_and_leaves_nothing(
    flags: str,
    says: str,
    run: Run,
    small: list[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    command = ["train", *small, *flags.split(), "--zo_eps", "1e-2", "--output_dir", folder]
    code, out, _ = run(*command, "--dry_run")
    assert code == 0
    assert says in out
    assert out.splitlines()[-1] == "Nothing was trained."
    assert not folder.exists()
    assert run(*command)[0] == 0
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert f" {metrics['steps']:,} steps, " in out
    forwarded = re.search(r"([\d,]+) examples forwarded", out)
    assert forwarded is not None
    if "boost" not in flags:
        assert int(forwarded[1].replace(",", "")) == metrics["forward_sequences"]
    else:  # how many step lengths are tried is seen in the run
        assert int(forwarded[1].replace(",", "")) == pytest.approx(metrics["forward_sequences"], rel=0.5)


def test_a_dry_comparison_adds_up_its_runs(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = ["--max_steps", 4, "--xgblora_steps_per_iteration", 2, "--seeds", 0, 1, "--lora_rank", 1]
    code, out, _ = run("compare", *small, *flags, "--output_root", tmp_path / "all", "--dry-run")
    assert code == 0
    assert "all 6 runs: 16 steps, 2 merges; 256 examples forwarded" in out
    assert not (tmp_path / "all").exists()


def test_the_card_says_how_to_load_the_adapter_and_its_code_runs(
    small: list[str], tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main(["train", *small, *SHORT, "--output_dir", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "adapter"
    text = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert (head["library_name"], head["base_model"]) == ("peft", model_folder.as_posix())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert f"| this | {100 * metrics['accuracy']:.1f} | {metrics['eval_loss']:.3f} |" in text
    assert "{{ sentence" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert code[1].count("\n") <= 10
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code[1].replace("this_folder", str(folder)), "card", "exec"), {"PROMPT": "a warm film It was"})
    assert "tensor(" in capsys.readouterr().out


def test_a_card_may_be_edited_and_is_then_nobody_elses_to_remove(
    run: Run,
    small: list[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    command = ["train", *small, "--max_steps", 1, "--output_dir", folder]
    assert run(*command)[0] == 0
    card = folder / "adapter" / "README.md"
    assert run(*command, "--overwrite_output_dir")[0] == 0  # our own card is ours to replace
    card.write_text("notes of mine", encoding="utf-8")
    verify(folder / "adapter")
    assert read_finished(folder).task.name == "SST2"
    code, _, err = run(*command, "--overwrite_output_dir")
    assert code == 2
    assert "holds files of something else (README.md)" in err
    card.unlink()
    verify(folder / "adapter")
    assert run(*command, "--overwrite_output_dir")[0] == 0


@pytest.mark.parametrize(
    "flags",
    [pytest.param("--format peft", marks=pytest.mark.soak), "--format peft --boosters 1", "--format merged"],
)
def test_every_export_has_a_card(flags: str, small: list[str], tmp_path: Path) -> None:
    command = ["train", *small, "--recipe", "boost", "--boost_boosters", "2", "--output_dir", str(tmp_path / "run")]
    assert main(command) == 0
    assert main(["export", str(tmp_path / "run"), *flags.split(), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("A whole model" in text) == ("merged" in flags)
    assert ("Not measured" in text) == ("--boosters" in flags)
    assert (tmp_path / "out" / "task.yaml").is_file()
    verify(tmp_path / "out")
