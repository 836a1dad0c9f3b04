"""Which layers of a model take adapters."""

from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xgblora.adapters.linear import linear_shape
from xgblora.errors import XgbloraError


def targeted(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` names, by their name in the model, in the model's order.

    Sets ``fan_in_fan_out`` of ``config``. Raises :class:`XgbloraError` where no layer matches, or one that matches
    cannot take an adapter; the message lists layers that can.
    """
    layers = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    targets = config.target_modules
    if not layers:
        wanted = targets if isinstance(targets, str) else " or ".join(sorted(targets))
        raise XgbloraError(f"no layer of {type(model).__name__} is named {wanted}; {_suggestion(model)}")
    for name, module in layers.items():
        if linear_shape(module) is None or module is model.get_output_embeddings():
            raise XgbloraError(
                f"{name} is a {type(module).__name__}: only linear layers below the output head take adapters; "
                + _suggestion(model)
            )
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in layers.values())
    return layers


def target_names(model: PreTrainedModel, asked: Sequence[str] | str | None) -> list[str] | str:
    """The names (or regular expression) asked for, else PEFT's choice for the architecture."""
    if asked:
        return asked if isinstance(asked, str) else list(asked)
    kind = model.config.model_type
    try:
        names: list[str] | str = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    except KeyError:
        raise XgbloraError(f"no default layers are known for the architecture {kind!r}; {_suggestion(model)}") from None
    return names


def _suggestion(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is not head and linear_shape(m)}
    return "give --lora_target_modules, here one or more of: " + ", ".join(sorted(names))
