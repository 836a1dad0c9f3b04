"""A search: flags as given come first, the best is never worse, test rows choose nothing, a stop changes nothing."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml

from conftest import Run
from processes import finish, start
from test_launch import at_work_in
from xgblora.errors import XgbloraError
from xgblora.runs.search import Searched, parse_search

FLAGS = "--lora --max_steps 20 --learning_rate 1e-2 --zo_eps 1e-2 --dtype float32"


@pytest.fixture
def tuned(small: list[str]) -> list[str]:
    return ["tune", *FLAGS.split(), *small]


def trials(root: Path) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((root / "trials.json").read_text(encoding="utf-8"))
    lines: list[dict[str, Any]] = content["trials"]
    return lines


def facts(root: Path) -> list[dict[str, Any]]:
    """What is the same wherever trials are carried out."""
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in trials(root)]


def test_the_best_trial_has_the_lowest_dev_loss_and_can_be_repeated(
    tuned: list[str], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "tuned"
    code, out, err = run(*tuned, "--trials", "6", "--output_root", root)
    assert code == 0, err
    lines = trials(root)
    assert lines[0]["values"] == {"learning_rate": 1e-2, "zo_eps": 1e-2, "lora_r": 8}
    losses = {line["number"]: line["loss"] for line in lines if line["state"] == "complete"}
    best = min(losses, key=losses.__getitem__)
    assert f"Best: trial {best + 1}, dev loss {losses[best]:.4f}; the flags as given: {losses[0]:.4f}." in out
    metrics = json.loads((root / f"trial_{best:03d}" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["dev_loss"] == losses[best]
    assert matplotlib.image.imread(root / "trials.png").std() > 0.05  # something is drawn
    monkeypatch.chdir(tmp_path)
    code, out, err = run("train", "--config", root / "best.yaml", "--output_dir", "again")
    assert code == 0, err
    for name in ("training_loss.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (root / f"trial_{best:03d}" / name).read_bytes()
    for seed in ("1", "2"):  # each in a folder of its own
        assert run("train", "--config", root / "best.yaml", "--seed", seed)[0] == 0
        assert (tmp_path / "runs" / f"SST2_lora_seed{seed}" / "metrics.json").is_file()
    code, out, _ = run(*tuned, "--trials", "6", "--output_root", root)
    assert code == 0  # nothing is left to do
    assert "Trial" not in out.replace("trials", "")


def test_test_rows_choose_nothing(tuned: list[str], tmp_path: Path, run: Run) -> None:
    """Another number of test rows, the same trials."""
    for rows in ("20", "6"):
        assert run(*tuned, "--trials", "2", "--num_eval", rows, "--output_root", tmp_path / rows)[0] == 0
    assert facts(tmp_path / "20") == facts(tmp_path / "6")


@pytest.mark.skipif(sys.platform == "win32", reason="a process that imports torch for every kill takes too long")
def test_a_search_that_is_stopped_goes_on_as_if_it_had_not_been(tuned: list[str], tmp_path: Path) -> None:
    log, flags = tmp_path / "log.txt", [*tuned, "--trials", "3", "--save_steps", "3", "--output_root"]
    finish([*flags, str(tmp_path / "one")], log)
    for number, how in ((0, signal.SIGKILL), (1, signal.SIGTERM)):
        process = start([*flags, str(tmp_path / "stopped")], log)
        os.kill(at_work_in(tmp_path / "stopped" / f"trial_{number:03d}"), how)
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 128 + signal.SIGTERM)
    finish([*flags, str(tmp_path / "stopped")], log)
    assert "Traceback" not in log.read_text(encoding="utf-8")
    assert facts(tmp_path / "one") == facts(tmp_path / "stopped")


def test_trials_that_diverge_or_fall_behind_end_alone(tuned: list[str], tmp_path: Path, run: Run) -> None:
    search = ["--search", "learning_rate=1e-2,1e30", "--trials", "9", "--max_bad_steps", "1"]
    code, _, err = run(*tuned, *search, "--output_root", tmp_path / "tuned")
    assert code == 0, err
    states = {line["values"]["learning_rate"]: line["state"] for line in trials(tmp_path / "tuned")}
    assert states == {1e-2: "complete", 1e30: "diverged"}
    code, _, err = run(*tuned, "--search", "learning_rate=1e30", *search[2:], "--output_root", tmp_path / "none")
    assert (code, err.splitlines()[-1].partition(" in ")[0]) == (2, "error: no trial")


def test_a_trial_behind_the_median_is_ended(tuned: list[str], tmp_path: Path, run: Run) -> None:
    search = ["--search", "learning_rate=1e-3,3.0", "--trials", "9", "--max_steps", "30"]
    code, _, err = run(*tuned, *search, "--output_root", tmp_path / "pruned")
    assert code == 0, err
    early = [line for line in trials(tmp_path / "pruned") if line["state"] == "ended early"]
    assert early
    assert all(10 <= line["steps"] < 30 and line["loss"] is None for line in early)


@pytest.mark.soak
def test_trials_beside_each_other(tuned: list[str], tmp_path: Path) -> None:
    flags = [*tuned, "--trials", "6", "--launcher", "local", "--cores", "2", "--output_root", str(tmp_path / "tuned")]
    finish(flags, tmp_path / "log.txt")
    assert [line["number"] for line in trials(tmp_path / "tuned")] == list(range(6))


@pytest.mark.parametrize("recipe", ["boost", "drawn"])
def test_boosters_are_tuned_by_what_they_have(recipe: str, small: list[str], tmp_path: Path, run: Run) -> None:
    flags = {
        "boost": "--recipe boost --boost_boosters 2 --boost_ridge 1",
        "drawn": "--xgblora --xgblora_init activations --max_steps 12",
    }
    argv = ["tune", *flags[recipe].split(), *small, "--dtype", "float32", "--trials", "3"]
    code, _, err = run(*argv, "--output_root", tmp_path / "tuned")
    assert code == 0, err
    searched = set(trials(tmp_path / "tuned")[0]["values"])
    assert searched == {"xgblora_layers", *(["boost_ridge"] if recipe == "boost" else [])}
    best = yaml.safe_load((tmp_path / "tuned" / "best.yaml").read_text(encoding="utf-8"))
    assert best["verb"] == "train"


def test_a_reward_is_called_one(tuned: list[str], tmp_path: Path, run: Run) -> None:
    code, out, err = run(*tuned, *"--reward accuracy --trials 2 --output_root".split(), tmp_path / "tuned")
    assert code == 0, err
    assert "minus the dev reward" in out
    assert "dev loss" not in out
    metrics = json.loads((tmp_path / "tuned" / "trial_000" / "metrics.json").read_text(encoding="utf-8"))
    assert trials(tmp_path / "tuned")[0]["loss"] == -metrics["dev_reward"]


def test_searches_in_words() -> None:
    assert parse_search(
        ["lora_rank=1,8", "--zo-eps=1e-3..1", "xgblora_layers=0..4", "load_best_model_at_end=true"]
    ) == [
        Searched("lora_r", (1, 8)),
        Searched("zo_eps", (1e-3, 1.0), between=True),
        Searched("xgblora_layers", (0, 4), between=True),
        Searched("load_best_model_at_end", (True,)),
    ]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("learning_rat=1..2", "did you mean learning_rate?"),
        ("learning_rate", "NAME=LOW..HIGH or NAME=A,B,C"),
        ("learning_rate=2..1", "from a number to a larger one"),
        ("learning_rate=a,b", "learning_rate is a number, got 'a'"),
        ("learning_rate=-1..1", "learning_rate must be a positive number, got -1"),
        ("seed=1,2", "seed is the same in all trials"),
        ("save_total_limit=1,2", "save_total_limit is the same in all trials"),
        ("lora_target_modules=q_proj", "lora_target_modules is a list"),
        ("optim=sgd..adam", "from a number to a larger one"),
        ("load_best_model_at_end=maybe", "true or false"),
    ],
)
def test_searches_that_cannot_be_are_one_line(search: str, message: str) -> None:
    with pytest.raises(XgbloraError, match=message.replace("?", r"\?").replace(".", r"\.")):
        parse_search([search])


def test_odd_flags_are_one_line(tuned: list[str], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {
        "--trials must be at least 1": ["--trials", "0"],
        "set --num_dev above 0": ["--num_dev", "0"],
        "names zo_eps twice": ["--search", "zo_eps=1,2", "zo_eps=1..2"],
        "boost_ridge has no effect without --recipe boost": ["--search", "boost_ridge=1,2"],
        "nothing to tune": ["--trainer", "none"],
        "adamfoo is not a valid": ["--search", "optim=sgd,adamfoo"],  # before a trial, whichever has it
        "at most 2, the model's layers, got 9": ["--xgblora", "--search", "xgblora_layers=1,9"],
    }
    for message, flags in refused.items():
        argv = [token for token in tuned if token != "--lora"] if {"none", "--xgblora"} & {*flags} else tuned
        code, _, err = run(*argv, *flags, "--output_root", tmp_path / "refused")
        assert (code, len(err.splitlines())) == (2, 1), err
        assert message in err
        assert not (tmp_path / "refused").exists()
    assert run(*tuned, "--trials", "1", "--output_root", tmp_path / "tuned")[0] == 0
    for flags in (["--learning_rate", "2e-2"], ["--search", "learning_rate=1e-3..1e-1"]):
        code, _, err = run(*tuned, *flags, "--trials", "2", "--output_root", tmp_path / "tuned")
        assert code == 2
        assert "holds" in err
        assert "of another configuration" in err
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run(*tuned, "--output_root", tmp_path / "refused")
    assert (code, err.strip()) == (2, "error: xgblora tune needs Optuna: python -m pip install 'xgblora[tune]'")
    assert not (tmp_path / "refused").exists()
