"""Where flags have an effect: conditions on a configuration, and what to say where they do not hold."""

from typing import Any

from xgblora.config.flag import Applies, Needs
from xgblora.config.shipped import is_gguf


def drawn(settings: Any) -> bool:
    """Whether pairs are drawn from activations, so that steps find their length alone."""
    return bool(settings.xgblora_init == "activations" and settings.recipe == "classic" and settings.trainer == "zo")


def fitted(settings: Any) -> bool:
    """Whether pairs are fitted to what layers read: by recipe boost, or as each begins."""
    return settings.recipe == "boost" or drawn(settings)


def probed(settings: Any) -> bool:
    """Whether steps probe random pairs in random directions."""
    return settings.trainer == "zo" and not fitted(settings)


PACKED = Needs(lambda c: is_gguf(c.model_name), "is for a --model_name that is a .gguf file")
STAYS = Needs(
    lambda c: not (c.unpack or c.load_4bit or c.load_8bit),
    "leaves weights in their file: no --unpack, --load_4bit or --load_8bit",
)
UNPACKED = Needs(lambda c: not is_gguf(c.model_name), "is for a hub id or a folder: a .gguf file is packed already")
TRAINS = Applies(lambda c: c.trainer != "none", "with --trainer none")
ZO = Applies(lambda c: c.trainer == "zo", "with --trainer {trainer}")
BACKPROP = Applies(lambda c: c.trainer == "regular", "with --trainer {trainer}")
CLASSIC = Applies(lambda c: c.recipe == "classic", "with --recipe boost")
BOOST = Applies(lambda c: c.recipe == "boost", "without --recipe boost")
KEEPS = Applies(lambda c: c.boost_keep != "none", "with --boost_keep none")
XGBLORA = Applies(lambda c: c.xgblora, "without --xgblora")
ADAPTIVE = Applies(lambda c: c.xgblora and c.xgblora_use_adaptive_merge, "without --xgblora_use_adaptive_merge")
LAYERS = Applies(lambda c: c.xgblora or drawn(c), "without --xgblora")
SUBSET = Applies(lambda c: c.xgblora_layers or fitted(c), "without --xgblora_layers")
DRAWN = Applies(drawn, "without --xgblora_init activations")
RATED = Applies(lambda c: not drawn(c), "with --xgblora_init activations")
GRADIENTS = Needs(
    lambda c: not drawn(c),
    "sums gradients, and --xgblora_init activations has none: raise --per_device_train_batch_size",
)
OBSERVED = Needs(lambda c: not drawn(c), "hides what layers read: leave it out with --xgblora_init activations")
LABELS = Needs(lambda c: c.objective == "likelihood", "activations follows labels: leave out --objective and --reward")
TEXT_LOSS = Applies(lambda c: not c.train_as_classification, "with --train_as_classification")
LIKELIHOOD = Applies(lambda c: c.objective == "likelihood", "with --objective reward")
REWARD = Applies(lambda c: c.objective == "reward", "without --reward")
COUNTS_STEPS = Needs(
    lambda c: c.recipe == "classic", "counts steps: one step of --recipe boost is a booster (--boost_boosters)"
)
ONE_BATCH = Needs(
    lambda c: c.recipe == "classic", "is for training steps: --boost_examples says what a booster is fitted on"
)
ONE_STEP = Needs(lambda c: c.recipe == "classic", "has no place in --recipe boost, where a booster is one step")

ADAM = Applies(lambda c: "adam" in c.optim, "with an --optim other than Adam")
SCHEDULED = Applies(lambda c: c.lr_scheduler_type != "constant", "with --lr_scheduler_type constant")
EVALUATES = Applies(lambda c: c.eval_strategy != "no" or c.eval_steps is not None, "without --eval_strategy")
PLATEAU = ("reduce_lr_on_plateau", "greedy")
BEST = Applies(
    lambda c: c.load_best_model_at_end or c.save_strategy == "best" or c.lr_scheduler_type in PLATEAU,
    "without --load_best_model_at_end",
)
TRACKIO = Applies(lambda c: "trackio" in c.report_to, "without --report_to trackio")
WORKERS = Applies(lambda c: c.dataloader_num_workers > 0, "without --dataloader_num_workers")
