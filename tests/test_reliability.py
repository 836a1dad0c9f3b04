"""Nothing lost: kills, signals, damaged files, full disks, two runs on one folder, numbers gone wrong."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import ARCHITECTURES, LogLines, build, examples, train
from processes import EVERY_STEP, STEPS, finish, limited, start, wait_for
from xgblora import Ledger, OptionLoss, RunConfig, Trainer, XgbloraError, attach, files
from xgblora.cli import main
from xgblora.errors import DivergedError
from xgblora.files import MANIFEST, sealed_folder, verify, write_json
from xgblora.training.checkpoints import last_checkpoint

METHODS = {
    "per example, steps": "--xgblora --xgblora_steps_per_iteration 7 --lr_scheduler_type linear",
    "shared, LoRA": "--lora --lora_r 2 --zo_directions shared --gradient_accumulation_steps 2",
    "backprop, patience": "--trainer regular --xgblora --xgblora_use_adaptive_merge --xgblora_patience 3",
    "top layer": "--xgblora --xgblora_layers 1 --xgblora_layer_choice top --xgblora_merge_frequency 1",
    "boost": "--recipe boost --boost_boosters 6 --boost_examples 32",
    "drawn": "--xgblora --xgblora_init activations --xgblora_init_examples 16 --xgblora_steps_per_iteration 7",
}
EVERY_BOOSTER = "--eval_strategy steps"
FILES = (
    "training_loss.jsonl",
    "eval_loss.jsonl",
    "trainer_state.json",
    *(f"adapter/{n}" for n in ("adapter_model.safetensors", "ledger.json")),
)


@pytest.fixture
def command(small: list[str]) -> Callable[[str, Path], list[str]]:
    def argv(method: str, folder: Path) -> list[str]:
        pace = EVERY_BOOSTER if method == "boost" else EVERY_STEP
        return ["train", "--output_dir", str(folder), *METHODS[method].split(), *pace.split(), *small]

    return argv


def same_run(whole: Path, other: Path) -> None:
    for name in (*FILES, "replay.jsonl"):
        if name in FILES or (whole / name).exists():
            assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (whole, other)]
    for of_run in metrics:
        for name in ("seconds_per_step", "training_seconds", "peak_memory_mb"):
            of_run.pop(name)
    assert metrics[0] == metrics[1]


KILLS = 3
"""Of every run, at most; it may be done before the last one comes."""


@pytest.mark.skipif(sys.platform == "win32", reason="a process that imports torch for every kill takes too long")
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.soak if n not in (0, 2, 4, 5) else ()) for n in range(50)]
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    number: int, command: Callable[[str, Path], list[str]], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """SIGKILL at a random moment, again and again: during a step, a save, a merge, an evaluation."""
    method = list(METHODS)[number % len(METHODS)]
    draw, log = random.Random(number), tmp_path / "log.txt"
    start(["--help"], log).join()  # the first process waits for the imports
    begun = time.monotonic()
    finish(command(method, tmp_path / "whole"), log)
    seconds = time.monotonic() - begun
    killed = 0
    while killed < KILLS:
        process = start(command(method, tmp_path / "killed"), log)
        process.join(draw.uniform(0.1, 0.9) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        elif killed:
            break
        else:  # the machine has become faster than it was: once more
            assert process.exitcode == 0, log.read_text(encoding="utf-8")
            shutil.rmtree(tmp_path / "killed")
            seconds /= 2
    record_property("kills", killed)
    finish(command(method, tmp_path / "killed"), log)
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *(
            pytest.param(method, "", marks=pytest.mark.soak if method in ("boost", "shared, LoRA", "drawn") else ())
            for method in METHODS
        ),
        ("shared, LoRA", "--max_steps 8"),
        ("boost", "--early_stopping_boosters 1"),
        ("per example, steps", f"--early_stopping_boosters 1 --learning_rate 1e-30 --save_steps 7 --max_steps {STEPS}"),
    ],
)
def test_a_run_killed_after_its_last_step_takes_no_further_one(
    method: str,
    more: str,
    command: Callable[[str, Path], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of an epoch or at its end, at the last step or stopped early: only the metrics are missing."""
    length = "--boost_boosters 3" if method == "boost" else "--max_steps 10"
    flags = [*length.split(), *more.split(), "--save_total_limit", "99"]
    assert main([*command(method, tmp_path / "whole"), *flags]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "killed" / "adapter")
    newest = last_checkpoint(tmp_path / "killed")
    capsys.readouterr()
    assert main([*command(method, tmp_path / "killed"), *flags]) == 0
    assert f"Resuming from {newest}" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are not sent there")
