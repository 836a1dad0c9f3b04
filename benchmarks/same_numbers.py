"""Do two checkouts compute the same numbers? For changes that should change none.

    git worktree add ../before HEAD~1
    python benchmarks/same_numbers.py ../before

Trains the same tiny models (OPT, Llama, GPT-2; float32 and bfloat16) with every method in both checkouts. Then compares
losses, evaluations, adapters, metrics, stages and exports byte by byte. Times, memory and configurations are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = ("opt", "llama", "gpt2")
PRECISIONS = {"float32": "--dtype float32", "bfloat16": "--dtype bfloat16"}
FILES_LEFT_OUT = ("config.json", "trainer_state.json", "run.lock")
METRICS_LEFT_OUT = ("seconds_per_step", "training_seconds", "peak_memory_mb")

ZO = "--zo_eps 1e-2 --optim adamw_torch --learning_rate 1e-2"
STEPS = "--xgblora --xgblora_steps_per_iteration"
SST2 = "--task_name SST2 --data_dir DATA --num_dev 10"
RUNS = {
    "zo-shared": f"{SST2} --lora_r 2 --zo_directions shared --gradient_accumulation_steps 3 --max_steps 12 {ZO}",
    "zo-per-example": f"{SST2} {STEPS} 4 --max_steps 14 --zo_num_perturbations 2 {ZO}",
    "zo-large-batch": f"{SST2} --lora_r 1 --max_steps 6 --per_device_train_batch_size 40 {ZO}",
    "regular": f"{SST2} --lora_r 3 --trainer regular --max_steps 12 --learning_rate 1e-2 "
    "--gradient_accumulation_steps 3",
    "regular-patience": f"{SST2} --xgblora --trainer regular --xgblora_use_adaptive_merge --xgblora_patience 2 "
    "--max_steps 25 --learning_rate 3e-2 --optim adamw_torch",
    "merges-by-epoch": f"{SST2} --xgblora --num_train_epochs 4 --xgblora_shrinkage 0.5 {ZO}",
    "patience": f"{SST2} --xgblora --xgblora_use_adaptive_merge --xgblora_patience 3 --max_steps 25 {ZO}",
    "top-layer": f"{SST2} {STEPS} 5 --xgblora_layers 1 --xgblora_layer_choice top --max_steps 15 {ZO}",
    "random-layer": f"{SST2} {STEPS} 3 --xgblora_layers 1 --seed 3 --max_steps 15 {ZO}",
    "regular-random-layer": f"{SST2} {STEPS} 3 --xgblora_layers 1 --trainer regular --max_steps 9",
    "early-stopping": f"{SST2} {STEPS} 2 --early_stopping_boosters 2 --max_steps 40 {ZO}",
    "text-loss": f"{SST2} --lora_r 1 --train_as_classification false --max_steps 8 {ZO}",
    "text-loss-prompt": f"{SST2} --train_as_classification false --only_train_option false --max_steps 8 {ZO}",
    "text-loss-regular": f"{SST2} --train_as_classification false --only_train_option false --trainer regular "
    "--max_steps 8",
    "boost": f"{SST2} --recipe boost --boost_boosters 3 --boost_examples 40",
    "boost-random-layers": f"{SST2} --recipe boost --boost_boosters 4 --xgblora_layers 1 --xgblora_layer_choice random "
    "--seed 3",
    "boost-keep": f"{SST2} --recipe boost --boost_boosters 2 --boost_opinion keep --xgblora_shrinkage 0.7",
    "boost-stopping": f"{SST2} --recipe boost --boost_boosters 5 --early_stopping_boosters 1",
    "boost-text": f"{SST2} --recipe boost --boost_boosters 2 --train_as_classification false",
    "reward-greedy": f"{SST2} --reward accuracy --max_steps 6 --zo_directions shared {ZO}",
    "reward-expected": f"{SST2} {STEPS} 3 --reward f1 --trainer regular --max_steps 6 --learning_rate 1e-2",
    "in-context": f"{SST2} --trainer none --num_train 3",
    "zero-shot-calibrated": f"{SST2} --trainer none --num_train 0 --calibrated",
    "long-options": f"--task_file TASKS/options.yaml --max_steps 6 {ZO}",
    "long-options-boost": "--task_file TASKS/options.yaml --recipe boost --boost_boosters 3",
    "own-options": f"--task_file TASKS/rows.yaml {STEPS} 3 --max_steps 6 {ZO}",
    "writing": f"--task_file TASKS/write.yaml {STEPS} 3 --max_steps 6 {ZO}",
    "writing-boost": "--task_file TASKS/write.yaml --recipe boost --boost_boosters 2",
    "writing-reward": f"--task_file TASKS/write.yaml --reward f1 --max_steps 4 --zo_directions shared {ZO}",
    "writing-reward-regular": "--task_file TASKS/write.yaml --reward rouge_l --trainer regular --max_steps 4 "
    "--reward_samples 2",
    "chat": f"--task_file TASKS/chat.yaml {STEPS} 3 --max_steps 6 {ZO}",
    "init-adapter": f"{SST2} --xgblora --init_adapter RUNS/MODEL-PRECISION-zo-per-example/adapter --max_steps 5 {ZO}",
}
AFTER = {
    "zo-per-example": ["stages RUN", "export RUN --boosters 2", "export RUN --format merged"],
    "boost": ["stages RUN", "export RUN --boosters 1", "export RUN --format gguf-lora"],
    "writing": ["stages RUN"],
    "random-layer": ["stages RUN"],
}
"""Commands on a finished run. llama.cpp's format is for Llama and GPT-2 alone."""

