"""What half precision of the frozen base does to the projected gradient.

    python benchmarks/precision.py [--dtype bfloat16] [--batches 8] [--batch_size 16] [--json FILE]

The same examples and the same directions (per example) in float32 and in the other precision, before training (B = 0)
and with B as large as after a few hundred steps (standard deviation 0.01); for several lengths of probe. Reported: the
root mean square of the projected gradient g in float32, of its error, and their ratio. An error of r times g in every
projection multiplies the variance of the gradient estimate by 1 + r^2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from contest import batches, real_rows
from tqdm import tqdm

from xgblora import OptionLoss, attach, load_model
from xgblora.learn.estimators import Key, TwoSided

LENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
POINTS = {"B = 0": 0.0, "B ~ 0.01": 0.01}


def projections(dtype: torch.dtype, count: int, size: int) -> dict[tuple[str, float], torch.Tensor]:
    """Projected gradients (count * size,) at every point and length."""
    model, tokenizer = load_model(dtype=dtype)
    adapters = attach(model)
    chosen = batches(real_rows(tokenizer, 3200), size)[:count]
    projected = {}
    progress = tqdm(total=count * len(LENGTHS) * len(POINTS), desc=str(dtype))
    with adapters.base.without_gradients():
        for point, spread in POINTS.items():
            draw = torch.Generator().manual_seed(0)
            for layer in adapters.layers.values():
                layer.lora_B.data = spread * torch.randn(layer.lora_B.shape, generator=draw)
            for eps in LENGTHS:
                parts = []
                for step, rows in enumerate(chosen):
                    batch = adapters.base.batch(rows)
                    estimate = TwoSided(eps)(adapters, OptionLoss(), batch, Key(0, step))
                    assert estimate.projected is not None
                    parts.append(estimate.projected)
                    progress.update()
                projected[point, eps] = torch.cat(parts).double()
    return projected


def main() -> None:
    """Compare the two precisions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    exact = projections(torch.float32, asked.batches, asked.batch_size)
    other = projections(getattr(torch, asked.dtype), asked.batches, asked.batch_size)
    rows: list[dict[str, Any]] = []
    for (point, eps), g in exact.items():
        error = other[point, eps] - g
        size, wrong = g.square().mean().sqrt().item(), error.square().mean().sqrt().item()
        cosine = torch.cosine_similarity(g, other[point, eps], dim=0).item()
        rows.append({"point": point, "eps": eps, "g": size, "error": wrong, "ratio": wrong / size, "cosine": cosine})
        print(f"{point}, eps {eps:g}: g {size:.4g}, error {wrong:.4g}, ratio {wrong / size:.3g}, cosine {cosine:.4f}")
    if asked.json:
        asked.json.write_text(json.dumps({"dtype": asked.dtype, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
