"""A .gguf file, or a folder, as a model whose weights stay in their file."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from xgblora import hf
from xgblora.base.header import StoredTensor, read_gguf_header, read_safetensors_header
from xgblora.base.packed import PackedEmbedding, PackedLinear, PackedWeight
from xgblora.base.packed_file import PackedFile
from xgblora.base.unpack import KINDS, unpack
from xgblora.errors import XgbloraError

logger = logging.getLogger(__name__)

Q8_ENTRIES, _ = gguf.GGML_QUANT_SIZES[Kind.Q8_0]

BLOCK = re.compile(r"blk\.(\d+)\.")
"""How the name of a layer's tensor begins in a .gguf file."""


def read_packed(
    path: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    memory_budget: int | None = None,
    first_layers: bool = False,
) -> PreTrainedModel:
    """Build the model of a .gguf file on its mapped bytes.

    Linear layers and embeddings stay packed. What the model has in another form (a norm less one, a transposed
    weight, experts in one stack) is unpacked, and the log says how much.

    Args:
        path: The file. It is mapped, not read: its pages are in memory once, whoever uses them.
        config: Its configuration.
        dtype: Of products, and of what is unpacked.
        memory_budget: Bytes that the process may have resident, on a GPU those of the GPU (:class:`PackedFile`).
        first_layers: ``config`` has fewer layers than the file, of which the first ones are taken.

    Raises:
        XgbloraError: The file is damaged, lacks a weight, holds one of another shape or of a kind that cannot be
            unpacked, or is of an architecture that transformers reads in another way.
    """
    header = read_gguf_header(path)
    for stored in header.tensors:
        if stored.kind not in KINDS:
            known = ", ".join(kind.name for kind in KINDS)
            raise XgbloraError(f"its {stored.name} is packed as {stored.kind.name}, and only {known} are known")
    model = hollow_model(config, dtype)
    filling = _Filling(model, hf.GgufNames(model, header.architecture), PackedFile([path], memory_budget))
    layers = config.get_text_config().num_hidden_layers
    for stored in header.tensors:
        if not (first_layers and (layer := BLOCK.match(stored.name)) and int(layer[1]) >= layers):
            filling.put(stored)
    filling.finish()
    return model


def fill_from(
    files: Sequence[Path],
    model: PreTrainedModel,
    memory_budget: int | None = None,
    first_layers: bool = False,
    eight_bit: bool = False,
) -> None:
    """Put a model on the mapped bytes of a folder's .safetensors files, as :func:`read_packed` does with a .gguf file.

    Args:
        files: All of them.
        model: From :func:`hollow_model`.
        memory_budget: As for :func:`read_packed`, and so is ``first_layers``.
        eight_bit: Pack linear layers but the head to Q8_0, in memory: 32 neighbours of a row share a scale.

    Raises:
        XgbloraError: A file is damaged, or the files' weights are not the model's, by name and shape.
    """
    file = PackedFile(files, memory_budget)
    names = hf.FolderNames(model)
    filling = _Filling(model, names, file, eight_bit)
    for path, start in zip(files, file.starts, strict=True):
        for stored in read_safetensors_header(path):
            if stored.name in names.names:
                filling.put(replace(stored, start=start + stored.start))
            elif not first_layers and not names.may_be_left(stored.name):
                raise XgbloraError(
                    f"{path.name} holds {stored.name}, for which the model has another place or none: --memory_budget "
                    "and --load_8bit read files that name every weight as the model does"
                )
    filling.finish()


