"""What predictions take beside bare forwards of the same texts, and how soon the command line answers.

    python benchmarks/predict.py [--model_name NAME] [--dtype float32] [--examples 1000] [--json FILE]

1. ``bare``: the tokens alone, sorted by length, in packed batches: hidden states, and nothing else.
2. ``predict``: :class:`xgblora.Predictor`, from texts to probabilities: templates, tokens, forwards, softmax.

Both see the same Rotten Tomatoes sentences, in processes that take turns. Then ``--help`` of every verb is timed.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from contest import Turns, arguments, contest, publish

from xgblora import Base, Predictor, encode, get_task, load_model, load_splits
from xgblora.cli.verbs import VERBS
from xgblora.learn.evaluate import by_tokens

BATCH = 16


def texts(count: int) -> list[str]:
    """So many sentences of the test split."""
    return list(load_splits(get_task("RottenTomatoes"))["test"]["text"][:count])


def bare(get_turns: Callable[[], Turns], name: str, dtype: str, examples: int) -> None:
    """Forwards alone."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    rows = [{"text": text} for text in texts(examples)]
    encoded = encode(get_task("RottenTomatoes"), rows, tokenizer, 2048, answered=False)
    base = Base(model)
    turns = get_turns()
    with base.without_gradients(), torch.inference_mode():
        batches = [base.batch([encoded[i] for i in chosen]).filled() for chosen in by_tokens(encoded, BATCH)]
        while turns.wait():
            for batch in batches:
                list(base.hidden([batch]))
            turns.done()
    turns.result = {}


def predict(get_turns: Callable[[], Turns], name: str, dtype: str, examples: int) -> None:
    """From texts to answers."""
    model, tokenizer = load_model(name, getattr(torch, dtype))
    rows = texts(examples)
    turns = get_turns()
    with Predictor(model, tokenizer, get_task("RottenTomatoes"), BATCH) as predictor:
        while turns.wait():
            predictor.predictions(rows)
            turns.done()
    turns.result = {}


def help_seconds(argv: list[str], times: int = 5) -> float:
    """Seconds of the whole process, the least of several."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "xgblora", *argv], check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> None:
    """Run both in turn and print the ratio."""
    parser = arguments(__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="times that each sees all texts")
    asked = parser.parse_args()
    common = {"name": asked.model_name, "dtype": asked.dtype, "examples": asked.examples}
    times = contest({"bare": partial(bare, **common), "predict": partial(predict, **common)}, asked.rounds, warm_up=1)
    helps = {"xgblora --help": help_seconds(["--help"])}
    helps |= {f"xgblora {verb} --help": help_seconds([verb, "--help"]) for verb in VERBS}
    result = {
        "model_name": asked.model_name,
        "dtype": asked.dtype,
        "examples": asked.examples,
        "seconds": times.seconds,
        "predict_over_bare": times.seconds["predict"] / times.seconds["bare"],
        "help_seconds": {command: round(seconds, 3) for command, seconds in helps.items()},
    }
    publish(result, asked.json)


if __name__ == "__main__":
    main()
