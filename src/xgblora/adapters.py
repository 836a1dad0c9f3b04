"""Low-rank adapters on a frozen base: y = base(x) + scaling * B A x (LoRA, arXiv 2106.09685), in float32.

An adapted layer holds the pair in training (A, B) and the stack of frozen rank-1 boosters before it. During a
zeroth-order step it evaluates many perturbed copies of the pair at once: see :class:`Probe`.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xgblora.compilation import Opaque
from xgblora.config import warn_rank
from xgblora.errors import XgbloraError
from xgblora.models import decoder_layers, fingerprint
from xgblora.randomness import generator

logger = logging.getLogger(__name__)

BLOCK = 16
"""Rank-1 pairs evaluated in one product outside of probes."""

PIECE = 512
"""Positions that adapters work on at once on a CPU: what is cast and added then stays in the processor's cache."""


@dataclass(frozen=True)
class Probe:
    """Forwards in which every position sees its own perturbed pair.

    With D directions, position t sees A + sum_d select[t, d] zA_d and B likewise, where ``select`` (positions, D)
    float32 holds +eps or -eps at the position's own direction and 0 elsewhere. In a forward of n times as many
    positions, each line of it is that of n neighbouring ones: of a row of tokens, while answers are written.
    ``directions`` (D, parameters) float32 is laid out as :attr:`Adapters.slices` says. Nothing is ever added to a
    parameter.
    """

    directions: Tensor
    select: Tensor
    _pieces: dict[int, list[tuple[slice, Tensor]]] = field(default_factory=dict, init=False)

    def pieces(self, positions: int) -> list[tuple[slice, Tensor]]:
        """For every few positions of a forward: which directions occur there, and 1 beside their part of ``select``.

        Neighbouring positions belong to the same few examples, so a large batch need not multiply every position by
        every direction. All layers of a forward ask for the same.
        """
        if positions not in self._pieces:
            self._pieces[positions] = self._split(positions)
        return self._pieces[positions]

    def _split(self, positions: int) -> list[tuple[slice, Tensor]]:
        select = self.select.repeat_interleave(positions // len(self.select), dim=0)
        found = []
        for part in select.split(_piece(select.device, positions)):
            used = part.any(0).nonzero()[:, 0]
            low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            found.append((slice(low, high), F.pad(part[:, low:high], (1, 0), value=1.0)[:, :, None]))
        return found


class AdaptedLinear(Opaque):
    """A frozen linear layer with its pair in training and its boosters.

    ``lora_A`` (r, in), ``lora_B`` (out, r): the pair. ``booster_A`` (K, in), ``booster_B`` (out, K): the frozen
    stack. All float32. The base layer may be any module with ``in_features`` and ``out_features`` (quantised ones
    too) or transformers' Conv1D: it is called, its weight is never touched.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    booster_A: Tensor
    booster_B: Tensor

    def __init__(self, base_layer: nn.Module, rank: int, scaling: float, device: torch.device) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _shape(base_layer)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.register_buffer("booster_A", torch.zeros(0, self.in_features, device=device), persistent=False)
        self.register_buffer("booster_B", torch.zeros(self.out_features, 0, device=device), persistent=False)
        self.probe: tuple[Tensor, Tensor, Probe] | None = None
        """zA (D, r, in), zB (D, r, out) and the probe they are part of."""

    def compute(self, x: Tensor) -> Tensor:
        """Base output plus adapters, in the base output's dtype; x is (..., in), the result (..., out)."""
        base = self.base_layer(x)
        rows, result = x.reshape(-1, self.in_features), base.reshape(-1, self.out_features)
        if torch.is_grad_enabled():
            return self._stacked(rows.float(), result.float(), self._blocks()).view(base.shape).to(base.dtype)
        stack = self._blocks() if self.probe is None else []
        pieces = self.probe[2].pieces(len(rows)) if self.probe else []
        length = _piece(x.device, len(rows))
        for number, start in enumerate(range(0, len(rows), length)):
            part = slice(start, start + length)
            own, before = rows[part].float(), result[part].float()
            after = self._stacked(own, before, stack) if not pieces else self._probed(own, before, *pieces[number])
            result[part] = after
        return result.view(base.shape)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All boosters and, last, the pair in training as one: (K + r, in), (out, K + r)."""
        return torch.cat([self.booster_A, self.lora_A]), torch.cat([self.booster_B, self.lora_B], dim=1)

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        """All boosters and the pair, in blocks (BLOCK, in) and (out, BLOCK), the last one filled up with zeros.

        One wide product would be as right, but its summation order changes with its width: a merge would then tip
        the last bit of an activation here and there, and a half-precision base makes that a visible difference.
        With equal shapes before and after, the new pair adds exact zeros and a merge is bit-identical.
        """
        A, B = self.pairs()
        empty = -len(A) % BLOCK
        A, B = F.pad(A, (0, 0, 0, empty)), F.pad(B, (0, empty))
        return list(zip(A.split(BLOCK), B.split(BLOCK, dim=1), strict=True))

    def _stacked(self, x: Tensor, result: Tensor, stack: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``result`` (t, out) plus scaling * all boosters and the pair at x (t, in)."""
        for A, B in stack:
            result = torch.addmm(result, F.linear(x, A), B.T, alpha=self.scaling)
        return result

    def _probed(self, x: Tensor, result: Tensor, used: slice, weights: Tensor) -> Tensor:
        """``result`` (t, out) plus scaling * B' A' x with each position's own A' and B', and the boosters.

        ``weights`` (t, 1 + D, 1): 1 for the pair itself, then how far along each of the D directions ``used``. These
        are D more rows of two skinny products, so that the whole probe stays a matrix product: gathering a direction
        for every position would move (t, in) floats from memory instead.
        """
        assert self.probe is not None
        z_A, z_B, _ = self.probe
        rank = self.lora_A.shape[0]
        products = F.linear(x, torch.cat([self.lora_A, z_A[used].flatten(0, 1)]))
        hidden = (products.view(len(x), -1, rank) * weights).sum(1, keepdim=True)  # A' x: (t, 1, r)
        right = torch.cat([self.lora_B.T, z_B[used].flatten(0, 1)])
        result = torch.addmm(result, (weights * hidden).flatten(1), right, alpha=self.scaling)
        if self.booster_A.shape[0]:
            result = torch.addmm(result, F.linear(x, self.booster_A), self.booster_B.T, alpha=self.scaling)
        return result


@dataclass(frozen=True)
class LayerSubset:
    """Each pair trains in ``count`` decoder layers: a random subset (XGBLoRA, arXiv 2410.19694), or the top ones."""

    count: int
    choice: Literal["random", "top"] = "random"


class Adapters:
    """All adapted layers of one model: the handle that training, boosting and saving work with.

    ``layers`` maps the name of each adapted layer inside the model to its :class:`AdaptedLinear`, in the model's
    order. Create it with :func:`attach`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: dict[str, AdaptedLinear],
        peft_config: LoraConfig,
        seed: int,
        base: dict[str, Any],
        subset: LayerSubset | None = None,
    ) -> None:
        self.model = model
        self.base = base
        """Fingerprint of the model as it was without adapters."""
        self.layers = layers
        self.peft_config = peft_config
        self.seed = seed
        self.subset = subset
        self.slices: list[tuple[AdaptedLinear, slice, slice]] = []
        """For each layer that trains, where zA (r, in) and zB (r, out) lie in a flat vector of directions."""
        self.size = 0
        """Trainable parameters: the dimension of a direction."""
        self.lowest_layer: str | None = None
        """The decoder layer below which nothing trains; None where that is the first one, or not known."""
        self._blocks = list(decoder_layers(model))
        self._home = {name: _home(name, self._blocks) for name in layers}
        if subset is not None:
            possible = len(set(self._home.values()) - {None})
            if not 1 <= subset.count <= possible:
                raise XgbloraError(
                    f"--xgblora_layers must be 1 to {possible}, the layers with adapters, got {subset.count}"
                )
        self.choose_layers(0)

    @property
    def device(self) -> torch.device:
        """Where the pairs are: they move with the model."""
        return next(iter(self.layers.values())).lora_A.device

    @property
    def rank(self) -> int:
        """Rank of the pair in training."""
        return next(iter(self.layers.values())).lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return next(iter(self.layers.values())).scaling

    @property
    def boosters(self) -> int:
        """Frozen rank-1 pairs in the stack."""
        return next(iter(self.layers.values())).booster_A.shape[0]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The pairs in training, A and B of each layer."""
        for layer in self.layers.values():
            yield layer.lora_A
            yield layer.lora_B

    def choose_layers(self, number: int) -> None:
        """Let pair ``number`` train in the layers that its subset takes: a function of (seed, number) alone."""
        homes = sorted({home for home in self._home.values() if home is not None})
        if self.subset is None:
            chosen = set(self._home.values())
        elif self.subset.choice == "top":
            chosen = set(homes[-self.subset.count :])
        else:
            order = torch.randperm(len(homes), generator=generator(self.seed, "layers", number)).tolist()
            chosen = {homes[index] for index in order[: self.subset.count]}
        self.slices, start = [], 0
        for name, layer in self.layers.items():
            if self._home[name] not in chosen:
                continue
            middle = start + layer.lora_A.numel()
            stop = middle + layer.lora_B.numel()
            self.slices.append((layer, slice(start, middle), slice(middle, stop)))
            start = stop
        self.size = start
        lowest = min((-1 if home is None else home) for home in chosen)
        self.lowest_layer = self._blocks[lowest] if lowest > 0 else None

    @torch.no_grad()
    def new_pair(self, number: int) -> None:
        """Start pair ``number`` (0, 1, ...): A Kaiming-uniform with a = sqrt(5), B zero, drawn from (seed, number).

        Layers outside its subset keep B = 0: there the pair adds nothing.
        """
        self.choose_layers(number)
        draw = generator(self.seed, "pair", number)
        for layer in self.layers.values():
            fresh = torch.empty(layer.lora_A.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=draw)
            layer.lora_A.copy_(fresh)
            layer.lora_B.zero_()

    @torch.no_grad()
    def freeze_pair(self) -> None:
        """Append the pair in training to the frozen stack as it is, float32; the pair itself stays untouched."""
        for layer in self.layers.values():
            layer.booster_A = torch.cat([layer.booster_A, layer.lora_A])
            layer.booster_B = torch.cat([layer.booster_B, layer.lora_B], dim=1)

    @torch.no_grad()
    def scale_pair(self, factor: float) -> None:
        """Multiply what the pair in training adds by ``factor``."""
        for layer in self.layers.values():
            layer.lora_B.mul_(factor)

    @contextmanager
    def first(self, count: int) -> Iterator[None]:
        """Forwards inside the block see the first ``count`` boosters alone; the pair in training is the last one."""
        whole = {layer: (layer.booster_A, layer.booster_B, layer.lora_B.data) for layer in self.layers.values()}
        try:
            if count <= self.boosters:
                for layer in self.layers.values():
                    layer.booster_A, layer.booster_B = layer.booster_A[:count], layer.booster_B[:, :count]
                    layer.lora_B.data = torch.zeros_like(layer.lora_B)
            yield
        finally:
            for layer, (A, B, last) in whole.items():
                layer.booster_A, layer.booster_B, layer.lora_B.data = A, B, last

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Evaluate the perturbed pairs of ``probe`` in every forward inside the block."""
        count = probe.directions.shape[0]
        for layer, a, b in self.slices:
            z_A = probe.directions[:, a].view(count, -1, layer.in_features)
            z_B = probe.directions[:, b].view(count, -1, layer.out_features)
            layer.probe = (z_A, z_B, probe)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.probe = None

    @torch.no_grad()
    def accumulate_gradient(self, gradient: Tensor) -> None:
        """Add a flat gradient (parameters,), laid out like a direction, to ``.grad`` of the pairs."""
        for layer, a, b in self.slices:
            for parameter, part in (
                (layer.lora_A, gradient[a].view_as(layer.lora_A)),
                (layer.lora_B, gradient[b].view(-1, layer.out_features).T),
            ):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad += part

    def keep_chosen_gradients(self) -> None:
        """Drop what backpropagation wrote into the pairs of layers that do not train."""
        trains = {id(layer) for layer, _, _ in self.slices}
        for layer in self.layers.values():
            if id(layer) not in trains:
                layer.lora_A.grad = layer.lora_B.grad = None

    def detach(self) -> None:
        """Put the base layers back; the model is what it was before :func:`attach`."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base_layer)


def attach(
    model: PreTrainedModel,
    rank: int = 1,
    alpha: float = 16,
    target_modules: Sequence[str] | str | None = None,
    seed: int = 0,
    xgblora: bool = False,
    layers: LayerSubset | None = None,
) -> Adapters:
    """Freeze ``model`` and put adapters on its target layers, in place.

    ``target_modules``: names of layers (or one regular expression) as PEFT understands them; None takes PEFT's
    default for the architecture (q and v projections). ``seed`` decides the first A of every pair. With ``xgblora``
    the rank is 1, whatever was asked for. ``layers``: every pair trains in a subset of the decoder layers. Raises
    :class:`XgbloraError` where no layer matches, one that matches is not linear, the rank is below 1, or the subset
    is larger than what there is.
    """
    if rank < 1:
        raise XgbloraError(f"the rank of an adapter must be at least 1, got {rank}")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise XgbloraError("the model has adapters already: detach them first")
    if xgblora and rank != 1:
        warn_rank(rank)
        rank = 1
    peft_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_targets(model, target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path or None,
    )
    matches = {name: m for name, m in model.named_modules() if check_target_module_exists(peft_config, name)}
    if not matches:
        raise XgbloraError(f"no layer of {type(model).__name__} is named {_show(peft_config)}; {_suggest(model)}")
    for name, module in matches.items():
        if _shape_or_none(module) is None or module is model.get_output_embeddings():
            raise XgbloraError(
                f"{name} is a {type(module).__name__}: only linear layers below the output head take adapters; "
                + _suggest(model)
            )
    peft_config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in matches.values())
    model.requires_grad_(False)
    logger.info("Initializing LoRA with: r=%d, alpha=%g, xgblora=%s", rank, alpha, xgblora)
    adapted = {}
    device = next(model.parameters()).device
    base = fingerprint(model)
    for name, module in matches.items():
        adapted[name] = AdaptedLinear(module, rank, alpha / rank, device)
        model.set_submodule(name, adapted[name])
    try:
        adapters = Adapters(model, adapted, peft_config, seed, base, layers)
    except XgbloraError:
        for name, module in matches.items():
            model.set_submodule(name, module)
        raise
    adapters.new_pair(0)
    return adapters


