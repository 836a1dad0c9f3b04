"""Several processes share a run: the same bytes as one, few bytes exchanged, and one line where something is wrong."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

from conftest import Run, byte_tokenizer, write_rows
from processes import EVERY_STEP, finish, finish_together, free_port, place, start, start_together
from test_reliability import same_run
from xgblora.files import digest
from xgblora.training.checkpoints import last_checkpoint

IN_PARTS = f"{EVERY_STEP} --per_device_train_batch_size 16 --forward_tokens 120"
"""Steps whose batches have several parts."""

RUNS = {
    "per example, merges": f"--xgblora --xgblora_steps_per_iteration 7 --lr_scheduler_type linear {IN_PARTS}",
    "shared": f"--lora --lora_r 2 --zo_directions shared --gradient_accumulation_steps 2 {IN_PARTS}",
    "backprop": f"--trainer regular --lora --lora_r 2 {IN_PARTS}",
    "drawn": f"--xgblora --xgblora_init activations --xgblora_init_examples 16 {IN_PARTS}",
    "reward": f"--xgblora --reward accuracy {IN_PARTS}",
    "upper layer": f"--xgblora --xgblora_layers 1 --xgblora_steps_per_iteration 7 {IN_PARTS}",
    "boost": "--recipe boost --boost_boosters 3 --boost_examples 32 --eval_strategy steps --forward_tokens 120",
    "boost of text": "--recipe boost --boost_boosters 2 --train_as_classification false --forward_tokens 120",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_several_processes_leaves_the_bytes_of_one(name: str, small: list[str], tmp_path: Path) -> None:
    flags = [*RUNS[name].split(), *small]
    finish(["train", "--output_dir", str(tmp_path / "one"), *flags], tmp_path / "one.txt")
    for size in (2,) if name == "shared" else (3,):
        folder = tmp_path / f"of {size}"
        finish_together(["train", "--output_dir", str(folder), *flags], tmp_path / f"{size}.txt", size)
        same_run(tmp_path / "one", folder)


@pytest.mark.soak
def test_positions_beyond_the_landmarks_are_shared_too(small: list[str], tmp_path: Path) -> None:
    """Recipe boost on more than 4096 positions, with and without memory for what lies below."""
    write_rows(tmp_path / "train.jsonl", 240)
    write_rows(tmp_path / "validation.jsonl", 30)
    flags = [*RUNS["boost of text"].split(), *small, "--data_dir", str(tmp_path), "--num_train", "200"]
    flags += ["--only_train_option", "false"]  # prompts are predicted, too
    for number, cache in enumerate(("1", "0.0003")):
        argv = ["train", *flags, "--activation_cache_gb", cache, "--output_dir"]
        one, two = (tmp_path / f"{name} {number}" for name in ("one", "two"))
        finish([*argv, str(one)], tmp_path / "one.txt")
        finish_together([*argv, str(two)], tmp_path / "two.txt", 2)
        same_run(one, two)


def errors(log: Path) -> list[str]:
    """The lines that say what was wrong; what is logged of a run is none of them."""
    lines = log.read_text(encoding="utf-8").splitlines()
    assert not any("Traceback" in line for line in lines), lines
    return [line for line in lines if line.startswith(("error:", "stopped by"))]


def ended(processes: list[Any]) -> list[int]:
    """The exit codes of all, once they are gone."""
    for process in processes:
        process.join(60)
        assert not process.is_alive(), "it waits for processes that are gone"
    return [process.exitcode for process in processes]


@pytest.mark.skipif(sys.platform == "win32", reason="a process that imports torch for every kill takes too long")
@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.soak if n else ()) for n in range(20)])
def test_a_killed_process_ends_the_run_on_all_with_one_line(number: int, small: list[str], tmp_path: Path) -> None:
    """SIGKILL of any of them at any moment; then the run goes on with another number of processes."""
    draw = random.Random(number)
    method = list(RUNS)[number % len(RUNS)]
    argv = ["train", *RUNS[method].split(), *small, "--ddp_timeout", "30", "--output_dir"]
    begun = time.monotonic()
    finish_together([*argv, str(tmp_path / "whole")], tmp_path / "whole.txt", 3)
    seconds = time.monotonic() - begun
    folder = tmp_path / "killed"
    for kill, size in enumerate((3, 4, 2)):
        log = tmp_path / f"killed {kill}.txt"
        processes = start_together([*argv, str(folder)], log, size)
        victim = draw.choice(processes)
        victim.join(draw.uniform(0.1, 0.9) * seconds)
        if not victim.is_alive():
            break
        victim.kill()
        codes = ended(processes)
        if set(codes) == {-signal.SIGKILL, 0}:  # it had nothing left to do for the others
            break
        (line,) = errors(log)
        assert "another process" in line or "did not meet" in line
        if folder.exists():
            last_checkpoint(folder)  # whole, or there is none
    finish([*argv, str(folder)], tmp_path / "last.txt")
    same_run(tmp_path / "whole", folder)
    assert not list(folder.glob("*.part"))


def test_a_signal_to_one_process_stops_all_after_one_step(small: list[str], tmp_path: Path) -> None:
    argv = ["train", *RUNS["shared"].split(), *small, "--max_steps", "4000", "--output_dir", str(tmp_path / "run")]
    log = tmp_path / "log.txt"
    processes = start_together(argv, log, 3)
    while not (tmp_path / "run" / "checkpoint-3").is_dir():
        assert all(process.is_alive() for process in processes), log.read_text(encoding="utf-8")
        time.sleep(0.01)
    processes[2].terminate()
    assert ended(processes) == [128 + signal.SIGTERM] * 3
    (line,) = errors(log)
    assert line.startswith("stopped by SIGTERM after step ")
    step = int(line.split("step ")[1].split(",")[0])
    assert (tmp_path / "run" / f"checkpoint-{step}").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSTOP")
def test_a_silent_process_is_waited_for_only_so_long(small: list[str], tmp_path: Path) -> None:
    argv = ["train", *RUNS["shared"].split(), *small, "--max_steps", "4000", "--ddp_timeout", "3"]
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    processes = start_together([*argv, "--output_dir", str(folder)], log, 2)
    while not (folder / "checkpoint-3").is_dir():
        assert all(process.is_alive() for process in processes), log.read_text(encoding="utf-8")
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(60)
    processes[1].kill()
    (line,) = errors(log)
    assert "another process of this run was silent for 3 seconds" in line


def refused(argv: list[str], log: Path, places: list[dict[str, str]]) -> str:
    """The one line with which processes at these places end; all with the user's error."""
    processes = [start(argv, log, **environment) for environment in places]
    assert ended(processes) == [2] * len(places)
    (line,) = errors(log)
    return line


