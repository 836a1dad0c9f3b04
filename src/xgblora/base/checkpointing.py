"""Gradients that fit into memory: of each decoder layer a forward keeps what enters it, and no more.

What is needed of its inside is computed again on the way back (Chen et al. 2016, "Training deep nets with sublinear
memory cost", arXiv 1604.06174). That costs a forward more, and takes the layers' share of the memory down to one layer.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xgblora.base.architecture import decoder_layers
from xgblora.base.attention import as_now


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Forwards with gradients that begin inside the block keep what enters each decoder layer alone.

    The way back may be gone inside the block or after it.
    """
    with ExitStack() as undo:
        for layer in decoder_layers(model).values():
            undo.callback(_put, layer, vars(layer).get("forward"))
            layer.forward = _computed_again(layer.forward, model)
        yield


def _put(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a layer the forward that it had, of its own or of its class."""
    del layer.forward
    if forward is not None:
        layer.forward = forward


def _computed_again(forward: Callable[..., Any], model: PreTrainedModel) -> Callable[..., Any]:
    """The forward of a layer that is computed again where its gradient is wanted."""

    def computed_again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        again = as_now(model)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), again()

        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    return computed_again
