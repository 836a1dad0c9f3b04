"""What a run learned in the formats that other tools take: PEFT, a whole model, llama.cpp's adapter."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from gguf.tensor_mapping import get_tensor_name_map
from peft import LoraConfig
from transformers.hf_argparser import HfArg
from transformers.pytorch_utils import Conv1D

from xgblora.adapters import Adapters
from xgblora.boosters import LEDGER, load_adapters
from xgblora.errors import XgbloraError
from xgblora.files import read_json, sealed_folder, write_atomically
from xgblora.models import load_model
from xgblora.run import CONFIG

logger = logging.getLogger(__name__)

Format = Literal["peft", "merged", "gguf-lora"]

MOST_ROUNDING = 0.1
"""A merged model whose cast loses more than this share of the update is refused."""

GGUF_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
"""Architectures whose adapter tensors llama.cpp takes in the layout written here, by transformers' model type."""

PAIRED_ROTARY = {"llama", "mistral"}
"""Model types whose q and k rows llama.cpp keeps in another order: it rotates neighbours, transformers halves."""


@dataclass
class ExportConfig:
    """The flags of ``export``."""

    format: Format = HfArg(
        default="peft",
        help="peft: an adapter for PeftModel.from_pretrained and vLLM; merged: a whole model with the boosters folded "
        "in; gguf-lora: an adapter file for llama.cpp (--lora).",
    )
    boosters: int | None = HfArg(default=None, help="Only the first so many boosters; default: all.")
    output: str | None = HfArg(default=None, help="Folder (or .gguf file) to write; default: beside the run's adapter.")
    model_name: str | None = HfArg(default=None, help="Base model, where it has moved since the run.")
    trust_remote_code: bool = HfArg(default=False, help="Run Python code that comes with the model.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Precision of a merged model.")
    force: bool = HfArg(default=False, help="Write a merged model even where the cast loses much of the update.")


def export(run: Path, config: ExportConfig) -> Path:
    """Write what the run in folder ``run`` (or an adapter's folder) learned; returns the folder or file written.

    Raises :class:`XgbloraError` where there is no run, fewer boosters than asked for, no room for the format, or
    where something stands at the place of the output already.
    """
    adapter = run / "adapter" if (run / "adapter" / LEDGER).is_file() else run
    if not (adapter / LEDGER).is_file():
        raise XgbloraError(f"{run} holds no finished run: {adapter / LEDGER} is missing")
    if config.format not in ("peft", "merged", "gguf-lora"):
        raise XgbloraError(f"--format must be peft, merged or gguf-lora, got {config.format}")
    default = run / (f"{config.format}.gguf" if config.format == "gguf-lora" else config.format)
    output = Path(config.output) if config.output else default
    if output.exists():
        raise XgbloraError(f"{output} exists: choose another --output")
    base = config.model_name or _base(run, adapter)
    model, tokenizer = load_model(
        base, trust_remote_code=config.trust_remote_code
    )  # float32: folded and written from the original weights
    ledger = load_adapters(model, adapter)
    if config.boosters is not None:
        if config.boosters < 1:
            raise XgbloraError(f"--boosters must be at least 1, got {config.boosters}")
        ledger.truncate(config.boosters)
    if config.format == "merged":
        dtype: torch.dtype = getattr(torch, config.dtype)
        lost = fold(ledger.adapters, dtype)
        logger.info("The cast to %s loses %.2g of the update", config.dtype, lost)
        if lost > MOST_ROUNDING and not config.force:
            raise XgbloraError(
                f"cast to {config.dtype}, the weights would lose {lost:.0%} of the update: export --dtype float32 or "
                "--format peft, or --force it"
            )
        with sealed_folder(output, ledger.fingerprint) as work:
            model.to(dtype).save_pretrained(work)
            tokenizer.save_pretrained(work)
    elif config.format == "gguf-lora":
        write_gguf(ledger.adapters, output)
    else:
        ledger.save(output)
    return output


def _base(run: Path, adapter: Path) -> str:
    if (run / CONFIG).is_file():
        return str(read_json(run / CONFIG)["model_name"])
    name = LoraConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name:
        raise XgbloraError(f"{adapter} does not say which base model it belongs to: give --model_name")
    return str(name)


@torch.no_grad()
def fold(adapters: Adapters, dtype: torch.dtype) -> float:
    """Add all boosters to the base's weights, once, in float32, and take the adapters off.

    Returns the share of the update that a cast to ``dtype`` loses: the norm of what the cast weights changed by minus
    the update, over the norm of the update. Raises :class:`XgbloraError` for a base without float32 weights.
    """
    lost = size = 0.0
    for name, layer in adapters.layers.items():
        weight = getattr(layer.base_layer, "weight", None)
        if weight is None or weight.dtype != torch.float32:
            raise XgbloraError(f"{name} has no float32 weight to fold into")
        A, B = layer.pairs()
        update = layer.scaling * (B @ A)
        update = update.T if isinstance(layer.base_layer, Conv1D) else update
        before = weight.to(dtype, copy=True).float()
        weight += update
        lost += (weight.to(dtype).float() - before - update).square().sum().item()
        size += update.square().sum().item()
    adapters.detach()
    return (lost / size) ** 0.5 if size else 0.0


def write_gguf(adapters: Adapters, file: Path) -> None:
    """Write llama.cpp's adapter file: float32 lora_a (K, in) and lora_b (out, K) of each layer that learned something.

    The format is that of llama.cpp's loader: ``general.type`` adapter, ``adapter.type`` lora, ``adapter.lora.alpha``,
    tensors named as the base's with .lora_a and .lora_b. Raises :class:`XgbloraError` for architectures of which this
    layout is not known.
    """
    config = adapters.model.config
    kind = str(config.model_type)
    if kind not in GGUF_ARCHITECTURES:
        raise XgbloraError(f"gguf-lora knows {', '.join(sorted(GGUF_ARCHITECTURES))}, not {kind}: export --format peft")
    architecture = GGUF_ARCHITECTURES[kind]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    rank = adapters.boosters + adapters.rank

    def write(work: Path) -> None:
        writer = gguf.GGUFWriter(work, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapters.scaling * rank))
        for name, layer in adapters.layers.items():
            A, B = (part.detach().cpu().numpy() for part in layer.pairs())
            if not B.any():
                continue
            target = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            if target is None:
                raise XgbloraError(f"llama.cpp has no tensor for {name}: export --format peft")
            if kind in PAIRED_ROTARY and name.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
                B = pair_rotary(B, heads)
            writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(A))
            writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(B))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(file, write)


def pair_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (out, ...) in transformers' order, each head's first halves before its second, as llama.cpp's pairs."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, 2, width // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
