"""Bases of 4 bits in the format of Hugging Face: packed as they are loaded, or before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from conftest import Run, build, byte_tokenizer
from xgblora import Base
from xgblora.base.load import load_model

pytestmark = pytest.mark.soak  # bitsandbytes is no part of an ordinary installation
FLAGS = "--num_train 40 --num_dev 10 --num_eval 20 --disable_tqdm true --use_cpu true --task_name SST2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=128))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed_folder(folder: Path) -> Path:
    """The same model as others have packed it before."""
    target = folder.with_name("llama-nf4")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing).save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def torchao_folder(folder: Path) -> Path:
    """The same model in torchao's 8 bits, which are tensors of its own kind."""
    quantization = pytest.importorskip("torchao.quantization")
    target = folder.with_name("llama-int8")
    packing = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=packing)
    model.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def metrics(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize(
    "method", ["--lora true --max_steps 4", "--lora true --trainer regular --max_steps 4", "--recipe boost"]
)
def test_from_four_bits_to_an_answer(
    method: str, folder: Path, packed_folder: Path, data_folder: Path, tmp_path: Path, run: Run
) -> None:
    common = [*f"{FLAGS} {method} --data_dir {data_folder.as_posix()} --dtype float32".split()]
    runs = {"whole": (folder, []), "now": (folder, ["--load_4bit"]), "before": (packed_folder, [])}
    for name, (model, flags) in runs.items():
        code, _, err = run("train", "--model_name", model, *common, *flags, "--output_dir", tmp_path / name)
        assert code == 0, err
    whole, now, before = (metrics(tmp_path / name) for name in runs)
    assert now["eval_loss"] == before["eval_loss"] != whole["eval_loss"]
    assert now["zero_shot_loss"] == pytest.approx(whole["zero_shot_loss"], rel=0.5)
    losses = [(tmp_path / name / "training_loss.jsonl").read_text(encoding="utf-8") for name in runs]
    assert losses[1] == losses[2] != losses[0]
    answers = [run("predict", tmp_path / name, "a warm film", "--format", "jsonl", "--use_cpu")[1] for name in runs]
    assert answers[1] == answers[2] != answers[0]
    assert run("export", tmp_path / "now", "--output", tmp_path / "peft")[0] == 0
    assert run("export", tmp_path / "now", "--format", "merged", "--output", tmp_path / "merged")[0] == 0
    assert load_model(str(tmp_path / "merged"))[0].get_memory_footprint() > 0


@pytest.mark.parametrize("method", ["--xgblora true --xgblora_steps_per_iteration 2 --max_steps 4", "--recipe boost"])
def test_a_folder_of_torchao_from_rows_to_an_answer(
    method: str, folder: Path, torchao_folder: Path, data_folder: Path, tmp_path: Path, run: Run
) -> None:
    common = [*f"{FLAGS} {method} --data_dir {data_folder.as_posix()} --dtype float32".split()]
    for name, model in {"whole": folder, "packed": torchao_folder}.items():
        code, _, err = run("train", "--model_name", model, *common, "--output_dir", tmp_path / name)
        assert code == 0, err
    whole, packed = (metrics(tmp_path / name) for name in ("whole", "packed"))
    assert packed["zero_shot_loss"] == pytest.approx(whole["zero_shot_loss"], rel=0.1)
    assert packed["eval_loss"] != whole["eval_loss"]
    code, out, err = run("check", "--model_name", torchao_folder, *"--dtype float32 --use_cpu --xgblora".split())
    assert code == 0, err
    assert "Check passed" in out + err
    assert run("predict", tmp_path / "packed", "a warm film", "--use_cpu")[0] == 0
    assert run("export", tmp_path / "packed", "--output", tmp_path / "peft")[0] == 0
    code, _, err = run("export", tmp_path / "packed", "--format", "merged", "--output", tmp_path / "merged")
    assert code == 2
    assert err.endswith("of the base has no float32 weight to fold into: export --format peft\n")
    assert not (tmp_path / "merged").exists()


def test_one_changed_weight_of_torchao_is_another_base(torchao_folder: Path) -> None:
    model = load_model(str(torchao_folder))[0]
    before = Base(model).fingerprint()
    assert before["quantised"] == "torchao"
    packed = model.model.layers[0].self_attn.q_proj.weight
    packed.qdata[0, 0] += 1
    assert Base(model).fingerprint()["weights"] != before["weights"]


def test_one_base_has_one_fingerprint_however_it_was_packed(folder: Path, packed_folder: Path) -> None:
    now = Base(load_model(str(folder), bits=4)[0]).fingerprint()
    before = Base(load_model(str(packed_folder))[0]).fingerprint()
    whole = Base(load_model(str(folder))[0]).fingerprint()
    assert now == before
    assert now["quantised"] == "bitsandbytes"
    assert "quantised" not in whole
    assert now["weights"] != whole["weights"]


def test_what_cannot_be_packed_is_refused_in_a_line(packed_folder: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run("train", "--load_4bit", "--model_name", packed_folder, "--output_dir", tmp_path / "run")
    assert code == 2
    assert err.endswith("it is packed already (bitsandbytes): leave out --load_4bit\n")
    assert not (tmp_path / "run").exists()
