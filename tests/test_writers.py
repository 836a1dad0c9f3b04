"""How what a layer writes reaches the residual stream: measured, whatever the blocks do with it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, OPTConfig, PreTrainedModel

from architectures import follow, tiny, uneven
from conftest import ARCHITECTURES, LogLines, build, examples
from xgblora import Base, OptionLoss, RunConfig, XgbloraError, attach, residual_writers
from xgblora.base.observation import rows_read
from xgblora.base.prefix import Prefix
from xgblora.base.replay import Replay
from xgblora.base.writers import FAINT
from xgblora.learn.fitted.boost import BoostRecipe

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def granite() -> PreTrainedModel:
    """What layers write is multiplied."""
    return build(GraniteConfig(**SIZES, intermediate_size=64, residual_multiplier=0.3, num_key_value_heads=2))


def norms_behind_sums() -> PreTrainedModel:
    """As facebook/opt-350m."""
    sizes = {"ffn_dim": 64, "max_position_embeddings": 64, "do_layer_norm_before": False}
    return build(OPTConfig(**SIZES, **sizes))


BLOCKS: dict[str, Callable[[], PreTrainedModel]] = {
    "norms behind writers": lambda: tiny("gemma3_text"),
    "the same without norms in front": lambda: tiny("olmo2"),
    "norms behind sums": norms_behind_sums,
    "norms behind sums, in a decoder of two": lambda: tiny("bart"),
    "residual multipliers": granite,
    "parallel, unknown names": lambda: tiny("phi"),
    "written where attention is, sums in place": lambda: tiny("falcon"),
    "residual sums inside attention": lambda: tiny("bloom"),
    "learned residual weights": lambda: tiny("doge"),
}
"""What architectures do with what their layers write."""

STATE_SPACE: dict[str, Callable[[], PreTrainedModel]] = {"a state space": lambda: tiny("jamba")}
GATED: dict[str, Callable[[], PreTrainedModel]] = {"a shared expert, gated": lambda: tiny("qwen3_5_moe_text")}


@pytest.mark.parametrize("blocks", [*BLOCKS, *GATED])
@torch.no_grad()
def test_what_a_writer_of_the_last_layer_gives_arrives_as_measured(blocks: str) -> None:
    """There no other layer reads it on its way: all of the model's movement is the writer's."""
    base = Base(uneven((BLOCKS | GATED)[blocks]()))
    last = list(base.layers)[-1]
    ((name, writer),) = [(n, w) for n, w in base.writers.items() if w.layer == last and not w.mixes]
    assert share_that_arrives(base, name) > (0.999 if writer.explained > 0.999 else 0.75)


@torch.no_grad()
def test_what_passes_norms_of_layers_above_arrives_as_measured() -> None:
    model = uneven(norms_behind_sums())
    base = Base(model)
    lower, upper = base.layers.values()
    for silent in (upper.self_attn.out_proj, upper.fc2):  # its norms are all that it does
        silent.weight.zero_()
        silent.bias.zero_()
    upper.final_layer_norm.weight.mul_(torch.linspace(0.1, 10, 32))
    (name,) = [name for name, module in model.named_modules() if module is lower.fc2]
    assert share_that_arrives(base, name) > 0.7


def share_that_arrives(base: Base, name: str) -> float:
    """Of how far a small booster on a writer moves the last layer's output, the share that was predicted.

    The rest is what norms of 32 units take out of a change.
    """
    writer = base.writers[name]
    adapters = attach(base, 1, 16, re.escape(name), xgblora=True)
    (layer,) = adapters.layers.values()
    layer.lora_A.normal_(generator=torch.Generator().manual_seed(2))
    direction = torch.randn(base.width, generator=torch.Generator().manual_seed(3))
    batch = base.batch(examples(24))
    (before,) = base.observe([batch], [layer])
    layer.lora_B.copy_(1e-4 * writer.inverse(direction)[:, None])
    (after,) = base.observe([batch], [])
    moved = (after.last - before.last) / 1e-4 / layer.scaling
    expected = (before.inputs[0] @ layer.lora_A.T) * writer.adjoint(writer.inverse(direction))
    return (1 - (moved - expected).square().sum() / moved.square().sum()).item()


@torch.no_grad()
def test_what_is_written_is_what_the_norm_behind_it_lets_through() -> None:
    base = Base(uneven(tiny("gemma3_text")))
    layer = list(base.layers.values())[-1]
    batch = base.batch(examples(12))
    assert base.writers  # measured before
    passed: list[Tensor] = []
    hook = layer.post_feedforward_layernorm.register_forward_hook(lambda *call: passed.append(call[-1]))
    (seen,) = base.observe([batch], [], {layer.mlp.down_proj: torch.zeros(32)})
    hook.remove()
    expected = rows_read(passed[0], batch)
    assert seen.written is not None
    assert (seen.written - expected).square().sum() < 0.03 * expected.square().sum()


@torch.no_grad()
def test_behind_a_norm_the_gain_is_its_weight_and_the_strength_is_one_over_what_it_divides_by() -> None:
    base = Base(uneven(tiny("gemma3_text")))
    layer = list(base.layers.values())[-1]
    norm, writer = layer.post_attention_layernorm, base.writers["model.layers.1.self_attn.o_proj"]
    weight = 1 + norm.weight
    torch.testing.assert_close(writer.gain / writer.gain.norm(), weight / weight.norm(), atol=0.02, rtol=0)
    batch = base.batch(examples(12))
    seen: list[Tensor] = []

    def keep(replay: Replay) -> None:
        place = replay.weights["self_attn.o_proj"]
        given = replay.given(place)
        assert given is not None
        assert writer.gain is not None
        seen.extend((given.square().mean(1).sqrt(), replay.strength(place, writer.gain)))

    with Replay(layer, keep):
        next(base.hidden([batch]))
    rms, strength = seen
    relative = strength * rms
    assert (relative / relative.mean() - 1).abs().max() < 0.25  # of 32 units, the norm takes one out
    assert strength.max() > 1.5 * strength.min()


@torch.no_grad()
def test_a_layer_computed_again_is_the_layer(architecture: object) -> None:
    base = Base(build(architecture))  # type: ignore[arg-type]
    batch = base.batch(examples(6))
    outputs: list[tuple[Tensor, Tensor]] = []

    def again(replay: Replay) -> None:
        outputs.append((replay.output, replay.with_change(replay.layer, torch.zeros_like(replay.entered))))

    with Replay(next(iter(base.layers.values())), again):
        next(base.hidden([batch]))
    ((output, repeated),) = outputs
    torch.testing.assert_close(repeated, output)


def test_hooks_of_others_see_one_forward() -> None:
    base = Base(tiny("gemma3_text"))
    calls: list[str] = []
    for name, module in base.model.named_modules():
        if name.endswith("proj"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert base.packed
    calls.clear()
    assert len(base.writers) == 4
    mixing = [name for name in set(calls) if calls.count(name) > 1 and not name.endswith(("o_proj", "down_proj"))]
    # The first layer of its kind is run again to see what mixes positions.
    assert {name.split(".")[2] for name in mixing} <= {"0"}
    assert all(calls.count(name) == 1 for name in calls if name.endswith(("o_proj", "down_proj")))


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        ("phi", ["dense"], ["fc2"]),
        ("gpt2", ["attn.c_proj"], ["mlp.c_proj"]),
        ("gptj", ["out_proj"], ["fc_out"]),
        ("recurrent_gemma", ["linear_out"], ["down_proj"]),
        ("whisper", ["self_attn.out_proj"], ["fc2"]),
        ("gpt_oss", ["o_proj"], []),
    ],
)
def test_writers_are_found_whatever_they_are_called(kind: str, attention: list[str], mlp: list[str]) -> None:
    base = Base(tiny(kind))
    assert residual_writers(base) == attention + mlp
    for name, writer in base.writers.items():
        assert writer.mixes == any(name.endswith(end) for end in attention)


@pytest.mark.parametrize(("kind", "says"), [("jetmoe", "finds no layer"), ("mamba2", "plain PEFT takes no adapters")])
def test_a_model_without_writers_that_can_be_adapted_is_refused(kind: str, says: str) -> None:
    with pytest.raises(XgbloraError, match=f"--recipe boost .*{says}"):
        residual_writers(Base(tiny(kind)))


FOLLOWED = [
    "written where attention is, sums in place",
    "residual sums inside attention",
    "learned residual weights",
    "norms behind writers",
]
"""In these; in the others boosters take longer to follow, and how each passes changes on is measured above."""


@pytest.mark.parametrize(
    "blocks",
    [pytest.param(blocks, marks=() if blocks in FOLLOWED else pytest.mark.soak) for blocks in (*BLOCKS, *STATE_SPACE)],
)
def test_boosters_follow_their_teacher_through_any_block(blocks: str) -> None:
    teacher, left = follow(uneven((BLOCKS | STATE_SPACE)[blocks]()))
    assert teacher < 0.1
    assert left < 0.05


def test_units_that_hardly_pass_are_spared() -> None:
    base = Base(tiny("gemma3_text"))
    writer = next(iter(base.writers.values()))
    gain = torch.ones(32)
    gain[0], gain[1] = 1e-4, -2.0
    writer = replace(writer, out=replace(writer.out, gain=gain), up={})
    given = writer.inverse(torch.ones(32))
    assert given[0] < 1e-4 / FAINT**2
    assert abs(given[1] + 0.5) < 0.01
    arrived = writer.adjoint(given)
    torch.testing.assert_close(arrived[1:], torch.ones(31), atol=0.02, rtol=0)


def test_a_first_booster_that_comes_no_nearer_to_its_teacher_is_an_error(tmp_path: Path) -> None:
    """It used to end at zero-shot, as if nothing could be learned."""
    base = Base(build(ARCHITECTURES["llama"]))
    for name, writer in base.writers.items():  # what is written arrives the other way round
        base.writers[name] = replace(writer, out=replace(writer.out, gain=-torch.ones(base.width)))
    adapters = attach(base, 1, 16, ["o_proj"], xgblora=True)
    config = RunConfig(output_dir=str(tmp_path), recipe="boost", lora_target_modules=["o_proj"])
    recipe = BoostRecipe(adapters, OptionLoss(), config, Prefix(adapters.model, 10**9))
    rows = recipe.split(examples(300))
    with pytest.raises(XgbloraError, match="no step of the first booster comes nearer to its teacher"), torch.no_grad():
        recipe.fit(rows, 1.0)


def test_layers_that_cannot_be_computed_again_are_refused_in_a_line(log_lines: LogLines) -> None:
    model = build(ARCHITECTURES["llama"])
    base = Base(model)
    assert base.packed
    for layer in base.layers.values():
        calls = iter([None])  # one, and then an error
        layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: next(calls))
    with pytest.raises(XgbloraError, match="finds no layer of LlamaForCausalLM"):
        residual_writers(base)
    assert log_lines.containing("LlamaDecoderLayer cannot be computed again: ")


def test_an_output_that_turns_into_another_direction_is_no_writers() -> None:
    """A change that arrives elsewhere has no gain; nothing follows it."""
    base = Base(build(ARCHITECTURES["llama"]))
    for layer in base.layers.values():
        layer.self_attn.register_forward_hook(lambda _, __, output: (output[0].roll(1, -1), *output[1:]))
    assert {name.rpartition(".")[2] for name in base.writers} == {"down_proj"}
