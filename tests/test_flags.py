"""Every flag does something that can be seen, or is refused: the list is the dataclass itself."""

import contextlib
import dataclasses
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import ARCHITECTURES, build, byte_tokenizer, examples
from xgblora import Ledger, RunConfig, Trainer, XgbloraError, attach
from xgblora.cli import main
from xgblora.config.flag import default_of
from xgblora.config.flags import UNSUPPORTED
from xgblora.config.transformers_flags import ALLOWED, REFUSED
from xgblora.runs.experiment import ExperimentConfig, arms

SHORT = "--max_steps 6 --save_steps 3 --logging_steps 2 --learning_rate 1e-2 --zo_eps 1e-2 --lora --lora_r 2"
ADAM = f"{SHORT} --optim adamw_torch"
EVALS = f"{SHORT} --eval_steps 2"
BEST = f"{EVALS} --load_best_model_at_end true --save_steps 2 --learning_rate 1.0"
BOOSTS = SHORT.replace("--lora --lora_r 2", "--xgblora --xgblora_steps_per_iteration 2")
EPOCHS = SHORT.replace("--lora --lora_r 2", "--xgblora").replace("--max_steps 6", "--num_train_epochs 3")
WAITS = BOOSTS.replace("--xgblora_steps_per_iteration 2", "--xgblora_use_adaptive_merge --xgblora_patience 1")
WAITS = WAITS.replace("--max_steps 6", "--max_steps 20")
RECIPE = "--recipe boost --boost_boosters 2 --boost_examples 32"
DRAWN = f"{BOOSTS} --xgblora_init activations"
WORTH = f"{SHORT} --reward f1"

