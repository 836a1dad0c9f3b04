"""What a training will take, before the model is loaded: memory, time, and bytes that are read.

Steps are really trained, on the first two layers and on a few more: those of the files that weights stay in, or of the
architecture with random weights. What these add, every further layer adds. Nothing about an architecture is assumed.
"""

import copy
import gc
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from xgblora.adapters.adapters import attach
from xgblora.base.architecture import context_length
from xgblora.base.cpu_layout import return_freed_memory
from xgblora.base.load import load_model_config, load_tokenizer, mapped_files, read_in_place
from xgblora.config import RunConfig, changed
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.progress import quiet
from xgblora.runs.folder import task_of
from xgblora.tasks import begun, encode, load_splits, sample
from xgblora.training.trainer import Trainer

logger = logging.getLogger(__name__)

SCALED_BYTES = {4: 0.5 + 4 / 64, 8: 1 + 2 / 32}
"""Bytes of a weight in NF4 and in Q8_0, with its share of a scale."""

FREE = 2**62
"""A memory budget that keeps every weight."""

TIMED_LAYERS = 6
"""The more, the less a few slow milliseconds count."""

TIMED_STEPS = 4
TIMED_SECONDS = 3.0
"""So many steps are timed at most, and no more after so many seconds."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training."""

    process: int
    """Python and the libraries, resident; 0 where the model is on a GPU."""
    weights: int
    """The base model as it is stored, in memory or in a mapped file."""
    training: int
    """Adapters, optimizer, and what one step computes of a batch."""
    budget: int | None = None
    """What ``--memory_budget`` allows for all of it."""

    @property
    def stays(self) -> int:
        """Those of the weights that stay in memory."""
        if self.budget is None:
            return self.weights
        return max(0, min(self.weights, self.budget - self.process - self.training))

    @property
    def reads(self) -> int:
        """Those of the weights that every step reads again."""
        return self.weights - self.stays

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.stays + self.training


@quiet("xgblora")  # of steps that are thrown away nobody wants to hear
def predict(config: RunConfig, model: PreTrainedConfig, rows: Sequence[Example]) -> Memory:
    """Predict the peak memory of a training by the options' or the text loss.

    All layers are counted as trained: ``--xgblora_layers`` takes less, beside what ``--activation_cache_gb`` lets it
    keep. Call it before the model is loaded: what is resident now counts as the process'.

    Args:
        config: The run's.
        model: The configuration of its model.
        rows: Its examples, of which the longest are taken.
    """
    longest = sorted(rows, key=lambda row: row.tokens)[-config.per_device_train_batch_size :]
    layers = model.get_text_config().num_hidden_layers
    # Not one: the lowest layer keeps less for the backward pass, as nothing before it is trained.
    few, more = (_shortened(model, min(count, layers)) for count in (2, 3))
    if mapped_files(config.model_name, config.unpack, config.memory_bytes):
        measure_training(config, few, longest)  # brings what unpacks weights, and a tile that all layers share
        gc.collect()
        return_freed_memory()
    process = psutil.Process().memory_info().rss if config.device.type == "cpu" else 0
    (made, two), (_, three) = (measure_training(config, architecture, longest) for architecture in (few, more))
    training = max(made, two + max(0, layers - 2) * max(0, three - two))
    return Memory(process, _stored(config, model), training, config.memory_bytes)


