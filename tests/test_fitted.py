"""Boosters fitted to pseudo-residuals: the fit is the optimum it claims to be, and the model follows it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, CTRLConfig, PreTrainedConfig

from conftest import ARCHITECTURES, LogLines, build, examples, option_scores, train
from xgblora import (
    Adapters,
    Base,
    Batch,
    Example,
    LayerSubset,
    OptionLoss,
    RunConfig,
    TextLoss,
    XgbloraError,
    attach,
    evaluate,
    load_adapters,
)
from xgblora.base.observation import rows_read
from xgblora.base.prefix import Prefix
from xgblora.config import notes
from xgblora.data.batch import build_batch
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import BoostRecipe, boost, put
from xgblora.learn.fitted.fit import fit
from xgblora.learn.fitted.step_length import line_search, shortest_as_good
from xgblora.learn.fitted.tail import Tail
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.fitted.teacher import MINOR, teach
from xgblora.learn.fitted.writers import last_writers, residual_writers, turned_down, written_along
from xgblora.learn.losses import AnswerLoss, divergences
from xgblora.randomness import Stream, generator
from xgblora.runs.run import attach_for

OPTIONS = {"single": [[5], [9]], "several": [[5], [9], [13]], "long": [[5, 6], [9], [13, 14, 15]]}
LOSSES: list[AnswerLoss] = [OptionLoss(), TextLoss()]
BOOST: dict[str, Any] = {"recipe": "boost", "lora_target_modules": ["out_proj"], "layers": LayerSubset(1, "top")}


def forwards_of(adapters: Adapters, prefix: Prefix | None = None) -> Forwards:
    return Forwards(adapters, OptionLoss(), prefix)


def recipe_of(trainer: Any) -> BoostRecipe:
    """What a trainer's method fits boosters by."""
    recipe: BoostRecipe = trainer.method.recipe
    return recipe


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("normalised", [True, False])
def test_the_tail_gives_the_models_scores(architecture: PreTrainedConfig, options: str, normalised: bool) -> None:
    model = build(architecture)
    base = Base(model)
    tail = Tail(base)
    batch = base.batch(examples(7, OPTIONS[options]))
    with torch.no_grad():
        expected = option_scores(model, batch, normalised)
        (observation,) = base.observe([batch], [])
        scores = tail.scores(observation.last, batch, normalised)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_one_forward_shows_the_tail_and_whether_layers_are_observed() -> None:
    base = Base(build(ARCHITECTURES["llama"]), packed=True)
    first, last = (list(base.layers.values())[place] for place in (0, -1))
    assert base.writers  # measured before, by a forward of its own
    calls: list[int] = []
    first.register_forward_hook(lambda *_: calls.append(1))
    Tail(base, [last])
    assert len(calls) == 1
    with pytest.raises(XgbloraError, match=r"--recipe boost: .* does not see every word once"):
        Tail(base, [base.model.get_output_embeddings()])


