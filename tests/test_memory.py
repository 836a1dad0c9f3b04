"""What `check` says a training will take, before the model is loaded."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from conftest import ARCHITECTURES, examples
from xgblora import RunConfig
from xgblora.cli import main
from xgblora.runs.memory import measure_training, predict

BATCH = "per_device_train_batch_size"


QUICK = [("opt", "zo"), ("llama", "regular"), ("gpt2", "zo")]
"""The others take as long again, and are soak's."""


@pytest.mark.parametrize(
    ("name", "trainer"),
    [
        pytest.param(name, trainer, marks=() if (name, trainer) in QUICK else pytest.mark.soak)
        for name in ("opt", "llama", "gpt2")
        for trainer in ("zo", "regular")
    ],
)
def test_what_two_and_three_layers_take_says_what_nine_do(name: str, trainer: str, tmp_path: Path) -> None:
    """The whole architecture, measured in the same way: torch's own record, so it is no matter of the machine."""
    config: PreTrainedConfig = copy.deepcopy(ARCHITECTURES[name])
    config.num_hidden_layers = 9
    settings: dict[str, Any] = {"trainer": trainer, "optim": "adamw_torch", BATCH: 64}
    run = RunConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    rows = examples(64)
    predicted = predict(run, config, rows)
    whole = max(measure_training(run, config, rows))
    assert predicted.training == pytest.approx(whole, rel=0.1)
    smaller = predict(RunConfig(output_dir=str(tmp_path), use_cpu=True, **settings | {BATCH: 8}), config, rows)
    assert smaller.training < 0.9 * predicted.training
    assert predicted.process > 50e6
    assert predicted.total == predicted.process + predicted.weights + predicted.training


def test_check_names_the_memory(model_folder: Path, data_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = f"--model_name {model_folder} --data_dir {data_folder} --task_name SST2 --num_train 40 --use_cpu true"
    assert main(["check", *flags.split()]) == 0
    printed = capfd.readouterr()
    assert "Memory, predicted: " in printed.out
    assert "rows of up to " in printed.out
    assert "profiler" not in printed.err  # which torch's C++ would write


def test_check_refuses_what_does_not_fit_without_loading_it(
    model_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weights are there at all: only what the configuration says of them."""
    folder = tmp_path / "huge"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described |= {"num_hidden_layers": 1500, "hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    flags = f"--model_name {folder} --data_dir {data_folder} --task_name SST2 --num_train 40 --use_cpu true"
    assert main(["check", *flags.split()]) == 1
    captured = capsys.readouterr()
    assert "GB are more than the" in captured.out + captured.err
    assert "Check failed" in captured.out + captured.err
