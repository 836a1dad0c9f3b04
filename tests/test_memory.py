"""What `check` says a training will take, before the model is loaded."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from random_gguf import write_random_gguf
from transformers import LlamaConfig, PreTrainedConfig

from conftest import ARCHITECTURES, examples
from xgblora import Base, RunConfig
from xgblora.base.load import read_in_place
from xgblora.base.load_packed import read_packed
from xgblora.cli import main
from xgblora.runs import memory
from xgblora.runs.memory import Memory, measure_training, predict

BATCH = "per_device_train_batch_size"


QUICK = [("opt", "zo"), ("llama", "regular")]
"""The others take twice as long again, and are soak's."""


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


def test_a_budget_says_what_stays_and_what_is_read_again() -> None:
    needs = Memory(process=100, weights=500, training=50)
    assert (needs.stays, needs.reads, needs.total) == (500, 0, 650)
    tight = replace(needs, budget=350)
    assert (tight.stays, tight.reads, tight.total) == (200, 300, 350)
    assert replace(needs, budget=120).total == 150  # what no budget can lower
    assert replace(needs, budget=1000).reads == 0


def test_the_packed_files_own_layers_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []

    def counted(files: list[Path], config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        read.append(config.num_hidden_layers)
        return read_in_place(files, config, *args, **kwargs)

    monkeypatch.setattr(memory, "read_in_place", counted)
    config = LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    path = tmp_path / "model.gguf"
    write_random_gguf(path, "llama", config, Kind.Q4_K)
    command = ["check", "--model_name", str(path), "--max_length", "40", "--use_cpu", "true", "--mode", "lora"]
    assert main(command) == 0
    assert read == [2, 2, 3, 2, 4]  # measured, the first time for nothing, and timed
    printed = capfd.readouterr().out
    assert re.search(r"Time, predicted: [\d.]+ s a step\n", printed)
    assert "Merge schedule" not in printed
    assert main([*command, "--memory_budget", "3GB"]) == 0
    assert "s a step, and 0.00 GB of weights are read again in each" in capfd.readouterr().out
    assert main([*command, "--memory_budget", "100MB"]) == 1
    printed = capfd.readouterr()
    assert "FAILED: with no weight in memory, a step takes" in printed.out + printed.err


def test_of_a_file_the_first_layers_alone_are_read(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    path = tmp_path / "model.gguf"
    write_random_gguf(path, "llama", config, Kind.Q4_K)
    whole, first = read_packed(path, config, torch.float32), copy.deepcopy(config)
    first.num_hidden_layers = 2
    ids = torch.arange(9)[None]
    states = whole(input_ids=ids, output_hidden_states=True).hidden_states
    model = read_packed(path, first, torch.float32, first_layers=True)
    assert len(list(Base(model).layers)) == 2
    torch.testing.assert_close(
        model.model.norm(states[2]), model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    )


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
