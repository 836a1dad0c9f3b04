"""--base_score: a constant that training starts from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from architectures import tiny
from conftest import ARCHITECTURES, build, examples, refusal_by_command, train_by_command
from xgblora import Base, Example, Ledger, OptionLoss, XgbloraError, add_base_score, attach, evaluate, load_adapters
from xgblora.learn.fitted.activations import parts

SIZES = "--num_train 64 --num_dev 8 --num_eval 12"
STEPS = "--max_steps 6 --logging_steps 1 --per_device_train_batch_size 4 --zo_eps 1e-2 --learning_rate 1e-2"
THREE = [[5], [9], [7]]


def lopsided(count: int, options: list[list[int]] | None = None, seed: int = 0, often: int = 0) -> list[Example]:
    """Four of five rows have one label, whatever stands in the prompt."""
    rows = examples(count, options or [[5], [9]], seed)
    return [replace(row, label=often if number % 5 else 1 - min(often, 1)) for number, row in enumerate(rows)]


def scores(base: Base, rows: list[Example]) -> Tensor:
    """Option scores (rows, options)."""
    batches = list(parts(rows, base.packed))
    with torch.no_grad():
        return torch.cat(list(OptionLoss().all_scores(base, batches)))


def best_constant(before: Tensor, rows: list[Example]) -> float:
    """The loss with the best constant, by a general optimizer."""
    labels = torch.tensor([row.label for row in rows])
    added = torch.zeros(before.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([added], max_iter=100)

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(before + added, labels) + 0.5 * added.square().sum() / len(rows)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    return F.cross_entropy(before + added.detach(), labels).item()


@pytest.mark.parametrize("options", [None, THREE, [[5, 6], [9]]], ids=["two", "three", "several tokens"])
@pytest.mark.parametrize("rank", [1, 8])
def test_it_gains_nearly_what_the_best_constant_gains(architecture: Any, rank: int, options: Any) -> None:
    """The layer's constant moves scores by other amounts in other texts, and only some directions are tried."""
    model = build(architecture)
    base = Base.of(model)
    before = scores(base, lopsided(64, options))
    rows = lopsided(64, options, often=before.mean(0).argmin().item())
    ledger = Ledger(attach(base, rank))
    add_base_score(ledger, rows)
    after = evaluate(base, rows).loss
    first = F.cross_entropy(before, torch.tensor([row.label for row in rows])).item()
    assert first - after > 0.7 * (first - best_constant(before, rows)) > 0.05
    assert ledger.adapters.rank == rank
    assert ledger.adapters.ranks == [1]
    assert not any(layer.lora_B.any() for layer in ledger.adapters.layers.values())


def test_it_holds_on_other_rows() -> None:
    base, others = Base.of(build(ARCHITECTURES["llama"])), lopsided(200, seed=1)
    before = evaluate(base, others).loss
    ledger = Ledger(attach(base))
    add_base_score(ledger, lopsided(64))
    assert evaluate(base, others).loss < before - 0.05


def test_the_layer_that_moves_scores_is_taken() -> None:
    """A shift of all queries, or of all keys, moves scores in ways that no text needs."""
    ledger = Ledger(attach(build(ARCHITECTURES["llama"]), target_modules=["q_proj", "k_proj", "down_proj"]))
    add_base_score(ledger, lopsided(64))
    (booster,) = ledger.boosters
    assert list(booster.norms) == ["model.layers.1.mlp.down_proj"]
    assert booster.reason == "base score of 64 examples"


def test_work_is_counted() -> None:
    ledger = Ledger(attach(build(ARCHITECTURES["llama"]), target_modules=["v_proj"]))
    rows = lopsided(40)
    cost = add_base_score(ledger, rows)
    looks, probes = 1, 2
    assert cost.sequences % 40 == 0
    assert looks + probes + 1 <= cost.sequences // 40 <= looks + probes + 8
    assert cost.tokens == cost.sequences // 40 * sum(row.tokens for row in rows)


def test_rewards_say_what_is_right() -> None:
    """Labels are not looked at."""
    losses = []
    for label in (0, 1):
        base = Base.of(build(ARCHITECTURES["llama"]))
        rows = [replace(row, label=label) for row in examples(64)]
        ledger = Ledger(attach(base))
        add_base_score(ledger, rows, worth=lambda row: [0.5, 2.0])
        losses.append(evaluate(base, [replace(row, label=1) for row in rows]).loss)
    assert losses[0] == losses[1] < 0.3


def test_nothing_is_added_where_nothing_helps() -> None:
    """The layer that trains reaches nothing."""
    model = build(ARCHITECTURES["llama"])
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    ledger = Ledger(attach(model, target_modules=["v_proj"]))
    before = [layer.lora_A.clone() for layer in ledger.adapters.layers.values()]
    add_base_score(ledger, lopsided(64))
    assert (ledger.boosters, ledger.adapters.ranks) == ([], [])
    assert all(map(torch.equal, before, (layer.lora_A for layer in ledger.adapters.layers.values())))