def lengths_around(base: Base, batches: list[Batch]) -> list[float]:
    """Mean length of what each decoder layer leaves where a batch predicts something, over batches."""
    seen: dict[str, list[float]] = {name: [] for name in base.layers}
    numbers = iter(range(len(batches) * len(base.layers)))

    def keep(name: str, output: torch.Tensor) -> None:
        batch = batches[next(numbers) // len(base.layers)]
        seen[name].append(rows_read(output, batch).norm(dim=1).mean().item())

    hooks = [
        layer.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
        for name, layer in base.layers.items()
    ]
    for _ in base.hidden(batches):
        pass
    for hook in hooks:
        hook.remove()
    return [sum(lengths) / len(lengths) for lengths in seen.values()]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("of_answers", LOSSES)
def test_the_fit_is_the_optimum_of_its_penalised_loss(
    options: str, of_answers: AnswerLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the optimum the gradient vanishes: every a_m is -1/weight times the sum of slopes times scaled inputs."""
    monkeypatch.setattr("xgblora.learn.fitted.newton.ENOUGH", 1e-8)
    monkeypatch.setattr("xgblora.learn.fitted.newton.MOST_STEPS", 400)
    monkeypatch.setattr("xgblora.learn.fitted.tail_loss.SAMPLED", 128)
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
    with torch.no_grad():
        forwards = Forwards(adapters, of_answers)
        (seen,) = forwards.observe(examples(60, OPTIONS[options]))
        loss = TailLoss(forwards, seen)
        learner = fit(seen, loss, ridge=1.0)
        assert learner.outputs.norm().item() == pytest.approx(1, abs=1e-5)
        change = learner.at(seen)
        torch.testing.assert_close(change, learner.change, rtol=1e-3, atol=1e-4)
        before, moved = loss(seen.hidden), seen.hidden + learner.change @ learner.outputs
        after, gradient = loss(moved), loss.gradient(moved)
        assert after.mean() < 0.9 * before.mean()
        slopes = gradient @ learner.outputs[0]
        spreads = [(x - x.mean(0)).norm(dim=1).mean() * len(seen.inputs) ** 0.5 for x in seen.inputs]
        if isinstance(of_answers, TextLoss):  # layers count by the length of the stream they write to
            streams = lengths_around(adapters.base, seen.batches)
            spreads = [spread * max(streams) / stream for spread, stream in zip(spreads, streams, strict=True)]
        variance = sum(((x - x.mean(0)) / s).square().sum(1).mean() for x, s in zip(seen.inputs, spreads, strict=True))
        bend = loss.bend(seen.hidden, learner.outputs, generator(0, Stream.CURVATURE), undecided=True)
        weight = variance * bend.curvature[0]
        for x, (a,), spread in zip(seen.inputs, learner.inputs, spreads, strict=True):
            expected, near = -(x.T @ slopes) / spread**2 / weight, 5e-3 if isinstance(of_answers, TextLoss) else 1e-3
            torch.testing.assert_close(a, expected, rtol=0.02, atol=near * a.abs().max())


def test_mlp_layers_are_turned_down_by_the_share_that_is_best() -> None:
    """Their pairs are -gamma W^T u, and at the optimum the loss does not change with gamma."""
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj", "down_proj"], xgblora=True)
    with torch.no_grad():
        forwards = forwards_of(adapters)
        (seen,) = forwards.observe(examples(60))
        loss = TailLoss(forwards, seen)
        assert turned_down(adapters) == ["down_proj" in name for name in adapters.layers]
        learner = fit(seen, loss, 1.0)
        change = learner.at(seen)
        torch.testing.assert_close(change, learner.change, rtol=1e-3, atol=1e-4)
        assert learner.share.abs() > 0.01
        wrote: list[torch.Tensor] = []
        for name, layer in adapters.layers.items():
            if "down_proj" in name:
                weight = layer.base_layer.weight
                layer.register_forward_pre_hook(lambda _, args, weight=weight: wrote.append(args[0] @ weight.T))
        put(adapters, learner, 0.0)
        for _ in adapters.base.hidden(seen.batches):
            pass
        rows = [rows_read(sum(wrote[2 * i : 2 * i + 2]), batch) for i, batch in enumerate(seen.batches)]
        torch.testing.assert_close(seen.written, torch.cat(rows), rtol=1e-3, atol=1e-4)
        put(adapters, learner, 1.0)
        opinion = seen.written @ learner.outputs[0]
        for name, layer in adapters.layers.items():
            along = layer.base_layer.weight.T @ learner.outputs[0]
            if "down_proj" in name:
                torch.testing.assert_close(layer.lora_A[0], -learner.share * along, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(layer.lora_B[:, 0], learner.outputs[0] / layer.scaling)
        slopes = loss.gradient(seen.hidden + learner.change @ learner.outputs) @ learner.outputs[0]
        assert abs(slopes @ opinion) < 1e-3 * slopes.abs() @ opinion.abs()


@pytest.mark.parametrize("opinion", ["keep", "drop"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_teacher_says_what_its_fit_would(
    options: str, opinion: Literal["keep", "drop"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept, f is added to the final hidden state; dropped, it is all there is along the teacher's directions."""
    monkeypatch.setattr("xgblora.learn.fitted.newton.ENOUGH", 1e-8)
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj", "down_proj"], xgblora=True)
    forwards = forwards_of(adapters)
    rows, held = examples(60, OPTIONS[options]), examples(20, OPTIONS[options], seed=9)
    teacher = teach(forwards, rows, held, opinion=opinion)
    with torch.no_grad():
        seen, unseen = forwards.observe(rows, held)
        seen, unseen = (replace(part, written=None) for part in (seen, unseen))  # the attention's alone
        learner = fit(seen, TailLoss(forwards, seen), 1.0, directions=4, least=MINOR)
        assert teacher.directions == len(learner.outputs) == {"single": 1, "several": 2, "long": 4}[options]
        torch.testing.assert_close(learner.outputs @ learner.outputs.T, torch.eye(teacher.directions))
        for outputs in learner.outputs if opinion == "drop" else []:
            for part in (seen, unseen):
                part.hidden.sub_((part.hidden @ outputs)[:, None] * outputs)
        if opinion == "drop":
            learner = fit(seen, TailLoss(forwards, seen), 1.0, learner.outputs)
        for part in (seen, unseen):
            moved = part.hidden + learner.at(part) @ learner.outputs
            batch = build_batch(part.examples, True)
            expected = forwards.tail.scores(moved, batch, False).softmax(1)
            torch.testing.assert_close(teacher.targets(part.examples), expected, rtol=2e-3, atol=5e-4)
    log = teacher.targets(held)[range(20), [example.label for example in held]].log().mean().item()
    assert teacher.losses == {opinion == "keep": pytest.approx(-log, rel=1e-4)}
    assert teacher.cost.sequences == 80
    assert not teacher.knows(Example([3, 4], OPTIONS[options], 0))


def test_a_teacher_keeps_knowledge_and_drops_prejudice() -> None:
    """With few examples: labels that the base gives itself, and labels of a base that says always the same."""
    model = build(ARCHITECTURES["llama"])
    kept = {}
    for case in ("knowledge", "prejudice"):
        rows = examples(48)
        adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
        if case == "knowledge":
            with torch.no_grad():
                sure = option_scores(model, build_batch(rows, True)).argmax(1).tolist()
            rows = [replace(row, label=label) for row, label in zip(rows, sure, strict=True)]
        else:
            model.lm_head.weight.data[5] += 4 * model.lm_head.weight.data[5]
        forwards = forwards_of(adapters)
        teacher = teach(forwards, rows[:24], rows[24:])
        kept[case] = teacher.losses[True] < teacher.losses[False]
        targets = {o: teach(forwards, rows[:24], rows[24:], opinion=o).targets(rows) for o in ("keep", "drop")}
        torch.testing.assert_close(teacher.targets(rows), targets["keep" if kept[case] else "drop"])
        adapters.detach()
    assert kept == {"knowledge": True, "prejudice": False}


def test_rows_set_aside_weaken_the_ridge_of_a_teacher() -> None:
    """Where inputs tell the labels; not where labels are chance, nor where few rows would choose."""
    model = build(ARCHITECTURES["llama"])
    forwards = forwards_of(attach(model, 1, 16, ["o_proj"], xgblora=True))
    rows = examples(200)
    teacher, usual = (teach(forwards, rows[:100], rows[100:], ridge) for ridge in (None, 1.0))
    assert teacher.ridge < usual.ridge == 1
    assert min(teacher.losses.values()) < min(usual.losses.values())
    assert not torch.allclose(teacher.targets(rows), usual.targets(rows), rtol=0, atol=0.05)
    labels = torch.randint(len(rows[0].options), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    chance = [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]
    assert teach(forwards, chance[:100], chance[100:]).ridge == 1
    assert teach(forwards, rows[:100], rows[100:120]).ridge == 1


def test_boosters_make_the_model_say_what_the_teacher_says() -> None:
    """Also of examples that neither was fitted on, with options of different number; what it never saw is left out."""
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, residual_writers(Base(model)), xgblora=True)
    forwards = forwards_of(adapters)
    rows = examples(150, OPTIONS["several"]) + examples(150, OPTIONS["single"], seed=1)
    searched, unseen = (examples(40, OPTIONS["several"], seed=seed) for seed in (2, 3))
    teacher = teach(forwards, rows, searched + unseen)
    batch, stranger = build_batch(unseen, True), Example([3, 4], OPTIONS["single"], 0)
    with torch.no_grad():
        before = divergences(option_scores(model, batch), teacher.targets(unseen)).mean()
        for number in range(8):
            boost(forwards, [*rows, stranger], [*searched, stranger], teacher=teacher, ridge=0.03)
            adapters.freeze_pair()
            adapters.new_pair(number + 1)
        after = divergences(option_scores(model, batch), teacher.targets(unseen)).mean()
    assert after < 0.1 * before


def test_targets_fit_batches_of_fewer_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgblora.learn.fitted.activations.PART_TOKENS", 15)  # an example or two
    adapters = attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True)
    forwards = forwards_of(adapters)
    rows = examples(20, OPTIONS["long"]) + examples(20, OPTIONS["single"], seed=1)
    teacher = teach(forwards, rows, examples(10, OPTIONS["long"], seed=2))
    booster = boost(forwards, rows, rows[:10], teacher=teacher)
    assert booster.after < booster.before


def test_divergences_are_those_of_the_field() -> None:
    scores = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, -1.0, 3.0]])
    targets = torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.0, 0.8]])
    expected = [
        torch.nn.functional.kl_div(row[row.isfinite()].log_softmax(0), target[row.isfinite()], reduction="sum")
        for row, target in zip(scores, targets, strict=True)
    ]
    torch.testing.assert_close(divergences(scores, targets), torch.stack(expected))
    assert divergences(scores, scores.softmax(1)).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "writer"), [("opt", "fc2"), ("gpt2", "mlp.c_proj"), ("llama", "down_proj")])
