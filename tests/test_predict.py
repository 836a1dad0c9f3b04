"""From a finished run to answers: predict, eval and chat, and the same as a library."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import xgblora
from conftest import save_talking_model
from test_chat import GREETED, TEMPLATE
from xgblora import XgbloraError
from xgblora.base.load import load_tokenizer
from xgblora.cli import main
from xgblora.cli.rows import lines_of
from xgblora.runs.judge import wilson
from xgblora.tasks import TASKS, load_task, task_text

TASK = """data: {train: train.csv, test: test.csv}
prompt: "{{ text }} It was"
options: [terrible, great]
answer: label
metric: macro_f1
num_dev: 8
"""
WRITES = """data: {train: train.csv, test: test.csv}
prompt: "{{ text }} It was"
generate: {max_new_tokens: 4}
answer: "['terrible', 'great'][label]"
num_dev: 8
"""
CHATS = """data: {train: train.jsonl, test: test.jsonl}
chat: messages
generate: {max_new_tokens: 8}
num_dev: 4
"""
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with three short runs in it: ``chosen``, ``written`` and ``said``."""
    root = tmp_path_factory.mktemp("runs")
    for split, count in (("train", 60), ("test", 24)):
        rows = [(f"a {('dull', 'warm')[i % 2]} film {i}", i % 2, f"id {i}") for i in range(count)]
        with (root / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label", "note"), *rows])
        lines = "".join(json.dumps(GREETED) + "\n" for _ in range(12))
        (root / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    chatty = root / "chatty"
    save_talking_model(chatty, TEMPLATE)
    for name, task, flags in (
        ("chosen", TASK, "--recipe boost --boost_boosters 3 --early_stopping_boosters 0"),
        ("written", WRITES, "--max_steps 2"),
        ("said", CHATS, f"--max_steps 2 --model_name {chatty.as_posix()}"),
    ):
        (root / f"{name}.yaml").write_text(task, encoding="utf-8")
        command = f"train --model_name {model_folder.as_posix()} {flags} --task_file {root / name}.yaml --use_cpu true"
        assert main([*command.split(), "--disable_tqdm", "true", "--output_dir", str(root / name)]) == 0
    return root


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, argv), "--use_cpu"])
        return code, *capsys.readouterr()

    return call


def probabilities(root: Path, adapter: str, texts: list[str]) -> list[list[float]]:
    """Of ' terrible' and ' great' by transformers and PEFT alone, from the adapter's folder."""
    config = json.loads((root / "chosen" / adapter / "adapter_config.json").read_text("utf-8"))
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    tokenizer = load_tokenizer(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, str(root / "chosen" / adapter)).eval()
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" terrible", " great")]
    shares = []
    for text in texts:
        logits = model(torch.tensor([tokenizer(f"\n{text} It was")["input_ids"]])).logits[0, -1, words]
        shares.append(logits.softmax(0).tolist())
    return shares


TEXTS = ["a warm film", "a dull film", "one more, with 'quotes', commas and ümlauts"]


def test_texts_get_the_probabilities_that_plain_peft_gives(runs: Path, say: Say) -> None:
    code, out, _ = say("predict", runs / "chosen", *TEXTS, "--format", "jsonl")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    for row, expected in zip(rows, probabilities(runs, "adapter", TEXTS), strict=True):
        assert [row["probabilities"][name] for name in ("terrible", "great")] == pytest.approx(expected, abs=2e-5)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["probability"] == max(row["probabilities"].values())


