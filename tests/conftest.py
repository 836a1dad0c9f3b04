"""Tiny models of real architectures, real rows, and the smallest useful configurations."""

import copy
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: they share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub; a look-up must fail at once
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
import transformers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from xgblora import Base, Batch, Example, Ledger, OptionLoss, RunConfig, Trainer, attach, start_from
from xgblora.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.cli import main
from xgblora.config import precision
from xgblora.learn.estimators import Estimate, Key, TwoSided
from xgblora.learn.losses import Loss

torch.set_num_threads(1)
precision.bfloat16_is_faster = lambda on_gpu=False: False  # float32, so that numbers do not depend on the machine
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LONG = frozenset((Path(__file__).parent / "long.txt").read_text(encoding="utf-8").splitlines())
"""Tests of more than ten seconds whose shorter relatives say most of what they do: `make soak` runs them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/") in LONG:
            item.add_marker(pytest.mark.soak)


Run = Callable[..., tuple[int, str, str]]
VOCABULARY = 300
_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    # As facebook/opt-350m: embeddings narrower than the model, norms after the blocks, dropout 0.1.
    "opt": OPTConfig(
        **_SIZES | {"word_embed_proj_dim": 16, "ffn_dim": 64, "max_position_embeddings": 64},
        do_layer_norm_before=False,
        **_SPECIAL,
    ),
    "llama": LlamaConfig(**_LLAMA),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SPECIAL),
    "qwen2": Qwen2Config(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=6),
    "gemma": GemmaConfig(**_LLAMA, head_dim=8),
}


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights large enough that a wrong neighbour shows in the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).requires_grad_(False).eval()


def examples(count: int, options: list[list[int]] | None = None, seed: int = 0) -> list[Example]:
    """Prompts of 4 to 20 random tokens whose first token gives the label away."""
    draw = random.Random(seed)
    options = options or [[5], [9]]
    made = []
    for _ in range(count):
        label = draw.randrange(len(options))
        tokens = [draw.randrange(10, VOCABULARY) for _ in range(draw.randrange(3, 20))]
        made.append(Example([20 + label, *tokens], options, label))
    return made


def train(
    folder: Path, model: PreTrainedModel | None = None, rows: list[Example] | None = None, **flags: Any
) -> tuple[Trainer, list[float]]:
    """A short training of a tiny OPT with every loss logged; returns the trainer and the losses.

    ``start``: folder of an adapter whose ranks are the first boosters.
    """
    flags = {"max_steps": 20, "optim": "adamw_torch", "learning_rate": 3e-3, "zo_eps": 1e-2} | flags
    flags = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True} | flags
    if flags.get("recipe") == "boost":  # a step is a booster: there is nothing to say about steps
        for name in ("max_steps", "logging_steps"):
            del flags[name]
    resume, packed, layers, start = (flags.pop(name, None) for name in ("resume", "packed", "layers", "start"))
    config = RunConfig(output_dir=str(folder), **flags)
    model = model or build(ARCHITECTURES["opt"])
    base = Base(model, packed)
    targets = config.lora_target_modules
    adapters = attach(base, config.rank, config.lora_alpha, targets, config.seed, config.xgblora, layers)
    ledger = Ledger(adapters)
    if start:
        start_from(ledger, start)
    trainer = Trainer(model, config, ledger, rows or examples(64), examples(32, seed=1))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def option_scores(model: Any, batch: Batch, normalised: bool = False) -> torch.Tensor:
    """Scores of a batch's options (segments, options)."""
    return OptionLoss().scores(Base.of(model), batch, normalised)


def estimate(
    adapters: Adapters,
    batch: Batch,
    loss: Loss | None = None,
    prefix: Prefix | None = None,
    step: int = 0,
    seed: int = 0,
    **settings: Any,
) -> Estimate:
    """A zeroth-order estimate of one batch."""
    two_sided = TwoSided(**({"eps": 1e-2} | settings), prefix=prefix)
    return two_sided(adapters, loss or OptionLoss(), batch, Key(seed, step))


def _training(folder: Path, model: Path, flags: str) -> list[str]:
    command = f"train --model_name {model} --use_cpu true --disable_tqdm true --output_dir {folder / 'run'} {flags}"
    return command.split()


def refusal_by_command(folder: Path, model: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which ``xgblora train`` into ``folder / "run"`` is refused."""
    assert main(_training(folder, model, flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def train_by_command(folder: Path, model: Path, flags: str, task: str = "") -> dict[str, Any]:
    """``xgblora train`` into ``folder / "run"``, perhaps of a task file with the text ``task``; returns the metrics."""
    if task:
        (folder / "mine.yaml").write_text(task, encoding="utf-8")
        flags += f" --task_file {folder / 'mine.yaml'}"
    assert main(_training(folder, model, flags)) == 0
    metrics: dict[str, Any] = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    return metrics


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return ARCHITECTURES[request.param]


@pytest.fixture
def randomise() -> Callable[[Any, int], None]:
    """Give the pair in training of some adapters non-zero values."""

    def fill(adapters: Any, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))

    return fill


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> "LogLines":
    """Everything the package logs, from INFO up."""
    lines = LogLines()
    package = logging.getLogger("xgblora")
    monkeypatch.setattr(package, "propagate", False)
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(lines)
    yield lines
    package.removeHandler(lines)
    package.setLevel(level)


class LogLines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def containing(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OPT with a byte tokenizer on disk, in the format of any hub model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-opt"
    config = OPTConfig(
        **_SIZES | {"word_embed_proj_dim": 16, "ffn_dim": 64, "max_position_embeddings": 128},
        do_layer_norm_before=False,
        **_SPECIAL,
    )
    build(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the options' words whole, as in real vocabularies."""
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in ("Ġgreat", "Ġterrible"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


POSITIVE = ("a warm and funny film", "moving , clever and beautifully acted", "an utter delight", "superb")
NEGATIVE = ("a dull and lifeless mess", "tedious , clumsy and badly acted", "an utter bore", "painful to sit through")


def save_talking_model(folder: Path, template: str) -> None:
    """A tiny model with a chat template."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=48, max_position_embeddings=512, **sizes)
    build(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    """Rows in SST-2's columns, as JSON lines."""
    draw = random.Random(path.stem)
    rows = []
    for number in range(count):
        label = number % 2
        rows.append({"sentence": draw.choice((NEGATIVE, POSITIVE)[label]) + f" {number}", "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", 80)
    write_rows(folder / "validation.jsonl", 30)
    return folder


@pytest.fixture
def small(model_folder: Path, data_folder: Path) -> list[str]:
    flags = f"--model_name {model_folder.as_posix()} --data_dir {data_folder.as_posix()} --task_name SST2"
    flags += " --num_train 40 --num_dev 10 --num_eval 20 --disable_tqdm true --use_cpu true"
    return flags.split()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Carry out a command line; returns exit code, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(token) for token in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call
