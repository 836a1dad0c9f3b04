"""The arms of a comparison: one configuration as each of its methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xgblora.config import RunConfig, defaults, idle_flags, without_idle_flags

_BARE = {"lora": False, "xgblora": False, "recipe": "classic", "init_adapter": None, "trainer": "none"}

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": True, "xgblora": False, "recipe": "classic", "init_adapter": None},
    "xgblora": {"lora": False, "xgblora": True, "recipe": "classic", "lora_r": 1},
    # Layers to adapt are given for the methods that take steps; the recipe has its own.
    "boost": {
        **{"lora": False, "xgblora": True, "recipe": "boost", "lora_r": 1},
        **{"xgblora_layers": 0, "lora_target_modules": []},
    },
    "backprop": {
        **{"lora": True, "xgblora": False, "recipe": "classic", "init_adapter": None},
        **{"trainer": "regular", "optim": "adamw_torch", "lr_scheduler_type": "linear"},
    },
    "in-context": _BARE,
    "calibrated": _BARE | {"calibrated": True, "num_train": 0},
    "centroid": _BARE | {"readout": "centroid"},
    "probe": _BARE | {"readout": "probe"},
}
"""What each method of a comparison sets."""


def arm(config: RunConfig, method: str, **changes: Any) -> RunConfig:
    """``config`` as one method of a comparison. What has no effect on that method is left out.

    Args:
        config: With the flags of all methods.
        method: One of :data:`METHODS`.
        changes: Further settings of this arm.
    """
    return variant(config, **METHODS[method] | changes)


def variant(config: RunConfig, **changes: Any) -> RunConfig:
    """``config`` with some changes, in the precision that it has. What has no effect then is left out."""
    settings = {name: config.asked[name] for name in defaults()} | {"objective": config.objective}
    settings |= {"dtype": config.dtype, "load_float16": False, "load_bfloat16": False, "fp16": False, "bf16": False}
    settings |= changes
    if settings["recipe"] == "boost" and settings["eval_steps"] is not None:
        settings["eval_steps"] = 1  # counted in the steps of the others; here every booster is evaluated
    return RunConfig(**without_idle_flags(settings))


def arm_folder(root: Path, method: str, seed: int) -> Path:
    """Where an arm's run with a seed lies."""
    return root / f"{method}_seed{seed}"


def idle_notes(config: RunConfig, arms: Sequence[RunConfig]) -> list[str]:
    """A line for each flag that was given and has no effect in any arm."""
    first, *others = (idle_flags(config, configured) for configured in arms)
    return [message for name, message in first.items() if all(name in idle for idle in others)]
