"""What the README and the docs name is there; test_docs.py runs what they show."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_scripts_and_targets_that_are_named_exist() -> None:
    pages = README + (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    scripts = set(re.findall(r"large_models/\w+\.py", pages))
    assert len(scripts) == 4
    assert all((ROOT / script).is_file() for script in scripts)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", pages, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_readme_is_one_and_a_half_screens() -> None:
    assert README.count("\n") <= 120


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
