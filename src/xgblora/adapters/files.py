"""The files of an adapter: PEFT's two, ``ledger.json`` and ``task.yaml`` beside them, and a manifest that seals them.

K merged rank-1 boosters and the pair in training are one LoRA of rank K + r with the same scaling, so that is how they
are stored: ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT writes them, boosters first.
``ledger.json`` says what PEFT does not know: where each booster came from, and what training needs to go on;
``task.yaml`` says what the model is asked, as a task file does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xgblora.adapters import plain_peft
from xgblora.adapters.adapters import Adapters
from xgblora.adapters.plain_peft import PEFT_CONFIG, WEIGHTS, tensor_name
from xgblora.errors import XgbloraError
from xgblora.files import MANIFEST, read_json, verify, write_json

LEDGER = "ledger.json"
TASK = "task.yaml"
"""The task that an adapter was trained on, where it is known: without prompt and options it is of no use."""
ENTRIES = ("rank", "scaling", "boosters", "evaluation")
"""What a ledger.json must hold."""


@dataclass(frozen=True)
class Stored:
    """An adapter as it was read from disk, after its digests were checked."""

    folder: Path
    entries: dict[str, Any]
    """Content of ledger.json."""
    tensors: dict[str, Tensor]
    """The pairs, by the names that PEFT gives them."""
    task: str | None
    """Content of task.yaml."""
    fingerprint: dict[str, Any]
    """What they belong to."""


def write(folder: Path, adapters: Adapters, entries: Mapping[str, Any], task: str | None) -> None:
    """Write all boosters and the pair in training into a folder that exists.

    Args:
        folder: It exists.
        adapters: With their boosters.
        entries: Content of ledger.json.
        task: Content of task.yaml.
    """
    rank = adapters.total_rank
    tensors = {}
    for name, layer in adapters.layers.items():
        for matrix, rows in zip("AB", layer.pairs(), strict=True):
            tensors[tensor_name(name, matrix)] = rows.detach().contiguous().cpu()
    alpha = adapters.scaling * rank  # PEFT divides by the rank again
    plain_peft.write(folder, adapters.peft_config, rank, alpha, tensors)
    write_json(folder / LEDGER, dict(entries))
    if task is not None:
        (folder / TASK).write_text(task, encoding="utf-8", newline="\n")


def read(folder: Path) -> Stored:
    """Read what :func:`write` wrote and sealed.

    Raises:
        XgbloraError: A file is missing, damaged or of another version; the message names it.
    """
    for name in (MANIFEST, LEDGER, WEIGHTS):
        if not (folder / name).is_file():
            raise XgbloraError(f"{folder} holds no adapters of xgblora's: {name} is missing")
    fingerprint = verify(folder)
    entries = read_json(folder / LEDGER)
    require_entries(folder, entries, ENTRIES)
    task = (folder / TASK).read_text(encoding="utf-8") if (folder / TASK).is_file() else None
    return Stored(folder, entries, read_tensors(folder / WEIGHTS), task, fingerprint)


def delta_norms(folder: Path) -> dict[str, list[float]]:
    """What each booster of a stored adapter adds to the weight of each adapted layer, as a Frobenius norm.

    Args:
        folder: As :func:`read` takes it. The pair in training, and so all of a LoRA, counts as the last booster.

    Raises:
        XgbloraError: As :func:`read` does.
    """
    stored = read(folder)
    ranks = [booster.get("rank", 1) for booster in stored.entries["boosters"]] + [stored.entries["rank"]]
    norms: dict[str, list[float]] = {}
    before, after = tensor_name("NAME", "A").split("NAME")
    for name in stored.tensors:
        if name.startswith(before) and name.endswith(after):
            layer = name.removeprefix(before).removesuffix(after)
            A, B = (stored.tensors[tensor_name(layer, matrix)].double() for matrix in "AB")
            pairs = zip(A.split(ranks), B.split(ranks, dim=1), strict=True)
            norms[layer] = [stored.entries["scaling"] * product_norm(*pair) for pair in pairs]
    return norms


def product_norm(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of B A (out, in), without that matrix. A (rank, in) and B (out, rank), in float64."""
    return max(((A @ A.T) * (B.T @ B)).sum().item(), 0.0) ** 0.5