@pytest.mark.parametrize(
    ("number", "method"),
    [
        pytest.param(signal.SIGTERM, "per example, steps", marks=pytest.mark.soak),
        (signal.SIGINT, "backprop, patience"),
        (signal.SIGTERM, "boost"),
    ],
)
def test_a_signal_at_a_merge_ends_the_step_and_saves(
    number: signal.Signals, method: str, command: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    log, folder = tmp_path / "log.txt", tmp_path / "stopped"
    finish(command(method, tmp_path / "whole"), tmp_path / "whole.txt")
    process = start(command(method, folder), log)
    wait_for(process, log, "Merging and reinitializing")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    words = log.read_text(encoding="utf-8").splitlines()[-1]
    assert words.startswith(f"stopped by {number.name} after step ")
    step = int(words.split()[5].strip(","))
    assert words.endswith(f"step {step}, which is saved; the same command goes on at the last checkpoint")
    verify(folder / f"checkpoint-{step}")
    assert not (folder / "run.lock").exists()
    finish(command(method, folder), log)
    same_run(tmp_path / "whole", folder)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are not sent there")
def test_a_second_signal_stops_at_once_and_the_checkpoint_is_whole(small: list[str], tmp_path: Path) -> None:
    """A step that takes long: 20,000 perturbations."""
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    flags = "--lora --zo_num_perturbations 20000 --max_steps 2 --save_steps 1".split()
    process = start(["train", "--output_dir", str(folder), *small, *EVERY_STEP.split(), *flags], log)
    wait_for(process, log, "Initializing LoRA")
    while not (folder / "eval_loss.jsonl").exists():  # made where training begins
        assert process.is_alive(), log.read_text(encoding="utf-8")
        time.sleep(0.005)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1)
    assert process.is_alive(), "the step is finished first"
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
    assert log.read_text(encoding="utf-8").splitlines()[-1].startswith("stopped by SIGTERM; ")
    assert not list(folder.glob("checkpoint-*"))


def test_two_runs_on_one_folder(command: Callable[[str, Path], list[str]], tmp_path: Path) -> None:
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    first = start(command("per example, steps", folder), log)
    wait_for(first, log, "Merging and reinitializing")
    if sys.platform != "win32":
        os.kill(first.pid, signal.SIGSTOP)  # or it might be done before the second begins
    second = start(command("per example, steps", folder), tmp_path / "second.txt")
    second.join(60)
    assert second.exitcode == 2
    words = (tmp_path / "second.txt").read_text(encoding="utf-8")
    assert f"error: process {first.pid} is at work in {folder}" in words
    first.kill()
    first.join()
    assert (folder / "run.lock").is_file()
    finish(command("per example, steps", folder), log)  # the lock of a dead process stands in nobody's way
    assert not (folder / "run.lock").exists()


TIMES = {"seconds", "seconds_per_step", "training_seconds", "peak_memory_mb", "sha256"}
"""Entries of JSON files that differ from run to run: what a clock shows, and paths and digests of files with those."""


