"""The ledger: the boosters of a run in order, and where each of them came from."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from xgblora.adapters import files
from xgblora.adapters.adapters import Adapters, attach
from xgblora.base import Base
from xgblora.errors import XgbloraError
from xgblora.files import sealed_folder


@dataclass(frozen=True)
class Booster:
    """Where a frozen pair came from."""

    step: int
    """The step after which it was merged; 0 for what a run started from."""
    place: str
    """The same in words: ``step 100`` or ``epoch 2``."""
    loss: float | None
    """Of the merge's step."""
    norm: float
    """Frobenius norm of its update scaling * B A over all layers."""
    norms: dict[str, float] = field(default_factory=dict)
    """The same for each adapted layer in which it is not zero."""
    schedule: str = ""
    """The merge schedule in words."""
    reason: str = ""
    """What made the schedule merge here."""
    evaluation: dict[str, float] | None = None
    """``eval_loss`` and, where they were measured, ``eval_accuracy`` and ``eval_reward`` right after the merge."""
    rank: int = 1
    """How many rank-1 pairs it is: more than one where recipe boost fitted several directions in one round."""


class Ledger:
    """The boosters of some adapters with their origin, and the pair in training after them.

    Examples:
        >>> from xgblora.adapters.adapters import attach
        >>> from xgblora.base.load import tiny_model
        >>> ledger = Ledger(attach(tiny_model(), xgblora=True))
        >>> ledger.merge(step=100, place="step 100", loss=0.4).norm
        0.0
        >>> len(ledger.boosters), ledger.adapters.boosters
        (1, 1)
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.boosters: list[Booster] = []
        self.evaluation: dict[str, float] | None = None
        """The last evaluation of the pair in training, as :attr:`Booster.evaluation`."""
        self.task: str | None = None
        """Name of the task that it is trained on, where that is known."""
        self.task_text: str | None = None
        """The task as a task file says it, for whoever asks the model later."""
        self.training: dict[str, Any] = {}
        """What training noted beside them, as JSON values: its cost, and what it needs to go on."""

    def merge(self, step: int, place: str, loss: float | None, schedule: str = "", reason: str = "") -> Booster:
        """Freeze the pair in training as the next booster and start a new one. The model's function stays."""
        self.adapters.freeze_pair()
        norms = self.norms(len(self.boosters))
        booster = Booster(step, place, loss, *norms, schedule, reason, rank=self.adapters.rank)
        self.boosters.append(booster)
        self.adapters.new_pair(len(self.boosters))
        self.evaluation = None
        return booster

    def norms(self, number: int) -> tuple[float, dict[str, float]]:
        """Norm of the update of frozen booster ``number``, and of its part in each layer where it is not zero."""
        norms, start = {}, sum(self.adapters.ranks[:number])
        rows = slice(start, start + self.adapters.ranks[number])
        for name, layer in self.adapters.layers.items():
            A, B = layer.booster_A[rows].double(), layer.booster_B[:, rows].double()
            if (norm := files.product_norm(A, B)) > 0:
                norms[name] = layer.scaling * norm
        return sum(norm**2 for norm in norms.values()) ** 0.5, norms

    def note_evaluation(self, step: int, evaluation: dict[str, float]) -> None:
        """Note the evaluation after ``step``: of the booster that was merged there, else of the pair in training."""
        if self.boosters and self.boosters[-1].step == step:
            self.boosters[-1] = replace(self.boosters[-1], evaluation=evaluation)
        else:
            self.evaluation = evaluation

    def evaluations(self) -> dict[int, float]:
        """The dev loss with the first k boosters, for every k that was evaluated; the pair in training is the last.

        Where training follows a reward, minus the dev reward.
        """
        evaluations = {k: booster.evaluation for k, booster in enumerate(self.boosters, start=1)}
        evaluations[len(self.boosters) + 1] = self.evaluation
        return {k: -e["eval_reward"] if "eval_reward" in e else e["eval_loss"] for k, e in evaluations.items() if e}

    def truncate(self, count: int) -> None:
        """Go back to when there were ``count`` boosters, the last of them being the pair in training.

        With 0 the pair is zero: the bare base. Raises :class:`XgbloraError` where there are fewer.
        """
        there = len(self.boosters) + 1
        if not 0 <= count <= there:
            raise XgbloraError(f"there are {there} boosters, so not the first {count}")
        if count < there:
            self.adapters.truncate(count)
            self.evaluation = self.boosters[count - 1].evaluation if count else None
            del self.boosters[max(count - 1, 0) :]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What its files belong to: base model, adapted layers, rank, scaling, task."""
        targets = self.adapters.peft_config.target_modules
        return {
            **_of_base(self.adapters.fingerprint),
            "targets": targets if isinstance(targets, str) else sorted(targets or ()),
            "rank": self.adapters.rank,
            "scaling": self.adapters.scaling,
            "task": self.task,
        }

    def save(self, folder: str | Path) -> None:
        """Write the boosters and the pair in training, sealed; :class:`peft.PeftModel` loads the folder as it is.

        An adapter that is there is replaced. Raises :class:`XgbloraError` where the folder holds other files.
        """
        with sealed_folder(Path(folder), self.fingerprint) as work:
            self.write(work)

    def write(self, folder: Path) -> None:
        """Write the same files into a folder that exists."""
        entries = {
            "rank": self.adapters.rank,
            "scaling": self.adapters.scaling,
            "boosters": [asdict(booster) for booster in self.boosters],
            "evaluation": self.evaluation,
        }
        files.write(folder, self.adapters, entries | self.training, self.task_text)

    def load(self, folder: str | Path) -> None:
        """Read what :meth:`save` wrote into the adapters.

        Raises :class:`XgbloraError` where a file is missing or damaged, or belongs to another base model, to other
        layers, to another rank, scaling or task.
        """
        stored = files.read(Path(folder))
        files.require_match(stored, self.fingerprint)
        boosters = [Booster(**entry) for entry in stored.entries["boosters"]]
        files.restore(self.adapters, stored, [booster.rank for booster in boosters])
        self.boosters = boosters
        self.evaluation = stored.entries["evaluation"]
        self.task_text = self.task_text or stored.task
        self.training = {name: value for name, value in stored.entries.items() if name not in files.ENTRIES}
        self.adapters.choose_layers(len(boosters))


def _of_base(fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {f"base {name}": value for name, value in fingerprint.items()}


def start_from(ledger: Ledger, folder: str | Path) -> int:
    """Make every rank of a PEFT LoRA a booster of an empty ledger, in front of the pair in training.

    Args:
        ledger: Of adapters on the layers that the LoRA adapts.
        folder: As PEFT saved it.

    Returns:
        How many there are.

    Raises:
        XgbloraError: The folder holds no LoRA, or one that this ledger's layers cannot hold.

    Example::

        ledger = Ledger(attach(model, xgblora=True))
        start_from(ledger, "somebody_elses_adapter")
        Trainer(model, config, ledger, rows).train()
    """
    folder = Path(folder)
    rank = files.restore_lora(ledger.adapters, folder)
    for number in range(rank):
        reason = f"rank {number + 1} of {folder.name}"
        ledger.boosters.append(Booster(0, "the start", None, *ledger.norms(number), reason=reason))
    ledger.adapters.new_pair(rank)
    return rank


def load_adapters(model: PreTrainedModel | Base, folder: str | Path) -> Ledger:
    """Attach the adapters that :meth:`Ledger.save` wrote, ready to predict or to train on.

    Args:
        model: The base model they were trained on.
        folder: An adapter's folder or a checkpoint.

    Raises:
        XgbloraError: The folder is damaged or belongs to another base model.

    Example::

        ledger = load_adapters(model, "runs/mine/adapter")
        ledger.truncate(2)  # the first two boosters alone
    """
    stored = files.read(Path(folder))
    entries, base = stored.entries, Base.of(model)
    targets = LoraConfig.from_pretrained(str(folder)).target_modules
    names = targets if isinstance(targets, str) else sorted(targets)
    try:
        ledger = Ledger(attach(base, entries["rank"], entries["scaling"] * entries["rank"], names))
    except XgbloraError:
        files.require_match(stored, _of_base(base.fingerprint()) | {"task": None})  # a better reason, where it is one
        raise
    try:
        ledger.load(folder)
    except XgbloraError:
        ledger.adapters.detach()
        raise
    return ledger
