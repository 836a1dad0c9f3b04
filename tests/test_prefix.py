"""Layers below the lowest one that trains: the same estimate, computed once, kept within bounds, never stale."""

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, PreTrainedConfig

from conftest import ARCHITECTURES, LogLines, build, estimate, examples, option_scores, train
from xgblora import Adapters, Base, LayerSubset, Ledger, TextLoss, XgbloraError, attach, evaluate, evaluate_stages
from xgblora.base.prefix import Prefix
from xgblora.data.batch import build_batch
from xgblora.learn.estimators import Estimate
from xgblora.learn.losses import FunctionLoss

TOP = LayerSubset(1, "top")
OPTIONS = [[5], [9, 4]]


def gradient(adapters: Adapters, prefix: Prefix | None, seed: int = 0) -> Estimate:
    batch = adapters.base.batch(examples(5, OPTIONS, seed))
    return estimate(adapters, batch, prefix=prefix, perturbations=2)


@pytest.mark.parametrize(
    ("packed", "cache_bytes"),
    [
        *((True, cache_bytes) for cache_bytes in (0, 12_000, 10**9)),
        *(pytest.param(False, cache_bytes, marks=pytest.mark.soak) for cache_bytes in (0, 12_000)),  # nothing is kept
        (False, 10**9),
    ],
)
def test_the_estimate_is_that_of_whole_forwards(
    architecture: PreTrainedConfig, packed: bool, cache_bytes: int, randomise
) -> None:
    adapters = attach(Base(build(architecture), packed), layers=TOP)
    randomise(adapters)
    prefix = Prefix(adapters.model, cache_bytes)
    for seed in (0, 1, 0, 1):  # the second time from memory
        expected = gradient(adapters, None, seed)
        kept = gradient(adapters, prefix, seed)
        assert kept.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(kept.projected, expected.projected, rtol=1e-3, atol=1e-3)
    assert prefix.used_bytes <= cache_bytes
    assert bool(prefix.used_bytes) == (packed and cache_bytes > 0)


def test_lower_layers_run_once_and_then_not_at_all() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, layers=TOP)
    tokens: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[1]))
    prefix = Prefix(adapters.model, 10**9)
    gradient(adapters, prefix)
    once = build_batch(examples(5, OPTIONS)).filled().input_ids.numel()
    assert tokens[-1] == once  # not twice the tokens
    count = len(tokens)
    gradient(adapters, prefix)
    assert len(tokens) == count
    prefix.clear()
    gradient(adapters, prefix)
    assert tokens[count:] == [once]


def test_the_model_is_whole_outside() -> None:
    model = build(ARCHITECTURES["gpt2"])
    adapters = attach(model, layers=TOP)
    batch = build_batch(examples(5))
    with torch.no_grad():
        before = option_scores(model, batch)
        gradient(adapters, Prefix(model, 10**9))
        assert torch.equal(option_scores(model, batch), before)


def test_an_architecture_that_cannot_be_entered_says_so_and_computes_all(log_lines: LogLines) -> None:
    """Bloom's layers return tuples."""
    base = Base(build(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)), packed=False)
    adapters = attach(base, layers=TOP)
    prefix = Prefix(adapters.model, 10**9)
    expected, entered = gradient(adapters, None), gradient(adapters, prefix)
    gradient(adapters, prefix)
    assert torch.equal(entered.gradient, expected.gradient)
    assert len(log_lines.containing("computes all layers for each probe")) == 1


def test_an_objective_on_another_batch_is_refused() -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), layers=TOP)
    other = build_batch(examples(2))

    def objective(model, batch):
        return option_scores(model, other).sum(1)

    with pytest.raises(XgbloraError, match="on another batch than its own"):
        estimate(adapters, build_batch(examples(5)), FunctionLoss(objective), Prefix(adapters.model, 0))


def test_subsets_are_a_function_of_seed_and_number() -> None:
    config = ARCHITECTURES["llama"].__class__(**ARCHITECTURES["llama"].to_dict() | {"num_hidden_layers": 8})
    first, second = (attach(build(config), seed=3, layers=LayerSubset(3)) for _ in range(2))
    chosen = set()
    for number in (0, 1, 2, 3):
        first.new_pair(number)
        second.new_pair(number)
        trained = {id(layer) for adapters in (first, second) for layer, _, _ in adapters.slices}
        names = [name for name, layer in first.layers.items() if id(layer) in trained]
        assert names == [name for name, layer in second.layers.items() if id(layer) in trained]
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
    flags = {"xgblora": True, "xgblora_steps_per_iteration": 8, "max_steps": 24, "layers": LayerSubset(3)}
    config = ARCHITECTURES["llama"].__class__(**ARCHITECTURES["llama"].to_dict() | {"num_hidden_layers": 8})
    _, without = train(tmp_path / "without", build(config), examples(32), activation_cache_gb=0, **flags)
    run, kept = train(tmp_path / "kept", build(config), examples(32), activation_cache_gb=1, **flags)
    assert run.method.prefix.used_bytes > 0
    assert kept == pytest.approx(without, rel=1e-3)


def test_a_checkpoint_forgets_what_was_kept(tmp_path: Path) -> None:
    """A run that is resumed there starts with nothing, and sums of other parts round otherwise."""
    kept, _ = train(tmp_path / "kept", layers=TOP, max_steps=4)
    assert kept.method.prefix.used_bytes > 0
    saved, _ = train(tmp_path / "saved", layers=TOP, max_steps=4, save_strategy="steps", save_steps=4)
    assert saved.method.prefix.used_bytes == 0


def test_language_model_losses_work_too() -> None:
    adapters = attach(build(ARCHITECTURES["opt"]), layers=TOP)
    batch = build_batch(examples(4, OPTIONS))
    kept = estimate(adapters, batch, TextLoss(), Prefix(adapters.model, 10**9))
    expected = estimate(adapters, batch, TextLoss())
    assert kept.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)


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


@pytest.mark.parametrize("start", [None, LayerSubset(1, "random"), LayerSubset(1, "top")])
def test_stages_of_boosters_below_the_lowest_layer_that_trains(start: LayerSubset | None, randomise) -> None:
    """Random subsets, or boosters in all layers before a top window: what lies below differs from stage to stage."""
    model = build(ARCHITECTURES["llama"])
    rows = examples(40)
    ledger = Ledger(attach(model, xgblora=True, seed=1, layers=start))
    expected = [evaluate(model, rows)]
    for number in range(4):
        if start is None and number == 3:  # as a run that starts from an adapter and trains its top layers
            ledger.adapters.subset = TOP
            ledger.adapters.choose_layers(number)
        with torch.no_grad():
            for layer, _, _ in ledger.adapters.slices:
                layer.lora_B.copy_(
                    0.3 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(number))
                )
        expected.append(evaluate(model, rows))
        if number < 3:
            ledger.merge(number + 1, "", 1.0)
    ledger.adapters.choose_layers(3 if start is None else next(n for n in range(9) if chosen(ledger.adapters, n) == 1))
    assert ledger.adapters.lowest_layer == "model.layers.1"
    stages = evaluate_stages(ledger.adapters, rows)
    assert [stage.loss for stage in stages] == pytest.approx([one.loss for one in expected], rel=1e-5)
    assert [stage.predictions for stage in stages] == [one.predictions for one in expected]


def chosen(adapters: Adapters, number: int) -> int:
    """The one layer in which pair ``number`` trains."""
    adapters.choose_layers(number)
    return 0 if adapters.lowest_layer is None else 1
