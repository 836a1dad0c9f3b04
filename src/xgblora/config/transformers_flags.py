"""The flags of transformers' TrainingArguments: which ones work here, and why the others are refused."""

from typing import Any

from xgblora.config.conditions import (
    ADAM,
    BACKPROP,
    BEST,
    CLASSIC,
    EVALUATES,
    GRADIENTS,
    ONE_STEP,
    RATED,
    SCHEDULED,
    TRACKIO,
    WORKERS,
)
from xgblora.config.flag import NOT_NEGATIVE, POSITIVE, Check, Flag, at_least

SEED = Check(lambda value: 0 <= value < 2**32, "0 to 4294967295")
BETA = Check(lambda value: 0 <= value < 1, "at least 0 and below 1")
WATCHED = Flag(identity=False)
ON_WORKERS = Flag(WORKERS, identity=False)
ON_TRACKIO = Flag(TRACKIO, identity=False)


def _each(table: dict[str, Any]) -> dict[str, Any]:
    """A table by single names, from one whose keys are names with spaces between them."""
    return {name: entry for names, entry in table.items() for name in names.split()}


ALLOWED: dict[str, Flag] = _each(
    {
        "activation_checkpointing gradient_checkpointing": Flag(BACKPROP, identity=False),
        "adam_beta1 adam_beta2": Flag(CLASSIC, RATED, ADAM, BETA),
        "adam_epsilon": Flag(CLASSIC, RATED, ADAM, NOT_NEGATIVE),
        "bf16 fp16": WATCHED,  # the same as --load_bfloat16 and --load_float16, which decide
        "data_seed seed": Flag(SEED),
        "dataloader_drop_last full_determinism num_train_epochs tf32 use_cpu": Flag(),
        "dataloader_in_order": Flag(WORKERS),
        "dataloader_multiprocessing_context dataloader_persistent_workers": ON_WORKERS,
        "dataloader_prefetch_factor": Flag(WORKERS, at_least(1), identity=False),
        "dataloader_num_workers": Flag(NOT_NEGATIVE, identity=False),
        "dataloader_pin_memory": WATCHED,
        "disable_tqdm include_num_input_tokens_seen log_level output_dir resume_from_checkpoint run_name": WATCHED,
        "eval_delay eval_on_start": Flag(EVALUATES),
        "eval_steps": Flag(POSITIVE),
        "gradient_accumulation_steps": Flag(at_least(1), ONE_STEP, GRADIENTS),
        "greater_is_better metric_for_best_model": Flag(BEST),
        "load_best_model_at_end logging_first_step logging_strategy save_strategy": Flag(),
        "lr_scheduler_kwargs": Flag(CLASSIC, RATED, SCHEDULED),
        "warmup_steps": Flag(CLASSIC, RATED, SCHEDULED, NOT_NEGATIVE),
        "optim_args": Flag(CLASSIC, RATED),
        "weight_decay": Flag(CLASSIC, RATED, NOT_NEGATIVE),
        "per_device_eval_batch_size": Flag(at_least(1)),
        "ddp_timeout": Flag(at_least(1), identity=False),
        "project trackio_bucket_id trackio_space_id trackio_static_space_id": ON_TRACKIO,
        "train_sampling_strategy": Flag(
            Check(
                lambda value: value in ("random", "sequential"), "random or sequential (rows hold no padding to save)"
            )
        ),
    }
)
"""Those that work as transformers documents them, beside the ones that :class:`RunConfig` declares anew."""

OWN_PROCESSES = "processes share forwards in this package's own way: torchrun -m xgblora (docs/scale.md)"
HUB = "a finished run is uploaded by xgblora push RUN OWNER/NAME"
OWN_EVALUATION = "evaluation packs its own batches and keeps one number an example"
AS_IT_IS = "the base is called as it is"

REFUSED: dict[str, str] = _each(
    {
        "accelerator_config ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph": OWN_PROCESSES,
        "ddp_find_unused_parameters deepspeed fsdp fsdp_config local_rank": OWN_PROCESSES,
        "log_level_replica log_on_each_node parallelism_config save_on_each_node": OWN_PROCESSES,
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs": "whole decoder layers are computed again",
        "batch_eval_metrics eval_accumulation_steps eval_do_concat_batches eval_use_gather_object": OWN_EVALUATION,
        "include_for_metrics prediction_loss_only": OWN_EVALUATION,
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token push_to_hub": HUB,
        "liger_kernel_config neftune_noise_alpha use_liger_kernel": AS_IT_IS,
        "auto_find_batch_size": "a batch that does not fit stops the run: lower --per_device_train_batch_size",
        "average_tokens_across_devices": "losses are means over examples",
        "bf16_full_eval": "use --load_bfloat16",
        "fp16_full_eval": "use --load_float16",
        "debug": "a step that is not finite is diagnosed as it happens",
        "do_train": "--trainer none is the run that does not train",
        "do_eval do_predict": "--eval_strategy says when to evaluate, and every run ends with an evaluation",
        "enable_jit_checkpoint": "a signal lets the step finish and saves a checkpoint",
        "ignore_data_skip": "a resumed run goes on with the examples that come next",
        "label_names": "the label is part of every example",
        "label_smoothing_factor": "losses are the task's own",
        "length_column_name": "rows hold no padding to save",
        "logging_nan_inf_filter": "it hides a diverged loss; such a run is stopped",
        "optim_target_modules": "--lora_target_modules says which layers train",
        "remove_unused_columns": "the collator reads its own columns",
        "restore_callback_states_from_checkpoint": "a resumed run always goes on in the state it was in",
        "save_only_model": "a checkpoint is small: it holds all that going on needs",
        "skip_memory_metrics": "metrics.json has the peak memory",
        "torch_compile_backend torch_compile_mode": "packed forwards compile in torch's default way: --torch_compile",
        "torch_empty_cache_steps": "freed memory is returned after every step",
        "use_cache": "answers are written with a cache, all else without one",
    }
)
"""Those that would do nothing, or harm, and what to do instead."""