def test_what_a_layer_writes_is_asked_of_the_layer(name: str, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgblora.learn.fitted.writers.PART_UNITS", 20)  # so that the inputs come in parts
    model = build(ARCHITECTURES[name])
    assert writer in residual_writers(Base(model))
    layer = next(iter(attach(model, 1, 16, [writer], xgblora=True).layers.values()))
    output = torch.randn(layer.out_features, generator=torch.Generator().manual_seed(0))
    weight = layer.base_layer.weight if name == "gpt2" else layer.base_layer.weight.T
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.data.normal_()
    with torch.no_grad():
        written = written_along(layer, torch.stack([output, -2 * output]), torch.float32)
    along = (weight @ output).detach()
    torch.testing.assert_close(written, torch.stack([along, -2 * along]), rtol=1e-4, atol=1e-5)


def test_a_booster_moves_along_all_directions_of_its_round() -> None:
    """The pair adds sum_r f_r u_r to its layers' outputs, also where the learner has fewer directions than ranks."""
    adapters = attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj", "down_proj"], xgblora=True)
    adapters.resize_pair(4)
    with torch.no_grad():
        forwards = forwards_of(adapters)
        (seen,) = forwards.observe(examples(60, OPTIONS["several"]))
        learner = fit(seen, TailLoss(forwards, seen), 1.0, directions=4, least=MINOR)
        assert len(learner.outputs) == 2
        put(adapters, learner, 0.5)
        change = torch.zeros_like(seen.hidden)
        fitted = iter(zip(seen.inputs, learner.inputs, strict=True))
        for name, layer in adapters.layers.items():
            assert layer.lora_A.shape[0] == 4
            assert not layer.lora_A[2:].any()
            assert not layer.lora_B[:, 2:].any()
            if "o_proj" in name:
                x, a = next(fitted)
                torch.testing.assert_close(layer.lora_A[:2], a)
                change += 16 * x @ layer.lora_A.T @ layer.lora_B.T
            else:
                along = learner.outputs @ layer.base_layer.weight
                torch.testing.assert_close(layer.lora_A[:2], -learner.share[:, None] * along, rtol=1e-3, atol=1e-5)
        expected = sum(x.float() @ a.T for x, a in zip(seen.inputs, learner.inputs, strict=True)) @ learner.outputs
        torch.testing.assert_close(change, 0.5 * expected, rtol=1e-3, atol=1e-5)


def test_a_round_of_directions_gets_there_in_fewer_boosters() -> None:
    """Three options need two directions: one booster of rank 2 comes nearer to the teacher than one of rank 1."""
    after = {}
    for rank in (1, 2):
        model = build(ARCHITECTURES["llama"])
        adapters = attach(model, 1, 16, residual_writers(Base(model)), xgblora=True)
        adapters.resize_pair(rank)
        forwards = forwards_of(adapters)
        rows, searched = examples(200, OPTIONS["several"]), examples(40, OPTIONS["several"], seed=2)
        teacher = teach(forwards, rows, searched)
        after[rank] = boost(forwards, rows, searched, teacher=teacher, ridge=0.03).after
    assert after[2] < 0.7 * after[1]


@pytest.mark.parametrize(
    ("flags", "options", "rank"),
    [
        ({}, OPTIONS["single"], 1),
        ({}, OPTIONS["several"], 2),
        ({}, [[word] for word in range(20, 31)], 8),
        ({"boost_directions": 3}, OPTIONS["single"], 3),
        ({"train_as_classification": False}, OPTIONS["several"], 16),
    ],
)
def test_a_booster_has_a_direction_for_every_option_but_one(
    flags: dict[str, Any], options: list[list[int]], rank: int, tmp_path: Path
) -> None:
    trainer, _ = train(tmp_path, rows=examples(64, options), **BOOST, **flags, boost_boosters=2)
    assert [booster.rank for booster in trainer.ledger.boosters] == [rank] * len(trainer.ledger.boosters)
    assert trainer.adapters.rank == rank
    assert trainer.adapters.scaling == 16


@pytest.mark.parametrize(
    ("fewer", "saved"), [({}, 1), ({"boost_teacher_examples": 20}, 1), ({"boost_examples": 40}, 0)]
)
def test_a_first_booster_is_fitted_to_what_the_teacher_saw(fewer: dict[str, Any], saved: int, tmp_path: Path) -> None:
    """Where it is the same rows, they are not forwarded twice."""
    trainer, _ = train(tmp_path, rows=examples(64), **BOOST, **fewer, boost_boosters=1)
    recipe = recipe_of(trainer)
    teacher, searched = recipe.teacher, len(recipe.searched)
    assert teacher is not None
    observed = 0 if saved else min(len(recipe.fitted), recipe.config.boost_fitted)
    searches = trainer.cost.sequences - teacher.cost.sequences - observed
    assert searches % searched == 0
    assert trainer.cost.passes == 1 + (not saved) + searches // searched


def test_a_pair_that_has_learned_something_is_not_thrown_away(tmp_path: Path, randomise: Callable[..., None]) -> None:
    model = build(ARCHITECTURES["opt"])
    adapters = attach(model, 4, 16, ["out_proj"])
    config = RunConfig(output_dir=str(tmp_path), use_cpu=True, recipe="boost")
    recipe = BoostRecipe(adapters, OptionLoss(), config, Prefix(model, 0))
    recipe.split(examples(20))
    assert adapters.rank == 1
    adapters.resize_pair(4)
    randomise(adapters)
    with pytest.raises(XgbloraError, match="of rank 4, has learned something: merge it first"):
        recipe.split(examples(20))


def test_mlp_layers_alone_are_fitted() -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), 1, 16, ["down_proj"], xgblora=True)
    assert turned_down(adapters) == [False, False]
    booster = boost(forwards_of(adapters), examples(60), examples(20, seed=9))
    assert booster.after < booster.before


