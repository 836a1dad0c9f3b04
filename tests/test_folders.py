"""The folder of a run: one run at a time, nobody's files lost, checkpoints by their steps."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import examples, train
from processes import EVERY_STEP, STEPS, finish, limited, start, wait_for
from xgblora.cli import main
from xgblora.files import sealed_folder, write_json
from xgblora.training.checkpoints import checkpoints, last_checkpoint


def argv(folder: Path, small: list[str], *more: str) -> list[str]:
    flags = [*EVERY_STEP.split(), "--xgblora", "--xgblora_steps_per_iteration", "7", *more]
    return ["train", "--output_dir", str(folder), *flags, *small]


@pytest.mark.skipif(sys.platform == "win32", reason="each process imports torch, one after the other")
def test_one_of_three_starts_on_a_new_folder_runs(small: list[str], tmp_path: Path) -> None:
    logs = [tmp_path / f"{number}.txt" for number in range(4)]
    finish(argv(tmp_path / "alone", small), logs[3])
    folder = tmp_path / "parent" / "run"
    processes = [start(argv(folder, small), log) for log in logs[:3]]
    for process in processes:
        process.join(120)
    words = [log.read_text(encoding="utf-8") for log in logs[:3]]
    assert sum("Initializing LoRA" in log_text for log_text in words) == 1, words
    for process, log_text in zip(processes, words, strict=True):
        if "Initializing LoRA" in log_text:
            assert process.exitcode == 0, log_text
        else:  # refused, or it has waited until all was done
            assert "is at work in" in log_text or "nothing to do" in log_text
    for name in ("training_loss.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("made", [False, True])
def test_a_run_that_is_refused_leaves_no_folder(made: bool, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "run"
    if made:
        folder.mkdir(parents=True)
    small[small.index("--model_name") + 1] = str(tmp_path / "no_model")
    assert main(argv(folder, small)) == 2
    assert folder.is_dir() == made
    assert list(tmp_path.iterdir()) == [tmp_path / "parent"] * made
    assert not list(folder.rglob("*"))


def test_a_clock_that_steps_back_costs_no_checkpoint(tmp_path: Path) -> None:
    flags = {"xgblora": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    train(tmp_path, max_steps=4, **flags)
    for folder in checkpoints(tmp_path):
        os.utime(folder, (4e9, 4e9))  # in the year 2096
    train(tmp_path, max_steps=10, resume=str(last_checkpoint(tmp_path)), **flags)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-10"]


def test_the_best_checkpoint_outlasts_the_rotation(tmp_path: Path) -> None:
    flags = {"xgblora": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 20}
    flags |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3}
    trainer, _ = train(tmp_path, rows=examples(16), **flags)
    best = Path(str(trainer.state.best_model_checkpoint))
    assert checkpoints(tmp_path) == [best, tmp_path / "checkpoint-20"]
    assert best.name not in ("checkpoint-18", "checkpoint-20")
    assert trainer.args.save_total_limit == 2


def test_a_limit_of_one_takes_no_folder_that_is_somebody_elses(tmp_path: Path) -> None:
    flags = {"xgblora": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 8}
    flags |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3}
    notes = tmp_path / "checkpoint-999" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("somebody's", encoding="utf-8")
    trainer, _ = train(tmp_path, rows=examples(16), **flags)
    assert notes.is_file()
    assert Path(str(trainer.state.best_model_checkpoint)).is_dir()


def test_checkpoints_of_steps_yet_to_come_go_first(tmp_path: Path) -> None:
    flags = {"xgblora": True, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, max_steps=8, save_total_limit=9, **flags)
    train(tmp_path, max_steps=6, save_total_limit=2, resume=str(tmp_path / "checkpoint-2"), **flags)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


NOTES = "somebody's"


@pytest.mark.parametrize(
    "foreign",
    [
        *("adapter/notes.txt", "adapter/adapter_model.safetensors", "checkpoint-7/notes.txt", "config.json"),
        *("metrics.json", "training_loss.jsonl", "checkpoint-7/manifest.json", "adapter/manifest.json"),
    ],
)
def test_overwriting_takes_nothing_that_no_run_wrote(
    foreign: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in a folder that never held a run; and of a run's folder, not what was put beside its files."""
    file = tmp_path / "run" / foreign
    file.parent.mkdir(parents=True)
    file.write_text(NOTES, encoding="utf-8")
    assert main(argv(tmp_path / "run", small, "--overwrite_output_dir")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(file.parent) in err
    assert file.read_text(encoding="utf-8") == NOTES
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [file]


def test_overwriting_a_run_leaves_what_was_put_beside_it(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(argv(folder, small)) == 0
    notes = folder / "notes.txt"
    notes.write_text(NOTES, encoding="utf-8")
    (folder / "checkpoint-39" / "manifest.json").write_text("{", encoding="utf-8")  # damaged, and still ours
    (folder / f"checkpoint-{STEPS}" / "ledger.json").unlink()
    assert main(argv(folder, small, "--overwrite_output_dir", "--max_steps", "4", "--save_steps", "4")) == 0
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4"]
    assert notes.read_text(encoding="utf-8") == NOTES
    inside = folder / "adapter" / "README.md"
    inside.write_text(NOTES, encoding="utf-8")
    capsys.readouterr()
    assert main(argv(folder, small, "--overwrite_output_dir")) == 2
    assert "holds files of something else (README.md)" in capsys.readouterr().err
    assert (folder / "metrics.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["adapter", "checkpoint-4"])
def test_links_are_not_followed(
    name: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert main(argv(folder, small, "--max_steps", "4", "--save_steps", "4")) == 0
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere, target_is_directory=True)
    before = {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    assert main(argv(folder, small, "--overwrite_output_dir")) == 2
    assert f"{folder / name} is a link" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="files in use cannot be removed there")
@pytest.mark.parametrize("name", ["", "training_loss.jsonl", "eval_loss.jsonl", "checkpoint-3"])
def test_what_is_removed_while_a_run_is_at_work_is_missed(name: str, small: list[str], tmp_path: Path) -> None:
    """A checkpoint may go: there are others. A curve may not come out shorter than it was."""
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    steps = "150" if name == "checkpoint-3" else "2000"  # on a busy machine, too, it is still at work then
    process = start(argv(folder, small, "--save_total_limit", "50", "--max_steps", steps, "--logging_steps", "1"), log)
    wait_for(process, log, "at step 14")
    (folder / name).rename(tmp_path / "removed")  # at once: a run that ends removes its lock meanwhile
    process.join(120)
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    if name == "checkpoint-3":
        assert process.exitcode == 0
    else:
        assert process.exitcode == 2
        assert last.startswith("error: ")
        assert str(folder) in last


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_a_run_that_was_stopped_for_a_while_ends_as_if_it_had_not_been(small: list[str], tmp_path: Path) -> None:
    finish(argv(tmp_path / "whole", small), tmp_path / "whole.txt")
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    process = start(argv(folder, small), log)
    wait_for(process, log, "at step 7")
    os.kill(process.pid, signal.SIGSTOP)
    second = start(argv(folder, small), tmp_path / "second.txt")
    second.join(60)
    assert second.exitcode == 2  # a process that sleeps still holds its folder
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0
    for name in ("training_loss.jsonl", "eval_loss.jsonl", "trainer_state.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="mounts a disk")
@pytest.mark.parametrize("verb", ["train", "compare", "export", "stages"])
def test_every_verb_says_that_a_folder_is_read_only(
    verb: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with limited(tmp_path / "disk", 12_000_000):
        folder = tmp_path / "disk" / "run"
        assert main(argv(folder, small, "--max_steps", "4", "--save_steps", "4")) == 0
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        commands = {
            "train": argv(folder, small, "--max_steps", "5", "--overwrite_output_dir"),
            "compare": ["compare", "--output_root", str(tmp_path / "disk" / "out"), *EVERY_STEP.split(), *small],
            "export": ["export", str(folder)],
            "stages": ["stages", str(folder)],
        }
        before = sorted((tmp_path / "disk").rglob("*"))
        capsys.readouterr()
        assert main(commands[verb]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: Read-only file system")
        assert err.count("\n") == 1
        assert sorted((tmp_path / "disk").rglob("*")) == before


def test_what_dead_writers_left_goes_with_the_next_one(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("spawn").Process(target=print)
    dead.start()
    dead.join()
    for process in (dead.pid, os.getpid()):
        (tmp_path / f".adapter.{process}.part").mkdir()
        (tmp_path / f"result.json.{process}.part").write_text("{", encoding="utf-8")
    (tmp_path / "data.part").write_text("somebody's", encoding="utf-8")
    with sealed_folder(tmp_path / "adapter", {}) as work:
        (work / "a.txt").write_text("a", encoding="utf-8")
    write_json(tmp_path / "result.json", {})
    left = {file.name for file in tmp_path.iterdir()}
    assert f".adapter.{dead.pid}.part" not in left
    assert f"result.json.{dead.pid}.part" not in left
    assert {"adapter", "result.json", "data.part"} <= left


def test_the_time_of_a_run_counts_what_was_before_a_resumption(small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(argv(folder, small)) == 0
    stored = json.loads((folder / f"checkpoint-{STEPS}" / "training_state.json").read_text(encoding="utf-8"))
    (folder / "metrics.json").unlink()
    assert main(argv(folder, small)) == 0  # no step is left to take
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["training_seconds"] == stored["progress"]["seconds"] > 0
