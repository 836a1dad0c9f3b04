"""All adapted layers of one model: the handle that training, boosting and saving work with."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters.linear import AdaptedLinear, Probe
from xgblora.adapters.targets import choose_targets
from xgblora.base import Base
from xgblora.base.architecture import linear_shape
from xgblora.base.layer_major import Turn
from xgblora.base.swap import swap
from xgblora.config import warn_rank
from xgblora.errors import XgbloraError
from xgblora.randomness import Stream, generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSubset:
    """Each pair trains in ``count`` decoder layers: a random subset (XGBLoRA, arXiv 2410.19694), or the top ones."""

    count: int
    choice: Literal["random", "top"] = "random"


class Adapters:
    """The adapted layers of one base. Create it with :func:`attach`."""

    def __init__(
        self,
        base: Base,
        layers: dict[str, AdaptedLinear],
        peft_config: LoraConfig,
        fingerprint: dict[str, Any],
        seed: int = 0,
        subset: LayerSubset | None = None,
    ) -> None:
        self.base = base
        self.layers = layers
        """Each adapted layer by its name in the model, in the model's order."""
        self.peft_config = peft_config
        self.fingerprint = fingerprint
        """Of the base as it was without adapters."""
        self.seed = seed
        self.subset = subset
        self.slices: list[tuple[AdaptedLinear, slice, slice]] = []
        """For each layer that trains, where zA (r, in) and zB (r, out) lie in a flat vector of directions."""
        self.size = 0
        """Trainable parameters: the dimension of a direction."""
        self.lowest_layer: str | None = None
        """The decoder layer below which nothing trains; None where that is the first one, or not known."""
        self.ranks: list[int] = []
        """Rank of every frozen booster, in order. It is 1, but for those that recipe boost fits along several
        directions at once."""
        self._blocks = list(base.layers)
        self._home = {name: _home(name, self._blocks) for name in layers}
        self._undo = ExitStack()
        if subset is not None:
            possible = len(set(self._home.values()) - {None})
            if not 1 <= subset.count <= possible:
                raise XgbloraError(
                    f"--xgblora_layers must be 1 to {possible}, the layers with adapters, got {subset.count}"
                )
        self.choose_layers(0)
        for name, layer in layers.items():
            swap(base.model, name, layer, self._undo)
        self.new_pair(0)

    @property
    def model(self) -> PreTrainedModel:
        """The model that the layers belong to."""
        return self.base.model

    @property
    def device(self) -> torch.device:
        """Where the pairs are: they move with the model."""
        return self._any.lora_A.device

    @property
    def rank(self) -> int:
        """Rank of the pair in training."""
        return self._any.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self._any.scaling

    @property
    def boosters(self) -> int:
        """Frozen boosters in the stack."""
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        """Rank of the one LoRA that all boosters and the pair in training are."""
        return sum(self.ranks) + self.rank

    @property
    def _any(self) -> AdaptedLinear:
        return next(iter(self.layers.values()))

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
            order = torch.randperm(len(homes), generator=generator(self.seed, Stream.LAYERS, number)).tolist()
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

    def last_in_training(self) -> list[str]:
        """Names of the layers that train in the highest decoder layer that has some."""
        training = {layer for layer, _, _ in self.slices}
        homes = {name: self._home[name] for name, layer in self.layers.items() if layer in training}
        highest = max((home for home in homes.values() if home is not None), default=None)
        return [name for name, home in homes.items() if home == highest]

    @property
    def pair_is_zero(self) -> bool:
        """Whether the pair in training adds nothing, as a new one does."""
        return not any(bool(layer.lora_B.any()) for layer in self.layers.values())

    @property
    def same_layers_next(self) -> bool:
        """Whether every pair trains in the same layers, so that no booster comes to lie below the next pair."""
        return self.subset is not None and self.subset.choice == "top"

    def pair_digest(self) -> str:
        """SHA-256 of the numbers of the pair in training."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def bare_below(self) -> bool:
        """Whether no booster adds anything below the lowest layer that trains."""
        if self.lowest_layer is None:
            return True
        lowest = self._blocks.index(self.lowest_layer)
        below = [layer for name, layer in self.layers.items() if (home := self._home[name]) is None or home < lowest]
        return not any(bool(layer.booster_B.any()) for layer in below)

    @torch.no_grad()
    def new_pair(self, number: int) -> None:
        """Start pair ``number`` (0, 1, ...): A Kaiming-uniform with a = sqrt(5), B zero, drawn from (seed, number).

        Layers outside its subset keep B = 0: there the pair adds nothing.
        """
        self.choose_layers(number)
        draw = generator(self.seed, Stream.PAIR, number)
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
        self.ranks.append(self.rank)

    def resize_pair(self, rank: int) -> None:
        """Give the pair in training another rank, with the same scaling. What it was is lost: it is zero."""
        for layer in self.layers.values():
            layer.resize(rank)
        self.choose_layers(self.boosters)

    @torch.no_grad()
    def scale_pair(self, factor: float) -> None:
        """Multiply what the pair in training adds by ``factor``."""
        for layer in self.layers.values():
            layer.lora_B.mul_(factor)

    @torch.no_grad()
    def truncate(self, count: int) -> None:
        """Keep the first ``count`` boosters, the last of which becomes the pair in training; 0 is the bare base."""
        kept, stop = sum(self.ranks[: max(count - 1, 0)]), sum(self.ranks[:count])
        if count and self.ranks[count - 1] != self.rank:
            self.resize_pair(self.ranks[count - 1])
        for layer in self.layers.values():
            A, B = layer.booster_A, layer.booster_B
            layer.booster_A, layer.booster_B = A[:kept].clone(), B[:, :kept].clone()
            layer.lora_B.zero_()
            if count:
                layer.lora_A.copy_(A[kept:stop])
                layer.lora_B.copy_(B[:, kept:stop])
        self.ranks = self.ranks[: max(count - 1, 0)]
        self.choose_layers(self.boosters)

    @contextmanager
    def first(self, count: int) -> Iterator[None]:
        """Forwards inside the block see the first ``count`` boosters alone; the pair in training is the last one."""
        whole = {layer: (layer.booster_A, layer.booster_B, layer.lora_B.data) for layer in self.layers.values()}
        ranks = self.ranks
        try:
            if count <= self.boosters:
                self.ranks, kept = ranks[:count], sum(ranks[:count])
                for layer in self.layers.values():
                    layer.booster_A, layer.booster_B = layer.booster_A[:kept], layer.booster_B[:, :kept]
                    layer.lora_B.data = torch.zeros_like(layer.lora_B)
            yield
        finally:
            self.ranks = ranks
            for layer, (A, B, last) in whole.items():
                layer.booster_A, layer.booster_B, layer.lora_B.data = A, B, last

    @contextmanager
    def probing(self, *probes: Probe) -> Iterator[Turn]:
        """Evaluate perturbed pairs in every forward inside the block: those of the first probe, until the number of
        another one is given to what the block is given."""

        def turn(number: int) -> None:
            probe = probes[number]
            count = probe.directions.shape[0]
            for layer, a, b in self.slices:
                z_A = probe.directions[:, a].view(count, -1, layer.in_features)
                z_B = probe.directions[:, b].view(count, -1, layer.out_features)
                layer.probe = (z_A, z_B, probe)

        turn(0)
        try:
            yield turn
        finally:
            for layer in self.layers.values():
                layer.probe = None

    def flatten(self, parts: Sequence[Tensor]) -> Tensor:
        """A flat vector (parameters,), laid out like a direction, from A and B of each layer that trains, in order."""
        return torch.cat([(part.T if number % 2 else part).reshape(-1) for number, part in enumerate(parts)])

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

    def drop_gradient(self) -> None:
        """Forget ``.grad`` of the pairs: torch's optimizers leave such parameters and their moments alone."""
        for parameter in self.parameters():
            parameter.grad = None

    def detach(self) -> None:
        """Put the base layers back; the model is what it was before :func:`attach`."""
        self._undo.close()


