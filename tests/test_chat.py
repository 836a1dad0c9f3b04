"""Conversations: the loss is on the assistant's turns alone, in the model's own template."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import ARCHITECTURES, build, byte_tokenizer, train_by_command
from xgblora import XgbloraError, encode, load_task, predict
from xgblora.base.load import load_tokenizer
from xgblora.cli import main
from xgblora.tasks import Chat, Generation, load_splits

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = Chat("C", "messages", dict)
GREETED = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ]
}
MINE = """data: {train: train.jsonl, test: test.jsonl}
chat: messages
generate: {max_new_tokens: 12}
num_dev: 8
"""


def chatting(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_every_turn_of_the_assistant_is_an_example() -> None:
    tokenizer = chatting()
    turns = encode(CHAT, [GREETED], tokenizer, 512)
    before = "[system]Be kind.</s>[user]Hi</s>[assistant]"
    assert [tokenizer.decode(e.prompt) for e in turns] == [before, before + "Hello!</s>[user]Bye</s>[assistant]"]
    assert [[tokenizer.decode(option) for option in e.options] for e in turns] == [["Hello!</s>"], ["See you.</s>"]]
    assert [e.references for e in turns] == [("Hello!",), ("See you.",)]
    assert all(e.options[0][-1] == tokenizer.eos_token_id for e in turns), "it learns to end"
    short = encode(CHAT, [GREETED], tokenizer, 120)[1]
    assert len(short.prompt) == 20
    assert tokenizer.decode(short.prompt).endswith("Bye</s>[assistant]")


def test_a_conversation_leaves_room_for_what_is_said_next() -> None:
    """Of a model whose context is 64 tokens."""
    chat = replace(CHAT, generation=Generation(12, ""))
    asked = {"messages": [{"role": "user", "content": "x" * 200}]}
    (example,) = encode(chat, [asked], chatting(), 64, answered=False)
    assert len(example.prompt) == 52
    assert len(predict(build(ARCHITECTURES["opt"]), chatting(), chat, [asked])) == 1
    with pytest.raises(XgbloraError, match="row 1: what is to be said leaves no room for a prompt within 12"):
        encode(chat, [asked], chatting(), 12, answered=False)


def test_the_real_models_template() -> None:
    """SmolLM2 writes a system turn of its own where there is none, and ends turns with a token and a line break."""
    tokenizer = load_tokenizer()
    turns = encode(CHAT, [{"messages": GREETED["messages"][1:]}], tokenizer, 2048)
    assert [tokenizer.decode(e.options[0]) for e in turns] == ["Hello!<|im_end|>\n", "See you.<|im_end|>\n"]
    whole = tokenizer.apply_chat_template(GREETED["messages"][1:], return_dict=False)
    assert [*turns[1].prompt, *turns[1].options[0]] == whole


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "column 'messages' is empty"),
        ({"messages": "Hi"}, "its messages are no list of messages, but 'Hi'"),
        ({"messages": []}, "its messages are no list of messages"),
        ({"messages": ["Hi"]}, "message 1 has no role and content, but is 'Hi'"),
        ({"messages": [{"role": "user"}]}, "message 1 has no role and content"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 1 is of role 'human', not of system, user"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1 says nothing"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "message 1 says nothing"),
        ({"messages": GREETED["messages"][:2]}, "no message is the assistant's"),
    ],
)
def test_rows_that_are_no_conversations(row: dict[str, object], message: str, tmp_path: Path) -> None:
    lines = json.dumps(GREETED) + "\n" + json.dumps(row) + "\n"
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    with pytest.raises(XgbloraError) as caught:
        load_splits(load_task(tmp_path / "mine.yaml"))
    assert "train.jsonl" in str(caught.value)
    assert message in str(caught.value) or "cannot read" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "length", "message"),
    [
        (None, 512, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", 512, "C, row 1: the model's chat template refuses it"),
        ("{{ messages | length }}" + TEMPLATE, 512, "writes the beginning of a turn in another way when it is over"),
        (TEMPLATE, 100, "C, row 1: message 3 leaves no room for a prompt within 100"),
    ],
)
def test_models_and_lengths_that_cannot_chat(template: str | None, length: int, message: str) -> None:
    with pytest.raises(XgbloraError, match=message):
        encode(CHAT, [GREETED], chatting(template), length)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prompt: x\n", "a chat has no prompt: it may say name, chat"),
        ("metric: macro_f1\n", "measured by accuracy, f1 or rouge_l"),
        ("generate: {stop: x}\n", "generate of a chat says max_new_tokens"),
        ("num_dev: x\n", "num_dev is a whole number"),
        ("metric: bleu\n", "metric 'bleu' is not known"),
    ],
)
def test_bad_task_files(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        MINE.replace("num_dev: 8\n", "").replace("generate: {max_new_tokens: 12}\n", "") + line, encoding="utf-8"
    )
    with pytest.raises(XgbloraError, match=message):
        load_task(tmp_path / "mine.yaml")


def assistant(folder: Path) -> None:
    """Conversations of one question and the answer yes, and a model with a chat template."""
    build(ARCHITECTURES["llama"]).save_pretrained(folder / "model")
    chatting("{% for m in messages %}{{ m.role[0] }}{{ m.content }}</s>{% endfor %}"
             "{% if add_generation_prompt %}a{% endif %}").save_pretrained(folder / "model")  # fmt: skip
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}
        for question in ("is it", "so", "really", "ok") * 10
    ]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_comparison_of_conversations_has_no_row_in_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assistant(tmp_path)
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    command = f"compare --model_name {tmp_path / 'model'} --task_file {tmp_path / 'mine.yaml'} --output_root {tmp_path}"
    command += " --num_train 8 --num_eval 4 --max_steps 2 --seeds 0 --use_cpu true --disable_tqdm true"
    assert main(command.split()) == 0
    assert "Run 2 of 2: xgblora_seed0" in capsys.readouterr().out
    assert main([*command.split(), "--methods", "in-context"]) == 2
    assert "is made of conversations, which take no demonstrations" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["regular", "zo", "boost"])
def test_an_assistant_is_trained(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By gradients or by one booster it learns to say what it should, and to stop there; random steps run."""
    assistant(tmp_path)
    flags = "--num_train 32 --num_eval 8"
    if how == "boost":
        flags += " --recipe boost --boost_boosters 1"
    else:
        flags += f" --trainer {how} --lora --lora_r 8 --max_steps {100 if how == 'regular' else 2} --optim adamw_torch"
        flags += " --learning_rate 1e-2 --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    metrics = train_by_command(tmp_path, tmp_path / "model", flags, MINE)
    assert metrics["zero_shot_score"] == 0
    assert metrics["accuracy"] == metrics["score"]
    assert metrics["score"] == {"regular": 1, "boost": 1, "zo": 0}[how]
    capsys.readouterr()
    assert main(["tasks", str(tmp_path / "mine.yaml"), "--model_name", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.count("'yes</s>'  correct") == 3


def test_an_assistant_answers() -> None:
    chat = replace(CHAT, generation=Generation(12, ""))
    answers = predict(build(ARCHITECTURES["llama"]), chatting("{{ messages[0].content }}"), chat, ["Hi", GREETED])
    assert len(answers) == 2
