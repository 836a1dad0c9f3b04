"""Layers below the lowest one that trains: the same estimate, computed once, kept within bounds, never stale."""

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, PreTrainedConfig

from conftest import ARCHITECTURES, LogLines, build, examples, train
from xgblora import Adapters, LayerSubset, XgbloraError, attach
from xgblora.lower_layers import LowerLayers
from xgblora.objectives import classification_loss, language_model_loss, option_scores
from xgblora.packing import build_batch
from xgblora.zo import Estimate, direction_generators, estimate_batch

TOP = LayerSubset(1, "top")
OPTIONS = [[5], [9, 4]]


def gradient(adapters: Adapters, packed: bool, lower_layers: LowerLayers | None, seed: int = 0) -> Estimate:
    batch = build_batch(examples(5, OPTIONS, seed), packed)
    draws = direction_generators(0, 0, 0, 2)
    return estimate_batch(adapters, classification_loss, batch, draws, 1e-2, "per_example", lower_layers)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cache_bytes", [0, 4000, 10**9])
def test_the_estimate_is_that_of_whole_forwards(
    architecture: PreTrainedConfig, packed: bool, cache_bytes: int, randomise
) -> None:
    adapters = attach(build(architecture), layers=TOP)
    randomise(adapters)
    lower_layers = LowerLayers(adapters, cache_bytes)
    for seed in (0, 1, 0, 1):  # the second time from memory
        expected = gradient(adapters, packed, None, seed)
        found = gradient(adapters, packed, lower_layers, seed)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.projected, expected.projected, rtol=1e-3, atol=1e-3)
    assert lower_layers.used_bytes <= cache_bytes
    assert bool(lower_layers.used_bytes) == (packed and cache_bytes > 0)


def test_lower_layers_run_once_and_then_not_at_all() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, layers=TOP)
    tokens: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[1]))
    lower_layers = LowerLayers(adapters, 10**9)
    gradient(adapters, True, lower_layers)
    once = build_batch(examples(5, OPTIONS)).filled().input_ids.numel()
    assert tokens[-1] == once  # not twice the tokens
    count = len(tokens)
    gradient(adapters, True, lower_layers)
    assert len(tokens) == count
    lower_layers.clear()
    gradient(adapters, True, lower_layers)
    assert tokens[count:] == [once]


def test_the_model_is_whole_outside() -> None:
    model = build(ARCHITECTURES["gpt2"])
    adapters = attach(model, layers=TOP)
    batch = build_batch(examples(5))
    with torch.no_grad():
        before = option_scores(model, batch)
        gradient(adapters, True, LowerLayers(adapters, 10**9))
        assert torch.equal(option_scores(model, batch), before)


def test_an_architecture_that_cannot_be_entered_says_so_and_computes_all(log_lines: LogLines) -> None:
    """Bloom's layers return tuples."""
    adapters = attach(build(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)), layers=TOP)
    lower_layers = LowerLayers(adapters, 10**9)
    expected, found = gradient(adapters, False, None), gradient(adapters, False, lower_layers)
    gradient(adapters, False, lower_layers)
    assert torch.equal(found.gradient, expected.gradient)
    assert len(log_lines.containing("computes all layers for each probe")) == 1


def test_an_objective_on_another_batch_is_refused() -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), layers=TOP)
    other = build_batch(examples(2))

    def objective(model, batch):
        return option_scores(model, other).sum(1)

    with pytest.raises(XgbloraError, match="on another batch than its own"):
        estimate_batch(
            adapters,
            objective,
            build_batch(examples(5)),
            direction_generators(0, 0, 0, 1),
            1e-2,
            "shared",
            LowerLayers(adapters, 0),
        )


