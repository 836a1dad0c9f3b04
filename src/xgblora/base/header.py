"""What a model's files say of themselves, checked before a reader believes it."""

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from xgblora.errors import XgbloraError

MOST_LAYERS = 2000
"""Layers of a model: ten times as many as the deepest one has."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
"""How configurations call them."""

GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each other kind in a GGUF file."""

MOST_DEEP = 4
"""Arrays in arrays in a GGUF file."""


def require_few_layers(settings: Mapping[str, Any]) -> None:
    """Raise :class:`XgbloraError` where a config.json wants more layers than any model has: they would be built."""
    parts = [settings, *(part for part in settings.values() if isinstance(part, Mapping))]
    for part in parts:
        for name in LAYER_COUNTS:
            if isinstance(count := part.get(name), int) and count > MOST_LAYERS:
                raise XgbloraError(f"its {name} is {count:,}, more than {MOST_LAYERS:,}")


def require_whole_header(path: Path) -> None:
    """Raise :class:`XgbloraError` where the sizes in the header of a .gguf file lead out of it."""
    if not path.is_file():
        raise XgbloraError(f"the model file {path} does not exist")
    if path.stat().st_size < 24:
        raise XgbloraError("it is no GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise XgbloraError("it is no GGUF file")
        try:
            _walk(content)
        except (struct.error, IndexError, OverflowError) as error:
            raise XgbloraError("it is damaged: its header leads out of the file") from error


def _walk(content: mmap.mmap) -> None:
    """Visit every entry of the header, as the format's specification lays them out."""
    size, place = len(content), 24

    def number(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(form)
        return int(value)

    def skip(length: int) -> None:
        nonlocal place
        if length > size - place:
            raise IndexError(length)
        place += length

    def value(kind: int, depth: int = 0) -> None:
        if kind == GGUF_STRING:
            skip(number("Q"))
        elif kind == GGUF_ARRAY:
            inner, count = number("I"), number("Q")
            if inner in GGUF_SIZES:
                skip(count * GGUF_SIZES[inner])
                return
            if count > size or depth > MOST_DEEP:
                raise IndexError(count)
            for _ in range(count):
                value(inner, depth + 1)
        else:
            skip(GGUF_SIZES.get(kind, size))

    tensors, entries = struct.unpack_from("<QQ", content, 8)
    if tensors > size or entries > size:
        raise IndexError(tensors)
    for _ in range(entries):
        length = number("Q")
        skip(length)
        name, kind = content[place - length : place], number("I")
        if name.endswith(b".block_count") and kind in (4, 5, 10, 11):
            (layers,) = struct.unpack_from("<I", content, place)
            require_few_layers({"num_hidden_layers": layers})
        value(kind)
    for _ in range(tensors):
        skip(number("Q"))
        dimensions = number("I")
        if dimensions > 8:
            raise IndexError(dimensions)
        skip(8 * dimensions + 4 + 8)


def other_shape(folder: Path, model: PreTrainedModel) -> str:
    """The first weight in a folder's safetensors files that has another shape than in ``model``; empty for none."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                    theirs = tuple(stored.get_slice(name).get_shape())
                    wanted = ours.get(name, ours.get(f"{model.base_model_prefix}.{name}", theirs))
                    if theirs != wanted:
                        return f"{name} is {theirs} there, {wanted} by its config.json"
        except SafetensorError:
            continue
    return ""
