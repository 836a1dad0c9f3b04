"""Tasks: prompts, options, token ids, and rows that never meet on both sides."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from conftest import LogLines, byte_tokenizer, write_rows
from xgblora import XgbloraError, encode, get_task, load_model, load_splits, sample
from xgblora.tasks import TASKS, Chat, Question, Task, begun

SST2 = TASKS["SST2"]


def task(*options: str) -> Task:
    return Task("T", "{{ sentence | trim }} It was", options, "label", source=dict)


@pytest.mark.parametrize("name", ["SST2", "sst2", "RottenTomatoes"])
def test_prompts_are_as_documented(name: str) -> None:
    column = "text" if name == "RottenTomatoes" else "sentence"
    question = get_task(name).question({column: " a lovely film \n", "label": 1})
    assert question == Question("a lovely film It was", (" terrible", " great"), (1,), null_prompt="It was")


def test_braces_and_quotes_in_a_text_are_text() -> None:
    question = SST2.question({"sentence": 'a {{ weird }} {% "film" 100%', "label": 0})
    assert question.prompt == 'a {{ weird }} {% "film" 100% It was'


def test_examples_hold_prompt_and_options() -> None:
    tokenizer = byte_tokenizer()
    rows = [{"sentence": "so so", "label": 1}, {"sentence": "größe — 映画", "label": 0}]
    for example, row in zip(encode(SST2, rows, tokenizer, 128), rows, strict=True):
        assert tokenizer.decode(example.prompt) == row["sentence"] + " It was"
        assert [tokenizer.decode(option) for option in example.options] == [" terrible", " great"]
        assert [len(option) for option in example.options] == [1, 1]
        assert example.label == row["label"]


def test_options_of_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    example = encode(task(" ok", " great", " so very bad"), [{"sentence": "x", "label": 2}], tokenizer, 64)[0]
    assert [len(option) for option in example.options] == [3, 1, 12]


def test_long_prompts_lose_their_beginning_with_one_counted_warning(log_lines: LogLines) -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"sentence": "0123456789" * 3, "label": 0},
        {"sentence": "ab", "label": 1},
        {"sentence": "9" * 40, "label": 1},
    ]
    encoded = encode(SST2, rows, tokenizer, 20)
    assert [len(e.prompt) + 1 for e in encoded] == [20, 10, 20]
    assert tokenizer.decode(encoded[0].prompt) == "890123456789 It was"
    assert tokenizer.decode(encoded[0].prompt).endswith("456789 It was")
    assert log_lines.lines == ["2 of 3 prompts were longer than 20 tokens with their options and lost their beginning"]


def opening_tokenizer() -> PreTrainedTokenizerFast:
    """Opens every text with a special token."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_first_special_token_survives_the_cut() -> None:
    tokenizer = opening_tokenizer()
    example = encode(SST2, [{"sentence": "long " * 20, "label": 0}], tokenizer, 20)[0]
    assert len(example.prompt) == 19
    assert example.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(example.prompt[1:]).endswith("long It was")
    assert [len(option) for option in example.options] == [1, 1], "options must not begin with the special token"


def test_prompts_begin_as_asked() -> None:
    plain, opening = byte_tokenizer(), opening_tokenizer()
    assert begun(SST2, "none", plain) is SST2
    assert begun(SST2, "auto", plain).beginning == "\n"
    assert begun(SST2, "auto", opening) is SST2  # it has a beginning
    stated = replace(SST2, beginning="Film: ")
    assert begun(stated, "auto", plain) is stated
    assert begun(stated, "A review.", opening).beginning == "A review."
    chat = Chat("talk", "messages", {})
    assert begun(chat, "auto", plain) is chat
    with pytest.raises(XgbloraError, match="begin as the model's template says"):
        begun(chat, "Hello", plain)


def test_a_beginning_stands_in_front_of_everything_and_stays(log_lines: LogLines) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"sentence": "good", "label": 1}, {"sentence": "long " * 20, "label": 0}]
    begins = replace(SST2, beginning="\n>")
    short, cut = encode(begins, rows, tokenizer, 24)
    assert tokenizer.decode(short.prompt) == "\n>good It was"
    assert tokenizer.decode(short.null_prompt) == "\n>It was"
    assert len(cut.prompt) == 23
    assert tokenizer.decode(cut.prompt).startswith("\n>")
    assert log_lines.containing("lost their beginning")
    (shown,) = encode(begins, rows[:1], tokenizer, 128, demonstrations=rows[:1])
    assert tokenizer.decode(shown.prompt) == "\n>good It was great\n\ngood It was"


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        (("very " * 20, "great"), 64, "T, row 1: the options need 100 tokens, which leaves no room for a prompt"),
        (("", "great"), 64, "T, row 1: an option is empty"),
        (("great", " great"), 64, "T, row 1: the option 'great' is there twice"),
    ],
)
def test_unusable_options_are_refused(options: tuple[str, ...], length: int, message: str) -> None:
    with pytest.raises(XgbloraError, match=message):
        encode(task(*options), [{"sentence": "x", "label": 0}], byte_tokenizer(), length)


