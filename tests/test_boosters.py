"""The ledger: a merge changes nothing, loses nothing, and what is saved is a plain PEFT adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from conftest import ARCHITECTURES, build
from xgblora import Adapters, Ledger, XgbloraError, attach, load_adapters, start_from
from xgblora.adapters.linear import BLOCK

IDS = torch.tensor([[3, 17, 200, 41, 5, 9, 77, 33, 12]])


def with_boosters(
    model: PreTrainedModel, randomise: Callable[..., None], count: int = 3, **arguments: Any
) -> tuple[Adapters, Ledger]:
    adapters = attach(model, **arguments)
    ledger = Ledger(adapters)
    for number in range(count):
        randomise(adapters, number)
        ledger.merge(10 * (number + 1), f"step {10 * (number + 1)}", 0.5)
    randomise(adapters, 99)
    return adapters, ledger


def dense_updates(adapters: Adapters) -> list[Tensor]:
    """scaling * (all boosters + pair) of each layer as one float64 matrix."""
    return [
        layer.scaling
        * (layer.booster_B.double() @ layer.booster_A.double() + layer.lora_B.double() @ layer.lora_A.double())
        for layer in adapters.layers.values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merges_do_not_change_the_function(
    architecture: PreTrainedConfig, dtype: torch.dtype, randomise: Callable[..., None]
) -> None:
    """Logits are equal to the last bit, over more merges than a block holds, and the base's weights stay."""
    model = build(architecture, dtype)
    adapters = attach(model)
    ledger = Ledger(adapters)
    weights = [layer.base_layer.weight.clone() for layer in adapters.layers.values()]
    bare = model(IDS).logits
    for merge in range(BLOCK + 2):
        randomise(adapters, merge)
        before = model(IDS).logits
        ledger.merge(merge + 1, f"step {merge + 1}", 0.5)
        assert torch.equal(model(IDS).logits, before)
        assert not torch.equal(before, bare)
    for layer, weight in zip(adapters.layers.values(), weights, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)


def test_a_merge_freezes_the_pair_and_starts_a_new_one(randomise: Callable[..., None]) -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), seed=7)
    ledger = Ledger(adapters)
    randomise(adapters)
    trained = [(layer.lora_A.clone(), layer.lora_B.clone()) for layer in adapters.layers.values()]
    booster = ledger.merge(5, "step 5", 0.25)
    fresh = attach(build(ARCHITECTURES["llama"]), seed=7)
    for layer, (A, B), first in zip(adapters.layers.values(), trained, fresh.layers.values(), strict=True):
        assert torch.equal(layer.booster_A, A)
        assert torch.equal(layer.booster_B, B)
        assert not layer.lora_B.any()
        assert layer.lora_A.any()
        assert not torch.equal(layer.lora_A, first.lora_A), "every pair starts from an A of its own"
    wanted = sum((16 * B @ A).double().square().sum() for A, B in trained) ** 0.5
    assert booster.norm == pytest.approx(wanted.item(), rel=1e-5)
    assert (booster.step, booster.place, booster.loss) == (5, "step 5", 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_booster_is_lost_to_rounding(dtype: torch.dtype) -> None:
    """Boosters far below the weights' last place: added in place, each vanishes; in the ledger, all of them count."""
    model = build(ARCHITECTURES["llama"], dtype)
    adapters = attach(model, target_modules=["q_proj"])
    ledger = Ledger(adapters)
    layer = next(iter(adapters.layers.values()))
    weight = layer.base_layer.weight
    in_place = weight.clone()
    size = 0.05 * torch.finfo(dtype).eps * weight.abs().mean().item()  # of each entry of one booster's update
    count = 400
    for number in range(count):
        with torch.no_grad():
            for adapted in adapters.layers.values():
                adapted.lora_A.fill_(1.0)
                adapted.lora_B.fill_(size / adapted.scaling)
            in_place += (layer.scaling * layer.lora_B @ layer.lora_A).to(dtype)
        ledger.merge(number + 1, f"step {number + 1}", 1.0)
    total = layer.scaling * layer.booster_B @ layer.booster_A
    torch.testing.assert_close(total, torch.full_like(total, count * size), rtol=1e-4, atol=0)
    kept = (in_place.float() - weight.float()).mean() / (count * size)
    assert kept < 0.7, "were adding in place harmless, nobody would need a ledger"
    x = torch.ones(1, 32, dtype=dtype)
    wanted = (layer.base_layer(x).float() + 32 * count * size).to(dtype)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("rank", "boosters"), [(1, 0), (1, 3), (4, 0)])