def test_the_library_says_the_same(runs: Path, say: Say) -> None:
    _, out, _ = say("predict", runs / "chosen", *TEXTS, "--format", "jsonl")
    with xgblora.load_run(runs / "chosen") as model:
        answered = model.predictions(TEXTS)
        assert [p.probability for p in answered] == pytest.approx(
            [json.loads(s)["probability"] for s in out.splitlines()], abs=1e-6
        )
        assert model(TEXTS) == [p.answer for p in answered]
        for odd in ("a text", {"text": "a text"}):
            with pytest.raises(XgbloraError, match="predict takes a list of rows or texts"):
                model(odd)
        with pytest.raises(XgbloraError, match="row 2: a row is a text or a mapping from columns to values, not None"):
            model(["a text", None])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_boosters_alone(runs: Path, say: Say, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As stages scores them: accuracy on the same rows, and the bare base with none of them."""
    _, out, _ = say("eval", runs / "chosen", "--file", runs / "test.csv", "--format", "json", "--boosters", count)
    assert main(["stages", str(runs / "chosen")]) == 0
    printed = capsys.readouterr().out
    stages = json.loads((runs / "chosen" / "stages.json").read_text("utf-8"))
    lowest = min(stages, key=lambda stage: stage["dev_loss"])
    assert f"lowest with {lowest['boosters']} of {len(stages) - 1} boosters ({lowest['dev_loss']:.4f})" in printed
    assert f"--boosters {lowest['boosters']}\n" in printed
    assert json.loads(out)["accuracy"] == stages[count]["accuracy"]
    assert json.loads(out)["loss"] == pytest.approx(stages[count]["loss"], rel=1e-5)


def test_a_file_keeps_its_columns(runs: Path, say: Say, tmp_path: Path) -> None:
    source, target = runs / "test.csv", tmp_path / "out" / "predicted.csv"
    assert say("predict", runs / "chosen", "--file", source, "--output", target)[0] == 0
    given, written = (list(csv.DictReader(io.StringIO(p.read_text("utf-8")))) for p in (source, target))
    assert list(written[0]) == ["text", "label", "note", "prediction", "probability", "p(terrible)", "p(great)"]
    assert [{name: row[name] for name in given[0]} for row in written] == given
    for row in written:
        assert float(row["p(terrible)"]) + float(row["p(great)"]) == pytest.approx(1, abs=2e-6)
    assert b"\r" not in target.read_bytes()


def test_rows_need_no_answers_and_stdin_has_a_text_a_line(
    runs: Path, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a warm film"}\n{"text": "a dull film"}\n', encoding="utf-8")
    _, from_file, _ = say("predict", runs / "chosen", "--file", tmp_path / "rows.jsonl", "--format", "csv")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a warm film\n\n  \na dull film"))
    _, from_stdin, _ = say("predict", runs / "chosen", "--format", "csv")
    _, from_texts, _ = say("predict", runs / "chosen", "a warm film", "a dull film", "--format", "csv")
    assert from_file == from_stdin == from_texts
    assert from_file.count("\n") == 3


def test_a_table_for_people(runs: Path, say: Say) -> None:
    code, out, _ = say("predict", runs / "chosen", "a warm film", "x" * 100)
    assert code == 0
    header, first, second = out.splitlines()
    assert header.split() == ["prediction", "sure", "text"]
    assert first.split()[2] == "%"
    assert second.endswith("x...")


def test_written_answers(runs: Path, say: Say) -> None:
    code, out, _ = say("predict", runs / "written", "a warm film", "--format", "jsonl")
    assert code == 0
    assert set(json.loads(out)) == {"text", "prediction"}
    code, out, _ = say("eval", runs / "written", "--file", runs / "test.csv", "--format", "json")
    metrics = json.loads((runs / "written" / "metrics.json").read_text("utf-8"))
    assert json.loads(out)["accuracy"] == metrics["accuracy"]
    assert json.loads(out)["calibration_error"] is None


def test_predictions_come_while_lines_still_arrive(runs: Path) -> None:
    """A program that writes a line and waits for the answer before it writes the next one."""
    command = [sys.executable, "-m", "xgblora", "predict", str(runs / "chosen"), "--format", "csv", "--use_cpu"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, encoding="utf-8", bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(f"film {number}\n")
            process.stdin.flush()
            if number == 0:
                assert process.stdout.readline().startswith("text,prediction")
            assert process.stdout.readline().startswith(f"film {number},")
        process.stdin.close()
        assert process.wait(60) == 0


def test_lines_are_taken_as_many_as_have_come() -> None:
    assert list(lines_of(io.StringIO(""))) == []
    taken = list(lines_of(io.StringIO("\n".join(f"line {i}" for i in range(1000)))))
    assert sum(map(len, taken)) == 1000
    assert max(map(len, taken)) <= 256


@pytest.mark.parametrize("boosters", [None, 2])
def test_an_export_by_itself_is_enough(runs: Path, say: Say, tmp_path: Path, boosters: int | None) -> None:
    flags = [] if boosters is None else ["--boosters", boosters]
    assert main(["export", str(runs / "chosen"), *map(str, flags), "--output", str(tmp_path / "alone")]) == 0
    _, alone, _ = say("predict", tmp_path / "alone", *TEXTS, "--format", "csv")
    _, of_run, _ = say("predict", runs / "chosen", *TEXTS, "--format", "csv", *flags)
    assert alone == of_run


def test_eval_agrees_with_the_run_and_with_itself(runs: Path, say: Say) -> None:
    code, out, _ = say("eval", runs / "chosen", "--file", runs / "test.csv", "--format", "json")
    assert code == 0
    judged = json.loads(out)
    metrics = json.loads((runs / "chosen" / "metrics.json").read_text("utf-8"))
    assert (judged["accuracy"], judged["f1"]) == (metrics["accuracy"], pytest.approx(metrics["score"]))
    assert judged["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert judged["interval"] == pytest.approx(wilson(round(24 * judged["accuracy"]), 24))
    matrix = [option["predicted"] for option in judged["options"]]
    assert [sum(line) for line in matrix] == [option["rows"] for option in judged["options"]] == [12, 12]
    assert (matrix[0][0] + matrix[1][1]) / 24 == judged["accuracy"]
    _, table, _ = say("eval", runs / "chosen", "--file", runs / "test.csv")
    assert f"{100 * judged['accuracy']:.1f} % of 24 rows right" in table
    assert "-> terrible" in table


def test_calibration_by_hand(runs: Path, say: Say) -> None:
    """The mean over ten bins of |confidence - share right|, weighted by how many fall there."""
    _, out, _ = say("predict", runs / "chosen", "--file", runs / "test.csv", "--format", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        right = row["prediction"] == ("terrible", "great")[row["label"]]
        bins.setdefault(min(int(row["probability"] * 10), 9), []).append((row["probability"], right))
    error = sum(abs(sum(p for p, _ in group) - sum(right for _, right in group)) for group in bins.values()) / len(rows)
    _, out, _ = say("eval", runs / "chosen", "--file", runs / "test.csv", "--format", "json")
    assert json.loads(out)["calibration_error"] == pytest.approx(error, abs=1e-4)


def test_a_run_whose_prompts_begin_with_something_is_asked_alike(
    runs: Path, say: Say, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "begun"
    flags = f"--model_name {model_folder} --task_file {runs / 'chosen.yaml'} --num_eval 24 --max_steps 2 --use_cpu true"
    assert main(f"train {flags} --prompt_beginning auto --disable_tqdm true --output_dir {folder}".split()) == 0
    assert load_task(folder / "adapter" / "task.yaml", rows=False).beginning == "\n"
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert r"In front of every prompt stands '\n'" in card
    assert r"ids = tokenizer('\n' + PROMPT, " in card
    code, out, err = say("eval", folder, "--file", runs / "test.csv", "--format", "json")
    assert code == 0, err
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(out)["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert main(["stages", str(folder)]) == 0
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    assert stages[-1]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_conversation_remembers_what_was_said(runs: Path, say: Say) -> None:
    code, out, _ = say("chat", runs / "said", "Hi", "Bye", "--max_new_tokens", 8, "--system", "Be kind.")
    assert code == 0
    first, second = out.splitlines()[0], out.splitlines()[-1]
    with xgblora.load_run(runs / "said") as model:
        turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        answer = model([{"messages": turns}])[0]
        assert first.strip().startswith(answer[:4].strip() or "")
        turns += [{"role": "assistant", "content": answer or "..."}, {"role": "user", "content": "Bye"}]
        assert model([{"messages": turns}])[0][:4].strip() in second


def test_a_conversation_is_typed_line_by_line(runs: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nBye\n"))
    _, typed, _ = say("chat", runs / "said", "--max_new_tokens", 8)
    _, given, _ = say("chat", runs / "said", "Hi", "Bye", "--max_new_tokens", 8)
    assert typed == given


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_comes_back_from_its_text(name: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(task_text(TASKS[name]), encoding="utf-8")
    again = load_task(tmp_path / "task.yaml", rows=False)
    theirs, ours = (vars(task).copy() for task in (again, TASKS[name]))
    for values in (theirs, ours):
        for derived in ("source", "_compiled", "columns", "asking"):
            values.pop(derived, None)
    assert theirs == ours


def test_a_chat_comes_back_from_its_text(tmp_path: Path, runs: Path) -> None:
    ours = load_task(runs / "said.yaml")
    (tmp_path / "task.yaml").write_text(task_text(ours), encoding="utf-8")
    again = load_task(tmp_path / "task.yaml", rows=False)
    assert (again.name, again.messages, again.generation) == (ours.name, ours.messages, ours.generation)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict", "say which run: xgblora predict RUN"),
        ("predict RUNS/nothing a", "holds no finished run"),
        ("predict RUNS/chosen a --file RUNS/test.csv", "texts and --file are two sources of rows"),
        ("predict RUNS/chosen --file RUNS/nothing.csv", "nothing.csv does not exist"),
        ("predict RUNS/chosen --file RUNS/chosen.yaml", "chosen.yaml has another ending than .jsonl, .csv, .parquet"),
        ("predict RUNS/chosen --file RUNS/train.jsonl", "has no column 'text', which chosen needs; it has: messages"),
        ("predict RUNS/chosen --file RUNS/taken.csv", "has a column 'prediction', where predictions go: rename it"),
        ("predict RUNS/chosen a --boosters 4", "has 3 boosters: --boosters takes 0 to 3, got 4"),
        ("predict RUNS/chosen a --boosters -1", "--boosters must be 0 or more, got -1"),
        ("predict RUNS/chosen a --batch_size 0", "--batch_size must be at least 1, got 0"),
        ("predict RUNS/chosen a --format yaml", "invalid choice: 'yaml'"),
        ("predict RUNS/chosen a --model_name RUNS/chatty", "was trained otherwise (base "),
        ("predict RUNS/chosen a --output RUNS/test.csv/x.csv", "cannot be written"),
        ("eval RUNS/chosen", "say which rows: xgblora eval RUN --file rows.csv"),
        ("eval RUNS/chosen --file RUNS/taken.csv", "has no column 'label'"),
        ("chat RUNS/chosen Hi", "learned chosen, which is no conversation: xgblora predict"),
        ("chat RUNS/said Hi --max_new_tokens 512", "--max_new_tokens 512 leaves no room for what was said"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(command: str, message: str, runs: Path, say: Say) -> None:
    (runs / "taken.csv").write_text("text,prediction\na,b\n", encoding="utf-8")
    before = (runs / "test.csv").read_bytes()
    code, _, err = say(*command.replace("RUNS", str(runs)).split())
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert (runs / "test.csv").read_bytes() == before


def test_wilson_stays_within_0_and_1() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
