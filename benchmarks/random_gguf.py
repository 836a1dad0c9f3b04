"""Write a .gguf file of any architecture with random packed weights: for measuring what a model of that size takes.

    python benchmarks/random_gguf.py 7b.gguf --like qwen2-7b [--kind Q4_K]

``Q4_K`` gives the mixture that llama.cpp calls Q4_K_M: values, half of the down projections and the head in Q6_K.
"""

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers import modeling_gguf_pytorch_utils as tables
from transformers.convert_slow_tokenizer import bytes_to_unicode

LIKE: dict[str, PreTrainedConfig] = {
    "qwen2-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        rope_theta=1e6,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=5e5,
    ),
}

SCALES: dict[Kind, tuple[tuple[int, float], ...]] = {
    Kind.Q4_0: ((0, 5e-3),),
    Kind.Q4_1: ((0, 5e-3), (2, -4e-2)),
    Kind.Q5_0: ((0, 2.5e-3),),
    Kind.Q5_1: ((0, 2.5e-3), (2, -4e-2)),
    Kind.Q8_0: ((0, 3e-4),),
    Kind.Q2_K: ((80, 2e-3), (82, 3e-3)),
    Kind.Q3_K: ((108, 6e-4),),
    Kind.Q4_K: ((0, 1.5e-4), (2, 1e-3)),
    Kind.Q5_K: ((0, 8e-5), (2, 1e-3)),
    Kind.Q6_K: ((208, 2e-5),),
    Kind.IQ4_NL: ((0, 4e-4),),
    Kind.IQ4_XS: ((0, 2e-5),),
}
"""Where a block keeps its numbers of 16 bits, and values of them that give weights of about 0.03."""


def random_rows(kind: Kind, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Random packed rows: uint8 (..., bytes), or numbers where the kind holds them as they are."""
    if kind in (Kind.F32, Kind.F16):
        return (0.03 * draw.standard_normal(shape)).astype(np.float32 if kind == Kind.F32 else np.float16)
    entries, size = GGML_QUANT_SIZES[kind]
    rows = np.frombuffer(draw.bytes(int(np.prod(shape)) // entries * size), np.uint8).reshape(-1, size).copy()
    for place, value in SCALES[kind]:
        noise = 1 + 0.2 * draw.standard_normal((len(rows), 1))
        rows[:, place : place + 2] = (value * noise).astype(np.float16).view(np.uint8)
    return rows.reshape(*shape[:-1], -1)


def write_random_gguf(
    path: Path, architecture: str, config: PreTrainedConfig, kind: Kind, seed: int = 0, mixed: bool = False
) -> None:
    """Write a model of random weights as transformers reads it.

    Args:
        path: The file.
        architecture: As .gguf files name it.
        config: Its sizes.
        kind: Of every matrix whose rows are whole blocks; F32 where they are not. Vectors are F32 always.
        seed: Of the weights.
        mixed: Values, every second down projection and the head in Q6_K.
    """
    draw = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture, use_temp_file=False)
    known = tables.GGUF_TO_TRANSFORMERS_MAPPING["config"]
    for key, setting in known.get(architecture, known.get(config.model_type, {})).items():
        value = getattr(config, setting, None) if setting else None
        if key == "rope.freq_base":
            value = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
        if isinstance(value, bool | int | float):
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(f"{architecture}.{key}", value)
    alphabet = list(bytes_to_unicode().values())
    special = ["<s>", "</s>", "th"]
    filler = [f"<word {n}>" for n in range(config.vocab_size - len(alphabet) - len(special))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(special + alphabet + filler)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)(config=config.to_dict())
    names = tables.get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    for name, target in tqdm(names.items(), desc=f"writing {path.name}", disable=len(names) < 100):
        if target not in shapes:
            continue  # a tied head
        shape = shapes[target]
        if processor.process(weights=np.broadcast_to(np.float32(0), shape), name=name).weights.shape != shape:
            shape = shape[::-1]
        chosen = kind if len(shape) > 1 else Kind.F32
        half = "ffn_down" in name and int(name.split(".")[1]) % 2
        if mixed and ("attn_v.weight" in name or name == "output.weight" or half):
            chosen = Kind.Q6_K
        if shape[-1] % GGML_QUANT_SIZES[chosen][0]:
            chosen = Kind.F32
        rows: Any = random_rows(chosen, shape, draw)
        if "norm" in name and "weight" in name:
            rows = 1 + 0.1 * rows.astype(np.float32)
        writer.add_tensor(name, rows, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--like", choices=LIKE, default="qwen2-7b")
    parser.add_argument("--kind", choices=[kind.name for kind in SCALES], default="Q4_K")
    asked = parser.parse_args()
    architecture = "qwen2" if asked.like.startswith("qwen2") else "llama"
    write_random_gguf(asked.path, architecture, LIKE[asked.like], gguf.GGMLQuantizationType[asked.kind], mixed=True)
    print(f"{asked.path}: {asked.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
