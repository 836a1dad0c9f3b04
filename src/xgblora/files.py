"""Files that are whole or not there: written beside, then renamed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make the file under another name in the same folder, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(work)
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """JSON in UTF-8, indented, one final newline. NaN is refused: a file that other programs read must be JSON."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, lambda work: work.write_text(text, encoding="utf-8", newline="\n"))
