"""What a step costs when only the top layers train, against all of them.

    python benchmarks/layer_window.py [--layers 8] [--dtype float32] [--batch_size 8] [--json FILE]

The layers below the lowest one that trains are computed once for both probes (``shared``, ``--activation_cache_gb 0``),
or not at all for examples whose activations are in memory (``warm``: the rows fit the cache and were all seen before).
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from contest import Turns, contest, real_rows, train_in_turns

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="top layers that train")
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of each, over as many batches")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    common = {"name": asked.model_name, "dtype": asked.dtype, "size": asked.batch_size, "steps": asked.rounds}
    contenders = {
        "full": partial(ours, layers=0, cache_gb=0, **common),
        "shared": partial(ours, layers=asked.layers, cache_gb=0, **common),
        "warm": partial(ours, layers=asked.layers, cache_gb=1, **common),
    }
    found = contest(contenders, asked.rounds, warm_up=asked.rounds)  # the first time over the rows fills the cache
    result = {
        "model_name": asked.model_name,
        "dtype": asked.dtype,
        "batch_size": asked.batch_size,
        "layers": asked.layers,
        "seconds": found.seconds,
        "full_over_shared": found.seconds["full"] / found.seconds["shared"],
        "full_over_warm": found.seconds["full"] / found.seconds["warm"],
        "peak_mb": found.peak_mb,
    }
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