TASK_FILES = {
    "options.yaml": "data: {train: rows.csv, test: test.csv}\nprompt: '{{ text }} It was'\n"
    "options: [so very bad, great, of no kind]\nanswer: kind\nlabels: [bad, good, none]\nmetric: macro_f1\n",
    "rows.yaml": "data: {train: choices.jsonl, test: choices.jsonl}\nprompt: '{{ q }}'\noptions: choices\n"
    "answer: right\n",
    "write.yaml": "data: {train: rows.csv, test: test.csv}\nprompt: '{{ text }} :'\ngenerate: {max_new_tokens: 5}\n"
    "answer: kind\nmetric: f1\n",
    "chat.yaml": "data: {train: chat.jsonl, test: chat.jsonl}\nchat: messages\ngenerate: {max_new_tokens: 4}\n",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)

WORKER = """
import json, sys
from xgblora.cli import main
for line in sys.stdin.read().splitlines():
    print("$", *json.loads(line), flush=True)
    print("exit code", main(json.loads(line)), flush=True)
"""


def prepare(folder: Path) -> None:
    """Write models, rows and task files: both checkouts read the same ones."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import ARCHITECTURES, build, byte_tokenizer, write_rows  # type: ignore[import-not-found]

    for name in MODELS:
        build(ARCHITECTURES[name]).save_pretrained(folder / "models" / name)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder / "models" / name)
    data, tasks = folder / "data", folder / "tasks"
    data.mkdir()
    write_rows(data / "train.jsonl", 80)
    write_rows(data / "validation.jsonl", 24)
    tasks.mkdir()
    for name, text in TASK_FILES.items():
        (tasks / name).write_text(text, encoding="utf-8")
    for name, count in (("rows.csv", 60), ("test.csv", 12)):
        rows = [f"film {n} {'so' * (n % 5)} seen,{('bad', 'good', 'none')[n % 3]}" for n in range(count)]
        (tasks / name).write_text("\n".join(["text,kind", *rows, ""]), encoding="utf-8")
    write_lines(
        tasks / "choices.jsonl",
        ({"q": f"n {n} is", "choices": [f"x{n}", "yy", "zzz"][: 2 + n % 2], "right": n % 2} for n in range(50)),
    )
    write_lines(
        tasks / "chat.jsonl",
        (
            {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
            for n in range(40)
        ),
    )


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def commands(inputs: Path, runs: Path) -> list[list[str]]:
    """Every command line, with its results below ``runs``."""
    lines = []
    for model in MODELS:
        for precision, precision_flag in PRECISIONS.items():
            for name, flags in RUNS.items():
                line = f"train --model_name {inputs}/models/{model} {precision_flag} --use_cpu true --disable_tqdm true"
                line += f" --num_eval 20 --max_length 60 --output_dir RUNS/MODEL-PRECISION-{name} {flags}"
                line += "" if "--num_train " in flags else " --num_train 40"
                if "--trainer none" not in flags:
                    line += " --eval_strategy steps"
                    line += "" if "--recipe boost" in flags else " --eval_steps 4 --logging_steps 1"
                after = [more for more in AFTER.get(name, []) if not ("gguf" in more and model == "opt")]
                text = "\n".join([line, *(more.replace("RUN", f"RUNS/MODEL-PRECISION-{name}", 1) for more in after)])
                words = {"DATA": f"{inputs}/data", "TASKS": f"{inputs}/tasks", "RUNS": str(runs)}
                for word, value in (words | {"MODEL": model, "PRECISION": precision}).items():
                    text = text.replace(word, value)
                lines += [line.split() for line in text.splitlines()]
    return lines


def carry_out(checkout: Path, lines: list[list[str]], log: Path) -> list[str]:
    """Run the commands in one process with the code of ``checkout``. Returns those that failed."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    stdin = "\n".join(map(json.dumps, lines))
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-c", WORKER]
        subprocess.run(command, input=stdin, env=environment, stdout=file, stderr=file, text=True, check=True)
    printed = log.read_text(encoding="utf-8").splitlines()
    codes = [line for line in printed if line.startswith("exit code ")]
    return [" ".join(line) for line, code in zip(lines, codes, strict=True) if code != "exit code 0"]


