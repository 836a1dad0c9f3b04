"""Preflight: what a configuration really means, without training.

Attaches the adapters to the model, reads rank, alpha and scaling back from them, and says whether LoRA and XGBLoRA are
comparable. Before the model is loaded, it predicts the memory.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from xgblora.adapters.adapters import Adapters
from xgblora.base import Base
from xgblora.base.load import load_configured, load_model_config, tiny_model
from xgblora.config import EMBEDDED_MODEL, RunConfig, flag, probed
from xgblora.learn.rewards import load_reward
from xgblora.learn.schedule import resolve
from xgblora.randomness import Stream, generator
from xgblora.runs.arms import arm, idle_notes
from xgblora.runs.folder import classifies, task_of
from xgblora.runs.memory import free, predict, predict_seconds, predictable, training_rows
from xgblora.runs.run import attach_for
from xgblora.runs.workspace import hide_bars

logger = logging.getLogger(__name__)

TINY = "tiny"
"""As a model's name: one that is built on the spot."""


@dataclass
class CheckConfig(RunConfig):
    """The flags of ``check``: those of a run, with ``--mode`` and shorter names for rank and alpha."""

    mode: Literal["both", "lora", "xgblora"] | None = flag(
        None, "Which method to show: by default the one that --lora, --xgblora or --recipe names, else both."
    )
    lora_r: int | None = flag(
        None,
        "Rank of LoRA (1, or 8 with --lora); XGBLoRA's is always 1.",
        aliases=("--rank", "--lora_rank", "--lora-rank"),
    )
    lora_alpha: float = flag(16, "alpha; scaling = alpha / rank.", aliases=("--alpha",))
    model_name: str = flag(EMBEDDED_MODEL, "Model to attach to; tiny: one that is made on the spot, in milliseconds.")

    def __post_init__(self) -> None:
        if self.lora_r is None and not self.lora:
            self.lora_r = 1
        super().__post_init__()

    @property
    def methods(self) -> list[str]:
        """The methods to show, as arms of a comparison are called."""
        xgblora = "boost" if self.recipe == "boost" else "xgblora"
        shown = {"both": ["lora", xgblora], "lora": ["lora"], "xgblora": [xgblora]}
        return shown[self.mode or ("xgblora" if self.xgblora else "lora" if self.lora else "both")]


def check(config: CheckConfig) -> bool:
    """Log the report.

    Returns:
        False where the two methods are not comparable, eps is lost in the adapters' precision, or memory is short.

    Raises:
        XgbloraError: The model cannot be had, or cannot be trained with these flags.
    """
    hide_bars(config)
    if config.reward:
        load_reward(config.reward)
    if config.trainer == "none":
        logger.info("Nothing is trained with --trainer none: rank, alpha and memory of a training do not matter")
        logger.info("Check passed")
        return True
    arms = {method: arm(config, method) for method in config.methods}
    if config.model_name != TINY and not _fits(config, next(reversed(arms.values()))):
        logger.info("Check failed")
        return False
    if config.model_name != TINY:
        model, _ = load_configured(config)
        base = Base(model)
    else:
        base = Base(tiny_model(max(2, config.xgblora_layers)))
    for note in idle_notes(config, list(arms.values())):
        logger.info("Note: %s", note)
    sound = True
    for configured in arms.values():
        adapters = attach_for(configured, base, classifies(configured, task_of(configured)))
        logger.info("  rank (r): %d", adapters.rank)
        logger.info("  alpha: %g", adapters.scaling * adapters.rank)
        logger.info("  scaling (alpha/r): %s", adapters.scaling)
        logger.info("  adapted layers: %d, trainable parameters: %s", len(adapters.layers), f"{adapters.size:,}")
        lost = eps_lost(adapters, config.zo_eps) if probed(configured) else 0.0
        if lost > 0.5:
            logger.error("FAILED: --zo_eps %g is lost in float32 for %.0f %% of A: raise it", config.zo_eps, 100 * lost)
            sound = False
        adapters.detach()
    if set(arms) == {"lora", "xgblora"}:  # the step length of a fit undoes the scaling
        sound = _comparable(arms["lora"], arms["xgblora"]) and sound
    logger.info("Check %s", "passed" if sound else "failed")
    return sound


def _fits(config: CheckConfig, configured: RunConfig) -> bool:
    """Log the memory of a training and whether it is there. True where it cannot be predicted, with the reason."""
    if not predictable(configured):
        logger.info("Memory: predicted for --trainer zo and regular from random pairs, without --reward")
        return True
    model = load_model_config(config.model_name, config.trust_remote_code)
    rows = training_rows(config, model)
    needed, there = predict(configured, model, rows), free(configured.device)
    longest = sorted(row.tokens for row in rows)[-configured.per_device_train_batch_size :]
    logger.info(
        "Memory, predicted: %.2f GB (Python and libraries %.2f, base %.2f, training %.2f: %d rows of up to %d tokens); "
        "%.1f GB are free",
        *(size / 1e9 for size in (needed.total, needed.process, needed.stays, needed.training)),
        *(len(longest), longest[-1], there / 1e9),
    )
    taken = needed.stays + needed.training
    if needed.budget is not None and needed.process + needed.training > needed.budget:
        logger.error(
            "FAILED: with no weight in memory, a step takes %.2f GB, more than --memory_budget %s: raise it, or lower "
            "--per_device_train_batch_size or --max_length",
            *((needed.process + needed.training) / 1e9, configured.memory_budget),
        )
        return False
    if taken <= there:
        if configured.device.type == "cpu" and configured.bits is None:
            seconds = predict_seconds(configured, model, rows)
            read = f", and {needed.reads / 1e9:.2f} GB of weights are read again in each" if needed.budget else ""
            logger.info("Time, predicted: %.2f s a step%s", seconds, read)
        return True
    hint = "" if configured.unpack or configured.bits else ", --memory_budget"
    logger.error(
        "FAILED: %.1f GB are more than the %.1f GB that are free: a smaller --per_device_train_batch_size or "
        "--max_length, --dtype bfloat16%s, or a smaller model",
        *(taken / 1e9, there / 1e9, hint),
    )
    return False


def _comparable(lora: RunConfig, xgblora: RunConfig) -> bool:
    """Log whether a comparison of the two is fair."""
    if xgblora.max_steps > 0 and xgblora.xgblora_steps_per_iteration > 0:
        merges = resolve(xgblora, xgblora.max_steps, 1).expected_merges or 0
        boosters = merges + 1
        same = "a fair" if boosters == lora.rank else "not a fair"
        logger.info(
            "Capacity: %d merges leave %d booster(s), LoRA has rank %d: %s comparison of capacity",
            *(merges, boosters, lora.rank, same),
        )
    if lora.scaling == xgblora.scaling:
        logger.info("Scaling: %s for both methods: a fair comparison of scaling", lora.scaling)
        return True
    logger.error(
        "FAILED: scaling (alpha/r) is %s for LoRA and %s for XGBLoRA, so they take steps of different size: "
        "use --lora_rank 1, or an alpha of %g for LoRA alone",
        *(lora.scaling, xgblora.scaling, xgblora.scaling * lora.rank),
    )
    return False


def eps_lost(adapters: Adapters, eps: float) -> float:
    """The share of A's entries that a step of eps along a Gaussian direction does not change in float32."""
    draw = generator(adapters.seed, Stream.DIRECTION, 0)
    unchanged = total = 0
    for layer in adapters.layers.values():
        A = layer.lora_A.detach().cpu()
        unchanged += int((A + eps * torch.randn(A.shape, generator=draw) == A).sum())
        total += A.numel()
    return unchanged / total
