"""The log of losses: an adapter after any step from it alone, to the last bit, and nothing from a damaged one."""

import json
from pathlib import Path

import pytest

from conftest import Run
from processes import STEPS
from xgblora.files import digest

PACE = f"--max_steps {STEPS} --save_steps 7 --save_total_limit 40 --learning_rate 1e-2 --zo_eps 1e-2"
KINDS = {
    "per example, merges": f"--xgblora --xgblora_steps_per_iteration 7 --lr_scheduler_type linear {PACE}",
    "shared, accumulated": f"--lora --lora_r 2 --zo_directions shared --gradient_accumulation_steps 2 {PACE}",
    "two probes, Adam": f"--xgblora --zo_num_perturbations 2 --optim adamw_torch --max_grad_norm 0.1 {PACE}",
    "by the loss": f"--xgblora --xgblora_use_adaptive_merge --xgblora_patience 2 --xgblora_layers 1 {PACE}",
    "reward": f"--xgblora --reward accuracy --xgblora_shrinkage 0.5 --xgblora_steps_per_iteration 9 {PACE}",
    "written": f"--xgblora --train_as_classification false --num_train_epochs 2 {PACE}",
}


def trained(run: Run, folder: Path, flags: str, small: list[str]) -> Path:
    code, _, err = run("train", "--output_dir", folder, *flags.split(), *small)
    assert code == 0, err
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_comes_back_without_a_forward(kind: str, run: Run, small: list[str], tmp_path: Path) -> None:
    folder = trained(run, tmp_path / "run", KINDS[kind], small)
    for step in (7, 28, STEPS):
        code, out, err = run("replay", folder, "--step", step)
        assert code == 0, err
        assert f"{step} steps replayed" in out
        assert "the same bytes as " + ("adapter" if step == STEPS and kind != "reward" else f"checkpoint-{step}") in out
        again = folder / f"replayed-{step}" / "adapter_model.safetensors"
        left = folder / (f"checkpoint-{step}" if step < STEPS else "adapter")
        if kind != "reward" or step < STEPS:  # the end of a run shrinks the last booster
            assert digest(again) == digest(left / "adapter_model.safetensors")


def test_odd_logs_are_one_line(run: Run, small: list[str], tmp_path: Path) -> None:
    folder = trained(run, tmp_path / "run", KINDS["per example, merges"], small)
    log = folder / "replay.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    damaged = {
        "has a gap after step 4": [*lines[:5], *lines[7:]],
        "does not begin with the first step": lines[1:],
        "line 4 is damaged": [*lines[:3], "{no json\n", *lines[4:]],
        "the log is damaged": [*lines[:3], json.dumps(json.loads(lines[3]) | {"losses": [1.0]}) + "\n", *lines[4:]],
        "--step must be 1 to 40": lines,
    }
    for message, kept in damaged.items():
        log.write_text("".join(kept), encoding="utf-8")
        code, _, err = run("replay", folder, *(["--step", "41"] if message.startswith("--step") else []))
        assert (code, len(err.splitlines())) == (2, 1)
        assert message in err
        assert not list(folder.glob("replayed*"))
    log.write_text("".join([*lines[:5], *lines[7:]]), encoding="utf-8")
    assert run("replay", folder, "--step", "4")[0] == 0  # what comes before a gap is whole
    log.unlink()
    code, _, err = run("replay", folder)
    assert code == 2
    assert "replay.jsonl is missing" in err


def test_runs_of_other_kinds_leave_no_log(run: Run, small: list[str], tmp_path: Path) -> None:
    for name, flags in {
        "boost": "--recipe boost --boost_boosters 1",
        "backprop": "--trainer regular --max_steps 2",
    }.items():
        assert not (trained(run, tmp_path / name, flags, small) / "replay.jsonl").exists()
