"""Exports load in the tools they are for, and compute what the run computed."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, build, byte_tokenizer
from xgblora import Ledger, XgbloraError, attach, load_model
from xgblora.adapters.export import fold, pair_rotary, write_gguf
from xgblora.base.wheels import shipped_file
from xgblora.cli import main
from xgblora.config import EMBEDDED_MODEL
from xgblora.runs.export import ExportConfig, export

IDS = torch.tensor([[3, 40, 41, 42, 43, 44]])


@pytest.fixture
def run(tmp_path: Path, randomise: Any) -> tuple[Path, list[torch.Tensor]]:
    """A folder as a run leaves it, with 3 boosters on a Llama, and the logits with the first 0, 1, 2, 3 of them."""
    base = tmp_path / "base"
    build(ARCHITECTURES["llama"]).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model, _ = load_model(str(base))
    ledger = Ledger(attach(model, 1, 16, ["q_proj", "v_proj", "o_proj"], xgblora=True))
    logits = [model(IDS).logits.detach()]
    for number in range(3):
        randomise(ledger.adapters, number)
        logits.append(model(IDS).logits.detach())
        if number < 2:
            ledger.merge(number + 1, f"step {number + 1}", 1.0)
    ledger.save(tmp_path / "run" / "adapter")
    return tmp_path / "run", logits


@pytest.mark.parametrize("boosters", [None, 1, 2, 3])
def test_peft_loads_the_first_boosters(run: tuple[Path, list[torch.Tensor]], boosters: int | None) -> None:
    folder, logits = run
    output = export(folder, ExportConfig(boosters=boosters))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder.parent / "base"), str(output))
    count = boosters or 3
    assert plain.peft_config["default"].r == count
    torch.testing.assert_close(plain(IDS).logits, logits[count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_merged_model_needs_no_adapters(name: str, randomise: Any) -> None:
    model = build(ARCHITECTURES[name])
    adapters = attach(model)
    randomise(adapters, 0)
    expected = model(IDS).logits
    assert fold(adapters, torch.float32) < 1e-4
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_merged_loads_as_a_model(run: tuple[Path, list[torch.Tensor]]) -> None:
    folder, logits = run
    output = export(folder, ExportConfig(format="merged", boosters=2))
    plain, _ = load_model(str(output))
    torch.testing.assert_close(plain(IDS).logits, logits[2], rtol=1e-4, atol=1e-4)


def test_a_cast_that_loses_the_update_is_refused(run: tuple[Path, list[torch.Tensor]]) -> None:
    """An update a hundred times smaller than bfloat16's steps cannot be folded into bfloat16 weights."""
    folder, _ = run
    model, _ = load_model(str(folder.parent / "base"))
    ledger = Ledger(attach(model, 1, 16, ["v_proj"], xgblora=True))
    with torch.no_grad():
        for layer in ledger.adapters.layers.values():
            layer.lora_B.fill_(1e-6)
    ledger.save(folder.parent / "faint" / "adapter")
    asked = ExportConfig(format="merged", dtype="bfloat16")
    with pytest.raises(XgbloraError, match="would lose"):
        export(folder.parent / "faint", asked)
    assert [path.name for path in (folder.parent / "faint").iterdir()] == ["adapter"]
    asked.force = True
    assert (export(folder.parent / "faint", asked) / "model.safetensors").is_file()


def test_gguf_holds_the_update_under_llama_cpps_names(run: tuple[Path, list[torch.Tensor]]) -> None:
    folder, _ = run
    reader = gguf.GGUFReader(export(folder, ExportConfig(format="gguf-lora")))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["general.type"], fields["adapter.type"]) == (
        "llama",
        "adapter",
        "lora",
    )
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 3
    model, _ = load_model(str(folder.parent / "base"))
    adapters = attach(model, 1, 16, ["q_proj", "v_proj", "o_proj"], xgblora=True)
    Ledger(adapters).load(folder / "adapter")
    for ours, theirs in (("self_attn.o_proj", "attn_output"), ("self_attn.v_proj", "attn_v")):
        layer = adapters.layers[f"model.layers.1.{ours}"]
        A = torch.cat([layer.booster_A, layer.lora_A.detach()])
        B = torch.cat([layer.booster_B, layer.lora_B.detach()], dim=1)
        a, b = tensors[f"blk.1.{theirs}.weight.lora_a"], tensors[f"blk.1.{theirs}.weight.lora_b"]
        assert a.shape == (3, layer.in_features)  # llama.cpp divides alpha by the rank of lora_b
        assert b.shape == (layer.out_features, 3)
        np.testing.assert_allclose(fields["adapter.lora.alpha"] / 3 * b @ a, (layer.scaling * B @ A).numpy(), rtol=1e-5)

    layer = adapters.layers["model.layers.1.self_attn.q_proj"]
    B = torch.cat([layer.booster_B, layer.lora_B.detach()], dim=1).numpy()
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_b"], pair_rotary(B, 4))


@pytest.mark.parametrize(("layer", "tensor", "heads"), [("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)])
def test_rotary_rows_stand_in_ggufs_order(layer: str, tensor: str, heads: int) -> None:
    """The embedded model is a .gguf: its own q and k must be transformers' rows in the order we write."""
    model, _ = load_model()
    stored = next(
        t for t in gguf.GGUFReader(shipped_file(EMBEDDED_MODEL)).tensors if t.name == f"blk.3.{tensor}.weight"
    )
    theirs = gguf.quants.dequantize(stored.data, stored.tensor_type)
    ours = model.get_submodule(f"model.layers.3.self_attn.{layer}").weight.numpy()
    np.testing.assert_array_equal(pair_rotary(ours, heads), theirs)
    assert not np.array_equal(ours, theirs)


def test_layers_that_learned_nothing_are_left_out_of_gguf(tmp_path: Path) -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True)
    with torch.no_grad():
        list(adapters.layers.values())[1].lora_B.fill_(1)
    write_gguf(adapters, tmp_path / "a.gguf")
    assert {t.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {
        "blk.1.attn_output.weight.lora_a",
        "blk.1.attn_output.weight.lora_b",
    }


def test_gguf_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(XgbloraError, match="not opt"):
        write_gguf(attach(build(ARCHITECTURES["opt"])), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say which run"),
        (["nowhere"], "no finished run"),
        (["RUN", "--format", "onnx"], "invalid choice"),
        (["RUN", "--boosters", "9"], "3 boosters"),
        (["RUN", "--boosters", "0"], "at least 1"),
        (["RUN", "--output", "RUN"], "exists"),
    ],
)
def test_bad_exports_are_one_line(
    run: tuple[Path, list[torch.Tensor]], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    assert main(["export", *(argument.replace("RUN", str(folder)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert [path.name for path in folder.iterdir()] == ["adapter"]


def test_truncating_is_going_back(randomise: Any) -> None:
    """The first k boosters are the run as it was with k boosters, for every k; 0 is the bare base."""
    model = build(ARCHITECTURES["opt"])
    bare = model(IDS).logits
    ledger = Ledger(attach(model, xgblora=True))
    seen = [bare]
    for number in range(4):
        randomise(ledger.adapters, number)
        seen.append(model(IDS).logits)
        if number < 3:
            ledger.merge(number, "", 0.0)
    for count in (4, 3, 1, 0):
        ledger.truncate(count)
        assert torch.equal(model(IDS).logits, seen[count])
        assert len(ledger.boosters) == max(count - 1, 0)
    with pytest.raises(XgbloraError, match="1 boosters"):
        ledger.truncate(2)
