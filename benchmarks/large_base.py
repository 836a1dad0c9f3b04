"""What a step and a booster take on a .gguf file that is larger than the memory they may have.

    python benchmarks/large_base.py 7b.gguf [--parts step boost] [--memory_budget 2.3e9] [--dtype bfloat16]

``random_gguf.py`` writes such a file. Whole zeroth-order steps of 8 sentences, and teacher and one booster of recipe
boost on 64. Reported: seconds, the peak of resident memory, and how often the file was read. The budget is the
process's own; a hard limit is for the system to set (a cgroup, ``systemd-run --scope -p MemoryMax=2.5G``).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contest import DEVICE, DTYPES, Alone, finish, publish, real_rows, train_in_turns
from transformers import PreTrainedModel

from xgblora import Base, Example, RunConfig, attach, load_model, residual_writers
from xgblora.base.load import load_tokenizer
from xgblora.base.packed import budgeted_file
from xgblora.base.prefix import Prefix
from xgblora.config import EMBEDDED_MODEL
from xgblora.learn.fitted import RECIPES
from xgblora.learn.losses import OptionLoss
from xgblora.training.record import PeakMemory


def step(model: PreTrainedModel, rows: Sequence[Example]) -> dict[str, Any]:
    """Three zeroth-order steps of 8 rows."""
    turns = Alone(3)
    train_in_turns(lambda: turns, model, rows, 8)
    return {"seconds": [round(taken, 1) for taken in turns.seconds], "peak_mb": round(turns.memory.read())}


def boost(model: PreTrainedModel, rows: Sequence[Example]) -> dict[str, Any]:
    """Teacher and one booster of recipe boost."""
    config = RunConfig(output_dir="unused", recipe="boost", xgblora=True, boost_boosters=1)
    base = Base(model)
    adapters = attach(base, xgblora=True, target_modules=residual_writers(model))
    memory = PeakMemory(DEVICE)
    started = time.perf_counter()
    recipe = RECIPES["boost"](adapters, OptionLoss(), config, Prefix(model, 10**9))
    with base.without_gradients(), torch.no_grad():
        fit = recipe.fit(recipe.split(rows), 1.0)
    finish()
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "peak_mb": round(memory.read()), "forwards": fit.cost.passes}


PARTS = {"step": step, "boost": boost}


def main() -> None:
    """Carry out the parts asked for, each on a model of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--memory_budget", type=float, help="bytes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    asked = parser.parse_args()
    rows = real_rows(load_tokenizer(EMBEDDED_MODEL), 64)
    result: dict[str, Any] = {"dtype": asked.dtype, "memory_budget": asked.memory_budget}
    for part in asked.parts:
        budget = None if asked.memory_budget is None else int(asked.memory_budget)
        model, _ = load_model(asked.file, getattr(torch, asked.dtype), memory_budget=budget)
        result[part] = PARTS[part](model, rows)
        if (file := budgeted_file(model)) is not None:
            result[part]["times_read"] = round(file.read_bytes / file.size, 2)
        publish(result, asked.json)


if __name__ == "__main__":
    main()
