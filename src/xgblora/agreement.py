"""What processes that share a run agree on: what the first one decides, and that all have the same."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, TypeVar

from xgblora.errors import XgbloraError
from xgblora.group import at_leaving, first, gather_objects, size

T = TypeVar("T")
_scratch: list["TemporaryDirectory[str]"] = []


def scratch() -> Path:
    """A folder of this process's own, until it leaves: all but the first write there what nobody reads."""
    if not _scratch:
        _scratch.append(TemporaryDirectory(prefix="xgblora-process-", ignore_cleanup_errors=True))
        at_leaving(_clean)
    return Path(_scratch[0].name)


def own_folder(folder: str | Path) -> str:
    """Where this process writes: the first one to ``folder``, any other to a new folder that goes when it leaves."""
    if first() or Path(folder).is_relative_to(scratch()):
        return str(folder)
    return str(Path(mkdtemp(dir=scratch())) / "run")


def _clean() -> None:
    _scratch.pop().cleanup()


def of_first(decide: Callable[[], T]) -> T:
    """What the first process decides, on all; the others do not ask.

    Raises:
        LostProcessError: Another process is gone.
    """
    return gather_objects(decide() if first() else None)[0]  # type: ignore[return-value]


def folder_of_first(folder: Path | None) -> Path | None:
    """A folder that only the first process need have, without folders in it: itself there, elsewhere a copy.

    Args:
        folder: Of the first process, all others give None; None there, too: there is none.

    Raises:
        LostProcessError: Another process is gone.
    """
    if size() == 1:
        return folder
    sent = of_first(lambda: _contents(folder))
    if first() or sent is None:
        return folder
    copy = scratch() / "copied" / sent[0]
    copy.mkdir(parents=True, exist_ok=True)
    for file in copy.iterdir():
        file.unlink()
    for name, content in sent[1].items():
        (copy / name).write_bytes(content)
    return copy


def require_same(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raise :class:`XgbloraError` where processes do not agree on a fact, naming it and the process.

    One process alone is not asked for its facts: digests take time.
    """
    if size() == 1:
        return
    theirs = gather_objects(dict(facts()))
    for name, value in theirs[0].items():
        for process, fact in enumerate(theirs):
            if (other := fact.get(name)) != value:
                raise XgbloraError(
                    f"process {process} has another {name} than process 0 ({_short(other)}, not {_short(value)}): all "
                    "must compute the same"
                )


def _contents(folder: Path | None) -> tuple[str, dict[str, bytes]] | None:
    """A folder's name, and its files."""
    return None if folder is None else (folder.name, {file.name: file.read_bytes() for file in folder.iterdir()})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