def require_entries(folder: Path, entries: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise :class:`XgbloraError` where a file of an adapter or a checkpoint lacks some entries."""
    if missing := set(names) - set(entries):
        raise XgbloraError(f"{folder} is of another version (no {', '.join(sorted(missing))})")


PRECISION = ("base dtype", "base quantised")
"""What a fingerprint says of the numbers of a base."""


def require_match(stored: Stored, ours: Mapping[str, Any]) -> None:
    """Raise :class:`XgbloraError` where a stored adapter belongs to something else than ``ours``, a fingerprint.

    Weights are compared where both bases have one precision, tasks where both are known.
    """
    theirs = stored.fingerprint
    names = set(ours) - {"targets"}  # several spellings mean the same layers, which are compared one by one
    if any(theirs.get(name) != ours.get(name) for name in PRECISION):
        names -= {*PRECISION, "base weights"}
    if theirs.get("task") is None or ours["task"] is None:
        names -= {"task"}
    different = ", ".join(
        f"{name}: {theirs.get(name)} there, {ours[name]} here"
        for name in sorted(names)
        if theirs.get(name) != ours[name]
    )
    if different:
        raise XgbloraError(f"{stored.folder} was trained otherwise ({different}): load it with the same settings")


@torch.no_grad()
def restore(adapters: Adapters, stored: Stored, ranks: Sequence[int]) -> None:
    """Put stored pairs into the adapters: the first as boosters of these ranks, the others as the pair in training.

    Raises:
        XgbloraError: The adapters have other layers, or layers of another size.
    """
    file, tensors, frozen = stored.folder / WEIGHTS, dict(stored.tensors), sum(ranks)
    for name, layer in adapters.layers.items():
        try:
            A, B = tensors.pop(tensor_name(name, "A")), tensors.pop(tensor_name(name, "B"))
        except KeyError:
            raise XgbloraError(f"{file} has no adapter for {name}: other target modules?") from None
        if A.shape != (frozen + layer.lora_A.shape[0], layer.in_features) or B.shape[0] != layer.out_features:
            raise XgbloraError(f"{file} does not fit {name}: it was trained on another base model")
        A, B = A.to(adapters.device), B.to(adapters.device)
        layer.booster_A, layer.booster_B = A[:frozen].clone(), B[:, :frozen].clone()
        layer.lora_A.copy_(A[frozen:])
        layer.lora_B.copy_(B[:, frozen:])
    adapters.ranks = list(ranks)
    if tensors:
        raise XgbloraError(f"{file} adapts {next(iter(tensors))}, the model does not")


def require_lora(folder: Path) -> tuple[int, float]:
    """Rank of a PEFT LoRA, and the factor of its B A.

    Raises:
        XgbloraError: The folder holds no LoRA, or one that a stack of rank-1 pairs cannot hold.
    """
    for name in (PEFT_CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise XgbloraError(f"{folder} holds no PEFT adapter: {name} is missing")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        rank, factor = config.r, config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise XgbloraError(f"{folder / PEFT_CONFIG} is not that of a LoRA: {error}") from error
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if getattr(config, option, None):
            raise XgbloraError(f"{folder} uses {option}, which a stack of rank-1 pairs cannot hold")
    return rank, factor


@torch.no_grad()
def restore_lora(adapters: Adapters, folder: Path) -> int:
    """Make every rank of a PEFT LoRA a booster of adapters that have none. Returns how many.

    Raises:
        XgbloraError: As :func:`require_lora` does, and where these adapters' layers cannot hold the LoRA.
    """
    rank, factor = require_lora(folder)
    tensors = read_tensors(folder / WEIGHTS)
    for name, layer in adapters.layers.items():
        A, B = (tensors.pop(tensor_name(name, matrix), None) for matrix in "AB")
        if (A is None) != (B is None):
            raise XgbloraError(f"{folder / WEIGHTS} has only one of lora_A and lora_B for {name}")
        for tensor in (A, B):
            if tensor is not None and not tensor.isfinite().all():
                raise XgbloraError(f"{folder / WEIGHTS} holds numbers for {name} that are not finite")
        A = torch.zeros(rank, layer.in_features) if A is None else A.float()
        B = torch.zeros(layer.out_features, rank) if B is None else B.float() * (factor / layer.scaling)
        if A.shape != (rank, layer.in_features) or B.shape != (layer.out_features, rank):
            raise XgbloraError(f"{folder / WEIGHTS} does not fit {name}: it was trained on another base model")
        layer.booster_A, layer.booster_B = A.to(adapters.device), B.to(adapters.device)
    adapters.ranks = [1] * rank
    if tensors:
        raise XgbloraError(
            f"{folder} adapts {next(iter(tensors))}, which this run does not: name those layers with "
            "--lora_target_modules"
        )
    return rank


def pair_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Copies of the pair in training, by the names that PEFT gives its matrices."""
    return {
        tensor_name(name, matrix): getattr(layer, f"lora_{matrix}").detach().clone()
        for name, layer in adapters.layers.items()
        for matrix in "AB"
    }


@torch.no_grad()
def restore_pair(adapters: Adapters, tensors: Mapping[str, Tensor]) -> None:
    """Put copies that :func:`pair_tensors` made back into the pair in training."""
    for name, layer in adapters.layers.items():
        layer.lora_A.copy_(tensors[tensor_name(name, "A")])
        layer.lora_B.copy_(tensors[tensor_name(name, "B")])


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises :class:`XgbloraError` where it is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise XgbloraError(f"{file} is damaged ({error}): take another checkpoint") from error
