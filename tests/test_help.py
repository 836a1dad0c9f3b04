"""What the command line says of itself: at once, on one screen, and true."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xgblora import RunConfig
from xgblora.cli import main
from xgblora.cli.completion import KINDS
from xgblora.cli.pages import help_page, overview
from xgblora.cli.parsing import parser
from xgblora.cli.verbs import VERBS
from xgblora.config.flag import default_of

OUTSIDE = {"--help-all", "--extra_args", "--config", "--dry_run"}
"""Flags that no configuration has."""
MOST_LINES = 45
HEAVY = ("torch", "transformers", "datasets", "numpy", "pandas", "matplotlib", "peft", "rich")


def test_every_verb_has_its_page_and_the_first_page_has_every_verb() -> None:
    assert {*KINDS, "completion"} == set(VERBS)
    listed = re.findall(r"^  (\w+)  ", overview(), re.MULTILINE)
    assert listed == list(VERBS)
    for verb in VERBS.values():
        assert callable(verb.function())


@pytest.mark.parametrize("verb", KINDS)
def test_a_page_fits_a_screen_and_names_flags_that_there_are(verb: str) -> None:
    page = help_page(verb)
    assert page.startswith(f"usage: xgblora {verb}")
    assert page.count("\n") < MOST_LINES
    assert max(map(len, page.splitlines())) <= 120
    known = {name for action in parser(KINDS[verb], verb)._actions for name in action.option_strings}
    named = {name for name in re.findall(r"--[a-zA-Z][\w-]*", page) if not _of_another_verb(name, page, verb)}
    assert named - OUTSIDE <= known


def _of_another_verb(name: str, page: str, verb: str) -> bool:
    """Named as what ``xgblora OTHER`` takes."""
    return any(name in line for other in VERBS if other != verb for line in re.findall(f"xgblora {other} .*", page))


@pytest.mark.parametrize("verb", KINDS)
def test_a_page_gives_the_defaults_that_hold(verb: str) -> None:
    """In brackets at the end of a flag's line: of the flag as a run without any flag has it."""
    kind = KINDS[verb]
    given = {"output_dir": "x", "use_cpu": True} if issubclass(kind, RunConfig) else {}
    flags = {name: action.dest for action in parser(kind, verb)._actions for name in action.option_strings}
    shown = re.findall(r"^  (--\w+) .*  \[([^\]]*)\]$", help_page(verb), re.MULTILINE)
    if verb in ("train", "compare", "boost", "check", "predict"):
        assert shown
    for name, value in shown:
        field: Any = kind.__dataclass_fields__[flags[name]]
        default = default_of(field)
        default = getattr(kind(**given), flags[name]) if default is None else default
        text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        assert text == value, name


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), ["trian"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = "import sys; from xgblora.cli import main; code = main(sys.argv[1:]); "
    code += f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, encoding="utf-8", check=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == ("2 []" if argv == ["trian"] else "0 []")
    assert done.stdout or argv == ["trian"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "unknown verb 'trian': did you mean train? (xgblora --help lists the verbs)"),
        ("fly", "unknown verb 'fly' (xgblora --help lists the verbs)"),
        ("train --lerning_rate 1", "unknown argument '--lerning_rate': did you mean --learning_rate?"),
        ("train --lerning-rate=1", "unknown argument '--lerning-rate=1': did you mean --learning_rate?"),
        ("predict runs/x --fromat csv", "unknown argument '--fromat': did you mean --format?"),
        ("train --task_name RotenTomatoes", "unknown task 'RotenTomatoes': did you mean RottenTomatoes?"),
        ("train --task_name my.yaml", "my.yaml is a task file: give it to --task_file"),
    ],
)
def test_a_slip_of_the_keyboard_is_told_what_was_meant(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_every_flag_is_shown_where_somebody_asks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help-all"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count("\n") > 200
    assert "--boost_follow_ridge" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_verbs_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "xgblora.sh"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    words = {"xgblora pr": "predict", "xgblora train --boost_oers": "", "xgblora predict run --form": "--format"}
    for line, expected in words.items():
        tokens = line.split(" ")
        code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(tokens) - 1}; _shtab_xgblora; "
        code += 'echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code], capture_output=True, encoding="utf-8", check=False)
        assert done.stdout.split() == ([expected] if expected else []), (line, done.stderr)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "ksh"]) == 2
    assert "say which shell: xgblora completion bash" in capsys.readouterr().err