def test_peft_loads_what_is_saved(
    architecture: PreTrainedConfig, rank: int, boosters: int, tmp_path: Path, randomise: Callable[..., None]
) -> None:
    model = build(architecture)
    _, ledger = with_boosters(model, randomise, boosters, rank=rank)
    ledger.save(tmp_path)
    theirs = PeftModel.from_pretrained(build(architecture), tmp_path)
    assert theirs.peft_config["default"].r == boosters + rank
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def with_rounds(model: PreTrainedModel, randomise: Callable[..., None]) -> tuple[Adapters, Ledger]:
    """Boosters of rank 1, 3 and 2, and a pair in training of rank 2."""
    adapters, ledger = with_boosters(model, randomise, 1)
    adapters.new_pair(1)
    for number, rank in enumerate((3, 2), start=1):
        adapters.resize_pair(rank)
        randomise(adapters, number)
        ledger.merge(number + 1, f"step {number + 1}", 0.5)
    randomise(adapters, 7)
    return adapters, ledger


def test_boosters_of_several_ranks_count_as_one_each(tmp_path: Path, randomise: Callable[..., None]) -> None:
    """Saved, loaded by PEFT and by us, the first ones alone, and cut off: always whole boosters."""
    model = build(ARCHITECTURES["llama"])
    adapters, ledger = with_rounds(model, randomise)
    assert (adapters.boosters, adapters.ranks, adapters.total_rank) == (3, [1, 3, 2], 8)
    assert [booster.rank for booster in ledger.boosters] == [1, 3, 2]
    for number, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        updates = [16 * layer.booster_B[:, rows] @ layer.booster_A[rows] for layer in adapters.layers.values()]
        norm = sum(update.double().square().sum() for update in updates) ** 0.5
        assert ledger.boosters[number].norm == pytest.approx(norm.item(), rel=1e-5)
    ledger.save(tmp_path)
    theirs = PeftModel.from_pretrained(build(ARCHITECTURES["llama"]), tmp_path)
    assert theirs.peft_config["default"].r == 8
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    logits = []
    for count in range(5):
        with adapters.first(count):
            assert adapters.boosters == min(count, 3)
            logits.append(model(IDS).logits)
    assert torch.equal(logits[4], model(IDS).logits)
    for count in (4, 3, 2, 1, 0):
        again = build(ARCHITECTURES["llama"])
        loaded = load_adapters(again, tmp_path)
        assert loaded.boosters == ledger.boosters
        loaded.truncate(count)
        assert loaded.adapters.boosters == max(count - 1, 0)
        torch.testing.assert_close(again(IDS).logits, logits[count], rtol=1e-5, atol=1e-5)
        assert loaded.adapters.rank == {4: 2, 3: 2, 2: 3}.get(count, 1 if count else 2)
        loaded.save(tmp_path / str(count))
        once_more = build(ARCHITECTURES["llama"])
        load_adapters(once_more, tmp_path / str(count))
        assert torch.equal(once_more(IDS).logits, again(IDS).logits)


