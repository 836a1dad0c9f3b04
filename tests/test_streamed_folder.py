"""Folders of Hugging Face whose weights stay in their files: the numbers of those that are loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from conftest import ARCHITECTURES, Run, build, byte_tokenizer, examples
from xgblora import Base, XgbloraError
from xgblora.base.load import load_model
from xgblora.base.packed import PackedEmbedding, PackedLinear, budgeted_file

PLENTY = 10**11
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def saved(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    build(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def require_same(folder: Path, dtype: torch.dtype) -> None:
    """Loaded and left in its files, a model gives the same states, logits and fingerprint."""
    shown = []
    for budget in (None, PLENTY):
        model, _ = load_model(str(folder), dtype, memory_budget=budget)
        base = Base(model)
        batches = [base.batch(examples(6, seed=seed)) for seed in range(3)]
        with torch.no_grad():
            hidden = torch.cat(list(base.hidden(batches)))
            shown.append((hidden, base.logits(hidden), base.fingerprint(), model.generation_config.to_dict()))
    assert budgeted_file(model) is not None
    (loaded, logits, fingerprint, writing), (streamed, its_logits, its_fingerprint, its_writing) = shown
    assert torch.equal(loaded, streamed)
    assert torch.equal(logits, its_logits)
    assert fingerprint == its_fingerprint
    assert writing == its_writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_architecture_is_what_it_is_when_it_is_loaded(
    architecture: PreTrainedConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    require_same(saved(tmp_path, architecture), dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_several_files(stored: torch.dtype, tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**LLAMA, vocab_size=300, tie_word_embeddings=tied)
    folder = saved(tmp_path, config, stored, shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    require_same(folder, torch.float32)
    model, _ = load_model(str(folder), memory_budget=PLENTY)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 3 * 7 + 1


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    folder = saved(tmp_path, ARCHITECTURES["gpt2"])
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    assert bare.keys() != weights.keys()
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    require_same(folder, torch.float32)


def test_a_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    folder = saved(tmp_path, LlamaConfig(**LLAMA, vocab_size=300, tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    twice = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    require_same(folder, torch.float32)


def test_a_run_from_files_is_the_run_from_memory(small: list[str], tmp_path: Path, run: Run) -> None:
    for method in ("--lora true --max_steps 6 --eval_steps 3", "--recipe boost --lora_target_modules out_proj"):
        made = []
        for name, flags in {"memory": [], "files": ["--memory_budget", "60GB"]}.items():
            folder = tmp_path / name
            code, _, err = run(
                "train", *small, *method.split(), *flags, "--overwrite_output_dir", "--output_dir", folder
            )
            assert code == 0, err
            made.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        assert made[0] == made[1]
    answers = [
        run("predict", tmp_path / "files", "a warm film", "--format", "jsonl", *flags)[1]
        for flags in ([], ["--memory_budget", "60GB"])
    ]
    assert answers[0] == answers[1] != ""


def damaged(folder: Path, change: Callable[[Path], object]) -> Path:
    change(folder / "model.safetensors")
    return folder


def test_what_cannot_be_streamed_is_refused_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(XgbloraError) as error:
            load_model(str(folder), memory_budget=PLENTY)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    def copied(name: str) -> Path:
        shutil.copytree(model_folder, tmp_path / name)
        return tmp_path / name

    folder = copied("bin")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "it holds no .safetensors files" in refusal(folder)

    folder = copied("cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "model.safetensors is damaged" in refusal(folder)

    folder = copied("odd")
    save_file(weights | {"odd": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "holds odd, for which the model has another place or none" in refusal(folder)

    folder = copied("lacking")
    (first, *_), rest = sorted(weights), dict(weights)
    del rest[first]
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"its file lacks {first}" in refusal(folder)

    folder = copied("shape")
    save_file(weights | {first: torch.zeros(3, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "is (3, 4) there" in refusal(folder)

    folder = copied("whole numbers")
    as_bytes = weights | {next(n for n in weights if "q_proj.weight" in n): torch.zeros(4, 4, dtype=torch.int8)}
    save_file(as_bytes, folder / "model.safetensors", metadata={"format": "pt"})
    assert "is stored as I8" in refusal(folder)


def test_weights_under_other_names_are_refused_by_name(tmp_path: Path) -> None:
    sizes = LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1}
    folder = saved(tmp_path, MixtralConfig(**sizes, vocab_size=300))
    AutoModelForCausalLM.from_pretrained(folder)  # which puts them together
    with pytest.raises(XgbloraError, match=r"experts.* for which the model has another place or none"):
        load_model(str(folder), memory_budget=PLENTY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bits_are_ggufs(dtype: torch.dtype, tmp_path: Path) -> None:
    """Linear layers but the head are rounded as the gguf package rounds; all else is as it was."""
    folder = saved(tmp_path, LlamaConfig(**LLAMA, vocab_size=300, tie_word_embeddings=False))
    model, _ = load_model(str(folder), dtype, bits=8)
    weights = load_file(folder / "model.safetensors")
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name in packed:
        expected = weights[f"{name}.weight"]
        if name != "lm_head":
            expected = torch.from_numpy(quants.dequantize(quants.quantize(expected.numpy(), Kind.Q8_0), Kind.Q8_0))
            assert not torch.equal(expected, weights[f"{name}.weight"])
        assert torch.equal(model.get_submodule(name).weight[:], expected.to(dtype))
    assert len(packed) == 3 * 7 + 1
    assert torch.equal(model.model.embed_tokens.weight[:], weights["model.embed_tokens.weight"].to(dtype))
    whole, _ = load_model(str(folder), dtype)
    assert Base(model).fingerprint()["quantised"] == "8 bits"
    assert Base(model).fingerprint()["weights"] != Base(whole).fingerprint()["weights"]
    with torch.no_grad():
        batch = Base(model).batch(examples(6))
        (hidden,), (expected,) = Base(model).hidden([batch]), Base(whole).hidden([batch])
    assert 0 < (hidden - expected).norm() / expected.norm() < 0.05


def test_what_is_packed_here_takes_a_folder_and_no_budget(model_folder: Path) -> None:
    for name, more in ((str(model_folder), {"memory_budget": PLENTY}), ("model.gguf", {})):
        with pytest.raises(XgbloraError, match="to pack to 8 bits takes a folder without a memory budget"):
            load_model(name, bits=8, **more)


def test_from_eight_bits_to_an_answer(tmp_path: Path, data_folder: Path, run: Run) -> None:
    folder = saved(
        tmp_path / "llama", LlamaConfig(**LLAMA, vocab_size=len(byte_tokenizer()), max_position_embeddings=128)
    )
    flags = "--num_train 40 --num_dev 10 --num_eval 20 --disable_tqdm true --use_cpu true --task_name SST2 --data_dir "
    command = ["train", *f"{flags}{data_folder.as_posix()} --lora true --max_steps 4 --save_steps 2".split()]
    losses = []
    for name, more in {"whole": [], "packed": ["--load_8bit"]}.items():
        code, _, err = run(*command, "--model_name", folder, "--output_dir", tmp_path / name, *more)
        assert code == 0, err
        losses.append((tmp_path / name / "training_loss.jsonl").read_text(encoding="utf-8"))
    assert losses[0] != losses[1]
    shutil.copytree(tmp_path / "packed", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "adapter")
    (tmp_path / "again" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    code, _, err = run(*command, "--model_name", folder, "--output_dir", tmp_path / "again", "--load_8bit")
    assert code == 0, err
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("packed", "again")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    code, out, err = run("predict", tmp_path / "packed", "a warm film", "--format", "jsonl", "--use_cpu")
    assert code == 0, err
    assert out != run("predict", tmp_path / "whole", "a warm film", "--format", "jsonl", "--use_cpu")[1]
    for form in ("peft", "merged"):
        assert run("export", tmp_path / "packed", "--format", form, "--output", tmp_path / form)[0] == 0
    assert run("train", "--load_8bit", "--load_4bit", "--output_dir", tmp_path / "both")[0] == 2
