"""Checkpoints: which one is the newest that is whole, and what it holds beside the adapters.

That is optimizer, learning-rate schedule and random numbers, in safetensors and JSON: reading them runs no code,
whoever wrote them.
"""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from xgblora.adapters.files import LEDGER, TASK
from xgblora.adapters.plain_peft import PEFT_CONFIG, WEIGHTS
from xgblora.errors import XgbloraError
from xgblora.files import MANIFEST, read_json, remove_sealed, verify

logger = logging.getLogger(__name__)

TENSORS = "training_state.safetensors"
NUMBERS = "training_state.json"

FILES = frozenset({MANIFEST, WEIGHTS, PEFT_CONFIG, LEDGER, TASK, TENSORS, NUMBERS, TRAINER_STATE_NAME})
"""What a checkpoint or an adapter consists of."""


def write_training_state(folder: Path, optimizer: Optimizer, scheduler: LRScheduler, progress: dict[str, Any]) -> None:
    """Write what :func:`read_training_state` puts back.

    Args:
        folder: The checkpoint in progress.
        optimizer: Its state may hold tensors and numbers.
        scheduler: Of the learning rate.
        progress: Further JSON values.

    Raises:
        XgbloraError: The optimizer keeps something else.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{parameter}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(str(parameter), {})[name] = value
    about = {
        "optimizer": _kind(optimizer),
        "groups": state["param_groups"],
        "numbers": numbers,
        "scheduler": scheduler.state_dict(),
        "random": _random_numbers(tensors),
        "progress": progress,
    }
    try:
        text = json.dumps(about)  # floats to the last digit; a plateau schedule holds infinities
    except (TypeError, ValueError) as error:
        raise XgbloraError(f"--optim: the state of {_kind(optimizer)} cannot be saved ({error})") from error
    (folder / NUMBERS).write_text(text + "\n", encoding="utf-8", newline="\n")
    save_file(tensors, folder / TENSORS)


def read_training_state(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    """Put optimizer and schedule back to where they were.

    Returns:
        What was given as ``progress``.

    Raises:
        XgbloraError: Another optimizer was in use.
    """
    about, tensors = read_json(folder / NUMBERS), load_file(folder / TENSORS)
    if about["optimizer"] != _kind(optimizer):
        raise XgbloraError(
            f"{folder} was trained by {about['optimizer']}, not by {_kind(optimizer)}: give the same --optim"
        )
    state: dict[int, dict[str, Any]] = {
        int(parameter): dict(entries) for parameter, entries in about["numbers"].items()
    }
    for key, tensor in tensors.items():
        parameter, name = key.split(".", 1)
        if parameter.isdigit():
            state.setdefault(int(parameter), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
    scheduler.load_state_dict(about["scheduler"])
    progress: dict[str, Any] = about["progress"]
    return progress


def read_random_numbers(folder: Path) -> None:
    """Put the generators of Python, NumPy and torch back to where they were: rewards may draw from them."""
    about, tensors = read_json(folder / NUMBERS)["random"], load_file(folder / TENSORS)
    version, *rest = about["python"]
    random.setstate((version, tuple(tensors["random.python"].tolist()), *rest))
    kind, *rest = about["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([t for name, t in sorted(tensors.items()) if name.startswith("random.cuda")])


def _random_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Add the generators' states to ``tensors``; returns what of them is no array."""
    version, words, gauss = random.getstate()
    kind, array, *rest = np.random.get_state(legacy=True)
    tensors["random.python"] = torch.tensor(words)
    tensors["random.numpy"] = torch.from_numpy(np.asarray(array).astype(np.int64))
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i:04}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"python": [version, gauss], "numpy": [kind, *rest]}


def _kind(optimizer: Optimizer) -> str:
    """Name of the torch optimizer; accelerate wraps it."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    folders = (folder for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() and _step(folder) >= 0)
    return sorted(folders, key=_step)


def rotate(run: Path, step: int, limit: int | None, best: Path | None) -> None:
    """Remove checkpoints until ``limit`` are left, by their steps: clocks step back.

    The one of ``step``, just written, stays, and so does the best. Later steps, which a run that went back has yet to
    reach again, go first, then the earliest. Of each, only files of ours are removed.
    """
    if limit is None or limit <= 0:
        return
    kept = {folder for folder in (checkpoint_folder(run, step), best) if folder is not None}
    others = [folder for folder in checkpoints(run) if folder not in kept]
    others.sort(key=lambda folder: (_step(folder) < step, _step(folder)))
    for folder in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
        remove_sealed(folder, FILES)


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where it has none at all.

    A warning names the file of a newer one that is damaged. Raises :class:`XgbloraError` where no checkpoint is whole.
    """
    damage = ""
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
        except XgbloraError as error:
            damage = str(error)
            logger.warning("Not resuming from %s: %s", folder.name, error)
        else:
            return folder
    if damage:
        raise XgbloraError(f"no checkpoint of {run} is whole: {damage}; --overwrite_output_dir starts again")
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1
