"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest

from xgblora.cli import VERBS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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
    assert all((Path(__file__).parents[1] / script).is_file() for script in scripts)
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
