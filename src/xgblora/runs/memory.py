"""The memory that a training will take, before the model is loaded.

One step on the longest rows is really trained, on the first two and on the first three layers of the architecture with
random weights; what the third layer adds, every further layer adds. Nothing about an architecture is assumed.
"""

import copy
import gc
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig

from xgblora.adapters.adapters import attach
from xgblora.base.load import packed_file
from xgblora.config import RunConfig, changed
from xgblora.data.batch import Example
from xgblora.training.trainer import Trainer


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training."""

    process: int
    """Python and the libraries, resident; 0 where the model is on a GPU."""
    weights: int
    """The base model as it is stored, in memory or in a mapped file."""
    training: int
    """Adapters, optimizer, and what one step computes of a batch."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.weights + self.training


def predict(config: RunConfig, model: PreTrainedConfig, rows: Sequence[Example]) -> Memory:
    """Predict the peak memory of a training by the options' or the text loss.

    All layers are counted as trained: ``--xgblora_layers`` takes less, beside what ``--activation_cache_gb`` lets it
    keep. Call it before the model is loaded: what is resident now counts as the process'.

    Args:
        config: The run's.
        model: The configuration of its model.
        rows: Its examples, of which the longest are taken.
    """
    process = psutil.Process().memory_info().rss if config.device.type == "cpu" else 0
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(
            model, dtype=config.torch_dtype, trust_remote_code=config.trust_remote_code
        )
    tensors = itertools.chain(whole.parameters(), whole.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if (file := packed_file(config.model_name, config.unpack)) is not None:
        weights = file.stat().st_size
    longest = sorted(rows, key=lambda row: row.tokens)[-config.per_device_train_batch_size :]
    # Not one: the lowest layer keeps less for the backward pass, as nothing before it is trained.
    (made, two), (_, three) = (measure_training(config, _shortened(model, layers), longest) for layers in (2, 3))
    layers = model.get_text_config().num_hidden_layers
    return Memory(process, weights, max(made, two + (layers - 2) * max(0, three - two)))


def free(device: torch.device) -> int:
    """Bytes that a training could take now, beside what this process has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _shortened(model: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The architecture with its first layers alone."""
    short = copy.deepcopy(model)
    text = short.get_text_config()
    if getattr(text, "layer_types", None):  # one kind of attention a layer
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return short


def measure_training(config: RunConfig, architecture: PreTrainedConfig, rows: list[Example]) -> tuple[int, int]:
    """Bytes at the peak, beside the base's weights: of what comes before a step, which no layer adds to, and of one."""
    settings: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": []}
    settings |= {"disable_tqdm": True, "torch_compile": False, "use_cpu": True, "xgblora_layers": 0}
    settings |= {"gradient_accumulation_steps": 1, "max_bad_steps": 9, "zo_eps": 1e-2}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        with _measured():  # torch counts as freed only what it has seen allocated: zo lays the weights out anew
            base = (
                AutoModelForCausalLM.from_config(
                    architecture, dtype=config.torch_dtype, trust_remote_code=config.trust_remote_code
                )
                .requires_grad_(False)
                .eval()
            )
        with _measured() as before:
            adapters = attach(
                base, config.rank, config.lora_alpha, config.lora_target_modules, config.seed, config.xgblora
            )
            trainer = Trainer(base, changed(config, output_dir=folder, **settings), adapters, rows)
        with _measured() as step:
            trainer.train()
        pairs = sum(p.numel() * p.element_size() for p in adapters.parameters())
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
