"""PEFT's two files: written here, and read back by plain PEFT, to see that nothing is lost on the way."""

import copy
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xgblora.adapters.linear import linear_shape
from xgblora.errors import XgbloraError, one_line

WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def tensor_name(layer: str, matrix: str) -> str:
    """What PEFT calls A or B of a layer."""
    return f"base_model.model.{layer}.lora_{matrix}.weight"


def write(folder: Path, like: LoraConfig, rank: int, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    """Write a LoRA as PEFT does.

    Args:
        folder: It exists.
        like: Names the layers.
        rank: Rows of every A.
        alpha: PEFT divides it by the rank.
        tensors: A and B of each layer, by :func:`tensor_name`.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=like.target_modules,
        fan_in_fan_out=like.fan_in_fan_out,
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        inference_mode=True,
    )
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set would be written in another order each time
    config.save_pretrained(str(folder))
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def settle_targets(model: PreTrainedModel, config: LoraConfig, layers: Mapping[str, nn.Module]) -> None:
    """Let ``config`` name the layers in a way that plain PEFT reads as they were meant.

    A LoRA on these layers is written, read by PEFT into the same model without weights, and compared. PEFT takes some
    names for others: of fused experts, say, or of layers that it holds back from adapters. Then every layer is named
    in full; where that does not help either, the layers are refused.

    Args:
        model: Without adapters.
        config: Its ``target_modules`` may be replaced.
        layers: Those that take adapters, by name.

    Raises:
        XgbloraError: PEFT would lose some of the layers, or adapt others; the message names one.
    """
    config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in layers.values())
    if not (lost := _lost(model, config, layers)):
        return
    asked, config.target_modules = config.target_modules, set(layers)
    if _lost(model, config, layers):
        config.target_modules = asked
        raise XgbloraError(
            f"an adapter on these layers would not be what plain PEFT loads ({lost}): give other --lora_target_modules"
        )


def _lost(model: PreTrainedModel, config: LoraConfig, layers: Mapping[str, nn.Module]) -> str:
    """How plain PEFT reads a LoRA on ``layers`` otherwise than it was written; empty where it does not."""
    tensors = {}
    for number, (name, layer) in enumerate(layers.items(), start=1):
        shape = linear_shape(layer)
        assert shape is not None  # its caller has looked
        for matrix, lines in zip("AB", shape, strict=True):
            values = torch.arange(number, number + lines) % 127 + 1.0  # other ones in each layer, exact in every dtype
            tensors[tensor_name(name, matrix)] = values[None, :] if matrix == "A" else -values[:, None]
    with tempfile.TemporaryDirectory(prefix="xgblora-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT drops: that is looked at below
        write(Path(folder), config, 1, 2.0, tensors)
        try:
            plain = PeftModel.from_pretrained(_without_weights(model), folder, low_cpu_mem_usage=True)
        except Exception as error:  # PEFT and the model's own class refuse in many ways
            return one_line(error)
    read = {name: layer for name, layer in plain.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    for name in layers:
        layer = read.pop(name, None)
        if layer is None:
            return f"it does not adapt {name}"
        matrices = {"A": layer.lora_A, "B": layer.lora_B}
        if layer.scaling["default"] != 2.0 or not all(
            _same(adapters["default"].weight, tensors[tensor_name(name, matrix)])
            for matrix, adapters in matrices.items()
        ):
            return f"it reads other numbers for {name}"
    return f"it adapts {next(iter(read))}, too" if read else ""


def _same(read: Tensor, written: Tensor) -> bool:
    return not read.is_meta and torch.equal(read.float(), written)  # what PEFT does not find in the file has no content


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in next to no memory: every tensor is one number that fills its whole shape.

    Linear layers of another kind than torch's or transformers' stand for quantised ones, which PEFT need not know.
    """

    def hollow(tensor: Tensor) -> Tensor:
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)

    twins: dict[int, object] = {id(buffer): hollow(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(hollow(parameter), requires_grad=False)
    for module in model.modules():
        if type(module) not in (nn.Linear, Conv1D) and (shape := linear_shape(module)):
            twins[id(module)] = plain = nn.Linear(*shape, bias=False, device="meta")
            plain.weight = nn.Parameter(hollow(plain.weight), requires_grad=False)
    return copy.deepcopy(model, twins)
