"""Contenders that take turns: each in a process of its own, one step each a round, so that drift hits all alike."""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from xgblora import Example, LayerSubset, RunConfig, Trainer, attach, encode, get_task, load_splits, sample
from xgblora.training.record import PeakMemory

DTYPES = ("float32", "bfloat16", "float16")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where contenders compute."""


def finish() -> None:
    """Wait for a GPU to do what it was asked for."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Turns:
    """A contender's side: ``while turns.wait(): step(); turns.done()``."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.memory = PeakMemory(DEVICE)
        self.started = 0.0
        self.result: dict[str, float] = {}
        """Whatever else the contender wants to report at the end."""
        pipe.send("ready")

    def wait(self) -> bool:
        """Sleep until it is this contender's turn; False when there are no more."""
        turn: bool = self.pipe.recv()
        self.started = time.perf_counter()
        return turn

    def done(self) -> None:
        """The step is over."""
        finish()
        self.pipe.send(time.perf_counter() - self.started)


class Alone(Turns):
    """A contender's side where there are no others: so many steps, one after the other."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.seconds: list[float] = []
        self.memory = PeakMemory(DEVICE)

    def wait(self) -> bool:
        """Whether another step is wanted."""
        finish()
        self.left -= 1
        self.started = time.perf_counter()
        return self.left >= 0

    def done(self) -> None:
        """The step is over."""
        finish()
        self.seconds.append(time.perf_counter() - self.started)


Contender = Callable[..., None]
"""(get_turns, ...): prepares, calls ``get_turns()``, then steps until the turns are over. Importable, for spawn."""


@dataclass(frozen=True)
class Outcome:
    """``seconds``: median of each contender's steps. ``peak_mb``: its peak resident memory, counted from
    where it asked for its turns. ``results``: what else each reported."""

    seconds: dict[str, float]
    peak_mb: dict[str, float]
    results: dict[str, dict[str, float]]


def contest(contenders: Mapping[str, Contender], rounds: int, warm_up: int = 2) -> Outcome:
    """Let the contenders take turns, ``warm_up`` rounds uncounted and ``rounds`` counted."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name, contender in contenders.items():
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=_contend, args=(contender, theirs), daemon=True).start()
        pipes[name].recv()  # one after the other: loading is not part of the contest
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(-warm_up, rounds), desc="rounds"):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = pipe.recv()
            if number >= 0:
                seconds[name].append(taken)
    peak, results = {}, {}
    for name, pipe in pipes.items():
        pipe.send(False)
        peak[name], results[name] = pipe.recv()
    return Outcome({name: statistics.median(taken) for name, taken in seconds.items()}, peak, results)


def _contend(contender: Contender, pipe: Connection) -> None:
    torch.set_num_threads(multiprocessing.cpu_count())
    turns: list[Turns] = []

    def get_turns() -> Turns:
        turns.append(Turns(pipe))
        return turns[0]

    contender(get_turns)
    pipe.send((turns[0].memory.read(), turns[0].result))


def real_rows(tokenizer: Any, count: int) -> list[Example]:
    """The same Rotten Tomatoes sentences for every contender, in the same order."""
    task = get_task("RottenTomatoes")
    return encode(task, sample(load_splits(task), num_train=count).train, tokenizer, 2048)


def batches(rows: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """``rows`` cut into full batches, in order."""
    return [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every contest takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    return parser


def publish(result: dict[str, Any], path: Path | None) -> None:
    """Print the result, and write it to ``path`` where one was given."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n", encoding="utf-8")


class _TakesTurns(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.turns.wait()

    def on_step_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.turns.done()
        control.should_training_stop = not self.turns.wait()


def train_in_turns(
    get_turns: Callable[[], Turns],
    model: Any,
    rows: Sequence[Example],
    size: int,
    boosters: int = 0,
    subset: LayerSubset | None = None,
    **flags: Any,
) -> None:
    """Steps of the real Trainer, from fetching the data to the update, in the order of ``rows``."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            output_dir=folder,
            xgblora=True,
            per_device_train_batch_size=size,
            max_steps=10**6,
            train_sampling_strategy="sequential",
            optim="adamw_torch",
            learning_rate=3e-3,
            zo_eps=1e-2,
            save_strategy="no",
            disable_tqdm=True,
            **{"xgblora_merge_frequency": 0} | flags,
        )
        adapters = attach(model, xgblora=True, layers=subset)
        trainer = Trainer(model, config, adapters, rows)
        for _ in range(boosters):
            for layer in adapters.layers.values():
                torch.nn.init.normal_(layer.lora_B, std=1e-4)  # a booster of zeros would be as cheap, but no booster
            trainer.ledger.merge(0, "benchmark", 0.0)
        trainer.add_callback(_TakesTurns(get_turns()))
        trainer.train()
