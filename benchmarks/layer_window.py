"""What a step costs when only the top layers train, against all of them.

    python benchmarks/layer_window.py [--layers 8] [--dtype float32] [--batch_size 8] [--json FILE]

The layers below the lowest one that trains are computed once for both probes (``shared``, ``--activation_cache_gb 0``),
or not at all for examples whose activations are in memory (``warm``: the rows fit the cache and were all seen before).
"""

from collections.abc import Callable
from functools import partial

import torch
from contest import Turns, arguments, contest, publish, real_rows, train_in_turns

from xgblora import LayerSubset, load_model


def ours(
    get_turns: Callable[[], Turns], name: str, dtype: str, size: int, layers: int, cache_gb: float, steps: int
) -> None:
    """Steps over ``steps`` batches, again and again."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    rows = real_rows(tokenizer, 4000)[: steps * size]
    subset = LayerSubset(layers, "top") if layers else None
    train_in_turns(get_turns, model, rows, size, subset=subset, activation_cache_gb=cache_gb)


def main() -> None:
    """Run the contenders in turn and print the ratios."""
    parser = arguments(__doc__)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="top layers that train")
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of each, over as many batches")
    asked = parser.parse_args()
    common = {"name": asked.model_name, "dtype": asked.dtype, "size": asked.batch_size, "steps": asked.rounds}
    contenders = {
        "full": partial(ours, layers=0, cache_gb=0, **common),
        "shared": partial(ours, layers=asked.layers, cache_gb=0, **common),
        "warm": partial(ours, layers=asked.layers, cache_gb=1, **common),
    }
    times = contest(contenders, asked.rounds, warm_up=asked.rounds)  # the first time over the rows fills the cache
    result = {
        "model_name": asked.model_name,
        "dtype": asked.dtype,
        "batch_size": asked.batch_size,
        "layers": asked.layers,
        "seconds": times.seconds,
        "full_over_shared": times.seconds["full"] / times.seconds["shared"],
        "full_over_warm": times.seconds["full"] / times.seconds["warm"],
        "peak_mb": times.peak_mb,
    }
    publish(result, asked.json)


if __name__ == "__main__":
    main()
