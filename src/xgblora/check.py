"""Preflight: what a configuration really means for both methods, without training.

Attaches the adapters to the model (a tiny one when none is named), reads rank, alpha and scaling back from them, and
says whether LoRA and XGBLoRA are comparable. For a model that is named it predicts the memory, before it is loaded.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from xgblora.adapters import Adapters, attach
from xgblora.config import RunConfig, arm, banner, notes
from xgblora.errors import XgbloraError
from xgblora.memory import free, predict
from xgblora.models import context_length, load_model, load_model_config, load_tokenizer, tiny_model
from xgblora.packing import Example
from xgblora.randomness import generator
from xgblora.run import hide_bars, task_of
from xgblora.schedule import resolve
from xgblora.tasks import encode, load_splits, sample

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
    hide_bars(config)
    if config.model_name and not _fits(config):
        logger.info("Check failed")
        return False
    trusted = config.trust_remote_code
    model = load_model(config.model_name, config.dtype, trusted)[0] if config.model_name else tiny_model()
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


def _fits(config: CheckConfig) -> bool:
    """Log the memory of a training and whether it is there. True where it cannot be predicted, with the reason."""
    each = arm(config, "xgblora" if config.mode == "xgblora" else "lora")
    if config.trainer == "none" or config.recipe == "boost" or config.reward:
        logger.info("Memory: predicted for --trainer zo and regular, classic recipe, without --reward")
        return True
    model = load_model_config(config.model_name, config.trust_remote_code)
    length = min(config.max_length, context_length(model.get_text_config()) or config.max_length)
    try:
        task = task_of(config)
        num_dev = task.num_dev if config.num_dev is None else config.num_dev
        train = sample(
            load_splits(task, config.data_dir), config.train_rows, num_dev, config.num_eval, config.train_set_seed
        ).train
        rows = encode(task, train, load_tokenizer(config.model_name, config.trust_remote_code), length)
    except XgbloraError as error:
        logger.info("Note: %s; memory is predicted for rows of --max_length %d", error, length)
        rows = [Example([1] * (length - 1), [[1], [2]], 0)] * config.per_device_train_batch_size
    needed, there = predict(each, model, rows), free(each.device)
    longest = sorted(row.tokens for row in rows)[-config.per_device_train_batch_size :]
    logger.info(
        "Memory, predicted: %.2f GB (Python and libraries %.2f, base %.2f, training %.2f: %d rows of up to %d tokens); "
        "%.1f GB are free",
        *(size / 1e9 for size in (needed.total, needed.process, needed.weights, needed.training)),
        *(len(longest), longest[-1], there / 1e9),
    )
    if needed.weights + needed.training <= there:
        return True
    logger.error(
        "FAILED: %.1f GB are more than the %.1f GB that are free: a smaller --per_device_train_batch_size or "
        "--max_length, --load_bfloat16, or a smaller model",
        *((needed.weights + needed.training) / 1e9, there / 1e9),
    )
    return False


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
