"""The pictures of docs/from_lora_to_boosting.md, of a small model on film reviews.

    python benchmarks/method_pictures.py [--output docs] [--num_train 400]

The base is SmolLM2-135M-Instruct, the task Rotten Tomatoes; nothing in the pictures is made up. Written:
``method_lora.png``, part of what one booster adds to a weight, as the product of its column and its row;
``method_probe.png``, the loss of 64 examples along one random direction; ``method_boosters.png``, the loss of 200 dev
rows with the first 0, 1, ... boosters of recipe boost.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xgblora import (
    Adapters,
    Base,
    Example,
    LayerSubset,
    RunConfig,
    Trainer,
    attach,
    encode,
    evaluate_stages,
    get_task,
    load_model,
    load_splits,
    residual_writers,
    sample,
)
from xgblora.learn.estimators import losses_along
from xgblora.learn.losses import OptionLoss
from xgblora.tasks import begun

SHOWN = 24
"""Rows and columns of a weight that are drawn."""
BLUE, ORANGE = "#0072B2", "#D55E00"


def rows_of(tokenizer: object, count: int) -> tuple[list[Example], list[Example]]:
    """Training and dev rows."""
    task = begun(get_task("RottenTomatoes"), "auto", tokenizer)  # type: ignore[arg-type]
    drawn = sample(load_splits(task), num_train=count, num_dev=200, num_eval=1)
    train, dev = (encode(task, split, tokenizer, 256) for split in (drawn.train, drawn.dev))  # type: ignore[arg-type]
    return train, dev


def boosted(train: list[Example], model: object) -> Adapters:
    """Four boosters by the recipe."""
    base = Base(model)  # type: ignore[arg-type]
    upper = LayerSubset(len(base.layers) // 2, "top")
    adapters = attach(base, 1, 16, residual_writers(base), xgblora=True, layers=upper)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            output_dir=folder,
            recipe="boost",
            boost_boosters=4,
            early_stopping_boosters=0,
            save_strategy="no",
            use_cpu=True,
        )
        Trainer(model, config, adapters, train).train()  # type: ignore[arg-type]
    return adapters


def draw_lora(adapters: Adapters, file: Path) -> None:
    """Part of what the first booster adds to the weight that it changes most, as column times row."""
    layer = max(adapters.layers.values(), key=lambda one: float(one.booster_B[:, :1].norm() * one.booster_A[:1].norm()))
    column, row = (part.detach().float().numpy() for part in (layer.booster_B[:SHOWN, :1], layer.booster_A[:1, :SHOWN]))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(SHOWN, 3, SHOWN))
    for axes, values, title in zip(
        panels, (column @ row, column, row), ("ΔW, part of it", "= B", "times A"), strict=True
    ):
        most = float(np.abs(values).max())
        axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="equal")
        axes.set(title=title, xticks=[], yticks=[])
    figure.suptitle(f"{SHOWN} x {SHOWN} numbers from {SHOWN} + {SHOWN}", fontsize=11)
    figure.savefig(file, dpi=120)


@torch.no_grad()
def draw_probe(model: object, rows: list[Example], file: Path) -> None:
    """The loss along a random direction of a fresh pair, with one probe either way."""
    adapters = attach(model, rank=1, alpha=16, xgblora=True)  # type: ignore[arg-type]
    batch = adapters.base.batch(rows[:64])
    direction = torch.randn(1, adapters.size, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(-0.018, 0.018, 13)
    losses = []
    for length in lengths:
        along = losses_along(adapters, OptionLoss(), batch, None, 1)
        losses.append(along(direction, length.repeat(batch.segments)[:, None]).mean().item())
    adapters.detach()
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(lengths, losses, color=BLUE)
    for place, name in ((2, "one way"), (10, "the other way")):
        axes.plot(lengths[place], losses[place], "o", color=ORANGE, markersize=9)
        axes.annotate(name, (lengths[place], losses[place]), (0, 10), textcoords="offset points", ha="center")
    axes.plot(lengths[[2, 10]], [losses[2], losses[10]], "--", color=ORANGE)
    axes.set(
        xlabel="how far along a random direction",
        ylabel="loss of 64 examples (nats)",
        title="Two probes, and the slope between them",
    )
    axes.margins(y=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def draw_boosters(adapters: Adapters, dev: list[Example], file: Path) -> None:
    """The loss of dev rows with the first boosters."""
    losses = [stage.loss for stage in evaluate_stages(adapters, dev, batch_size=64)]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes: Axes = figure.add_subplot()
    names = ["base", *(f"+ {number}" for number in range(1, len(losses)))]
    axes.bar(names, losses, color=["grey", *[BLUE] * (len(losses) - 1)], width=0.6)
    for name, loss in zip(names, losses, strict=True):
        axes.annotate(f"{loss:.3f}", (name, loss), (0, 3), textcoords="offset points", ha="center")
    axes.set(
        xlabel="boosters",
        ylabel="loss (nats)",
        title=f"What is still wrong on {len(dev)} film reviews that nothing was fitted to",
    )
    axes.margins(y=0.15)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--num_train", type=int, default=400)
    args = parser.parse_args()
    model, tokenizer = load_model("SmolLM2-135M-Instruct")
    train, dev = rows_of(tokenizer, args.num_train)
    draw_probe(model, train, args.output / "method_probe.png")
    adapters = boosted(train, model)
    draw_lora(adapters, args.output / "method_lora.png")
    draw_boosters(adapters, dev, args.output / "method_boosters.png")


if __name__ == "__main__":
    main()
