"""Other tools load what a run leaves, and find the numbers that xgblora finds: the scripts of examples/clients."""

import csv
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from xgblora import load_run
from xgblora.base.wheels import shipped_file
from xgblora.cli import main
from xgblora.config import EMBEDDED_MODEL

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "examples" / "clients"
ROWS = ROOT / "examples" / "own_data" / "test.csv"
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the README there, on the embedded model."""
    root = tmp_path_factory.mktemp("clients")
    task = ROOT / "examples" / "own_data" / "packages.yaml"
    run = [
        "--recipe",
        "boost",
        "--task_file",
        str(task),
        "--dtype",
        "float32",
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
    ]
    assert main(["train", *run, "--output_dir", str(root / "run")]) == 0
    for flags in ("merged --boosters 0 --output base", "merged --output merged", "gguf-lora --output mine.gguf"):
        *settings, output = flags.split()
        assert main(["export", str(root / "run"), "--format", *settings, str(root / output)]) == 0
    return root


@pytest.fixture(scope="module")
def ours(made: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "xgblora", "eval", str(made / "run"), "--file", str(ROWS), "--format", "json"]
    judged: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return judged


WRITTEN = """\
data: {{train: {folder}/train.csv, test: {folder}/test.csv}}
prompt: "{{{{ description }}}}. This is software for"
answer: section
generate: {{max_new_tokens: 5}}
num_dev: 10
"""


def test_what_a_model_writes(tmp_path: Path) -> None:
    """Boosters of text: plain PEFT, and transformers with the merged model, write what xgblora predict writes."""
    task = tmp_path / "written.yaml"
    task.write_text(WRITTEN.format(folder=(ROOT / "examples" / "own_data").as_posix()), encoding="utf-8")
    run = tmp_path / "run"
    flags = "--recipe boost --boost_boosters 2 --num_eval 10 --dtype float32 --disable_tqdm true --use_cpu true"
    assert main(["train", "--task_file", str(task), *flags.split(), "--output_dir", str(run)]) == 0
    for settings in ("--boosters 0 --output base", "--output merged"):
        *choice, output = settings.split()
        assert main(["export", str(run), "--format", "merged", *choice, str(tmp_path / output)]) == 0
    rows = list(csv.DictReader(io.StringIO(ROWS.read_text(encoding="utf-8"))))[:24]
    with load_run(run) as model:
        ours = [prediction.answer for prediction in model.predictions(rows)]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    before = [written(base, tokenizer, row["description"]) for row in rows]
    plain = PeftModel.from_pretrained(base, str(run / "adapter"))
    for other in (plain, merged):
        assert [written(other, tokenizer, row["description"]) for row in rows] == ours
    assert sum(a != b for a, b in zip(before, ours, strict=True)) > len(rows) // 2
    assert len(set(ours)) > 2


def written(model: Any, tokenizer: Any, description: str) -> str:
    """What transformers writes greedily, up to the end of the line."""
    asked = tokenizer(f"\n{description}. This is software for", return_tensors="pt")
    ids = model.generate(**asked, do_sample=False, max_new_tokens=5, pad_token_id=0)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).split("\n")[0].strip()


def printed_by(command: list[str], folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    line = text.strip().splitlines()[-1]
    return [float(number) for number in re.findall(r"\d+\.\d+|\d+", line.partition(":")[2])]


def test_plain_peft(made: Path, ours: dict[str, Any]) -> None:
    command = [
        sys.executable,
        str(CLIENTS / "plain_peft.py"),
        str(made / "base"),
        str(made / "run" / "adapter"),
        str(ROWS),
    ]
    right, rows, loss = numbers(printed_by(command))
    assert right / rows == pytest.approx(ours["accuracy"])
    assert loss == pytest.approx(ours["loss"], abs=6e-5)


def test_pipeline(made: Path, ours: dict[str, Any]) -> None:
    right, rows = numbers(printed_by([sys.executable, str(CLIENTS / "pipeline.py"), str(made / "merged"), str(ROWS)]))
    assert right / rows == pytest.approx(ours["accuracy"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_lm_evaluation_harness(made: Path, ours: dict[str, Any]) -> None:
    model = f"pretrained={made / 'base'},peft={made / 'run' / 'adapter'},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--tasks", "packages"]
    text = printed_by([*command, "--include_path", str(CLIENTS)])
    accuracy = re.search(r"\|acc\s*\|[^|]*\|\s*([\d.]+)", text)
    assert accuracy is not None
    assert float(accuracy[1]) == pytest.approx(ours["accuracy"], abs=6e-5)


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")
def test_llama_cpp(made: Path, ours: dict[str, Any], tmp_path: Path) -> None:
    """Its activations have 8 bits: near our numbers, not equal."""
    shutil.copy(CLIENTS / "llama_cpp.mjs", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    try:
        printed_by(["npm", "install", "--no-audit", "--no-fund", "node-llama-cpp@3.22.1", "csv-parse"], tmp_path)
    except AssertionError:
        pytest.skip("npm's registry cannot be reached")
    files = [str(shipped_file(EMBEDDED_MODEL)), str(made / "mine.gguf"), str(ROWS)]
    right, rows, loss = numbers(printed_by(["node", "llama_cpp.mjs", *files], tmp_path))
    assert right / rows == pytest.approx(ours["accuracy"], abs=0.04)
    assert loss == pytest.approx(ours["loss"], abs=0.02)