def test_a_pair_that_has_learned_something_is_refused() -> None:
    ledger = Ledger(attach(build(ARCHITECTURES["llama"])))
    with torch.no_grad():
        next(iter(ledger.adapters.layers.values())).lora_B[0] = 1
    with pytest.raises(XgbloraError, match="merge it before a base score"):
        add_base_score(ledger, lopsided(8))


def test_scores_that_are_not_finite_are_refused() -> None:
    model = build(ARCHITECTURES["llama"])
    ledger = Ledger(attach(model))
    evaluate(ledger.adapters.base, lopsided(8))  # how the model runs is measured while it is sound
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(XgbloraError, match="scores are not finite"):
        add_base_score(ledger, lopsided(8))


def test_a_model_without_layers_to_look_into_is_refused() -> None:
    ledger = Ledger(attach(tiny("openai-gpt")))
    with pytest.raises(XgbloraError, match="--base_score finds no decoder layers"):
        add_base_score(ledger, lopsided(8))


def test_other_options_are_refused() -> None:
    ledger = Ledger(attach(build(ARCHITECTURES["llama"])))
    rows = [*examples(4), *examples(4, [[5], [7]])]
    with pytest.raises(XgbloraError, match="the same options in every row"):
        add_base_score(ledger, rows)


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_both_methods_start_from_the_same_constant(
    trainer: str, tmp_path: Path, model_folder: Path, data_folder: Path
) -> None:
    """Without a merge XGBLoRA is rank-1 LoRA to the last bit, from there on, too; the work of the start counts."""
    flags = f"--task_name SST2 --data_dir {data_folder} {SIZES} {STEPS} --trainer {trainer} --base_score 32"
    curves, metrics = {}, {}
    for method in ("--lora --lora_r 1", "--xgblora --xgblora_merge_frequency 0"):
        metrics[method] = train_by_command(tmp_path, model_folder, f"{flags} {method}")
        curves[method] = (tmp_path / "run" / "training_loss.jsonl").read_bytes()
        entries = json.loads((tmp_path / "run" / "adapter" / "ledger.json").read_text(encoding="utf-8"))
        assert [(b["step"], b["reason"]) for b in entries["boosters"]] == [(0, "base score of 32 examples")]
        (tmp_path / "run").rename(tmp_path / method.split()[0].strip("-"))
    (lora, of_lora), (_, of_xgblora) = metrics.items()
    assert curves[lora] == curves["--xgblora --xgblora_merge_frequency 0"]
    assert of_lora["eval_loss"] == of_xgblora["eval_loss"]
    assert (of_lora["merges"], of_lora["rank"]) == (0, 2)
    bare = train_by_command(tmp_path, model_folder, f"{flags.replace('--base_score 32', '')} {lora}")
    assert of_lora["forward_sequences"] > bare["forward_sequences"] + 32


def test_a_saved_adapter_holds_it(tmp_path: Path) -> None:
    """In plain PEFT's format: a LoRA of one more rank."""
    rows, model = lopsided(64), build(ARCHITECTURES["llama"])
    ledger = Ledger(attach(model, 4))
    add_base_score(ledger, rows)
    loss = evaluate(model, rows).loss
    ledger.save(tmp_path / "adapter")
    ledger.adapters.detach()
    again = load_adapters(model, tmp_path / "adapter")
    assert again.boosters == ledger.boosters
    assert again.adapters.total_rank == 5
    assert evaluate(model, rows).loss == pytest.approx(loss, rel=1e-5)


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    flags = f"--task_name SST2 --data_dir {data_folder} {SIZES} {STEPS} --lora --lora_r 2 --base_score 16"
    flags += " --save_steps 3"
    whole = train_by_command(tmp_path, model_folder, flags)
    curve = (tmp_path / "run" / "training_loss.jsonl").read_bytes()
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    resumed = train_by_command(tmp_path, model_folder, flags)
    assert (tmp_path / "run" / "training_loss.jsonl").read_bytes() == curve
    for name in ("eval_loss", "forward_sequences", "forward_tokens", "rank"):
        assert resumed[name] == whole[name]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--train_as_classification false", "--base_score makes options likelier, and here answers are written"),
        ("--base_score -1", "--base_score must be 0 or more"),
    ],
)
def test_what_has_no_constant_is_refused(
    flags: str, says: str, tmp_path: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = f"--task_name SST2 --data_dir {data_folder} {SIZES} --max_steps 2 --base_score 8"
    assert says in refusal_by_command(tmp_path, model_folder, f"{common} {flags}", capsys)
    assert not (tmp_path / "run").exists()