def test_subsets_are_a_function_of_seed_and_number() -> None:
    config = ARCHITECTURES["llama"].__class__(**ARCHITECTURES["llama"].to_dict() | {"num_hidden_layers": 8})
    first, second = (attach(build(config), seed=3, layers=LayerSubset(3)) for _ in range(2))
    chosen = set()
    for number in (0, 1, 2, 3):
        first.new_pair(number)
        second.new_pair(number)
        names = [name for name, layer in first.layers.items() if any(layer is each for each, _, _ in first.slices)]
        assert names == [n for n, layer in second.layers.items() if any(layer is each for each, _, _ in second.slices)]
        assert len(names) == 6  # q and v
        lowest = min(int(name.split(".")[2]) for name in names)
        assert first.lowest_layer == (f"model.layers.{lowest}" if lowest else None)
        assert first.size == sum(layer.lora_A.numel() + layer.lora_B.numel() for layer, _, _ in first.slices)
        chosen.add(tuple(names))
    assert len(chosen) > 1


@pytest.mark.parametrize("count", [0, 3])
def test_an_impossible_subset_leaves_the_model_alone(count: int) -> None:
    model = build(ARCHITECTURES["llama"])
    before = dict(model.named_modules())
    with pytest.raises(XgbloraError, match="must be 1 to 2"):
        attach(model, layers=LayerSubset(count))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("trainer", ["zo", "regular"])
def test_a_run_trains_the_chosen_layers_alone(tmp_path: Path, trainer: str) -> None:
    flags = {"xgblora": True, "xgblora_steps_per_iteration": 4, "max_steps": 8, "trainer": trainer}
    model = build(ARCHITECTURES["llama"])
    run, losses = train(tmp_path / "kept", model, layers=LayerSubset(1), **flags)
    assert len(losses) == 8
    for number in (0, 1):
        run.adapters.choose_layers(number)
        trains = {id(layer) for layer, _, _ in run.adapters.slices}
        assert len(trains) == 2
        for layer in run.adapters.layers.values():
            B = layer.booster_B if number == 0 else layer.lora_B
            assert bool(B.any()) == (id(layer) in trains)


def test_kept_activations_change_no_loss(tmp_path: Path) -> None:
    """Two epochs a booster; what was kept before a merge must not be used after it."""
    flags = {"xgblora": True, "xgblora_steps_per_iteration": 16, "max_steps": 48, "layers": LayerSubset(3)}
    config = ARCHITECTURES["llama"].__class__(**ARCHITECTURES["llama"].to_dict() | {"num_hidden_layers": 8})
    _, without = train(tmp_path / "without", build(config), activation_cache_gb=0, **flags)
    run, kept = train(tmp_path / "kept", build(config), activation_cache_gb=1, **flags)
    assert run.lower_layers.used_bytes > 0
    assert kept == pytest.approx(without, rel=1e-3)


def test_language_model_losses_work_too() -> None:
    adapters = attach(build(ARCHITECTURES["opt"]), layers=TOP)
    batch = build_batch(examples(4, OPTIONS))
    arguments = (language_model_loss, batch, direction_generators(0, 0, 0, 1), 1e-2, "shared")
    found = estimate_batch(adapters, *arguments, LowerLayers(adapters, 10**9))
    expected = estimate_batch(adapters, language_model_loss, batch, direction_generators(0, 0, 0, 1), 1e-2, "shared")
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_chooses_the_same_layers_and_losses(tmp_path: Path) -> None:
    flags = {"xgblora": True, "xgblora_steps_per_iteration": 6, "max_steps": 20, "layers": LayerSubset(2)}
    flags |= {"save_strategy": "steps", "save_steps": 8, "save_total_limit": 9}
    config = ARCHITECTURES["llama"].__class__(**ARCHITECTURES["llama"].to_dict() | {"num_hidden_layers": 8})
    whole, losses = train(tmp_path / "whole", build(config), **flags)
    checkpoint = str(tmp_path / "whole" / "checkpoint-8")
    resumed, tail = train(tmp_path / "resumed", build(config), resume=checkpoint, **flags)
    assert tail == losses
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        assert torch.equal(mine.lora_B, theirs.lora_B)
        assert torch.equal(mine.booster_B, theirs.booster_B)
