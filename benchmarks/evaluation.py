"""What it costs to score options: one option a call, as is often done, against ours.

    python benchmarks/evaluation.py [--model_name NAME] [--dtype float32] [--examples 500] [--json FILE]

1. ``plain``: every option of every example a call of its own; full logits, log-softmax, mean over the option's tokens.
2. ``ours``: :func:`xgblora.evaluate`: each prompt once, sorted by length, packed in batches of equally many tokens.

Both score the same Rotten Tomatoes sentences, in processes that take turns; the losses must agree.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from contest import Turns, arguments, contest, publish, real_rows

from xgblora import Base, evaluate, load_model


def plain(get_turns: Callable[[], Turns], name: str, dtype: str, examples: int) -> None:
    """One option a call."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    rows = real_rows(tokenizer, examples)
    turns = get_turns()
    loss = 0.0
    while turns.wait():
        losses = []
        for row in rows:
            scores = []
            for option in row.options:
                ids = torch.tensor([[*row.prompt, *option]])
                with torch.inference_mode():
                    logprobs = F.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
                chosen = logprobs.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :]
                scores.append(chosen.mean())
            losses.append(F.cross_entropy(torch.stack(scores)[None], torch.tensor([row.label])))
        loss = torch.stack(losses).mean().item()
        turns.done()
    turns.result = {"loss": loss}


def ours(get_turns: Callable[[], Turns], name: str, dtype: str, examples: int, batch_size: int) -> None:
    """Packed, each prompt once."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    rows = real_rows(tokenizer, examples)
    base = Base(model, packed=True)
    turns = get_turns()
    loss = 0.0
    while turns.wait():
        loss = evaluate(base, rows, batch_size=batch_size).loss
        turns.done()
    turns.result = {"loss": loss}


def main() -> None:
    """Run both in turn and print the ratio."""
    parser = arguments(__doc__)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=64, help="of ours")
    parser.add_argument("--rounds", type=int, default=3, help="times that each scores all examples")
    asked = parser.parse_args()
    common = {"name": asked.model_name, "dtype": asked.dtype, "examples": asked.examples}
    contenders = {"plain": partial(plain, **common), "ours": partial(ours, batch_size=asked.batch_size, **common)}
    times = contest(contenders, asked.rounds, warm_up=0)
    seconds = times.seconds
    result = {
        "model_name": asked.model_name,
        "dtype": asked.dtype,
        "examples": asked.examples,
        "seconds": seconds,
        "plain_over_ours": seconds["plain"] / seconds["ours"],
        "examples_per_second": {name: asked.examples / taken for name, taken in seconds.items()},
        "loss": {name: result["loss"] for name, result in times.results.items()},
        "peak_mb": times.peak_mb,
    }
    publish(result, asked.json)


if __name__ == "__main__":
    main()