def test_demonstrations_stand_answered_in_front(log_lines: LogLines) -> None:
    tokenizer = byte_tokenizer()
    shown = [{"sentence": "fine", "label": 1}, {"sentence": "poor", "label": 0}]
    rows = [{"sentence": "so so", "label": 1}, {"sentence": "long " * 4, "label": 0}]
    plain = encode(SST2, rows, tokenizer, 128)
    encoded = encode(SST2, rows, tokenizer, 128, demonstrations=shown)
    before = "fine It was great\n\npoor It was terrible\n\n"
    assert [tokenizer.decode(e.prompt) for e in encoded] == [before + tokenizer.decode(e.prompt) for e in plain]
    assert [(e.options, e.label) for e in encoded] == [(e.options, e.label) for e in plain]
    assert not log_lines.lines
    # Only whole ones, and as many as fit: the longer row has room for one.
    tight = encode(SST2, rows, tokenizer, 43, demonstrations=shown)
    texts = [tokenizer.decode(e.prompt) for e in tight]
    assert texts == [before + "so so It was", "fine It was great\n\n" + "long " * 3 + "long It was"]
    assert all(len(e.prompt) + 1 <= 43 for e in tight)
    assert log_lines.lines == ["not all of the 2 demonstrations fit within 43 tokens: prompts have 1 or more of them"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_file_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 30)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[0]["sentence"] = 'größe, "映画"'
    folder = tmp_path / ending
    folder.mkdir()
    table = Dataset.from_list(rows)
    for split in ("train", "test"):
        file = folder / f"{split}.{ending}"
        if ending == "jsonl":
            table.to_json(file, force_ascii=False)
        elif ending == "csv":
            table.to_csv(file, index=False)
        else:
            table.to_parquet(file)
    splits = load_splits(SST2, str(folder))
    assert [dict(row) for row in splits["train"]] == rows
    assert set(splits) == {"train", "test"}


def test_samples_are_disjoint_and_follow_their_seed() -> None:
    pool = Dataset.from_list([{"sentence": str(i), "label": i % 2} for i in range(200)])
    splits = {"train": pool, "validation": pool.select(range(50))}
    one, same, other = (sample(splits, 50, 30, 20, seed) for seed in (0, 0, 1))
    assert not set(one.train["sentence"]) & set(one.dev["sentence"])
    assert (len(one.train), len(one.dev), len(one.eval), one.eval_split) == (50, 30, 20, "validation")
    assert one.train["sentence"] == same.train["sentence"]
    assert one.train["sentence"] != other.train["sentence"]
    assert one.eval["sentence"] == other.eval["sentence"], "evaluation rows do not depend on the seed"


def test_a_small_train_split_is_shared_out_with_a_warning(log_lines: LogLines) -> None:
    pool = Dataset.from_list([{"sentence": str(i), "label": i % 2} for i in range(30)])
    samples = sample({"train": pool, "test": pool}, 100, 50, 10, 0)
    assert (len(samples.train), len(samples.dev)) == (18, 12)
    assert log_lines.containing("fewer than the 100 + 50 asked for: 18 train and 12 dev rows are used")
    assert len(sample({"train": pool, "test": pool}, 100, 5, 10, 0).dev) == 5, "as asked for, where it is small"


def test_rotten_tomatoes_is_real_balanced_and_split() -> None:
    splits = load_splits(TASKS["RottenTomatoes"])
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6530, "test": 2000}
    train, test = set(splits["train"]["text"]), set(splits["test"]["text"])
    assert len(train) == 6530
    assert not train & test
    assert 0.45 < sum(splits["test"]["label"]) / 2000 < 0.55


def test_options_are_single_tokens_of_smollm2() -> None:
    _, tokenizer = load_model()
    rows = load_splits(TASKS["RottenTomatoes"])["test"].select(range(200))
    encoded = encode(TASKS["RottenTomatoes"], rows, tokenizer, 2048)
    assert encoded[0].options == [[13321], [1109]]
    assert 24 < sum(len(e.prompt) for e in encoded) / 200 < 30


def test_the_hubs_sst2_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the loader fails in one line, and it has asked for the right data set."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        XgbloraError, match=r"cannot load the data of SST2: .*nyu-mll/glue.*--data_dir reads local files"
    ):
        load_splits(SST2)