def attach(
    model: PreTrainedModel | Base,
    rank: int = 1,
    alpha: float = 16,
    target_modules: Sequence[str] | str | None = None,
    seed: int = 0,
    xgblora: bool = False,
    layers: LayerSubset | None = None,
) -> Adapters:
    """Freeze a model and put adapters on its target layers, in place.

    Args:
        model: A causal model of transformers, or a :class:`Base`.
        rank: Rank of the pair in training; with ``xgblora`` it is 1, whatever was asked for.
        alpha: scaling = alpha / rank.
        target_modules: Names of layers (or one regular expression) as PEFT understands them; by default PEFT's choice
            for the architecture (q and v projections). Layers that text does not reach take none.
        seed: Decides the first A of every pair.
        xgblora: Whether boosters of rank 1 will be trained.
        layers: Every pair trains in a subset of the decoder layers; by default in all.

    Returns:
        The adapters. Their B is zero, so the model computes what it did before.

    Raises:
        XgbloraError: No layer matches, one that matches is not linear, plain PEFT would not load what is saved, the
            rank is below 1, the subset is larger than what there is, or the model has adapters already.

    Examples:
        >>> from xgblora.base.load import tiny_model
        >>> adapters = attach(tiny_model(), rank=1, alpha=16)
        >>> list(adapters.layers)[0], adapters.size
        ('model.decoder.layers.0.self_attn.v_proj', 256)
    """
    base = Base.of(model)
    if rank < 1:
        raise XgbloraError(f"the rank of an adapter must be at least 1, got {rank}")
    if any(isinstance(module, AdaptedLinear) for module in base.model.modules()):
        raise XgbloraError("the model has adapters already: detach them first")
    if xgblora and rank != 1:
        warn_rank(rank)
        rank = 1
    peft_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.model.config.name_or_path or None,
    )
    targets = choose_targets(base, target_modules, peft_config)
    largest = max(min(linear_shape(layer) or (1, 1)) for layer in targets.values())
    if rank > largest:
        raise XgbloraError(f"the rank of an adapter is at most {largest} in these layers, got {rank}")
    base.model.requires_grad_(False)
    fingerprint = base.fingerprint()
    adapted = {name: AdaptedLinear(module, rank, alpha / rank, base.device) for name, module in targets.items()}
    return Adapters(base, adapted, peft_config, fingerprint, seed, layers)


def _home(layer: str, blocks: list[str]) -> int | None:
    """Number of the decoder layer that holds ``layer``."""
    return next((number for number, block in enumerate(blocks) if layer.startswith(f"{block}.")), None)
