"""What a fit to layer inputs knows before it is put into the model, and how the model follows it.

    python benchmarks/pseudo_residuals.py [--seeds 0 1 2] [--json FILE]

SmolLM2-135M in bfloat16 on Rotten Tomatoes. For several choices of layers and ridges, one learner is fitted on 1,000
training rows; *predicted* is the accuracy and loss on 500 dev rows if the layers above passed its output on unchanged
(final hidden state plus f u, or, with the base's opinion dropped, f u in place of what is there along u); the dev rows
are forwarded once for it. Then one booster (upper half, attention fitted to the labels and MLP turned down, ridge 3) is
put into the model with several step lengths: *realised* accuracy and loss on the dev rows, the correlation over rows of
the realised with the predicted change of the options' difference, and its slope (1 = passed on unchanged, per unit of
step).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xgblora import Base, Example, LayerSubset, OptionLoss, RunConfig, attach, evaluate
from xgblora.learn.fitted.activations import Forwards, Observed
from xgblora.learn.fitted.boost import put
from xgblora.learn.fitted.fit import fit
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.fitted.teacher import without
from xgblora.runs.workspace import Workspace

DROPPED = "attention, opinion dropped"
TARGETS = {
    "attention": ["o_proj"],
    DROPPED: ["o_proj"],
    "MLP": ["down_proj"],
    "attention, MLP turned down": ["o_proj", "down_proj"],
}
FOLLOWED = ("attention, MLP turned down", "upper half", 3.0)
LAYERS = {"upper half": 15, "all": 30}
RIDGES = (0.3, 1.0, 3.0, 10.0)
STEPS = (0.5, 1.0, 2.0, 3.0, 4.0)


def predicted(forwards: Forwards, seen: Observed, shift: Tensor | float = 0.0) -> Tensor:
    """Option scores (rows, options) if final hidden states moved by ``shift`` (rows, hidden)."""
    ((batch, _),) = TailLoss(forwards, seen).parts  # options of one token: one part
    return forwards.tail.scores(seen.hidden + shift, batch, False)


def score(scores: Tensor, label: Tensor) -> tuple[float, float]:
    """Accuracy and mean loss."""
    return (scores.argmax(1) == label).float().mean().item(), OptionLoss().of_scores(scores, label).mean().item()


@torch.no_grad()
def measure(base: Base, train: list[Example], dev: list[Example]) -> list[dict[str, Any]]:
    """All rows of the tables for one draw of training and dev rows."""
    rows: list[dict[str, Any]] = []
    label = torch.tensor([e.label for e in sorted(dev, key=lambda e: len(e.prompt))])
    for kind, targets in TARGETS.items():
        for where, count in LAYERS.items():
            adapters = attach(base, 1, 1, targets, xgblora=True, layers=LayerSubset(count, "top"))
            with base.without_gradients():
                forwards = Forwards(adapters, OptionLoss())
                seen, held_out = forwards.observe(train, dev)
                loss = TailLoss(forwards, seen)
                before = predicted(forwards, held_out)
                directions: int | Tensor = 1
                if kind == DROPPED:
                    directions = fit(seen, loss, 1.0).outputs
                    seen, held_out = (replace(o, hidden=without(o.hidden, directions)) for o in (seen, held_out))
                for ridge in RIDGES:
                    learner = fit(seen, loss, ridge, directions)
                    after = predicted(forwards, held_out, learner.at(held_out) @ learner.outputs)
                    accuracy, value = score(after, label)
                    rows.append({"layers": f"{kind}, {where}", "ridge": ridge, "accuracy": accuracy, "loss": value})
                    if (kind, where, ridge) != FOLLOWED:
                        continue
                    wanted = (after - before).diff(dim=1)[:, 0]
                    for step in STEPS:
                        put(adapters, learner, step)
                        realised = predicted(forwards, forwards.observe(dev)[0])
                        moved = (realised - before).diff(dim=1)[:, 0]
                        real = evaluate(base, dev, batch_size=64)
                        correlation = torch.corrcoef(torch.stack([wanted, moved]))[0, 1].item()
                        slope = ((wanted @ moved) / (wanted @ wanted) / step).item()
                        rows.append({"step": step, "accuracy": real.accuracy, "loss": real.loss})
                        rows[-1] |= {"correlation": correlation, "slope": slope}
            adapters.detach()
    return rows


def main() -> None:
    """Measure with every seed and print means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    tables = []
    for seed in asked.seeds:
        config = RunConfig(output_dir="unused", load_bfloat16=True, disable_tqdm=True, train_set_seed=seed, num_eval=1)
        workspace = Workspace(config)
        tables.append(measure(workspace.base, workspace.train, workspace.dev))
    for same in zip(*tables, strict=True):
        mean = {
            name: sum(row[name] for row in same) / len(same) if isinstance(value, float) else value
            for name, value in same[0].items()
        }
        print("  ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{v}" for n, v in mean.items()), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