def contents(folder: Path) -> dict[str, bytes]:
    """What is compared of every file below ``folder``, by its name there."""
    compared = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or file.name in FILES_LEFT_OUT or "checkpoint-" in name or file.suffix == ".png":
            continue
        compared[name] = file.read_bytes()
        if file.name == "metrics.json":
            metrics = {key: value for key, value in json.loads(compared[name]).items() if key not in METRICS_LEFT_OUT}
            compared[name] = json.dumps(metrics).encode()
        elif file.name == "manifest.json":  # the digests in it are those of files that are compared themselves
            compared[name] = json.dumps(json.loads(compared[name])["fingerprint"]).encode()
        elif file.name == "adapter_config.json":  # a set
            config = json.loads(compared[name])
            compared[name] = json.dumps(config | {"target_modules": sorted(config["target_modules"])}).encode()
    return compared


def main() -> int:
    """Compare; the exit code is 1 where anything differs or fails."""
    parser = argparse.ArgumentParser(description="Do two checkouts compute the same numbers?")
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--keep", type=Path, help="keep all results in this folder, and reuse those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.keep or Path(temporary)).resolve()
        if not (work / "inputs").exists():
            (work / "inputs").mkdir(parents=True)
            prepare(work / "inputs")
        failed = []
        for name, checkout in (("other", arguments.other.resolve()), ("this", ROOT)):
            if not (work / name).exists():
                # Both write to one path, since adapters name the folder of their base.
                runs = work / "runs"
                failed += carry_out(checkout, commands(work / "inputs", runs), work / f"{name}.log")
                runs.rename(work / name)
        before, after = contents(work / "other"), contents(work / "this")
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in differing:
        print("differs:", name, "" if name in before and name in after else "(only in one checkout)")
    for line in failed:
        print("failed:", line)
    runs_compared = len({name.split("/")[0] for name in before})
    print(f"{len(before)} files of {runs_compared} runs: {len(differing)} differ, {len(failed)} commands failed")
    return int(bool(differing or failed))


if __name__ == "__main__":
    raise SystemExit(main())
