"""The fence around transformers: every private name of it that this package overrides or reads is in this file.

What is overridden is checked when this module is imported, so that another version of transformers is refused in one
line, and not by a step that silently no longer happens.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from xgblora.errors import XgbloraError

SUPPORTED = "transformers>=5.20,<6"

OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_load_best_model": (),
    "_run_epoch": (
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ),
}
"""Hooks of ``transformers.Trainer`` and their parameters, as :class:`HookedTrainer` overrides them."""


def differences() -> list[str]:
    """What the installed transformers lacks, or has with another signature."""
    missing = []
    for name, expected in OVERRIDDEN.items():
        hook = getattr(transformers.Trainer, name, None)
        if hook is None or tuple(inspect.signature(hook).parameters)[1:] != expected:
            missing.append(f"Trainer.{name}({', '.join(expected)})")
    if not isinstance(getattr(PreTrainedConfig, "_attn_implementation", None), property):
        missing.append("PreTrainedConfig._attn_implementation")
    if not hasattr(TrainingArguments, "_setup_devices"):
        missing.append("TrainingArguments._setup_devices")
    return missing


if missing := differences():
    raise ImportError(
        f"xgblora does not work with transformers {transformers.__version__} (it lacks {'; '.join(missing)}): run  "
        f'python -m pip install "{SUPPORTED}"'
    )


class HookedTrainer(transformers.Trainer):
    """transformers' Trainer with its private hooks under public names, for a subclass to override."""

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        # transformers trains a quantised model only where adapters are attached, and knows PEFT's alone.
        attached = getattr(model, "_hf_peft_config_loaded", False)
        model._hf_peft_config_loaded = True
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            model._hf_peft_config_loaded = attached
        for callback in self.callback_handler.callbacks:
            if type(callback).__module__.startswith("transformers.integrations"):
                name = type(callback).__name__.removesuffix("Callback")
                callback.on_train_begin = partial(_start_tracker, name, callback.on_train_begin)

    def save_adapters(self, folder: Path) -> None:
        """Write what was trained, in place of the whole model."""

    def write_checkpoint(self) -> None:
        """Write the checkpoint of the step just taken."""

    def load_adapters(self, checkpoint: Path) -> None:
        """Read what was trained, before training goes on."""

    def load_training_state(self, checkpoint: Path) -> None:
        """Read optimizer, learning-rate schedule and progress."""

    def load_random_numbers(self, checkpoint: Path) -> None:
        """Put the global random generators back to where they were."""

    def load_best(self, checkpoint: Path) -> None:
        """Read what was trained from the best checkpoint, after training."""

    def is_over(self) -> bool:
        """Whether no step is left, asked before each epoch. transformers asks only after a step."""
        return False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.save_adapters(Path(str(output_dir or self.args.output_dir)))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.write_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.load_adapters(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_training_state(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_random_numbers(Path(checkpoint))

    def _load_best_model(self) -> None:
        self.load_best(Path(self.state.best_model_checkpoint))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' count is of backpropagation, and walks over all weights in every step."""
        return 0

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)


def _start_tracker(name: str, start: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Let a tracker reach its server or its folder, before the first step."""
    try:
        start(*args, **kwargs)
    except Exception as error:  # of the tracker's own kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise XgbloraError(f"--report_to: {name} could not be started ({reason})") from error


def try_optimizer(args: TrainingArguments) -> str | None:
    """Make the optimizer and the learning-rate schedule that ``args`` ask for, of a single number.

    Returns:
        Why they cannot be made, or which of ``args.optim_args`` does nothing; None where all is well.
    """
    number = torch.nn.Parameter(torch.zeros(1, 1))
    optim, schedule_name = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
    try:
        kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([number], **settings)
        number.grad = torch.zeros_like(number)
        optimizer.step()
    except Exception as error:  # a package is missing, a value is refused, the model is wanted: of many kinds
        return f"--optim {optim}: {error}"
    if args.optim_args:
        without = copy.copy(args)
        for part in args.optim_args.split(","):
            without.optim_args = ",".join(other for other in args.optim_args.split(",") if other != part)
            if transformers.Trainer.get_optimizer_cls_and_kwargs(without) == (kind, settings):
                return f"--optim_args {part} has no effect with --optim {optim}"
    try:
        schedule = dict(args.lr_scheduler_kwargs or {})
        transformers.get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=schedule)
    except Exception as error:  # settings that it does not know, or lacks
        return f"--lr_scheduler_type {schedule_name}: {error} (set --lr_scheduler_kwargs)"
    return None


def dequantize(packed: torch.Tensor, kind: int) -> torch.Tensor:
    """Unpack whole GGUF blocks (blocks, bytes) or rows of them to float32, flat."""
    from transformers.integrations.gguf.dequant import dequantize as theirs

    return theirs(packed, kind)


class GgufNames:
    """Which weight of a model each tensor of a .gguf file is, and what it has been through.

    Args:
        model: The model, its weights anywhere.
        architecture: As the file names it.

    Raises:
        XgbloraError: transformers does not read this architecture by these tables.
    """

    def __init__(self, model: PreTrainedModel, architecture: str) -> None:
        from transformers import modeling_gguf_pytorch_utils as tables
        from transformers.integrations.gguf import is_gguf_arch_supported

        if is_gguf_arch_supported(architecture):
            raise XgbloraError(f"{architecture} files cannot stay packed: give --unpack")
        processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        self._collected: dict[str, Any] = {"tensors": {}}
        self.names: Mapping[str, str] = tables.get_gguf_hf_weights_map(model, self._processor)
        """{the file's name: the model's}."""

    def process(self, values: np.ndarray, name: str) -> tuple[str | None, np.ndarray]:
        """The model's name for a tensor of the file, and its values as the model has them.

        The name is None for a tensor that the model has no place for, and for a part of a larger weight, of which
        :meth:`collected` speaks in the end.
        """
        settings = {"tensor_key_mapping": self.names, "parsed_parameters": self._collected}
        result = self._processor.process(weights=values, name=name, **settings)
        return self.names.get(result.name), result.weights

    def collected(self) -> dict[str, np.ndarray]:
        """Weights of the model, by its names, that were made of several tensors of the file."""
        return {name: tensor.numpy() for name, tensor in self._collected["tensors"].items()}


class FolderNames:
    """Which weight of a model each tensor of a folder's files is: the one of the same name.

    Args:
        model: The model, its weights anywhere.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        prefix = f"{model.base_model_prefix}."
        self.names: Mapping[str, str] = {name.removeprefix(prefix): name for name in weights} | {n: n for n in weights}
        """{the file's name: the model's}."""
        self._ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._buffers = {name for name, _ in model.named_buffers()}
        self._parts = bool(model.config.sub_configs)

    def may_be_left(self, name: str) -> bool:
        """Whether transformers itself would read nothing from a tensor that is no weight of the model."""
        return self._parts or name in self._buffers or any(re.search(pattern, name) for pattern in self._ignored)

    def process(self, values: np.ndarray, name: str) -> tuple[str | None, np.ndarray]:
        """The model's name for a tensor of the files, and its values, which are the model's."""
        return self.names.get(name), values

    def collected(self) -> dict[str, np.ndarray]:
        """No weight is made of several tensors."""
        return {}


@contextmanager
def hollow() -> Iterator[None]:
    """Models made inside the block have weights without memory (on the meta device); buffers are real."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def use_one_device(args: TrainingArguments) -> None:
    """Keep transformers from splitting a batch over several GPUs."""
    args._n_gpu = min(args.n_gpu, 1)


def attention_of(model: PreTrainedModel) -> str:
    """Name of the attention function that forwards run now."""
    name: str = model.config._attn_implementation
    return name


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run forwards inside the block with a registered attention function; then restore the model's own."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
