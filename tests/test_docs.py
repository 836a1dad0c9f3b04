"""Every code block of the README and the docs runs: word for word, but on a tiny model and few rows."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conftest import write_rows
from xgblora.cli import main
from xgblora.cli.completion import KINDS
from xgblora.cli.parsing import parse, parse_experiment, parse_of_run, with_config
from xgblora.cli.verbs import VERBS
from xgblora.tasks import load_task

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "examples/clients/README.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]
READ_ONLY = ("docs/experiments.md", "examples/clients/README.md", "docs/clients.md")
"""Their commands take hours, or other tools: they must be ones that xgblora takes, and are run elsewhere."""
OTHERS = (
    "git clone",
    "OMP_NUM_THREADS",
    "torchrun",
    "make ",
    "py -3.11",
    ".venv\\Scripts\\python -m pip",
    "python -m pip",
    "pip install",
    "hf auth",
)
OTHERS = (
    *OTHERS,
    "python benchmarks/",
    "python examples/",
    "lm_eval",
    "node ",
    "npm ",
    "vllm ",
    "llama-cli",
    "python -m venv",
    ".venv/bin/python -m pip",
)
"""Commands that are not xgblora's."""
FEW = "--num_train 24 --num_dev 8 --num_eval 12 --use_cpu true --disable_tqdm true"


@dataclass(frozen=True)
class Block:
    """A fenced block: the word after the fence, and its text."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands in one line each; a line is continued by a backslash or, in PowerShell, a backtick."""
        joined = re.sub(r"\s*[\\`]\n\s*", " ", self.text)
        lines = [line.partition("   #")[0].strip() for line in joined.splitlines()]
        return [
            line for line in lines if re.match(r"(\.venv\S+)?xgblora |python large_models/|(\w+=\d+ )*torchrun", line)
        ]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(*match) for match in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def arguments(command: str) -> list[str]:
    """Verb and flags of a command, without a pipe behind it; scripts and PowerShell's spelling included."""
    command = command.partition(" | ")[0].partition(" > ")[0].partition(" >> ")[0].replace("\\", "/")
    words = shlex.split(command)
    if "torchrun" in words:  # test_group.py: in one process it leaves the same bytes
        return words[words.index("-m") + 2 :]
    if words[0] == "python":
        verbs = {
            "run": "train",
            "compare_xgblora_lora": "compare",
            "run_xgblora": "boost",
            "test_alpha_config": "check",
        }
        return [verbs[Path(words[1]).stem], *words[2:]]
    return words[1:]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Iterator[Path]:
    """A folder with what the docs' commands name, to run them in."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "examples" / "own_data", tmp_path / "own_data")
    for folder in ("my_data", "my_rte"):
        (tmp_path / folder).mkdir()
    for split, count in (("train", 60), ("validation", 20)):
        write_rows(tmp_path / "my_data" / f"{split}.jsonl", count)
        rows = [{"premise": "It rains.", "hypothesis": f"It is wet {i}.", "label": i % 2} for i in range(count)]
        (tmp_path / "my_rte" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shutil.copy(ROOT / "examples" / "own_data" / "packages.yaml", tmp_path / "my_task.yaml")
    (tmp_path / "imdb.txt").write_text("a text\nand another one\n", encoding="utf-8")
    for split in ("train", "test"):
        shutil.copy(ROOT / "examples" / "own_data" / f"{split}.csv", tmp_path / f"{split}.csv")
    (rewards,) = (block.text for block in blocks("docs/rewards.md") if block.language == "python")
    (tmp_path / "rewards.py").write_text(rewards, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("rewards", None)


def small(argv: list[str], model: Path) -> list[str]:
    """The same command on a tiny model and few rows."""
    verb, *rest = argv
    if verb in ("train", "compare", "boost", "tune", "check") and "--config" not in rest:
        rest = [*rest, "--model_name", model.as_posix(), *FEW.split()]
        if verb != "check" and "--recipe" not in rest:
            rest += ["--max_steps", "4", "--logging_steps", "2"]
        if verb in ("compare", "boost"):
            rest += ["--data_dir", "my_data", "--seeds", "0"]
        if verb == "tune":
            rest += ["--trials", "2"]
    return [verb, *rest]


def run(command: str, model: Path) -> None:
    argv = small(arguments(command), model)
    if argv[0] in ("push", "demo", "chat", "serve"):  # test_push.py, test_demo.py, test_predict.py, test_serving.py
        return
    if argv[0] in ("predict", "eval", "report", "stages", "replay", "export") and not Path(argv[1]).is_dir():
        made = f"xgblora train --recipe boost --task_file examples/own_data/packages.yaml --output_dir {argv[1]}"
        assert main(small(arguments(made), model)) == 0
    assert main(argv) in ((0, 1) if argv[0] == "check" else (0,)), command


@pytest.mark.parametrize("page", [page for page in PAGES if page not in READ_ONLY])
def test_commands_run(page: str, desk: Path, model_folder: Path) -> None:
    for block in blocks(page):
        if block.language in ("", "powershell"):
            for command in block.commands:
                if "..." not in command:
                    run(command, model_folder)


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_there_is(page: str, desk: Path) -> None:
    """Verbs, and flags with values that they take."""
    for block in blocks(page):
        for command in block.commands if block.language in ("", "powershell") else []:
            verb, *argv = arguments(re.sub(r"\.\.\.|[\[\]]", "", command))
            assert verb in VERBS, command
            if (
                verb not in KINDS
                or verb in ("tasks", "push")
                or "--config" in argv
                or set(argv) & {"RUN", "VERB", "--help"}
            ):
                continue
            argv = [token for token in argv if token != "--dry_run"]
            if verb in ("compare", "boost"):
                parse_experiment(verb, argv)
            elif verb in ("predict", "eval", "chat", "report", "stages", "replay", "export"):
                parse_of_run(KINDS[verb], verb, argv)
            else:
                parse(KINDS[verb], verb, with_config(KINDS[verb], verb, argv)[0])


@pytest.mark.parametrize("page", PAGES)
def test_nothing_else_stands_in_a_block_of_commands(page: str) -> None:
    """A block without a language that begins with a command holds commands alone."""
    for block in blocks(page):
        lines = re.sub(r"\s*[\\`]\n\s*", " ", block.text).strip().splitlines()
        if block.language or not lines or not lines[0].startswith(("xgblora ", *OTHERS)) or page in READ_ONLY:
            continue
        for line in lines:
            assert line.startswith(("xgblora ", "python large_models/", *OTHERS)), (page, line)


def test_python_runs(desk: Path, model_folder: Path) -> None:
    command = f"train --model_name {model_folder.as_posix()} --data_dir my_data --task_name SST2 --max_steps 2 {FEW}"
    assert main([*command.split(), "--output_dir", "my_run"]) == 0
    names: dict[str, object] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                exec(compile(block.text, page, "exec"), names)
    assert (desk / "my_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_json_are_what_they_say(page: str, desk: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml" and "data:" in block.text:
            (desk / "block.yaml").write_text(block.text, encoding="utf-8")
            load_task(desk / "block.yaml")
        elif block.language == "yaml":
            yaml.safe_load(block.text)