def test_processes_that_do_not_come_are_waited_for_only_so_long(small: list[str], tmp_path: Path) -> None:
    argv = ["train", *small, "--max_steps", "2", "--ddp_timeout", "2", "--output_dir", str(tmp_path / "run")]
    line = refused(argv, tmp_path / "log.txt", [place(0, 2, free_port())])
    assert "process 0 of 2 did not meet all others" in line
    assert "--ddp_timeout" in line
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named(small: list[str], tmp_path: Path) -> None:
    argv = ["train", *small, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        line = refused(argv, tmp_path / "log.txt", [place(0, 2, port)])
    assert f"127.0.0.1:{port} is in use" in line


def test_other_verbs_and_odd_places_are_refused(small: list[str], tmp_path: Path) -> None:
    assert "runs in one process" in refused(["demo"], tmp_path / "1.txt", [place(0, 2, 1), place(1, 2, 1)])
    odd = place(0, 2, 1) | {"RANK": "first"}
    assert "RANK and WORLD_SIZE must be numbers" in refused(["train"], tmp_path / "2.txt", [odd])
    assert "below WORLD_SIZE" in refused(["train"], tmp_path / "3.txt", [place(2, 2, 1)])


@pytest.mark.parametrize("what", ["flags", "data", "model"])
def test_processes_that_differ_are_refused_before_the_first_step(
    what: str, small: list[str], model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    ours = ["train", *small, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    theirs, expected = list(ours), what
    if what == "flags":
        theirs += ["--learning_rate", "1e-5"]
        expected = "other flags than process 0 (learning_rate 5e-05 -> 1e-05)"
    elif what == "data":
        shutil.copytree(data_folder, tmp_path / "data")
        with (tmp_path / "data" / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"sentence": "a film", "label": 1}\n')
        theirs += ["--data_dir", str(tmp_path / "data")]
        expected = "another the train data"
    else:
        model = OPTForCausalLM.from_pretrained(model_folder)
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.bias += 1
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        theirs += ["--model_name", str(tmp_path / "model")]
        expected = "another base model"
    log = tmp_path / "log.txt"
    port = free_port()
    processes = [start(argv, log, **place(n, 2, port)) for n, argv in enumerate([ours, theirs])]
    assert ended(processes) == [2, 2]
    (line,) = errors(log)
    assert expected in line
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows wants a build of torch with libuv")
def test_torchrun_itself(small: list[str], tmp_path: Path) -> None:
    flags = ["train", *RUNS["per example, merges"].split(), *small, "--dtype", "float32", "--output_dir"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_port()), "-m", "xgblora"]
    subprocess.run([*command, *flags, str(tmp_path / "two")], check=True, capture_output=True, timeout=120)
    finish([*flags, str(tmp_path / "one")], tmp_path / "one.txt")
    same_run(tmp_path / "one", tmp_path / "two")


def timeless(value: Any) -> Any:
    """JSON values without seconds and memory."""
    if isinstance(value, dict):
        return {
            name: timeless(inner) for name, inner in value.items() if not {"seconds", "memory"} & set(name.split("_"))
        }
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def test_all_verbs_that_processes_share_say_what_one_says(
    small: list[str], data_folder: Path, run: Run, tmp_path: Path
) -> None:
    pace = "--xgblora_steps_per_iteration 3 --max_steps 6 --eval_steps 3 --save_strategy no"
    argv = ["compare", *pace.split(), *small, "--seeds", "0", "1", "--output_root"]
    for name, finish_it in (("one", finish), ("two", lambda *command: finish_together(*command, 2))):
        finish_it([*argv, str(tmp_path / name)], tmp_path / f"{name}.txt")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert timeless(one) == timeless(two)
    assert "forwarded in 1 part(s), and there are 2 processes" in (tmp_path / "two.txt").read_text(encoding="utf-8")
    assert len(list((tmp_path / "two").iterdir())) == len(list((tmp_path / "one").iterdir()))
    folder, rows = tmp_path / "two" / "xgblora_seed0", str(data_folder / "validation.jsonl")
    asked = ["predict", str(folder), "--file", rows, "--use_cpu", "--batch_size", "4", "--output"]
    finish([*asked, str(tmp_path / "one.csv")], tmp_path / "log.txt")
    finish_together([*asked, str(tmp_path / "two.csv")], tmp_path / "log.txt", 2)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    for verb in (["eval", str(folder), "--file", rows, "--format", "json"], ["stages", str(folder)]):
        logs = [tmp_path / f"{verb[0]} of {size}.txt" for size in (1, 2)]
        finish(verb, logs[0])
        finish_together(verb, logs[1], 2)
        assert logs[0].read_text(encoding="utf-8") == logs[1].read_text(encoding="utf-8")
    code, _, err = run("predict", folder, "a film")
    assert code == 0, err
    log = tmp_path / "texts.txt"
    assert "share a --file" in refused(["predict", str(folder), "a film"], log, [place(n, 2, 1) for n in range(2)])


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import xgblora
xgblora.join()
from conftest import train
from xgblora import group
trainer, losses = train({folder!r}, forward_tokens=60, xgblora=True, xgblora_steps_per_iteration=5, resume={resume},
                        max_steps={steps}, save_strategy="steps", save_steps=6)
if group.first():
    print(losses)
    trainer.ledger.save({folder!r} + "/mine")
group.leave()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows wants a build of torch with libuv")
def test_a_trainer_of_ones_own_is_shared(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    losses = {}
    for size, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        for steps, resume in ((12, None), (20, True)):
            script = tmp_path / "script.py"
            script.write_text(SCRIPT.format(tests=tests, folder=str(folder), steps=steps, resume=resume), "utf-8")
            command = ["-m", "torch.distributed.run", "--nproc_per_node", str(size), "--master_port", str(free_port())]
            begin = [sys.executable, *(command if size > 1 else []), str(script)]
            done = subprocess.run(begin, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, done.stderr
            losses[size] = done.stdout
            if steps == 12:
                shutil.rmtree(folder / "mine")
    assert losses[1] == losses[2]
    for name in ("mine/adapter_model.safetensors", "checkpoint-18/adapter_model.safetensors"):
        assert digest(tmp_path / "one" / name) == digest(tmp_path / "two" / name)
