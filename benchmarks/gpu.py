"""What steps, boosters and attention cost on a GPU, the contenders one after the other in one process.

    python benchmarks/gpu.py [--sections steps attention large] [--sizes 8 32 128 512] [--like qwen2-7b] [--json FILE]

1. ``steps``: those of ``step_time.py``, for each size and both precisions, and what drawing directions takes.
2. ``attention``: of packed rows in one call, beside one call for each row, a padded rectangle made outside, and
   PyTorch's FlexAttention over the packed row.
3. ``large``: a zeroth-order step and a round of recipe boost of a model of 7B with random weights: in bfloat16, packed
   in 4 bits, and packed with the weights in the computer's memory.

A GPU that nobody else uses runs as fast at the end as at the beginning, so contenders need not alternate as on a CPU.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import DEVICE, DTYPES, Alone, Contender, Turns, publish, real_rows, train_in_turns
from gguf import GGMLQuantizationType as Kind
from large_base import boost
from random_gguf import LIKE, write_random_gguf
from step_time import backprop, floor, mezo, ours
from torch import Tensor
from transformers import AutoModelForCausalLM

from xgblora import Example, attach, load_model
from xgblora.base import attention
from xgblora.base.load import load_tokenizer
from xgblora.config import EMBEDDED_MODEL
from xgblora.data.batch import Batch, build_batch

WARM_UP = 3


def timed(contender: Contender, rounds: int, **settings: Any) -> dict[str, float]:
    """Median milliseconds of a contender's steps, and the peak of the GPU's memory."""
    turns: list[Alone] = []

    def get_turns() -> Turns:
        turns.append(Alone(WARM_UP + rounds))
        return turns[0]

    contender(get_turns, **settings)
    counted = turns[0].seconds[WARM_UP:]
    return {"ms": round(1000 * statistics.median(counted), 2), "peak_mb": round(turns[0].memory.read())}


def of_calls(call: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds of a function."""
    turns = Alone(WARM_UP + rounds)
    while turns.wait():
        call()
        turns.done()
    return round(1000 * statistics.median(turns.seconds[WARM_UP:]), 3)


