"""What a model's files say of themselves, checked before a reader believes it."""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from xgblora.errors import XgbloraError, one_line

MOST_LAYERS = 2000
"""Layers of a model: ten times as many as the deepest one has."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
"""How configurations call them."""

GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each other kind in a GGUF file."""

MOST_NAME = 2**16
"""Bytes of a name or a value that is looked at."""

MOST_DEEP = 4
"""Arrays in arrays in a GGUF file."""


def require_few_layers(settings: Mapping[str, Any]) -> None:
    """Raise :class:`XgbloraError` where a config.json wants more layers than any model has: they would be built."""
    parts = [settings, *(part for part in settings.values() if isinstance(part, Mapping))]
    for part in parts:
        for name in LAYER_COUNTS:
            if isinstance(count := part.get(name), int) and count > MOST_LAYERS:
                raise XgbloraError(f"its {name} is {count:,}, more than {MOST_LAYERS:,}")


@dataclass(frozen=True)
class StoredTensor:
    """Where a .gguf file holds a tensor, and how."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: rows first."""
    kind: Kind
    start: int
    """The byte of the file where it begins."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class GgufHeader:
    """What a .gguf file says of itself."""

    architecture: str
    tensors: list[StoredTensor]
    digest: str
    """SHA-256 of the header, which holds configuration and tokenizer but no weight."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a .gguf file, and believe none of its sizes.

    Raises:
        XgbloraError: It is no such file; a size in the header, or a tensor, leads out of the file; or a tensor is of
            a kind that nobody knows.
    """
    if not path.is_file():
        raise XgbloraError(f"the model file {path} does not exist")
    if path.stat().st_size < 24:
        raise XgbloraError("it is no GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"GGUF":
            raise XgbloraError("it is no GGUF file")
        try:
            return _walk(content)
        except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
            raise XgbloraError("it is damaged: its header leads out of the file") from error


def _walk(content: mmap.mmap) -> GgufHeader:
    """Visit every entry of the header, as the format's specification lays them out."""
    size, place = len(content), 24
    architecture, alignment = "", 32

    def number(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(form)
        return int(value)

    def skip(length: int) -> bytes:
        nonlocal place
        if length > size - place:
            raise IndexError(length)
        place += length
        return content[place - length : place] if length <= MOST_NAME else b""

    def value(kind: int, depth: int = 0) -> bytes:
        if kind == GGUF_STRING:
            return skip(number("Q"))
        if kind == GGUF_ARRAY:
            inner, count = number("I"), number("Q")
            if inner in GGUF_SIZES:
                return skip(count * GGUF_SIZES[inner])
            if count > size or depth > MOST_DEEP:
                raise IndexError(count)
            for _ in range(count):
                value(inner, depth + 1)
            return b""
        return skip(GGUF_SIZES.get(kind, size))

    tensors, entries = struct.unpack_from("<QQ", content, 8)
    if tensors > size or entries > size:
        raise IndexError(tensors)
    for _ in range(entries):
        name, kind = skip(number("Q")), number("I")
        content_of = value(kind)
        if name.endswith(b".block_count") and kind in (4, 5, 10, 11):
            require_few_layers({"num_hidden_layers": int.from_bytes(content_of[:4], "little")})
        elif name == b"general.architecture":
            architecture = content_of.decode()
        elif name == b"general.alignment" and kind == 4:
            alignment = max(1, int.from_bytes(content_of, "little"))
    entries_read = []
    for _ in range(tensors):
        name, dimensions = skip(number("Q")), number("I")
        if dimensions > 8:
            raise IndexError(dimensions)
        shape = tuple(reversed([number("Q") for _ in range(dimensions)]))
        entries_read.append((name.decode(), shape, number("I"), number("Q")))
    start = math.ceil(place / alignment) * alignment
    placed = [_placed(*entry, start, size) for entry in entries_read]
    return GgufHeader(architecture, placed, hashlib.sha256(memoryview(content)[:place]).hexdigest())


def _placed(name: str, shape: tuple[int, ...], number: int, offset: int, start: int, size: int) -> StoredTensor:
    """One tensor, where its bytes lie in the file."""
    try:
        kind = Kind(number)
    except ValueError:
        raise XgbloraError(f"its {name} is of a kind that is not known ({number})") from None
    entries, bytes_each = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % entries:
        raise XgbloraError(f"it is damaged: rows of {name} are not whole blocks of {entries}")
    length = math.prod(shape) // entries * bytes_each
    if start + offset + length > size:
        raise XgbloraError(f"it is damaged or cut short: {name} leads out of the file")
    return StoredTensor(name, shape, kind, start + offset, length)


SAFETENSORS_KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """What a .safetensors file holds, and where; the safetensors package has looked at all offsets.

    Raises:
        XgbloraError: It is damaged, or holds a tensor of numbers that no weight is made of.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise XgbloraError(f"{path.name} is damaged: {one_line(error)}") from error
    tensors = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if entry["dtype"] in SAFETENSORS_KINDS:
            kind = SAFETENSORS_KINDS[entry["dtype"]]
            tensors.append(StoredTensor(name, tuple(entry["shape"]), kind, 8 + length + first, last - first))
        elif name.endswith("weight"):
            known = ", ".join(SAFETENSORS_KINDS)
            raise XgbloraError(f"its {name} is stored as {entry['dtype']}: --memory_budget reads {known} from a folder")
    return tensors


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
