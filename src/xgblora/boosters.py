"""The ledger: the boosters of a run in order, and their files in PEFT's adapter format.

K merged rank-1 boosters and the pair in training are one LoRA of rank K + r with the same scaling, so that is how a
ledger is stored: ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT writes them, boosters first, plus
``ledger.json`` with what PEFT does not know (where each booster came from, the merge schedule's state).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from xgblora.adapters import Adapters, attach
from xgblora.errors import XgbloraError
from xgblora.files import MANIFEST, read_json, sealed_folder, verify, write_json
from xgblora.schedule import PatienceState

WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
LEDGER = "ledger.json"
BEST_PAIR = "best_pair.safetensors"
ENTRIES = (
    "rank",
    "scaling",
    "boosters",
    "evaluation",
    "patience",
    "step_length",
    "forward_passes",
    "forward_sequences",
    "forward_tokens",
)
"""What a ledger.json must hold."""


@dataclass(frozen=True)
class Booster:
    """Where a frozen rank-1 pair came from. ``place``: ``step 100`` or ``epoch 2``; ``loss``: of the merge's step."""

    step: int
    place: str
    loss: float | None
    norm: float
    """Frobenius norm of its update scaling * B A over all layers."""
    norms: dict[str, float] = field(default_factory=dict)
    """The same for each adapted layer in which it is not zero."""
    schedule: str = ""
    """The merge schedule in words."""
    reason: str = ""
    """What made the schedule merge here."""
    evaluation: dict[str, float] | None = None
    """``eval_loss`` and ``eval_accuracy`` right after the merge, where the run evaluates there."""


