"""How the time and memory of a training step grow: with batch, prompt, depth, boosters and options.

    python benchmarks/scaling.py [--only boosters options] [--dtype float32] [--json FILE] [--figure FILE]

The points of a question take turns, each in a process of its own. ``float32`` medians of ``--rounds`` steps of the
real Trainer, SmolLM2-135M with pairs on q and v. Prompts are Rotten Tomatoes sentences, joined where they must be long;
options are arbitrary tokens. Batch 8 unless the batch is the question (prompts: 2).
"""

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contest import Turns, contest, real_rows, train_in_turns

from xgblora import Example, load_model

QUESTIONS: dict[str, list[dict[str, int]]] = {
    "batch": [{"size": size} for size in (1, 4, 16, 64)],
    "prompt": [{"length": length, "size": 2} for length in (16, 64, 256, 1024)],
    "depth": [{"depth": depth} for depth in (6, 12, 18, 24, 30)],
    "boosters": [{"boosters": boosters} for boosters in (0, 10, 100)],
    "options": [{"options": options} for options in (2, 4, 16)],
    "options of three tokens": [{"options": options, "tokens": 3} for options in (2, 4, 16)],
}


def point(get_turns: Callable[[], Turns], dtype: str, where: dict[str, int]) -> None:
    """Steps at one point. ``length``: tokens of every prompt, 0 = as they are; ``tokens``: of every option."""
    at = {"size": 8, "length": 0, "depth": 30, "boosters": 0, "options": 2, "tokens": 1} | where
    model, tokenizer = load_model(dtype=getattr(torch, dtype))
    del model.model.layers[at["depth"] :]
    rows = real_rows(tokenizer, 1600)
    if length := at["length"]:
        text = [token for row in rows for token in row.prompt]
        rows = [
            Example(text[i : i + length], row.options, 0) for i, row in zip(range(0, 10**9, 97), rows, strict=False)
        ]
        rows = [row for row in rows if len(row.prompt) == length]
    draw = random.Random(0)
    answers = [draw.sample(range(1000, 40000), at["tokens"]) for _ in range(at["options"])]
    rows = [Example(row.prompt, answers, 0) for row in rows]
    train_in_turns(get_turns, model, rows, at["size"], at["boosters"])


def draw_growth(answers: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel a question: seconds a step, and peak memory beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(answers), 5.6), layout="constrained")
    axes = figure.subplots(2, len(answers), squeeze=False)
    for column, (question, points) in enumerate(answers.items()):
        xs = [str(measured["at"]) for measured in points]
        for row, (key, label) in enumerate((("seconds", "seconds a step"), ("peak_mb", "peak memory, MB"))):
            axis = axes[row][column]
            axis.bar(xs, [measured[key] for measured in points], color=("#4477aa", "#66ccee")[row])
            axis.bar_label(axis.containers[0], fmt="%.2f" if key == "seconds" else "%.0f", fontsize=8)
            axis.set_xlabel({"prompt": "tokens of a prompt", "depth": "layers"}.get(question, question))
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
    figure.suptitle("What a zeroth-order step of SmolLM2-135M costs")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Answer the questions one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=10, help="counted steps of each point; two more warm up")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    answers: dict[str, list[dict[str, Any]]] = {}
    for question in asked.only:
        points = {json.dumps(where): where for where in QUESTIONS[question]}
        contenders = {name: partial(point, dtype=asked.dtype, where=where) for name, where in points.items()}
        outcome = contest(contenders, asked.rounds)
        first = next(iter(points))
        answers[question] = [
            {
                "at": next(iter(where.values())),
                "seconds": outcome.seconds[name],
                "over_first": outcome.seconds[name] / outcome.seconds[first],
                "peak_mb": outcome.peak_mb[name],
            }
            for name, where in points.items()
        ]
        for measured in answers[question]:
            print(
                f"{question} {measured['at']}: {measured['seconds']:.3f} s ({measured['over_first']:.2f} x the first), "
                f"{measured['peak_mb']:.0f} MB",
                flush=True,
            )
    if asked.json:
        asked.json.write_text(json.dumps({"dtype": asked.dtype, **answers}, indent=2) + "\n", encoding="utf-8")
    if asked.figure:
        draw_growth(answers, asked.figure)


if __name__ == "__main__":
    main()
