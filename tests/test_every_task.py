"""Every task of the package on rows in its data set's columns: prompts as written, scores as a plain model's."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

from conftest import VOCABULARY, build, byte_tokenizer, option_scores
from xgblora import Example, encode
from xgblora.cli import main
from xgblora.data.batch import build_batch
from xgblora.learn.evaluate import Evaluation, accuracy, score
from xgblora.tasks import TASKS, Hub, Question

FOLDER = Path(__file__).parent / "tasks"
NO_YES = ("No", "Yes")
EXPECTED = {
    "SST2": Question("a warm , funny and quietly moving portrait of two sisters It was", (" terrible", " great"), (1,)),
    "RTE": Question(
        "The town council of Marlow voted on Tuesday to close the old swimming pool, which has been losing money for "
        'six years.\nDoes this mean that "The old swimming pool in Marlow loses money." is true? Yes or No?\n',
        ("Yes", "No"),
        (0,),
    ),
    "CB": Question(
        "Suppose It was raining again. Martha knew that the roof had leaked all night. Can we infer that "
        '"the roof had leaked all night"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        (0,),
    ),
    "BoolQ": Question(
        "Tomato -- The tomato is the edible berry of a plant in the nightshade family. Botanically a fruit, it is "
        "treated as a vegetable in the kitchen. Is a tomato a fruit in botany?\n",
        NO_YES,
        (1,),
    ),
    "WSC": Question(
        "Anna lent Julia her bicycle because she did not need it that day.\n"
        'In the previous sentence, does the pronoun "she" refer to Anna? Yes or No?\n',
        NO_YES,
        (1,),
    ),
    "WIC": Question(
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "They had a picnic on the bank of the river.\nShe put her savings in the bank.\n",
        NO_YES,
        (0,),
    ),
    "MultiRC": Question(
        "Greta took the early bus to the market, because the late one was always full. She bought six eggs, a loaf of "
        "bread and a jar of honey. On the way home it began to snow, and she gave her umbrella to an old man.\n"
        'Question: What did Greta buy at the market?\nI found this answer "Six eggs". Is that correct? Yes or No?\n',
        NO_YES,
        (1,),
    ),
    "Copa": Question(
        "The kettle began to whistle because",
        (" the water in it had come to the boil.", " the lid had been lost for years."),
        (0,),
    ),
    "ReCoRD": Question(
        "Rosa Delgado has won the mayoral race in Fairhaven by just 41 votes. Delgado, a former teacher, beat the "
        "builder Hugh Prentice after a recount.\n- The recount took nine hours\n- Hugh Prentice says he will not "
        "appeal\n-",
        tuple(
            f" It is the first time in twenty years that a woman has run the town, and {name} will take office in May."
            for name in ("Delgado", "Fairhaven", "Hugh Prentice", "Rosa Delgado")
        ),
        (0, 3),
    ),
    "WinoGrande": Question(
        "Sentence: Lucy asked Nina for help with the tax form because",
        (" Lucy used to be an accountant.", " Nina used to be an accountant."),
        (1,),
    ),
    "TREC": Question(
        "Classify the questions based on whether their answer type is a Number, Location, Person, Description, Entity, "
        "or Abbreviation.\n\nQuestion: What does the abbreviation EKG stand for ?\nAnswer Type:",
        (" Abbreviation", " Entity", " Description", " Person", " Location", " Number"),
        (0,),
    ),
    "AGNews": Question(
        "Classify the news articles into the categories of World, Sports, Business, and Technology.\n\n"
        "Article: Rebels Agree to Talks as Truce Holds The government and rebel leaders said on Monday they would meet "
        "next week, after a truce held for ten days in the eastern province.\nAnswer:",
        (" World", " Sports", " Business", " Technology"),
        (0,),
    ),
    "SQuAD": Question(
        "Title: Harlow_Lighthouse\nContext: The Harlow Lighthouse was built in 1843 by the engineer Edwin Marsh. It "
        "stands 38 metres tall and was lit by whale oil until 1871, when paraffin took its place.\n"
        "Question: Who built the Harlow Lighthouse?\nAnswer:",
        (" Edwin Marsh\n",),
        (0,),
        ("Edwin Marsh",),
    ),
    "DROP": Question(
        "Passage: The Harbor Kings scored first with a 32-yard field goal by Pete Lowry. The Miners answered with a "
        "7-yard touchdown run, and Lowry added field goals of 45 and 21 yards before halftime.\n"
        "Question: How many field goals did Lowry kick before halftime?\nAnswer:",
        (" 3\n",),
        (0,),
        ("3",),
    ),
}
"""The first row of each fixture as a model sees it."""

OF_THE_HUB = sorted(name for name, task in TASKS.items() if isinstance(task.source, Hub))
LONG: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(**LONG, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, max_position_embeddings=512),
    "llama": LlamaConfig(**LONG, hidden_size=32, intermediate_size=48, max_position_embeddings=512),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}


def fixture(name: str) -> list[dict[str, Any]]:
    """Rows in the hub's columns, written for this project."""
    stem = {"AGNews": "ag_news"}.get(name, name.lower())
    return [json.loads(line) for line in (FOLDER / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_task_of_the_hub_is_here() -> None:
    assert set(EXPECTED) == set(OF_THE_HUB)


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_prompts_are_as_written(name: str) -> None:
    rows = fixture(name)
    questions = [TASKS[name].question(row) for row in rows]
    assert replace(questions[0], null_prompt="") == EXPECTED[name]
    if TASKS[name].generation is None:
        assert questions[0].prompt.endswith(questions[0].null_prompt) or name in ("WIC", "WinoGrande")
        assert questions[0].null_prompt
    assert len(rows) >= 20
    assert all(question.prompt == question.prompt.rstrip(" ") for question in questions)
    if not isinstance(TASKS[name].options, str):
        assert {question.correct[0] for question in questions} == set(range(len(questions[0].options)))


@pytest.mark.parametrize(
    ("name", "row", "options", "correct"),
    [
        # A full stop is the premise's own only where it has one; "I" keeps its capital.
        (
            "Copa",
            {"premise": "It rained", "choice1": "I left.", "choice2": "They left.", "question": "effect", "label": 1},
            (" I left.", " they left."),
            (1,),
        ),
        # The blank at the beginning of a sentence leaves a prompt, and an apostrophe follows the name at once.
        (
            "WinoGrande",
            {"sentence": "_'s hat hid Ben.", "option1": "Ann", "option2": "Ben", "answer": "1"},
            (" Ann's hat hid Ben.", " Ben's hat hid Ben."),
            (0,),
        ),
    ],
)
def test_options_of_rows(name: str, row: dict[str, Any], options: tuple[str, ...], correct: tuple[int, ...]) -> None:
    question = TASKS[name].question(row)
    assert (question.options, question.correct) == (options, correct)
    assert question.prompt in ("It rained so", "Sentence:")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OF_THE_HUB)
def test_option_scores_are_those_of_one_option_a_call(name: str, architecture: str) -> None:
    """The reference: prompt and one option as plain ids into the plain model, mean log-probability of the option."""
    model = build(ARCHITECTURES[architecture])
    rows = encode(TASKS[name], fixture(name)[:6], byte_tokenizer(), max_length=512)
    with torch.no_grad():
        of_rows = option_scores(model, build_batch(rows), normalised=True)
        for row, scores in zip(rows, of_rows, strict=True):
            for option, ours in zip(row.options, scores.tolist(), strict=False):
                ids = torch.tensor([[*row.prompt, *option]])
                logs = model(ids).logits[0].log_softmax(-1)
                wanted = [logs[len(row.prompt) - 1 + place, token].item() for place, token in enumerate(option)]
                assert ours == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
            assert not scores[len(row.options) :].isfinite().any()


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose context takes every fixture's rows."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build(ARCHITECTURES["llama"]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if how == "regular" or name in ("SQuAD", "TREC") else pytest.mark.soak)
        for name in OF_THE_HUB
        for how in ("zo", "regular", "boost")
    ],
)
def test_every_task_trains(name: str, how: str, long_model: Path, tmp_path: Path) -> None:
    rows = fixture(name)
    data = tmp_path / "data"
    data.mkdir()
    for split, part in (("train", rows[:16]), ("validation", rows[16:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    flags = f"--task_name {name} --num_train 12 --num_dev 4 --num_eval 8 --use_cpu true --disable_tqdm true"
    flags += " --recipe boost --boost_boosters 1" if how == "boost" else f" --trainer {how} --max_steps 1"
    paths = ["--model_name", long_model, "--data_dir", data, "--output_dir", tmp_path / "run"]
    assert main(["train", *flags.split(), *map(str, paths)]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["rows"] == {"train": 12, "dev": 4, "evaluation": 8}
    assert math.isfinite(metrics["eval_loss"])
    assert metrics.get("metric", "accuracy") == TASKS[name].metric
    assert 0 <= metrics.get("score", 0) <= 1
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["train_as_classification"] == TASKS[name].classification


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("name", ["ReCoRD", "AGNews"])
def test_lists_come_from_parquet(name: str, ending: str, tmp_path: Path) -> None:
    """ReCoRD's entities are a list, which CSV cannot hold: there it is one clear line."""
    from xgblora import XgbloraError, load_splits

    table = Dataset.from_list(fixture(name))
    for split in ("train", "validation"):
        file = tmp_path / f"{split}.{ending}"
        table.to_parquet(file) if ending == "parquet" else table.to_csv(file, index=False)
    if name == "ReCoRD" and ending == "csv":
        with pytest.raises(XgbloraError, match=r"train.csv, row 1: its options are no list"):
            load_splits(TASKS[name], str(tmp_path))
    else:
        rows = load_splits(TASKS[name], str(tmp_path))["train"]
        assert [TASKS[name].question(row) for row in rows] == [TASKS[name].question(row) for row in fixture(name)]


def test_metrics_of_a_task() -> None:
    rows = [Example([1], [[2], [3]], label) for label in (1, 1, 0, 0, 1)]
    chosen = [1, 0, 0, 1, 1]  # of three right answers two are found, beside a wrong one
    evaluation = Evaluation(accuracy(rows, chosen), 1.0, chosen)
    assert score("accuracy", rows, evaluation) == pytest.approx(3 / 5)
    assert score("f1", rows, evaluation) == pytest.approx(2 / 3)
    assert score("macro_f1", rows, evaluation) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_metrics_of_written_answers() -> None:
    rows = [Example([1], [[2]], 0, references=("the cat sat",)), Example([1], [[2]], 0, references=("a dog", "dog"))]
    written = ["the cat was there", "big dog"]
    evaluation = Evaluation(0.0, 1.0, [0, 0], written)
    assert score("rouge_l", rows, evaluation) == pytest.approx((4 / 7 + 2 / 3) / 2)
    assert score("f1", rows, evaluation) == pytest.approx((2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2) + 2 / 3) / 2)


def test_any_correct_option_counts() -> None:
    rows = [Example([1], [[2], [3], [4]], 2, also_correct=(0,))] * 3
    assert accuracy(rows, [0, 1, 2]) == pytest.approx(2 / 3)
