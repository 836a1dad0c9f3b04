"""What holds on the CPU holds on a GPU. Skipped where there is none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from random_gguf import write_random_gguf
from transformers import LlamaConfig

from conftest import ARCHITECTURES, Run, build, examples, train
from xgblora import Base, Batch, OptionLoss, TextLoss, attach, evaluate, residual_writers
from xgblora.base import wheels
from xgblora.base.load import load_model
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import boost
from xgblora.learn.losses import AnswerLoss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU: dict[str, Any] = {"use_cpu": False}
RUNS: dict[str, dict[str, Any]] = {
    "zo": {"lora": True, "lora_r": 1},
    "shared": {"lora": True, "lora_r": 2, "zo_directions": "shared"},
    "xgblora": {"xgblora": True, "xgblora_steps_per_iteration": 5},
    "adaptive": {"xgblora": True, "xgblora_use_adaptive_merge": True, "xgblora_patience": 3},
    "regular": {"xgblora": True, "xgblora_steps_per_iteration": 5, "trainer": "regular"},
    "boost": {"recipe": "boost", "xgblora": True, "boost_boosters": 3, "early_stopping_boosters": 0},
}


def adapter(trainer: Any) -> dict[str, torch.Tensor]:
    """Pair and boosters, by layer."""
    layers = trainer.ledger.adapters.layers
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B", "booster_A", "booster_B")
    }


def random_file(folder: Path, patch: pytest.MonkeyPatch, layers: int, heads: int, **widths: int) -> Path:
    """A .gguf file of a Llama with random weights; what is converted of it is kept beside it."""
    patch.setattr(wheels.hub_constants, "HF_HOME", str(folder))
    sizes = {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes, **widths, num_hidden_layers=layers, num_attention_heads=heads)
    path = folder / "random.gguf"
    write_random_gguf(path, "llama", config, Kind.Q4_K, mixed=True)
    return path


def flags_of(name: str) -> dict[str, Any]:
    flags = dict(RUNS[name])
    if name == "boost":
        flags["lora_target_modules"] = residual_writers(build(ARCHITECTURES["llama"]))
    return flags


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu_to_rounding(name: str, tmp_path: Path) -> None:
    runs = [
        train(tmp_path / str(cpu), build(ARCHITECTURES["llama"]), use_cpu=cpu, **flags_of(name))
        for cpu in (True, False)
    ]
    (on_cpu, losses), (on_gpu, others) = runs
    assert on_gpu.ledger.adapters.device.type == "cuda"
    assert len(losses) > 2
    assert others == pytest.approx(losses, rel=2e-3, abs=2e-4)
    assert on_gpu.ledger.adapters.boosters == on_cpu.ledger.adapters.boosters


@pytest.mark.parametrize("loss", [OptionLoss(), TextLoss()], ids=["options", "text"])
def test_a_booster_beside_kept_text_is_that_of_the_cpu_to_rounding(loss: AnswerLoss) -> None:
    kept = [replace(row, score_prompt=True) for row in examples(60, seed=1)]
    boosters = []
    for device in (torch.device("cpu"), DEVICE):
        adapters = attach(build(ARCHITECTURES["llama"]).to(device), 2, 16, ["o_proj"], xgblora=True)
        forwards = Forwards(adapters, loss)
        forwards.kept, forwards.keep_weight = kept, 2.0
        boosters.append(boost(forwards, examples(80), examples(40, seed=9)))
    on_cpu, on_gpu = boosters
    assert on_gpu.before == pytest.approx(on_cpu.before, rel=1e-4)
    assert on_gpu.after == pytest.approx(on_cpu.after, rel=5e-3)
    assert on_cpu.after < on_cpu.before - 0.01


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_every_time(name: str, tmp_path: Path) -> None:
    (one, losses), (other, again) = (
        train(tmp_path / str(n), build(ARCHITECTURES["llama"]), **GPU, **flags_of(name)) for n in range(2)
    )
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(adapter(one).values(), adapter(other).values(), strict=True))


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_xgblora_without_a_merge_is_rank_1_lora_to_the_last_bit(trainer: str, tmp_path: Path) -> None:
    runs = [
        train(tmp_path / kind, trainer=trainer, **GPU, **flags)
        for kind, flags in {
            "lora": {"lora": True, "lora_r": 1},
            "xgblora": {"xgblora": True, "xgblora_merge_frequency": 0},
        }.items()
    ]
    (lora, losses), (boosted, others) = runs
    assert losses == others
    assert len(set(losses)) > 5
    for name, layer in lora.ledger.adapters.layers.items():
        twin = boosted.ledger.adapters.layers[name]
        assert torch.equal(layer.lora_A, twin.lora_A)
        assert torch.equal(layer.lora_B, twin.lora_B)


@pytest.mark.parametrize("name", ["zo", "xgblora", "regular", "boost"])
def test_a_resumed_run_is_the_run_that_never_stopped(name: str, tmp_path: Path) -> None:
    flags = GPU | flags_of(name) | {"save_strategy": "steps", "save_steps": 1 if name == "boost" else 7}
    whole, losses = train(tmp_path / "whole", build(ARCHITECTURES["llama"]), **flags)
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    copied = tmp_path / "again" / first.name
    shutil.copytree(first, copied)
    resumed, again = train(tmp_path / "again", build(ARCHITECTURES["llama"]), resume=str(copied), **flags)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(adapter(whole).values(), adapter(resumed).values(), strict=True))


def test_rows_packed_into_one_attend_as_rows_alone(architecture: Any) -> None:
    model = build(architecture).to(DEVICE)
    rows = [*examples(6), *examples(3, options=[[5, 6], [9], [7, 8, 11]], seed=1)]
    base = Base(model, packed=True)
    alone = torch.cat([base.logits(hidden) for row in rows for hidden in base.hidden([base.batch([row])])])
    (hidden,) = base.hidden([base.batch(rows)])
    assert torch.allclose(base.logits(hidden), alone, rtol=1e-4, atol=1e-4)
    (padded,) = Base(model, packed=False).hidden([Base(model, packed=False).batch(rows)])
    assert base.logits(padded).shape[1] == alone.shape[1]


def test_an_evaluation_chooses_what_the_cpu_chooses() -> None:
    model = build(ARCHITECTURES["llama"])
    rows = examples(40, options=[[5, 6], [9], [7]])
    on_cpu = evaluate(model, rows)
    on_gpu = evaluate(model.to(DEVICE), rows)
    assert on_gpu.predictions == on_cpu.predictions
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-4)


def test_a_model_has_one_fingerprint_wherever_it_is() -> None:
    model = build(ARCHITECTURES["opt"])
    before = Base(model).fingerprint()
    assert Base(model.to(DEVICE)).fingerprint() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["zo", "xgblora", "boost"])
def test_a_packed_base_is_the_unpacked_one_to_the_last_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_file(tmp_path, monkeypatch, hidden_size=256, intermediate_size=512, layers=2, heads=4)
    losses = {}
    for unpack in (False, True):
        model, _ = load_model(str(path), dtype, unpack=unpack)
        flags = RUNS[name] | ({"lora_target_modules": residual_writers(model)} if name == "boost" else {})
        losses[unpack] = train(tmp_path / str(unpack), model, **GPU, **flags)[1]
    assert losses[False] == losses[True]
    assert len(losses[True]) > 2


@pytest.mark.parametrize("all_fit", [True, False])
def test_weights_brought_to_the_gpu_are_those_that_lie_there(
    all_fit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_file(tmp_path, monkeypatch, hidden_size=1024, intermediate_size=4096, layers=6, heads=8)
    losses: dict[bool, list[float]] = {}
    peak: dict[bool, int] = {}
    for streamed in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        budget = before + 400 * 2**20 if all_fit else before + 150 * 2**20
        model, _ = load_model(str(path), memory_budget=budget if streamed else None)
        model.to(DEVICE)
        losses[streamed] = train(tmp_path / str(streamed), model, **GPU, **RUNS["xgblora"])[1]
        peak[streamed] = torch.cuda.max_memory_allocated() - before
        del model
    assert losses[False] == losses[True]
    assert peak[True] <= budget


def test_compiled_layers_change_nothing_but_rounding(tmp_path: Path) -> None:
    losses = [
        train(tmp_path / str(flag), build(ARCHITECTURES["llama"]), **GPU, lora=True, torch_compile=flag)[1]
        for flag in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3, abs=2e-4)


def test_directions_are_those_of_the_cpu() -> None:
    """Equal seeds give equal directions wherever they are used."""
    adapters = [attach(build(ARCHITECTURES["opt"]).to(device), seed=3) for device in ("cpu", DEVICE)]
    first, second = (next(iter(a.layers.values())).lora_A.cpu() for a in adapters)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora",
        "--xgblora --trainer regular",
        "--lora --trainer regular --gradient_checkpointing",
        "--recipe boost",
        "--recipe boost --reward accuracy",
        "--recipe boost --train_as_classification false",
        "--train_as_classification false",
    ],
)
def test_commands_run(flags: str, small: list[str], data_folder: Path, run: Run, tmp_path: Path) -> None:
    on_gpu = small[: small.index("--use_cpu")]
    paced = "" if "boost" in flags else " --max_steps 4 --per_device_train_batch_size 4"
    out = tmp_path / "run"
    code, _, err = run("train", *on_gpu, *flags.split(), *paced.split(), "--output_dir", out)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["peak_memory_mb"] < 2000  # of the GPU, not of the process
    for words in (["eval", out, "--file", data_folder / "validation.jsonl"], ["predict", out, "an utter delight"]):
        code, _, err = run(*words)
        assert code == 0, (words[0], err)
    code, _, err = run("check", *on_gpu, *flags.split(), *paced.split())
    assert code == 0, err


def test_a_batch_moves_whole() -> None:
    batch: Batch = Base(build(ARCHITECTURES["opt"]).to(DEVICE)).batch(examples(3))
    assert all(value.is_cuda for value in vars(batch).values() if isinstance(value, torch.Tensor))
