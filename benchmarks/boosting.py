"""Methods against each other at equal work: 500 two-sided steps of 16 examples, or what takes as many forwards.

    python benchmarks/boosting.py [--methods boost zo_lora_r1 ...] [--seeds 0 1 2 3 4] [--output_root runs/boosting]

SmolLM2-135M in bfloat16 on Rotten Tomatoes: 1,000 training, 500 dev and 2,000 test rows; every seed draws its own
training and dev rows, the same ones for all methods. The learning rate (for boost: the ridge) of a method is the one
of its three trials with the lowest dev loss at the first seed; test rows choose nothing. Finished runs are kept, so
the same command goes on where it was stopped. Written: ``results.json``, and a table on the console with the mean over
seeds, the difference to boost paired by seed, and its 95 % bootstrap interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xgblora import RunConfig
from xgblora.files import write_json
from xgblora.run import Workspace, finished_metrics, run

STEPS = 500
COMMON: dict[str, Any] = {
    "task_name": "RottenTomatoes",
    "load_bfloat16": True,
    "num_train": 1000,
    "num_dev": 500,
    "num_eval": 2000,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "max_steps": STEPS,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ADAM = {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
MEZO = {"lora": True, "zo_directions": "shared", "zo_eps": 1e-2}  # SGD at a constant rate, as in arXiv 2305.17333
BACKPROP = {"trainer": "regular", "eval_steps": 50} | ADAM
SGD_RATES, ZO_RATES, BACKPROP_RATES = (1e-4, 1e-3, 1e-2), (1e-3, 3e-3, 6e-3), (2e-4, 5e-4, 1e-3)

METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "boost": ({"recipe": "boost", "eval_strategy": "steps"}, "boost_ridge", (1.0, 3.0, 10.0)),
    "boost_256": ({"recipe": "boost", "boost_boosters": 1, "boost_examples": 256}, "boost_ridge", (1.0, 3.0, 10.0)),
    "mezo_lora_r1": (MEZO | {"lora_r": 1, "lora_alpha": 2}, "learning_rate", SGD_RATES),
    "mezo_lora_r8": (MEZO | {"lora_r": 8, "lora_alpha": 16}, "learning_rate", SGD_RATES),
    "zo_lora_r1": (ADAM | {"lora": True, "lora_r": 1, "zo_eps": 1e-2}, "learning_rate", ZO_RATES),
    "zo_xgblora": (
        ADAM | {"xgblora": True, "xgblora_steps_per_iteration": 100, "zo_eps": 1e-2},
        "learning_rate",
        ZO_RATES,
    ),
    "backprop_lora_r1": (BACKPROP | {"lora": True, "lora_r": 1}, "learning_rate", BACKPROP_RATES),
    "backprop_lora_r5": (BACKPROP | {"lora": True, "lora_r": 5, "lora_alpha": 80}, "learning_rate", BACKPROP_RATES),
    "backprop_lora_r8": (BACKPROP | {"lora": True, "lora_r": 8, "lora_alpha": 128}, "learning_rate", BACKPROP_RATES),
    "backprop_xgblora": (
        BACKPROP | {"xgblora": True, "xgblora_steps_per_iteration": 100},
        "learning_rate",
        BACKPROP_RATES,
    ),
}
"""Flags, what is tuned, and its trials. Ranks above 1 keep the scaling of rank 1."""


class Runs:
    """Runs of the comparison, each carried out once."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root = root
        self.steps = steps
        self._workspace: tuple[int, Workspace] | None = None

    def metrics(self, method: str, value: float, seed: int) -> dict[str, Any]:
        """Metrics of one run, from its folder where it is finished."""
        flags, tuned, _ = METHODS[method]
        folder = self.root / f"{method}_{tuned}_{value:g}_seed{seed}"
        values = COMMON | {"max_steps": self.steps} | flags
        values |= {tuned: value, "seed": seed, "train_set_seed": seed, "output_dir": str(folder)}
        config = RunConfig(**values)
        found = finished_metrics(config)
        if found is None:
            if self._workspace is None or self._workspace[0] != seed:
                self._workspace = seed, Workspace(config)
            found = run(config, self._workspace[1])
            print(f"{folder.name}: dev {found['dev_accuracy']:.3f}, {found['dev_loss']:.4f}", flush=True)
        return found

    def tuned(self, method: str, seed: int) -> float:
        """The trial with the lowest dev loss."""
        trials = METHODS[method][2]
        return min(trials, key=lambda value: self.metrics(method, value, seed)["dev_loss"])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    draw = np.random.default_rng(0)
    means = draw.choice(differences, size=(10_000, len(differences))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """Run what is missing, then print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_root", type=Path, default=Path("runs/boosting"))
    parser.add_argument("--steps", type=int, default=STEPS, help="Steps of the methods that take steps.")
    asked = parser.parse_args()
    runs = Runs(asked.output_root, asked.steps)
    chosen = {method: runs.tuned(method, asked.seeds[0]) for method in asked.methods}
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in asked.methods}
    for seed in asked.seeds:
        for method in asked.methods:
            found[method].append(runs.metrics(method, chosen[method], seed))
    table = Table(title=f"Rotten Tomatoes, 2,000 test rows, {len(asked.seeds)} seeds")
    for title in (
        "method",
        "tuned",
        "test %",
        "boost minus it",
        "dev %",
        "test loss",
        "sequences",
        "tokens",
        "train s",
    ):
        table.add_column(title, justify="left" if title == "method" else "right")
    rows = []
    for method, group in found.items():
        accuracy = 100 * np.array([metrics["accuracy"] for metrics in group])
        row: dict[str, Any] = {"method": method, METHODS[method][1]: chosen[method], "test": accuracy.tolist()}
        if method != "boost" and "boost" in found:
            differences = 100 * np.array([metrics["accuracy"] for metrics in found["boost"]]) - accuracy
            row |= {"boost_minus": float(differences.mean()), "interval": interval(differences)}
        for name in ("dev_accuracy", "eval_loss", "forward_sequences", "forward_tokens", "training_seconds"):
            row[name] = float(np.mean([metrics[name] for metrics in group]))
        row["peak_memory_mb"] = float(np.max([metrics["peak_memory_mb"] for metrics in group]))
        rows.append(row)
        spread = accuracy.std(ddof=1) if len(accuracy) > 1 else 0.0
        difference = (
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["boost_minus"], *row["interval"]) if "interval" in row else ""
        )
        table.add_row(
            *(method, f"{chosen[method]:g}", f"{accuracy.mean():.1f} ± {spread:.1f}", difference),
            *(f"{100 * row['dev_accuracy']:.1f}", f"{row['eval_loss']:.3f}", f"{row['forward_sequences']:,.0f}"),
            *(f"{row['forward_tokens']:,.0f}", f"{row['training_seconds']:.0f}"),
        )
    Console(width=140).print(table)
    write_json(asked.output_root / "results.json", json.loads(json.dumps(rows)))


if __name__ == "__main__":
    main()