@quiet("xgblora")
def predict_seconds(config: RunConfig, model: PreTrainedConfig, rows: Sequence[Example]) -> float:
    """Predict the seconds of a step, on the CPU and without waiting for the disk.

    Args:
        config: As for :func:`predict`, and so is ``model``.
        rows: The run's examples. Some of all lengths are taken.
    """
    batch = config.per_device_train_batch_size
    by_length = sorted(rows, key=lambda row: row.tokens)
    usual = by_length[len(rows) // batch // 2 :: max(1, len(rows) // batch)][:batch]
    layers = model.get_text_config().num_hidden_layers
    few, most = (min(count, layers) for count in (2, TIMED_LAYERS))
    quick, slow = (measure_seconds(config, _shortened(model, count), usual) for count in (few, most))
    return quick + (layers - few) * max(0.0, slow - quick) / max(1, most - few)


def free(device: torch.device) -> int:
    """Bytes that a training could take now, beside what this process has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _stored(config: RunConfig, model: PreTrainedConfig) -> int:
    """Bytes of the base model's weights."""
    if files := mapped_files(config.model_name, config.unpack, config.memory_bytes):
        return sum(file.stat().st_size for file in files)
    if hasattr(model, "quantization_config") and (packed := [*Path(config.model_name).glob("*.safetensors")]):
        return sum(file.stat().st_size for file in packed)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(
            model, dtype=config.torch_dtype, trust_remote_code=config.trust_remote_code
        )
    tensors = itertools.chain(whole.parameters(), whole.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if config.bits is not None:
        head = whole.get_output_embeddings()
        layers = (module for module in whole.modules() if type(module) is nn.Linear and module is not head)
        weights = sum(layer.weight.numel() for layer in layers)
        size -= int(weights * (config.torch_dtype.itemsize - SCALED_BYTES[config.bits]))
    return size


def _shortened(model: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The architecture with its first layers alone."""
    short = copy.deepcopy(model)
    text = short.get_text_config()
    if getattr(text, "layer_types", None):  # one kind of attention a layer
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return short


def _first_layers(config: RunConfig, architecture: PreTrainedConfig) -> PreTrainedModel:
    """A model of these few layers: those of the files that weights stay in, else random ones."""
    if files := mapped_files(config.model_name, config.unpack, config.memory_bytes):
        budget = None if config.memory_bytes is None else FREE
        model = read_in_place(
            files,
            architecture,
            config.torch_dtype,
            budget,
            first_layers=True,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=config.torch_dtype, trust_remote_code=config.trust_remote_code
        )
    return model.requires_grad_(False).eval()


@contextmanager
def _training(config: RunConfig, base: PreTrainedModel, rows: list[Example], steps: int) -> Iterator[Trainer]:
    """A training of the base, of so many steps, that leaves nothing behind."""
    settings: dict[str, Any] = {"max_steps": steps, "save_strategy": "no", "eval_strategy": "no", "report_to": []}
    settings |= {
        "eval_steps": None,
        "early_stopping_boosters": 0,
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
    }
    settings |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0}
    settings |= {"disable_tqdm": True, "torch_compile": False, "use_cpu": True, "xgblora_layers": 0}
    settings |= {"gradient_accumulation_steps": 1, "max_bad_steps": 9, "zo_eps": 1e-2}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        adapters = attach(base, config.rank, config.lora_alpha, config.lora_target_modules, config.seed, config.xgblora)
        yield Trainer(base, changed(config, output_dir=folder, **settings), adapters, rows)


def training_rows(config: RunConfig, model: PreTrainedConfig) -> list[Example]:
    """The training rows of a run; a batch of ``--max_length`` where its data cannot be had.

    Args:
        config: The run's.
        model: The configuration of its model.
    """
    length = min(config.max_length, context_length(model.get_text_config()) or config.max_length)
    try:
        task = task_of(config)
        num_dev = task.num_dev if config.num_dev is None else config.num_dev
        train = sample(
            load_splits(task, config.data_dir), config.train_rows, num_dev, config.num_eval, config.train_set_seed
        ).train
        tokenizer = load_tokenizer(config.model_name, config.trust_remote_code)
        return encode(begun(task, config.beginning, tokenizer), train, tokenizer, length)
    except XgbloraError as error:
        logger.info("Note: %s; memory is predicted for rows of --max_length %d", error, length)
        return [Example([1] * (length - 1), [[1], [2]], 0)] * config.per_device_train_batch_size


def predictable(config: RunConfig) -> bool:
    """Whether :func:`predict` knows such trainings."""
    return not (config.fits_boosters or config.reward)


def expected_bytes(config: RunConfig) -> int:
    """Bytes of a run at its peak; where :func:`predict` does not know it, roughly: libraries, and the weights twice."""
    model = load_model_config(config.model_name, config.trust_remote_code)
    if config.trainer != "none" and predictable(config):
        return predict(config, model, training_rows(config, model)).total
    return psutil.Process().memory_info().rss + 2 * _stored(config, model)


def measure_seconds(config: RunConfig, architecture: PreTrainedConfig, rows: list[Example]) -> float:
    """Seconds of the fastest of a few steps, but for the first."""
    clock = _Clock()
    with _training(config, _first_layers(config, architecture), rows, 1 + TIMED_STEPS) as trainer:
        trainer.add_callback(clock)
        trainer.train()
    return min(clock.seconds[1:])


class _Clock(TrainerCallback):
    """Times steps, and ends a training whose steps are slow."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)
        if len(self.seconds) > 1 and sum(self.seconds) > TIMED_SECONDS:
            control.should_training_stop = True


def measure_training(config: RunConfig, architecture: PreTrainedConfig, rows: list[Example]) -> tuple[int, int]:
    """Bytes at the peak, beside the base's weights: of what comes before a step, which no layer adds to, and of one."""
    with _measured():  # torch counts as freed only what it has seen allocated: zo lays the weights out anew
        base = _first_layers(config, architecture)
    with ExitStack() as stack:
        with _measured() as before:
            trainer = stack.enter_context(_training(config, base, rows, 1))
        with _measured() as step:
            trainer.train()
        pairs = sum(p.numel() * p.element_size() for p in trainer.adapters.parameters())
    return before[0], pairs + step[0]


@contextmanager
def _measured() -> Iterator[list[int]]:
    """Bytes at the peak of the block, by torch's own record of what it allocates and frees."""
    peak: list[int] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells the console of its start and end
    gc.collect()  # else what was left before would be freed, and counted, at some moment of the block
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    peak.append(max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0)))
