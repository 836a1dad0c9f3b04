"""The configuration of one run: the flags as they were given, and what follows from them."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from xgblora import hf
from xgblora.config import precision
from xgblora.config.conditions import drawn, fitted
from xgblora.config.describe import warn_rank
from xgblora.config.flag import bytes_of, default_of
from xgblora.config.flags import Flags
from xgblora.config.rules import check
from xgblora.errors import XgbloraError, one_line

logger = logging.getLogger(__name__)


@dataclass
class RunConfig(Flags):
    """One run: one model, one task, one method, one seed.

    The command line parses it with transformers' own parser; a library user constructs it.

    Raises:
        XgbloraError: A value that cannot work, or flags that contradict each other.

    Examples:
        >>> config = RunConfig(output_dir="runs/mine", xgblora=True, xgblora_steps_per_iteration=50, use_cpu=True)
        >>> config.rank, config.scaling
        (1, 16.0)
    """

    def __post_init__(self) -> None:
        self.asked = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        """Every setting as it was given, before anything followed from it."""
        self._settle()
        check(self)
        # Ours compiles layer by layer, on the packed path: accelerate must not wrap the model as well.
        compile_layers, self.torch_compile = self.torch_compile, False
        # Ours works in eval mode, and for whatever architecture: transformers must not switch on its own as well.
        checkpoints = bool(self.gradient_checkpointing or self.activation_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing = False
        try:
            super().__post_init__()
        except Exception as error:  # of many kinds: files that flags name, versions that they want
            raise XgbloraError(one_line(error, 1000)) from error
        self.torch_compile, self.gradient_checkpointing = compile_layers, checkpoints
        if self.trainer != "none" and (problem := hf.try_optimizer(self)):
            raise XgbloraError(problem)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to copy to; it would only warn

    def _settle(self) -> None:
        """Fill in what was left open, and what follows from other flags."""
        if self.recipe == "boost":
            if self.lora:
                raise XgbloraError("--recipe boost is a form of XGBLoRA: leave out --lora")
            self.xgblora = True
        for name, value in self.derived().items():
            setattr(self, name, value)
        if self.reward is not None:
            self.objective = "reward"
        if self.objective == "reward" and self.reward_completions is None:
            exact = self.trainer == "regular" or self.recipe == "boost"
            self.reward_completions = "expected" if exact else "greedy"
        self._settle_precision()
        # The base is loaded in its precision; autocast on top would take the adapters out of float32.
        self.fp16 = self.bf16 = False
        if self.xgblora:
            if self.lora_r not in (None, 1):
                warn_rank(self.lora_r)
            self.lora_r = 1
        elif self.lora_r is None:
            self.lora_r = 8
        if self.task_file is not None:
            stem = Path(self.task_file).stem
            if self.task_name not in (type(self).task_name, stem):
                raise XgbloraError("--task_name and --task_file name two tasks: give one of them")
            self.task_name = self.asked["task_name"] = stem
        if self.output_dir is None:
            self.output_dir = f"runs/{self.task_name}_{self.method}_seed{self.seed}"
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        if self.disable_tqdm is None:
            self.disable_tqdm = False
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.num_train is None:
            self.num_train = 0 if self.trainer == "none" and self.readout == "words" else 1000
        if self.prompt_beginning is None:
            self.prompt_beginning = "auto" if self.fits_boosters else "none"
        if self.early_stopping_boosters is None:
            judged = self.recipe == "boost" and self.num_dev != 0 and not self.load_best_model_at_end
            self.early_stopping_boosters = self.boost_boosters if judged else 0
        if self.no_auto_device:
            logger.info("--no_auto_device has no effect: the device is the one that transformers picks.")

    def _settle_precision(self) -> None:
        half = {"float16": self.load_float16 or self.fp16, "bfloat16": self.load_bfloat16 or self.bf16}
        named = {name for name, asked in half.items() if asked} | ({self.dtype} - {"auto"})
        if len(named) > 1:
            raise XgbloraError(f"{' and '.join(sorted(named))} are two precisions of the base: give --dtype alone")
        self.take_dtype(named.pop() if named else precision.choose(self))

    def take_dtype(self, dtype: str) -> None:
        """Let the base be loaded in this precision."""
        self.dtype = dtype  # type: ignore[assignment]
        self.load_float16, self.load_bfloat16 = dtype == "float16", dtype == "bfloat16"

    def derived(self) -> dict[str, Any]:
        """The settings that the recipe decides: with ``boost`` a step is a booster."""
        if self.recipe == "boost":
            steps = {"max_steps": self.boost_boosters, "per_device_train_batch_size": self.boost_fitted}
            steps |= dict.fromkeys(("xgblora_steps_per_iteration", "logging_steps", "save_steps"), 1)
            return steps | ({} if self.eval_steps is None else {"eval_steps": 1})
        defaults = {"per_device_train_batch_size": 8, "logging_steps": 10, "save_steps": 500}
        return {name: value for name, value in defaults.items() if getattr(self, name) is None}

    def given(self, name: str) -> bool:
        """Whether a setting was given another value than its default."""
        fields: dict[str, dataclasses.Field[Any]] = type(self).__dataclass_fields__
        return bool(self.asked[name] != default_of(fields[name]))

    @property
    def method(self) -> Literal["lora", "xgblora"]:
        """The method; LoRA unless ``xgblora`` was asked for."""
        return "xgblora" if self.xgblora else "lora"

    @property
    def layer_choice(self) -> Literal["random", "top"]:
        """Which layers a subset takes."""
        return self.xgblora_layer_choice or ("top" if self.fits_boosters else "random")

    @property
    def rank(self) -> int:
        """Rank of the pair in training: 1 for XGBLoRA."""
        assert self.lora_r is not None  # settled
        return self.lora_r

    @property
    def train_rows(self) -> int:
        """Training rows that are sampled."""
        assert self.num_train is not None  # settled
        return self.num_train

    @property
    def scaling(self) -> float:
        """alpha / rank, the factor of B A x."""
        return self.lora_alpha / self.rank

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the frozen base."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def memory_bytes(self) -> int | None:
        """``memory_budget`` in bytes."""
        return None if self.memory_budget is None else bytes_of(self.memory_budget)

    @property
    def bits(self) -> Literal[4, 8] | None:
        """Of a weight, where the base is packed as it is loaded."""
        return 4 if self.load_4bit else 8 if self.load_8bit else None

    @property
    def boost_fitted(self) -> int:
        """Recipe boost: examples that a booster is fitted on, at most."""
        return self.boost_examples - self.boost_searched(self.boost_examples)

    def boost_searched(self, rows: int) -> int:
        """Recipe boost: how many of ``rows`` training rows are set aside to find step lengths."""
        return max(1, round(min(rows, self.boost_examples) * self.boost_search_share))

    @property
    def beginning(self) -> str:
        """What stands in front of every prompt: "none", "auto" or a text."""
        assert self.prompt_beginning is not None  # settled
        return self.prompt_beginning

    @property
    def keep_file(self) -> Path | None:
        """The file of ``--boost_keep``, where it names one."""
        return None if self.boost_keep in (None, "none", "own") else Path(self.boost_keep)

    @property
    def fits_boosters(self) -> bool:
        """Whether pairs are fitted to what layers read: by recipe boost, or as each begins."""
        return fitted(self)

    @property
    def draws_pairs(self) -> bool:
        """Whether pairs are drawn from activations, so that steps find their length alone."""
        return drawn(self)

    @property
    def makes_boosters(self) -> bool:
        """Whether a run of this configuration has boosters."""
        return self.xgblora

    def resolved(self) -> dict[str, Any]:
        """Every setting as JSON values, the content of ``config.json``."""
        return json.loads(json.dumps(self.to_dict(), default=str))  # type: ignore[no-any-return]
