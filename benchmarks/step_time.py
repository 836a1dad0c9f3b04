"""What a training step costs, against the forward passes it needs, plain MeZO, and backpropagation.

    python benchmarks/step_time.py [--model_name NAME] [--dtype float32] [--batch_size 8] [--json FILE]

Each contender runs in a process of its own that is told when to take its next step, so that the steps of all
contenders alternate and drift of the machine hits them alike. Reported: medians, and ratios of medians.

1. ``floor``: two bare ``inference_mode`` forwards of the frozen base over the real tokens of the batch, packed.
2. ``ours``: a whole step of xgblora: data, directions, both probes, update.
3. ``mezo``: the plain form (arXiv 2305.17333, algorithm 1): every option of every example a padded row (to a multiple
   of 8), the two probes two calls, parameters perturbed in place, full logits and log-softmax at every position.
4. ``backprop``: PEFT's LoRA of rank 1 under autograd, the same padded rows of the correct option, AdamW.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from xgblora import Example, attach, encode, get_task, load_model, load_splits, sample
from xgblora.objectives import classification_loss
from xgblora.packing import build_batch, read_hidden
from xgblora.record import PeakMemory
from xgblora.zo import direction_generators, estimate_batch

CONTENDERS = ("floor", "ours", "mezo", "backprop")
Step = Callable[[list[Example]], None]


def floor(model: Any) -> Step:
    """Two forwards of the base over the real tokens."""

    @torch.inference_mode()
    def step(rows: list[Example]) -> None:
        batch = build_batch(rows)
        for _ in range(2):
            read_hidden(model, batch)

    return step


def ours(model: Any) -> Step:
    """The step of ``--trainer zo`` with per-example directions and Adam."""
    adapters = attach(model, rank=1, alpha=16)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=3e-3, weight_decay=0)
    numbers = iter(range(10**9))

    def step(rows: list[Example]) -> None:
        draws = direction_generators(0, next(numbers), 0, 1)
        found = estimate_batch(adapters, classification_loss, build_batch(rows), draws, 1e-2, "per_example")
        adapters.accumulate_gradient(found.gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def padded_rows(rows: list[Example], options: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and mask of prompt + option rows, right-padded to a multiple of 8, and each row's prompt length."""
    chosen = [
        ([*e.prompt, *option], len(e.prompt))
        for e in rows
        for number, option in enumerate(e.options)
        if options == "all" or number == e.label
    ]
    longest = -(-max(len(ids) for ids, _ in chosen) // 8) * 8
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in chosen])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in chosen])
    return ids, mask, torch.tensor([start for _, start in chosen])


def mean_logprobs(model: Any, ids: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of each row's option, from the log-softmax of all positions over the vocabulary."""
    logprobs = F.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float(), dim=-1)
    own = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    position = torch.arange(ids.shape[1] - 1)
    option = (position >= starts[:, None] - 1) & (mask[:, 1:] == 1)
    return (own * option).sum(1) / option.sum(1)


def mezo(model: Any) -> Step:
    """MeZO's algorithm 1 on rank-1 LoRA, written from its description."""
    adapters = attach(model, rank=1, alpha=16)
    parameters = list(adapters.parameters())
    numbers = iter(range(10**9))
    eps, rate = 1e-2, 1e-4

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=scale)

    @torch.inference_mode()
    def loss(rows: list[Example]) -> float:
        scores = mean_logprobs(model, *padded_rows(rows, "all")).view(len(rows), -1)
        return F.cross_entropy(scores, torch.tensor([e.label for e in rows])).item()

    def step(rows: list[Example]) -> None:
        seed = next(numbers)
        perturb(seed, eps)
        plus = loss(rows)
        perturb(seed, -2 * eps)
        minus = loss(rows)
        perturb(seed, eps)
        perturb(seed, -rate * (plus - minus) / (2 * eps))

    return step


def backprop(model: Any) -> Step:
    """LoRA rank 1 through PEFT and autograd, language-model loss of the correct option, AdamW."""
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(r=1, lora_alpha=16, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=3e-3)

    def step(rows: list[Example]) -> None:
        ids, mask, starts = padded_rows(rows, "correct")
        labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < starts[:, None]), -100)
        peft_model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batches(tokenizer: Any, size: int) -> Iterator[list[Example]]:
    """The same real rows for every contender, in the same order."""
    task = get_task("RottenTomatoes")
    rows = encode(task, sample(load_splits(task), num_train=4000).train, tokenizer, 2048)
    for start in range(0, len(rows) - size + 1, size):
        yield rows[start : start + size]


def contend(name: str, model_name: str, dtype: str, size: int, pipe: Connection) -> None:
    """A contender's process: one step for every message, answered with its seconds; at the end, peak memory."""
    torch.set_num_threads(multiprocessing.cpu_count())
    model, tokenizer = load_model(model_name, getattr(torch, dtype))
    step = {"floor": floor, "ours": ours, "mezo": mezo, "backprop": backprop}[name](model)
    rows = batches(tokenizer, size)
    memory = PeakMemory(torch.device("cpu"))
    pipe.send("ready")
    while pipe.recv():
        batch = next(rows)
        start = time.perf_counter()
        step(batch)
        pipe.send(time.perf_counter() - start)
    pipe.send(memory.read())


def main() -> None:
    """Run the contenders in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of each; two more warm up")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name in CONTENDERS:
        pipes[name], theirs = spawn.Pipe()
        arguments = (name, asked.model_name, asked.dtype, asked.batch_size, theirs)
        spawn.Process(target=contend, args=arguments, daemon=True).start()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_ in tqdm(range(-2, asked.rounds), desc="rounds"):
        for name in CONTENDERS:
            pipes[name].send(True)
            taken = pipes[name].recv()
            if round_ >= 0:
                seconds[name].append(taken)
    peak = {}
    for name in CONTENDERS:
        pipes[name].send(False)
        peak[name] = pipes[name].recv()
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "model": asked.model_name,
        "dtype": asked.dtype,
        "batch_size": asked.batch_size,
        "rounds": asked.rounds,
        "seconds": median,
        "ours_over_floor": median["ours"] / median["floor"],
        "mezo_over_ours": median["mezo"] / median["ours"],
        "backprop_over_ours": median["backprop"] / median["ours"],
        "examples_per_second": asked.batch_size / median["ours"],
        "peak_mb": peak,
    }
    print(json.dumps(result, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
