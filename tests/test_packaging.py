"""The wheel and the source archive hold all that is needed, and no more."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "xgblora"
DATA = ("*.yaml", "*.txt", "*.pyi", "py.typed", "*.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive, built from a copy of what git knows."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "source"
    copy.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy)], check=True)
    subprocess.run([*pip, "install", "--target", str(folder / "backend"), "setuptools>=77"], check=True)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    env = os.environ | {"PYTHONPATH": str(folder / "backend")}
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, check=True, capture_output=True)
    return folder


def files(pattern: str) -> set[str]:
    return {f"xgblora/{file.relative_to(SOURCES).as_posix()}" for file in SOURCES.rglob(pattern)}


def test_both_hold_every_file_of_the_package(built: Path) -> None:
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as content:
        in_archive = {name.partition("/src/")[2] for name in content.getnames() if "/src/" in name}
    for pattern in DATA:
        assert files(pattern)
        assert files(pattern) <= in_wheel, pattern
        assert files(pattern) <= in_archive, pattern
    assert not [name for name in in_wheel if not name.startswith(("xgblora/", "xgblora-"))]


def test_the_wheel_alone_works(built: Path, tmp_path: Path) -> None:
    """Without the repository: the package from the wheel, in front of the one that is installed."""
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(place)
    env = os.environ | {"PYTHONPATH": str(place)}
    code = "import xgblora, sys; from xgblora.cli import main; print(xgblora.__file__); "
    code += "print(xgblora.get_task('sst2').options); sys.exit(main(['predict', '--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(place) in done.stdout
    assert "('terrible', 'great')" in done.stdout
    assert "usage: xgblora predict" in done.stdout


def test_the_workflow_calls_what_must_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(file.read_text(encoding="utf-8")).keys()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
