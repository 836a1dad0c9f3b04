"""A .gguf base that stays packed beside the same one unpacked: losses, memory, seconds a step.

    python benchmarks/packed_base.py [--model_name SmolLM2.gguf] [--runs zeroth-order boost backprop] [--seeds 0 1 2]
                                     [--sizes 8 32] [--dtype float32] [--json FILE]

1. 20 zeroth-order steps and four fitted boosters for each seed, each as a command in a process of its own: are losses,
   accuracy and adapters the same bytes, and what is the peak of resident memory above that of the imported libraries?
   20 steps of backpropagation, unpacked, for their memory.
2. Steps of both in turns, for each batch size (none: left out).
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contest import Turns, arguments, contest, publish, real_rows, train_in_turns

from xgblora import load_model
from xgblora.base.wheels import shipped_file
from xgblora.config import EMBEDDED_MODEL

LIBRARIES = "import datasets, peft, torch, transformers, xgblora.cli.new_runs"
COMMON = "--num_dev 100 --num_eval 200 --eval_steps 10 --disable_tqdm true --use_cpu true"
RUNS = {
    "zeroth-order": "--xgblora --xgblora_steps_per_iteration 10 --max_steps 20 --logging_steps 1 --num_train 400 "
    "--per_device_train_batch_size 8 --optim adamw_torch --learning_rate 3e-3 --zo_eps 1e-2",
    "boost": "--recipe boost --num_train 1000 --early_stopping_boosters 0",
    "backprop": "--lora --trainer regular --max_steps 20 --logging_steps 1 --num_train 400 "
    "--per_device_train_batch_size 8 --optim adamw_torch --learning_rate 5e-4",
}
UNPACKED_ONLY = ("backprop",)
SAME = ("training_loss.jsonl", "adapter/adapter_model.safetensors")


def peak_mb(command: list[str]) -> float:
    """Run a command; its peak of resident memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss / 1024


def compare_runs(name: str, dtype: str, runs: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The same commands with and without ``--unpack``."""
    libraries = peak_mb([sys.executable, "-c", LIBRARIES])
    compared: dict[str, Any] = {"libraries_mb": round(libraries)}
    for run, seed in itertools.product(runs, seeds):
        forms = {"packed": [], "unpacked": ["--unpack"]}
        if run in UNPACKED_ONLY:
            del forms["packed"]
        with tempfile.TemporaryDirectory() as root:
            above: dict[str, float] = {}
            for form, more in forms.items():
                command = [sys.executable, "-m", "xgblora", "train", "--model_name", name, "--dtype", dtype]
                command += [*f"{COMMON} {RUNS[run]} --seed {seed}".split(), *more, "--output_dir", f"{root}/{form}"]
                above[form] = peak_mb(command) - libraries
            metrics = {form: json.loads(Path(root, form, "metrics.json").read_text("utf-8")) for form in forms}
            result: dict[str, Any] = {
                "accuracy": {form: read["accuracy"] for form, read in metrics.items()},
                "mb_above_libraries": {form: round(mb) for form, mb in above.items()},
            }
            if len(forms) == 2:
                packed, unpacked = (Path(root, form) for form in forms)
                result["same_bytes"] = all((packed / f).read_bytes() == (unpacked / f).read_bytes() for f in SAME)
                result["memory_packed_over_unpacked"] = round(above["packed"] / above["unpacked"], 3)
        compared[f"{run}, seed {seed}"] = result
        print(json.dumps(compared), file=sys.stderr)
    return compared


def step(get_turns: Callable[[], Turns], name: str, dtype: str, size: int, unpack: bool) -> None:
    """Whole steps of the Trainer."""
    model, tokenizer = load_model(name, getattr(torch, dtype), unpack=unpack)
    train_in_turns(get_turns, model, real_rows(tokenizer, 3200), size)


def main() -> None:
    """Compare, time, print."""
    parser = arguments(__doc__)
    parser.set_defaults(model_name=str(shipped_file(EMBEDDED_MODEL)))
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=12)
    asked = parser.parse_args()
    result: dict[str, Any] = {"model": Path(asked.model_name).name, "dtype": asked.dtype}
    if asked.runs:
        result |= compare_runs(asked.model_name, asked.dtype, asked.runs, asked.seeds)
    for size in asked.sizes:
        forms = {"packed": False, "unpacked": True}
        common = {"name": asked.model_name, "dtype": asked.dtype, "size": size}
        times = contest({form: partial(step, unpack=flag, **common) for form, flag in forms.items()}, asked.rounds)
        seconds = times.seconds
        result[f"B={size}"] = {
            "seconds_a_step": {form: round(taken, 3) for form, taken in seconds.items()},
            "packed_over_unpacked": round(seconds["packed"] / seconds["unpacked"], 3),
        }
    publish(result, asked.json)


if __name__ == "__main__":
    main()