def timeless(content: Any) -> Any:
    """A JSON value without TIMES, and without what follows from them."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if not any(time in key for time in TIMES)}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def same_tree(whole: Path, other: Path) -> None:
    """Every file of two folders, byte by byte, but for times in JSON files and what pictures show of them."""
    names = [
        sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()) for root in (whole, other)
    ]
    assert names[0] == names[1]
    assert not [name for name in names[0] if ".part" in name]
    for name in names[0]:
        contents = [(root / name).read_bytes() for root in (whole, other)]
        for root in (whole, other):
            contents = [content.replace(bytes(root), b"ROOT") for content in contents]
        if name.endswith(".json"):
            first, second = (timeless(json.loads(content)) for content in contents)
            assert first == second, name
        elif not name.endswith((".png", ".html")):
            assert contents[0] == contents[1], name


VERBS = {
    "compare": "compare --seeds 0 --methods lora xgblora --lora_rank 1 --skip_completed --output_root ROOT/out",
    "boost": "boost --seeds 0 1 --xgblora_steps_per_iteration 7 --skip_completed --output_root ROOT/out",
    "stages": "stages ROOT/run",
    "export": "export ROOT/run --output ROOT/out",
    "merged": "export ROOT/run --format merged --output ROOT/out",
}


@pytest.mark.skipif(sys.platform == "win32", reason="a process that imports torch for every kill takes too long")
@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.soak if n != 3 else ()) for n in range(50)])
def test_a_verb_that_is_killed_ends_as_if_it_had_not_been(
    number: int,
    command: Callable[[str, Path], list[str]],
    small: list[str],
    tmp_path: Path,
    record_property: Callable[..., None],
) -> None:
    verb = list(VERBS)[number % len(VERBS)]
    draw, log = random.Random(number), tmp_path / "log.txt"
    whole, killed = tmp_path / "whole", tmp_path / "again"
    trains = verb in ("compare", "boost")
    whole.mkdir()
    if not trains:
        finish(command("per example, steps", whole / "run"), log)
    shutil.copytree(whole, killed)

    def argv(root: Path) -> list[str]:
        return [*VERBS[verb].replace("ROOT", str(root)).split(), *([*EVERY_STEP.split(), *small] if trains else [])]

    begun = time.monotonic()
    finish(argv(whole), log)
    seconds = time.monotonic() - begun
    kills = 0
    for _ in range(KILLS):
        process = start(argv(killed), log)
        process.join(draw.uniform(0.05, 0.95) * seconds)
        kills += process.is_alive()
        process.kill()
        process.join()
        if (killed / "out").exists() and not trains:
            break  # an export that is there is refused
    if trains or verb == "stages" or not (killed / "out").exists():
        finish(argv(killed), log)
    record_property("kills", kills)
    same_tree(whole, killed)


@pytest.mark.skipif(sys.platform == "win32", reason="a process that imports torch for every kill takes too long")
def test_a_comparison_goes_on_in_the_arm_it_was_killed_in(small: list[str], tmp_path: Path) -> None:
    def compare(name: str) -> list[str]:
        flags = "--seeds 0 1 --lora_rank 1 --xgblora_steps_per_iteration 7 --skip_completed".split()
        return ["compare", "--output_root", str(tmp_path / name), *flags, *EVERY_STEP.split(), *small]

    finish(compare("whole"), tmp_path / "whole.txt")
    log, third = tmp_path / "log.txt", tmp_path / "killed" / "xgblora_seed0"
    process = start(compare("killed"), log)
    while not list(third.glob("checkpoint-*")):
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    before = log.read_text(encoding="utf-8")
    assert "Run 3 of 6" in before
    assert "Run 4 of 6" not in before
    kept = {
        arm: (tmp_path / "killed" / arm / "metrics.json").stat().st_mtime_ns for arm in ("lora_seed0", "lora_seed1")
    }
    finish(compare("killed"), log)
    after = log.read_text(encoding="utf-8").removeprefix(before)
    assert after.count("Resuming from") == 1
    assert "Run 1 of 6" not in after
    for arm in ("lora_seed0", "lora_seed1", "xgblora_seed0", "xgblora_seed1"):
        same_run(tmp_path / "whole" / arm, tmp_path / "killed" / arm)
    assert kept == {arm: (tmp_path / "killed" / arm / "metrics.json").stat().st_mtime_ns for arm in kept}


RESUMABLE = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "xgblora": True}
RESUMABLE |= {"xgblora_use_adaptive_merge": True, "xgblora_patience": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A checkpoint with every kind of file in it, and a trainer that could resume it."""
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = train(folder, build(ARCHITECTURES["opt"]), **RESUMABLE)
    whole = next(f for f in sorted(folder.glob("checkpoint-*")) if (f / "best_pair.safetensors").is_file())
    return whole, trainer


NAMES = {
    *("adapter_model.safetensors", "adapter_config.json", "ledger.json", "best_pair.safetensors", MANIFEST),
    *("training_state.safetensors", "training_state.json", "trainer_state.json"),
}


