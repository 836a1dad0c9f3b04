"""Answers that a model writes: batches and adapters change nothing about them, and they are measured as SQuAD does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from conftest import ARCHITECTURES, build, byte_tokenizer, train_by_command
from xgblora import Base, Example, attach, encode, predict
from xgblora.base.cpu_layout import cpu_layout
from xgblora.learn.generation import Writer, exact_match_and_f1
from xgblora.tasks import Generation, Question, Task

TOKENIZER = byte_tokenizer()
NAMES = ("ann", "bob", "eve")
MINE = """data: {train: train.jsonl, test: test.jsonl}
prompt: "{{ name }} is called"
answer: name
generate: {max_new_tokens: 12}
metric: f1
"""


def step_by_step(model: PreTrainedModel, prompt: list[int], ends: Generation) -> str:
    """Greedy decoding by whole forwards, without cache, batch or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + ends.max_new_tokens and ids[-1] != TOKENIZER.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ends.stop in TOKENIZER.decode(ids[len(prompt) :]):
            break
    return TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True).split(ends.stop, 1)[0].strip()


@pytest.mark.parametrize("stop", ["\n", "e", "zz"])
def test_writing_is_greedy_decoding(
    stop: str, architecture: PreTrainedConfig, randomise: Callable[[Any, int], None]
) -> None:
    """With an adapter that has learned something, batches of prompts of different lengths, in either layout."""
    model = build(architecture)
    prompts = [TOKENIZER("x" * length + " is")["input_ids"] for length in (1, 9, 4, 20)]
    rows = [Example(prompt, [[5]], 0) for prompt in prompts]
    ends = Generation(10, stop)
    bare = Writer(TOKENIZER, ends).write(Base(model), rows)
    randomise(attach(model, 1, 16), 1)
    expected = [step_by_step(model, prompt, ends) for prompt in prompts]
    assert Writer(TOKENIZER, ends).write(Base(model), rows) == expected
    with cpu_layout(model):
        assert Writer(TOKENIZER, ends).write(Base(model), rows) == expected
    assert bare != expected or stop == "e"
    assert all(stop not in text for text in expected)


def test_measured_as_squad_does() -> None:
    rows = [Example([1], [[2]], 0, references=("the cat", "a black Cat")), Example([1], [[2]], 0, references=("1999",))]
    assert exact_match_and_f1(rows, ["Cat!", "in 1999"]) == pytest.approx((1 / 2, (1 + 2 / 3) / 2))
    assert exact_match_and_f1(rows, ["", "dog"]) == (0, 0)


def test_questions_that_are_answered_in_writing() -> None:
    task = Task("T", "{{ q }}?", (), "a", dict, classification=False, metric="f1", generation=Generation())
    assert task.question({"q": "who", "a": [" Ann ", "Bob"]}) == Question("who?", (" Ann\n",), (0,), ("Ann", "Bob"))
    assert task.question({"q": "how many", "a": 3}).references == ("3",)
    assert task.question({"q": "who", "a": "Ann"}).answered == "who? Ann"
    assert task.question({"q": "who"}, answered=False) == Question("who?", (), ())
    assert len(predict(build(ARCHITECTURES["llama"]), TOKENIZER, task, ["who", "what"])) == 2


def test_a_prompt_leaves_room_for_what_is_written() -> None:
    task = Task("T", "{{ q }}?", (), "a", dict, classification=False, generation=Generation(max_new_tokens=12))
    for answered in (True, False):
        row = {"q": "x" * 100, "a": "Ann"}
        (example,) = encode(task, [row], TOKENIZER, 40, answered=answered)
        assert len(example.prompt) + max(12, *map(len, example.options), 0) <= 40
        assert TOKENIZER.decode(example.prompt).endswith("x?")


def test_a_model_learns_to_write_an_answer(tmp_path: Path) -> None:
    """From data files to exact matches: the tiny model learns to repeat a name, word for word, and to stop."""
    lines = "".join(json.dumps({"name": NAMES[number % 3]}) + "\n" for number in range(60))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    build(ARCHITECTURES["llama"]).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    flags = (
        "--trainer regular --lora --optim adamw_torch --learning_rate 1e-2 --max_steps 100 --num_train 40 --num_dev 10"
    )
    flags += " --num_eval 9 --eval_steps 50 --lora_r 8"
    flags += " --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    metrics = train_by_command(tmp_path, tmp_path / "model", flags, MINE)
    assert metrics["zero_shot_score"] == 0
    assert (metrics["accuracy"], metrics["score"], metrics["dev_score"]) == (1, 1, 1)
    curve = [json.loads(line) for line in (tmp_path / "run" / "eval_loss.jsonl").read_text("utf-8").splitlines()]
    assert curve[-1]["eval_loss"] < curve[0]["eval_loss"]
    assert "eval_accuracy" not in curve[-1]  # on the way nothing is written


@pytest.mark.parametrize(("flags", "writes"), [("", False), ("--load_best_model_at_end true", False),
    ("--load_best_model_at_end true --metric_for_best_model accuracy", True)])  # fmt: skip
def test_answers_are_written_on_the_way_where_they_decide(flags: str, writes: bool, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"name": NAMES[number % 3]}) + "\n" for number in range(40))
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    build(ARCHITECTURES["llama"]).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    flags += " --max_steps 4 --eval_steps 2 --save_steps 2 --num_train 20 --num_dev 4 --num_eval 4"
    metrics = train_by_command(tmp_path, tmp_path / "model", flags, MINE)
    assert metrics["dev_score"] is not None  # in the end they are
    curve = [json.loads(line) for line in (tmp_path / "run" / "eval_loss.jsonl").read_text("utf-8").splitlines()]
    assert [("eval_accuracy" in line) for line in curve] == [writes, writes]