def hollow_model(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model whose weights are still to come, which multiplies in ``dtype``."""
    with hf.hollow():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # hollow weights are made anew, one by one
    return model


def _eight_bits(weight: PackedWeight) -> PackedWeight:
    """A weight's own numbers, not those cast to its dtype, in Q8_0, in memory."""
    packed = []
    for part in weight.parts(slice(0, weight.shape[0])):
        values = torch.empty(part.stop - part.start, weight.shape[1])
        unpack(weight.packed, weight.kind, weight.order[part], values)
        packed.append(torch.from_numpy(gguf.quants.quantize(values.numpy(), Kind.Q8_0)))
    return PackedWeight(torch.cat(packed), Kind.Q8_0, weight.shape, weight.dtype, rounded=True)


def _row_bytes(stored: StoredTensor) -> int:
    return stored.size * stored.shape[-1] // math.prod(stored.shape)


class _Filling:
    """Puts the tensors of a file into a hollow model, one by one."""

    def __init__(
        self, model: PreTrainedModel, names: hf.GgufNames | hf.FolderNames, file: PackedFile, eight_bit: bool = False
    ) -> None:
        self.model, self.names, self.file, self.dtype = model, names, file, model.dtype
        self.shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
        shared: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(weight), []).append(name)
        self.twins = {name: names for names in shared.values() for name in names}
        """{weight: all names of it}: a tied head is the table of embeddings."""
        self.filled: set[str] = set()
        self.eight_bit = eight_bit
        self.words = model.get_input_embeddings()
        """Looked up by token ids, whatever its class makes of a row; other tables may be asked in ways of their own."""
        self.packed = self.unpacked = 0

    def put(self, stored: StoredTensor) -> None:
        """Fill the place of one tensor."""
        target = self.names.names.get(stored.name, "")
        if target in self.filled:  # a file may hold a tied head twice
            return
        rows = self.file.bytes(stored.start, stored.size).view(-1, _row_bytes(stored))
        if target in self.shapes and self._can_stay_packed(target):
            order = self._order(stored, target)
            if order is not None:
                self._require_shape(stored.shape, target)
                shape = stored.shape[0], stored.shape[1]
                mapped = self.file, stored.start, stored.size
                weight = PackedWeight(rows, stored.kind, shape, self.dtype, order, mapped)
                if self.eight_bit and self._is_inner(target) and shape[1] % Q8_ENTRIES == 0:
                    weight = _eight_bits(weight)
                    self.file.let_go(stored.start, stored.size)
                for name in self.twins[target]:
                    self._stand_in(name.removesuffix(".weight"), weight)
                self.filled.update(self.twins[target])
                self.packed += stored.size
                return
        values = torch.empty(len(rows), stored.shape[-1])
        unpack(rows, stored.kind, torch.arange(len(rows), dtype=torch.int32), values)
        place, made = self.names.process(values.numpy().reshape(stored.shape), stored.name)
        if place is not None:
            self._set(place, made)

    def finish(self) -> None:
        """Raise :class:`XgbloraError` where a weight is still without values."""
        for name, made in self.names.collected().items():
            self._set(name, made)
        empty = [name for name, weight in self.model.named_parameters() if weight.device.type == "meta"]
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise XgbloraError(f"its file lacks {empty[0]}{more}")
        stay = "stay packed" if isinstance(self.names, hf.GgufNames) else "stay in their files"
        logger.info("%.0f MB %s, %.1f MB are unpacked", self.packed / 1e6, stay, self.unpacked / 1e6)

    def _can_stay_packed(self, target: str) -> bool:
        modules = [self.model.get_submodule(name.rpartition(".")[0]) for name in self.twins[target]]
        return all(
            name.endswith(".weight") and (type(module) in (nn.Linear, nn.Embedding) or module is self.words)
            for name, module in zip(self.twins[target], modules, strict=True)
        )

    def _is_inner(self, target: str) -> bool:
        """Whether it is a linear layer's weight, and not the head's."""
        module = self.model.get_submodule(target.rpartition(".")[0])
        return type(module) is nn.Linear and module is not self.model.get_output_embeddings()

    def _order(self, stored: StoredTensor, target: str) -> Tensor | None:
        """Which row of the file is row 0, 1, ... of the model's weight; None where the two differ in another way.

        Asked of transformers itself, with the numbers of the rows in place of their values.
        """
        if len(stored.shape) != 2:
            return None
        numbers = np.arange(stored.shape[0], dtype=np.int32)
        probe = np.broadcast_to(numbers[:, None], stored.shape)
        name, made = self.names.process(probe, stored.name)
        if name != target or made.shape != stored.shape:
            return None
        order = made[:, 0]
        if made is not probe and not (np.array_equal(np.sort(order), numbers) and (made == order[:, None]).all()):
            return None
        return torch.from_numpy(order.copy())

    def _stand_in(self, name: str, weight: PackedWeight) -> None:
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            self.model.set_submodule(name, PackedEmbedding(weight, module))
        else:
            self.model.set_submodule(name, PackedLinear(weight, module.bias))

    def _set(self, name: str, values: np.ndarray) -> None:
        self._require_shape(values.shape, name)
        weight = nn.Parameter(torch.tensor(values).to(self.dtype), requires_grad=False)
        for twin in self.twins[name]:
            module, _, attribute = twin.rpartition(".")
            setattr(self.model.get_submodule(module), attribute, weight)
        self.unpacked += weight.nbytes

    def _require_shape(self, shape: tuple[int, ...], name: str) -> None:
        if tuple(shape) != self.shapes[name]:
            raise XgbloraError(f"{name} is {tuple(shape)} there, {self.shapes[name]} by its header")
