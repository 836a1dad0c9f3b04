"""The shape of the house: rooms, sizes, names, and the fence around transformers."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import logging
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from transformers import TrainingArguments

import xgblora
from conftest import LONG
from xgblora import RunConfig, XgbloraError, hf
from xgblora.config.flags import FLAGS, UNSUPPORTED, Flags
from xgblora.config.transformers_flags import ALLOWED, REFUSED

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "xgblora").rglob("*.py"))
MOST_LINES = 350
MOST_PARAMETERS = 7
MOST_ROOM_IMPORTS = 80
NO_NAMES = {"each", "found", "own", "said"}
"""What says nothing of the thing that it names."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_modules_fit_a_sitting_and_functions_take_few_parameters() -> None:
    assert len(SOURCES) > 60
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, file.name
        for function in functions(ast.parse(text)):
            given = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            assert len([name for name in given if name not in ("self", "cls")]) <= MOST_PARAMETERS, function.name


def test_names_say_what_they_name() -> None:
    for file in [*SOURCES, *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            bound = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            assert bound not in NO_NAMES, f"{file.name}, line {getattr(node, 'lineno', 0)}: {bound}"


def test_no_private_name_is_used_across_modules() -> None:
    """Beside ruff's look at attributes: what is imported."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], file.name


def test_rooms_know_few_rooms() -> None:
    graph = grimp.build_graph("xgblora", cache_dir=None)
    pairs = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            rooms = [[*name.split("."), ""][1] for name in (module, imported)]
            pairs |= {tuple(rooms)} if rooms[0] != rooms[1] else set()
    assert len(pairs) < MOST_ROOM_IMPORTS, sorted(pairs)


def test_every_flag_of_transformers_works_or_is_refused_with_a_reason() -> None:
    """A later transformers may have new ones: they are refused until somebody has looked at them here."""
    declared = {field.name for field in dataclasses.fields(Flags)}
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert theirs <= declared
    assert set(FLAGS) | set(UNSUPPORTED) == declared
    assert not set(FLAGS) & set(UNSUPPORTED)
    unseen = {name for name, reason in UNSUPPORTED.items() if name not in REFUSED}
    assert not unseen, "look at these: do they work here?"
    assert set(ALLOWED) | set(REFUSED) <= theirs, "these are gone"


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_refused_flags_are_one_line(name: str) -> None:
    default = {field.name: field.default for field in dataclasses.fields(Flags)}[name]
    value = (not default) if isinstance(default, bool) else "anything"
    with pytest.raises(XgbloraError, match=re.escape(f"--{name} is not supported: {UNSUPPORTED[name]}")):
        RunConfig(output_dir="unused", use_cpu=True, **{name: value})


def test_a_flag_that_takes_a_text_or_false_takes_any_text() -> None:
    config = RunConfig(output_dir="unused", use_cpu=True, trackio_static_space_id="me/curves")
    assert config.trackio_static_space_id == "me/curves"


def test_the_installed_transformers_is_what_is_overridden() -> None:
    assert hf.differences() == []
    for name in hf.OVERRIDDEN:
        assert name in vars(hf.HookedTrainer), name
    fenced = {*hf.OVERRIDDEN, "_n_gpu", "_attn_implementation"}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            methods = {item.name for item in functions(node)} if isinstance(node, ast.ClassDef) else set()
            used = methods | ({node.attr} if isinstance(node, ast.Attribute) else set())
            assert file.name == "hf.py" or not used & fenced, (file.name, used & fenced)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(
            *("del transformers.Trainer._run_epoch", "Trainer._run_epoch(model, epoch, "), marks=pytest.mark.soak
        ),
        pytest.param(
            *("transformers.Trainer._save = lambda self, folder: None", "Trainer._save(output_dir, state_dict)"),
            marks=pytest.mark.soak,
        ),
        ("del transformers.PreTrainedConfig._attn_implementation", "PreTrainedConfig._attn_implementation"),
    ],
)
def test_another_transformers_is_refused_in_one_line(change: str, names: str) -> None:
    """As if it had renamed a hook: without the check, checkpoints would silently be those of transformers."""
    code = f"import transformers\n{change}\nfrom xgblora import Trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ImportError: xgblora does not work with transformers ")
    assert names in line
    assert line.endswith('run  python -m pip install "transformers>=5.20,<6"')


MODULES = [name for _, name, _ in pkgutil.walk_packages(xgblora.__path__, "xgblora.") if "__main__" not in name]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "xgblora")  # a command in another test may have turned its lines on
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_what_is_public_is_explained() -> None:
    """What it does, what goes in, and an example."""
    for name in xgblora.__all__:
        thing = getattr(xgblora, name)
        text = inspect.getdoc(thing) or ""
        assert text, name
        if inspect.isfunction(thing) and inspect.signature(thing).parameters:
            assert "Args:" in text, name
            assert "Example" in text, name


def test_long_tests_are_there() -> None:
    for name in LONG:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
