"""What a run learned in the formats that other tools take: PEFT, a whole model, llama.cpp's adapter."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xgblora.adapters.boosters import Ledger, load_adapters
from xgblora.adapters.export import fold, write_gguf
from xgblora.adapters.files import TASK
from xgblora.base import load_model
from xgblora.config import flag
from xgblora.errors import XgbloraError
from xgblora.files import CARD, read_json, sealed_folder
from xgblora.report import METRICS, RunResult
from xgblora.runs.card import CardFacts, card
from xgblora.runs.folder import CONFIG, adapter_of, base_name
from xgblora.tasks import load_task, task_text

logger = logging.getLogger(__name__)

MOST_ROUNDING = 0.1
"""A merged model whose cast loses more than this share of the update is refused."""


@dataclass
class ExportConfig:
    """The flags of ``export``."""

    format: Literal["peft", "merged", "gguf-lora"] = flag(
        "peft",
        "peft: an adapter for PeftModel.from_pretrained and vLLM; merged: a whole model with the boosters folded in; "
        "gguf-lora: an adapter file for llama.cpp (--lora).",
    )
    boosters: int | None = flag(
        None, "Only the first so many boosters; a merged model without any is the bare base. Default: all."
    )
    output: str | None = flag(None, "Folder (or .gguf file) to write; default: beside the run's adapter.")
    model_name: str | None = flag(None, "Base model, where it has moved since the run.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Precision of a merged model.")
    force: bool = flag(False, "Write a merged model even where the cast loses much of the update.")


def export(run: Path, config: ExportConfig) -> Path:
    """Write what a run learned.

    Args:
        run: The run's folder, or an adapter's.
        config: Format and place.

    Returns:
        The folder or file written.

    Raises:
        XgbloraError: There is no run, fewer boosters than asked for, no room for the format, or something stands at
            the place of the output already.
    """
    adapter = adapter_of(run)
    if config.format not in ("peft", "merged", "gguf-lora"):
        raise XgbloraError(f"--format must be peft, merged or gguf-lora, got {config.format}")
    least = 0 if config.format == "merged" else 1
    if config.boosters is not None and config.boosters < least:
        raise XgbloraError(f"--boosters must be at least {least} with --format {config.format}, got {config.boosters}")
    default = run / (f"{config.format}.gguf" if config.format == "gguf-lora" else config.format)
    output = Path(config.output) if config.output else default
    if output.exists():
        raise XgbloraError(f"{output} exists: choose another --output")
    # In float32: folded and written from the original weights.
    model, tokenizer = load_model(
        config.model_name or base_name(run, adapter),
        trust_remote_code=config.trust_remote_code,
        unpack=config.format == "merged",
    )
    ledger = load_adapters(model, adapter)
    if config.boosters is not None:
        ledger.truncate(config.boosters)
    facts = _facts(run, adapter, ledger, config)
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
            if facts is not None:
                (work / TASK).write_text(task_text(facts.task), encoding="utf-8", newline="\n")
                _write_card(work, facts, merged=True)
    elif config.format == "gguf-lora":
        write_gguf(ledger.adapters, output)
    else:
        with sealed_folder(output, ledger.fingerprint) as work:
            ledger.write(work)
            if facts is not None:
                _write_card(work, facts)
    return output


def _write_card(folder: Path, facts: CardFacts, merged: bool = False) -> None:
    (folder / CARD).write_text(card(facts, merged), encoding="utf-8", newline="\n")


def _facts(run: Path, adapter: Path, ledger: Ledger, config: ExportConfig) -> CardFacts | None:
    """What the card says; None where nobody knows what the model is asked."""
    if not (adapter / TASK).is_file():
        return None
    settings = read_json(run / CONFIG) if (run / CONFIG).is_file() else {}
    whole = config.boosters is None and (run / METRICS).is_file()
    return CardFacts(
        task=load_task(adapter / TASK, rows=False),
        model_name=config.model_name or base_name(run, adapter),
        rank=ledger.adapters.total_rank,
        settings=settings,
        result=RunResult.read(run) if whole else None,
    )