EFFECTS: dict[str, tuple[str, str]] = {
    "per_device_train_batch_size": (SHORT, "4"),
    "num_train_epochs": (EPOCHS, "2"),
    "max_steps": (SHORT, "5"),
    "learning_rate": (SHORT, "2e-2"),
    "lr_scheduler_type": (SHORT, "linear"),
    "lr_scheduler_kwargs": (f"{SHORT} --lr_scheduler_type polynomial", '{"power":3.0}'),
    "warmup_steps": (f"{SHORT} --lr_scheduler_type linear", "3"),
    "optim": (SHORT, "adamw_torch"),
    "optim_args": (f"{SHORT} --optim rmsprop", "momentum=0.9"),
    "weight_decay": (ADAM, "0.5"),
    "adam_beta1": (ADAM, "0.5"),
    "adam_beta2": (ADAM, "0.5"),
    "adam_epsilon": (ADAM, "1.0"),
    "gradient_accumulation_steps": (SHORT, "2"),
    "max_grad_norm": (SHORT, "0.01"),
    "bf16": (SHORT, "true"),
    "fp16": (SHORT, "true"),
    "logging_strategy": (SHORT, "epoch"),
    "logging_steps": (SHORT, "1"),
    "logging_first_step": (SHORT, "true"),
    "include_num_input_tokens_seen": (SHORT, "true"),
    "eval_strategy": (SHORT, "epoch"),
    "eval_steps": (SHORT, "2"),
    "eval_delay": (EVALS, "3"),
    "per_device_eval_batch_size": (EVALS, "1"),
    "eval_on_start": (EVALS, "true"),
    "save_strategy": (SHORT, "no"),
    "save_steps": (SHORT, "2"),
    "save_total_limit": (SHORT, "1"),
    "load_best_model_at_end": (f"{EVALS} --save_steps 2 --learning_rate 1.0", "true"),
    "metric_for_best_model": (BEST, "accuracy"),
    "greater_is_better": (BEST, "true"),
    "seed": (SHORT, "7"),
    "data_seed": (SHORT, "7"),
    "dataloader_drop_last": (SHORT.replace("--max_steps 6", "--num_train_epochs 2") + " --num_train 20", "true"),
    "train_sampling_strategy": (SHORT, "sequential"),
    "resume_from_checkpoint": (BOOSTS, "FOLDER/run/checkpoint-3"),
    "model_name": (SHORT, "FOLDER/other"),
    "task_name": (SHORT, "RottenTomatoes"),
    "num_train": (SHORT, "24"),
    "num_dev": (EVALS, "6"),
    "num_eval": (SHORT, "9"),
    "other_text": (SHORT, "FOLDER/mine.yaml"),
    "train_set_seed": (SHORT, "1"),
    "max_length": (SHORT, "12"),
    "prompt_beginning": (SHORT, "Film:"),
    "train_as_classification": (SHORT, "false"),
    "only_train_option": (f"{SHORT} --train_as_classification false", "false"),
    "reward": (SHORT, "f1"),
    "reward_completions": (WORTH, "expected"),
    "reward_length_penalty": (WORTH, "0.3"),
    "trainer": (SHORT, "regular"),
    "calibrated": ("--trainer none --task_name COPA --data_dir FOLDER/copa", "true"),
    "readout": ("--trainer none --num_train 30", "centroid"),
    "recipe": ("--num_train_epochs 1", "boost"),
    "base_score": (SHORT, "8"),
    "xgblora_init": (SHORT.replace("--lora_r 2", "--lora_r 1"), "activations"),
    "xgblora_init_examples": (DRAWN, "8"),
    "xgblora": (SHORT.replace(" --lora --lora_r 2", ""), "true"),
    "lora_r": (SHORT, "3"),
    "lora_alpha": (SHORT, "8"),
    "init_adapter": (BOOSTS, "FOLDER/run/adapter"),
    "lora_target_modules": (SHORT, "out_proj"),
    "xgblora_steps_per_iteration": (BOOSTS, "3"),
    "xgblora_merge_frequency": (EPOCHS, "2"),
    "xgblora_use_adaptive_merge": (BOOSTS.replace("--xgblora_steps_per_iteration 2", ""), "true"),
    "xgblora_patience": (WAITS, "2"),
    "xgblora_ema_beta": (WAITS, "0.1"),
    "xgblora_improvement_threshold": (WAITS, "0.5"),
    "xgblora_min_steps_per_adapter": (WAITS, "5"),
    "xgblora_max_steps_per_adapter": (WAITS.replace("--xgblora_patience 1", "--xgblora_patience 50"), "3"),
    "xgblora_layers": (BOOSTS, "1"),
    "xgblora_layer_choice": (f"{BOOSTS} --xgblora_layers 1", "top"),
    "xgblora_shrinkage": (BOOSTS, "0.5"),
    "early_stopping_boosters": (f"{BOOSTS} --eval_steps 2 --learning_rate 1.0 --max_steps 20", "1"),
    "boost_boosters": (RECIPE, "3"),
    "boost_directions": (RECIPE, "2"),
    "boost_examples": (RECIPE, "16"),
    "boost_teacher_examples": (RECIPE, "10"),
    "boost_ridge": (f"{RECIPE} --train_as_classification false", "30.0"),
    "boost_follow_ridge": (RECIPE, "30.0"),
    "boost_temperature": (f"{RECIPE} --reward f1", "5.0"),
    "boost_opinion": (RECIPE, "drop"),
    "boost_keep": (RECIPE, "FOLDER/mine.yaml"),
    "boost_keep_weight": (f"{RECIPE} --boost_keep FOLDER/mine.yaml", "9"),
    "boost_search_share": (RECIPE, "0.5"),
    "zo_eps": (SHORT, "5e-2"),
    "zo_num_perturbations": (SHORT, "2"),
    "zo_directions": (SHORT, "shared"),
    "forward_tokens": (SHORT, "60"),
    "dtype": (SHORT, "bfloat16"),
    "load_float16": (SHORT, "true"),
    "load_bfloat16": (SHORT, "true"),
    "result_file": (SHORT, "FOLDER/result.json"),
    "overwrite_output_dir": (f"{BOOSTS} --output_dir FOLDER/run", "true"),
    "no_auto_device": (SHORT, "true"),
    "output_dir": (SHORT, "FOLDER/elsewhere"),
    "data_dir": (SHORT, "FOLDER/others"),
    "task_file": (SHORT, "FOLDER/mine.yaml"),
    "disable_tqdm": (SHORT, "false"),
}
"""Where each flag changes what a run leaves or says, and by which value."""

WRITES = {"output_dir": "elsewhere/metrics.json", "result_file": "result.json"}
"""Flags that say where a run writes, and what is there afterwards."""

