"""What a configuration means in words: the block that every run logs, and notes on what a user may not expect."""

import logging
from typing import Any

from xgblora.config import precision
from xgblora.config.conditions import drawn, probed
from xgblora.config.flag import Needs
from xgblora.config.flags import FLAGS
from xgblora.config.precision import SHORTEST_PROBE

logger = logging.getLogger(__name__)

BETTER = (
    "Random pairs learn slowly by zeroth-order steps: 16,000 examples took film reviews from 51 to 75 %, where "
    "--xgblora_init activations came to 83 % (docs/experiments.md, section 24)."
)


def warn_rank(rank: int | None) -> None:
    """Warn that XGBLoRA was given another rank than its own."""
    logger.warning("XGBLoRA should use rank=1, but got r=%s. This may cause unexpected behavior!", rank)


def idle_flags(given: Any, settings: Any) -> dict[str, str]:
    """Flags given in one configuration that have no effect in another (mostly the same one), with what to say of it."""
    messages = {}
    for name, flag in FLAGS.items():
        idle = flag.idle(settings)
        if idle is not None and not isinstance(idle, Needs) and given.given(name):
            messages[name] = idle.message(name, settings)
    return messages


def notes(config: Any) -> list[str]:
    """Flags without effect and probes lost to rounding, a line each."""
    lines = []
    by_steps = config.xgblora and config.recipe == "classic" and config.xgblora_steps_per_iteration > 0
    if by_steps and config.given("xgblora_merge_frequency") and config.xgblora_merge_frequency > 0:
        lines.append("--xgblora_merge_frequency has no effect: --xgblora_steps_per_iteration decides when to merge")
    lines += idle_flags(config, config).values()
    if probed(config) and config.load_bfloat16 and config.zo_eps < SHORTEST_PROBE:
        lines.append(
            f"--zo_eps {config.zo_eps:g} is short for bfloat16: rounding may be larger than the difference of the two "
            "probes (measured: 2.7 times at 1e-3, 0.3 times at 1e-2); lengthen it or load the base in float32"
        )
    if config.load_bfloat16 and config.device.type == "cpu" and not precision.bfloat16_is_faster():
        lines.append("bfloat16 is slower than float32 on this processor: --dtype auto takes float32")
    if config.recipe == "boost" and config.asked["eval_steps"] not in (None, 1):
        lines.append("--eval_steps has no effect with --recipe boost: every booster is evaluated")
    return lines


def better(config: Any) -> str | None:
    """What would have done better than a training of this configuration, in a line; None where nothing is known."""
    return BETTER if probed(config) and config.objective == "likelihood" else None


def banner(config: Any) -> list[str]:
    """The configuration block that every run logs before it starts, line by line."""
    rule = "=" * 80
    lines = [f"  Alpha: {config.lora_alpha:g}", f"  Scaling (alpha/r): {config.scaling}"]
    if config.base_score and config.recipe == "classic":
        lines.append(f"  Base score: a constant, from {config.base_score} examples")
    if drawn(config):
        lines.append(f"  Init: pairs fitted to {config.xgblora_init_examples} examples, steps find how far they go")
    if config.method == "lora":
        return [rule, "Standard LoRA Configuration:", f"  Rank: {config.rank}", *lines, rule]
    classic = config.recipe == "classic"
    rank = f"Actual rank used: {config.rank} (forced to 1 for XGBLoRA)" if classic else f"Rank: {_rank(config)}"
    lines = ["XGBLoRA Configuration:", f"  {rank}", *lines]
    if classic:
        lines.append(f"  Steps per iteration: {config.xgblora_steps_per_iteration}")
        lines.append(f"  Merge frequency (epochs): {config.xgblora_merge_frequency}")
    else:
        lines += [
            "  Recipe: boost (pairs fitted to pseudo-residuals, forward passes only)",
            f"  Teacher: up to {config.boost_teacher_examples} examples   ridge: {_ridge(config)}   "
            f"the base's opinion: {config.boost_opinion}",
            f"  Boosters: {config.boost_boosters}, each fitted on up to {config.boost_fitted} examples   ridge: "
            f"{config.boost_follow_ridge:g}",
            f"  Share of examples for the step length: {config.boost_search_share:g}   shrinkage: "
            f"{config.xgblora_shrinkage:g}",
        ]
        if config.boost_keep not in (None, "none"):
            lines.append(f"  Text to change little: {config.boost_keep}   weight: {config.boost_keep_weight:g}")
    return [rule, *lines, rule]


def _ridge(config: Any) -> str:
    return "chosen on rows set aside" if config.boost_ridge is None else f"{config.boost_ridge:g}"


def _rank(config: Any) -> str:
    directions = config.boost_directions
    return "of a booster, one less than there are options" if directions is None else f"{directions} a booster"