def test_a_ledger_reloads_bit_for_bit(tmp_path: Path, randomise: Callable[..., None]) -> None:
    model = build(ARCHITECTURES["opt"])
    adapters, ledger = with_boosters(model, randomise)
    ledger.training = {"forward_passes": 7}
    ledger.save(tmp_path)
    other = build(ARCHITECTURES["opt"])
    loaded = Ledger(attach(other, seed=5))
    loaded.load(tmp_path)
    assert loaded.boosters == ledger.boosters
    assert loaded.training == {"forward_passes": 7}
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    for mine, theirs in zip(dense_updates(adapters), dense_updates(loaded.adapters), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("rank", "boosters"), [(1, 2), (4, 0)])
def test_adapters_are_attached_from_a_folder(
    rank: int, boosters: int, tmp_path: Path, randomise: Callable[..., None]
) -> None:
    model = build(ARCHITECTURES["gpt2"])
    _, ledger = with_boosters(model, randomise, boosters, rank=rank, alpha=12, target_modules=["c_attn", "c_proj"])
    ledger.save(tmp_path)
    other = build(ARCHITECTURES["gpt2"])
    loaded = load_adapters(other, tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert loaded.boosters == ledger.boosters
    stranger = build(ARCHITECTURES["llama"])
    with pytest.raises(XgbloraError, match="base architecture: GPT2LMHeadModel there, LlamaForCausalLM here"):
        load_adapters(stranger, tmp_path)


def test_saving_twice_replaces(tmp_path: Path, randomise: Callable[..., None]) -> None:
    _, ledger = with_boosters(build(ARCHITECTURES["opt"]), randomise, count=1)
    ledger.save(tmp_path)
    ledger.merge(50, "step 50", 0.1)
    ledger.save(tmp_path)
    assert len(json.loads((tmp_path / "ledger.json").read_text(encoding="utf-8"))["boosters"]) == 2
    assert not list(tmp_path.glob("*.part"))


def damage(folder: Path, file: str, how: str) -> None:
    path = folder / file
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "garbage":
        path.write_bytes(b"\x00garbage" * 50)
    elif how == "keyless":
        path.write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        (
            "adapter_model.safetensors",
            "missing",
            "holds no adapters of xgblora's: adapter_model.safetensors is missing",
        ),
        ("adapter_model.safetensors", "cut", "adapter_model.safetensors is damaged"),
        ("adapter_model.safetensors", "garbage", "adapter_model.safetensors is damaged"),
        ("ledger.json", "missing", "holds no adapters of xgblora's: ledger.json is missing"),
        ("ledger.json", "cut", "ledger.json is damaged"),
        ("ledger.json", "keyless", "ledger.json is damaged"),
    ],
)
def test_damaged_files_are_refused(
    file: str, how: str, message: str, tmp_path: Path, randomise: Callable[..., None]
) -> None:
    _, ledger = with_boosters(build(ARCHITECTURES["opt"]), randomise)
    ledger.save(tmp_path)
    damage(tmp_path, file, how)
    with pytest.raises(XgbloraError, match=message):
        Ledger(attach(build(ARCHITECTURES["opt"]))).load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2}, "rank: 1 there, 2 here, scaling: 16.0 there, 8.0 here"),
        ({"alpha": 8}, "scaling: 16.0 there, 8.0 here"),
        ({"target_modules": ["k_proj"]}, "has no adapter for .*k_proj"),
        ({"target_modules": ["q_proj"]}, "adapts .*v_proj.*, the model does not"),
    ],
)
def test_other_adapters_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, randomise: Callable[..., None]
) -> None:
    _, ledger = with_boosters(build(ARCHITECTURES["opt"]), randomise)
    ledger.save(tmp_path)
    with pytest.raises(XgbloraError, match=message):
        Ledger(attach(build(ARCHITECTURES["opt"]), **arguments)).load(tmp_path)


def test_what_a_run_needs_to_go_on_is_saved(randomise: Callable[..., None], tmp_path: Path) -> None:
    model = build(ARCHITECTURES["opt"])
    _, ledger = with_boosters(model, randomise, 2)
    ledger.training = {"method": {"step_length": 2.5}, "forward_passes": 3}
    ledger.note_evaluation(99, {"eval_loss": 0.25, "eval_accuracy": 0.75})
    ledger.save(tmp_path)
    model = build(ARCHITECTURES["opt"])
    again = load_adapters(model, tmp_path)
    for name in ("boosters", "evaluation", "training"):
        assert getattr(again, name) == getattr(ledger, name), name
    assert again.evaluations() == {3: 0.25}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_lora_becomes_the_first_boosters(rslora: bool, tmp_path: Path) -> None:
    """Same logits as PEFT's; the layers it leaves out hold zeros; our pair trains after it."""
    model = build(ARCHITECTURES["llama"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False, use_rslora=rslora)
    theirs = get_peft_model(model, config).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path)
    model = build(ARCHITECTURES["llama"])
    ledger = Ledger(attach(model, 1, 16, ["q_proj", "v_proj"], xgblora=True))
    assert start_from(ledger, tmp_path) == 3
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert [booster.step for booster in ledger.boosters] == [0, 0, 0]
    ledger.save(tmp_path / "again")
    fresh = build(ARCHITECTURES["llama"])
    load_adapters(fresh, tmp_path / "again")
    torch.testing.assert_close(fresh(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "changes", "says"),
    [
        (["v_proj"], {}, "name those layers"),
        (["q_proj"], {"use_dora": True}, "use_dora"),
        (["q_proj"], {"peft_type": "IA3"}, "not that of a LoRA"),
    ],
)
def test_adapters_that_boosters_cannot_hold_are_refused(
    targets: list[str], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(build(ARCHITECTURES["llama"]), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    ledger = Ledger(attach(build(ARCHITECTURES["llama"]), 1, 16, targets, xgblora=True))
    with pytest.raises(XgbloraError, match=says):
        start_from(ledger, tmp_path)
    with pytest.raises(XgbloraError, match="no PEFT adapter"):
        start_from(ledger, tmp_path / "nowhere")
