"""--other_text: the loss of text that nothing was trained on, before and after."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, build, byte_tokenizer, refusal_by_command, train_by_command
from xgblora import Base, attach
from xgblora.cli import main
from xgblora.learn.forgetting import encode_texts, read_texts, token_loss

TEXTS = ["It rained all day, and the river rose.", "", "No one was hurt.", "x", "Ships lay in the bay: five of them."]
SIZES = "--num_train 32 --num_dev 8 --num_eval 12"


def mean_loss(model: torch.nn.Module, texts: list[str], most: int = 64) -> float:
    """Of a token, one text after the other, by transformers' own loss."""
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([byte_tokenizer()(text)["input_ids"][:most]])
        if ids.shape[1] > 1:
            with torch.inference_mode():
                total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_loss_of_a_token_is_that_of_transformers(
    name: str, batch_size: int, randomise: Callable[[Any, int], None]
) -> None:
    model = build(ARCHITECTURES[name])
    adapters = attach(model, 4, 16)
    randomise(adapters, 0)
    texts = encode_texts([text for text in TEXTS if text], byte_tokenizer(), 20)
    assert [len(text.prompt) for text in texts] == [19, 15, 19]
    assert token_loss(Base.of(model), texts, batch_size) == pytest.approx(mean_loss(model, TEXTS, 20), rel=1e-5)


@pytest.mark.parametrize("flags", ["--lora_r 2 --max_steps 6 --learning_rate 0.05", "--recipe boost"])
def test_what_a_training_forgets_is_in_the_record(
    flags: str, tmp_path: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    flags += f" {SIZES} --task_name SST2 --data_dir {data_folder} --other_text {tmp_path / 'other.txt'}"
    metrics = train_by_command(tmp_path, model_folder, flags)
    before, after = metrics["zero_shot_other_text_loss"], metrics["other_text_loss"]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert before == pytest.approx(mean_loss(base, TEXTS), rel=1e-5)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    assert after == pytest.approx(mean_loss(plain, TEXTS), rel=1e-5)
    assert after != before
    out = capsys.readouterr().out
    assert f"Other text: the loss of a token {before:.3f} -> {after:.3f} nats ({after - before:+.3f})." in out
    assert "forgot" in out


def test_a_comparison_says_what_each_method_forgets(
    tmp_path: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    command = f"compare --model_name {model_folder} --use_cpu true --disable_tqdm true --output_root {tmp_path / 'all'}"
    command += f" --task_name SST2 --data_dir {data_folder} {SIZES} --seeds 0 1 --max_steps 4 --eval_steps 2"
    command += f" --methods lora boost in-context --lora_r 1 --other_text {tmp_path / 'other.txt'}"
    assert main(command.split()) == 0
    summary = json.loads((tmp_path / "all" / "summary.json").read_text(encoding="utf-8"))
    before = {run["zero_shot_other_text_loss"] for run in summary["runs"]}
    assert len(before) == 1
    for label, method in summary["methods"].items():
        assert (method["other_text_loss"]["mean"] in before) is (label == "in-context"), label
    assert "forgot: rise of other text's loss" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--other_text", "--recipe boost --boost_keep"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"\n \n", "holds no text: a text a line is wanted"),
        (b"\xff\xfe\xfa", "it is not UTF-8 text"),
        (b"x\ny\n", "have one token each"),
    ],
)
def test_a_file_without_text_is_refused_in_a_line(
    content: bytes | None,
    says: str,
    flag: str,
    tmp_path: Path,
    model_folder: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "other.txt"
    if content is not None:
        file.write_bytes(content)
    line = refusal_by_command(
        tmp_path, model_folder, f"--task_name SST2 --data_dir {data_folder} {SIZES} {flag} {file}", capsys
    )
    assert says in line
    assert flag.rsplit(maxsplit=1)[-1] in line
    assert not (tmp_path / "run").exists()


def test_texts_are_read_as_people_save_them(tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes("\ufeffeins\r\n\r\nzwei ü\r\n".encode())
    assert read_texts(tmp_path / "texts") == ["eins", "zwei ü"]
