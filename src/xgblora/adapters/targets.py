"""Which layers of a model take adapters."""

import logging
import re
from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from xgblora.adapters.plain_peft import settle_targets
from xgblora.base import Base
from xgblora.base.architecture import linear_shape
from xgblora.errors import MemoryBudgetError, XgbloraError

logger = logging.getLogger(__name__)

ATTENTION_INPUTS = (
    *(("q_proj", "v_proj"), ("query", "value"), ("q_b_proj", "kv_b_proj"), ("q_b_proj", "kv_proj")),
    *(("q_proj", "kv_proj"), ("q_gate_proj", "kv_b_proj")),
    *(("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",), ("Wq", "Wv"), ("q_lin", "v_lin")),
    *(("project_q", "project_v"), ("in_proj_qkv",), ("in_proj_qkvz",), ("in_proj",), ("key", "value"), ("kv_proj",)),
    *(("linear_x", "linear_y"), ("q", "v"), ("q_proj", "v_proj_current")),
)
"""How architectures call the layers that a sequence mixer begins with, for those that PEFT has no choice for."""


def choose_targets(base: Base, asked: Sequence[str] | str | None, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that take adapters, by their name in the model, in the model's order.

    Args:
        base: Without adapters.
        asked: Names (or one regular expression) as PEFT understands them; None is PEFT's choice for the architecture,
            or where it has none, the first of ATTENTION_INPUTS that is there.
        config: Its ``target_modules`` and ``fan_in_fan_out`` are set so that plain PEFT adapts the same layers.

    Raises:
        XgbloraError: No layer matches; one that matches cannot take an adapter; or plain PEFT would not load what is
            saved. The message lists layers that can.
    """
    model = base.model
    if asked:
        config.target_modules = asked if isinstance(asked, str) else set(asked)
        return _settled(base, config)
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    for names in ([usual] if usual else []) + [list(names) for names in ATTENTION_INPUTS]:
        config.target_modules = names if isinstance(names, str) else set(names)
        there = {name.rpartition(".")[2] for name in _matching(model, config)}
        if there and (names is usual or there == set(names)):
            try:
                return _settled(base, config)
            except MemoryBudgetError:
                raise
            except XgbloraError as error:
                logger.info("Not adapting %s: %s", names, error)
    raise XgbloraError(f"no default layers are known for {type(model).__name__}; {_suggestion(model)}")


def readable_names(base: Base, names: Sequence[str]) -> list[str]:
    """Those of some target names that can be adapted, and that plain PEFT reads as they are meant."""
    readable = []
    for name in names:
        try:
            choose_targets(base, [name], LoraConfig())
        except MemoryBudgetError:
            raise
        except XgbloraError as error:
            logger.info("Not adapting %s: %s", name, error)
        else:
            readable.append(name)
    return readable


def _settled(base: Base, config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that ``config`` names and that run, and ``config`` naming them as PEFT should."""
    model, layers = base.model, _matching(base.model, config)
    targets = config.target_modules
    wanted = targets if isinstance(targets, str) else " or ".join(sorted(targets or ()))
    if not layers:
        raise XgbloraError(f"no layer of {type(model).__name__} is named {wanted}; {_suggestion(model)}")
    for name, module in layers.items():
        if linear_shape(module) is None or module is model.get_output_embeddings():
            raise XgbloraError(
                f"{name} is a {type(module).__name__}: only linear layers below the output head take adapters; "
                + _suggestion(model)
            )
    called = {_kind(name) for name in layers if name in base.called}
    idle = [name for name in layers if _kind(name) not in called]
    if len(idle) == len(layers):
        raise XgbloraError(f"{type(model).__name__} does not call {wanted} for text; {_suggestion(model)}")
    if idle:
        logger.info("%d layers take no adapter, text does not reach them: %s ...", len(idle), idle[0])
        layers = {name: module for name, module in layers.items() if name not in set(idle)}
    settle_targets(model, config, layers)
    return layers


def _matching(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    try:
        return {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    except re.error as error:
        raise XgbloraError(
            f"--lora_target_modules {config.target_modules!r} is no regular expression: {error}"
        ) from error


def _kind(name: str) -> str:
    """A layer's name without its numbers: of many experts, a text reaches some."""
    return re.sub(r"\d+", "#", name)


def _suggestion(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is not head and linear_shape(m)}
    return "give --lora_target_modules, here one or more of: " + ", ".join(sorted(names))