def mutations(content: bytes, seed: str) -> Iterator[tuple[str, bytes | None]]:
    """Removed, cut at several places, one bit turned at several places."""
    draw = random.Random(seed)
    yield "removed", None
    for place in {0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))}:
        yield f"cut to {place} bytes", content[:place]
    for place in {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(18))}:
        turned = bytearray(content)
        turned[place] ^= 1 << draw.randrange(8)
        yield f"bit of byte {place}", bytes(turned)


def test_every_damage_to_a_checkpoint_is_refused_by_name(checkpoint: tuple[Path, Trainer]) -> None:
    folder, trainer = checkpoint
    assert {file.name for file in folder.iterdir()} == NAMES
    tried = 0
    for name in sorted(NAMES):
        content = (folder / name).read_bytes()
        for what, damaged in mutations(content, name):
            if damaged is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damaged)
            tried += 1
            for load in (trainer.ledger.load, trainer.train):
                try:
                    load(str(folder))
                except XgbloraError as error:
                    message = str(error)
                else:
                    raise AssertionError(f"{name}, {what}: loaded")
                assert name in message, (name, what, message)
                assert "\n" not in message
        (folder / name).write_bytes(content)
    assert tried >= 200
    trainer.ledger.load(folder)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    command: Callable[[str, Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, steps = "per example, steps", 10

    def argv(folder: str) -> list[str]:
        return [*command(method, tmp_path / folder), "--max_steps", str(steps)]

    assert main(argv("whole")) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.json").unlink()
    newest, before = tmp_path / "damaged" / f"checkpoint-{steps}", tmp_path / "damaged" / f"checkpoint-{steps - 1}"
    assert before.is_dir()
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert main(argv("damaged")) == 0
    out = capsys.readouterr().out
    assert f"Not resuming from checkpoint-{steps}: {weights} is damaged" in out
    assert f"Resuming from {before}" in out
    same_run(tmp_path / "whole", tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.json").unlink()
    for folder in (newest, before):
        (folder / "ledger.json").unlink()
    assert main(argv("damaged")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no checkpoint of ")
    assert "ledger.json is missing; --overwrite_output_dir starts again" in err


@pytest.mark.parametrize(
    "file",
    [
        "metrics.json",
        "training_loss.jsonl",
        pytest.param("config.json", marks=pytest.mark.soak),
        pytest.param("eval_loss.jsonl", marks=pytest.mark.soak),
    ],
)
def test_damaged_files_of_a_run_are_one_line(
    file: str, command: Callable[[str, Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command("shared, LoRA", tmp_path / "run"), "--max_steps", "4"]
    assert main(argv) == 0
    if file.endswith("jsonl"):
        (tmp_path / "run" / "metrics.json").unlink()
    content = (tmp_path / "run" / file).read_bytes()
    for damage in (b"\xff\xfe\x00" + content, b"[1, 2]\n" + content, b"{}}" + content[3:]):
        (tmp_path / "run" / file).write_bytes(damage)
        capsys.readouterr()
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert file in err
        assert err.count("\n") == 1


def test_a_checkpoint_of_something_else_is_refused(checkpoint: tuple[Path, Trainer], tmp_path: Path) -> None:
    folder, _ = checkpoint
    stranger = build(ARCHITECTURES["opt"])
    stranger.model.decoder.layers[0].fc1.weight.data[0, 0] += 1
    with pytest.raises(XgbloraError, match=r"was trained otherwise \(base weights: .* there, .* here"):
        train(tmp_path / "a", stranger, **RESUMABLE, resume=str(folder))
    with pytest.raises(XgbloraError, match=r"was trained by AdamW, not by SGD: give the same --optim"):
        train(tmp_path / "c", **RESUMABLE | {"optim": "sgd"}, resume=str(folder))


def test_names_in_a_manifest_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x", encoding="utf-8")
    with sealed_folder(tmp_path / "sealed", {}) as work:
        (work / "a.txt").write_text("x", encoding="utf-8")
    digest = json.loads((tmp_path / "sealed" / MANIFEST).read_text(encoding="utf-8"))["sha256"]["a.txt"]
    write_json(tmp_path / "sealed" / MANIFEST, files.seal({}, {"../secret.txt": digest}))
    with pytest.raises(XgbloraError, match=r"secret\.txt is missing"):
        verify(tmp_path / "sealed")


def test_nobodys_files_are_replaced(tmp_path: Path) -> None:
    ledger = Ledger(attach(build(ARCHITECTURES["opt"])))
    ledger.save(tmp_path / "adapter")
    ledger.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(XgbloraError, match="holds files of something else"):
        ledger.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_writer_that_fails_leaves_the_former_folder(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with sealed_folder(tmp_path / "sealed", {}) as work:
            (work / "a.txt").write_text(text, encoding="utf-8")

    def fail() -> None:
        with sealed_folder(tmp_path / "sealed", {}) as work:
            (work / "a.txt").write_text("third", encoding="utf-8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    verify(tmp_path / "sealed")
    assert (tmp_path / "sealed" / "a.txt").read_text(encoding="utf-8") == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["sealed"]


RENAME = """
import os, signal, sys
from pathlib import Path
from xgblora.files import sealed_folder
root, killed = Path({root!r}), {killed}
def disturb(event, args):
    if event == "os.rename" and armed and str(args[1]) == str(root / "sealed"):
        armed.clear()
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("somebody is reading it")
armed = []
sys.addaudithook(disturb)
for text in ("first", "second"):
    with sealed_folder(root / "sealed", {{}}) as work:
        (work / "a.txt").write_text(text, encoding="utf-8")
        armed += [text] if text == "second" else []
"""


@pytest.mark.parametrize(
    "killed", [False, pytest.param(True, marks=pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there"))]
)
def test_the_former_folder_outlasts_the_moment_between_two_renames(killed: bool, tmp_path: Path) -> None:
    code = RENAME.format(root=str(tmp_path), killed=killed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == (-signal.SIGKILL if killed else 1), done.stderr
    names = [f for f in tmp_path.iterdir() if "second" not in (f / "a.txt").read_text(encoding="utf-8")]
    assert len(names) == 1
    assert names[0].name.endswith(".former.part") if killed else names[0].name == "sealed"
    verify(names[0])


def test_no_pickle_is_read_or_written(checkpoint: tuple[Path, Trainer]) -> None:
    folder, _ = checkpoint
    for file in folder.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        else:
            load_file(file)


@pytest.mark.parametrize(
    ("scheduler", "optim"),
    [
        ("constant", "sgd"),
        ("cosine", "adamw_torch"),
        ("cosine", "adafactor"),
        *(pytest.param("cosine", optim, marks=pytest.mark.soak) for optim in ("sgd", "adagrad", "rmsprop")),
        *(
            pytest.param("constant", optim, marks=pytest.mark.soak)
            for optim in ("adamw_torch", "adafactor", "adagrad", "rmsprop")
        ),
    ],
)
def test_every_kind_of_optimizer_resumes_exactly(optim: str, scheduler: str, tmp_path: Path) -> None:
    """From a checkpoint between two lines of the log, in the middle of a booster, with other data workers."""
    flags: dict[str, Any] = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
    flags |= {
        "save_total_limit": 9,
        "optim": optim,
        "lr_scheduler_type": scheduler,
        "xgblora": True,
        "xgblora_steps_per_iteration": 3,
    }
    whole, losses = train(tmp_path / "whole", **flags)
    resumed, again = train(
        tmp_path / "resumed", **flags, resume=str(tmp_path / "whole" / "checkpoint-4"), dataloader_num_workers=1
    )
    assert again == losses
    assert len(losses) == 3
    for mine, theirs in zip(resumed.adapters.layers.values(), whole.adapters.layers.values(), strict=True):
        for a, b in zip(mine.pairs(), theirs.pairs(), strict=True):
            assert torch.equal(a, b)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    """An objective that draws from the global generators, as rewards of drawn answers do."""
    import numpy as np

    def noisy(folder: Path, resume: str | None = None) -> list[float]:
        model = build(ARCHITECTURES["opt"])
        flags: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
        config = RunConfig(output_dir=str(folder), disable_tqdm=True, use_cpu=True, **flags)
        objective = lambda _, batch: torch.rand(batch.segments) + random.random() + np.random.rand()  # noqa: E731
        trainer = Trainer(model, config, attach(model, seed=0), examples(64), objective=objective)
        trainer.train(resume_from_checkpoint=resume)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    random.seed(0)
    np.random.seed(0)
    whole = noisy(tmp_path / "whole")
    random.seed(1)
    np.random.seed(1)
    assert noisy(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4")) == whole


class Poisoned:
    """The usual loss, NaN at the steps given, of one example alone or only under probes."""

    def __init__(self, steps: set[int], examples: slice = slice(None), probes: int = 2) -> None:
        self.steps, self.examples, self.calls, self.per_step = steps, examples, 0, 1
        self.probes = probes

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        losses = OptionLoss()(model, batch)
        step = self.trainer.state.global_step + 1
        if step in self.steps:
            losses = losses.clone()
            losses[self.examples] = float("nan")
        return losses


def poisoned(folder: Path, steps: set[int], examples_: slice = slice(None), **flags: Any) -> Trainer:
    model = build(ARCHITECTURES["opt"])
    flags = {"max_steps": 12, "logging_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2} | flags
    config = RunConfig(output_dir=str(folder), disable_tqdm=True, use_cpu=True, save_strategy="no", **flags)
    objective = Poisoned(steps, examples_)
    trainer = Trainer(
        model,
        config,
        attach(model, seed=0, xgblora=config.xgblora, rank=config.rank),
        examples(64),
        objective=objective,
    )
    objective.trainer = trainer
    return trainer


@pytest.mark.parametrize("kind", ["zo", "regular"])
def test_bad_steps_are_left_out_and_counted(kind: str, tmp_path: Path, log_lines: LogLines) -> None:
    flags: dict[str, Any] = {"trainer": kind, "max_bad_steps": 3, "xgblora": True, "xgblora_steps_per_iteration": 5}
    trainer = poisoned(tmp_path, {4, 5, 8}, slice(2, 3), **flags)
    seen: list[tuple[int, list[torch.Tensor]]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.global_step, [p.detach().clone() for p in trainer.adapters.parameters()]))

    trainer.add_callback(Watch())
    trainer.train()
    moved = {
        step + 1
        for (step, before), (_, after) in pairwise(seen)
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    }
    assert {4, 8}.isdisjoint(moved)  # 5 is a merge: a new pair begins there
    assert {1, 2, 3, 6, 7, 9, 10, 11} <= moved
    assert [booster.step for booster in trainer.ledger.boosters] == [5, 10]
    assert trainer.ledger.boosters[0].loss is None
    lines = {line["step"]: line for line in trainer.state.log_history if "learning_rate" in line}
    assert {step for step, line in lines.items() if line.get("skipped_steps")} == {4, 5, 8}
    assert {step for step, line in lines.items() if "loss" not in line} == {4, 5, 8}
    assert len(log_lines.containing("which was not applied")) == 3
    assert log_lines.containing(
        "step 5, which was not applied (2 in a row): the base alone gives it for training example"
    )


def test_too_many_bad_steps_stop_the_run_and_name_the_examples(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, {4, 5}, slice(2, 3), max_bad_steps=2)
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("the loss is nan at step 5, which was not applied: ")
    assert message.endswith("; the last checkpoint is kept")
    number = re.search(r"the base alone gives it for training example\(s\) (\d+)", message)
    assert number
    assert 1 <= int(number[1]) <= 64
    with pytest.raises(DivergedError, match="at step 4, which"):
        poisoned(tmp_path, {4, 5}).train()  # one is enough by default


def test_the_cause_is_found_by_trying(tmp_path: Path) -> None:
    """A base that overflows, adapters that have grown, probes that are too long."""

    def stopped(**flags: Any) -> str:
        model = flags.pop("model", None) or build(ARCHITECTURES["opt"])
        with pytest.raises(DivergedError) as caught:
            train(tmp_path, model, **{"max_steps": 30, "lora": True} | flags)
        return str(caught.value)

    assert "only the probes of training example(s)" in (words := stopped(zo_eps=1e30))
    assert "lower --zo_eps (now 1e+30)" in words
    grown = stopped(learning_rate=1e25, optim="sgd", zo_eps=1e-2)
    assert "the adapters have grown too far" in grown
    assert "lower --learning_rate" in grown
    half = build(ARCHITECTURES["llama"], torch.float16)
    with torch.no_grad():
        half.model.embed_tokens.weight[20] = torch.inf  # the first token of every prompt of one kind
    assert "the base alone gives it" in (words := stopped(model=half, load_float16=True))
    assert "load the base in bfloat16 or float32" in words


def test_zero_differences_are_shown(tmp_path: Path) -> None:
    """A probe so short that float32 loses it."""
    trainer, _ = train(tmp_path, zo_eps=1e-12, max_steps=2, lora=True)
    lines = [line for line in trainer.state.log_history if "zero_differences" in line]
    assert all(line["zero_differences"] > 0.9 for line in lines)
    trainer, _ = train(tmp_path, zo_eps=1e-2, max_steps=2, lora=True)
    assert all(line["zero_differences"] == 0 for line in trainer.state.log_history if "zero_differences" in line)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_the_log_tells_how_far_a_step_went(optim: str, tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, max_steps=1, optim=optim, lora=True, learning_rate=0.5, weight_decay=0.0)
    fresh = attach(build(ARCHITECTURES["opt"]), rank=trainer.args.rank, seed=trainer.args.seed)
    moved = [(a - b).flatten() for a, b in zip(trainer.adapters.parameters(), fresh.parameters(), strict=True)]
    line = next(line for line in trainer.state.log_history if "update_norm" in line)
    assert line["update_norm"] == pytest.approx(torch.cat(moved).norm().item(), rel=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="mounts a small disk")
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--xgblora --xgblora_steps_per_iteration 2 --save_steps 2 --save_total_limit 50 --optim adamw_torch".split()
    with limited(tmp_path / "disk", 400_000):
        folder = tmp_path / "disk" / "run"
        assert main(["train", "--output_dir", str(folder), *small, *EVERY_STEP.split(), *flags]) == 2
        err = capsys.readouterr().err
        assert "No space left on device" in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        kept = last_checkpoint(folder)
        assert kept is not None
        assert kept.name != f"checkpoint-{STEPS}"
        assert not list(folder.glob("*.part"))
        for old in sorted(folder.glob("checkpoint-*"))[:-1]:
            if old != kept:
                shutil.rmtree(old)  # room again
        argv = ["train", "--output_dir", str(folder), *small, *EVERY_STEP.split(), *flags]
        argv[argv.index("50")] = "1"
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert f"Resuming from {kept}" in out
        assert "report.html was not written (No space left on device): xgblora report" in out
        assert not (folder / "report.html").exists()
        assert not list(folder.glob("*.part"))


@pytest.mark.skipif(sys.platform == "win32", reason="folders are made read-only in another way")
def test_a_read_only_folder_is_one_line(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with limited(tmp_path / "disk", 100_000):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        assert (
            main(["train", "--lora", "--output_dir", str(tmp_path / "disk" / "run"), *small, *EVERY_STEP.split()]) == 2
        )
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "ead-only" in err
    assert err.count("\n") == 1


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, {tests!r})
from conftest import ARCHITECTURES, build, examples, train
from xgblora import XgbloraError, evaluate
from pathlib import Path
model, rows = build(ARCHITECTURES["opt"]), examples(4000)
train(Path({folder!r}), model, rows, max_steps=1, lora=True, per_device_train_batch_size=2)
model = build(ARCHITECTURES["opt"])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room},) * 2)
try:
    if {evaluating}:
        evaluate(model, rows * 4, batch_size=16000)
    train(Path({folder!r}), model, rows, max_steps=1, lora=True, zo_num_perturbations=1, trainer="regular",
          per_device_train_batch_size=4000, forward_tokens=10**9)
except XgbloraError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory in Linux's way")
@pytest.mark.parametrize(
    ("room", "evaluating", "says", "flag"),
    [
        (20_000_000, False, "at step 1, with 4000 examples of ", "--per_device_train_batch_size"),
        pytest.param(
            *(150_000_000, False, "at step 1, with 4000 examples of ", "--per_device_train_batch_size"),
            marks=pytest.mark.soak,
        ),
        (60_000_000, True, "evaluating 16000 examples of ", "--per_device_eval_batch_size"),
    ],
)
def test_out_of_memory_is_one_line(room: int, evaluating: bool, says: str, flag: str, tmp_path: Path) -> None:
    """Whether torch's own allocator fails first, or C++'s."""
    tests = str(Path(__file__).parent)
    code = OUT_OF_MEMORY.format(tests=tests, folder=str(tmp_path), room=room, evaluating=evaluating)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    words = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    assert words.startswith(f"out of memory {says}"), words
    assert f"lower {flag}" in words
