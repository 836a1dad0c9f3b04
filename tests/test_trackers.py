"""What a run reports to TensorBoard and to trackio, read back by their own readers."""

import importlib.util
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xgblora.cli import main

FLAGS = "--xgblora --xgblora_steps_per_iteration 4 --max_steps 8 --logging_steps 2 --learning_rate 1e-2 --zo_eps 1e-2"
SCALARS = ("booster", "projected_gradient_std", "update_norm")
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="not installed")
needs_trackio = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="not installed")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "training_loss.jsonl").read_text(encoding="utf-8").splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


@needs_tensorboard
def test_tensorboard(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    flags = [*FLAGS.split(), "--report_to", "tensorboard", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *small, *flags]) == 0
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    read = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in read["train/loss"]] == losses(tmp_path / "run")
    assert [e.value for e in read["train/booster"]] == [1, 2, 2, 2]
    assert {f"train/{name}" for name in SCALARS} <= set(read)


@needs_tensorboard
def test_a_tracker_that_cannot_start_ends_the_run_in_one_line(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "board").write_text("a file where a folder should be", encoding="utf-8")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    flags = [*FLAGS.split(), "--report_to", "tensorboard", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *small, *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: --report_to: TensorBoard could not be started (")


@needs_trackio
def test_trackio(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: trackio keeps threads and a folder for a whole process."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    flags = [*FLAGS.split(), "--report_to", "trackio", "--project", "mine", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "xgblora", "train", *small, *flags]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").rglob("mine*.db")
    with sqlite3.connect(database) as connection:
        rows: list[Any] = connection.execute("select step, metrics from metrics order by id").fetchall()
    read = [(step, json.loads(metrics)) for step, metrics in rows]
    logged = [(step, metrics) for step, metrics in read if "train/loss" in metrics]
    assert [metrics["train/loss"] for _, metrics in logged] == [loss for _, loss in losses(tmp_path / "run")]
    assert [metrics["train/booster"] for _, metrics in logged] == [1, 2, 2, 2]


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="not installed")
def test_mlflow(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    flags = [*FLAGS.split(), "--report_to", "mlflow", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "xgblora", "train", *small, *flags]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=300)
    assert done.returncode == 0, done.stderr

    def read(name: str) -> list[tuple[int, float]]:
        (file,) = (tmp_path / "mlruns").rglob(f"metrics/{name}")
        rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        return [(int(step), float(value)) for _, value, step in rows]

    assert read("loss") == losses(tmp_path / "run")
    assert [value for _, value in read("booster")] == [1, 2, 2, 2]


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="not installed")
def test_wandb(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its server; its file is a log of records, so only their names are looked for."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    flags = [*FLAGS.split(), "--report_to", "wandb", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "xgblora", "train", *small, *flags]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    recorded = file.read_bytes()
    assert {name for name in ("loss", *SCALARS) if f"train/{name}".encode() in recorded} == {"loss", *SCALARS}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "nothing"])
def test_a_missing_tracker_is_named_before_anything_is_loaded(
    name: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    assert main(["train", *small, "--report_to", name, "--output_dir", str(tmp_path / "run")]) == 2
    assert f"--report_to {name} is not known, or its package is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
