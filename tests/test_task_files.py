"""Tasks described by a file: they run as the package's own do, and a bad one is one clear line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import write_rows
from xgblora import XgbloraError, load_task
from xgblora.cli import main
from xgblora.tasks import Question, load_splits

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_data"
GOOD = """data: {train: train.jsonl, test: test.jsonl}
prompt: "{{ text }} It is"
options: [good, bad]
answer: label
"""
ROW = '{"text": "a film", "label": 0}\n'


def write(folder: Path, yaml: str = GOOD, **files: str) -> Path:
    """A task file beside its data; ``files`` by split, two good rows where nothing is said."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(files.get(split, 2 * ROW), encoding="utf-8", newline="")
    path = folder / "mine.yaml"
    path.write_text(yaml, encoding="utf-8", newline="")
    return path


def first_question(path: Path) -> Question:
    task = load_task(path)
    return task.question(load_splits(task)["train"][0])


def test_a_task_file_makes_questions(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load_task(path).name == "mine"
    assert first_question(path) == Question("a film It is", (" good", " bad"), (0,))


@pytest.mark.parametrize(
    ("yaml", "row", "question"),
    [
        # The answer's text, whatever the space around it.
        (GOOD, {"text": "a", "label": " bad "}, Question("a It is", (" good", " bad"), (1,))),
        # Several are right.
        (GOOD, {"text": "a", "label": [1, 0]}, Question("a It is", (" good", " bad"), (1, 0))),
        # What YAML would take for true and for a number is text.
        (
            GOOD.replace("[good, bad]", "[Yes, 1]"),
            {"text": "a", "label": "1"},
            Question("a It is", (" Yes", " 1"), (1,)),
        ),
        # A column says something else than the options do.
        (GOOD + "labels: [pos, neg]\n", {"text": "a", "label": "neg"}, Question("a It is", (" good", " bad"), (1,))),
        (GOOD + "labels: [true, false]\n", {"text": "a", "label": 1}, None),
        (
            GOOD + "labels: ['True', 'False']\n",
            {"text": "a", "label": True},
            Question("a It is", (" good", " bad"), (0,)),
        ),
        # Options that are a column's, within a template.
        (
            GOOD.replace("[good, bad]", "choices") + "option: 'the {{ option }}!'\n",
            {"text": "a", "label": "cat", "choices": ["dog", "cat", "cow"]},
            Question("a It is", (" the dog!", " the cat!", " the cow!"), (1,)),
        ),
        # A list that is the same for all rows, as an expression.
        (
            GOOD.replace("[good, bad]", "\"['x', 'y']\""),
            {"text": "a", "label": "y"},
            Question("a It is", (" x", " y"), (1,)),
        ),
        # A line break in front of an option is its separator; spaces at a prompt's end are not the prompt's.
        (
            GOOD.replace('"{{ text }} It is"', '"{{ text }}\\n"'),
            {"text": "a", "label": 0},
            Question("a\n", ("good", "bad"), (0,)),
        ),
        (GOOD.replace("It is", "It is  "), {"text": "a", "label": 0}, Question("a It is", (" good", " bad"), (0,))),
        # A column that may be empty.
        (
            GOOD.replace("{{ text }}", "{% if title %}{{ title }}: {% endif %}{{ text }}"),
            {"text": "a", "label": 0, "title": None},
            Question("a It is", (" good", " bad"), (0,)),
        ),
    ],
)
def test_ways_to_say_it(yaml: str, row: dict[str, object], question: Question | None, tmp_path: Path) -> None:
    task = load_task(write(tmp_path, yaml))
    if question is None:
        with pytest.raises(XgbloraError, match="the answer '1' is not one of the labels 'true', 'false'"):
            task.question(row)
    else:
        assert task.question(row) == question


def test_beginnings_and_line_ends_of_files_do_not_matter(tmp_path: Path) -> None:
    marked = "\ufeff" + GOOD.replace("\n", "\r\n").replace(".jsonl", ".csv")
    (tmp_path / "mine.yaml").write_text(marked, encoding="utf-8", newline="")
    for split in ("train", "test"):
        text = "\ufefftext,label\r\na film,bad\r\n"
        (tmp_path / f"{split}.csv").write_text(text, encoding="utf-8", newline="")
    assert first_question(tmp_path / "mine.yaml") == Question("a film It is", (" good", " bad"), (1,))


BAD_FILES: dict[str, tuple[str, str]] = {
    "empty": ("", "says nothing of the form 'key: value'"),
    "a list": ("- a\n- b\n", "says nothing of the form 'key: value'"),
    "not YAML": (GOOD + "prompt: [", "cannot read the task file"),
    "unknown key": (GOOD + "prompts: x\n", "unknown key 'prompts': choose from name, prompt, options"),
    "no prompt": (GOOD.replace("prompt:", "name:"), "prompt is missing"),
    "no options": (GOOD.replace("options: [good, bad]\n", ""), "options is missing"),
    "no answer": (GOOD.replace("answer: label\n", ""), "answer is missing"),
    "no data": (GOOD.split("\n", 1)[1], "say where the rows are"),
    "data and hub": (GOOD + "hub: {path: a/b}\n", "say where the rows are"),
    "hub without path": (GOOD.split("\n", 1)[1] + "hub: {name: b}\n", "hub says path"),
    "no test file": (GOOD.replace(", test: test.jsonl", ""), "data needs train, and test or validation"),
    "unknown split": (GOOD.replace("test:", "exam:"), "data has an entry for each of train, validation, test"),
    "unknown ending": (GOOD.replace("test.jsonl", "test.xlsx"), "'test.xlsx' has another ending than .jsonl, .csv"),
    "missing file": (GOOD.replace("test.jsonl", "nope.csv"), "nope.csv does not exist"),
    "prompt is a list": (GOOD.replace('"{{ text }} It is"', "[a]"), "prompt is a text, not ['a']"),
    "prompt cut short": (GOOD.replace("{{ text }}", "{{ text"), "prompt of task mine is not a Jinja template"),
    "unknown filter": (GOOD.replace("text }}", "text | shout }}"), "No filter named 'shout'"),
    "answer is no expression": (GOOD.replace("answer: label", "answer: label of"), "answer of task mine is not"),
    "unknown column": (
        GOOD.replace("{{ text }}", "{{ body }}"),
        "has no column 'body', which mine needs; it has: text",
    ),
    "prompt is empty": (GOOD.replace("{{ text }} It is", "{{ '' if text }}"), "row 1: the prompt is empty"),
    "prompt fails": (GOOD.replace("{{ text }}", "{{ text.nope() }}"), "row 1: prompt cannot be made"),
    "one option": (GOOD.replace("[good, bad]", "[good]"), "needs at least 2 options, got 1"),
    "empty option": (GOOD.replace("[good, bad]", "[good, '']"), "options are texts; '' is none"),
    "option twice": (GOOD.replace("[good, bad]", "[good, good]"), "options holds 'good' twice"),
    "option with another space": (
        GOOD.replace("[good, bad]", "[good, ' good']"),
        "row 1: the option 'good' is there twice",
    ),
    "options are no list": (GOOD.replace("[good, bad]", "text"), "row 1: its options are no list, but 'a film'"),
    "labels of another length": (GOOD + "labels: [a]\n", "labels is a list with one entry for each option"),
    "label not among labels": (GOOD + "labels: [a, b]\n", "row 1: the answer '0' is not one of the labels 'a', 'b'"),
    "unknown metric": (
        GOOD + "metric: bleu\n",
        "metric 'bleu' is not known: choose from accuracy, f1, macro_f1, rouge_l",
    ),
    "rouge_l of options": (GOOD + "metric: rouge_l\n", "metric rouge_l is for written answers"),
    "f1 of three": (GOOD.replace("[good, bad]", "[a, b, c]") + "metric: f1\n", "f1 is for 2 options, mine has 3"),
    "macro_f1 of rows' own": (GOOD.replace("[good, bad]", "text") + "metric: macro_f1\n", "the same for all rows"),
    "classification is a number": (GOOD + "classification: 2\n", "classification is one of true, false, not '2'"),
    "num_dev is no number": (GOOD + "num_dev: many\n", "num_dev is a whole number, not 'many'"),
    "writes beside options": (GOOD + "generate: {stop: x}\n", "mine writes its answers: it has no options or labels"),
    "generate says nothing": (GOOD + "generate: yes\n", "generate says max_new_tokens and stop"),
    "max_new_tokens is no number": (GOOD + "generate: {max_new_tokens: few}\n", "max_new_tokens is a whole number"),
    "a number alone": (GOOD.replace("answer: label", "answer: 7"), "row 1: the answer 7 is not one of 0 to 1"),
    "reaches for Python": (GOOD.replace("{{ text }}", "{{ text.__class__.__mro__ }}"), "row 1: prompt cannot be made"),
}
BAD_ROWS: dict[str, tuple[str, str]] = {
    "no rows": ("\n", "train.jsonl has no rows"),
    "empty": ("", "train.jsonl is empty"),
    "not JSON": ("text,label\na,0\n", "cannot read"),
    "cut short": (ROW + '{"text": "a', "cannot read"),
    "mixed labels": (ROW + '{"text": "a", "label": "awful"}\n', "row 2: the answer 'awful' is not one of the options"),
    "text and object": (ROW + '{"text": {"a": 1}, "label": 0}\n', "row 2: a template prints {'a': 1}, which is"),
    "a list for a text": ('{"text": ["a", "b"], "label": 0}\n', "row 1: a template prints ['a', 'b'], which is"),
    "blank text": (ROW + '{"text": " ", "label": 0}\n', "train.jsonl, row 2: column 'text' is empty"),
    "no text": (ROW + '{"label": 0}\n', "train.jsonl, row 2: column 'text' is empty"),
    "no label": (ROW + '{"text": "a"}\n', "train.jsonl, row 2: column 'label' is empty"),
    "label beyond": (ROW + '{"text": "a", "label": 2}\n', "row 2: the answer 2 is not one of 0 to 1, the options"),
    "a fraction": ('{"text": "a", "label": 0.5}\n', "row 1: the answer 0.5 is not one of the options"),
    "no correct one": ('{"text": "a", "label": []}\n', "row 1: no option is correct"),
    "NUL": ('{"text": "a\\u0000", "label": 0}\n', "row 1: the prompt holds a NUL byte"),
    "bytes": ("\x00\x01\x02", "cannot read"),
}  # fmt: skip


@pytest.fixture
def refused(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """The one line that a training on a task file ends with."""

    def call(path: Path) -> str:
        capsys.readouterr()
        command = f"train --model_name {model_folder} --max_steps 1 --use_cpu true --disable_tqdm true"
        code = main([*command.split(), "--task_file", str(path), "--output_dir", str(tmp_path / "run")])
        out, err = capsys.readouterr()
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
        assert not (tmp_path / "run").exists(), "nothing half-written stays behind"
        return err

    return call


@pytest.mark.parametrize(("yaml", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_task_files_are_one_line(yaml: str, message: str, refused: Callable[[Path], str], tmp_path: Path) -> None:
    err = refused(write(tmp_path, yaml))
    assert message in err
    assert "mine" in err or "train.jsonl" in err or "nope.csv" in err, "it says which file"


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_one_line(rows: str, message: str, refused: Callable[[Path], str], tmp_path: Path) -> None:
    assert message in refused(write(tmp_path, train=rows))


def test_a_missing_task_file_is_one_line(refused: Callable[[Path], str], tmp_path: Path) -> None:
    assert "the task file" in refused(tmp_path / "nope.yaml")


def test_a_task_file_that_is_no_text_is_one_line(refused: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00prompt")
    assert "cannot read the task file" in refused(tmp_path / "mine.yaml")


def test_a_long_text_is_read(tmp_path: Path) -> None:
    """The prompt keeps its end."""
    long = json.dumps({"text": "word " * 199_999, "label": 1}) + "\n"
    question = first_question(write(tmp_path, train=long + ROW))
    assert question.prompt.endswith("word  It is") or question.prompt.endswith("word It is")
    assert len(question.prompt) > 999_000


def test_options_too_long_for_the_context_are_one_line(refused: Callable[[Path], str], tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("good", "very " * 60))
    assert "mine, row 1: the options need" in refused(path)


def test_the_example_trains(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"train --model_name {model_folder} --max_steps 1 --use_cpu true --disable_tqdm true"
    flags = ["--task_file", str(EXAMPLE / "packages.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*command.split(), *flags]) == 0
    assert "macro f1" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["task"] == "packages"
    assert metrics["rows"] == {"train": 150, "dev": 30, "evaluation": 90}


def test_an_edited_task_is_another_run(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "own")
    file = tmp_path / "own" / "packages.yaml"
    command = f"train --model_name {model_folder} --max_steps 1 --num_train 20 --use_cpu true --disable_tqdm true"
    words = [*command.split(), "--task_file", str(file), "--output_dir", str(tmp_path / "run")]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    file.write_text(file.read_text(encoding="utf-8").replace("software for", "for"), encoding="utf-8")
    assert main(words) == 2
    assert "another configuration (--task_file has changed)" in capsys.readouterr().err


def test_edited_data_and_an_edited_reward_are_another_run(
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies in files is as much of a run as its flags: an unfinished one is not resumed on other rows."""
    data, reward = tmp_path / "data", tmp_path / "my_reward.py"
    shutil.copytree(data_folder, data)
    reward.write_text("def right(prompt, completion, example):\n    return 1.0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = f"train --model_name {model_folder} --task_name SST2 --data_dir {data} --max_steps 1 --num_train 20"
    words = [*command.split(), *"--num_dev 5 --num_eval 10 --use_cpu true --disable_tqdm true".split()]
    words += ["--reward", "my_reward:right", "--output_dir", str(tmp_path / "run")]
    assert main(words) == 0
    capsys.readouterr()
    reward.write_text("def right(prompt, completion, example):\n    return 2.0\n", encoding="utf-8")
    assert main(words) == 2
    assert "another configuration (--reward has changed)" in capsys.readouterr().err
    reward.write_text("def right(prompt, completion, example):\n    return 1.0\n", encoding="utf-8")
    assert main(words) == 0
    with (data / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"sentence": "one more", "label": 1}\n')
    assert main(words) == 2
    assert "another configuration (the validation data (validation.jsonl) has changed)" in capsys.readouterr().err


def test_rows_are_shown(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("SST2", "ReCoRD", "aps/super_glue", "macro_f1"))
    assert main(["tasks", str(EXAMPLE / "packages.yaml"), "--model_name", str(model_folder)]) == 0
    shown = capsys.readouterr().out
    assert "columns description, section; trains as classification; metric macro_f1" in shown
    assert shown.count("correct") == 3 + 1  # one in the title of its column
    write_rows(tmp_path / "train.jsonl", 4)
    write_rows(tmp_path / "validation.jsonl", 4)
    assert main(["tasks", "sst2", "--data_dir", str(tmp_path), "--model_name", str(model_folder)]) == 0
    assert " It was" in capsys.readouterr().out
    assert main(["tasks", "nope"]) == 2
    assert "unknown task 'nope'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
@pytest.mark.parametrize("folder", ["plain", "[x] d", "a*b", "{a,b}", ".hidden"])
@pytest.mark.parametrize("name", ["t*.jsonl", "t?.jsonl", "[tu]1.jsonl", "t{1,2}.jsonl", "#t%20.jsonl"])
def test_a_file_is_read_by_its_very_name(folder: str, name: str, tmp_path: Path) -> None:
    """As a pattern, it would match its neighbours, and test rows would be trained on."""
    place = tmp_path / folder
    place.mkdir()
    path = write(place, GOOD.replace("train.jsonl", f'"{name}"'))
    for number, file in enumerate([name, "t1.jsonl", "t2.jsonl", "u1.jsonl"]):
        (place / file).write_text(ROW.replace("film", f"film {number}"), encoding="utf-8")
    assert load_splits(load_task(path))["train"]["text"] == ["a film 0"]


def test_a_name_that_cannot_be_read_is_one_line(refused: Callable[[Path], str], tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("train.jsonl", '"a::b.jsonl"'))
    (tmp_path / "a::b.jsonl").write_text(ROW, encoding="utf-8")
    assert "a::b.jsonl cannot be read with :: in its name: rename it" in refused(path)
