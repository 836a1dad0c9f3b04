"""Baselines that nobody trains a model for: classifiers of hidden states, calibrated scores, and backpropagation."""

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, Run, build, examples
from xgblora import Base, RunConfig, XgbloraError
from xgblora.base.states import last_states
from xgblora.learn.readout import PENALTIES, fit_readout
from xgblora.runs.experiment import ExperimentConfig, arms

OPTIONS = [[5], [9, 7], [13]]


@pytest.mark.parametrize("packed", [True, False])
def test_last_states_are_those_of_transformers(
    architecture: PreTrainedConfig, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's, of prompts of many lengths in several batches; the last one's are normed by some models."""
    monkeypatch.setattr("xgblora.base.states.PART_TOKENS", 30)
    model = build(architecture)
    base = Base(model)
    if not packed:
        monkeypatch.setattr(Base, "packed", False)
    rows = examples(9, OPTIONS)
    states, tokens = last_states(base, rows, [next(iter(base.layers))])
    assert tokens >= sum(len(row.prompt) for row in rows)
    for row, state in zip(rows, states[0], strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([row.prompt]), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(state, theirs[0, -1], rtol=1e-4, atol=1e-5)


def test_a_probe_is_the_logistic_regression_with_the_lowest_dev_loss() -> None:
    base = Base(build(ARCHITECTURES["llama"]))
    train, dev, rows = examples(120, OPTIONS), examples(40, OPTIONS, seed=1), examples(50, OPTIONS, seed=2)
    readout = fit_readout(base, "probe", train, dev)
    losses = {}
    for layer in base.layers:
        states, labels = last_states(base, train, [layer])[0][0], [row.label for row in train]
        for C in PENALTIES:
            theirs = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(states, labels)
            chances = theirs.predict_proba(last_states(base, dev, [layer])[0][0])
            loss = -torch.tensor(chances)[range(40), [row.label for row in dev]].log().mean().item()
            losses[loss] = theirs.predict(last_states(base, rows, [layer])[0][0]).tolist()
    assert readout.on_dev.loss == pytest.approx(min(losses), rel=1e-4)
    evaluation = readout.evaluate(rows)
    assert evaluation.predictions == losses[min(losses)]
    assert evaluation.accuracy > 0.5
    assert (readout.cost.sequences, len(evaluation.probabilities)) == (160, 50)


def test_a_centroid_is_the_nearest_mean() -> None:
    base = Base(build(ARCHITECTURES["llama"]))
    train, dev, rows = examples(120, OPTIONS), examples(40, OPTIONS, seed=1), examples(50, OPTIONS, seed=2)
    readout = fit_readout(base, "centroid", train, dev)
    states, asked = (last_states(base, some, [readout.layer])[0][0] for some in (train, rows))
    mean, deviation = states.mean(0), states.std(0, correction=0)
    labels = torch.tensor([row.label for row in train])
    means = torch.stack([((states - mean) / deviation)[labels == option].mean(0) for option in range(3)])
    nearest = torch.cdist((asked - mean) / deviation, means).argmin(1).tolist()
    # scikit-learn also divides by the spread within classes: nearly always the same answer
    answers = readout.evaluate(rows).predictions
    assert sum(one == other for one, other in zip(answers, nearest, strict=True)) >= 45


def test_what_cannot_be_read_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(build(ARCHITECTURES["llama"]))
    rows = examples(30, OPTIONS)
    with pytest.raises(XgbloraError, match="give --num_dev"):
        fit_readout(base, "probe", rows, [])
    with pytest.raises(XgbloraError, match="same options in every row"):
        fit_readout(base, "probe", rows, examples(3, OPTIONS[:2]))
    with pytest.raises(XgbloraError, match="of option 2 there are none"):
        fit_readout(base, "probe", [replace(row, label=0) for row in rows], rows)
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(XgbloraError, match=r'pip install "xgblora\[probe\]"'):
        fit_readout(base, "probe", rows, rows)


def test_baselines_stand_beside_what_is_trained(run: Run, small: list[str], tmp_path: Path) -> None:
    flags = "--methods boost backprop calibrated centroid probe --task_name RottenTomatoes --seeds 0 --max_steps 3"
    small = [word for word in small if word not in ("--task_name", "SST2")]
    at = small.index("--data_dir")
    del small[at : at + 2]
    flags += " --boost_boosters 1 --num_train 40 --max_length 64"
    code, out, err = run("compare", "--output_root", tmp_path, *flags.split(), *small)
    assert (code, err) == (0, "")
    metrics = {
        name: json.loads((tmp_path / f"{name}_seed0" / "metrics.json").read_text("utf-8"))
        for name in ("boost", "backprop", "calibrated", "centroid", "probe")
    }
    assert len({m["zero_shot_loss"] for m in metrics.values()}) == 1
    assert metrics["calibrated"]["eval_loss"] != metrics["calibrated"]["zero_shot_loss"]
    assert [metrics[name]["method"] for name in metrics] == ["boost", "lora", "calibrated", "centroid", "probe"]
    assert metrics["probe"]["forward_sequences"] == metrics["centroid"]["forward_sequences"] == 50
    assert metrics["probe"]["training_seconds"] > 0
    assert metrics["probe"]["rows"] == {"train": 40, "dev": 10, "evaluation": 20}
    assert metrics["calibrated"]["forward_sequences"] == 0
    for name in ("LoRA+backprop", "Boost", "calibrated", "centroid", "probe"):
        assert f"│ {name}" in out
    assert all((tmp_path / f"{name}.png").is_file() for name in ("loss", "summary"))
    assert "All 5 runs" in run("compare", "--output_root", tmp_path, *flags.split(), *small)[1]


def test_a_readout_is_fitted_to_as_many_rows_as_a_training() -> None:
    for readout in ("probe", "centroid"):
        assert RunConfig(output_dir="x", use_cpu=True, trainer="none", readout=readout).train_rows == 1000
    (probe,) = arms(ExperimentConfig(use_cpu=True, methods=["probe"], output_root="x", seeds=[0]))
    assert (probe.readout, probe.train_rows) == ("probe", 1000)


def test_backprop_takes_adam_at_a_rate_of_its_own() -> None:
    config = ExperimentConfig(use_cpu=True, methods=["lora", "backprop"], output_root="x", backprop_learning_rate=1e-3)
    lora, backprop = (arm for arm in arms(config) if arm.seed == 0)
    assert (lora.trainer, lora.learning_rate, lora.optim) == ("zo", 1e-5, "sgd")
    assert (backprop.trainer, backprop.learning_rate, backprop.optim) == ("regular", 1e-3, "adamw_torch")
    assert (backprop.lr_scheduler_type, backprop.rank) == ("linear", lora.rank)


@pytest.mark.parametrize("flag", ["--backprop_learning_rate", "--in_context_examples"])
@pytest.mark.parametrize("value", ["-1", "nan"])
def test_flags_of_one_method_are_refused_by_their_own_names(flag: str, value: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run("compare", "--methods", "backprop", "in-context", flag, value, "--output_root", tmp_path / "out")
    assert code == 2
    assert flag in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--task_name COPA --methods probe", "same options in every row, Copa has others"),
        ("--task_name COPA --methods centroid", "same options in every row, Copa has others"),
        ("--task_name SQuAD --methods calibrated", "SQuAD has no null_prompt"),
    ],
)
def test_a_baseline_that_a_task_cannot_have_is_refused_at_once(run: Run, tmp_path: Path, flags: str, says: str) -> None:
    code, _, err = run("compare", "--output_root", tmp_path / "new", *flags.split())
    assert code == 2
    assert says in err
    assert not (tmp_path / "new").exists()