def test_a_larger_ridge_gives_a_shorter_learner() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
    with torch.no_grad():
        forwards = forwards_of(adapters)
        (seen,) = forwards.observe(examples(40))
        loss = TailLoss(forwards, seen)
        sizes = [fit(seen, loss, ridge).change.norm() for ridge in (0.1, 1.0, 10.0)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"mistral"}))  # whose window the first token leaves
def test_boosters_learn_what_the_first_token_tells(name: str) -> None:
    model = build(ARCHITECTURES[name])
    adapters = attach(model, 1, 16, residual_writers(Base(model)), xgblora=True)
    forwards, held_out = forwards_of(adapters), examples(100, seed=2)
    before = evaluate(model, held_out)
    for number in range(6):
        booster = boost(forwards, examples(260, seed=10 + number), examples(100, seed=20))
        assert booster.after <= booster.before
        adapters.freeze_pair()
        adapters.new_pair(number + 1)
    after = evaluate(model, held_out)
    assert after.loss < 0.6 * before.loss
    assert after.accuracy > 0.8


def test_three_options_take_boosters_in_several_directions() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
    forwards, outputs = forwards_of(adapters), []
    held_out = examples(150, OPTIONS["several"], seed=2)
    before = evaluate(model, held_out)
    for number in range(8):
        searched = examples(100, OPTIONS["several"], seed=20)
        boost(forwards, examples(260, OPTIONS["several"], seed=10 + number), searched)
        outputs.append(torch.nn.functional.normalize(adapters.slices[0][0].lora_B[:, 0].detach(), dim=0))
        adapters.freeze_pair()
        adapters.new_pair(number + 1)
    after = evaluate(model, held_out)
    assert after.accuracy > max(0.6, before.accuracy + 0.2)
    assert torch.linalg.matrix_rank(torch.stack(outputs), rtol=0.05) >= 2


