"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest

from xgblora.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line and not line.startswith(("#", "import"))]
    assert len(lines) <= 15
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["answers"][0] in ("great", "terrible")
    assert (tmp_path / "my_adapter" / "adapter_model.safetensors").is_file()


def test_commands_name_verbs_and_scripts_that_exist() -> None:
    verbs = set(re.findall(r"^(?:\.venv\S+)?xgblora (\w+)", README, re.MULTILINE))
    assert verbs
    assert verbs <= set(VERBS)
    scripts = set(re.findall(r"large_models/\w+\.py", README))
    assert len(scripts) == 4
    assert all((ROOT / script).is_file() for script in scripts)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_every_promise_names_a_test_that_exists() -> None:
    promises = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", promises))
    there = {name for file in (ROOT / "tests").glob("*.py") for name in re.findall(r"def (test_\w+)", _text(file))}
    assert len(named) > 30
    assert named <= there, named - there


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", _text(ROOT / page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_files_that_the_docs_name_are_there() -> None:
    """By their path from the package or from the top; users' own files stand in code blocks."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "", _text(page), flags=re.DOTALL)
        for name in re.findall(r"`([\w./-]+\.py)`", text):
            places = [ROOT / name, ROOT / "src" / "xgblora" / name, ROOT / "benchmarks" / name]
            assert any(place.exists() for place in places), f"{page.name}: {name}"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
