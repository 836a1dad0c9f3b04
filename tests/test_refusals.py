"""Right, or refused in one line before work is wasted: models, rewards, adapters, flags, disks."""

import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from conftest import build, byte_tokenizer, train
from processes import EVERY_STEP, limited
from xgblora import XgbloraError, attach, load_model, load_task
from xgblora.base.header import MOST_LAYERS
from xgblora.cli import main
from xgblora.errors import within_memory
from xgblora.training.checkpoints import last_checkpoint

Refused = Callable[..., str]


@pytest.fixture
def refused(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run ``train`` with further flags; returns the line of its refusal, which left nothing behind."""

    def run(*flags: object) -> str:
        command = ["train", "--output_dir", str(tmp_path / "new" / "run"), *EVERY_STEP.split(), *small]
        assert main([*command, *map(str, flags)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()
        return err

    return run


# Models ---------------------------------------------------------------------------------------------------------------


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: [w.pop(name) for name in list(w) if "q_proj" in name], "its file lacks .*q_proj.bias and 3 more"),
        (lambda w: w.update(odd=torch.zeros(2)), "holds weights that the model has no place for: odd"),
        (
            lambda w: w.update({next(name for name in w if "fc1.weight" in name): torch.zeros(3, 4)}),
            r"fc1\.weight is \(3, 4\) there, \(64, 32\) by its config\.json",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    changed_weights(folder, change)
    with pytest.raises(XgbloraError, match=says) as error:
        load_model(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_ten_million_layers_are_refused_at_once(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10_000_000}), encoding="utf-8")
    with pytest.raises(XgbloraError, match=f"num_hidden_layers is 10,000,000, more than {MOST_LAYERS:,}"):
        load_model(str(folder))


def test_four_bits_need_their_library_and_a_folder(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    assert 'needs bitsandbytes: pip install "xgblora[quantized]"' in refused("--load_4bit")
    assert "is for a hub id or a folder" in refused("--load_4bit", "--model_name", "model.gguf")


def gguf_string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


GGUF_START = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no GGUF file"),
        (b"GGML" + bytes(40), "no GGUF file"),
        (GGUF_START + gguf_string(b"general.name") + struct.pack("<I", 8) + gguf_string(b"x", 2**61), "damaged"),
        (GGUF_START + gguf_string(b"a", 2**61), "damaged"),
        (GGUF_START + gguf_string(b"a") + struct.pack("<IIQ", 9, 4, 2**60), "damaged"),
        (GGUF_START + gguf_string(b"a") + struct.pack("<IIQ", 9, 9, 2**20) + bytes(40), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_string(b"w") + struct.pack("<I", 2**31), "damaged"),
        (GGUF_START + gguf_string(b"llama.block_count") + struct.pack("<II", 4, 10**7), "more than 2,000"),
    ],
)
def test_a_header_that_leads_out_of_its_file_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "odd.gguf").write_bytes(content)
    with pytest.raises(XgbloraError, match=says):
        load_model(str(tmp_path / "odd.gguf"))


def test_token_ids_beyond_the_embedding_are_refused(refused: Refused, tmp_path: Path) -> None:
    config = LlamaConfig(
        **{"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    )
    build(config).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    assert "and the model knows 100 tokens" in refused("--model_name", tmp_path / "small")


# Adapters, rewards, templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), [("half", "only one of lora_A and lora_B"), ("nan", "not finite")])
def test_an_adapter_to_start_from_that_is_damaged_is_refused(
    change: str, says: str, refused: Refused, small: list[str], tmp_path: Path
) -> None:
    first = ["train", "--output_dir", str(tmp_path / "first"), "--xgblora", *EVERY_STEP.split(), *small]
    assert main(first) == 0
    weights = load_file(tmp_path / "first" / "adapter" / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    if change == "half":
        del weights[name]
    else:
        weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "first" / "adapter" / "adapter_model.safetensors")
    assert says in refused("--xgblora", "--init_adapter", tmp_path / "first" / "adapter")


@pytest.mark.parametrize("where", ["at import", "in a package", "in the call"])
def test_a_reward_that_exits_does_not_end_the_run_in_silence(
    where: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"reward_{where.replace(' ', '_')}"
    leave = "import sys\nsys.exit(0)\n"
    if where == "in a package":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(leave, encoding="utf-8")
        (tmp_path / name / "inner.py").write_text("def score(*a): return 1.0\n", encoding="utf-8")
        name += ".inner"
    else:
        code = leave if where == "at import" else "def score(*a):\n    raise SystemExit(0)\n"
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    command = ["train", "--output_dir", str(tmp_path / "run"), "--reward", f"{name}:score"]
    assert main([*command, *EVERY_STEP.split(), *small]) == 2
    assert "SystemExit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "filters", ["trim", "upper | trim", "list | string", "sort | lower", "map('upper') | list | e"]
)
def test_a_list_is_no_text_whatever_filters_it_passes(filters: str, tmp_path: Path) -> None:
    task = f"""data: {{train: train.jsonl, test: test.jsonl}}
prompt: "{{{{ words | {filters} }}}} It is"
options: [good, bad]
answer: label
"""
    (tmp_path / "mine.yaml").write_text(task, encoding="utf-8")
    with pytest.raises(XgbloraError, match="which is no text"):
        load_task(tmp_path / "mine.yaml").question({"words": ["a", "b"], "label": 0})


# Disks and memory -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="mounts a small disk")
@pytest.mark.parametrize("kilobytes", [0, 8, 24, 40, 64, 96, 120, 200, 300, 500])
def test_a_disk_of_any_size_that_fills_up_is_one_line(
    kilobytes: int, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--xgblora --xgblora_steps_per_iteration 2 --save_steps 2 --save_total_limit 50".split()
    with limited(tmp_path / "disk", max(kilobytes * 1000, 1)):
        folder = tmp_path / "disk" / "run"
        assert main(["train", "--output_dir", str(folder), *EVERY_STEP.split(), *flags, *small]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: No space left on device")
        assert err.count("\n") == 1
        last_checkpoint(folder) if folder.is_dir() else None  # raises where none is whole
        assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("error", [RecursionError("deep"), NotImplementedError("no kernel"), RuntimeError("shape")])
def test_only_exhausted_memory_is_called_that(error: Exception) -> None:
    with pytest.raises(type(error)), within_memory("here", "buy more"):
        raise error
    with pytest.raises(XgbloraError, match="out of memory here: buy more"), within_memory("here", "buy more"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def test_a_rank_that_no_layer_has_is_refused_before_it_takes_memory(model_folder: Path) -> None:
    with pytest.raises(XgbloraError, match="the rank of an adapter is at most 32 in these layers, got 100000000"):
        attach(load_model(str(model_folder))[0], rank=100_000_000)


# Flags ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--seed 4294967296", "--seed must be 0 to 4294967295"),
        ("--data_seed -1", "--data_seed must be 0 to"),
        ("--weight_decay nan", "--weight_decay must be 0 or more"),
        ("--max_grad_norm nan", "--max_grad_norm must be a finite number"),
        ("--eval_delay nan --eval_steps 2", "--eval_delay must be a finite number"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers must be 0 or more"),
        (
            "--dataloader_num_workers 1 --dataloader_prefetch_factor 0",
            "--dataloader_prefetch_factor must be at least 1",
        ),
        ("--adam_beta1 1.5 --optim adamw_torch", "--adam_beta1 must be"),
        ("--report_to nothing", "--report_to nothing is not known, or its package is not installed"),
        ("--report_to nonsense", "--report_to nonsense is not known"),
        ("--optim galore_adamw", "--optim galore_adamw: You need to install `galore_torch`"),
        ("--optim lomo", "--optim lomo: "),
        ("--optim_args foo=1 --optim adamw_torch", "--optim_args foo=1 has no effect with --optim adamw_torch"),
        ("--optim_args foo --optim adamw_torch", "--optim adamw_torch: "),
        ("--lr_scheduler_type cosine_with_min_lr", "set --lr_scheduler_kwargs"),
        ("--use_liger_kernel", "is not supported"),
        ("--metric_for_best_model nonsense", "must be one of loss, accuracy, got nonsense"),
        ("--train_sampling_strategy group_by_length", "must be random or sequential"),
        ("--resume_from_checkpoint true", "holds no checkpoint"),
        ("--resume_from_checkpoint nowhere", "nowhere/manifest.json is missing"),
        ("--result_file /dev/null/result.json", "cannot be written"),
        ("--lora_alpha 1e300", "--lora_alpha must be a number that float32 holds"),
        ("--activation_cache_gb 1e300", "--activation_cache_gb must be a number that float32 holds"),
        ("--save_strategy best --eval_steps 2", "--save_strategy best needs --metric_for_best_model"),
        ("--num_dev " + 5000 * "9", "invalid int value"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_the_model_is_loaded(flags: str, says: str, refused: Refused) -> None:
    assert says in refused("--model_name", "/nowhere/at/all", *flags.split()).replace("\\", "/")


@pytest.mark.parametrize("name", ["output_dir", "data_dir", "model_name", "run_name", "init_adapter", "reward"])
def test_zero_bytes_are_refused(name: str, refused: Refused) -> None:
    assert f"--{name} holds a zero byte" in refused(f"--{name}", "a\0b")


def test_numbers_of_a_task_file_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("prompt: a\noptions: [a, b]\nanswer: c\nnum_dev: " + 5000 * "9", "utf-8")
    with pytest.raises(XgbloraError, match="num_dev is a whole number"):
        load_task(tmp_path / "mine.yaml")


def test_resuming_means_the_last_checkpoint(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--output_dir", str(tmp_path / "run"), *EVERY_STEP.split(), *small]
    assert main([*command, "--resume_from_checkpoint", "false"]) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    capsys.readouterr()
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0
    assert "Resuming from" in capsys.readouterr().out
    flags = ["--overwrite_output_dir", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-39")]
    assert main([*command, *flags]) == 2
    assert "--overwrite_output_dir would remove" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-39").is_dir()


def test_the_mean_loss_of_a_run_is_that_of_all_its_steps(tmp_path: Path) -> None:
    flags = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 9, "xgblora": True}
    whole, losses = train(tmp_path / "run", **flags)
    resumed, _ = train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-5"), **flags)
    last = [trainer.state.log_history[-1] for trainer in (whole, resumed)]
    assert last[0] == last[1]
    assert last[0]["train_loss"] == pytest.approx(sum(losses) / 12)