ELSEWHERE: dict[str, str] = {
    "trust_remote_code": "test_cli.py: test_a_models_own_code_runs_only_where_it_is_trusted",
    "lora": "test_cli.py: says the default, as the documented commands do",
    "objective": "test_rewards.py: follows from --reward, and is refused without it",
    "load_8bit": "test_streamed_folder.py: test_from_eight_bits_to_an_answer",
    "load_4bit": "test_quantised.py: test_from_four_bits_to_an_answer",
    "xgblora_init_directions": ("test_activations_init.py: test_boosters_along_several_directions_learn_more_options"),
    "unpack": "test_packed.py: test_from_a_file_to_an_answer",
    "memory_budget": "test_packed.py: test_a_budget_lets_go_of_weights",
    "activation_cache_gb": "test_cli.py: bounds memory; the numbers are the same (test_prefix.py)",
    "ddp_timeout": "test_group.py: test_processes_that_do_not_come_are_waited_for_only_so_long",
    "max_bad_steps": "test_reliability.py: test_bad_steps_are_left_out_and_counted",
    "torch_compile": "test_compilation.py",
    "gradient_checkpointing": "test_checkpointing.py: test_a_training_learns_the_same",
    "activation_checkpointing": "test_checkpointing.py: test_a_training_learns_the_same",
    "reward_samples": "test_rewards.py",
    "tf32": "refused without a GPU of its kind",
    "use_cpu": "needs a GPU to be seen",
    "dataloader_pin_memory": "needs a GPU to be seen",
    "run_name": "needs a logger whose package is not installed here",
    "project": "needs trackio",
    "trackio_space_id": "needs trackio",
    "trackio_bucket_id": "needs trackio",
    "trackio_static_space_id": "needs trackio",
    "report_to": "test_refusals.py: a logger without its package is refused",
}
"""Flags whose effect another test shows, or that cannot show one on this machine."""