def test_no_gradient_passes_through_a_decoder_layer() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
    modes: set[bool] = set()
    for layer in adapters.base.layers.values():
        layer.register_forward_pre_hook(lambda *_: modes.add(torch.is_grad_enabled()))
    boost(forwards_of(adapters), examples(35), examples(5, seed=9))
    assert modes == {False}
    assert all(parameter.grad is None for parameter in adapters.parameters())


def test_what_was_forwarded_is_counted() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
    forwards, passes = forwards_of(adapters), []
    _ = adapters.base.packed, adapters.base.writers  # measured before it is counted
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    rows = [Example([20 + number % 2, 21, 22], [[5], [9]], number % 2) for number in range(40)]
    cost = boost(forwards, rows[:35], rows[35:]).cost
    evaluations = (cost.sequences - 35) // 5
    assert cost.sequences == 35 + 5 * evaluations
    assert cost.passes == len(passes) == 1 + evaluations
    assert cost.tokens == 3 * cost.sequences


def test_how_far_a_round_has_come_is_told() -> None:
    adapters = attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True)
    rows, searched = examples(300), examples(6, seed=1)
    forwards, told = forwards_of(adapters), list[str]()
    forwards.note = told.append
    boost(forwards, rows, searched, teacher=teach(forwards, rows, searched))
    assert {told[0], *(line for line in told if "of 306 examples" in line)} >= {
        "teacher: looking at 306 examples",
        "teacher: looked at 306 of 306 examples",
    }
    assert len([line for line in told if line.startswith("booster 1: looked at")]) > 1
    assert [line for line in told if "booster 1: fitting, Newton step 1, loss" in line]
    assert told[-1].startswith("booster 1: step length")
    assert told[-1].endswith(", 6 of 6 examples")


def test_a_fit_that_is_stopped_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgblora.learn.fitted.newton.MOST_STEPS", 1)
    monkeypatch.setattr("xgblora.learn.fitted.newton.ENOUGH", 0.0)
    forwards = forwards_of(attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True))
    with torch.no_grad():
        (seen,) = forwards.observe(examples(60))
        loss = TailLoss(forwards, seen)
        learner = fit(seen, loss, 1.0)
        assert loss(seen.hidden + learner.change @ learner.outputs).mean() < 0.9 * loss(seen.hidden).mean()


def test_examples_that_all_look_alike_teach_nothing() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True)
    rows = [Example([20, 21, 22], [[5], [9]], number % 2) for number in range(40)]
    booster = boost(forwards_of(adapters), rows[:35], rows[35:])
    assert booster.step_length == 0
    assert booster.after == booster.before
    assert not any(layer.lora_B.any() for layer in adapters.layers.values())


