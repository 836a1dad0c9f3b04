"""What a training step costs, against the forward passes it needs, plain MeZO, and backpropagation.

    python benchmarks/step_time.py [--model_name NAME] [--dtype float32] [--batch_size 8] [--json FILE]

Each contender runs in a process of its own that is told when to take its next step, so that the steps of all
contenders alternate and drift of the machine hits them alike. Reported: medians, and ratios of medians.

1. ``floor``: two bare ``inference_mode`` forwards of the frozen base over the real tokens of the batch, packed.
2. ``ours``: a whole step of xgblora's Trainer, from the data loader to the update (``--torch_compile``: also compiled).
3. ``mezo``: the plain form (arXiv 2305.17333, algorithm 1): every option of every example a padded row (to a multiple
   of 8), the two probes two calls, parameters perturbed in place, full logits and log-softmax at every position.
4. ``backprop``: PEFT's LoRA of rank 1 under autograd, the padded rows of the correct option, AdamW.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from contest import DEVICE, DTYPES, Turns, arguments, batches, contest, publish, real_rows, train_in_turns
from peft import LoraConfig, get_peft_model

from xgblora import Base, Example, load_model

ROWS = 3200


def floor(get_turns: Callable[[], Turns], name: str, dtype: str, size: int, filled: bool = False) -> None:
    """Two forwards of the base over the real tokens; ``filled``: up to a round number of them."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    base, rows = Base(model.to(DEVICE)), cycle(batches(real_rows(tokenizer, ROWS), size))
    turns = get_turns()
    with torch.inference_mode():
        while turns.wait():
            batch = base.batch(next(rows))
            batch = batch.filled() if filled else batch
            for _ in base.hidden([batch, batch]):
                pass
            turns.done()


def ours(get_turns: Callable[[], Turns], name: str, dtype: str, size: int, torch_compile: bool = False) -> None:
    """The step of ``--trainer zo`` with per-example directions and Adam."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    train_in_turns(get_turns, model, real_rows(tokenizer, ROWS), size, torch_compile=torch_compile)


def padded_rows(rows: Sequence[Example], options: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    return ids.to(DEVICE), mask.to(DEVICE), torch.tensor([start for _, start in chosen], device=DEVICE)


def mean_logprobs(model: Any, ids: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of each row's option, from the log-softmax of all positions over the vocabulary."""
    logprobs = F.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float(), dim=-1)
    chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    position = torch.arange(ids.shape[1] - 1, device=DEVICE)
    option = (position >= starts[:, None] - 1) & (mask[:, 1:] == 1)
    return (chosen * option).sum(1) / option.sum(1)


def mezo(get_turns: Callable[[], Turns], name: str, dtype: str, size: int) -> None:
    """MeZO's algorithm 1 on PEFT's LoRA of rank 1, written from its description."""
    base, tokenizer = load_model(name, getattr(torch, dtype))
    model = get_peft_model(base, LoraConfig(r=1, lora_alpha=16, task_type="CAUSAL_LM")).eval().to(DEVICE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = cycle(batches(real_rows(tokenizer, ROWS), size))
    eps, rate = 1e-2, 1e-4

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=scale)

    @torch.inference_mode()
    def loss(batch: Sequence[Example]) -> float:
        scores = mean_logprobs(model, *padded_rows(batch, "all")).view(len(batch), -1)
        return F.cross_entropy(scores, torch.tensor([e.label for e in batch], device=DEVICE)).item()

    turns = get_turns()
    seed = 0
    while turns.wait():
        batch, seed = next(rows), seed + 1
        perturb(seed, eps)
        plus = loss(batch)
        perturb(seed, -2 * eps)
        minus = loss(batch)
        perturb(seed, eps)
        perturb(seed, -rate * (plus - minus) / (2 * eps))
        turns.done()


def backprop(get_turns: Callable[[], Turns], name: str, dtype: str, size: int) -> None:
    """LoRA rank 1 through PEFT and autograd, language-model loss of the correct option, AdamW."""
    base, tokenizer = load_model(name, getattr(torch, dtype))
    model = get_peft_model(base, LoraConfig(r=1, lora_alpha=16, task_type="CAUSAL_LM")).eval().to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    rows = cycle(batches(real_rows(tokenizer, ROWS), size))
    turns = get_turns()
    while turns.wait():
        ids, mask, starts = padded_rows(next(rows), "correct")
        labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1], device=DEVICE) < starts[:, None]), -100)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turns.done()


def main() -> None:
    """Run the contenders in turn and print the ratios."""
    parser = arguments(__doc__)
    parser.add_argument("--mezo_dtype", choices=DTYPES, help="precision of plain MeZO; default: that of the others")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--torch_compile", action="store_true", help="let ours take part compiled, too")
    parser.add_argument(
        "--only", nargs="+", choices=("floor", "ours", "mezo", "backprop"), help="these contenders alone"
    )
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of each; two more warm up")
    asked = parser.parse_args()
    common = {"name": asked.model_name, "size": asked.batch_size}
    contenders = {
        "floor": partial(floor, dtype=asked.dtype, **common),
        "ours": partial(ours, dtype=asked.dtype, **common),
        "mezo": partial(mezo, dtype=asked.mezo_dtype or asked.dtype, **common),
        "backprop": partial(backprop, dtype=asked.dtype, **common),
    }
    if asked.torch_compile:
        contenders["compiled"] = partial(ours, dtype=asked.dtype, torch_compile=True, **common)
    times = contest({name: run for name, run in contenders.items() if name in (asked.only or contenders)}, asked.rounds)
    seconds = times.seconds
    result: dict[str, Any] = {name: getattr(asked, name) for name in ("model_name", "dtype", "batch_size", "rounds")}
    result["mezo_dtype"] = asked.mezo_dtype or asked.dtype
    result["seconds"] = seconds
    for ours_name in ("ours", "compiled"):
        for other in ("floor", "mezo", "backprop"):
            if {ours_name, other} <= seconds.keys():
                pair = (ours_name, other) if other == "floor" else (other, ours_name)
                result["{}_over_{}".format(*pair)] = seconds[pair[0]] / seconds[pair[1]]
    if "ours" in seconds:
        result["examples_per_second"] = asked.batch_size / seconds["ours"]
    result["peak_mb"] = times.peak_mb
    publish(result, asked.json)


if __name__ == "__main__":
    main()
