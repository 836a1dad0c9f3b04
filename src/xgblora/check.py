"""Preflight: what a configuration really means for both methods, without training.

Attaches the adapters to the model (a tiny one when none is named), reads rank, alpha and scaling back from them, and
says whether LoRA and XGBLoRA are comparable.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from xgblora.adapters import Adapters, attach
from xgblora.config import RunConfig, arm, banner, notes
from xgblora.models import load_model, tiny_model
from xgblora.randomness import generator
from xgblora.schedule import resolve

logger = logging.getLogger(__name__)


@dataclass
class CheckConfig(RunConfig):
    """The flags of ``check``: those of a run, with ``--mode`` and shorter names for rank and alpha."""

    mode: Literal["both", "lora", "xgblora"] = HfArg(default="both", help="Which method to show.")
    lora_r: int | None = HfArg(
        default=1, aliases=["--rank", "--lora_rank", "--lora-rank"], help="Rank of LoRA; XGBLoRA's is always 1."
    )
    lora_alpha: float = HfArg(default=16, aliases=["--alpha"], help="alpha; scaling = alpha / rank.")
    model_name: str = HfArg(default="", help="Model to attach to; a tiny one is built when none is given.")


def check(config: CheckConfig) -> bool:
    """Print the report; False where the two methods are not comparable or eps is lost in the adapters' dtype."""
    model = load_model(config.model_name, config.dtype)[0] if config.model_name else tiny_model()
    sound = True
    scalings = {}
    arms = {"lora": arm(config, "lora"), "xgblora": arm(config, "xgblora")}
    for method, each in arms.items():
        if config.mode not in ("both", method):
            continue
        for line in banner(each):
            logger.info(line)
        adapters = attach(model, each.rank, each.lora_alpha, each.lora_target_modules, each.seed, xgblora=each.xgblora)
        scalings[method] = adapters.scaling
        logger.info("  rank (r): %d", adapters.rank)
        logger.info("  alpha: %g", adapters.scaling * adapters.rank)
        logger.info("  scaling (alpha/r): %s", adapters.scaling)
        logger.info("  adapted layers: %d, trainable parameters: %s", len(adapters.layers), f"{adapters.size:,}")
        for note in notes(each):
            logger.info("  Note: %s", note)
        lost = eps_lost(adapters, config.zo_eps)
        if lost > 0.5:
            logger.error("FAILED: --zo_eps %g is lost in float32 for %.0f %% of A: raise it", config.zo_eps, 100 * lost)
            sound = False
        adapters.detach()
    if len(scalings) == 2:
        sound = _comparable(arms["lora"], arms["xgblora"], scalings) and sound
    logger.info("Check %s", "passed" if sound else "failed")
    return sound


def _comparable(lora: RunConfig, xgblora: RunConfig, scalings: dict[str, float]) -> bool:
    if xgblora.max_steps > 0 and xgblora.xgblora_steps_per_iteration > 0:
        merges = resolve(xgblora, xgblora.max_steps, 1).expected_merges or 0
        boosters = merges + 1
        same = "a fair" if boosters == lora.rank else "not a fair"
        logger.info(
            "Capacity: %d merges leave %d booster(s), LoRA has rank %d: %s comparison of capacity",
            *(merges, boosters, lora.rank, same),
        )
    if scalings["lora"] == scalings["xgblora"]:
        logger.info("Scaling: %s for both methods: a fair comparison of scaling", scalings["lora"])
        return True
    logger.error(
        "FAILED: scaling (alpha/r) is %s for LoRA and %s for XGBLoRA, so they take steps of different size: "
        "use --lora_rank 1, or an alpha of %g for LoRA alone",
        *(scalings["lora"], scalings["xgblora"], scalings["xgblora"] * lora.rank),
    )
    return False


def eps_lost(adapters: Adapters, eps: float) -> float:
    """The share of A's entries that a step of eps along a Gaussian direction does not change in float32."""
    draw = generator(adapters.seed, "direction", 0)
    unchanged = total = 0
    for layer in adapters.layers.values():
        A = layer.lora_A.detach().cpu()
        unchanged += int((A + eps * torch.randn(A.shape, generator=draw) == A).sum())
        total += A.numel()
    return unchanged / total
