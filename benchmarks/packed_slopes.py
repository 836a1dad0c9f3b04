"""How far the slopes that a zeroth-order step measures are off where the base is packed.

    python benchmarks/packed_slopes.py [--directions 12] [--eps 1e-2] [--seed 0]

The slope of the mean loss of 16 rows of random words along random directions of a rank-1 LoRA, central differences, on
SmolLM2-135M in float32, packed to 8 bits (Q8_0), and, where bitsandbytes is installed, to NF4 and to its own 8 bits.
Reported: the root mean square of the difference to float32 over that of the slopes themselves, and the correlation.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from xgblora import Base, Example, OptionLoss, attach, load_model

ROWS, TOKENS = 16, 30


def bitsandbytes_eight() -> PreTrainedModel:
    """bitsandbytes' 8 bits without its threshold, with which a word's scores depend on other rows."""
    model, _ = load_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        packing = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=packing
        )
    return read.requires_grad_(False).eval()


@torch.no_grad()
def slopes(model: PreTrainedModel, directions: int, eps: float, seed: int) -> Tensor:
    """(directions,) float64."""
    base = Base(model, packed=False)
    adapters = attach(base, rank=1, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(base.vocabulary, (ROWS, TOKENS), generator=draw).tolist()
    batch = base.batch([Example(row, [[4], [5]], 0) for row in words])
    loss = OptionLoss()

    def loss_at(direction: list[Tensor], step: float) -> float:
        for parameter, z in zip(adapters.parameters(), direction, strict=True):
            parameter.add_(step * z)
        (scores,) = loss.all_scores(base, [batch])
        for parameter, z in zip(adapters.parameters(), direction, strict=True):
            parameter.sub_(step * z)
        return loss.of_scores(scores, batch.label).double().mean().item()

    measured = []
    for _ in range(directions):
        direction = [torch.randn(parameter.shape, generator=draw) for parameter in adapters.parameters()]
        measured.append((loss_at(direction, eps) - loss_at(direction, -eps)) / (2 * eps))
    return torch.tensor(measured, dtype=torch.float64)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=12)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    bases: dict[str, Callable[[], PreTrainedModel]] = {"Q8_0, --load_8bit": lambda: load_model(bits=8)[0]}
    if importlib.util.find_spec("bitsandbytes") is not None:
        bases["bitsandbytes, 8 bits"] = bitsandbytes_eight
        bases["bitsandbytes, NF4, --load_4bit"] = lambda: load_model(bits=4)[0]
    table = Table("base", "difference", "correlation")
    expected = slopes(load_model()[0], asked.directions, asked.eps, asked.seed)
    for name, make in bases.items():
        seen = slopes(make(), asked.directions, asked.eps, asked.seed)
        off = (seen - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        table.add_row(name, f"{off:.2f}", f"{torch.corrcoef(torch.stack([expected, seen]))[0, 1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
