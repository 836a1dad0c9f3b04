"""The ledger: the boosters of a run in order, and their files in PEFT's adapter format.

K merged rank-1 boosters and the pair in training are one LoRA of rank K + r with the same scaling, so that is how a
ledger is stored: ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT writes them, boosters first, plus
``ledger.json`` with what PEFT does not know (where each booster came from, the merge schedule's state).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from xgblora.adapters import Adapters, attach
from xgblora.errors import XgbloraError
from xgblora.files import write_atomically, write_json
from xgblora.schedule import PatienceState

WEIGHTS = "adapter_model.safetensors"
LEDGER = "ledger.json"


@dataclass(frozen=True)
class Booster:
    """Where a frozen rank-1 pair came from. ``place``: ``step 100`` or ``epoch 2``; ``loss``: of the merge's step."""

    step: int
    place: str
    loss: float
    norm: float
    """Frobenius norm of its update scaling * B A over all layers."""


class Ledger:
    """The boosters of ``adapters`` with their origin, and the pair in training after them."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.boosters: list[Booster] = []
        self.patience = PatienceState()
        """State of an adaptive merge schedule."""
        self.forward_passes = 0
        """Passes of a whole batch through the model so far: two for each perturbation of a zeroth-order step."""
        self.forward_tokens = 0
        """Real tokens in them."""

    def merge(self, step: int, place: str, loss: float) -> Booster:
        """Freeze the pair in training as the next booster and start a new one. The model's function stays."""
        squares = 0.0
        for layer in self.adapters.layers.values():
            product = (layer.lora_A.norm() * layer.lora_B.norm()).item()  # of a rank-1 matrix
            squares += (layer.scaling * product) ** 2
        booster = Booster(step, place, loss, squares**0.5)
        self.adapters.freeze_pair()
        self.boosters.append(booster)
        self.adapters.new_pair(len(self.boosters))
        return booster

    def save(self, folder: str | Path) -> None:
        """Write the ledger; :class:`peft.PeftModel` loads the folder as it is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.adapters.boosters + self.adapters.rank
        tensors = {}
        for name, layer in self.adapters.layers.items():
            A = torch.cat([layer.booster_A, layer.lora_A.detach()])
            B = torch.cat([layer.booster_B, layer.lora_B.detach()], dim=1)
            tensors[_key(name, "A")] = A.contiguous().cpu()
            tensors[_key(name, "B")] = B.contiguous().cpu()
        ours = self.adapters.peft_config
        peft_config = LoraConfig(
            r=rank,
            lora_alpha=self.adapters.scaling * rank,  # PEFT divides by the rank again
            target_modules=ours.target_modules,
            fan_in_fan_out=ours.fan_in_fan_out,
            task_type=ours.task_type,
            base_model_name_or_path=ours.base_model_name_or_path,
            inference_mode=True,
        )
        peft_config.save_pretrained(str(folder))
        about = {
            "rank": self.adapters.rank,
            "scaling": self.adapters.scaling,
            "boosters": [asdict(booster) for booster in self.boosters],
            "patience": self.patience._asdict(),
            "forward_passes": self.forward_passes,
            "forward_tokens": self.forward_tokens,
        }
        write_json(folder / LEDGER, about)
        write_atomically(folder / WEIGHTS, lambda work: save_file(tensors, work, metadata={"format": "pt"}))

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Read what :meth:`save` wrote into the adapters. Raises :class:`XgbloraError` for another or a broken one."""
        folder = Path(folder)
        about, tensors = _read(folder)
        if about["rank"] != self.adapters.rank or about["scaling"] != self.adapters.scaling:
            raise XgbloraError(
                f"{folder} holds rank {about['rank']} at scaling {about['scaling']}, "
                f"the model rank {self.adapters.rank} at scaling {self.adapters.scaling}: attach with the same values"
            )
        boosters = [Booster(**booster) for booster in about["boosters"]]
        count = len(boosters)
        for name, layer in self.adapters.layers.items():
            try:
                A, B = tensors.pop(_key(name, "A")), tensors.pop(_key(name, "B"))
            except KeyError:
                raise XgbloraError(f"{folder / WEIGHTS} has no adapter for {name}: other target modules?") from None
            if A.shape != (count + layer.lora_A.shape[0], layer.in_features) or B.shape[0] != layer.out_features:
                raise XgbloraError(f"{folder / WEIGHTS} does not fit {name}: it was trained on another base model")
            A, B = A.to(self.adapters.device), B.to(self.adapters.device)
            layer.booster_A, layer.booster_B = A[:count].clone(), B[:, :count].clone()
            layer.lora_A.copy_(A[count:])
            layer.lora_B.copy_(B[:, count:])
        if tensors:
            raise XgbloraError(f"{folder / WEIGHTS} adapts {next(iter(tensors))}, the model does not")
        self.boosters = boosters
        self.adapters.choose_layers(count)
        self.patience = PatienceState(**about["patience"])
        self.forward_passes, self.forward_tokens = about["forward_passes"], about["forward_tokens"]


def load_adapters(model: PreTrainedModel, folder: str | Path) -> Ledger:
    """Attach to ``model`` the adapters that :meth:`Ledger.save` wrote, ready to predict or to train on.

    Raises :class:`XgbloraError` where the folder is damaged or belongs to another base model.
    """
    about, _ = _read(Path(folder))
    targets = LoraConfig.from_pretrained(str(folder)).target_modules
    names = targets if isinstance(targets, str) else sorted(targets)
    ledger = Ledger(attach(model, about["rank"], about["scaling"] * about["rank"], names))
    try:
        ledger.load(folder)
    except XgbloraError:
        ledger.adapters.detach()
        raise
    return ledger


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    for file in (LEDGER, WEIGHTS):
        if not (folder / file).is_file():
            raise XgbloraError(f"{folder} holds no adapters: {file} is missing")
    try:
        about = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        missing = {"rank", "scaling", "boosters", "patience", "forward_passes", "forward_tokens"} - set(about)
    except (ValueError, TypeError) as error:
        raise XgbloraError(f"{folder / LEDGER} is damaged ({error}): take another checkpoint") from error
    if missing:
        raise XgbloraError(f"{folder / LEDGER} is damaged (no {', '.join(sorted(missing))}): take another checkpoint")
    try:
        return about, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise XgbloraError(f"{folder / WEIGHTS} is damaged ({error}): take another checkpoint") from error


def _key(layer: str, matrix: str) -> str:
    return f"base_model.model.{layer}.lora_{matrix}.weight"