def steps(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every contender at every size."""
    for dtype in asked.dtypes:
        for size in asked.sizes:
            common = {"name": asked.model_name, "dtype": dtype, "size": size}
            contenders: dict[str, Contender] = {"floor": floor, "ours": ours, "mezo": mezo, "backprop": backprop}
            contenders["floor, filled up"] = partial(floor, filled=True)
            if dtype == "bfloat16" and size in asked.compiled:
                contenders["compiled"] = partial(ours, torch_compile=True)
            row: dict[str, Any] = {}
            for name, contender in contenders.items():
                with suppress(torch.OutOfMemoryError):
                    row[name] = timed(contender, asked.rounds, **common)
            ours_ms = row["ours"]["ms"]
            row["ratios"] = {
                "ours / floor": round(ours_ms / row["floor"]["ms"], 2),
                **{
                    f"{name} / ours": round(row[name]["ms"] / ours_ms, 2)
                    for name in row
                    if name != "ours" and "floor" not in name
                },
            }
            adapters = attach(load_model(asked.model_name)[0], xgblora=True)
            draw = torch.Generator().manual_seed(0)
            drawn = partial(torch.randn, size, adapters.size, generator=draw)
            row["directions"] = {"ms": of_calls(partial(_moved, drawn), asked.rounds)}
            yield f"{dtype}, B = {size}", row


def _moved(drawn: Callable[[], Tensor]) -> Tensor:
    return drawn().to(DEVICE)


def attending(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forms of attention over the same rows."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    heads, kept, width = 9, 3, 64  # SmolLM2-135M's
    sentences = real_rows(load_tokenizer(asked.model_name), max(asked.sizes))
    for longer in (1, 8):
        for size in asked.sizes:
            rows = [Example([*row.prompt] * longer, row.options, row.label) for row in sentences[:size]]
            batch = build_batch(rows, packed=True).repeat(2).to(DEVICE)
            tokens = batch.input_ids.numel()
            q, k, v = (
                torch.randn(1, n, tokens, width, device=DEVICE, dtype=torch.bfloat16) for n in (heads, kept, kept)
            )
            row: dict[str, Any] = {"tokens": tokens}

            attend = partial(attention._attend, q, k, v, None, None)  # noqa: SLF001 (it has no other name)

            def by_groups(together: bool, batch: Batch = batch, attend: Callable[[], Tensor] = attend) -> Tensor:
                attention._groups_of_row.set(attention._groups(batch, together))  # noqa: SLF001 (nor have these)
                return attend()

            row["one call, its groups made each time"] = of_calls(partial(by_groups, True), asked.rounds)
            row["one call"] = of_calls(attend, asked.rounds)
            if size <= 32:
                row["a call for each row"] = of_calls(partial(by_groups, False), asked.rounds)
            wide, *narrow = (
                torch.randn(batch.rows, n, batch.longest, width, device=DEVICE, dtype=q.dtype)
                for n in (heads, kept, kept)
            )
            padded = partial(
                F.scaled_dot_product_attention, wide, narrow[0], narrow[1], is_causal=True, enable_gqa=True
            )
            row["padded rectangle"] = of_calls(padded, asked.rounds)
            if DEVICE.type == "cuda":
                document = batch.slot // batch.longest

                def same(b: Any, h: Any, i: Any, j: Any, document: Any = document) -> Any:
                    return (document[i] == document[j]) & (i >= j)

                mask = create_block_mask(same, None, None, tokens, tokens, device=DEVICE)
                row["flex"] = of_calls(partial(flex, q, k, v, block_mask=mask, enable_gqa=True), asked.rounds)
                made = partial(create_block_mask, same, None, None, tokens, tokens, device=DEVICE)
                row["flex's mask, once a batch"] = of_calls(made, asked.rounds)
                reference, other = by_groups(True), flex(q, k, v, block_mask=mask, enable_gqa=True)
                row["largest difference"] = round((reference.transpose(1, 2) - other).abs().max().item(), 4)
            yield f"prompts x {longer}, B = {size}", row


def large(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """One model, held in three ways."""
    config = LIKE[asked.like]
    tokenizer = load_tokenizer(asked.model_name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        started = time.perf_counter()
        write_random_gguf(path, config.model_type, config, Kind.Q4_K, mixed=True)
        size = path.stat().st_size
        yield "file", {"gb": round(size / 1e9, 2), "written_s": round(time.perf_counter() - started, 1)}

        def whole() -> Any:
            with torch.device(DEVICE):
                return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()

        ways: dict[str, Callable[[], Any]] = {
            "bfloat16": whole,
            "packed on the device": lambda: load_model(str(path), torch.bfloat16)[0].to(DEVICE),
            "packed, streamed": lambda: load_model(str(path), torch.bfloat16, memory_budget=int(asked.budget))[0].to(
                DEVICE
            ),
        }
        for way, load in ways.items():
            row: dict[str, Any] = {}
            for count in (8, 32):
                run = partial(step_of, load=load, rows=real_rows(tokenizer, 256), size=count)
                row[f"step, B = {count}"] = timed(run, 3)
                yield f"{way}, so far", row
            _freed()
            row["boost on 64"] = boost(load(), real_rows(tokenizer, 64))
            yield way, row


def _freed() -> None:
    """Let go of the last model: trainers and models refer to each other."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_of(get_turns: Callable[[], Turns], load: Callable[[], Any], rows: Any, size: int) -> None:
    """Whole steps of a model."""
    _freed()
    train_in_turns(get_turns, load(), rows, size)


SECTIONS = {"steps": steps, "attention": attending, "large": large}


def main() -> None:
    """Carry out the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model_name", default=EMBEDDED_MODEL)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compiled", type=int, nargs="*", default=[8, 128], help="sizes that run compiled, too")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--like", choices=LIKE, default="qwen2-7b")
    parser.add_argument("--budget", type=float, default=3e9, help="bytes of the GPU for the streamed model")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    asked = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    for section in asked.sections:
        for title, row in SECTIONS[section](asked):
            result.setdefault(section, {})[title] = row
            print(section, "|", title, "|", row, flush=True)
            if asked.json:
                publish(result, asked.json)


if __name__ == "__main__":
    main()
