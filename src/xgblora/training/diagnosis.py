"""Why a step is not finite: found by the same batch without probes, and without adapters."""

import torch

from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example
from xgblora.learn.method import Method


@torch.no_grad()
def diagnose(method: Method, batch: Batch, args: RunConfig, names: dict[int, int]) -> str:
    """Whose numbers are not finite, why, and what to do, in one sentence.

    Args:
        method: Whose step it was.
        batch: What it was taken on.
        args: The run's flags.
        names: Numbers of the training examples, counted from 1, by their id().
    """
    adapters, batch = method.adapters, batch.to(method.adapters.device)

    def spoiled() -> list[Example]:
        finite = torch.isfinite(method.loss(adapters.base, batch)).tolist()
        return [example for example, fine in zip(batch.examples, finite, strict=True) if not fine]

    def named(examples: list[Example]) -> str:
        numbers = sorted(names[id(example)] for example in examples if id(example) in names)
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"training example(s) {shown}" if shown else f"{len(examples)} training example(s)"

    with adapters.first(0):
        bare = spoiled()
    if bare:
        cure = "load the base in bfloat16 or float32" if args.load_float16 else "look at these examples"
        return f"the base alone gives it for {named(bare)}: {cure}"
    if grown := spoiled():
        return f"the adapters have grown too far, seen at {named(grown)}: lower --learning_rate"
    everybody = named(list(batch.examples))
    if args.trainer == "zo":
        return (
            f"only the probes of {everybody} give it: lower --zo_eps (now {args.zo_eps:g}), or load the base in float32"
        )
    return f"the gradient of {everybody} overflows: load the base in float32"
