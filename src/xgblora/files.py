"""Files and folders that are whole or not there: written beside, synced, renamed; sealed with what is in them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xgblora.errors import XgbloraError

MANIFEST = "manifest.json"
PART = ".part"
"""Ending of what is being written; nothing reads such files, and the next run removes them."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file under another name in the same folder, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        write(work)
        _sync(work)
        work.replace(path)
        _sync_folder(path.parent)
    finally:
        work.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """JSON in UTF-8, indented, one final newline. NaN is refused: a file that other programs read must be JSON."""
    text = _text(content)
    write_atomically(path, lambda work: work.write_text(text, encoding="utf-8", newline="\n"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises :class:`XgbloraError` where the file is missing, damaged or no object."""
    if not path.is_file():
        raise XgbloraError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise XgbloraError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise XgbloraError(f"{path} is damaged (it holds no object)")
    return content


@contextmanager
def sealed_folder(folder: Path, fingerprint: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` at the end of the block.

    A writer that fails or is killed leaves the former one; if killed between two renames, as ``.NAME.PID.former.part``.
    ``manifest.json`` is added: the SHA-256 of each file, and ``fingerprint``, JSON values that say what they belong to.
    Raises :class:`XgbloraError` where ``folder`` is there and holds anything but what an earlier manifest names.
    """
    _require_ours(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work, former = (folder.with_name(f".{folder.name}.{os.getpid()}{end}{PART}") for end in ("", ".former"))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        digests = {}
        for file in sorted(work.iterdir()):
            _sync(file)
            digests[file.name] = digest(file)
        write_json(work / MANIFEST, _seal(fingerprint, digests))
        if folder.exists():
            folder.rename(former)
        work.rename(folder)
        _sync_folder(folder.parent)
    finally:
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _require_ours(folder: Path) -> None:
    """Nobody's files are replaced but those that a manifest names."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise XgbloraError(f"{folder} is a file: choose another folder")
    there = {file.name for file in folder.iterdir()}
    if there and (MANIFEST not in there or there - read_json(folder / MANIFEST).get("sha256", {}).keys()):
        raise XgbloraError(f"{folder} holds files of something else: choose another folder")


def verify(folder: Path) -> dict[str, Any]:
    """The fingerprint of a sealed folder, once every file in it is known to be as it was written.

    Raises :class:`XgbloraError` with the name of the file that is missing or damaged.
    """
    content = read_json(folder / MANIFEST)
    fingerprint, digests = content.get("fingerprint"), content.get("sha256")
    if not isinstance(fingerprint, dict) or not isinstance(digests, dict):
        raise XgbloraError(f"{folder / MANIFEST} is damaged (it names no files)")
    own = digests.pop(MANIFEST, None)
    sealed = _seal(fingerprint, digests)
    if own != sealed["sha256"][MANIFEST] or (folder / MANIFEST).read_bytes() != _text(sealed).encode():
        raise XgbloraError(f"{folder / MANIFEST} is damaged (its own SHA-256 differs)")
    for name, sha256 in digests.items():
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise XgbloraError(f"{file} is missing")
        if digest(file) != sha256:
            raise XgbloraError(f"{file} is damaged (its SHA-256 is not the one in {MANIFEST})")
    return fingerprint


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in ``folder``. No writer may be at work there."""
    for left in folder.glob(f"*{PART}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _seal(fingerprint: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """The manifest's content: last among the digests that of all the rest of it."""
    content = {"fingerprint": fingerprint, "sha256": digests}
    own = hashlib.sha256(_text(content).encode()).hexdigest()
    return content | {"sha256": {**digests, MANIFEST: own}}


def _sync(file: Path) -> None:
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename last. Windows has no such call for folders, and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
