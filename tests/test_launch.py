"""Many runs at once: what one by one leaves, whatever is killed meanwhile, and one line where something is wrong."""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Run
from processes import finish, start, wait_for
from test_reliability import same_run
from xgblora.errors import XgbloraError
from xgblora.runs.cluster import on_ray
from xgblora.training.interruption import LOCK

STEPS = "--max_steps 300 --save_steps 20 --eval_steps 100 --learning_rate 1e-2 --zo_eps 1e-2"
RUNS = "--methods lora xgblora in-context --seeds 0 1 --dtype float32 --in_context_examples 2 --cores_per_run 1"
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="a process is ended there, and never told to")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def compared(small: list[str]) -> list[str]:
    return ["compare", *RUNS.split(), *STEPS.split(), "--xgblora_steps_per_iteration", "60", *small, "--output_root"]


def same_comparison(one: Path, other: Path) -> None:
    """The files of every run, and the summary but for seconds and memory."""
    for folder in one.glob("*_seed*"):
        if (folder / "adapter").is_dir():
            same_run(folder, other / folder.name)
    summaries = [json.loads((root / "summary.json").read_text(encoding="utf-8")) for root in (one, other)]
    for summary in summaries:
        for facts in (*summary["methods"].values(), *summary["runs"]):
            for name in ("seconds_per_step", "training_seconds", "peak_memory_mb"):
                facts.pop(name, None)
    assert summaries[0] == summaries[1]


def at_work_in(run: Path) -> int:
    """The process that trains there, once it has saved a checkpoint."""
    for _ in range(12_000):
        if any(run.glob("checkpoint-*")) and (run / LOCK).is_file():
            return int((run / LOCK).read_text(encoding="utf-8").split()[0])
        time.sleep(0.005)
    raise AssertionError(f"nothing trains in {run}")


def gone(process: int) -> None:
    """Wait until a process has ended."""
    for _ in range(6000):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {process} is still at work")


@needs_signals
def test_a_run_goes_on_in_another_process(compared: list[str], tmp_path: Path) -> None:
    flags = [*compared, str(tmp_path / "one"), "--methods", "lora"]
    finish(flags, tmp_path / "one.txt")
    flags[len(compared)] = str(tmp_path / "beside")
    process = start([*flags, "--launcher", "local", "--cores", "2"], tmp_path / "log.txt")
    os.kill(at_work_in(tmp_path / "beside" / "lora_seed0"), signal.SIGKILL)
    process.join(120)
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert process.exitcode == 0, log
    assert "The process of lora_seed0 died (SIGKILL): the run goes on at its last checkpoint" in log
    same_comparison(tmp_path / "one", tmp_path / "beside")


@pytest.mark.soak
@needs_signals
def test_runs_beside_each_other_leave_what_one_by_one_leaves(compared: list[str], tmp_path: Path) -> None:
    """The process of one is killed, the command is told to stop, then killed itself, and goes on each time."""
    log, root = tmp_path / "log.txt", tmp_path / "beside"
    finish([*compared, str(tmp_path / "one")], tmp_path / "one.txt")
    beside = [*compared, str(root), "--launcher", "local", "--cores", "2"]
    process = start(beside, log)
    os.kill(at_work_in(root / "lora_seed0"), signal.SIGKILL)
    wait_for(process, log, "The process of lora_seed0 died (SIGKILL): the run goes on at its last checkpoint")
    worker = at_work_in(root / "xgblora_seed0")
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command with --skip_completed goes on" in log.read_text(encoding="utf-8")
    gone(worker)
    process = start([*beside, "--skip_completed"], log)
    worker = at_work_in(root / "xgblora_seed1")
    process.kill()
    gone(worker)  # nobody is left who would tell it to
    finish([*beside, "--skip_completed"], log)
    assert "Traceback" not in log.read_text(encoding="utf-8")
    same_comparison(tmp_path / "one", root)


@pytest.mark.soak
def test_a_run_whose_process_always_dies_is_given_up(
    small: list[str], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deadly.py").write_text(
        "import os\n\ndef worth(prompt, completion, answer):\n    os._exit(7)\n", "utf-8"
    )
    flags = ["--methods", "lora", "--seeds", "0", "--reward", "deadly:worth", "--launcher", "local"]
    code, _, err = run("compare", *flags, *small, "--dtype", "float32", "--output_root", tmp_path / "runs")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: the process of")
    assert "died 4 times (exit code 7)" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--launcher local --cores 0", "--cores must be at least 1, got 0"),
        ("--launcher local --cores 2 --cores_per_run 3", "--cores_per_run 3 are more than the 2 there are"),
        ("--cores_per_run 9999", "--cores_per_run 9999 are more than the"),
        ("--launcher slurm", "invalid choice: 'slurm'"),
    ],
)
def test_launchers_that_cannot_be_are_one_line(flags: str, message: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run("compare", *flags.split(), "--output_root", tmp_path / "runs")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_a_refused_run_ends_all_with_its_line(small: list[str], tmp_path: Path, run: Run) -> None:
    flags = ["--methods", "lora", "--seeds", "0", "1", "--launcher", "local", "--lora_target_modules", "none_such"]
    code, _, err = run("compare", *flags, *small, "--dtype", "float32", "--output_root", tmp_path / "runs")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "none_such" in err
    assert not (tmp_path / "runs").exists()


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(XgbloraError, match=r"python -m pip install 'xgblora\[scale\]'"):
        next(on_ray([], 1, 1, 1, [], 0))


@needs_ray
@needs_signals
@pytest.mark.soak
def test_tasks_of_a_ray_cluster_leave_what_one_by_one_leaves(
    compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, root = tmp_path / "log.txt", tmp_path / "ray"
    finish([*compared, str(tmp_path / "one")], tmp_path / "one.txt")
    process: Any = start([*compared, str(root), "--launcher", "ray", "--cores", "2"], log)
    os.kill(at_work_in(root / "lora_seed0"), signal.SIGKILL)
    process.join(300)
    assert process.exitcode == 0, log.read_text(encoding="utf-8")
    same_comparison(tmp_path / "one", root)


@needs_ray
def test_a_ray_cluster_that_does_not_answer_is_one_line(
    small: list[str], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    flags = ["--methods", "lora", "--seeds", "0", "--launcher", "ray", "--output_root", tmp_path / "runs"]
    code, _, err = run("compare", *flags, *small, "--dtype", "float32")
    assert code == 2
    assert "no Ray cluster answers at RAY_ADDRESS, 127.0.0.1:1" in err.splitlines()[-1]
