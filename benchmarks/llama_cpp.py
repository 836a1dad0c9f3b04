"""llama.cpp itself loads what ``xgblora export --format gguf-lora`` writes, and answers as the run does.

    npm install --prefix FOLDER --ignore-scripts node-llama-cpp@3.22.1     # llama.cpp with its Node bindings, built
    python benchmarks/llama_cpp.py --modules FOLDER [--run RUN] [--rows 32]

Two adapters on SmolLM2-135M are tried: random boosters on every linear layer (q and k too, whose rows llama.cpp keeps
in another order), and with ``--run`` a run's. The base is once the embedded .gguf, once the same weights as float32.
Printed for dev rows: how far llama.cpp's log-odds of the two options are from ours, in the mean and at most, without
and with the adapter, and how much the adapter moves them.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xgblora import Example, Ledger, OptionLoss, RunConfig, attach, load_adapters, load_model
from xgblora.adapters.export import write_gguf
from xgblora.base.wheels import shipped_file
from xgblora.config import EMBEDDED_MODEL
from xgblora.runs.workspace import Workspace

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def in_float32(source: Path, file: Path) -> None:
    """The same .gguf with every tensor as float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(modules: Path, model: Path, adapter: Path | None, rows: Path) -> np.ndarray:
    """llama.cpp's log-odds of the second option against the first, for each row."""
    script = Path(__file__).with_suffix(".mjs")
    command = ["node", str(script), str(modules), str(model), str(adapter or "none"), str(rows)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout
    scores = np.array(json.loads(answer.splitlines()[-1]))
    return np.asarray(scores[:, 1] - scores[:, 0])


@torch.no_grad()
def ours(ledger: Ledger, rows: list[Example]) -> np.ndarray:
    """The same by this package, float32, each row in a forward of its own."""
    base = ledger.adapters.base
    scores = [OptionLoss().scores(base, base.batch([row]), normalised=True)[0] for row in rows]
    return np.array([(row[1] - row[0]).item() for row in scores])


def random_boosters() -> Ledger:
    """Three boosters on every linear layer that move the answers visibly."""
    model, _ = load_model()
    ledger = Ledger(attach(model, 1, 16, EVERY_LAYER, xgblora=True))
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for layer in ledger.adapters.layers.values():
                layer.lora_B.copy_(1e-2 * torch.randn(layer.lora_B.shape, generator=draw))
        if number < 2:
            ledger.merge(number + 1, f"step {number + 1}", 0.0)
    return ledger


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=Path, required=True, help="Folder that node-llama-cpp is installed in.")
    parser.add_argument("--run", type=Path, help="A finished run on the embedded model.")
    parser.add_argument("--rows", type=int, default=32)
    asked = parser.parse_args()
    workspace = Workspace(RunConfig(output_dir="unused", num_train=2, num_dev=asked.rows, num_eval=1, max_steps=1))
    adapters = {"random boosters, all layers": random_boosters()}
    if asked.run:
        adapters[f"run {asked.run.name}"] = load_adapters(load_model()[0], asked.run / "adapter")
    table = Table(title=f"Log-odds of ' great' over ' terrible', {asked.rows} rows: llama.cpp minus ours")
    for column in ("adapter", "base", "mean |difference|", "largest", "bare base: mean", "largest", "adapter moves by"):
        table.add_column(column, justify="left" if column in ("adapter", "base") else "right")
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.json"
        prompts = [{"prompt": e.prompt, "options": [option[0] for option in e.options]} for e in workspace.dev]
        rows.write_text(json.dumps(prompts), encoding="utf-8")
        float32 = Path(scratch) / "base.gguf"
        in_float32(shipped_file(EMBEDDED_MODEL), float32)
        for name, ledger in adapters.items():
            file = Path(scratch) / "adapter.gguf"
            write_gguf(ledger.adapters, file)
            with ledger.adapters.first(0):
                bare = ours(ledger, workspace.dev)
            adapted = ours(ledger, workspace.dev)
            for kind, base in (("float32", float32), ("Q4_1", shipped_file(EMBEDDED_MODEL))):
                off = np.abs(ask(asked.modules, base, file, rows) - adapted)
                off_bare = np.abs(ask(asked.modules, base, None, rows) - bare)
                table.add_row(
                    *(name, kind, f"{off.mean():.5f}", f"{off.max():.5f}", f"{off_bare.mean():.5f}"),
                    *(f"{off_bare.max():.5f}", f"{np.abs(adapted - bare).mean():.3f}"),
                )
            file.unlink()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