def test_scaling_is_undone_and_shrinkage_is_not() -> None:
    updates = []
    for alpha, shrinkage in ((16, 1.0), (1, 1.0), (16, 0.5)):
        model = build(ARCHITECTURES["llama"])
        adapters = attach(model, 1, alpha, ["o_proj"], xgblora=True)
        boost(forwards_of(adapters), examples(50), examples(10, seed=9), shrinkage=shrinkage)
        layer = adapters.slices[0][0]
        updates.append(layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach())
    torch.testing.assert_close(updates[0], updates[1])
    torch.testing.assert_close(updates[0], 2 * updates[2])


def test_layers_that_do_not_train_stay_zero() -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, ["o_proj"], xgblora=True, layers=LayerSubset(1, "top"))
    boost(forwards_of(adapters), examples(50), examples(10, seed=9))
    first, second = adapters.layers.values()
    assert not first.lora_B.any()
    assert second.lora_B.any()


def test_kept_activations_change_nothing_but_rounding() -> None:
    losses = []
    for cache_bytes in (0, 10**8):
        model = build(ARCHITECTURES["llama"])
        adapters = attach(model, 1, 16, ["o_proj"], xgblora=True, layers=LayerSubset(1, "top"))
        prefix = Prefix(model, cache_bytes)
        rows = examples(50), examples(10, seed=9)
        losses.append([boost(forwards_of(adapters, prefix), *rows).after for _ in range(2)])
        assert bool(prefix.used_bytes) == bool(cache_bytes)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("best", "start", "within"), [(1.0, 1.0, 0.01), (3.0, 1.0, 0.2), (0.3, 1.0, 0.1), (20.0, 1.0, 6.0)]
)
def test_the_line_search_finds_the_lowest_step(best: float, start: float, within: float) -> None:
    def loss_at(step: float) -> float:
        return math.log(step / best) ** 2 if step else 100.0

    assert line_search(loss_at, start) == pytest.approx(best, abs=within)


def test_the_line_search_takes_no_step_uphill() -> None:
    calls: list[float] = []

    def loss_at(step: float) -> float:
        calls.append(step)
        return step

    assert line_search(loss_at, 1.0) == 0.0
    assert len(calls) <= 9