class Ledger:
    """The boosters of ``adapters`` with their origin, and the pair in training after them."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.boosters: list[Booster] = []
        self.patience = PatienceState()
        """State of an adaptive merge schedule."""
        self.best_pair: dict[str, torch.Tensor] | None = None
        """Adaptive merges: the pair in training where its smoothed loss was lowest."""
        self.evaluation: dict[str, float] | None = None
        """The last evaluation of the pair in training, as :attr:`Booster.evaluation`."""
        self.forward_passes = 0
        """Passes of a batch (or a part of it) so far: two for each perturbation of a zeroth-order step."""
        self.forward_sequences = 0
        """Examples in them: what methods with batches of different size are compared by."""
        self.forward_tokens = 0
        """Real tokens in them."""
        self.task: str | None = None
        """Name of the task that it is trained on, where that is known."""
        self.step_length = 1.0
        """Recipe boost: the last booster's step, where the search for the next one's begins."""

    def merge(self, step: int, place: str, loss: float | None, schedule: str = "", reason: str = "") -> Booster:
        """Freeze the pair in training as the next booster and start a new one. The model's function stays."""
        self.adapters.freeze_pair()
        booster = Booster(step, place, loss, *self._norms(len(self.boosters)), schedule, reason)
        self.boosters.append(booster)
        self.adapters.new_pair(len(self.boosters))
        self.best_pair = self.evaluation = None
        return booster

    def _norms(self, number: int) -> tuple[float, dict[str, float]]:
        """Norm of the update of frozen pair ``number``, and of its part in each layer where it is not zero."""
        norms = {}
        for name, layer in self.adapters.layers.items():
            A, B = layer.booster_A[number], layer.booster_B[:, number]
            if norm := layer.scaling * (A.norm() * B.norm()).item():  # of a rank-1 matrix
                norms[name] = norm
        return sum(norm**2 for norm in norms.values()) ** 0.5, norms

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Note the evaluation after ``step``: of the booster that was merged there, else of the pair in training."""
        kept = {name: metrics[name] for name in ("eval_loss", "eval_accuracy")}
        if self.boosters and self.boosters[-1].step == step:
            self.boosters[-1] = replace(self.boosters[-1], evaluation=kept)
        else:
            self.evaluation = kept

    def evaluations(self) -> dict[int, float]:
        """The dev loss with the first k boosters, for every k that was evaluated; the pair in training is the last."""
        found = {k: b.evaluation["eval_loss"] for k, b in enumerate(self.boosters, start=1) if b.evaluation}
        if self.evaluation is not None:
            found[len(self.boosters) + 1] = self.evaluation["eval_loss"]
        return found

    def copy_pair(self) -> dict[str, torch.Tensor]:
        """The pair in training as it is now, by the names of its file."""
        return {
            _key(name, matrix): getattr(layer, f"lora_{matrix}").detach().clone()
            for name, layer in self.adapters.layers.items()
            for matrix in ("A", "B")
        }

    @torch.no_grad()
    def roll_back(self) -> None:
        """Put the best pair back where one was noted."""
        if self.best_pair is not None:
            for name, layer in self.adapters.layers.items():
                layer.lora_A.copy_(self.best_pair[_key(name, "A")])
                layer.lora_B.copy_(self.best_pair[_key(name, "B")])

    @torch.no_grad()
    def truncate(self, count: int) -> None:
        """Go back to when there were ``count`` boosters, the last of them being the pair in training.

        With 0 the pair is zero: the bare base. Raises :class:`XgbloraError` where there are fewer.
        """
        there = len(self.boosters) + 1
        if not 0 <= count <= there:
            raise XgbloraError(f"there are {there} boosters, so not the first {count}")
        if count == there:
            return
        kept = max(count - 1, 0)
        del self.boosters[kept:]
        for layer in self.adapters.layers.values():
            A, B = layer.booster_A, layer.booster_B
            layer.booster_A, layer.booster_B = A[:kept].clone(), B[:, :kept].clone()
            layer.lora_B.zero_()
            if count:
                layer.lora_A.copy_(A[kept:count])
                layer.lora_B.copy_(B[:, kept:count])
        self.adapters.choose_layers(len(self.boosters))
        self.best_pair = self.evaluation = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What its files belong to: base model, adapted layers, rank, scaling, task."""
        targets = self.adapters.peft_config.target_modules
        return {
            **{f"base {name}": value for name, value in self.adapters.base.items()},
            "targets": targets if isinstance(targets, str) else sorted(targets or ()),
            "rank": self.adapters.rank,
            "scaling": self.adapters.scaling,
            "task": self.task,
        }

    def save(self, folder: str | Path) -> None:
        """Write the ledger, sealed; :class:`peft.PeftModel` loads the folder as it is.

        Takes the place of an adapter that is there. Raises :class:`XgbloraError` where the folder holds other files.
        """
        with sealed_folder(Path(folder), self.fingerprint) as work:
            self.write(work)

    def write(self, folder: Path) -> None:
        """Write the ledger's own files into a folder that exists."""
        rank = self.adapters.boosters + self.adapters.rank
        tensors = {}
        for name, layer in self.adapters.layers.items():
            for matrix, rows in zip("AB", layer.pairs(), strict=True):
                tensors[_key(name, matrix)] = rows.detach().contiguous().cpu()
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
            "evaluation": self.evaluation,
            "patience": self.patience._asdict(),
            "step_length": self.step_length,
            "forward_passes": self.forward_passes,
            "forward_sequences": self.forward_sequences,
            "forward_tokens": self.forward_tokens,
        }
        if self.best_pair is not None:
            save_file({name: tensor.cpu() for name, tensor in self.best_pair.items()}, folder / BEST_PAIR)
        write_json(folder / LEDGER, about)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Read what :meth:`save` wrote into the adapters.

        Raises :class:`XgbloraError` where a file is missing or damaged, or belongs to another base model, to other
        layers, rank, scaling or task.
        """
        folder = Path(folder)
        about, tensors, theirs = _read(folder)
        if different := _differences(theirs, self.fingerprint):
            raise XgbloraError(f"{folder} was trained otherwise ({different}): load it with the same settings")
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
        self.best_pair = _tensors(folder / BEST_PAIR) if (folder / BEST_PAIR).is_file() else None
        self.evaluation, self.step_length = about["evaluation"], about["step_length"]
        self.forward_passes, self.forward_sequences = about["forward_passes"], about["forward_sequences"]
        self.forward_tokens = about["forward_tokens"]


@torch.no_grad()
def start_from(ledger: Ledger, folder: str | Path) -> int:
    """Make every rank of a PEFT LoRA a booster of the (empty) ledger, in front of the pair in training.

    Returns how many. Raises :class:`XgbloraError` where the folder holds no LoRA, or one that this ledger's layers
    cannot hold.
    """
    folder = Path(folder)
    for name in (PEFT_CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise XgbloraError(f"{folder} holds no PEFT adapter: {name} is missing")
    try:
        theirs = LoraConfig.from_pretrained(str(folder))
        rank, factor = theirs.r, theirs.lora_alpha / (theirs.r**0.5 if theirs.use_rslora else theirs.r)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise XgbloraError(f"{folder / PEFT_CONFIG} is not that of a LoRA: {error}") from error
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if getattr(theirs, option, None):
            raise XgbloraError(f"{folder} uses {option}, which a stack of rank-1 pairs cannot hold")
    tensors = _tensors(folder / WEIGHTS)
    for name, layer in ledger.adapters.layers.items():
        A = tensors.pop(_key(name, "A"), None)
        B = tensors.pop(_key(name, "B"), None)
        A = torch.zeros(rank, layer.in_features) if A is None else A.float()
        B = torch.zeros(layer.out_features, rank) if B is None else B.float() * (factor / layer.scaling)
        if A.shape != (rank, layer.in_features) or B.shape != (layer.out_features, rank):
            raise XgbloraError(f"{folder / WEIGHTS} does not fit {name}: it was trained on another base model")
        layer.booster_A, layer.booster_B = A.to(ledger.adapters.device), B.to(ledger.adapters.device)
    if tensors:
        raise XgbloraError(
            f"{folder} adapts {next(iter(tensors))}, which this run does not: name those layers with "
            "--lora_target_modules"
        )
    for number in range(rank):
        reason = f"rank {number + 1} of {folder.name}"
        ledger.boosters.append(Booster(0, "the start", None, *ledger._norms(number), reason=reason))
    ledger.adapters.new_pair(rank)
    return rank


def load_adapters(model: PreTrainedModel, folder: str | Path) -> Ledger:
    """Attach to ``model`` the adapters that :meth:`Ledger.save` wrote, ready to predict or to train on.

    Raises :class:`XgbloraError` where the folder is damaged or belongs to another base model.
    """
    about, _, _ = _read(Path(folder))
    targets = LoraConfig.from_pretrained(str(folder)).target_modules
    names = targets if isinstance(targets, str) else sorted(targets)
    ledger = Ledger(attach(model, about["rank"], about["scaling"] * about["rank"], names))
    try:
        ledger.load(folder)
    except XgbloraError:
        ledger.adapters.detach()
        raise
    return ledger


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Content of the ledger's file, the pairs, and the fingerprint of what they were trained on."""
    for name in (MANIFEST, LEDGER, WEIGHTS):
        if not (folder / name).is_file():
            raise XgbloraError(f"{folder} holds no adapters of xgblora's: {name} is missing")
    fingerprint = verify(folder)
    about = read_json(folder / LEDGER)
    if missing := set(ENTRIES) - set(about):
        raise XgbloraError(f"{folder / LEDGER} is of another version (no {', '.join(sorted(missing))})")
    return about, _tensors(folder / WEIGHTS), fingerprint


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """In which entries two fingerprints differ; "" where both can belong together.

    Weights are compared where both bases have one precision, tasks where both are known.
    """
    names = set(ours) - {"targets"}  # several spellings mean the same layers, which are compared one by one
    if theirs.get("base dtype") != ours["base dtype"]:
        names -= {"base dtype", "base weights"}
    if theirs.get("task") is None or ours["task"] is None:
        names -= {"task"}
    return ", ".join(
        f"{name}: {theirs.get(name)} there, {ours[name]} here"
        for name in sorted(names)
        if theirs.get(name) != ours[name]
    )


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise XgbloraError(f"{file} is damaged ({error}): take another checkpoint") from error


def _key(layer: str, matrix: str) -> str:
    return f"base_model.model.{layer}.lora_{matrix}.weight"