def _home(layer: str, blocks: list[str]) -> int | None:
    """Number of the decoder layer that holds ``layer``."""
    return next((number for number, block in enumerate(blocks) if layer.startswith(f"{block}.")), None)


def _piece(device: torch.device, positions: int) -> int:
    return PIECE if device.type == "cpu" else max(positions, 1)


def _targets(model: PreTrainedModel, asked: Sequence[str] | str | None) -> list[str] | str:
    if asked:
        return asked if isinstance(asked, str) else list(asked)
    kind = model.config.model_type
    try:
        targets: list[str] | str = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    except KeyError:
        raise XgbloraError(f"no default layers are known for the architecture {kind!r}; {_suggest(model)}") from None
    return targets


def _show(peft_config: LoraConfig) -> str:
    targets = peft_config.target_modules
    return targets if isinstance(targets, str) else " or ".join(sorted(targets))


def _suggest(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is not head and _shape_or_none(m)}
    return "give --lora_target_modules, here one or more of: " + ", ".join(sorted(names))


def _shape_or_none(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    size = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return size if isinstance(size[0], int) and isinstance(size[1], int) else None  # type: ignore[return-value]


def _shape(module: nn.Module) -> tuple[int, int]:
    shape = _shape_or_none(module)
    assert shape is not None  # attach has looked
    return shape
