"""Methods against each other within the work of 500 two-sided steps of 16 examples, counted in tokens forwarded.

    python benchmarks/boosting.py [--tasks RottenTomatoes IMDB40 DebianSections] [--methods boost zo_lora_r1 ...]
                                  [--seeds 0 1 2 3 4] [--fixed zo_lora_r1=3e-3 ...] [--output_root runs/boosting]
                                  [--model_name SmolLM2-135M-Instruct] [--unpack] [--prompt_beginning auto]
                                  [--num_dev 200] [--num_eval 300] [--backprop_steps 100] [--other_text FILE]

A task may be a task file, too. The model in bfloat16: 1,000 training, 500 dev and at most 2,000 test rows, where no
other numbers are asked for; every seed draws its own training and dev rows, the same ones for all methods. The learning
rate of a method is, for each task, the one of its three trials with the lowest dev loss at the first seed, or what
``--fixed`` says (for boost the ridge; 0, the default, lets rows that it sets aside choose); test rows choose nothing.
Commands with other tasks or methods may share a folder. Finished runs are kept, so the same command goes on where it
was stopped. Written: ``results.json`` for each task, and a table on the console with the mean over seeds, the
difference to boost paired by seed, and its 95 % bootstrap interval; with several tasks, also the mean over them; and
``accuracy.png``.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from more_tasks import TASKS
from rich.console import Console
from rich.table import Table

from xgblora import RunConfig
from xgblora.config import EMBEDDED_MODEL, changed
from xgblora.files import write_json
from xgblora.report import RunResult
from xgblora.runs.folder import finished_result
from xgblora.runs.run import run
from xgblora.runs.workspace import Workspace

STEPS = 500
COMMON: dict[str, Any] = {
    "load_bfloat16": True,
    "num_train": 1000,
    "num_dev": 500,
    "num_eval": 2000,
    "per_device_eval_batch_size": 64,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ADAM = {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
MEZO = {"lora": True, "zo_directions": "shared", "zo_eps": 1e-2}  # SGD at a constant rate, as in arXiv 2305.17333
# Backpropagation has learned 1,000 rows after 200 steps; its dev loss only rises from there on (docs/experiments.md).
BACKPROP_STEPS = 200
BACKPROP = {"trainer": "regular", "eval_steps": 50} | ADAM
DRAWN = {"xgblora_init": "activations"}  # LoRA's length is found long before 40 steps
DRAWN_FROM = (128, 256, 750)
CHOSEN = 0.0  # the ridge, inside, by rows that are set aside
SGD_RATES, ZO_RATES, BACKPROP_RATES = (1e-3, 3e-3, 1e-2), (1e-3, 1.7e-3, 3e-3), (2e-4, 5e-4, 1e-3)

METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "in_context": ({"trainer": "none"}, "num_train", (4, 8, 16)),
    "probe": ({"trainer": "none", "readout": "probe"}, "num_train", (1000,)),  # layer and penalty chosen on dev inside
    "calibrated": ({"trainer": "none", "calibrated": True}, "num_train", (0,)),  # of tasks with a null prompt
    "centroid": ({"trainer": "none", "readout": "centroid"}, "num_train", (1000,)),
    "boost": ({"recipe": "boost", "eval_strategy": "steps"}, "boost_ridge", (CHOSEN,)),
    "boost_128": (
        {"recipe": "boost", "boost_boosters": 2, "boost_examples": 128, "boost_teacher_examples": 112},
        "boost_ridge",
        (CHOSEN,),
    ),
    "mezo_lora_r1": (MEZO | {"lora_r": 1, "lora_alpha": 2}, "learning_rate", SGD_RATES),
    "mezo_lora_r8": (MEZO | {"lora_r": 8, "lora_alpha": 16}, "learning_rate", SGD_RATES),
    "zo_lora_r1": (ADAM | {"lora": True, "lora_r": 1, "zo_eps": 1e-2}, "learning_rate", ZO_RATES),
    "zo_lora_r1_probes2": (  # two directions for each example, half as many steps
        ADAM | {"lora": True, "lora_r": 1, "zo_eps": 1e-2, "zo_num_perturbations": 2, "max_steps": STEPS // 2},
        "learning_rate",
        ZO_RATES,
    ),
    "zo_xgblora": (
        ADAM | {"xgblora": True, "xgblora_steps_per_iteration": 100, "zo_eps": 1e-2},
        "learning_rate",
        ZO_RATES,
    ),
    "zo_xgblora_probes2": (
        ADAM
        | {"xgblora": True, "xgblora_steps_per_iteration": 50, "zo_eps": 1e-2}
        | {"zo_num_perturbations": 2, "max_steps": STEPS // 2},
        "learning_rate",
        ZO_RATES,
    ),
    "drawn_lora_r1": (DRAWN | {"lora": True, "lora_r": 1, "max_steps": 40}, "xgblora_init_examples", DRAWN_FROM),
    "drawn_lora_r8": (
        DRAWN | {"lora": True, "lora_r": 8, "lora_alpha": 128, "max_steps": 40},
        "xgblora_init_examples",
        DRAWN_FROM,
    ),
    "drawn_xgblora": (  # 29 boosters, 15,776 examples; what is a default has no trials
        DRAWN | {"xgblora": True, "xgblora_steps_per_iteration": 6, "max_steps": 174},
        "xgblora_init_examples",
        (256,),
    ),
    "drawn_xgblora_d8": (  # boosters of up to eight directions
        DRAWN | {"xgblora": True, "xgblora_init_directions": 8, "xgblora_steps_per_iteration": 6, "max_steps": 174},
        "xgblora_init_examples",
        (256,),
    ),
    "backprop_lora_r1": (BACKPROP | {"lora": True, "lora_r": 1}, "learning_rate", BACKPROP_RATES),
    "backprop_lora_r5": (BACKPROP | {"lora": True, "lora_r": 5, "lora_alpha": 80}, "learning_rate", BACKPROP_RATES),
    "backprop_lora_r8": (BACKPROP | {"lora": True, "lora_r": 8, "lora_alpha": 128}, "learning_rate", BACKPROP_RATES),
    "backprop_xgblora": (
        BACKPROP | {"xgblora": True, "xgblora_steps_per_iteration": 40},
        "learning_rate",
        BACKPROP_RATES,
    ),
}
"""Flags, what is tuned, its trials (in context: numbers of examples). Ranks above 1 keep the scaling of rank 1."""

TRAINED = [method for method in METHODS if method not in ("probe", "calibrated", "centroid")]
"""What is compared where nobody says otherwise: methods that every task can have."""

MEANS = "dev_accuracy dev_loss zero_shot_loss eval_loss score zero_shot_other_text_loss other_text_loss".split()
MEANS += ["forward_sequences", "forward_tokens", "training_seconds"]
"""Of a row of the table, over its seeds."""

LABELS = {
    "in_context": "answered examples in context",
    "probe": "a probe of hidden states",
    "calibrated": "calibrated scores",
    "centroid": "nearest centroid",
    "boost": "recipe boost",
    "boost_128": "recipe boost, two boosters\nof 128 examples",
    "mezo_lora_r1": "MeZO-LoRA r = 1",
    "mezo_lora_r8": "MeZO-LoRA r = 8",
    "zo_lora_r1": "zeroth-order LoRA r = 1,\ndirections per example",
    "zo_lora_r1_probes2": "the same, two directions each",
    "zo_xgblora": "zeroth-order XGBLoRA",
    "zo_xgblora_probes2": "the same, two directions each\n(XGBLoRA)",
    "drawn_lora_r1": "zeroth-order LoRA r = 1,\npair drawn from activations",
    "drawn_lora_r8": "the same, r = 8",
    "drawn_xgblora": "zeroth-order XGBLoRA,\npairs drawn from activations",
    "drawn_xgblora_d8": "the same, boosters of up to\neight directions",
    "backprop_lora_r1": "backprop LoRA r = 1",
    "backprop_lora_r5": "backprop LoRA r = 5",
    "backprop_lora_r8": "backprop LoRA r = 8",
    "backprop_xgblora": "backprop XGBLoRA, 5 boosters",
}


class Runs:
    """Runs of the comparison, each carried out once."""

    def __init__(self, root: Path, task: str, common: Mapping[str, Any], fixed: Mapping[str, float]) -> None:
        self.task = Path(task).stem
        self.root = root / self.task
        self._named = {"task_name" if task in TASKS else "task_file": task}
        self.common = common
        self.fixed = fixed
        self._workspace: tuple[int, Workspace] | None = None

    def result(self, method: str, value: float, seed: int) -> RunResult:
        """What one run reached, from its folder where it is finished."""
        flags, tuned, _ = METHODS[method]
        folder = self.root / f"{method}_{tuned}_{value:g}_seed{seed}"
        values = {"per_device_train_batch_size": 16, **self.common} | self._named | flags
        backprop_steps = values.pop("backprop_steps")
        if "backprop" in method:
            values["max_steps"] = backprop_steps
        if "boost" in method:  # a step is a booster
            del values["per_device_train_batch_size"], values["max_steps"]
        value = int(value) if tuned in ("num_train", "xgblora_init_examples") else value
        if tuned != "boost_ridge" or value != CHOSEN:
            values[tuned] = value
        values |= {"seed": seed, "train_set_seed": seed, "output_dir": str(folder)}
        config = RunConfig(**values)
        result = finished_result(config)
        if result is None:
            if self._workspace is None or self._workspace[0] != seed:
                self._workspace = seed, Workspace(changed(config, num_train=COMMON["num_train"]))
            result = run(config, self._workspace[1])
            print(f"{self.task}, {folder.name}: dev {result.dev_accuracy:.3f}, {result.dev_loss:.4f}", flush=True)
        return result

    def tuned(self, method: str, seed: int) -> float:
        """The trial with the lowest dev loss, where the value is not fixed."""
        if method in self.fixed:
            return self.fixed[method]
        trials = METHODS[method][2]
        return min(trials, key=lambda value: self.result(method, value, seed).dev_loss or 0.0)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    draw = np.random.default_rng(0)
    means = draw.choice(differences, size=(10_000, len(differences))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(runs: Runs, methods: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """Run what is missing of one task, print and write the comparison; returns a row for each method."""
    chosen = {method: runs.tuned(method, seeds[0]) for method in methods}
    results: dict[str, list[RunResult]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            results[method].append(runs.result(method, chosen[method], seed))
    accuracies = {method: 100 * np.array([result.accuracy for result in results[method]]) for method in methods}
    rows = []
    for method, group in results.items():
        row: dict[str, Any] = {"method": method, METHODS[method][1]: chosen[method]}
        row |= {"test": accuracies[method].tolist()} | difference(accuracies, method)
        for name in MEANS:
            row[name] = float(np.mean([getattr(result, name) or 0.0 for result in group]))
        row["peak_memory_mb"] = max(result.peak_memory_mb or 0.0 for result in group)
        row["zero_shot"] = 100 * float(np.mean([result.zero_shot_accuracy for result in group]))
        rows.append(row)
    table = _table(f"{runs.task}, {results[methods[0]][0].rows['evaluation']:,} test rows, {len(seeds)} seeds")
    for title in ("tuned", "dev %", "test loss", "score %", "sequences", "tokens", "train s", "peak MB"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            *_cells(row),
            *(f"{chosen[row['method']]:g}", f"{100 * row['dev_accuracy']:.1f}", f"{row['eval_loss']:.3f}"),
            "" if results[row["method"]][0].score is None else f"{100 * row['score']:.1f}",
            *(f"{row['forward_sequences']:,.0f}", f"{row['forward_tokens']:,.0f}", f"{row['training_seconds']:.0f}"),
            f"{row['peak_memory_mb']:,.0f}",
        )
    Console(width=150).print(table)
    write_json(runs.root / "results.json", rows)
    return rows


def difference(accuracies: dict[str, np.ndarray], method: str) -> dict[str, Any]:
    """Boost minus ``method``, paired, with its interval; nothing for boost itself or without it."""
    if method == "boost" or "boost" not in accuracies:
        return {}
    differences = accuracies["boost"] - accuracies[method]
    return {"boost_minus": float(differences.mean()), "interval": interval(differences)}


def _table(title: str) -> Table:
    table = Table(title=title)
    table.add_column("method")
    for column in ("test %", "boost minus it"):
        table.add_column(column, justify="right")
    return table


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    accuracy = np.array(row["test"])
    spread = accuracy.std(ddof=1) if len(accuracy) > 1 else 0.0
    against = "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["boost_minus"], *row["interval"]) if "interval" in row else ""
    return row["method"], f"{accuracy.mean():.1f} ± {spread:.1f}", against


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Test accuracy of every method: a bar for the mean, a dot for each seed; a panel for each task."""
    most = max(len(rows) for rows in tables.values())
    figure = Figure(figsize=(4 + 5 * len(tables), 1.4 + 0.6 * most), layout="constrained")
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (task, rows) in zip(panels, tables.items(), strict=True):
        for row in rows:
            name, mean = LABELS[row["method"]], np.mean(row["test"])
            colour = "#D55E00" if "boost" in row["method"] else "#999999" if "backprop" in row["method"] else "#0072B2"
            axes.barh(name, mean, color=colour, height=0.65)
            axes.plot(row["test"], [name] * len(row["test"]), "o", color="black", markersize=3)
            work = f"{row['forward_sequences']:,.0f} examples forwarded"
            work += " and backward" if "backprop" in row["method"] else ""
            axes.annotate(f"{mean:.1f} %, {work}", (2, name), color="white", va="center")
        zero_shot = axes.axvline(rows[0]["zero_shot"], color="black", linestyle="--", linewidth=1)
        axes.set(title=task, xlabel=f"test accuracy (%), zero-shot {rows[0]['zero_shot']:.1f} %", xlim=(0, 100))
    panels[0].invert_yaxis()
    dots = panels[0].plot([], [], "o", color="black", markersize=3)
    figure.legend([zero_shot, *dots], ["zero-shot", "a seed"], loc="outside upper right", ncols=2, fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, then print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["RottenTomatoes"], help="Names, or task files.")
    parser.add_argument("--methods", nargs="+", default=TRAINED, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output_root", type=Path, default=Path("runs/boosting"))
    parser.add_argument("--steps", type=int, default=STEPS, help="Steps of the methods that take steps.")
    parser.add_argument("--fixed", nargs="+", default=[], help="METHOD=VALUE: no trials of this method.")
    parser.add_argument("--model_name", default=EMBEDDED_MODEL)
    parser.add_argument("--unpack", action="store_true", help="Unpack a .gguf file once, as train --unpack does.")
    parser.add_argument("--prompt_beginning", default="none", help="As train --prompt_beginning, for every method.")
    parser.add_argument("--num_eval", type=int, default=COMMON["num_eval"], help="Test rows, at most.")
    parser.add_argument("--backprop_steps", type=int, default=BACKPROP_STEPS, help="Steps of backpropagation.")
    parser.add_argument("--other_text", help="As train --other_text: what a method forgets.")
    parser.add_argument("--num_dev", type=int, default=COMMON["num_dev"], help="Dev rows.")
    asked = parser.parse_args()
    fixed = {method: float(value) for method, value in (pair.split("=") for pair in asked.fixed)}
    if unknown := [task for task in asked.tasks if task not in TASKS and not Path(task).is_file()]:
        parser.error(f"no task and no task file: {', '.join(unknown)}")
    if strangers := fixed.keys() - set(asked.methods):
        parser.error(f"--fixed names {', '.join(sorted(strangers))}, which --methods does not")
    common = COMMON | {"max_steps": asked.steps, "model_name": asked.model_name, "unpack": asked.unpack}
    common |= {name: getattr(asked, name) for name in ("prompt_beginning", "num_eval", "num_dev", "backprop_steps")}
    common |= {"other_text": asked.other_text}
    tables = {
        task: compare(Runs(asked.output_root, task, common, fixed), asked.methods, asked.seeds) for task in asked.tasks
    }
    draw(tables, asked.output_root / "accuracy.png")
    if len(tables) > 1:
        means = {
            rows[0]["method"]: np.mean([row["test"] for row in rows], axis=0)
            for rows in zip(*tables.values(), strict=True)
        }
        table = _table(f"Mean over {', '.join(asked.tasks)}; {len(asked.seeds)} seeds")
        for method, accuracy in means.items():
            table.add_row(*_cells({"method": method, "test": accuracy} | difference(means, method)))
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