ON_THE_TRAINER: dict[str, Any] = {
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 5,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "log_level": "debug",
    "full_determinism": True,
}
"""Flags of how the work is done, whose results are the same on purpose; they show on the loader and in the process."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_folder: Path) -> Path:
    """A folder with what the values of flags name: a run, another model, other data, a task file."""
    folder = tmp_path_factory.mktemp("flags")
    build(ARCHITECTURES["llama"]).save_pretrained(folder / "other")
    byte_tokenizer().save_pretrained(folder / "other")
    (folder / "others").mkdir()
    for split in ("train", "validation"):
        lines = (data_folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "others" / f"{split}.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    data = data_folder.as_posix()
    task = f"data: {{train: {data}/train.jsonl, validation: {data}/validation.jsonl}}\n"
    task += "prompt: '{{ sentence }} So'\noptions: [terrible, great]\nanswer: label\n"
    (folder / "mine.yaml").write_text(task, encoding="utf-8")
    (folder / "copa").mkdir()
    rows = [
        {"premise": f"it rains {n}", "choice1": "all is wet", "choice2": "dry", "question": "effect", "label": n % 2}
        for n in range(40)
    ]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "copa" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    common(folder, model_folder, data_folder, BOOSTS, folder / "run")
    return folder


def common(folder: Path, model: Path, data: Path, flags: str, output: Path) -> tuple[int, str]:
    """Run ``train``; returns its exit code and what it says, without times."""
    argv = f"--model_name {model.as_posix()} --data_dir {data.as_posix()} --task_name SST2 --output_dir {output}"
    argv += " --num_train 40 --num_dev 10 --num_eval 20 --use_cpu true"
    argv += "" if "disable_tqdm" in flags else " --disable_tqdm true"
    asked = flags.replace("FOLDER", str(folder)).split()
    taken = [token for token in asked if token.startswith("--")]
    before = re.split(r" (?=--)", argv)
    kept = [part for part in before if part.split()[0] not in taken]
    if "--task_file" in taken:
        kept = [part for part in kept if part.split()[0] not in ("--data_dir", "--task_name")]
    if flags.endswith("--task_name RottenTomatoes"):
        kept = [part for part in kept if part.split()[0] != "--data_dir"]
    lines = _Lines()
    logging.getLogger("xgblora").addHandler(lines)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(["train", *" ".join(kept).split(), *asked])
    finally:
        logging.getLogger("xgblora").removeHandler(lines)
    bars = "it/s" in out.getvalue() or "%|" in out.getvalue()
    return code, "\n".join([*lines.text, f"bars: {bars}", out.getvalue() if code else ""])


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(record.getMessage())


TIMES = re.compile(rb'"[a-z_]*(seconds|memory)[a-z_]*": [^,}\n]*|"sha256": \{[^}]*\}|[0-9a-f]{64}')


def left(folder: Path) -> dict[str, bytes]:
    """What a run leaves, without times and paths, and without config.json and the report, where every flag stands."""
    return {
        str(file.relative_to(folder)): TIMES.sub(b"", file.read_bytes()).replace(bytes(folder), b"")
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("config.json", "manifest.json", "report.html")
    }


_known: dict[str, tuple[int, str, dict[str, bytes]]] = {}


def test_every_flag_is_in_a_list() -> None:
    """A new flag appears here by itself, and needs its effect shown."""
    flags = {field.name for field in dataclasses.fields(RunConfig) if field.init}
    assert flags == {*EFFECTS, *ELSEWHERE, *ON_THE_TRAINER, *UNSUPPORTED}
    assert len(EFFECTS) + len(ELSEWHERE) + len(ON_THE_TRAINER) + len(UNSUPPORTED) == len(flags)
    tests = Path(__file__).parent
    for name, where in ELSEWHERE.items():
        if ".py" in where:
            file, _, test = where.partition(": ")
            assert name in (tests / file).read_text(encoding="utf-8"), name
            assert not test.startswith("test_") or f"def {test}(" in (tests / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if n % 3 else ()) for n, name in enumerate(EFFECTS)]
)
def test_a_flag_changes_what_a_run_leaves_or_says(
    name: str, place: Path, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    flags, value = EFFECTS[name]
    if flags not in _known:
        code, words = common(place, model_folder, data_folder, flags, tmp_path / "without")
        assert code == 0, words
        _known[flags] = code, words, left(tmp_path / "without")
    code, words = common(place, model_folder, data_folder, f"{flags} --{name} {value}", tmp_path / "with")
    assert code == 0, words
    assert f"--{name} has no effect" not in words or name == "no_auto_device"
    if name in WRITES:
        assert (place / WRITES[name]).exists()
    else:
        assert (words, left(tmp_path / "with")) != _known[flags][1:]


@pytest.mark.parametrize("flags", [BOOSTS, RECIPE], ids=["boosts", "recipe"])
def test_the_same_flags_leave_and_say_the_same(
    flags: str, place: Path, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Without this, any flag would seem to have an effect."""
    runs = [common(place, model_folder, data_folder, flags, tmp_path / name) for name in ("with", "without")]
    assert runs[0] == runs[1]
    assert left(tmp_path / "with") == left(tmp_path / "without")


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_without_an_effect_is_refused_with_the_reason(name: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    default = default_of(fields[name])
    kind = type(default) if default is not None else bool
    value = not default if kind is bool else next(v for v in (7, 0.5, "x", {"a": 1}, ["x"]) if isinstance(v, kind))
    with pytest.raises(XgbloraError, match=re.escape(f"--{name} is not supported: {REFUSED[name]}")):
        RunConfig(output_dir="unused", use_cpu=True, **{name: value})


@pytest.mark.parametrize("name", ON_THE_TRAINER)
def test_a_flag_of_how_the_work_is_done_is_passed_on(name: str, tmp_path: Path) -> None:
    def seen(**flags: Any) -> tuple[Any, ...]:
        flags = {"dataloader_num_workers": 1, "max_steps": 1} | flags
        config = RunConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, lora=True, **flags)
        model = build(ARCHITECTURES["opt"])
        trainer = Trainer(model, config, Ledger(attach(model)), examples(16), examples(8, seed=1))
        loader = trainer.get_train_dataloader().base_dataloader
        context = loader.multiprocessing_context
        return (
            *(loader.num_workers, loader.persistent_workers, loader.prefetch_factor, loader.in_order),
            *(context and context.get_start_method(), transformers.logging.get_verbosity()),
            torch.are_deterministic_algorithms_enabled(),
        )

    level, before = transformers.logging.get_verbosity(), seen()
    try:
        assert seen(**{name: ON_THE_TRAINER[name]}) != before
    finally:
        transformers.logging.set_verbosity(level)
        torch.use_deterministic_algorithms(False)


def test_the_lists_of_transformers_flags_are_apart() -> None:
    assert not ALLOWED.keys() & REFUSED.keys()


def test_all_prompts_begin_alike_where_recipe_boost_is_one_of_the_methods() -> None:
    def beginnings(**settings: Any) -> set[str]:
        config = ExperimentConfig(model_name="m", output_root="x", task_name="RottenTomatoes", use_cpu=True, **settings)
        return {configured.beginning for configured in arms(config)}

    assert RunConfig(use_cpu=True).beginning == "none"  # the published prompts
    assert RunConfig(recipe="boost", use_cpu=True).beginning == "auto"
    assert beginnings() == {"none"}
    assert beginnings(methods=["lora", "boost", "in-context", "probe"]) == {"auto"}
    assert beginnings(methods=["lora", "boost"], prompt_beginning="A film.") == {"A film."}
    assert beginnings(methods=["lora", "boost"], prompt_beginning="none") == {"none"}
