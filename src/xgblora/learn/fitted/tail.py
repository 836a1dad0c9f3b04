"""What a model does behind its last decoder layer: cheap, and differentiable without the layers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xgblora.base import Base
from xgblora.data.batch import Batch, Example
from xgblora.errors import XgbloraError, naming
from xgblora.learn.losses import Head, option_scores


class Tail(nn.Module):
    """What a model does between its last decoder layer and its head: a norm, in some also a projection; in float32.

    It is read off one short forward, and checked.

    Args:
        base: The model.
        observed: Layers that must see every word once a forward.

    Raises:
        XgbloraError: The model does something else behind its last layer, or calls a layer otherwise.
    """

    def __init__(self, base: Base, observed: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        last_layer = list(base.layers)[-1]
        around = {last_layer.rsplit(".", depth)[0] for depth in range(1, last_layer.count(".") + 1)} | {""}
        called: list[nn.Module] = []
        handles = [
            module.register_forward_hook(lambda module, *_: called.append(module))
            for name, module in base.model.named_modules()
            if name and name not in around and name.rpartition(".")[0] in around
        ]
        handles.append(base.layers[last_layer].register_forward_hook(lambda *_: called.clear()))
        try:
            with torch.no_grad():
                batch = base.batch([Example([1, 2, 3], [[4], [5]], 0), Example([6, 7], [[4], [5]], 0)])
                with naming("--recipe boost"):
                    (observation,) = base.observe([batch], observed)
        finally:
            for handle in handles:
                handle.remove()
        expected = observation.final
        self.base = [base]  # in a list: not a submodule
        self.steps = nn.ModuleList(copy.deepcopy(module).float() for module in called)
        try:
            computed = self(observation.last.float())
        except Exception:  # one of them takes more than a hidden state
            computed = observation.last.new_zeros(0)
        if (
            observation.last.shape[-1] != base.width
            or computed.shape != expected.shape
            or not torch.allclose(computed, expected.float(), rtol=0.02, atol=0.02)
        ):
            raise XgbloraError(
                f"--recipe boost cannot follow what {type(base.model).__name__} does after its last layer: use "
                "--recipe classic"
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) behind the last decoder layer -> what the head takes."""
        for step in self.steps:
            hidden = step(hidden)
        return hidden

    def scores(self, hidden: Tensor, batch: Batch, normalised: bool, head: Head | None = None) -> Tensor:
        """Option scores (segments, options) of hidden states (reads, hidden) behind the last decoder layer."""
        return option_scores(head or self.base[0], self(hidden), batch, normalised)