def test_a_shorter_step_is_taken_where_the_longer_one_is_better_by_chance() -> None:
    """Paired over examples: steps 1 and 2 differ from 3 by 0.01 with spreads of 0.2 and of 0.001."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=draw, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    best = torch.rand(100, generator=draw, dtype=torch.float64)
    losses = {0.0: best + 0.001 * noise, 1.0: best + 0.01 + 0.001 * noise, 2.0: best + 0.01 + 0.2 * noise, 3.0: best}
    assert shortest_as_good(losses, 3.0) == 2.0
    assert shortest_as_good(losses, 1.0) == 1.0
    assert shortest_as_good(losses | {4.0: best}, 3.0) == 2.0
    assert shortest_as_good(losses, 0.0) == 0.0


@pytest.mark.parametrize(
    ("targets", "count", "says"),
    [
        (["v_proj"], 40, "residual stream"),
        (["o_proj"], 1, "at least 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused(targets: list[str], count: int, says: str) -> None:
    model = build(ARCHITECTURES["llama"])
    adapters = attach(model, 1, 16, targets)
    with pytest.raises(XgbloraError, match=says):
        boost(forwards_of(adapters), examples(count), examples(5))


def test_a_run_is_one_booster_a_step(tmp_path: Path, log_lines: LogLines) -> None:
    trainer, losses = train(tmp_path, **BOOST, boost_boosters=3, boost_examples=48, early_stopping_boosters=0)
    assert len(losses) == trainer.state.global_step == 3
    assert [booster.step for booster in trainer.ledger.boosters] == [1, 2]
    assert trainer.adapters.slices[0][0].lora_B.any()  # the third, which no merge follows
    assert losses[2] < losses[0]


def test_no_booster_is_fitted_on_rows_that_find_step_lengths(tmp_path: Path) -> None:
    """48 examples a booster, 6 of them for the search: the same 6 for all boosters, and never in a batch."""
    rows = examples(64)
    trainer, _ = train(tmp_path, rows=rows, **BOOST, boost_boosters=3, boost_examples=48)
    held, fitted = {id(row) for row in recipe_of(trainer).searched}, {id(row) for row in trainer.train_dataset}
    assert len(held) == 6
    assert held.isdisjoint(fitted)
    assert held | fitted == {id(row) for row in rows}
    batches = [Batch(**batch).examples for batch in trainer.get_train_dataloader()]
    assert [len(batch) for batch in batches] == [42, 16]
    assert {id(row) for batch in batches for row in batch} == fitted


def _start(folder: Path) -> dict[str, Any]:
    """The flag of a run that goes on from two boosters of an earlier one."""
    first, _ = train(folder / "first", **BOOST, boost_boosters=2)
    first.ledger.save(folder / "adapter")
    return {"start": folder / "adapter"}


@pytest.mark.parametrize("started", [False, True])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, started: bool) -> None:
    """Its teacher is fitted again: to the model before the run's first booster, be that a bare one or not."""
    flags = BOOST | {"boost_boosters": 4, "boost_examples": 48}
    flags |= {"save_strategy": "steps", "save_total_limit": 9}
    flags |= _start(tmp_path) if started else {}
    whole, losses = train(tmp_path / "whole", **flags)
    resumed, again = train(tmp_path / "resumed", **flags, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert again == losses
    assert resumed.method.step_length == whole.method.step_length
    assert resumed.cost == whole.cost
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        assert torch.equal(mine.lora_A, theirs.lora_A)
        assert torch.equal(mine.lora_B, theirs.lora_B)
        assert torch.equal(mine.booster_B, theirs.booster_B)


@pytest.mark.parametrize("started", [False, True])
def test_a_run_follows_one_teacher_and_counts_it_once(tmp_path: Path, log_lines: LogLines, started: bool) -> None:
    flags = BOOST | (_start(tmp_path) if started else {})
    log_lines.lines.clear()
    trainer, _ = train(tmp_path, **flags, boost_boosters=2, boost_teacher_examples=40)
    assert len(trainer.train_dataset) == 40
    teacher = recipe_of(trainer).teacher
    assert teacher is not None
    assert teacher.cost.sequences == 40 + len(recipe_of(trainer).searched) == 48
    assert all(teacher.knows(row) for row in [*trainer.train_dataset, *recipe_of(trainer).searched])
    (line,) = log_lines.containing("Teacher of 48 examples, along 1 direction(s), ridge 1; held-out loss")
    assert "added to the base's opinion, " in line
    assert line.endswith("in place of the base's opinion")
    searches = (trainer.cost.sequences - 48 - 40) / 8  # the first booster is fitted to what the teacher saw
    assert searches == trainer.cost.passes - 2
    assert teacher.seen is None


def test_the_flags_of_a_teacher_reach_it(tmp_path: Path) -> None:
    """As many directions as boosters can follow, the ridge, and the opinion."""
    rows, answers = examples(64, OPTIONS["several"]), []
    for number, (boosters, ridge, opinion) in enumerate(((1, 1.0, "auto"), (3, 1.0, "keep"), (3, 9.0, "keep"))):
        flags = BOOST | {"boost_boosters": boosters, "boost_ridge": ridge, "boost_opinion": opinion}
        flags["boost_directions"] = 1
        trainer, _ = train(tmp_path / str(number), rows=rows, **flags)
        teacher = recipe_of(trainer).teacher
        assert teacher is not None
        assert teacher.directions == min(boosters, 2)
        assert set(teacher.losses) == ({True, False} if opinion == "auto" else {True})
        answers.append(teacher.targets(rows))
    assert not torch.allclose(answers[1], answers[2], atol=1e-3)


def test_boosters_follow_with_a_ridge_of_their_own(tmp_path: Path) -> None:
    sizes = []
    for follow in (0.01, 100.0):
        trainer, _ = train(tmp_path / str(follow), **BOOST, boost_boosters=1, boost_follow_ridge=follow)
        sizes.append(trainer.adapters.slices[0][0].lora_A.norm().item())
    assert sizes[0] > 2 * sizes[1]


def test_a_language_model_loss_has_no_teacher(tmp_path: Path) -> None:
    trainer, losses = train(tmp_path, **BOOST, boost_boosters=3, train_as_classification=False)
    assert recipe_of(trainer).teacher is None
    assert losses[2] < losses[0]


def test_saved_boosters_predict_alike(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, **BOOST, boost_boosters=2)
    trainer.ledger.save(tmp_path / "adapter")
    rows = examples(20, seed=3)
    expected = evaluate(trainer.model, rows)
    fresh = build(ARCHITECTURES["opt"])
    load_adapters(fresh, tmp_path / "adapter")
    assert evaluate(fresh, rows).loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lora": True}, "leave out --lora"),
        ({"trainer": "regular"}, "--trainer regular"),
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps"),
        ({"torch_compile": True}, "--torch_compile"),
        ({"xgblora_use_adaptive_merge": True}, "--xgblora_use_adaptive_merge"),
        ({"boost_boosters": 0}, "--boost_boosters"),
        ({"boost_examples": 2}, "--boost_examples"),
        ({"boost_search_share": 0.6}, "--boost_search_share"),
        ({"boost_ridge": 0.0}, "--boost_ridge"),
        ({"boost_follow_ridge": -1.0}, "--boost_follow_ridge"),
        ({"boost_teacher_examples": 2}, "--boost_teacher_examples"),
        ({"boost_opinion": "mine"}, "--boost_opinion"),
        ({"xgblora_shrinkage": 1.5}, "--xgblora_shrinkage"),
        ({"recipe": "best"}, "--recipe"),
        ({"max_steps": 5}, "--max_steps counts steps: one step of --recipe boost is a booster"),
        ({"per_device_train_batch_size": 8}, "--per_device_train_batch_size is for training steps: --boost_examples"),
        ({"save_steps": 500}, "--save_steps counts steps"),
        ({"logging_steps": 10}, "--logging_steps counts steps"),
        ({"xgblora_steps_per_iteration": 9}, "--xgblora_steps_per_iteration counts steps"),
        ({"num_train": 1}, "--recipe boost fits boosters on at least 2 examples"),
        ({"num_train": 2}, "--recipe boost fits boosters on at least 2 examples"),
    ],
)
def test_flags_that_cannot_go_together_are_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(XgbloraError, match=says):
        RunConfig(**{"recipe": "boost", "use_cpu": True} | flags)


