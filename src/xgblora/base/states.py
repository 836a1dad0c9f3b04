"""What decoder layers leave of a text at its last word."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from xgblora.base.base import Base
from xgblora.base.observation import rows_read
from xgblora.data.batch import Example, split_by_tokens
from xgblora.progress import Progress

PART_TOKENS = 1024
"""Tokens of one forward."""


@torch.no_grad()
def last_states(
    base: Base, examples: Sequence[Example], layers: Sequence[str], progress: str | None = None
) -> tuple[Tensor, int]:
    """Hidden states at the last word of each prompt, as some decoder layers leave them.

    Args:
        base: The model.
        examples: Their options are not looked at.
        layers: Names of decoder layers, of :attr:`Base.layers`.
        progress: Name of a progress bar.

    Returns:
        (layers, examples, hidden) float32 on the CPU, and the tokens that were forwarded.

    Examples:
        >>> from xgblora.base.load import tiny_model
        >>> base = Base(tiny_model())
        >>> states, tokens = last_states(base, [Example([1, 2, 3], [[4], [5]], label=0)], list(base.layers))
        >>> states.shape, tokens
        (torch.Size([2, 1, 32]), 3)
    """
    prompts = [Example(example.prompt, [example.options[0][:1]], 0) for example in examples]
    batches = [base.batch(group) for group in split_by_tokens(prompts, PART_TOKENS)]
    kept: list[dict[nn.Module, Tensor]] = [{} for _ in batches]
    now = 0

    def turn(number: int) -> None:
        nonlocal now
        now = number

    def keep(layer: nn.Module, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept[now][layer] = rows_read(hidden, batches[now]).float().cpu()

    with base.without_gradients(), Progress(len(examples), progress) as shown, ExitStack() as hooks:
        for name in layers:
            hooks.callback(base.layers[name].register_forward_hook(keep).remove)
        filled = [batch.filled() for batch in batches]
        for batch, _ in zip(batches, base.hidden(filled, turn), strict=True):
            shown.add(batch.segments)
    states = [torch.cat([of_batch[base.layers[name]] for of_batch in kept]) for name in layers]
    return torch.stack(states), sum(batch.tokens for batch in batches)