def test_what_says_the_same_as_the_recipe_is_taken() -> None:
    """A configuration made from the settings of another one has what follows from its recipe among them."""
    config = RunConfig(recipe="boost", use_cpu=True, boost_boosters=3, eval_steps=7)
    again = RunConfig(recipe="boost", use_cpu=True, boost_boosters=3, max_steps=3, logging_steps=1, save_steps=1)
    assert (config.max_steps, config.logging_steps, config.save_steps) == (3, 1, 1)
    assert again.per_device_train_batch_size == config.per_device_train_batch_size == 896
    assert notes(config) == ["--eval_steps has no effect with --recipe boost: every booster is evaluated"]


@pytest.mark.parametrize("choice", ["random", "top"])
def test_a_resumed_teacher_is_fitted_to_the_first_boosters_layers(choice: Any, tmp_path: Path) -> None:
    """Of eight layers two train, others for every booster: a resumed run must not teach by those of the next one."""
    config = ARCHITECTURES["opt"].__class__(**ARCHITECTURES["opt"].to_dict() | {"num_hidden_layers": 8})
    flags = BOOST | {"boost_boosters": 4, "boost_examples": 48, "layers": LayerSubset(2, choice), "seed": 3}
    flags |= {"save_strategy": "steps", "save_total_limit": 9}
    whole, losses = train(tmp_path / "whole", build(config), **flags)
    resumed, again = train(
        tmp_path / "resumed", build(config), **flags, resume=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert again == losses
    assert resumed.cost == whole.cost
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        for a, b in zip(mine.pairs(), theirs.pairs(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mistral", "gemma"])
def test_the_last_writers_do_what_was_fitted_however_far_it_goes(name: str) -> None:
    """Nothing comes behind them, so final hidden states move as the fit said, by steps of any length."""
    base = Base(build(ARCHITECTURES[name]))
    targets = last_writers(base)
    assert [base.writers[target].layer for target in targets] == [list(base.layers)[-1]]
    adapters = attach(base, 1, 16, targets, xgblora=True, layers=LayerSubset(1, "top"))
    adapters.resize_pair(4)
    forwards = Forwards(adapters, TextLoss())
    rows, others = examples(30, [[5, 7], [9, 4]]), examples(10, [[5, 7], [9, 4]], seed=3)
    with torch.no_grad():
        seen, unseen = forwards.observe(rows, others)
        learner = fit(seen, TailLoss(forwards, seen), 1.0, directions=4)
        for step in (0.5, 8.0):
            put(adapters, learner, step)
            (moved,) = forwards.observe(others)
            places = [moved.examples.index(example) for example in unseen.examples]
            assert places == list(range(len(others)))
            expected = step * learner.at(unseen) @ learner.outputs
            torch.testing.assert_close(moved.hidden - unseen.hidden, expected, rtol=1e-3, atol=1e-3 * step)


def test_without_decoder_layers_there_are_no_last_writers() -> None:
    model = AutoModelForCausalLM.from_config(CTRLConfig(vocab_size=300, n_embd=32, dff=64, n_layer=2, n_head=4))
    with pytest.raises(XgbloraError, match="--recipe boost finds no layer of CTRLLMHeadModel"):
        last_writers(model.eval())


def test_text_is_written_at_the_end_and_options_in_the_upper_half(tmp_path: Path, model_folder: Path) -> None:
    def adapted(classification: bool) -> list[str]:
        flags = {"recipe": "boost", "train_as_classification": classification, "use_cpu": True}
        config = RunConfig(output_dir=str(tmp_path), model_name=str(model_folder), **flags)
        adapters = attach_for(config, Base(build(ARCHITECTURES["llama"])), classification)
        names = list(adapters.layers)
        adapters.detach()
        return names

    assert adapted(classification=False) == ["model.layers.1.mlp.down_proj"]
    assert len(adapted(classification=True)) == 4  # o_proj and down_proj, of which those of the upper half train
